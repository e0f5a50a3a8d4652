"""Requests to a chat-completions endpoint (OpenAI's protocol): many at once, within limits, with further attempts."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

import httpx

from carl_gym.cards import bounded
from carl_gym.errors import ConfigError, PolicyError

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

LONGEST_PAUSE = 60.0
"""Seconds of back-off between two attempts at most; a server may ask for more."""

_AGAIN = {408, 409, 429}
_CONTEXT = re.compile(r"context[ _](length|size|window)|prompt is too long|max_new_tokens|input token count", re.I)
"""How servers say that a conversation is too long."""


class ContextFull(PolicyError):
    """A server refuses a conversation as longer than its model's context."""


@dataclass(frozen=True, slots=True)
class OpenAISettings:
    """Which model, where, and how much may be asked of it.

    Attributes:
        model: name that the endpoint knows.
        base_url: of the endpoint, such as http://127.0.0.1:8000/v1.
        api_key_variable: environment variable that holds the key; need not be set for servers without keys.
        tool_mode: tools for function calling; tags for servers without it: the system message says what to write.
        strict: with tools, whether functions are marked so that a server which can (OpenAI's, vLLM's) lets the model
            write only arguments that fit.
        concurrency: requests in flight at once.
        requests_per_minute, tokens_per_minute: evenly spaced; 0 for no limit. Before a reply comes its tokens are
            counted as `max_tokens` and a quarter of the request's bytes.
        timeout: seconds for an attempt, from the first byte sent to the last one received.
        deadline: seconds for all attempts of a request and the pauses between them.
        retries: attempts after the first, on connection errors, timeouts, statuses 408, 409, 429 and 5xx, and replies
            that are no chat completion.
        backoff: the pause before attempt n + 1 is drawn from 0 to backoff * 2**n seconds, and is at least what the
            server's Retry-After says.
        max_tokens_field: what the limit of the reply is called; servers that ignore max_completion_tokens want
            max_tokens.
        omit: fields that the model refuses, such as temperature, seed, stop or parallel_tool_calls.
        extra_body: further fields of each request, such as tool_choice, top_p or reasoning_effort.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key_variable: str = "OPENAI_API_KEY"
    tool_mode: Literal["tools", "tags"] = "tools"
    strict: bool = False
    concurrency: int = bounded(1, 10_000, 16)
    requests_per_minute: float = bounded(0.0, 1e9, 0.0)
    tokens_per_minute: float = bounded(0.0, 1e12, 0.0)
    timeout: float = bounded(0.01, 86_400.0, 120.0)
    deadline: float = bounded(0.01, 86_400.0, 600.0)
    retries: int = bounded(0, 100, 6)
    backoff: float = bounded(0.0, 60.0, 0.5)
    max_tokens_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    omit: tuple[str, ...] = ()
    extra_body: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Usage:
    """What was asked of a server, added up over all calls.

    Attributes:
        prompt_tokens, completion_tokens: as the server counts them; 0 where it does not say.
        requests: HTTP requests sent.
        retries: how many of them were further attempts.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    retries: int = 0


class Pacer:
    """Spaces costs evenly: a token bucket that holds no more than one request.

    Args:
        per_minute: cost per minute; 0 for no limit.
    """

    def __init__(self, per_minute: float) -> None:
        self._seconds = 60.0 / per_minute if per_minute else 0.0
        self._free = -math.inf

    def reserve(self, cost: float, now: float) -> float:
        """When what costs so much may start; the next one has to wait for it."""
        start = max(now, self._free)
        self._free = start + cost * self._seconds
        return start

    def correct(self, difference: float) -> None:
        """Something cost so much more than was reserved for it."""
        self._free += difference * self._seconds


class ChatClient:
    """Sends requests to one endpoint, from a thread with an event loop of its own: a caller may be inside another loop
    (notebooks are), and connections last from call to call.

    Args:
        settings: endpoint and limits.

    Attributes:
        usage: tokens and requests so far.

    Raises:
        ConfigError: a URL or key that cannot be used.
    """

    def __init__(self, settings: OpenAISettings) -> None:
        self.settings = settings
        self.usage = Usage()
        self._key = _api_key(settings)
        self._requests, self._tokens = Pacer(settings.requests_per_minute), Pacer(settings.tokens_per_minute)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._http = httpx.AsyncClient(
            base_url=_endpoint(settings.base_url),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=None,  # `ask` limits the whole of an attempt; httpx would start anew with every byte
            limits=httpx.Limits(max_connections=None, keepalive_expiry=30.0),  # `_slots` limits them
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat completions", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the connections; nothing can be asked afterwards."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def map(self, work: Callable[[T], Coroutine[Any, Any, R]], items: Sequence[T]) -> list[R]:
        """What `work`, which may `ask`, makes of the items, all at once, in order. The first error ends the others.

        Raises:
            PolicyError: the client was closed.
        """
        if self._loop.is_closed():
            raise PolicyError(f"{self.where}: the connection was closed; make a new policy")
        future = asyncio.run_coroutine_threadsafe(_gather(work, items), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # after an interrupt

    async def ask(self, body: Mapping[str, object], seed: int, max_tokens: int, read: Callable[[Any], R]) -> R:
        """The first choice of the reply to one request, whatever number of attempts it takes.

        Args:
            body: of the request, without the model.
            seed: determines the pauses.
            max_tokens: longest reply, for the limit of tokens per minute.
            read: makes something of the choice; a ValueError, KeyError or TypeError of its means that the server's
                reply is wrong, and is another reason for another attempt.

        Raises:
            ContextFull: the conversation is too long.
            PolicyError: every attempt failed, or the server refuses the request for good.
        """
        settings, rng = self.settings, random.Random(seed)
        content = json.dumps({"model": settings.model, **body}).encode()
        expected = len(content) // 4 + max_tokens
        left = settings.deadline
        for attempt in range(settings.retries + 1):
            await self._pace(expected)
            async with self._slots:
                self.usage.requests += 1
                self.usage.retries += attempt > 0
                started, asked = time.monotonic(), 0.0
                try:
                    async with asyncio.timeout(min(settings.timeout, left)):
                        response = await self._http.post(
                            "chat/completions", content=content, headers={"Content-Type": "application/json"}
                        )
                    return self._read(response, expected, read)
                except TimeoutError:
                    problem = f"no reply within {min(settings.timeout, left):g} s"
                except httpx.RequestError as error:
                    problem = f"{type(error).__name__}: {error}"
                except _Fault as fault:
                    problem, asked = str(fault), fault.pause
            pause = max(asked, rng.uniform(0.0, min(LONGEST_PAUSE, settings.backoff * 2**attempt)))
            left -= time.monotonic() - started + pause  # neither our own limits nor the queue count
            if attempt == settings.retries or left <= 0:
                break
            log.warning("%s; attempt %d in %.3f s", self._error(problem), attempt + 2, pause)
            await asyncio.sleep(pause)
        raise self._error(
            f"no answer after {attempt + 1} attempts, at last: {problem}; check base_url and the server, or raise "
            "retries, timeout or deadline"
        )

    @property
    def where(self) -> str:
        """Model and endpoint, for messages."""
        return f"model {self.settings.model} at {self.settings.base_url}"

    async def _pace(self, tokens: float) -> None:
        now = time.monotonic()
        await asyncio.sleep(max(self._requests.reserve(1, now), self._tokens.reserve(tokens, now)) - now)

    def _read(self, response: httpx.Response, expected: int, read: Callable[[Any], R]) -> R:
        """What `read` makes of the response. Raises _Fault where another attempt may help."""
        status = response.status_code
        if status in _AGAIN or status >= 500:
            raise _Fault(f"status {status}: {_said(response)}", _retry_after(response))
        if status != 200:
            kind = ContextFull if status in (400, 413, 422) and _CONTEXT.search(response.text) else PolicyError
            raise self._error(f"status {status}: {_said(response)}{self._advice(status)}", kind)
        try:
            reply = json.loads(response.content)
            found = read(reply["choices"][0])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise _Fault(f"a reply that is no chat completion ({error!r}): {_said(response)}", 0.0) from error
        self._count(reply.get("usage"), expected)
        return found

    def _count(self, usage: object, expected: int) -> None:
        told = usage if isinstance(usage, dict) else {}
        prompt, completion = (
            told[name] if type(told.get(name)) is int else 0 for name in ("prompt_tokens", "completion_tokens")
        )
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        if prompt:
            self._tokens.correct(prompt + completion - expected)

    def _error(self, problem: str, kind: type[PolicyError] = PolicyError) -> PolicyError:
        """With what a server may have echoed of the key taken out."""
        text = f"{self.where}: {problem}"
        return kind(text.replace(self._key, "[the API key]") if self._key else text)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"; check the key in {self.settings.api_key_variable}" + ("" if self._key else ", which is not set")
        if status < 400 or status in (404, 405):
            return "; check base_url and model"
        return "; what a model does not take can be left out with `omit`" if status in (400, 422) else ""


class _Fault(Exception):
    """Something that another attempt may mend, after `pause` seconds at least."""

    def __init__(self, problem: str, pause: float) -> None:
        super().__init__(problem)
        self.pause = pause


async def _gather(work: Callable[[T], Coroutine[Any, Any, R]], items: Sequence[T]) -> list[R]:
    tasks = [asyncio.ensure_future(work(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # one failed, or nobody waits any more
            task.cancel()


def _endpoint(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url.rstrip("/") + "/")
    except httpx.InvalidURL as error:
        raise ConfigError(f"base_url {base_url!r} is no URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"base_url {base_url!r} must be something like http://127.0.0.1:8000/v1")
    if url.userinfo:
        raise ConfigError("base_url must hold no user name or password; put a key into an environment variable")
    return url


def _api_key(settings: OpenAISettings) -> str:
    key = os.environ.get(settings.api_key_variable, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"the key in {settings.api_key_variable} has characters that no key has; set it anew")
    return key


def _said(response: httpx.Response) -> str:
    """What a server says about an error, as OpenAI puts it, or the beginning of whatever it sent."""
    try:
        text = json.loads(response.content)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = response.text
    return str(text).strip()[:500] or "(nothing)"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks for: a number or a date (RFC 9110, 10.2.3); 0 where it says nothing legible."""
    asked = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(asked) if asked[:1].isdigit() else parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return 0.0
