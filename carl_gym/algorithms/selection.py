"""Selection: which actions train, and how much each of their tokens weighs. Pure functions of a batch of trees.

A selection takes the trees and returns one bool array per tree, indexed by node id: whether the edge *into* that node
trains; False at roots. Dropped actions are in no denominator either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from carl_gym.rollouts.tree import RolloutTree

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
Selection = Callable[[Sequence[RolloutTree]], list[BoolArray]]
Reduction = Literal["action", "token", "trajectory", "constant"]

TOKENS_PER_TRAJECTORY = 256
"""What the reduction "constant" divides by; only Adam's epsilon and the clip of the gradient's norm can tell."""


def all_actions(trees: Sequence[RolloutTree]) -> list[BoolArray]:
    """Every action trains."""
    return [np.array([node.parent is not None for node in tree.nodes], dtype=np.bool_) for tree in trees]


def forked_states(trees: Sequence[RolloutTree]) -> list[BoolArray]:
    """CARL's update set (arXiv 2512.04949, Eq. 13): D_upd = the actions whose source state has >= 2 children."""
    return [
        np.array([node.parent is not None and tree.n(node.parent) >= 2 for node in tree.nodes], dtype=np.bool_)
        for tree in trees
    ]


def below_a_fork(trees: Sequence[RolloutTree]) -> list[BoolArray]:
    """The update set of CARL's ablation "update all": the actions with siblings, and all that come after one."""
    selected = forked_states(trees)
    for tree, mask in zip(trees, selected, strict=True):
        for node in tree.nodes:  # parents come first
            if node.parent is not None:
                mask[node.id] |= mask[node.parent]
    return selected


def token_weights(
    trees: Sequence[RolloutTree], selected: Sequence[BoolArray], reduction: Reduction
) -> list[FloatArray]:
    """The weight of each token of every action; but for "constant", the weights of all trained tokens sum to 1.

    The mean is pooled over all trees. They carry the whole normalisation: a loss is sum(weight * token loss), however
    tokens are packed, split into micro-batches or spread over ranks.

        "action":      1 / (|D| |a|)                     mean over the selected actions D, each the mean over its tokens
        "token":       1 / sum over D of |a|             mean over their tokens
        "trajectory":  1 / (|T| sum over D in t of |a|)  mean over the trajectories T that train, each over its tokens
        "constant":    1 / (|T| TOKENS_PER_TRAJECTORY)   sum over the tokens of a trajectory, mean over trajectories

    An action belongs to the trajectory that sampled it.

    Returns:
        one float array per tree, by node id: the weight of one token of the edge into the node; all 0 when nothing is
        selected (then there is no step to take).
    """
    lengths = [np.array([len(node.action.token_ids) if node.action else 0 for node in tree.nodes]) for tree in trees]
    numbers = [np.array([node.trajectory for node in tree.nodes]) for tree in trees]
    actions = sum(int(mask.sum()) for mask in selected)
    tokens = sum(int(length[mask].sum()) for length, mask in zip(lengths, selected, strict=True))
    trajectories = sum(len(set(number[mask].tolist())) for number, mask in zip(numbers, selected, strict=True))
    weights = []
    for length, number, mask in zip(lengths, numbers, selected, strict=True):
        if reduction == "action":
            share = actions * length
        elif reduction == "token":
            share = np.full(len(length), tokens)
        elif reduction == "trajectory":
            share = trajectories * np.bincount(number, weights=length * mask)[number]
        else:
            share = np.full(len(length), trajectories * TOKENS_PER_TRAJECTORY)
        weight = np.zeros(len(length))
        weight[mask] = 1.0 / share[mask]
        weights.append(weight)
    return weights
