"""Observations as chat messages: the very tokens, worked by hand, for the templates that people use; nothing forged,
nothing twice, nothing lost."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    CHATML,
    LLAMA3_2,
    LLAMA_SPECIAL,
    QWEN2_5,
    QWEN2_5_ADDED,
    QWEN3,
    QWEN3_ADDED,
    chat_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from carl_gym.agents.chat_transcript import ChatTranscript, render_chat
from carl_gym.envs.protocol import function_schemas

WORDS = r"""system user assistant ipython tool response Be brief. Who wrote Emma? I search. Jane name arguments query
<search> </search> <information> </information>\ </ _ Cutting Knowledge Date: Today December Jul
" {" ": ", "}} "<information>\nJane >\n nJane .\n n</information>" """


def qwen2_5(**settings: Any) -> ChatTranscript:
    return transcript(chat_tokenizer(QWEN2_5, added=QWEN2_5_ADDED, words=WORDS), **settings)


def qwen3(**settings: Any) -> ChatTranscript:
    return transcript(chat_tokenizer(QWEN3, added=QWEN3_ADDED, words=WORDS), **settings)


def llama(**settings: Any) -> ChatTranscript:
    return transcript(llama_tokenizer(), **settings)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer(LLAMA3_2, LLAMA_SPECIAL, eos="<|eot_id|>", bos="<|begin_of_text|>", words=WORDS)


def chatml(**settings: Any) -> ChatTranscript:
    return transcript(chat_tokenizer(CHATML, words=WORDS), **settings)


def transcript(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> ChatTranscript:
    return ChatTranscript(tokenizer, **{"system": "Be brief.", "max_tokens": 50, "context": 1000} | settings)


def play(chat: ChatTranscript, *turns: tuple[str, str]) -> list[str]:
    """The tokens of an episode, a segment for the prompt, each action and each observation. `·` stands between tokens.

    An action that ends in `|` was sampled up to the end of its turn.
    """
    question = "Who wrote Emma?"
    segments = [chat.prompt(question)]
    for said, result in turns:
        action = chat.tokenizer.encode(said.removesuffix("|"), add_special_tokens=False)
        if said.endswith("|"):
            action.append(chat.end_of_turn)
        segments += [tuple(action), chat.observation(result, action)]
    return ["·".join(chat.tokenizer.decode([i]) for i in ids) for ids in segments]


RESULT = "<information>\nJane wrote Emma.\n</information>"

# Golden tokens


def test_chatml_token_by_token() -> None:
    assert play(chatml(), ("<search>Emma</search>", RESULT), ("<search>Emma</search>|", RESULT)) == [
        "<|im_start|>·system·\n·Be· brief·.·<|im_end|>·\n"
        "·<|im_start|>·user·\n·Who· wrote· Emma·?·<|im_end|>·\n·<|im_start|>·assistant·\n",
        "<·search·>·Emma·</·search·>",
        "<|im_end|>·\n"
        "·<|im_start|>·user·\n·<·information·>·\n·Jane· wrote· Emma·.·\n·</·information·>·<|im_end|>·\n"
        "·<|im_start|>·assistant·\n",
        "<·search·>·Emma·</·search·>·<|im_end|>",
        "\n·<|im_start|>·user·\n·<·information·>·\n·Jane· wrote· Emma·.·\n·</·information·>·<|im_end|>·\n"
        "·<|im_start|>·assistant·\n",
    ]


def test_chatml_ids() -> None:
    """`<|im_start|>` is 1 and `<|im_end|>` is 2; bytes follow in the order of their characters, "!" first."""
    tokenizer = chat_tokenizer(CHATML)
    ids = {chr(byte): 3 + byte - ord("!") for byte in range(ord("!"), ord("~") + 1)}
    ids["\n"] = tokenizer.convert_tokens_to_ids("Ċ")
    spelled = {word: [ids[character] for character in word] for word in ("user", "assistant", "Who?", "No.", "\n")}
    chat = transcript(tokenizer, system="")
    line = spelled["\n"]
    assert list(chat.prompt("Who?")) == [
        1, *spelled["user"], *line, *spelled["Who?"], 2, *line, 1, *spelled["assistant"], *line
    ]  # fmt: skip
    rest = [*line, 1, *spelled["user"], *line, *spelled["No."], 2, *line, 1, *spelled["assistant"], *line]
    assert list(chat.observation("No.", spelled["Who?"])) == [2, *rest]
    assert list(chat.observation("No.", [*spelled["Who?"], 2])) == rest


QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "read", "description": "Show the next page of the passage that was '
    'opened last.", "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": false}}}'
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n"
)
READ = function_schemas(["read"])
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Emma"}}\n</tool_call>'
# Both tags of a call are tokens of Qwen's.
SAMPLED_CALL = (
    '<tool_call>·\n·{"·name·":· "·search·",· "·arguments·":· {"·query·":· "·Emma·"}}·\n·</tool_call>'
)  # fmt: skip
QUESTION = "<|im_start|>·user·\n·Who· wrote· Emma·?·<|im_end|>·\n·<|im_start|>·assistant·\n"


def split_prompt(prompt: str, start: str) -> tuple[str, str]:
    """The text before `start`, without the marks between tokens, and the tokens from there on."""
    head, found, tail = prompt.rpartition(start)
    return head.replace("·", ""), found + tail


def test_qwen2_5_with_tools_token_by_token() -> None:
    """A call is cut at its closing tag, so the end of the turn belongs to the observation."""
    prompt, *rest = play(qwen2_5(tools=READ, tool_role="tool"), (CALL, RESULT), (f"{CALL}|", RESULT))
    assert split_prompt(prompt, "<|im_start|>·user") == (
        "<|im_start|>system\nBe brief.\n\n" + QWEN_TOOLS,
        QUESTION,
    )
    result = (
        "·<|im_start|>·user·\n·<·tool·_·response·>·\n·<·information·>·\n·Jane· wrote· Emma·.·\n·</·information·>·\n"
        "·</·tool·_·response·>·<|im_end|>·\n·<|im_start|>·assistant·\n"
    )
    assert rest == [
        SAMPLED_CALL,
        f"<|im_end|>·\n{result}",
        f"{SAMPLED_CALL}·<|im_end|>",
        f"\n{result}",
    ]


def test_qwen2_5_introduces_itself_where_there_is_no_system_prompt() -> None:
    (prompt,) = play(qwen2_5(system=""))
    assert split_prompt(prompt, "<|im_start|>·user") == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
        QUESTION,
    )


def test_qwen3_thinking_token_by_token() -> None:
    """`<think>` and `<tool_response>` are tokens of Qwen3; the thinking of the first turn stays in the second."""
    said = "<think>\nI search.\n</think>\n\n" + CALL
    sampled = "<think>·\n·I· search·.·\n·</think>·\n\n·" + SAMPLED_CALL
    chat = qwen3(tools=READ, tool_role="tool")
    prompt, *rest = play(chat, (said, RESULT), (f"{said}|", RESULT))
    assert split_prompt(prompt, "<|im_start|>·user") == ("<|im_start|>system\nBe brief.\n\n" + QWEN_TOOLS, QUESTION)
    result = (
        "·<|im_start|>·user·\n·<tool_response>·\n·<·information·>·\n·Jane· wrote· Emma·.·\n·</·information·>·\n"
        "·</tool_response>·<|im_end|>·\n·<|im_start|>·assistant·\n"
    )
    assert rest == [sampled, f"<|im_end|>·\n{result}", f"{sampled}·<|im_end|>", f"\n{result}"]
    assert chat.opening == ""


def test_qwen3_without_thinking_token_by_token() -> None:
    """The empty thought is written by the template in every turn: part of the prefix, never of an action."""
    chat = qwen3(thinking=False)
    empty = "<think>·\n\n·</think>·\n\n"
    result = (
        "·<|im_start|>·user·\n·<·information·>·\n·Jane· wrote· Emma·.·\n·</·information·>·<|im_end|>·\n"
        f"·<|im_start|>·assistant·\n·{empty}"
    )
    assert play(chat, ("<search>Emma</search>", RESULT), ("<search>Emma</search>|", RESULT)) == [
        "<|im_start|>·system·\n·Be· brief·.·<|im_end|>·\n·" + QUESTION + "·" + empty,
        "<·search·>·Emma·</·search·>",
        f"<|im_end|>·\n{result}",
        "<·search·>·Emma·</·search·>·<|im_end|>",
        f"\n{result}",
    ]
    assert chat.opening == "<think>\n\n</think>\n\n"


LLAMA_SYSTEM = (
    "<|begin_of_text|>·<|start_header_id|>·system·<|end_header_id|>·\n\n·Cutting· Knowledge· Date·:· December· ·2·0·2·3"
    "·\n·Today· Date·:· ·2·6· Jul· ·2·0·2·4·\n\n·Be· brief·.·<|eot_id|>"
)
LLAMA_TURN = "<|start_header_id|>·assistant·<|end_header_id|>·\n\n"


def test_llama3_2_token_by_token() -> None:
    result = (
        "·<|start_header_id|>·user·<|end_header_id|>·\n\n·<·information·>·\n·Jane· wrote· Emma·.·\n·</·information·>"
        f"·<|eot_id|>·{LLAMA_TURN}"
    )
    assert play(llama(), ("<search>Emma</search>", RESULT), ("<search>Emma</search>|", RESULT)) == [
        f"{LLAMA_SYSTEM}·<|start_header_id|>·user·<|end_header_id|>·\n\n·Who· wrote· Emma·?·<|eot_id|>·{LLAMA_TURN}",
        "<·search·>·Emma·</·search·>",
        f"<|eot_id|>{result}",
        "<·search·>·Emma·</·search·>·<|eot_id|>",
        result.removeprefix("·"),
    ]


def test_llama3_2_writes_the_result_of_a_tool_as_json() -> None:
    """Its template puts tools into the first user message, and results under `ipython`, as a JSON text."""
    chat = llama(tools=READ, tool_role="tool")
    call = '{"name": "search", "parameters": {"query": "Emma"}}'
    prompt, action, result = play(chat, (f"{call}|", RESULT))
    schema = json.dumps(READ[0], indent=4)
    head, tail = split_prompt(prompt, "Who")
    assert head == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
        "function call with its proper arguments that best answers the given prompt.\n\n"
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
        f"Do not use variables.\n\n{schema}\n\n"
    )
    assert tail == f"Who· wrote· Emma·?·<|eot_id|>·{LLAMA_TURN}"
    assert action.endswith("·<|eot_id|>") and action.replace("·", "") == f"{call}<|eot_id|>"
    assert result == (
        '<|start_header_id|>·ipython·<|end_header_id|>·\n\n·"<·information·>\\·nJane· wrote· Emma·.\\·n·</·information'
        f'·>"·<|eot_id|>·{LLAMA_TURN}'
    )


def test_llama3_2_says_the_same_on_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its template writes today's date, which would change prompts from one day of a run to the next."""

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Tomorrow:
            return cls(2031, 5, 1, tzinfo=tz)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    tokenizer = llama_tokenizer()
    messages = [{"role": "user", "content": "x"}]
    assert "01 May 2031" in tokenizer.apply_chat_template(messages, tokenize=False), "the template asks for the day"
    assert play(llama())[0].startswith(LLAMA_SYSTEM)


# The templates here are the real ones

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Who?"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": " Who wrote it? "}],
    [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "search", "arguments": {"query": 'a "b" é'}}}
        ]},
        {"role": "tool", "content": "one\n\"two\""},
        {"role": "assistant", "content": "<think>\nI see.\n</think>\n\nIt is so."},
        {"role": "user", "content": "Sure?"},
    ],
]  # fmt: skip


@pytest.mark.parametrize(("name", "template"), [("qwen2_5", QWEN2_5), ("qwen3", QWEN3), ("llama3_2", LLAMA3_2)])
def test_the_templates_of_these_tests_render_what_the_models_own_do(name: str, template: str) -> None:
    """TRL carries copies of the models' own templates."""
    spec = importlib.util.find_spec("trl")
    folders = list(spec.submodule_search_locations or []) if spec else []
    copies = [path for folder in folders for path in Path(folder).glob(f"chat_templates/{name}.jinja")]
    if not copies:
        pytest.skip("TRL is not installed, or carries no template of this name")
    ours, theirs = (
        chat_tokenizer(text, LLAMA_SPECIAL, eos="<|eot_id|>", bos="<|begin_of_text|>")
        for text in (template, copies[0].read_text(encoding="utf-8"))
    )
    for messages, tools, thinking in itertools.product(CONVERSATIONS, (None, function_schemas()), (True, False)):
        said = render_chat(ours, messages, tools=tools, thinking=thinking)
        assert said == render_chat(theirs, messages, tools=tools, thinking=thinking)
