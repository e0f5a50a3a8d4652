"""Evaluation: one episode per question, and what came of it with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from carl_gym.agents.policy import Policy
from carl_gym.envs.state import Question
from carl_gym.envs.task import SearchTask
from carl_gym.rollouts.collector import Transcript, collect
from carl_gym.rollouts.explorers import RootExplorer

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over episodes, one per question.

    Attributes:
        questions: number of episodes.
        em, f1: of the final answers; 0 where there was none.
        em_low, em_high, f1_low, f1_high: 95 % bootstrap intervals over questions.
        turns: actions per episode.
        invalid: malformed actions, as a share of all actions.
        gold_title_recall: share of the supporting titles that came up; NaN where the data names none.
        gold_title_opened: share of them that were opened; NaN as above.
        answered: share of the episodes that ended with an answer.
    """

    questions: int
    em: float
    em_low: float
    em_high: float
    f1: float
    f1_low: float
    f1_high: float
    turns: float
    invalid: float
    gold_title_recall: float
    gold_title_opened: float
    answered: float

    def metrics(self, prefix: str) -> dict[str, float]:
        """The values that exist, by name, for a tracker."""
        return {f"{prefix}_{k}": float(v) for k, v in asdict(self).items() if k != "questions" and math.isfinite(v)}


def evaluate(
    task: SearchTask,
    policy: Policy,
    transcript: Transcript,
    questions: Sequence[Question],
    *,
    temperature: float,
    seed: int = 0,
) -> Evaluation:
    """Play one episode per question; temperature 0 is greedy. The same seed gives the same random numbers."""
    trees = collect(task, policy, transcript, questions, RootExplorer(1), seed=seed, step=0, temperature=temperature)
    infos = [task.info(tree.leaves()[0].state) for tree in trees]
    em, f1 = np.array([info["em"] for info in infos]), np.array([info["f1"] for info in infos])
    turns = sum(info["turns"] for info in infos)
    em_low, em_high = bootstrap_interval(em)
    f1_low, f1_high = bootstrap_interval(f1)
    return Evaluation(
        questions=len(infos),
        em=float(em.mean()),
        em_low=em_low,
        em_high=em_high,
        f1=float(f1.mean()),
        f1_low=f1_low,
        f1_high=f1_high,
        turns=turns / len(infos),
        invalid=sum(info["invalid_actions"] for info in infos) / max(turns, 1),
        gold_title_recall=_mean([info["gold_title_recall"] for info in infos]),
        gold_title_opened=_mean([info["gold_title_opened"] for info in infos]),
        answered=float(np.mean([info["status"] == "answered" for info in infos])),
    )


def bootstrap_interval(scores: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), with a fixed seed.

    Args:
        scores: (n,) one per question.
        level: coverage.
    """
    rng = np.random.default_rng(0)
    means = rng.choice(scores, (RESAMPLES, len(scores))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
