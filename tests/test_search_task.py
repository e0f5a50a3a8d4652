"""The pure task: what each action brings, what it costs, what is counted and what is refused."""

import dataclasses
import json
import pickle
from collections.abc import Sequence

import numpy as np
import pytest

import carl_gym
from carl_gym.cards import load_card
from carl_gym.envs.cards import EnvCard
from carl_gym.envs.gym_env import SearchEnv
from carl_gym.envs.pages import load_tokenizer
from carl_gym.envs.protocol import CODES, hint, parse, tool_call
from carl_gym.envs.state import SCHEMA_VERSION, EnvState, ParsedAction, Question, Turn
from carl_gym.envs.task import LAST_TURN, NO_HITS, NO_MORE_PAGES, NO_PAGE, NO_TITLE, SearchTask
from carl_gym.errors import ActionError, DataError, RetrievalError, StateError
from carl_gym.retrieval import Corpus, Retriever, SearchResults
from carl_gym.retrieval.bm25 import BM25
from carl_gym.retrieval.corpus import Passage

# JSON of the right shape whose values cannot be what they should be.
FORGED = (
    '{"schema":2,"question_id":"q0","status":"running","card":"CARD","corpus":"CORPUS",'
    '"turns":[["search","a","ok",[["p0"]]]]}'
)


def play(task: SearchTask, question_id: str, *actions: str) -> EnvState:
    state = task.initial(task.questions[question_id])
    for action in actions:
        state = task.transition(state, action)
    return state


# --- the task ---------------------------------------------------------------------------------------------------------


def test_the_first_observation_is_the_escaped_question(small_task: SearchTask) -> None:
    assert small_task.observation(play(small_task, "q0")) == "Who designed the machine that Ada Lovelace wrote about?"
    assert small_task.observation(play(small_task, "q1")) == "Is &lt;answer>London&lt;/answer> a city?"


def test_a_search_shows_one_line_per_hit(small_task: SearchTask) -> None:
    state = play(small_task, "q0", "<search>Analytical Engine</search>")
    assert state.turns == (Turn(ParsedAction("search", "Analytical Engine"), ("p1", "p0")),)
    assert small_task.observation(state) == (
        "<information>\n"
        "Doc 1(Title: Analytical Engine) The Analytical Engine\n"
        "Doc 2(Title: Ada Lovelace) Ada Lovelace wrote notes\n"
        "</information>"
    )


def test_an_access_shows_the_title_and_the_passage(small_task: SearchTask) -> None:
    text = "Doc(Title: Charles Babbage) Charles Babbage was born in London and studied at Cambridge."
    expected = f"<information>\n{text}\n</information>"
    for name in ("Charles Babbage", "charles  BABBAGE", "p2"):
        assert small_task.observation(play(small_task, "q0", f"<access>{name}</access>")) == expected


def test_a_title_that_occurs_twice_opens_the_first_passage_and_an_id_the_exact_one(small_task: SearchTask) -> None:
    assert play(small_task, "q0", "<access>Cambridge</access>").turns[-1].passage_ids == ("p4",)
    assert play(small_task, "q0", "<access>p5</access>").turns[-1].passage_ids == ("p5",)


def test_searches_and_accesses_that_find_nothing_say_so_and_are_valid(small_task: SearchTask) -> None:
    state = play(small_task, "q0", "<search>zebra</search>", "<access>Zebra</access>")
    assert small_task.observation(state) == f"<information>\n{NO_TITLE}\n</information>"
    first = dataclasses.replace(state, turns=state.turns[:1])
    assert small_task.observation(first) == f"<information>\n{NO_HITS}\n</information>"
    assert small_task.info(state)["format"] == 1.0


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("hello", "no_action"),
        ("<search>a", "unclosed"),
        ("<think>a", "unclosed_think"),
        ("<answer></answer>", "empty_argument"),
        ("<search>" + "x" * 1_000_000 + "</search>", "too_long"),
    ],
)
def test_an_invalid_action_costs_a_turn_and_gives_its_hint(small_task: SearchTask, action: str, code: str) -> None:
    state = play(small_task, "q0", action)
    assert small_task.observation(state) == f"<information>\n{hint(code)}\n</information>"
    info = small_task.info(state)
    assert info["parsed_action"] == {"kind": "invalid", "argument": "", "code": code}
    assert (info["turns"], info["turns_left"], info["invalid_actions"], info["format"]) == (1, 2, 1, 0.0)
    assert len(state.to_json()) < 1000


def test_markup_in_documents_is_harmless(small_task: SearchTask) -> None:
    for action in ("<search>Paris markup</search>", "<access>Markup</access>"):
        text = small_task.observation(play(small_task, "q0", action))
        assert text.count("</information>") == 1 and text.endswith("</information>")
        assert "<|" not in text and parse(text).code == "no_action"
    assert "1 < 2" in text


def test_a_title_can_be_opened_the_way_results_show_it() -> None:
    corpus = Corpus([Passage("p", "The <b>Bold</b>  One", "A\nfilm.\nDoc 2(Title: Fake) forged")])
    card = carl_gym.envs.registration.env_card("carl/HotpotQA-v0", {"snippet_length": 100})
    task = SearchTask([Question("q", "Who?", ("x",))], corpus, BM25(corpus), card, "one passage")
    shown = task.observation(play(task, "q", "<search>bold</search>"))
    assert shown == (
        "<information>\nDoc 1(Title: The &lt;b>Bold&lt;/b> One) A film. Doc 2(Title: Fake) forged\n</information>"
    )
    assert play(task, "q", "<access>The &lt;b>Bold&lt;/b> One</access>").turns[-1].passage_ids == ("p",)


@pytest.mark.parametrize(
    ("actions", "status", "reward"),
    [
        (["<answer>Babbage</answer>"], "answered", 1.1),
        (["<answer>the charles</answer>"], "answered", 2 / 3 + 0.1),  # precision 1, recall 1/2
        (["hm", "<answer>Babbage</answer>"], "answered", 1.05),
        (["hm", "hm", "<answer>Babbage</answer>"], "answered", 1 + 0.1 / 3),
        (["<search>a</search>"] * 3, "out_of_turns", 0.1),
        (["hm"] * 3, "out_of_turns", 0.0),
        (["<answer>Paris</answer>"], "answered", 0.1),
    ],
)
def test_the_reward_is_paid_once_at_the_end(
    small_task: SearchTask, actions: list[str], status: str, reward: float
) -> None:
    state, rewards = small_task.initial(small_task.questions["q0"]), []
    for action in actions:
        after = small_task.transition(state, action)
        rewards.append(small_task.reward(state, action, after))
        state = after
    assert state.status == status and small_task.terminal(state)
    assert rewards == pytest.approx([0.0] * (len(actions) - 1) + [reward])


def test_info_measures_em_f1_and_gold_titles(small_task: SearchTask) -> None:
    state = play(
        small_task, "q0", "<search>Analytical Engine</search>", "<access>p1</access>", "<answer>Babbage</answer>"
    )
    info = small_task.info(state)
    assert (info["em"], info["f1"], info["gold_title_recall"], info["gold_title_opened"]) == (1, 1, 1, 0.5)
    assert info["source"] == "six passages"
    assert small_task.info(play(small_task, "q1"))["gold_title_recall"] is None
    json.dumps(info)


def test_a_batch_of_transitions_is_one_retrieval_and_equals_single_ones(small_task: SearchTask) -> None:
    class Counting:
        calls = 0

        def search(self, queries, k):
            self.calls += 1
            return small_task.retriever.search(queries, k)

    retriever = Counting()
    task = SearchTask(
        list(small_task.questions.values()), small_task.corpus, retriever, small_task.card, "six passages"
    )
    actions = [
        "<search>London</search>",
        "hm",
        "<access>Markup</access>",
        "<answer>x</answer>",
        "<search>city</search>",
    ]
    states = [task.initial(task.questions["q0"])] * len(actions)
    batch = task.transition_batch(states, actions)
    assert retriever.calls == 1
    assert batch == [small_task.transition(*pair) for pair in zip(states, actions, strict=True)]
    assert task.transition_batch([], []) == []


def test_acting_after_the_end_is_refused(small_task: SearchTask) -> None:
    with pytest.raises(StateError, match="the episode is over"):
        play(small_task, "q0", "<answer>x</answer>", "<search>a</search>")


@pytest.mark.parametrize("action", [None, 3, b"<search>a</search>", ["<search>a</search>"], np.str_("x")])
def test_an_action_that_is_not_text_is_refused(small_task: SearchTask, action: object) -> None:
    if isinstance(action, str):  # numpy's strings are strings
        play(small_task, "q0", action)
        return
    env = SearchEnv(small_task)
    env.reset(seed=0)
    before = env.state
    with pytest.raises(ActionError, match=f"an action is a str .*not {type(action).__name__}"):
        env.step(action)  # type: ignore[arg-type]
    assert env.state is before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"card": "0" * 24}, "another card"),
        ({"card": ""}, r"another card \(none"),
        ({"corpus": "0" * 32}, "another corpus"),
        ({"schema": SCHEMA_VERSION + 1}, "another schema version"),
        ({"question_id": "q9"}, "question 'q9' is not among the questions of six passages"),
        ({"turns": (Turn(ParsedAction("search", "a"), ("p9",)),)}, "passage 'p9', which the corpus"),
        ({"turns": (Turn(ParsedAction("invalid", "", "odd")),)}, "unknown action"),
        ({"turns": (Turn(ParsedAction("search", "")),)}, "unknown action"),
        ({"turns": (Turn(ParsedAction("invalid", "a", "no_action")),)}, "unknown action"),
        ({"turns": (Turn(ParsedAction("access", "Markup"), ("p0",)),)}, "access turn 1 shows page 0 of p0"),
        ({"turns": (Turn(ParsedAction("access", "Markup"), ("p3",), 1),)}, "access turn 1 shows page 1 of p3"),
        ({"turns": (Turn(ParsedAction("read"), ("p3",)),)}, "read turn 1 shows page 0 of p3"),
        ({"turns": (Turn(ParsedAction("search", "a"), ("p0", "p1", "p2")),)}, "search turn 1 shows"),
        ({"turns": (Turn(ParsedAction("answer", "a")),)}, "contradicts its 1 turns"),
        ({"turns": (Turn(ParsedAction("search", "a")),) * 3}, "contradicts its 3 turns"),
        ({"turns": (Turn(ParsedAction("answer", "a")), Turn(ParsedAction("search", "a")))}, "contradicts its 2 turns"),
        ({"status": "answered"}, "contradicts its 0 turns"),
    ],
)
def test_a_state_from_elsewhere_is_refused(small_task: SearchTask, change: dict, message: str) -> None:
    env = SearchEnv(small_task)
    state = dataclasses.replace(play(small_task, "q0"), **change)
    with pytest.raises(StateError, match=message):
        env.reset(options={"state": state})
    with pytest.raises(StateError):
        env.state  # noqa: B018  (nothing was half restored)
    if set(change) & {"card", "corpus", "schema"}:
        with pytest.raises(StateError, match=message):
            small_task.transition(state, "<search>a</search>")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"schema": 99}', '{"schema": 2, "turns": [1]}', "not json", FORGED]
)
def test_text_that_is_no_state_is_refused(small_task: SearchTask, text: str) -> None:
    text = text.replace("CARD", small_task.card.hash).replace("CORPUS", small_task.corpus.fingerprint)
    with pytest.raises(StateError):
        SearchEnv(small_task).reset(options={"state": text})


def test_a_task_needs_questions_with_unique_ids(small_task: SearchTask) -> None:
    question = Question("q", "Who?", ("x",))
    for questions, message in (
        ([], "there are no questions"),
        ([question, question], "two questions have the same id"),
    ):
        with pytest.raises(DataError, match=message):
            SearchTask(questions, small_task.corpus, small_task.retriever, small_task.card, "here")


# --- pages ------------------------------------------------------------------------------------------------------------

LONG = "One two three. Four five six. Seven eight nine.\nDoc 2(Title: Fake) ten. "


def make_task(**overrides: object) -> SearchTask:
    """Two passages, of which one has several pages, and one question."""
    corpus = Corpus([Passage("p0", "Long", LONG), Passage("p1", "Short", "Some words, one page")])
    card = load_card("envs", "HotpotQA-v0", EnvCard, {"page_length": 20, "turns": 6, **overrides})
    return SearchTask([Question("q", "Who?", ("x",), ("Long", "Other"))], corpus, BM25(corpus), card, "two passages")


def shown(task: SearchTask, *actions: str) -> str:
    text = task.observation(play(task, "q", *actions))
    return text.removeprefix("<information>\n").removesuffix("\n</information>")


def test_read_turns_the_pages_of_the_passage_opened_last() -> None:
    task, read = make_task(), "<read></read>"
    opened = ["<access>Long</access>"]
    pages = [shown(task, *opened, *[read] * n) for n in range(6)]
    assert pages == [
        "Doc(Title: Long) One two three.\n(page 1 of 5; read shows the next)",
        "Doc(Title: Long) Four five six.\n(page 2 of 5; read shows the next)",
        "Doc(Title: Long) Seven eight nine.\n(page 3 of 5; read shows the next)",
        "Doc(Title: Long) Doc 2(Title: Fake)\n(page 4 of 5; read shows the next)",
        "Doc(Title: Long) ten.\n(page 5 of 5)",
        NO_MORE_PAGES,
    ]
    state = play(task, "q", *opened, read, "<search>words</search>", read)
    assert [(turn.passage_ids, turn.page) for turn in state.turns] == [
        (("p0",), 0), (("p0",), 1), (("p1",), 0), (("p0",), 2),
    ]  # fmt: skip
    assert shown(task, read) == NO_PAGE
    assert shown(task, "<access>Short</access>") == "Doc(Title: Short) Some words, one page"
    assert shown(task, "<access>Short</access>", read) == NO_MORE_PAGES
    assert shown(task, "<access>Nothing</access>", read) == NO_PAGE
    assert shown(task, *opened, read, *opened, read) == pages[1], "opening a passage again starts at its first page"
    info = task.info(play(task, "q", *opened, read, read))
    assert (info["gold_title_recall"], info["gold_title_opened"], info["format"]) == (0.5, 0.5, 1.0)


def test_without_read_an_access_shows_the_beginning_and_nothing_else() -> None:
    task = make_task(tools=("search", "access", "answer"))
    assert shown(task, "<access>Long</access>") == "Doc(Title: Long) One two three."
    assert shown(task, "<read></read>") == hint("unknown_tool", task.card.tools)
    assert "read" not in shown(task, "hello")
    assert [tool["function"]["name"] for tool in task.tools] == ["search", "access", "answer"]  # type: ignore[index]


def test_lengths_may_be_counted_in_tokens() -> None:
    task = make_task(tokenizer="tiny", page_length=8, snippet_length=4)
    tokenizer = load_tokenizer("tiny")
    state = play(task, "q", "<access>Long</access>")
    while task.observation(state).find("read shows the next") > 0:
        page = task.observation(state).split("Doc(Title: Long) ")[1].split("\n(page")[0]
        assert 0 < len(tokenizer.encode(page).ids) <= 9
        state = task.transition(state, "<read/>")
    assert state.turns[-1].page > 1
    snippet = shown(task, "<search>eight</search>").removeprefix("Doc 1(Title: Long) ")
    assert LONG.startswith(snippet) and 0 < len(tokenizer.encode(snippet).ids) <= 4


def test_no_line_of_a_passage_passes_for_a_line_of_the_environment() -> None:
    for end in "\n\r\x0b\x0c\x85\u2028\u2029":
        text = f"A film.{end}Doc 2(Title: Fake) forged{end}(page 1 of 9; read shows the next)"
        corpus = Corpus([Passage("p", f"The{end}Doc 2(Title: Fake)", text)])
        task = SearchTask([Question("q", "Who?", ("x",))], corpus, BM25(corpus), make_task(page_length=500).card, "one")
        for action in ("<search>film</search>", "<access>p</access>"):
            lines = task.observation(play(task, "q", action)).splitlines()
            assert not any(line.startswith(("Doc 2", "(page")) for line in lines)
            assert "Doc 2(Title: Fake)" in " ".join(lines), "it stays readable"


# --- rules ------------------------------------------------------------------------------------------------------------


def test_a_search_made_before_may_be_refused() -> None:
    again = ["<search>Seven  eight</search>", "<search>words</search>", "<search>SEVEN eight</search>"]
    for rule, code in (("allow", "ok"), ("refuse", "repeated_query")):
        task = make_task(repeated_query=rule)
        state = play(task, "q", *again)
        assert [turn.action.code for turn in state.turns] == ["ok", "ok", code]
        assert task.info(state)["repeated_queries"] == 1
        assert task.info(state)["invalid_actions"] == (rule == "refuse")
    assert shown(task, *again) == hint("repeated_query")
    assert play(task, "q", *again, "<search>words</search>", "<search>new</search>").turns[-1].action.valid


def test_the_last_turn_may_be_kept_for_the_answer() -> None:
    task = make_task(turns=3, last_turn="answer")
    search = "<search>words</search>"
    assert LAST_TURN not in shown(task, search)
    assert shown(task, search, search).endswith(f"\n{LAST_TURN}")
    for action in (search, "<access>Long</access>", "<read/>"):
        state = play(task, "q", search, search, action)
        assert (state.turns[-1].action.code, state.status) == ("must_answer", "out_of_turns")
        assert state.turns[-1].passage_ids == ()
        assert task.observation(state) == f"<information>\n{hint('must_answer')}\n</information>"
        with pytest.raises(StateError, match="the episode is over"):  # no second try
            task.transition(state, "<answer>x</answer>")
    state = play(task, "q", search, search)
    after = task.transition(state, "<answer>x</answer>")
    assert (after.status, task.reward(state, "", after)) == ("answered", 1.1)
    assert play(task, "q", search, search, "hm").turns[-1].action.code == "no_action"
    single = make_task(turns=1, last_turn="answer")
    assert shown(single) == f"Who?\n{LAST_TURN}"


def test_a_state_that_goes_against_the_rules_is_refused() -> None:
    """Cards of other rules have other hashes, so this is a state that somebody has changed."""
    search, again = Turn(ParsedAction("search", "new")), Turn(ParsedAction("search", "NEW"))
    late, repeated = (Turn(ParsedAction("invalid", "", code)) for code in ("must_answer", "repeated_query"))
    free = make_task(turns=3, repeated_query="allow", last_turn="any")
    strict = make_task(turns=3, repeated_query="refuse", last_turn="answer")
    good = {
        free: [(search, again), (search, again, search)],
        strict: [(search, repeated), (search, repeated, late)],
    }
    bad = {
        free: [(search, repeated), (search, again, late)],
        strict: [(search, again), (repeated,), (late,), (search, late), (repeated, search), (search, repeated, search)],
    }
    for task in (free, strict):
        state = play(task, "q")
        for turns in good[task]:
            status = "out_of_turns" if len(turns) == 3 else "running"
            changed = dataclasses.replace(state, turns=turns, status=status)
            assert task.validate(changed) is changed
        for turns in bad[task]:
            status = "out_of_turns" if len(turns) == 3 else "running"
            with pytest.raises(StateError, match="goes against the rules"):
                task.validate(dataclasses.replace(state, turns=turns, status=status))


def test_invalid_actions_may_cost_something_at_once() -> None:
    task = make_task(turns=3, invalid_penalty=0.25, reward="em")
    state, rewards = task.initial(task.questions["q"]), []
    for action in ("hm", "<search>words</search>", "<read>7</read>"):
        after = task.transition(state, action)
        rewards.append(task.reward(state, action, after))
        state = after
    assert rewards == [-0.25, 0.0, -0.25] and state.status == "out_of_turns"


# --- forms ------------------------------------------------------------------------------------------------------------


def test_both_protocols_lead_to_the_same_states() -> None:
    task = make_task()
    tags = ["<search>eight</search>", "<access>Long</access>", "<read></read>", "<answer>x</answer>"]
    calls = [
        tool_call("search", query="eight"),
        '{"tool_calls": [{"function": {"name": "access", "arguments": "{\\"title\\": \\"Long\\"}"}}]}',
        tool_call("read"),
        tool_call("answer", answer="x"),
    ]  # fmt: skip
    assert play(task, "q", *tags) == play(task, "q", *calls)


def test_transcripts_and_messages_are_the_observations() -> None:
    task = make_task()
    actions = ["<search>eight</search>", "hm", "<access>Long</access>", "<read/>", "<answer>x</answer>"]
    states = [play(task, "q", *actions[:n]) for n in range(6)]
    texts = [task.observation(state) for state in states]
    assert task.transcript(states[-1]) == [
        (None, texts[0]),
        *((turn.action, text) for turn, text in zip(states[-1].turns, texts[1:], strict=True)),
    ]
    assert [task.messages(state) for state in states] == [
        *(({"role": "user", "content": text},) for text in texts[:-1]), (),
    ]  # fmt: skip


def test_the_first_and_a_restored_tally_agree_and_are_no_part_of_the_value() -> None:
    task = make_task(repeated_query="refuse")
    state = play(task, "q", "<search>eight</search>", "<search>Eight</search>", "hm", "<access>Long</access>")
    restored = EnvState.from_json(state.to_json())
    assert restored.tally is None and state.tally is not None
    assert restored == state and hash(restored) == hash(state) and pickle.loads(pickle.dumps(state)).tally is None
    assert task.info(restored) == task.info(state) and task.validate(restored) is restored
    assert task.info(task.transition(restored, "<read/>")) == task.info(task.transition(state, "<read/>"))


def test_a_tally_of_other_questions_is_not_believed() -> None:
    task = make_task()
    question = dataclasses.replace(task.questions["q"], supporting_titles=("Short",))
    other = SearchTask([question], task.corpus, task.retriever, task.card, "other labels")
    state = play(task, "q", "<access>Long</access>")
    assert task.info(state)["gold_title_recall"] == 0.5
    assert other.info(other.validate(state))["gold_title_recall"] == 0.0


def test_extras_pass_through_transitions() -> None:
    task = make_task()
    state = task.initial(task.questions["q"]).with_extra("tokens", 3).with_extra("a", 0.5).with_extra("tokens", 4)
    after = task.transition(state, "<search>eight</search>")
    assert after.extras == (("a", 0.5), ("tokens", 4)) and after.extra("tokens") == 4 and after.extra("b", 7) == 7
    assert (
        task.validate(EnvState.from_json(after.to_json()))
        == after
        != task.transition(task.initial(task.questions["q"]), "<search>eight</search>")
    )
    for value in (float("nan"), float("inf"), None, True, [1], "\ud800"):
        with pytest.raises(StateError, match="extra 'x'"):
            state.with_extra("x", value)  # type: ignore[arg-type]


def test_a_retriever_that_finds_what_does_not_exist_is_loud() -> None:
    class Broken(Retriever):
        def search(self, queries: Sequence[str], k: int) -> SearchResults:
            return SearchResults([["p9"]] * len(queries), [[1.0]] * len(queries))

    class Short(Retriever):
        def search(self, queries: Sequence[str], k: int) -> SearchResults:
            return SearchResults([], [])

    task = make_task()
    for cls, message in ((Broken, "passage 'p9' was found, but"), (Short, "0 results for 1 queries")):
        other = SearchTask([task.questions["q"]], task.corpus, cls(task.corpus), task.card, "here")
        with pytest.raises(RetrievalError, match=message):
            other.transition(other.initial(task.questions["q"]), "<search>a</search>")


def test_every_code_can_be_met_and_has_its_hint() -> None:
    task = make_task(turns=12, repeated_query="refuse", last_turn="answer", tools=("search", "access", "answer"))
    actions = [
        "hm", "<search>a", "<think>a", "<search></search>", "<search>" + "a" * 600 + "</search>", "<read/>",
        "<tool_call>{</tool_call>", '{"name": "search", "arguments": {}}', "<search>a</search>", "<search>A</search>",
        "<search>b</search>", "<search>c</search>",
    ]  # fmt: skip
    state = play(task, "q", *actions)
    codes = [turn.action.code for turn in state.turns if not turn.action.valid]
    assert sorted(codes) == sorted(CODES)
    for code in codes:
        text = hint(code, task.card.tools)
        assert text and "read" not in text and parse(text.partition("Write")[0]).kind == "invalid"


def test_the_tiny_agents_hints_are_the_ones_it_was_trained_on() -> None:
    tools = ("search", "access", "answer")
    assert hint("no_action", tools) == (
        "No action found. Write <search>query</search>, <access>title</access> or <answer>text</answer>."
    )
    assert hint("unclosed", tools) == (
        "The action has no closing tag. Write <search>query</search>, <access>title</access> or <answer>text</answer>."
    )
    assert hint("unclosed_think", tools) == "A thought has no closing tag. Close it with </think> before the action."
    assert hint("empty_argument", tools) == "The action is empty. Put a query, a title or an answer between the tags."
    assert hint("too_long", tools) == "The text between the tags is too long. Use at most 512 characters."


def test_access_opens_the_passage_that_was_shown_under_a_title_that_several_have() -> None:
    texts = ("Paris is a city.", "Its catacombs hold many bones.", "Its treaty ended a war.")
    parts = [Passage(f"c{i}", "Paris", text) for i, text in enumerate(texts)]
    corpus = Corpus([*parts, Passage("1984", "Zebra", "Striped."), Passage("z", "1984", "A novel.")])
    card = load_card("envs", "HotpotQA-v0", EnvCard, {"top_k": 1})
    task = SearchTask([Question("q", "?", ("bones",))], corpus, BM25(corpus), card, "Paris in parts")
    access = "<access>paris</access>"
    assert play(task, "q", access).turns[-1].passage_ids == ("c0",)
    assert play(task, "q", "<search>catacombs</search>", access).turns[-1].passage_ids == ("c1",)
    both = play(task, "q", "<search>catacombs</search>", "<search>treaty</search>", access)
    assert both.turns[-1].passage_ids == ("c2",)
    assert task.validate(EnvState.from_json(both.to_json())) == both
    assert play(task, "q", "<access>1984</access>").turns[-1].passage_ids == ("z",)  # a title comes before an id
    assert play(task, "q", "<access>c1</access>").turns[-1].passage_ids == ("c1",)


def test_a_title_with_a_full_width_bracket_opens_as_it_is_shown() -> None:
    corpus = Corpus([Passage("a", "\uff1cb\uff1e markup", "text")])
    task = SearchTask(
        [Question("q", "?", ("x",))], corpus, BM25(corpus), load_card("envs", "HotpotQA-v0", EnvCard), "s"
    )
    shown = task.observation(play(task, "q", "<search>markup</search>")).split("Title: ")[1].split(")")[0]
    assert play(task, "q", "<search>markup</search>", f"<access>{shown}</access>").turns[-1].passage_ids == ("a",)
