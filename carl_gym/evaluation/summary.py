"""From episodes to scores with their uncertainty, overall and per kind of question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np

from carl_gym.agents.policy import Policy, Transcript
from carl_gym.envs.state import Question
from carl_gym.envs.task import SearchTask
from carl_gym.errors import ConfigError
from carl_gym.evaluation.episodes import Episode, play
from carl_gym.evaluation.setting import traits
from carl_gym.evaluation.statistics import bootstrap_interval, pass_at_k


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over questions, each with the same number of episodes. NaN stands for what the data cannot tell.

    Attributes:
        questions: number of questions.
        samples: k, episodes per question.
        em, f1, cover_em, judge: of the final answers, 0 where there was none; mean over all episodes, which for k > 1
            is known as avg@k. For EM it is also the unbiased pass@1.
        pass_at_k: share of the questions that one of the k episodes answers exactly.
        em_low, em_high, …: 95 % bootstrap intervals over questions.
        turns: actions per episode.
        searches, accesses, reads: well-formed ones per episode.
        invalid: malformed actions, as a share of all actions.
        gold_title_recall: share of the supporting titles that came up.
        gold_title_opened: share of them that were opened.
        answered: share of the episodes that ended with an answer.
        prompt_tokens, generated_tokens: per episode (see `Episode`).
    """

    questions: int
    samples: int
    em: float
    em_low: float
    em_high: float
    f1: float
    f1_low: float
    f1_high: float
    cover_em: float
    cover_em_low: float
    cover_em_high: float
    judge: float
    judge_low: float
    judge_high: float
    pass_at_k: float
    pass_at_k_low: float
    pass_at_k_high: float
    turns: float
    searches: float
    accesses: float
    reads: float
    invalid: float
    gold_title_recall: float
    gold_title_opened: float
    answered: float
    prompt_tokens: float
    generated_tokens: float

    def metrics(self, prefix: str) -> dict[str, float]:
        """The values that exist, by name, for a tracker; pass@k only where it is not EM."""
        values = {name: float(value) for name, value in asdict(self).items() if name not in ("questions", "samples")}
        if self.samples == 1:
            values = {name: value for name, value in values.items() if not name.startswith("pass_at_k")}
        return {f"{prefix}_{name}": value for name, value in values.items() if math.isfinite(value)}


def evaluate(
    task: SearchTask,
    policy: Policy,
    transcript: Transcript,
    questions: Sequence[Question],
    *,
    temperature: float,
    seed: int = 0,
    samples: int = 1,
) -> Evaluation:
    """Play and summarise; temperature 0 is greedy. The same seed gives the same random numbers. Raises as `play`."""
    parts = play(task, policy, transcript, questions, temperature=temperature, seed=seed, samples=samples)
    return summarise(list(chain.from_iterable(parts)))


def summarise(episodes: Sequence[Episode]) -> Evaluation:
    """Means over episodes, at least one.

    Raises:
        ConfigError: there are none, or some question has more episodes than another.
    """
    groups = list(by_question(episodes).values())
    samples = {len(group) for group in groups}
    if len(samples) != 1:
        raise ConfigError(f"a mean needs the same number of episodes, 1 or more, of every question; got {samples}")
    k = samples.pop()
    columns = {name: question_scores(groups, name) for name in ("em", "f1", "cover_em", "judge")}
    columns["pass_at_k"] = np.array([pass_at_k(k, sum(e.em == 1 for e in group), k) for group in groups])
    scores: dict[str, float] = {}
    for name, column in columns.items():
        known = not np.isnan(column).any()
        low, high = bootstrap_interval(column) if known else (math.nan, math.nan)
        scores |= {name: float(column.mean()), f"{name}_low": low, f"{name}_high": high}
    turns = sum(episode.turns for episode in episodes)
    return Evaluation(
        questions=len(groups),
        samples=k,
        **scores,
        turns=turns / len(episodes),
        searches=sum(episode.searches for episode in episodes) / len(episodes),
        accesses=sum(episode.accesses for episode in episodes) / len(episodes),
        reads=sum(episode.reads for episode in episodes) / len(episodes),
        invalid=sum(episode.invalid_actions for episode in episodes) / max(turns, 1),
        gold_title_recall=_mean(episode.gold_title_recall for episode in episodes),
        gold_title_opened=_mean(episode.gold_title_opened for episode in episodes),
        answered=sum(episode.status == "answered" for episode in episodes) / len(episodes),
        prompt_tokens=_mean(episode.prompt_tokens for episode in episodes),
        generated_tokens=_mean(episode.generated_tokens for episode in episodes),
    )


def break_down(episodes: Sequence[Episode], questions: Mapping[str, Question]) -> dict[str, dict[str, Evaluation]]:
    """Scores per `type`, `hops` and `level` of the questions, as far as the data tells any (see `setting.traits`).

    Args:
        episodes: of any questions.
        questions: those questions by id.
    """
    groups: dict[str, dict[str, list[Episode]]] = {}
    for episode in episodes:
        for trait, value in traits(questions[episode.question_id]).items():
            groups.setdefault(trait, {}).setdefault(value, []).append(episode)
    return {
        trait: {value: summarise(members) for value, members in sorted(values.items())}
        for trait, values in sorted(groups.items())
    }


def by_question(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    """The episodes of every question, by its id."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.question_id, []).append(episode)
    return groups


def question_scores(groups: Sequence[Sequence[Episode]], score: str) -> np.ndarray:
    """Mean of `em`, `f1`, `cover_em` or `judge` over each group's episodes, (n,); NaN where an episode lacks it."""
    values = ([getattr(episode, score) for episode in group] for group in groups)
    return np.array([math.nan if None in group else sum(group) / len(group) for group in values])


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
