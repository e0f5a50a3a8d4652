"""What a criticality study says: how criticality is distributed, and whether entropy finds it. Pure functions.

States of one question resemble each other. Intervals are therefore bootstrapped over questions; the Brunner-Munzel
test, which the paper reports, takes states as independent and is too sure of itself.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from carl_gym.evaluation.criticality import MeasuredState, spread

FloatArray = npt.NDArray[np.float64]

NEAR_ZERO, HIGH = 0.05, 0.4
"""States below the first are near zero, states above the second highly critical: the paper reports more than half of
its states near zero and about a tenth above 0.4. It does not say where it parts high from low for its test of entropy;
here high is above `HIGH` and low is the rest."""
BIN = 0.05
"""Width of the histogram's bins."""
Summary = Mapping[str, Any]
"""What `summarise_criticality` gives."""
BOOTSTRAP = 1000
"""Resamples of the questions."""

PREDICTORS: dict[str, Callable[[MeasuredState], float | None]] = {
    "one_sample": lambda state: state.h,
    "mean_of_k": lambda state: state.mean_h,
    "exact_one_sample": lambda state: state.exact_h,
    "exact_mean_of_k": lambda state: state.mean_exact_h,
    "mean_of_same_k": lambda state: float(np.mean(state.hs)),
}
"""What is held against criticality: h of the trajectory's own action; the mean h of K fresh ones; for both the exact
entropy of the distributions that the tokens were drawn from, where it is known; and the mean h of the very K actions
whose returns C is made of. The last one is flattered: an improbable draw raises h and C together."""


def summarise_criticality(states: Sequence[MeasuredState]) -> dict[str, Any]:
    """All numbers of a study, as JSON values; None stands for what the data cannot tell.

    Keys:
        states, questions, resamples: how much was measured.
        criticality, score_criticality: distribution of C of the return and of the score (`distribution`).
        root_mean_variance: sqrt of the mean over states of the unbiased estimate of C(s)^2.
        halves: rank correlation r between C of the first and of the second half of the resamples: how well K / 2
            resamples reproduce themselves. None for K < 4.
        ceiling: sqrt(2 r / (1 + r)), about what a predictor that knew the true C would correlate with C of all K
            resamples (Spearman-Brown, attenuation); rough, since ranks with many ties are no linear measure: too high
            where most states are settled. None where r is not above 0.
        near_zero_of_half: share of near-zero states by K / 2 resamples, mean of both halves. If it is well above the
            share by K, fewer states are near zero than K resamples show. None for K < 4.
        fates: number of states lost, won and open.
        entropy: by predictor, its `association` with criticality among all states and among the open ones. With a
            score of 0 or 1, lost and won states are the states without any spread: the open ones tell whether entropy
            also orders those whose outcome is not settled.
        by_action, by_depth, by_fate: `group` for the kind of the trajectory's action, the number of actions before, and
            the fate.

    Args:
        states: at least one.
    """
    open_states = [state for state in states if state.fate == "open"]
    return {
        "states": len(states),
        "questions": len({state.question_id for state in states}),
        "resamples": len(states[0].returns),
        "criticality": distribution([state.criticality for state in states]),
        "score_criticality": distribution([state.score_criticality for state in states]),
        "root_mean_variance": math.sqrt(float(np.mean([state.variance for state in states]))),
        **_halves(states),
        "fates": {fate: count for fate, count in sorted(Counter(state.fate for state in states).items())},
        "entropy": {
            name: {"all": association(states, name), "open": association(open_states, name)}
            for name in PREDICTORS
            if all(PREDICTORS[name](state) is not None for state in states)
        },
        "by_action": _groups(states, lambda state: state.action),
        "by_depth": _groups(states, lambda state: state.depth),
        "by_fate": _groups(states, lambda state: state.fate),
    }


def distribution(criticalities: Sequence[float]) -> dict[str, Any]:
    """Mean, shares near zero and high, and the histogram: `counts[i]` states with C in [`edges[i]`, `edges[i + 1]`)."""
    values = np.asarray(criticalities, dtype=float)
    bins = max(12, math.floor(values.max() / BIN) + 1)
    places = np.minimum(np.floor(values / BIN + 1e-9).astype(int), bins - 1)  # .15 / .05 is 2.9999...
    return {
        "mean": float(values.mean()),
        "near_zero": float((values < NEAR_ZERO).mean()),
        "high": float((values > HIGH).mean()),
        "histogram": {
            "edges": [round(BIN * i, 10) for i in range(bins + 1)],
            "counts": np.bincount(places, minlength=bins).tolist(),
        },
    }


def association(states: Sequence[MeasuredState], predictor: str) -> dict[str, Any]:
    """How a predictor goes with criticality among the states.

    Keys: `states`; `spearman`; and for the two ways to part the states, `high` (C > 0.4 against the rest) and
    `not_near_zero` (C >= 0.05 against the rest), what `split` gives. Intervals are percentile bootstraps over
    questions, 95 %; None where the data cannot tell.

    Args:
        states: any number.
        predictor: a name in `PREDICTORS`.
    """
    value = PREDICTORS[predictor]
    h = np.array([value(state) for state in states], dtype=float)
    c = np.array([state.criticality for state in states], dtype=float)
    parts = {"high": c > HIGH, "not_near_zero": c >= NEAR_ZERO}
    samples = _question_samples(states)
    return {
        "states": len(states),
        "spearman": spearman(h, c),
        "spearman_interval": _interval(spearman(h[rows], c[rows]) for rows in samples),
        **{name: split(h, upper, samples) for name, upper in parts.items()},
    }


def split(h: FloatArray, upper: npt.NDArray[np.bool_], samples: Sequence[npt.NDArray[np.intp]] = ()) -> dict[str, Any]:
    """Whether entropies of the upper states exceed those of the others.

    Keys: `upper`, `lower`: number of states; `upper_median`, `lower_median`: of their entropies; `cliffs_delta` with
    `cliffs_delta_interval`; `brunner_munzel_p`.

    Args:
        h: (n,) entropies.
        upper: (n,) which states are the upper ones.
        samples: rows of each bootstrap resample.
    """
    high, low = h[upper], h[~upper]
    return {
        "upper": len(high),
        "lower": len(low),
        "upper_median": float(np.median(high)) if len(high) else None,
        "lower_median": float(np.median(low)) if len(low) else None,
        "cliffs_delta": cliffs_delta(high, low),
        "cliffs_delta_interval": _interval(cliffs_delta(h[r][upper[r]], h[r][~upper[r]]) for r in samples),
        "brunner_munzel_p": brunner_munzel_p(high, low),
    }


def cliffs_delta(x: FloatArray, y: FloatArray) -> float | None:
    """P(x > y) - P(x < y) over all pairs (Cliff 1993), exactly, by ranks; None when a side is empty.

    With R the sum of x's midranks among all, U = R - n (n + 1) / 2 = #(x > y) + #(x = y) / 2, delta = 2 U / (n m) - 1.

    Args:
        x: (n,).
        y: (m,).
    """
    n, m = len(x), len(y)
    if not n or not m:
        return None
    u = midranks(np.concatenate([x, y]))[:n].sum() - n * (n + 1) / 2
    return float(2 * u / (n * m) - 1)


def brunner_munzel_p(x: FloatArray, y: FloatArray) -> float | None:
    """Two-sided p-value of P(x > y) = P(x < y) (Brunner and Munzel 2000, t approximation).

    None where it is not defined: fewer than 2 values on a side, or no pair out of order, which leaves no variance.
    """
    from scipy.stats import brunnermunzel  # slow to import

    if min(len(x), len(y)) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 0/0, for which None stands
        p = float(brunnermunzel(x, y).pvalue)
    return None if math.isnan(p) else p


def spearman(x: FloatArray, y: FloatArray) -> float | None:
    """Rank correlation: Pearson's of the midranks; None for fewer than 2 pairs or where a side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(midranks(x), midranks(y))[0, 1])


def midranks(values: FloatArray) -> FloatArray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[places], dtype=float)


def group(states: Sequence[MeasuredState]) -> dict[str, Any]:
    """Number of states, their mean criticality and return, shares near zero and high, mean H, and its rank correlation
    with criticality among them."""
    c = np.array([state.criticality for state in states])
    h = np.array([state.mean_h for state in states])
    return {
        "states": len(states),
        "criticality": float(c.mean()),
        "near_zero": float((c < NEAR_ZERO).mean()),
        "high": float((c > HIGH).mean()),
        "mean_return": float(np.mean([state.mean_return for state in states])),
        "mean_h": float(h.mean()),
        "spearman": spearman(h, c),
    }


def _groups(states: Sequence[MeasuredState], trait: Callable[[MeasuredState], str | int]) -> dict[str, Any]:
    found: dict[str | int, list[MeasuredState]] = {}
    for state in states:
        found.setdefault(trait(state), []).append(state)
    return {str(name): group(found[name]) for name in sorted(found, key=lambda name: (str(type(name)), name))}


def _halves(states: Sequence[MeasuredState]) -> dict[str, float | None]:
    half = len(states[0].returns) // 2
    if half < 2:
        return {"halves": None, "ceiling": None, "near_zero_of_half": None}
    first = np.array([spread(state.returns[:half]) for state in states])
    second = np.array([spread(state.returns[half : 2 * half]) for state in states])
    r = spearman(first, second)
    return {
        "halves": r,
        "ceiling": math.sqrt(2 * r / (1 + r)) if r is not None and r > 0 else None,
        "near_zero_of_half": float((np.concatenate([first, second]) < NEAR_ZERO).mean()),
    }


def _question_samples(states: Sequence[MeasuredState]) -> list[npt.NDArray[np.intp]]:
    """Rows of the states of questions drawn with replacement, as many as there are; one array per resample."""
    rows: dict[str, list[int]] = {}
    for row, state in enumerate(states):
        rows.setdefault(state.question_id, []).append(row)
    if len(rows) < 2:
        return []
    blocks = [np.array(block, dtype=np.intp) for block in rows.values()]
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(blocks), (BOOTSTRAP, len(blocks)))
    return [np.concatenate([blocks[i] for i in draw]) for draw in draws]


def _interval(estimates: Iterable[float | None]) -> list[float] | None:
    """The middle 95 % of what is defined; None when less than half is."""
    found = list(estimates)
    known = [value for value in found if value is not None]
    if not known or 2 * len(known) < len(found):
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return [float(low), float(high)]
