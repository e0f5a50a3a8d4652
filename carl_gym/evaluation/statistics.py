"""How far a score can be trusted, and whether two scores differ. Pure functions of scores per question.

The unit is always the question: several episodes of one question are one observation, their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from carl_gym.errors import ConfigError

RESAMPLES = 2000
"""Of a bootstrap interval."""
PERMUTATIONS = 10_000
"""Sign assignments that are drawn where there are too many to try them all."""
EXACT_UP_TO = 16
"""Most differences whose sign assignments are all tried: 2**16 of them."""
_BLOCK = 1 << 22
"""Most random numbers at once."""


def bootstrap_interval(scores: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), with a fixed seed.

    How often each distinct score is drawn follows a multinomial distribution; drawing these counts instead of single
    scores gives the same distribution of means and takes a hundredth of the time where there are few distinct scores.

    Args:
        scores: (n,) one per question, n >= 1.
        level: coverage.
    """
    rng = np.random.default_rng(0)
    values, counts = np.unique(scores, return_counts=True)
    shares = counts / len(scores)
    rows = max(1, _BLOCK // len(values))  # all resamples of many questions at once would be gigabytes
    sizes = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
    drawn = (rng.multinomial(len(scores), shares, size) for size in sizes)
    means = np.concatenate([part @ values for part in drawn]) / len(scores)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pass_at_k(episodes: int, correct: int, k: int) -> float:
    """Probability that one of k episodes is correct: 1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, Eq. 1).

    Args:
        episodes: n, how many were played.
        correct: c, how many of them were correct.
        k: how many one may try, at most n.

    Raises:
        ConfigError: k or c is more than n, or k is below 1.
    """
    if not (1 <= k <= episodes and 0 <= correct <= episodes):
        raise ConfigError(f"pass@{k} of {correct} correct among {episodes} episodes: expected 1 <= k <= n and c <= n")
    return 1.0 - math.comb(episodes - correct, k) / math.comb(episodes, k)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of a paired permutation test (Fisher 1935): the mean difference is 0.

    If neither side is better, the sign of every difference is a coin toss. The p-value is the share of sign
    assignments whose sum lies at least as far from 0 as the one that was seen. Differences of 0 change nothing.

    - All differences equally large (EM with one episode per question): by the binomial distribution, exactly; this is
      McNemar's exact test.
    - At most `EXACT_UP_TO` that are not 0: all assignments, exactly.
    - Otherwise `PERMUTATIONS` seeded draws, the seen assignment counted in (Phipson and Smyth 2010), so that p is
      never 0.

    Args:
        differences: (n,) one per question, n >= 0.
    """
    moved = np.asarray(differences, dtype=float)
    moved = moved[moved != 0]
    if not len(moved):
        return 1.0
    sizes = np.abs(moved)
    if sizes.max() - sizes.min() <= 1e-12 * sizes.max():
        return _binomial_p(int((moved > 0).sum()), len(moved))
    seen = abs(moved.sum()) - 1e-9 * sizes.sum()  # equal sums differ by rounding
    if len(moved) <= EXACT_UP_TO:
        sums = np.zeros(1)
        for size in sizes:
            sums = np.concatenate([sums + size, sums - size])
        return float((np.abs(sums) >= seen).mean())
    rng = np.random.default_rng(0)
    rows = max(1, _BLOCK // len(moved))
    extreme = 0
    for done in range(0, PERMUTATIONS, rows):
        positive = rng.integers(0, 2, (min(rows, PERMUTATIONS - done), len(moved)), dtype=np.int8)
        extreme += int((np.abs(2 * (positive @ sizes) - sizes.sum()) >= seen).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)


def _binomial_p(wins: int, games: int) -> float:
    """Two-sided probability of a result at least as uneven as `wins` of `games` tosses of a fair coin."""
    tail, ways = 0, 1
    for count in range(min(wins, games - wins) + 1):
        tail += ways
        ways = ways * (games - count) // (count + 1)  # C(games, count + 1)
    return min(1.0, 2 * tail / 2**games)
