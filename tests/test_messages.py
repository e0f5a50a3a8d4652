"""Chat messages as tokens, and what the environment reads of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.agents.messages import MessageTranscript, action_text, assistant_message, decode, encode
from carl_gym.envs.protocol import parse, tool_call
from carl_gym.envs.state import ParsedAction
from carl_gym.errors import PolicyError

TEXT = st.text(max_size=40) | st.sampled_from(
    ["</tool_call>", "<answer>x</answer>", "<think>", "\ud800", "a\u2028\r\nb"]
)


@given(st.lists(st.builds(lambda role, content: {"role": role, "content": content}, TEXT, TEXT), min_size=1))
def test_messages_survive_being_tokens(messages):
    clean = [{key: text.encode("utf-8", "replace").decode() for key, text in said.items()} for said in messages]
    tokens = encode(*messages)
    assert all(0 <= token < 256 for token in tokens) and decode(tokens) == clean
    assert sum((encode(said) for said in messages), ()) == tokens


@given(TEXT, TEXT)
def test_a_call_means_the_same_to_the_environment_whatever_stands_in_and_around_it(content, argument):
    call = {"id": "1", "function": {"name": "search", "arguments": json.dumps({"query": argument})}}
    text = action_text(assistant_message({"content": content, "tool_calls": [call]}, 2))
    expected = parse(tool_call("search", query=argument))
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("fly", '{"to": "Rome"}', "unknown_tool"),
        ("search", '{"query": "Rome', "bad_json"),
        ("search", '{"query": "Rome", "query": "Paris"}', "bad_json"),
        ("search", '{"query": NaN}', "bad_json"),
        ("search", '["Rome"]', "bad_json"),
        ("search", '{"city": "Rome"}', "bad_argument"),
        ("search", '{}}</tool_call><answer>Rome</answer>', "bad_json"),
        ("no <answer>x</answer>", "{}", "unknown_tool"),
        ("search", "[" * 100_000, "too_long"),
    ],
)  # fmt: skip
def test_a_models_own_bad_call_is_an_invalid_action_word_for_word(name, arguments, code):
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    kept = assistant_message({"content": None, "tool_calls": [call]}, 2)
    assert parse(action_text(kept)) == ParsedAction("invalid", "", code)
    assert json.loads(action_text(kept).removeprefix("<tool_call>").removesuffix("</tool_call>"))["name"] == name


def test_calls_without_arguments_or_id_and_with_arguments_as_an_object():
    read = {"function": {"name": "read"}}
    kept = assistant_message({"content": "on", "tool_calls": [read]}, 4)
    assert kept["tool_calls"][0]["id"] == "call_4" and parse(action_text(kept)) == ParsedAction("read")
    search = {"function": {"name": "search", "arguments": {"query": "Ulm"}}}
    assert parse(action_text(assistant_message({"tool_calls": [search]}, 4))) == ParsedAction("search", "Ulm")


def test_an_observation_answers_the_call_or_else_comes_from_the_user():
    transcript = MessageTranscript("Be brief.")
    assert decode(transcript.prompt("Who?")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
    ]
    function = {"name": "read", "arguments": "{}"}
    called = encode({"role": "assistant", "content": "", "tool_calls": [{"id": "c7", "function": function}]})
    assert decode(transcript.observation("text", called)) == [{"role": "tool", "tool_call_id": "c7", "content": "text"}]
    written = encode({"role": "assistant", "content": "<read/>"})
    assert decode(transcript.observation("text", written)) == [{"role": "user", "content": "text"}]
    for tokens in ((1, 2, 3), (300,), (), tuple(b"[1]\n"), tuple(b'{"a": 1}\n')):
        with pytest.raises(PolicyError, match="no conversation"):
            decode(tokens)
