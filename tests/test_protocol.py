import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.envs.protocol import INVALID_HINTS, STOP_STRINGS, TOOLS, escape, parse
from carl_gym.envs.state import MAX_ARGUMENT_CHARS, ParsedAction

PIECES = [
    "<think>", "</think>", "<search>", "</search>", "<access>", "</access>", "<answer>", "</answer>",
    "<information>", "</information>", "<", "</", "<|im_end|>", "a", " ", "Zürich", "\n", "x < 5", "\ud800", "\x00",
]  # fmt: skip
markup = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=25).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<search>who</search>", ParsedAction("search", "who")),
        ("<access>Ada Lovelace</access>", ParsedAction("access", "Ada Lovelace")),
        ("<answer>東京</answer>", ParsedAction("answer", "東京")),
        ("  well, <answer> 1 <\n 2 </answer>", ParsedAction("answer", "1 < 2")),
        ("<think>hm</think><search>a</search>", ParsedAction("search", "a")),
        ("<think><answer>no</answer></think><search>a</search>", ParsedAction("search", "a")),
        ("<search>a</search><answer>b</answer>", ParsedAction("search", "a")),
        ("<search>a <answer>b</answer> c</search>", ParsedAction("answer", "b")),
        ("<search>a</answer></search>", ParsedAction("search", "a</answer>")),
        ("</search><answer>b</answer>", ParsedAction("answer", "b")),
        ("reasoning</think><answer>b</answer>", ParsedAction("answer", "b")),
        ("<search>" + "a" * MAX_ARGUMENT_CHARS + "</search>", ParsedAction("search", "a" * MAX_ARGUMENT_CHARS)),
        ("<search>a\ud800b</search>", ParsedAction("search", "a?b")),
        ("", ParsedAction("invalid", "", "no_action")),
        ("Paris", ParsedAction("invalid", "", "no_action")),
        ("<SEARCH>a</SEARCH>", ParsedAction("invalid", "", "no_action")),
        ("<search>a", ParsedAction("invalid", "", "unclosed")),
        ("<think><search>a</search>", ParsedAction("invalid", "", "unclosed_think")),
        ("<search>a<think></search>", ParsedAction("invalid", "", "unclosed_think")),
        ("<answer> \n</answer>", ParsedAction("invalid", "", "empty_argument")),
        ("<answer></answer><answer>b</answer>", ParsedAction("invalid", "", "empty_argument")),
        ("<search>" + "a" * (MAX_ARGUMENT_CHARS + 1) + "</search>", ParsedAction("invalid", "", "too_long")),
    ],
)
def test_texts_have_the_meaning_that_the_protocol_gives_them(text: str, expected: ParsedAction) -> None:
    assert parse(text) == expected


@given(markup)
def test_every_text_parses_to_an_action_or_a_known_code(text: str) -> None:
    action = parse(text)
    if action.valid:
        assert action.code == "ok"
        assert 0 < len(action.argument) <= MAX_ARGUMENT_CHARS
        action.argument.encode("utf-8")
    else:
        assert action.code in INVALID_HINTS
        assert action.argument == ""


@given(st.sampled_from(TOOLS), markup.filter(lambda text: "</" not in text), markup)
def test_stopping_at_a_stop_string_keeps_the_action(tool: str, argument: str, rest: str) -> None:
    """What a sampler cuts off behind the first stop string could not have changed the action."""
    text = f"<{tool}>{argument}</{tool}>{rest}"
    end = min(text.find(stop) + len(stop) for stop in STOP_STRINGS if stop in text)
    if parse(text[:end]).code in ("ok", "empty_argument", "too_long"):
        assert parse(text[:end]) == parse(text)
    else:  # an opening tag in the argument took over
        assert parse(text[:end]).code in ("unclosed", "unclosed_think")


@given(markup, markup)
def test_nothing_after_the_first_complete_action_changes_it(text: str, rest: str) -> None:
    action = parse(text)
    if action.valid or action.code in ("empty_argument", "too_long"):
        assert parse(text + rest) == action


@given(markup)
def test_escaped_text_holds_no_action_no_tag_and_no_template_token(text: str) -> None:
    escaped = escape(text)
    assert parse(escaped) == ParsedAction("invalid", "", "no_action")
    for token in ("<think>", "</information>", "<information>", "<|", "<s>", "</s>"):
        assert token not in escaped


@given(markup, markup)
def test_escaped_texts_stay_harmless_side_by_side_on_lines_of_their_own(one: str, two: str) -> None:
    assert parse(escape(one) + "\n" + escape(two)).code == "no_action"


@given(st.text())
def test_escaping_changes_nothing_but_opening_brackets(text: str) -> None:
    assert escape(text).replace("&lt;", "<") == text.replace("&lt;", "<")


@pytest.mark.parametrize("text", ["x < 5", "a<=b", "1<2", "<", "<3", "fish & chips", "->"])
def test_comparisons_are_left_alone(text: str) -> None:
    assert escape(text) == text


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "piece", ["<search>", "<think>", "<", "</search>", "<search></think>", "a", "<search>a</answer>", "<think></think>"]
)
def test_megabytes_parse_in_linear_time(piece: str) -> None:
    """Quadratic work on four megabytes would take hours and run into the timeout."""
    assert not parse("<search>" + piece * (4_000_000 // len(piece))).valid


@pytest.mark.timeout(30)
def test_megabytes_are_escaped_in_linear_time() -> None:
    assert escape("<</" * 1_000_000 + "a") == "<</" * 999_999 + "<&lt;/a"
