"""What came of every arm: its runs at the chosen learning rate, and how two arms compare. No text, no drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from carl_gym.benchmark.aggregates import (
    FloatArray,
    crossed_interval,
    holm,
    improvement_interval,
    improvement_probability,
    paired_t_p,
    value_at,
)
from carl_gym.benchmark.arms import Arm
from carl_gym.benchmark.plan import Choice, Plan
from carl_gym.benchmark.records import Record, Records
from carl_gym.errors import DataError
from carl_gym.evaluation.statistics import sign_flip_p


@dataclass(frozen=True)
class ArmResult:
    """The finished final runs of an arm.

    Attributes:
        arm: which one.
        choice: its learning rate; None while the search is not finished.
        runs: final runs by seed; those that are finished.
        seeds: how many final seeds there are to be.
    """

    arm: Arm
    choice: Choice | None
    runs: Mapping[int, Record]
    seeds: int

    def scores(self, name: str, seeds: Sequence[int] | None = None) -> FloatArray:
        """`sampled_em`, `greedy_em` or `sampled_em_before`, (seeds, questions)."""
        chosen = self.runs if seeds is None else seeds
        return np.stack([self.runs[seed].per_question(name) for seed in chosen])

    def last(self, name: str) -> FloatArray:
        """A column of `Record.points` at the last evaluation, (seeds,)."""
        return np.array([record.last(name) for record in self.runs.values()])

    def at(self, budget: float) -> float:
        """Mean over seeds of sampled EM at a budget of generated actions; NaN where some run did not get there."""
        runs = self.runs.values()
        return float(np.mean([value_at(r.column("actions_generated"), r.curve("sampled_em"), budget) for r in runs]))

    def beyond(self, budget: float, seeds: Sequence[int]) -> FloatArray:
        """What sampled EM rose by after a budget, (seeds,): a run ends with the first step that reaches it.

        On the line between the last two evaluations, on the questions that all evaluations have.
        """
        runs = [(self.runs[seed], self.runs[seed].curve("sampled_em")) for seed in seeds]
        return np.array([curve[-1] - value_at(run.column("actions_generated"), curve, budget) for run, curve in runs])


@dataclass(frozen=True)
class Paired:
    """An arm against a reference on the same questions and seeds.

    Attributes:
        arm, reference: names.
        seeds: common ones.
        difference: mean of sampled EM, arm - reference.
        low, high: 95 % interval over seeds and questions.
        greedy, greedy_low, greedy_high: the same of greedy EM.
        at_budget: the difference of sampled EM without what each run gained after the budget (`ArmResult.beyond`).
        p: two-sided, of a permutation test over questions; each question's difference is the mean over the seeds. It
            says whether these runs differ, not whether other seeds would: two equal algorithms fall below .05 in about
            1 of 10 comparisons when the EM of runs varies by 1 or 2 points, in 4 of 10 at 4 points (simulated).
        p_seeds: two-sided, of a paired t test over seeds, whether other seeds would differ; NaN with a single one.
        p_holm: p_seeds, adjusted for all arms that are compared with the reference.
        probability: that a run of the arm scores higher than one of the reference.
        probability_low, probability_high: 95 % interval over runs.
    """

    arm: str
    reference: str
    seeds: tuple[int, ...]
    difference: float
    low: float
    high: float
    greedy: float
    greedy_low: float
    greedy_high: float
    at_budget: float
    p: float
    p_seeds: float
    p_holm: float
    probability: float
    probability_low: float
    probability_high: float


def collect_results(plan: Plan, records: Records) -> list[ArmResult]:
    """What is finished of every arm, in the plan's order.

    Raises:
        DataError: runs were evaluated on different questions.
    """
    results = []
    for arm in plan.arms:
        choice = plan.choice(arm, records.score)
        cells = [] if choice is None else plan.final_cells(arm, choice.rate)
        found = {cell.config.seed: record for cell in cells if (record := records.get(cell)) is not None}
        results.append(ArmResult(arm, choice, found, plan.seeds[arm.name]))
    questions = {record.questions: record for result in results for record in result.runs.values()}
    if len(questions) > 1:
        one, other, *_ = questions.values()
        raise DataError(
            f"{one.arm} (commit {one.commit}) and {other.arm} (commit {other.commit}) were evaluated on different "
            "questions although their settings are the same: the environment has changed in between; remove the "
            "records of one of them, and its folders under cells/"
        )
    return results


def compare_with(reference: ArmResult, results: Sequence[ArmResult], budget: float | None = None) -> list[Paired]:
    """Every other arm against a reference, as far as both have finished runs of the same seeds.

    Args:
        reference: the arm to compare with.
        results: of all arms.
        budget: of generated actions, the same for all; None where runs have another one.
    """
    pairs = []
    for result in results:
        seeds = tuple(seed for seed in result.runs if seed in reference.runs)
        if result is not reference and seeds:
            pairs.append((result, seeds))
    differences = [r.scores("sampled_em", seeds) - reference.scores("sampled_em", seeds) for r, seeds in pairs]
    p_values = [paired_t_p(difference.mean(axis=1)) for difference in differences]
    found = []
    for (result, seeds), difference, p, adjusted in zip(pairs, differences, p_values, holm(p_values), strict=True):
        greedy = result.scores("greedy_em", seeds) - reference.scores("greedy_em", seeds)
        gained = (
            math.nan
            if budget is None
            else float(np.mean(result.beyond(budget, seeds) - reference.beyond(budget, seeds)))
        )
        ours, theirs = result.last("sampled_em"), reference.last("sampled_em")
        found.append(
            Paired(
                result.arm.name,
                reference.arm.name,
                seeds,
                float(difference.mean()),
                *crossed_interval(difference),
                float(greedy.mean()),
                *crossed_interval(greedy),
                float(difference.mean()) - gained,
                sign_flip_p(difference.mean(axis=0)),
                p,
                adjusted,
                improvement_probability(ours, theirs),
                *improvement_interval(ours, theirs),
            )
        )
    return found
