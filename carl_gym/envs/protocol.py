"""The action protocol: from an agent's text to a `ParsedAction`, and from other texts to harmless ones.

An action is `<search>query</search>`, `<access>title</access>`, `<read></read>` or `<answer>text</answer>`, or the same
as an OpenAI-style tool call in JSON: inside `<tool_call>…</tool_call>`, or as the whole text. What stands in
`<think>…</think>` or around the action is ignored. The first complete action wins, so nothing that follows it can
change its meaning. Sampling stops at the closing tags (`STOP_STRINGS`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

from carl_gym.envs.state import MAX_ARGUMENT_CHARS, ActionKind, ParsedAction
from carl_gym.errors import ConfigError


class _Tool(NamedTuple):
    """A tool as agents meet it: name of its argument ("" for none), its tag form, and descriptions of both."""

    argument: str
    tag: str
    description: str
    argument_description: str = ""


_TOOLS = {
    "search": _Tool(
        "query",
        "<search>query</search>",
        "Find passages. Each result shows a title and the beginning of the passage.",
        "What to look for.",
    ),
    "access": _Tool(
        "title",
        "<access>title</access>",
        "Open a passage by its title.",
        "A title as the search results show it.",
    ),
    "read": _Tool("", "<read></read>", "Show the next page of the passage that was opened last."),
    "answer": _Tool(
        "answer",
        "<answer>text</answer>",
        "Answer the question. This ends the episode.",
        "The answer, as short as it can be.",
    ),
}

TOOLS: tuple[str, ...] = tuple(_TOOLS)
"""Every tool that a card may name."""

STOP_STRINGS = (*(f"</{tool}>" for tool in TOOLS), "<read/>", "</tool_call>")
"""Where sampling an action ends. Every action form in tags ends with one of these."""

TAGS = tuple(
    f"<{slash}{name}>" for name in ("think", "search", "access", "answer", "information") for slash in ("", "/")
)
"""The tags that every text of an agent is made of, the environment's own `<information>` included: a small tokenizer
has a token for each (`training.warm_start`)."""

CODES = (
    "no_action", "unclosed", "unclosed_think", "empty_argument", "too_long", "unknown_tool", "bad_json",
    "bad_argument", "repeated_query", "must_answer",
)  # fmt: skip
"""Every reason why an action can be invalid; `hint` puts each into words."""

MAX_JSON_CHARS = 65_536
"""Longest tool call in JSON that is looked at; a longer one is `too_long`. No argument within its bound needs more."""

_ZERO_WIDTH = (
    "\\x00-\\x08\\x0e-\\x1f\\x7f-\\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"
)
"""Characters without a width, which some tokenizers drop: `<` and `answer>` with one between them may become a tag."""

_TAG = re.compile(r"<(?:(/?)(think|search|access|read|answer|tool_call)|read/)>")
_PLAIN = re.compile(r"\s*(?:<think>[^<]*</think>\s*)?<(search|access|answer)>([^<]*)</(search|access|answer)>")
"""What well-behaved agents write; `_scan` means the same and takes everything."""
_FORGEABLE = re.compile(
    rf"[<\uff1c\ufe64](?=[{_ZERO_WIDTH}]*+(?:[/\uff0f][{_ZERO_WIDTH}]*+)?(?:[^\W\d_]|[|\uff5c]))"
    rf"|[\[\uff3b](?=/?[a-z]?[A-Z]{{2}}[A-Z0-9_]*\])"
)
_OPENERS = "<[\uff1c\ufe64\uff3b"
_ENTITIES = {"<": "&lt;", "\uff1c": "&lt;", "\ufe64": "&lt;", "[": "&#91;", "\uff3b": "&#91;"}


def parse(text: str, tools: Sequence[str] = TOOLS) -> ParsedAction:
    """The first complete action in `text`, or an invalid one with its code. Linear time; never raises.

    A tool's opening tag inside another tool's argument starts anew: the action that is closed first is the one that
    counts. Closing tags without their opening tag are ignored. A text that holds no complete action in tags may be, as
    a whole and after closed thoughts, one tool call as a JSON object.

    Args:
        text: what the agent wrote.
        tools: the tools that it may use; a complete action with another one is invalid (`unknown_tool`).
    """
    if plain := _PLAIN.match(text):
        tool, argument, closed = plain.groups()
        if tool == closed:  # a back reference in the pattern would take longer
            return _action(tool, argument, tools)
    return _scan(text, tools)


def _scan(text: str, tools: Sequence[str]) -> ParsedAction:
    tool, start, thinking, thought = "", 0, False, 0
    for match in _TAG.finditer(text):
        closing, name = bool(match[1]), match[2]
        if name == "think":
            thinking, tool = not closing, ("" if not closing else tool)
            thought = match.end()
        elif thinking:
            continue
        elif name is None:  # <read/>
            return _action("read", "", tools)
        elif not closing:
            tool, start = name, match.end()
        elif name == tool:
            argument = text[start : match.start()]
            return _call(argument, tools) if name == "tool_call" else _action(name, argument, tools)
    if thinking:
        return _invalid("unclosed_think")
    if tool:
        return _invalid("unclosed")
    rest = text[thought:].strip()
    return _call(rest, tools) if rest[:1] == "{" else _invalid("no_action")


def escape(text: str) -> str:
    """`text` with every bracket that could open a tag or a control token written as an entity.

    Applied to everything that comes from documents and questions: "x < 5" and "[1]" stay as they are, while
    `<answer>`, `</information>`, `<tool_call>`, `<|im_end|>` and `[INST]` lose their meaning, also written with
    full-width brackets or with characters without a width, which some tokenizers normalise away.
    """
    for opener in _OPENERS:  # most texts have none, and `in` is far quicker than a pattern
        if opener in text:
            return _FORGEABLE.sub(lambda match: _ENTITIES[match[0]], text)
    return text


def unescape(text: str) -> str:
    """`escape` undone, for titles that an agent copied from what it was shown."""
    return text.replace("&lt;", "<").replace("&#91;", "[")


def tool_call(name: str, **arguments: str) -> str:
    """An action as JSON text that means the same whatever its arguments hold: `<` is written as `\\u003c` there.

    Raises:
        ConfigError: no such tool.
    """
    if name not in _TOOLS:
        raise ConfigError(f"unknown tool {name!r}; tools: {', '.join(TOOLS)}")
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=True).replace("<", "\\u003c")
    return f"<tool_call>{body}</tool_call>"


def function_schemas(tools: Iterable[str] = TOOLS) -> list[dict[str, object]]:
    """The tools as OpenAI function schemas, for chat templates and APIs that take `tools`.

    Raises:
        ConfigError: no such tool.
    """
    return [_schema(tool) for tool in tools]


def describe(tools: Iterable[str] = TOOLS) -> str:
    """The tools in tags, a line each, for a system prompt.

    Raises:
        ConfigError: no such tool.
    """
    return "\n".join(f"{tool.tag} {tool.description}" for tool in map(_tool, tools))


def _tool(name: str) -> _Tool:
    if name not in _TOOLS:
        raise ConfigError(f"unknown tool {name!r}; tools: {', '.join(TOOLS)}")
    return _TOOLS[name]


def _schema(name: str) -> dict[str, object]:
    tool = _tool(name)
    properties = {tool.argument: {"type": "string", "description": tool.argument_description}} if tool.argument else {}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": tool.description, "parameters": parameters}}


@functools.cache
def hint(code: str, tools: tuple[str, ...] = TOOLS) -> str:
    """What an agent that has these tools is told about an invalid action. Raises KeyError on an unknown code."""
    forms = _either([_TOOLS[tool].tag for tool in tools])
    arguments = _either([_ARTICLES[_TOOLS[tool].argument] for tool in tools if _TOOLS[tool].argument])
    return {
        "no_action": f"No action found. Write {forms}.",
        "unclosed": f"The action has no closing tag. Write {forms}.",
        "unclosed_think": "A thought has no closing tag. Close it with </think> before the action.",
        "empty_argument": f"The action is empty. Put {arguments} between the tags.",
        "too_long": f"The text between the tags is too long. Use at most {MAX_ARGUMENT_CHARS} characters.",
        "unknown_tool": f"There is no such tool. Write {forms}.",
        "bad_json": "The tool call is no valid JSON object with a name and arguments.",
        "bad_argument": "The tool call has wrong arguments. "
        + " ".join(f"{tool} takes {_TOOLS[tool].argument or 'none'}." for tool in tools),
        "repeated_query": "This search was made before; its results stand above. Search for something else.",
        "must_answer": "This was the last turn, and it needed an answer.",
    }[code]


_ARTICLES = {"query": "a query", "title": "a title", "answer": "an answer"}


def _either(items: Sequence[str]) -> str:
    return " or ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def _action(tool: str, raw: str, tools: Sequence[str]) -> ParsedAction:
    if tool not in tools:
        return _invalid("unknown_tool")
    argument = " ".join(raw.split())
    if tool == "read":
        return _READ if argument in ("", "next") else _invalid("bad_argument")
    if not argument:
        return _invalid("empty_argument")
    if len(argument) > MAX_ARGUMENT_CHARS:
        return _invalid("too_long")
    if not argument.isascii():
        # Lone surrogates cannot be written as UTF-8; a state must always be storable.
        argument = argument.encode("utf-8", errors="replace").decode("utf-8")
    return ParsedAction(_KINDS[tool], argument)


def _call(body: str, tools: Sequence[str]) -> ParsedAction:
    """The action that a tool call in JSON stands for.

    Forms: `{"name", "arguments"}` (Qwen, Hermes), `{"name", "parameters"}` (Llama 3.1), and both inside OpenAI's
    `{"function": …}` and `{"tool_calls": [{"function": …}, …]}`, of which the first call counts. Arguments are an
    object, or the JSON text of one.
    """
    if len(body) > MAX_JSON_CHARS:
        return _invalid("too_long")
    try:
        call = _decode(body)
        if isinstance(calls := call.get("tool_calls"), list) and calls and "name" not in call:
            call = _object(calls[0])
        if "function" in call and "name" not in call:
            call = _object(call["function"])
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        if not isinstance(name, str):
            return _invalid("bad_json")
        if name not in _TOOLS or name not in tools:
            return _invalid("unknown_tool")
        if isinstance(arguments, str):
            arguments = _decode(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return _invalid("bad_json")
    expected = _TOOLS[name].argument
    if not expected:
        return _action(name, "", tools) if not arguments and isinstance(arguments, dict | None) else _BAD_ARGUMENT
    if not isinstance(arguments, dict) or list(arguments) != [expected] or not isinstance(arguments[expected], str):
        return _BAD_ARGUMENT
    return _action(name, arguments[expected], tools)


def _decode(text: str) -> dict[str, object]:
    """A JSON object without doubt: no repeated keys, no NaN. Raises ValueError or RecursionError."""
    return _object(json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse))


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(unique := dict(pairs)) != len(pairs):
        raise ValueError("a key that comes twice")
    return unique


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _invalid(code: str) -> ParsedAction:
    return ParsedAction("invalid", "", code)


_KINDS: dict[str, ActionKind] = {"search": "search", "access": "access", "read": "read", "answer": "answer"}
_READ = ParsedAction("read")
_BAD_ARGUMENT = _invalid("bad_argument")
