"""The one contract between agents and everything else: tokens in, tokens and log-probs out.

Sampled token ids are carried end to end and never re-encoded. What a backend caches is its own
affair: nothing of it appears here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from carl_gym.envs.state import EnvState

FinishReason = Literal["stop", "eos", "length"]


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
    """

    prefix: Sequence[int]
    seed: int
    temperature: float = 1.0
    max_tokens: int = 64
    state: EnvState | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled action.

    Attributes:
        token_ids: the sampled ids, stop tokens included.
        logprobs: natural log-probability of each sampled token under the distribution that it was
            drawn from (temperature applied; of the untempered distribution when greedy).
        text: the decoded tokens, stop string included, end-of-sequence token left out.
        finish_reason: `stop` (a stop string was completed), `eos`, or `length`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason


class Policy(Protocol):
    """Anything that turns prefixes into actions."""

    version: int
    """Counts `sync` calls: which weights sampled a completion."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample one completion per request, in order. Raises PolicyError on a non-finite log-prob."""
        ...

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs (temperature 1) of each continuation's tokens after its prefix."""
        ...

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        """Take over new weights (None: they were changed in place) and drop everything cached."""
        ...
