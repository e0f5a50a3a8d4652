"""Trees -> what an algorithm makes of them -> the rows that one optimiser step trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carl_gym.algorithms import Algorithm, token_weights
from carl_gym.rollouts.tree import RolloutTree
from carl_gym.training.segments import Row, rows, segments


@dataclass(frozen=True, slots=True)
class CreditedTree:
    """A tree with what the algorithm made of it, by node id: advantage, and whether the edge into the node trains."""

    tree: RolloutTree
    advantages: np.ndarray
    selected: np.ndarray


def credit_trees(algorithm: Algorithm, trees: Sequence[RolloutTree]) -> list[CreditedTree]:
    """Credit and selection over all trees of a step."""
    parts = zip(trees, algorithm.credit(trees), algorithm.selection(trees), strict=True)
    return [CreditedTree(*part) for part in parts]


def trained_rows(algorithm: Algorithm, credited: Sequence[CreditedTree], own: slice = slice(None)) -> list[Row]:
    """The rows of the trees `own`, normalised over all of them: this process' part of an optimiser step.

    Raises:
        PolicyError: log-probs are not known.
    """
    weights = token_weights([c.tree for c in credited], [c.selected for c in credited], algorithm.loss_reduction)
    found = []
    for one, weight in list(zip(credited, weights, strict=True))[own]:
        emphasis = algorithm.emphasis(one.tree) if algorithm.emphasis else None
        found += rows(segments(one.tree, one.advantages, weight, emphasis))
    return found
