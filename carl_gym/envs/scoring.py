"""Exact match, F1 and the rewards made of them.

Normalisation, EM and F1 are those of the official HotpotQA script (hotpot_evaluate_v1.py,
https://github.com/hotpotqa/hotpot), which takes its normalisation from SQuAD's.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = ("yes", "no", "noanswer")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the gold answers after normalisation, else 0.0."""
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(answer) for answer in answers))


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """The best token F1 over the gold answers, in [0, 1].

    As in the official script, yes, no and noanswer score only when both sides are equal.
    """
    return max((_f1(normalize_answer(prediction), normalize_answer(answer)) for answer in answers), default=0.0)


def _f1(prediction: str, answer: str) -> float:
    if prediction != answer and (prediction in _CLOSED_ANSWERS or answer in _CLOSED_ANSWERS):
        return 0.0
    predicted, gold = prediction.split(), answer.split()
    same = sum((Counter(predicted) & Counter(gold)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True, slots=True)
class Score:
    """How an episode went so far.

    Attributes:
        em: exact match of the final answer; 0 without one.
        f1: token F1 of the final answer; 0 without one.
        format: share of well-formed actions, in [0, 1]; 0 before the first action.
    """

    em: float = 0.0
    f1: float = 0.0
    format: float = 0.0


FORMAT_WEIGHT = 0.1

REWARDS: dict[str, Callable[[Score], float]] = {
    "f1_format": lambda score: score.f1 + FORMAT_WEIGHT * score.format,
    "em_format": lambda score: score.em + FORMAT_WEIGHT * score.format,
    "f1": lambda score: score.f1,
    "em": lambda score: score.em,
}
"""Outcome rewards by the name that cards use; paid once, at the end of the episode."""
