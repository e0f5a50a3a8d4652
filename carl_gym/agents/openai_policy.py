"""Agents behind a chat-completions endpoint (OpenAI's protocol): any hosted model, or a local server such as vLLM's.

    prefix --decode--> messages --POST /chat/completions--> the assistant's message --encode--> action

There are no log-probs, so such an agent can be evaluated and not trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from carl_gym.agents.chat_client import ChatClient, ContextFull, OpenAISettings, Usage
from carl_gym.agents.messages import (
    Message,
    MessageTranscript,
    action_text,
    assistant_message,
    decode,
    encode,
    with_closing_tag,
)
from carl_gym.agents.policy import Completion, FinishReason, SampleRequest, check_requests, refuse_entropies
from carl_gym.cards import make_card
from carl_gym.envs.protocol import describe
from carl_gym.errors import ConfigError, PolicyError

TOOL_INSTRUCTION = (
    "Answer the question. Use the tools, one call at a time; what they bring comes inside <information> and "
    "</information>. Where a text there asks for a tag such as <answer>text</answer>, call the tool of that name."
)
"""The system message of `tool_mode = "tools"`."""

TAG_INSTRUCTION = (
    "Answer the question. Think first, then write one action and stop; what it brings comes inside <information> and "
    "</information>. Write an action as a tag, without Markdown:\n{tools}"
)
"""The system message of `tool_mode = "tags"`, where `{tools}` stands for the tags and what they are for."""

_OURS = {"model", "messages", "tools", "stream", "n", "max_tokens", "max_completion_tokens"}


class OpenAIPolicy:
    """Samples actions from a model behind a chat-completions endpoint. Its transcript is `MessageTranscript`.

    A conversation that the server finds too long ends its trajectory as truncated (`finish_reason` "context"). Use it
    as a context manager, or `close` it.

    Args:
        settings: model, endpoint, limits.
        tools: OpenAI function schemas, as `SearchTask.tools` gives them.

    Attributes:
        version: 0; weights elsewhere do not change.

    Raises:
        ConfigError: a URL, key or field of `extra_body` that cannot be used.
    """

    def __init__(self, settings: OpenAISettings, tools: Sequence[Mapping[str, Any]]) -> None:
        if taken := sorted(_OURS & settings.extra_body.keys()):
            raise ConfigError(f"extra_body must not set {taken[0]!r}, which the policy sets itself")
        self.settings = settings
        self.version = 0
        self._tools = [str(tool["function"]["name"]) for tool in tools]
        if settings.tool_mode == "tools":
            if settings.strict:
                tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]
            self._fields: dict[str, object] = {"tools": list(tools), "parallel_tool_calls": False}
        else:  # four are all that OpenAI takes, so without the rarer ways to write an action
            self._fields = {"stop": [f"</{name}>" for name in self._tools][:4]}
        self._client = ChatClient(settings)

    def __enter__(self) -> OpenAIPolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; nothing can be sampled afterwards."""
        self._client.close()

    @property
    def usage(self) -> Usage:
        """Tokens and requests so far."""
        return self._client.usage

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Ask for one action per request, all at once, in order.

        Raises:
            PolicyError: the server cannot be reached, refuses, or replies with something that is no chat completion;
                a conversation that is too long before the first action; a prefix that is no conversation; a request
                for exact entropies.
        """
        check_requests(requests, 1 << 62)  # the context is the server's affair
        refuse_entropies(requests, self._client.where)
        return self._client.map(self._act, requests)

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Chat completions have no log-probs: raises PolicyError."""
        raise PolicyError(f"{self._client.where} gives no log-probs and cannot score tokens; load a model instead")

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        """A model behind an endpoint cannot be trained: raises PolicyError."""
        raise PolicyError(f"{self._client.where} can be evaluated but not trained; load a model instead")

    async def _act(self, request: SampleRequest) -> Completion:
        messages = decode(request.prefix)

        def read(choice: dict[str, Any]) -> tuple[Message, FinishReason]:
            return self._read(choice, len(messages))

        try:
            found = await self._client.ask(self._body(messages, request), request.seed, request.max_tokens, read)
        except ContextFull:
            if not any(message["role"] == "assistant" for message in messages):
                raise  # that is no long episode: no question would fit
            found = {"role": "assistant", "content": ""}, "context"
        message, finish = found
        tokens = encode(message)
        text = action_text(message).encode("utf-8", "replace").decode()  # as the tokens have it
        return Completion(tokens, (math.nan,) * len(tokens), text, finish)

    def _body(self, messages: list[Message], request: SampleRequest) -> dict[str, object]:
        body = self._fields | {
            "messages": messages,
            self.settings.max_tokens_field: request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed % 2**31,  # some servers take no more bits
        }
        return {
            name: value for name, value in body.items() if name not in self.settings.omit
        } | self.settings.extra_body

    def _read(self, choice: dict[str, Any], number: int) -> tuple[Message, FinishReason]:
        """The message in a choice, and how it ended. Raises ValueError, KeyError or TypeError where there is none."""
        message = assistant_message(choice["message"], number)
        if choice.get("finish_reason") == "length":
            return message, "length"
        if self.settings.tool_mode == "tags":
            return message | {"content": with_closing_tag(message["content"], self._tools)}, "stop"
        return message, "stop" if "tool_calls" in message else "eos"


def openai_agent(
    model: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    instruction: str = "",
    max_tokens: int = 1024,
    **settings: Any,
) -> tuple[OpenAIPolicy, MessageTranscript]:
    """A policy and its transcript.

    Args:
        model: name that the endpoint knows.
        tools: OpenAI function schemas, as `SearchTask.tools` gives them.
        instruction: system message in place of the one for the tool mode; `{tools}` in it stands for the tools' tags.
        max_tokens: longest action, thoughts included.
        **settings: others of `OpenAISettings`.

    Raises:
        CardError: a setting that is unknown or wrong.
        ConfigError: a URL, key or field of `extra_body` that cannot be used.
    """
    made = make_card(OpenAISettings, {"model": model, **settings}, f"model {model}")
    text = instruction or (TOOL_INSTRUCTION if made.tool_mode == "tools" else TAG_INSTRUCTION)
    if "{tools}" in text:
        text = text.replace("{tools}", describe(str(tool["function"]["name"]) for tool in tools))
    return OpenAIPolicy(made, tools), MessageTranscript(text, max_tokens=max_tokens)
