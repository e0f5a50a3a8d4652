"""How likely the gold answer is in every state, against a plain forward pass for every state and answer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chat_templates import LLAMA3_2, LLAMA_SPECIAL, QWEN2_5, QWEN2_5_ADDED, QWEN3, QWEN3_ADDED, chat_tokenizer
from model_toys import chain_model, plain_logprobs, tag_tokenizer
from rollout_toys import after
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from carl_gym.agents.agent import Agent, load_agent
from carl_gym.agents.card import AgentCard
from carl_gym.agents.chat_transcript import make_transcript
from carl_gym.agents.policy import Completion
from carl_gym.algorithms import get_algorithm
from carl_gym.algorithms.igpo import igpo
from carl_gym.envs.registration import make_task
from carl_gym.envs.state import EnvState, Question
from carl_gym.errors import ConfigError
from carl_gym.rollouts import RolloutTree, RootExplorer, collect
from carl_gym.training.answer_scores import Answer, AnswerEncoder, answer_encoder, answer_logprobs

WORDS = "name arguments answer Jane Austen Zürich . { } : _ user assistant"


def question(*answers: str) -> Question:
    return Question("q7", "Who?", answers)


def texts(tokenizer, answer: Answer) -> tuple[str, str]:
    """What is given, and what counts."""
    return tokenizer.decode(answer.tokens[: answer.start]), tokenizer.decode(answer.tokens[answer.start :])


def hosted(card: AgentCard) -> Agent:
    """An agent of which only card and transcript matter."""
    return Agent(card, None, None)  # type: ignore[arg-type]


def chat_agent(template: str, added, eos: str = "<|im_end|>", **settings) -> Agent:
    tokenizer = chat_tokenizer(template, added, eos=eos, words=WORDS)
    card = AgentCard("chat", "", "", transcript="chat", **settings)
    transcript = make_transcript(card, tokenizer, 2000, name="chat")
    return Agent(card, None, transcript, None, tokenizer)  # type: ignore[arg-type]


# How answers are written


def test_the_tokens_of_the_answer_itself_count():
    tokenizer = tag_tokenizer()
    short, spaced = AnswerEncoder(tokenizer)(question("Jane  Austen "))
    assert texts(tokenizer, short) == ("<answer>", "Jane Austen") and short.start == 1
    given, counted = texts(tokenizer, spaced)
    assert (given + counted, counted.strip()) == ("<answer> Jane Austen", "Jane Austen")
    assert tokenizer.convert_tokens_to_ids("</answer>") not in short.tokens


def test_a_token_that_overlaps_the_answer_counts():
    # Characters, and a token for ">5": the answer begins inside it.
    vocabulary = {character: number for number, character in enumerate("<>/answer5.")}
    merged = Tokenizer(models.BPE({**vocabulary, ">5": 20}, [(">", "5")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merged)
    (answer,) = AnswerEncoder(tokenizer, heads=("<answer>",))(question("5.5"))
    assert tokenizer.convert_ids_to_tokens(answer.tokens) == [*"<answer", ">5", ".", "5"] and answer.start == 7


def test_every_alias_is_asked_for():
    encode = AnswerEncoder(tag_tokenizer(), heads=("<answer>",))
    aliases = encode(question("Jane Austen", "Austen"))
    assert [texts(encode.tokenizer, alias)[1] for alias in aliases] == ["Jane Austen", "Austen"]


def test_answers_that_no_action_can_hold_are_left_out_or_refused_by_question():
    encode = AnswerEncoder(tag_tokenizer())
    assert len(encode(question("", "<answer>no", "yes"))) == 2  # both ways to write "yes"
    for answers in ((), ("",), ("a</answer>b", "x" * 10_000)):
        with pytest.raises(ConfigError, match="question 'q7' has no gold answer"):
            encode(question(*answers))


def test_the_tiny_agent_answers_in_tags():
    agent = load_agent("tiny", device="cpu")
    answers = answer_encoder(agent)(question("Corrin"))
    assert [texts(agent.tokenizer, answer) for answer in answers] == [("<answer>", "Corrin"), ("<answer>", " Corrin")]


@pytest.mark.parametrize("template", [(QWEN2_5, QWEN2_5_ADDED), (QWEN3, QWEN3_ADDED)])
def test_a_chat_agent_with_json_tools_answers_by_a_tool_call(template):
    agent = chat_agent(*template, tool_format="json", tool_role="tool")
    (answer,) = answer_encoder(agent)(question('Jane "J" Zürich'))
    given, counted = texts(agent.tokenizer, answer)
    assert given == '<tool_call>\n{"name": "answer", "arguments": {"answer": "'
    assert counted.removesuffix('"') == 'Jane \\"J\\" Zürich'  # a token may take the closing quote along


def test_a_chat_agent_with_tags_closes_a_thought_that_its_template_opened():
    opened = QWEN3.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
    assert opened != QWEN3
    agent = chat_agent(opened, QWEN3_ADDED)
    answer, _ = answer_encoder(agent)(question("Jane"))
    given, counted = texts(agent.tokenizer, answer)
    assert given.endswith("information to answer\n</think>\n<answer>") and counted == "Jane"
    closed, _ = answer_encoder(chat_agent(QWEN3, QWEN3_ADDED))(question("Jane"))
    assert texts(agent.tokenizer, closed) == ("<answer>", "Jane")


def test_agents_whose_answers_cannot_be_told_are_refused():
    with pytest.raises(ConfigError, match=r"'llama'.*hosted"):
        answer_encoder(hosted(AgentCard("llama", "", "")))
    llama = chat_agent(LLAMA3_2, LLAMA_SPECIAL, "<|eot_id|>", tool_format="json", tool_role="tool")
    with pytest.raises(ConfigError, match=r"<tool_call>.*tool_format"):
        answer_encoder(llama)


# How likely they are


def small_tree(*observations: tuple[int, ...]) -> RolloutTree:
    """The root prompt (1,), then a chain of actions (2,) with these observations, then the end."""
    tree = RolloutTree(question("yes"), policy_version=0)
    here = tree.add_root(EnvState("q7"), (1,))
    for seen in (*observations, None):
        state = after(tree.nodes[here].state, "go")
        action = Completion((2,), (-1.0,), "go", "stop")
        here = tree.add_child(here, action, state, seen or (), 0.0, seen is None, False, 0)
    return tree


def test_known_probabilities():
    # After 1: 5 with .25; after 3: 5 with .5; after 5: 6 with .1. The answer is (5, 6), or (6,) after a given 5.
    # Root (ends in 1): mean of ln .25, ln .1. Node 1 (ends in 3): ln .5, ln .1. The alias 6: ln .1 in both.
    model = chain_model(8, {1: {5: 0.25, 7: 0.75}, 3: {5: 0.5, 7: 0.5}, 5: {6: 0.1, 7: 0.9}, 2: {3: 1.0}})
    tree, other = small_tree((3,)), small_tree((3,))
    for packing in ("tree", "rows"):
        answer_logprobs(model, lambda _: [Answer((5, 6), 0)], [tree], context=512, batch_tokens=100, packing=packing)
        expected = [(math.log(0.25) + math.log(0.1)) / 2, (math.log(0.5) + math.log(0.1)) / 2, math.nan]
        assert tree.scores["answer_logprob"] == pytest.approx(expected, abs=1e-5, nan_ok=True)
        both = [Answer((5, 6), 0), Answer((5, 6), 1)]
        answer_logprobs(model, lambda _, both=both: both, [other], context=512, batch_tokens=100, packing=packing)
        assert other.scores["answer_logprob"] == pytest.approx(expected, abs=1e-5, nan_ok=True)  # ln .1 is less
    answer_logprobs(model, lambda _: [Answer((5, 6), 1)], [tree], context=512, batch_tokens=100, temperature=0.5)
    # At temperature 1/2: .1^2 / (.1^2 + .9^2) = .0121951.
    assert tree.scores["answer_logprob"][:2] == pytest.approx([math.log(0.0121951)] * 2, abs=1e-4)


def test_without_room_a_state_keeps_the_score_of_the_one_before():
    # Prefixes of 1, 1 + 1 + 2 = 4 and 4 + 1 + 3 = 8 tokens; the answer has 2: 10 tokens hold it everywhere, 9 do not.
    model = chain_model(8, {1: {5: 0.25, 7: 0.75}, 3: {5: 0.5, 7: 0.5}, 4: {5: 0.125, 7: 0.875}, 5: {6: 1.0}})
    first, second, third = (math.log(p) / 2 for p in (0.25, 0.5, 0.125))
    for context, last in ((10, third), (9, second), (5, first)):
        tree = small_tree((3, 3), (4, 4, 4))
        answer_logprobs(model, lambda _: [Answer((5, 6), 0)], [tree], context=context, batch_tokens=100)
        middle = second if context > 5 else first
        assert tree.scores["answer_logprob"] == pytest.approx([first, middle, last, math.nan], abs=1e-5, nan_ok=True)
        assert np.isfinite(igpo().credit([tree])[0]).all()
    with pytest.raises(ConfigError, match=r"'q7' has 2 tokens.*room for 1"):
        answer_logprobs(model, lambda _: [Answer((5, 6), 0)], [small_tree()], context=2, batch_tokens=100)


@pytest.fixture(scope="module")
def agent() -> Agent:
    return load_agent("tiny", device="cpu")


@pytest.fixture(scope="module")
def trees(agent: Agent) -> list[RolloutTree]:
    task = make_task("carl/MiniWiki-v0", questions=2)
    found = list(task.questions.values())
    found[0] = replace(found[0], answers=(*found[0].answers, "someone else"))
    return collect(task, agent.policy, agent.transcript, found, RootExplorer(2), seed=1, step=1)


@pytest.fixture(scope="module")
def plain(agent: Agent, trees: list[RolloutTree]) -> list[list[float]]:
    """The scores, by a forward pass for every state and way to write the answer."""
    encode = answer_encoder(agent)
    agent.model.eval()

    def score(tree: RolloutTree, state: int) -> float:
        prefix = tree.prefix(state)
        return max(
            float(plain_logprobs(agent.model, (*prefix, *way.tokens[: way.start]), way.tokens[way.start :]).mean())
            for way in encode(tree.question)
        )

    return [[math.nan if node.terminal else score(tree, node.id) for node in tree.nodes] for tree in trees]


@pytest.mark.parametrize(("packing", "batch_tokens"), [("tree", 8192), ("tree", 300), ("rows", 4096)])
def test_scores_are_those_of_a_plain_forward_pass(agent, trees, plain, packing, batch_tokens):
    agent.model.train()
    context = agent.transcript.context
    answer_logprobs(
        agent.model, answer_encoder(agent), trees, context=context, batch_tokens=batch_tokens, packing=packing
    )
    assert agent.model.training
    for tree, expected in zip(trees, plain, strict=True):
        assert tree.scores["answer_logprob"] == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_scoring_leaves_no_gradient_and_makes_credit_possible(agent: Agent, trees: list[RolloutTree]):
    answer_logprobs(agent.model, answer_encoder(agent), trees, context=agent.transcript.context, batch_tokens=8192)
    assert all(parameter.grad is None for parameter in agent.model.parameters())
    assert torch.is_grad_enabled()
    algorithm = get_algorithm("igpo", rollouts=2)
    assert algorithm.requires == ("gold answers",)
    for advantage in algorithm.credit(trees):
        assert np.isfinite(advantage).all() and (advantage != 0).any()
