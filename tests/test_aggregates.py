"""Aggregates of a benchmark: known answers, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.benchmark.aggregates import (
    crossed_interval,
    holm,
    improvement_interval,
    improvement_probability,
    iqm,
    iqm_of_runs,
    mean_of_runs,
    run_band,
    run_interval,
    value_at,
)

shares = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 2.0, 9.0], 4.0),  # floor(3 / 4) = 0: nothing is cut
        ([9.0, 1.0, 2.0, 4.0], 3.0),  # one off each end: (2 + 4) / 2
        ([100.0, 1.0, 2.0, 3.0, -50.0], 2.0),  # one off each end: (1 + 2 + 3) / 3
        ([0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 90.0, 99.0], 4.5),  # two off each end: (3 + 4 + 5 + 6) / 4
    ],
)
def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side(runs, expected):
    assert iqm(runs) == pytest.approx(expected)


def test_equal_scores_have_an_interval_of_one_point():
    assert crossed_interval(np.full((3, 7), 0.25)) == pytest.approx((0.25, 0.25))
    assert run_interval(np.full(4, 0.25), iqm_of_runs) == pytest.approx((0.25, 0.25))


def test_what_a_run_has_in_common_for_all_questions_does_not_average_out():
    # Two runs, one always wrong and one always right. A resample draws both right with 1/4, one of each with 1/2, both
    # wrong with 1/4, whatever the questions: means 0, 1/2, 1. The 2.5 % and 97.5 % quantiles are 0 and 1. Resampling
    # runs for each question by itself would give about 0.5 +- 0.03 for these 1,000 questions.
    scores = np.repeat([[0.0], [1.0]], 1000, axis=1)
    assert crossed_interval(scores) == pytest.approx((0.0, 1.0))
    assert run_interval(np.array([0.0, 1.0]), mean_of_runs) == (0.0, 1.0)


def test_what_a_question_has_in_common_for_all_runs_does_not_average_out():
    # The same for questions: 5 runs agree on each. Only the draw of questions matters.
    scores = np.tile([0.0, 1.0], (5, 1))
    assert crossed_interval(scores) == pytest.approx((0.0, 1.0))


def test_with_one_seed_the_interval_is_that_of_a_mean_over_questions():
    # Standard error sqrt(.3 * .7 / 1000) = .01449, so the interval is .3 +- 1.96 * .01449 = [.2716, .3284], up to the
    # noise of 2,000 resamples.
    scores = np.zeros((1, 1000))
    scores[0, :300] = 1
    low, high = crossed_interval(scores)
    assert low == pytest.approx(0.2716, abs=0.003) and high == pytest.approx(0.3284, abs=0.003)


def test_independent_scores_of_several_seeds_narrow_the_interval():
    # Questions and seeds have nothing in common: variances of both resamplings add up, .25/4000 for each of the two
    # draws and as much for their interaction (Owen 2007: three times the variance for independent cells).
    scores = np.random.default_rng(1).integers(0, 2, (40, 100)).astype(float)
    low, high = crossed_interval(scores)
    assert (high - low) / (2 * 1.96) == pytest.approx(math.sqrt(3 * 0.25 / 4000), rel=0.2)


def test_bands_hold_an_interval_for_every_point_of_a_curve():
    low, high = run_band(np.array([[0.0, 0.5], [1.0, 0.5]]), mean_of_runs)
    assert low.tolist() == [0.0, 0.5] and high.tolist() == [1.0, 0.5]


def test_the_probability_of_improvement_counts_pairs_and_half_of_the_ties():
    # 3 > 2, 3 > 1, 1 < 2, 1 = 1: (1 + 1 + 0 + 1/2) / 4
    assert improvement_probability(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == 0.625
    assert improvement_probability(np.array([0.7]), np.array([0.1, 0.2, 0.9])) == pytest.approx(2 / 3)


def test_runs_that_are_all_better_stay_so_in_every_resample():
    assert improvement_interval(np.array([0.8, 0.9]), np.array([0.1, 0.2, 0.3])) == (1.0, 1.0)
    # One run against two, one of them worse: both drawn worse 1/4, both better 1/4.
    assert improvement_interval(np.array([0.5]), np.array([0.1, 0.9])) == (0.0, 1.0)


@given(shares, shares)
def test_one_side_improves_as_often_as_the_other_does_not(ours, theirs):
    one, other = np.array(ours), np.array(theirs)
    assert improvement_probability(one, other) + improvement_probability(other, one) == pytest.approx(1)


@pytest.mark.parametrize(
    ("given_p", "expected"),
    [
        ([], []),
        ([0.2], [0.2]),
        # sorted .01 .03 .04: .01 * 3 = .03, .03 * 2 = .06, .04 * 1 = .04 must not fall below .06
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.6, 0.5], [1.0, 1.0]),
        ([0.02, np.nan, 0.03], [0.04, np.nan, 0.04]),
    ],
)
def test_holm_adjusts_step_by_step(given_p, expected):
    assert holm(given_p) == pytest.approx(expected, nan_ok=True)


def test_a_value_at_a_budget_lies_on_the_line_between_evaluations():
    spent, reached = np.array([0.0, 10.0, 30.0]), np.array([0.2, 0.4, 0.8])
    assert value_at(spent, reached, 5.0) == pytest.approx(0.3)
    assert value_at(spent, reached, 25.0) == pytest.approx(0.7)
    assert value_at(spent, reached, 30.0) == 0.8
    assert math.isnan(value_at(spent, reached, 31.0))
