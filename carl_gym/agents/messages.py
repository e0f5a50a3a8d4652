"""Conversations as tokens: chat messages for policies whose model takes messages, where token ids are UTF-8 bytes.

    prompt, action, observation, action, ...  =  JSON lines, one chat message each

An action is the assistant's message, an observation the answer to it, so a prefix is a whole conversation and decodes
to the messages that come next in a request. What the environment reads of an action is `action_text`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from carl_gym.envs.protocol import escape
from carl_gym.errors import PolicyError

Message = dict[str, Any]
"""A chat message: `role`, `content` and, of an assistant that called a tool, `tool_calls`."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What servers take for the name of a function."""


def encode(*messages: Mapping[str, object]) -> tuple[int, ...]:
    """The messages as bytes, a line of JSON each. What is no text (half a surrogate pair) becomes `?`."""
    lines = (json.dumps(message, ensure_ascii=False) + "\n" for message in messages)
    return tuple("".join(lines).encode("utf-8", "replace"))


def decode(tokens: Sequence[int]) -> list[Message]:
    """The messages that `encode` wrote, one call of it or several. Raises PolicyError on anything else."""
    try:
        messages = [json.loads(line) for line in bytes(tokens).decode().split("\n") if line]
        if messages and all(isinstance(message, dict) and "role" in message for message in messages):
            return messages
    except ValueError:
        pass
    raise PolicyError(
        f"these {len(tokens)} tokens are no conversation (JSON lines as UTF-8 bytes); use MessageTranscript with a "
        "policy that takes messages"
    )


class MessageTranscript:
    """Renders texts of the environment as chat messages.

    Args:
        instruction: the system message; none where it is empty.
        max_tokens: longest action, in tokens of the model.
        context: longest conversation, in bytes. The model's own limit, in its tokens, is known to its server alone,
            whose refusal ends an episode as well.
    """

    def __init__(self, instruction: str = "", *, max_tokens: int = 1024, context: int = 1 << 24) -> None:
        self.instruction = instruction
        self.max_tokens = max_tokens
        self.context = context

    def prompt(self, question_text: str) -> tuple[int, ...]:
        """The system message and the question, from the user."""
        user = {"role": "user", "content": question_text}
        return encode({"role": "system", "content": self.instruction}, user) if self.instruction else encode(user)

    def observation(self, text: str, action: Sequence[int]) -> tuple[int, ...]:
        """What the environment answered: as the result of the tool that `action` called, or else from the user.

        Raises:
            PolicyError: the action is not the bytes of one message.
        """
        message = decode(action)[-1]
        if calls := message.get("tool_calls"):
            return encode({"role": "tool", "tool_call_id": calls[0]["id"], "content": text})
        return encode({"role": "user", "content": text})


def assistant_message(reply: object, number: int) -> Message:
    """The assistant's message as it is kept: its content (or refusal) and its first tool call, without its reasoning.

    A call that could not stand in a request, since its name is none or its arguments are no JSON object, is kept
    word for word in the content instead: the next request is valid and the model sees what it wrote. A message
    without content and calls is an empty one.

    Args:
        reply: `message` of a choice.
        number: of the message in the conversation, for calls that come without an id.

    Raises:
        ValueError: the reply is no chat message; that is the server's fault and not the model's.
    """
    if not isinstance(reply, dict):
        raise ValueError("a choice without a message")
    content = reply.get("content") or reply.get("refusal") or ""
    if not isinstance(content, str):
        raise ValueError(f"content of type {type(content).__name__} in place of text")
    message: Message = {"role": "assistant", "content": content}
    calls = reply.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError("tool_calls that are no list")
    if not calls:
        return message
    try:
        name, arguments = calls[0]["function"]["name"], calls[0]["function"].get("arguments") or "{}"
        id = calls[0].get("id") or f"call_{number}"
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("a tool call without a function's name") from error
    if isinstance(arguments, dict):  # some servers skip the encoding
        arguments = json.dumps(arguments)
    if not all(isinstance(value, str) for value in (name, arguments, id)):
        raise ValueError("a tool call whose id, name or arguments are no text")
    if _NAME.fullmatch(name) and _is_object(arguments):
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        return message | {"tool_calls": [call]}
    return message | {"content": content + _as_text(name, arguments)}


def action_text(message: Message) -> str:
    """What the environment's parser reads: the content, and the tool call in `<tool_call>`.

    Where there is a call, it is the action: tags in the content are escaped.
    """
    content = str(message["content"])
    if not (calls := message.get("tool_calls")):
        return content
    function = calls[0]["function"]
    return escape(content) + _as_text(function["name"], function["arguments"])


def with_closing_tag(content: str, tools: Iterable[str]) -> str:
    """`content` with the closing tag of the tool that is open at its end: servers cut stop strings off."""
    names = "|".join(map(re.escape, tools))
    tags = re.findall(rf"<(/?)({names})>", content)
    return f"{content}</{tags[-1][1]}>" if tags and not tags[-1][0] else content


def _as_text(name: str, arguments: str) -> str:
    """A tool call as the environment's parser takes it, whatever name and arguments hold."""
    # An object stays as it was written; `<` stands in strings only, where JSON can write it so that no tag is closed.
    value = arguments if _is_object(arguments) else json.dumps(arguments)
    body = f'{{"name": {json.dumps(name)}, "arguments": {value}}}'.replace("<", "\\u003c")
    return f"<tool_call>{body}</tool_call>"


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
