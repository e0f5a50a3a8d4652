"""The contracts between agents and everything else: tokens in, tokens and log-probs out.

Sampled token ids are carried end to end and never re-encoded. What a backend caches is its own
affair: nothing of it appears here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from carl_gym.envs.state import EnvState
from carl_gym.errors import PolicyError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

FinishReason = Literal["stop", "eos", "length", "context"]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One action to sample.

    Attributes:
        prefix: token ids of everything so far (prompt, actions, observations).
        seed: determines the random numbers of this request, whatever else is in the batch.
        temperature: logits are divided by it; 0 means greedy.
        max_tokens: longest action.
        state: the environment state, for policies that act on states instead of tokens
            (scripted, tabular); language models ignore it.
        entropies: whether the completion is to have the exact entropies of its tokens. A policy that cannot give
            them raises PolicyError.
    """

    prefix: Sequence[int]
    seed: int
    temperature: float = 1.0
    max_tokens: int = 64
    state: EnvState | None = None
    entropies: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled action.

    Attributes:
        token_ids: the sampled ids, stop tokens included.
        logprobs: natural log-probability of each sampled token under the distribution that it was
            drawn from (temperature applied; of the untempered distribution when greedy). NaN where it is not known:
            a hosted model tells none, and cannot be trained.
        text: the decoded tokens, stop string included, end-of-sequence token left out.
        finish_reason: `stop` (a stop string was completed), `eos`, `length`, or `context`: the prefix left no room
            for an action. Then the tokens and the text stand for nothing, no step is taken, and the trajectory ends
            as truncated.
        entropies: where the request asked for them, the exact entropy in nats of each token's distribution: the one
            that it was drawn from (temperature applied; the untempered one when greedy). Given the tokens before, it
            is the expectation of minus the log-prob. Empty otherwise.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    entropies: tuple[float, ...] = ()


class Policy(Protocol):
    """Anything that turns prefixes into actions."""

    version: int
    """Counts `sync` calls: which weights sampled a completion."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample one completion per request, in order. Raises PolicyError on log-probs that a model made non-finite."""
        ...

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs (temperature 1) of each continuation's tokens after its prefix."""
        ...

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        """Take over new weights (None: they were changed in place) and drop everything cached."""
        ...


Exchange: TypeAlias = Callable[[list[tuple[int, Completion]], bool], list[tuple[int, SampleRequest]]]
"""`exchange(finished, idle)`: what a streaming policy calls between its steps.

It hands over what finished since the last call, by request number, and gets the requests that join now. A number is
never given twice. With `idle` nothing is under way in the policy: the call then waits until there is a request, and
returns [] when there will be none any more. Without it the call returns at once. What it raises must come out of
`stream`.
"""


@runtime_checkable
class StreamingPolicy(Policy, Protocol):
    """A policy that takes requests while others are under way, so that none waits for the slowest of a batch."""

    def stream(self, exchange: Exchange) -> None:
        """Sample what `exchange` asks for, until it is idle and asked for nothing.

        It calls `exchange` often (at least every few milliseconds, or after every token), from the caller's thread.
        When anything is raised it abandons what is under way, and can be used again.

        Raises:
            PolicyError: as `sample`.
        """
        ...


def sample_by_stream(policy: StreamingPolicy, requests: Sequence[SampleRequest]) -> list[Completion]:
    """`Policy.sample` of a policy that streams: all requests join at the first exchange, and none later."""
    answers: dict[int, Completion] = {}
    waiting = list(enumerate(requests))

    def exchange(finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
        nonlocal waiting
        answers.update(finished)
        joining, waiting = waiting, []
        return joining

    policy.stream(exchange)
    return [answers[number] for number in range(len(requests))]


class Transcript(Protocol):
    """How text becomes the tokens that a policy reads."""

    @property
    def max_tokens(self) -> int:
        """Longest action."""
        ...

    @property
    def context(self) -> int:
        """Longest prefix + action that the policy can take."""
        ...

    def prompt(self, question_text: str, /) -> tuple[int, ...]:
        """Tokens before the first action."""
        ...

    def observation(self, text: str, action: Sequence[int], /) -> tuple[int, ...]:
        """Tokens between an action, whose sampled token ids are given, and the next."""
        ...


def check_requests(requests: Sequence[SampleRequest], context: int) -> None:
    """Raises PolicyError on a request that no language model with this context (in tokens) can serve."""
    for request in requests:
        if not 0 <= request.temperature < math.inf:
            raise PolicyError(f"a sample request's temperature is {request.temperature}; it must be 0 (greedy) or more")
        if not request.prefix or request.max_tokens < 1:
            raise PolicyError("a sample request needs a prefix of at least one token and max_tokens >= 1")
        if len(request.prefix) + request.max_tokens > context:
            raise PolicyError(
                f"prefix ({len(request.prefix)} tokens) and max_tokens ({request.max_tokens}) exceed the model's "
                f"context of {context}; lower max_tokens or end the trajectory"
            )


def refuse_entropies(requests: Sequence[SampleRequest], sampler: str) -> None:
    """Raises PolicyError when exact entropies are asked for; for a `sampler` that only tells log-probs of tokens."""
    if any(request.entropies for request in requests):
        raise PolicyError(
            f"{sampler} cannot give exact entropies: it does not tell the whole distribution of a token. Sample with "
            "the transformers backend, or choose an algorithm that needs none"
        )


def eos_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end a text, by a model's generation config and its tokenizer."""
    listed = getattr(generation, "eos_token_id", None)
    return {i for i in (*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id) if i is not None}
