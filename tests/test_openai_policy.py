"""The policy for chat-completions endpoints: requests, actions and whole episodes, over real HTTP (openai_toys)."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace

import pytest
from openai_toys import TOOLS, Body, ChatServer, Reply, ask, error, message, starting

from carl_gym.agents.messages import decode
from carl_gym.agents.policy import Policy, SampleRequest
from carl_gym.agents.scripted import ByteTranscript, OraclePolicy
from carl_gym.envs.protocol import parse
from carl_gym.envs.registration import make_task
from carl_gym.envs.state import ParsedAction, Question
from carl_gym.envs.task import SearchTask
from carl_gym.errors import PolicyError
from carl_gym.evaluation.episodes import Episode, play
from carl_gym.rollouts import RootExplorer, collect
from carl_gym.rollouts.collector import Transcript
from carl_gym.rollouts.explorers import EntropyForking
from carl_gym.training.segments import segments
from scripts.evaluate import main as evaluate


@pytest.fixture
def start():
    with starting() as start:
        yield start


@pytest.fixture(scope="module")
def task() -> SearchTask:
    return make_task("carl/MiniWiki-v0", split="test", questions=20)


def test_a_request_and_its_action(start, monkeypatch):
    monkeypatch.setenv("TOY_KEY", "sk-secret\n")
    said = message("I search.", ("search", {"query": "Ulm"}), reasoning_content="hm", reasoning="hm")
    policy, transcript, server = start(lambda *_: said, api_key_variable="TOY_KEY", instruction="Be brief.")
    found = ask(policy, transcript, temperature=0.25)
    assert server.bodies == [
        {
            "model": "toy",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
            "tools": TOOLS,
            "parallel_tool_calls": False,
            "max_completion_tokens": 50,
            "temperature": 0.25,
            "seed": 1,
        }
    ]
    assert server.keys == ["Bearer sk-secret"]
    assert found.text == 'I search.<tool_call>{"name": "search", "arguments": {"query": "Ulm"}}</tool_call>'
    function = {"name": "search", "arguments": '{"query": "Ulm"}'}
    call = {"id": "id0", "type": "function", "function": function}
    assert decode(found.token_ids) == [{"role": "assistant", "content": "I search.", "tool_calls": [call]}]
    assert found.finish_reason == "stop"
    assert len(found.logprobs) == len(found.token_ids) and all(map(math.isnan, found.logprobs))
    usage = policy.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.requests, usage.retries) == (7, 3, 1, 0)


def test_fields_can_be_left_out_added_and_renamed(start):
    policy, transcript, server = start(
        lambda *_: message("?"),
        omit=("temperature", "seed", "parallel_tool_calls"),
        extra_body={"tool_choice": "required"},
        max_tokens_field="max_tokens",
    )
    ask(policy, transcript)
    assert set(server.bodies[0]) == {"model", "messages", "tools", "tool_choice", "max_tokens"}


def test_functions_can_be_marked_strict(start):
    policy, transcript, server = start(lambda *_: message("?"), strict=True)
    ask(policy, transcript)
    sent = [tool["function"] for tool in server.bodies[0]["tools"]]
    assert sent == [tool["function"] | {"strict": True} for tool in TOOLS]
    assert all(set(tool["parameters"]["required"]) == set(tool["parameters"]["properties"]) for tool in sent)


def test_sampling_from_within_an_event_loop(start):
    policy, transcript, _ = start(lambda *_: message("<answer>Ulm</answer>"))

    async def in_a_notebook() -> str:
        return ask(policy, transcript).text

    assert asyncio.run(in_a_notebook()) == asyncio.run(in_a_notebook()) == "<answer>Ulm</answer>"


def test_of_several_calls_the_first_is_the_action_and_the_next_request_is_valid(start):
    two = message(None, ("search", {"query": "Ulm"}), ("answer", {"answer": "Ulm"}))
    policy, transcript, server = start(lambda body, number: two if number == 0 else message("", ("read", "")))
    first = ask(policy, transcript)
    assert parse(first.text) == ParsedAction("search", "Ulm")
    prefix = transcript.prompt("Who?") + first.token_ids + transcript.observation("Ulm is", first.token_ids)
    (second,) = policy.sample([SampleRequest(prefix, seed=2)])  # the server refuses calls without an answer
    assert parse(second.text) == ParsedAction("read")
    assert [said["role"] for said in server.bodies[1]["messages"]] == ["system", "user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("reply", "text", "finish"),
    [
        (message("<search>Ulm</search>"), "<search>Ulm</search>", "eos"),
        (message("<answer>Ul", finish="length"), "<answer>Ul", "length"),
        (message(None, finish="length", reasoning_content="thinks on"), "", "length"),
        (message(None, refusal="I cannot help."), "I cannot help.", "eos"),
    ],
)
def test_replies_without_a_call_are_the_models_own_doing(start, reply, text, finish):
    policy, transcript, server = start(lambda *_: reply)
    found = ask(policy, transcript)
    assert (found.text, found.finish_reason) == (text, finish) and found.token_ids
    assert len(server.bodies) == 1


def test_tag_mode_tells_the_tags_and_gives_back_what_the_stop_string_cut(start):
    replies = ["<think>so</think><search>Ulm", "<answer>Ulm</answer>", "no idea"]
    policy, transcript, server = start(lambda body, number: message(replies[number]), tool_mode="tags")
    assert ask(policy, transcript).text == "<think>so</think><search>Ulm</search>"
    assert ask(policy, transcript).text == "<answer>Ulm</answer>"
    assert ask(policy, transcript).text == "no idea"
    assert server.bodies[0]["stop"] == ["</search>", "</access>", "</read>", "</answer>"]
    assert "tools" not in server.bodies[0] and "parallel_tool_calls" not in server.bodies[0]
    system = server.bodies[0]["messages"][0]["content"]
    assert "<search>query</search> Find passages." in system and "<read></read> " in system


def oracle_plans(task: SearchTask) -> dict[str, list[ParsedAction]]:
    """What the oracle does about each question, by the text that an agent is shown."""
    plans = {}
    for question in task.questions.values():
        (tree,) = collect(task, OraclePolicy(task), ByteTranscript(), [question], RootExplorer(1), seed=0, step=0)
        actions = [turn.action for turn in tree.leaves()[0].state.turns]
        plans[task.observation(task.initial(question))] = actions
    return plans


def next_call(plans: dict[str, list[ParsedAction]], body: Body) -> tuple[str, dict[str, str]]:
    messages = body["messages"]
    action = plans[messages[1]["content"]][sum(said["role"] == "assistant" for said in messages)]
    argument = {"search": "query", "access": "title", "answer": "answer"}[action.kind]
    return action.kind, {argument: action.argument}


def episodes(task: SearchTask, policy: Policy, transcript: Transcript, questions: list[Question]) -> list[Episode]:
    """What was played, without the numbers of tokens."""
    (found,) = play(task, policy, transcript, questions, temperature=1.0)
    return [replace(episode, prompt_tokens=None, generated_tokens=None) for episode in found]


def oracle_episodes(task: SearchTask, questions: list[Question]) -> list[Episode]:
    return episodes(task, OraclePolicy(task), ByteTranscript(), questions)


def test_a_server_that_calls_the_oracles_tools_plays_the_oracles_episodes(task, start):
    plans = oracle_plans(task)

    def answer(body: Body, number: int) -> Reply:
        if number % 5 == 4:
            return error(500, "now and then")
        return message("Hm. <answer>no</answer>", next_call(plans, body), ("read", {}))

    policy, transcript, server = start(answer, tools=task.tools)
    questions = list(task.questions.values())
    found, expected = episodes(task, policy, transcript, questions), oracle_episodes(task, questions)
    assert found == expected and all(episode.em == 1 for episode in found)
    assert policy.usage.retries == len(server.bodies) // 5 > 0
    assert server.bodies[0]["tools"] == task.tools


def test_the_evaluation_script_on_a_hosted_model(task, tmp_path):
    plans = oracle_plans(task)
    with ChatServer(lambda body, number: message(None, next_call(plans, body))) as server:
        options = ["--agents", "toy-5", "--backend", "openai", "--urls", server.url, "--env", "carl/MiniWiki-v0"]
        evaluate([*options, "--questions", "20", "--output-dir", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    (found,) = summary["environments"][0]["results"]
    assert found["agent"] == "toy-5" and found["em"] == found["gold_title_recall"] == 1.0
    assert {body["model"] for body in server.bodies} == {"toy-5"} and server.bodies[0]["tools"] == task.tools
    written = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text("utf-8").splitlines()]
    assert sum(episode["prompt_tokens"] for episode in written) == 7 * len(server.bodies)


def test_tag_mode_plays_them_too(task, start):
    plans = oracle_plans(task)

    def answer(body: Body, number: int) -> Reply:
        tool, arguments = next_call(plans, body)
        text = f"<think>Next.</think><{tool}>{next(iter(arguments.values()))}"  # the stop string is cut off
        return message(text)

    policy, transcript, _ = start(answer, tools=task.tools, tool_mode="tags")
    questions = list(task.questions.values())
    found, expected = episodes(task, policy, transcript, questions), oracle_episodes(task, questions)
    assert found == expected


REFUSALS = [
    "This model's maximum context length is 2048 tokens. However, your prompt contains 2100 input tokens",
    "Your input exceeds the context window of this model. Please adjust your input and try again.",
    "the request exceeds the available context size. try increasing the context size or enable context shift",
    "prompt is too long: 200082 tokens > 200000 maximum",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_full_context_ends_its_episode_and_no_other(task, start, refusal):
    plans = oracle_plans(task)
    questions = list(task.questions.values())
    unlucky = {task.observation(task.initial(question)) for question in questions[::2]}

    def answer(body: Body, number: int) -> Reply:
        messages = body["messages"]
        if messages[1]["content"] in unlucky and len(messages) > 4:
            return error(400, refusal)
        return message(None, next_call(plans, body))

    policy, transcript, _ = start(answer, tools=task.tools)
    found, expected = episodes(task, policy, transcript, questions), oracle_episodes(task, questions)
    assert found[1::2] == expected[1::2]
    for episode, whole in zip(found[::2], expected[::2], strict=True):
        assert (episode.status, episode.answer, episode.em) == ("out_of_context", None, 0)
        assert episode.turns == 2 and episode.invalid_actions == 0 and episode.actions == whole.actions[:2]


def test_a_context_without_room_for_the_question_is_an_error(start):
    policy, transcript, _ = start(lambda *_: error(400, REFUSALS[0]))
    with pytest.raises(PolicyError, match="maximum context length is 2048"):
        ask(policy, transcript)


def test_a_bad_call_in_mid_episode_costs_a_turn_and_the_conversation_goes_on(task, start):
    plans = oracle_plans(task)
    bad = message(None, ("search", '{"query": "Ulm'))

    def answer(body: Body, number: int) -> Reply:
        messages = body["messages"]
        if len(messages) == 2:
            return bad
        return message(None, next_call(plans, body | {"messages": messages[:1] + messages[1:2] + messages[4:]}))

    policy, transcript, server = start(answer, tools=task.tools)
    question = next(iter(task.questions.values()))
    (episode,) = episodes(task, policy, transcript, [question])
    assert episode.invalid_actions == 1 and episode.actions[0] == ("invalid", "")
    _, _, written, hint = server.bodies[1]["messages"]
    assert written["content"] == '<tool_call>{"name": "search", "arguments": "{\\"query\\": \\"Ulm"}</tool_call>'
    assert hint["role"] == "user" and "no valid JSON" in hint["content"]


def test_training_on_a_model_without_logprobs_is_refused(task, start):
    plans = oracle_plans(task)
    policy, transcript, _ = start(lambda body, number: message(None, next_call(plans, body)), tools=task.tools)
    questions = list(task.questions.values())[:1]
    with pytest.raises(PolicyError, match="entropy needs log-probs"):
        collect(task, policy, transcript, questions, EntropyForking(initial=2, forks=1), seed=0, step=0)
    (tree,) = collect(task, policy, transcript, questions, RootExplorer(2), seed=0, step=0)
    ones = [1.0] * len(tree.nodes)
    with pytest.raises(PolicyError, match="log-probs that are not known"):
        segments(tree, ones, ones)
    with pytest.raises(PolicyError, match="trained"):
        policy.sync()
    with pytest.raises(PolicyError, match="log-probs"):
        policy.score([(1,)], [(2,)])
