"""Statistics of evaluations: values worked out by hand, known distributions, and exhaustive enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carl_gym.errors import ConfigError
from carl_gym.evaluation import statistics
from carl_gym.evaluation.statistics import bootstrap_interval, pass_at_k, sign_flip_p

# -- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_equal_scores_leave_no_uncertainty(score):
    assert bootstrap_interval(np.full(50, score)) == (score, score)


@pytest.mark.parametrize(("size", "right"), [(400, 200), (500, 175), (10_000, 3_000)])
def test_for_many_questions_it_is_the_normal_interval(size, right):
    scores = np.zeros(size)
    scores[:right] = 1.0
    mean = right / size
    half = 1.96 * math.sqrt(mean * (1 - mean) / size)
    low, high = bootstrap_interval(scores)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_for_two_questions_it_is_all_that_resampling_can_give():
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert bootstrap_interval(np.array([0.0, 1.0]), level=0.4) == (0.5, 0.5)  # half of all resamples are one of each


def test_it_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval((rng.random(100) < 0.3).astype(float)) for _ in range(200)]
    covered = sum(low <= 0.3 <= high for low, high in intervals)
    assert 178 <= covered <= 199  # 190 expected; 4 standard deviations of the count, and a bootstrap is a bit short


@settings(max_examples=50, deadline=None)
@given(arrays(float, st.integers(1, 60), elements=st.floats(0, 1)))
def test_it_lies_around_the_mean_within_the_scores_and_grows_with_the_level(scores):
    low, high = bootstrap_interval(scores)
    assert scores.min() - 1e-12 <= low <= high <= scores.max() + 1e-12
    wider = bootstrap_interval(scores, level=0.999)
    assert wider[0] <= low and high <= wider[1]
    assert wider[0] - 1e-12 <= scores.mean() <= wider[1] + 1e-12
    assert bootstrap_interval(scores) == (low, high)


def test_the_interval_does_not_depend_on_how_many_resamples_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch):
    scores = np.random.default_rng(1).random(301)
    at_once = bootstrap_interval(scores)
    monkeypatch.setattr(statistics, "_BLOCK", 5000)
    assert bootstrap_interval(scores) == pytest.approx(at_once, abs=1e-12)
    monkeypatch.setattr(statistics, "_BLOCK", 10)
    assert bootstrap_interval(scores) == pytest.approx(at_once, abs=1e-12)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert np.allclose(at_once, [scores.mean() - half, scores.mean() + half], atol=0.003)


def test_drawing_counts_is_drawing_scores():
    scores = np.repeat([0.0, 0.25, 1.0], [30, 50, 20])
    rng = np.random.default_rng(5)
    means = rng.choice(scores, (20_000, 100)).mean(axis=1)
    assert bootstrap_interval(scores) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.006)


# -- pass@k ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 2, 2, 5 / 6),
        (4, 1, 2, 1 / 2),
        (5, 3, 1, 3 / 5),
        (5, 0, 5, 0.0),
        (5, 1, 5, 1.0),
        (3, 2, 2, 1.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 8))
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_correct_one(correct, k):
    k = min(k, len(correct))
    choices = list(itertools.combinations(correct, k))
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_of_what_cannot_be_is_an_error(n, c, k):
    with pytest.raises(ConfigError, match=f"pass@{k} of {c} correct among {n}"):
        pass_at_k(n, c, k)


# -- permutation test ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], 1.0),
        ([0.0, 0.0], 1.0),
        ([0.3], 1.0),  # either sign lies as far out
        ([1.0, 2.0, 3.0], 2 / 8),  # only all + and all - reach 6
        ([0.5, 1.0, 1.0, 0.0, 0.0], 2 / 8),  # zeros change nothing
        ([3.0, 1.0, -1.0], 6 / 8),  # sums 5, 3, 3, 1, -1, -3, -3, -5 against 3
        ([1.0, 2.0, -3.0], 1.0),
        ([1.0, 1.0, 1.0, 1.0, -1.0], 12 / 32),  # McNemar: 2 (1 + 5) / 32
        ([-1.0] * 5, 2 / 32),
        ([0.25] * 3 + [-0.25], 10 / 16),  # 2 (1 + 4) / 16
    ],
)
def test_p_values_by_hand(differences, expected):
    assert sign_flip_p(differences) == pytest.approx(expected, abs=1e-15)


def all_assignments(differences) -> float:
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    return float(np.mean(np.array(sums) >= abs(sum(differences)) - 1e-9))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.5, -1 / 3, 0.0, 0.1, 0.2, 0.3, 1.0]), max_size=9))
def test_few_differences_are_enumerated(differences):
    assert sign_flip_p(differences) == pytest.approx(all_assignments(differences), abs=1e-12)
    assert sign_flip_p([-d for d in differences]) == sign_flip_p(differences)


def test_many_differences_are_sampled_close_to_the_exact_value(monkeypatch: pytest.MonkeyPatch):
    differences = np.random.default_rng(3).normal(0.3, 1.0, 18)
    sampled = sign_flip_p(differences)
    monkeypatch.setattr(statistics, "EXACT_UP_TO", 18)
    exact = sign_flip_p(differences)
    assert 0.02 < exact < 0.98
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4)
    assert sampled != exact and sign_flip_p(differences) == exact


def test_sampling_is_seeded_and_never_gives_zero(monkeypatch: pytest.MonkeyPatch):
    differences = 1.0 + np.random.default_rng(4).random(200)
    assert sign_flip_p(differences) == 1 / 10_001
    unclear = np.random.default_rng(6).normal(0.05, 1.0, 200)
    once = sign_flip_p(unclear)
    monkeypatch.setattr(statistics, "_BLOCK", 1 << 10)
    assert sign_flip_p(unclear) == once


def test_mcnemar_is_exact_for_thousands_of_questions():
    assert sign_flip_p([1.0] * 2000 + [-1.0] * 2000) == 1.0
    wins, losses = 2100, 1900
    z = (wins - losses - 1) / math.sqrt(wins + losses)  # with the correction for continuity
    assert sign_flip_p([1.0] * wins + [-1.0] * losses) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert sign_flip_p([1.0] * 1000) == 2.0**-999


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(8)
    values = [sign_flip_p(rng.normal(size=14)) for _ in range(300)]
    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.09
    assert 0.42 <= np.mean(np.array(values) <= 0.5) <= 0.58
