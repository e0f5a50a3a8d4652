"""Evaluation: episodes per question, scores with their uncertainty, and whether two results differ.

questions --play--> Episodes, chunk by chunk --summarise--> Evaluation      (episodes.py, summary.py)
what is finished stays on disk                                              (store.py)
two results --compare--> paired difference, interval and p-value            (comparison.py, statistics.py)
"""

from carl_gym.evaluation.episodes import Episode, play
from carl_gym.evaluation.setting import gold_recall, held_out_first, questions_fingerprint, retrieval_setting
from carl_gym.evaluation.summary import Evaluation, break_down, evaluate, summarise

__all__ = [
    "Episode",
    "Evaluation",
    "break_down",
    "evaluate",
    "gold_recall",
    "held_out_first",
    "play",
    "questions_fingerprint",
    "retrieval_setting",
    "summarise",
]
