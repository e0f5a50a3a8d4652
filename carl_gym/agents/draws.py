"""Tokens from logits: random numbers that belong to a request, and inversion of the distribution function."""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seeds: np.ndarray, index: int | np.ndarray) -> np.ndarray:
    """The `index`-th uniform number in [0, 1) of each seed's stream (SplitMix64, Steele et al. 2014).

    Counter-based: a request's numbers depend on its seed alone, never on the batch it is in.

    Args:
        seeds: (n,) uint64.
        index: position in the streams; (n,) where it differs.
    """
    x = seeds + (np.asarray(index).astype(np.uint64).reshape(-1) + np.uint64(1)) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


class Temperatures:
    """What the logits of a batch are divided by; 0 is greedy, of the untempered distribution.

    Args:
        values: one per row.
        device: where the logits are.
    """

    def __init__(self, values: list[float], device: torch.device) -> None:
        column = torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)
        self.greedy = column == 0 if 0 in values else None
        self.divisors = None if all(value in (0, 1) for value in values) else column.masked_fill(column == 0, 1.0)


def draw(
    logits: torch.Tensor, temperatures: Temperatures, u: np.ndarray, *, entropies: bool = False
) -> tuple[torch.Tensor, list[float], list[float]]:
    """One token per row by inversion of the distribution function, its log-prob, and the distribution's entropy.

    Args:
        logits: (rows, vocabulary).
        temperatures: of the rows.
        u: (rows,) uniform numbers.
        entropies: whether to compute H = -sum_v p_v log p_v, in nats; otherwise that list is empty.
    """
    scaled = logits.float() if temperatures.divisors is None else logits.float() / temperatures.divisors
    logprobs = torch.log_softmax(scaled, dim=-1)
    probabilities = logprobs.exp()
    cdf = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = torch.from_numpy(u).to(cdf.device).unsqueeze(1) * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    if temperatures.greedy is not None:
        drawn = torch.where(temperatures.greedy, logprobs.argmax(-1, keepdim=True), drawn)
    exact = torch.special.entr(probabilities).sum(-1).tolist() if entropies else []
    return drawn.squeeze(1), logprobs.gather(1, drawn).squeeze(1).tolist(), exact
