"""The action protocol: from an agent's text to a `ParsedAction`, and from other texts to harmless ones.

An action is `<search>query</search>`, `<access>title</access>` or `<answer>text</answer>`; whatever
stands in `<think>…</think>` or outside the tags is ignored. The first complete action wins, so nothing
that follows it can change its meaning. Sampling stops at the closing tags (`STOP_STRINGS`).
"""

from __future__ import annotations

import re

from carl_gym.envs.state import MAX_ARGUMENT_CHARS, ActionKind, ParsedAction

TOOLS: tuple[ActionKind, ...] = ("search", "access", "answer")
STOP_STRINGS = tuple(f"</{tool}>" for tool in TOOLS)
TAGS = tuple(f"<{slash}{name}>" for name in ("think", *TOOLS, "information") for slash in ("", "/"))
"""Every tag of the protocol, the environment's own `<information>` included."""

INVALID_HINTS = {
    "no_action": "No action found. Write <search>query</search>, <access>title</access> or <answer>text</answer>.",
    "unclosed": "The action has no closing tag. Write <search>query</search>, <access>title</access> "
    "or <answer>text</answer>.",
    "unclosed_think": "A thought has no closing tag. Close it with </think> before the action.",
    "empty_argument": "The action is empty. Put a query, a title or an answer between the tags.",
    "too_long": f"The text between the tags is too long. Use at most {MAX_ARGUMENT_CHARS} characters.",
}
"""What an agent is told about each kind of invalid action."""

_TAG = re.compile(r"<(/?)(think|search|access|answer)>")
_FORGEABLE = re.compile(r"<(?=/?[A-Za-z]|[|\uff5c])")


def parse(text: str) -> ParsedAction:
    """The first complete action in `text`, or an invalid one with its code. Linear time; never raises.

    A tool's opening tag inside another tool's argument starts anew: the action that is closed first is
    the one that counts. Closing tags without their opening tag are ignored.
    """
    tool, start, thinking = "", 0, False
    for match in _TAG.finditer(text):
        closing, name = bool(match[1]), match[2]
        if name == "think":
            thinking, tool = not closing, ("" if not closing else tool)
        elif thinking:
            continue
        elif not closing:
            tool, start = name, match.end()
        elif name == tool:
            return _action(name, text[start : match.start()])
    return _invalid("unclosed_think" if thinking else "unclosed" if tool else "no_action")


def escape(text: str) -> str:
    """`text` with every `<` that could open a tag or a chat-template token written as `&lt;`.

    Applied to everything that comes from documents and questions: "x < 5" stays as it is, while
    `<answer>`, `</information>` and `<|im_end|>` lose their meaning.
    """
    return _FORGEABLE.sub("&lt;", text)


def _action(tool: str, raw: str) -> ParsedAction:
    argument = " ".join(raw.split())
    if not argument:
        return _invalid("empty_argument")
    if len(argument) > MAX_ARGUMENT_CHARS:
        return _invalid("too_long")
    # Lone surrogates cannot be written as UTF-8; a state must always be storable.
    argument = argument.encode("utf-8", errors="replace").decode("utf-8")
    return ParsedAction(_KINDS[tool], argument)


def _invalid(code: str) -> ParsedAction:
    return ParsedAction("invalid", "", code)


_KINDS: dict[str, ActionKind] = {tool: tool for tool in TOOLS}
