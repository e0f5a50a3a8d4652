"""Credit: from complete rollout trees to an advantage for every action. Pure functions of a batch of trees.

Each takes the trees and returns one array per tree, indexed by node id: the advantage of the edge *into* that
node, 0 at roots. The learner gives it to every token of the action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from carl_gym.rollouts.tree import RolloutTree

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Credit = Callable[[Sequence[RolloutTree]], list[FloatArray]]

STD_EPSILON = 1e-6


def values(tree: RolloutTree) -> FloatArray:
    """V of every node: the return still to come, as the tree estimates it (CARL Eq. 9-10).

        V(leaf) = 0,    V(u) = mean over u's children v of r(u -> v) + V(v)

    The paper pays the outcome at the leaf; here it is the reward of the last edge, which is the same thing. The
    mean is plain: weighting children by their number of leaves would be biased, since forks are not placed at random.

    Returns:
        float array by node id.
    """
    value = np.zeros(len(tree.nodes))
    for node in reversed(tree.nodes):  # children come after their parents
        if node.parent is not None:
            value[node.parent] += (node.reward + value[node.id]) / tree.n(node.parent)
    return value


def leaf_weighted_values(tree: RolloutTree) -> FloatArray:
    """V of every node as the mean over the leaves below it of the return still to come, by node id.

    TreeRL and ARPO estimate values so. It is biased where forks are placed by what was sampled (CARL's ablation).
    """
    value, leaves = np.zeros(len(tree.nodes)), np.zeros(len(tree.nodes))
    for node in reversed(tree.nodes):
        leaves[node.id] = leaves[node.id] if node.children else 1
        value[node.id] /= leaves[node.id]
        if node.parent is not None:
            leaves[node.parent] += leaves[node.id]
            value[node.parent] += leaves[node.id] * (node.reward + value[node.id])
    return value


def difference(tree: RolloutTree, value: FloatArray) -> FloatArray:
    """A(u -> v) = r(u -> v) + V(v) - V(u), with V by node id; 0 at roots."""
    advantage = np.zeros(len(tree.nodes))
    for node in tree.nodes:
        if node.parent is not None:
            advantage[node.id] = node.reward + value[node.id] - value[node.parent]
    return advantage


def tree_difference(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """CARL's credit (arXiv 2512.04949, Algorithm 2, Eq. 11): A(u -> v) = r(u -> v) + V(v) - V(u).

    No group mean, no normalisation, no critic. The advantages of one state's actions sum to 0, and an action without
    siblings has none. V(u) contains the child itself, so the expected gradient at a state with k children is
    (1 - 1/k) of the policy gradient there.
    """
    return [difference(tree, values(tree)) for tree in trees]


def leaf_weighted_difference(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """The tree difference with leaf-weighted values: an ablation of CARL."""
    return [difference(tree, leaf_weighted_values(tree)) for tree in trees]


def leave_one_out_difference(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """A(u -> v) = r + V(v) - mean over the other children of u: the tree difference times k / (k - 1) for k children.

    Its expected gradient is not scaled by (1 - 1/k). An action without siblings has no advantage.
    """
    advantages = tree_difference(trees)
    for tree, advantage in zip(trees, advantages, strict=True):
        for node in tree.recorded():
            k = len(node.children)
            advantage[node.children] *= k / (k - 1) if k > 1 else 0.0
    return advantages


def inherited(credit: Credit) -> Credit:
    """An action without siblings gets the advantage of the nearest edge before it that has any ("update all")."""

    def with_inheritance(trees: Sequence[RolloutTree]) -> list[FloatArray]:
        advantages = credit(trees)
        for tree, advantage in zip(trees, advantages, strict=True):
            for node in tree.nodes:  # parents come first
                if node.parent is not None and tree.n(node.parent) == 1:
                    advantage[node.id] = advantage[node.parent]
        return advantages

    return with_inheritance


def group_normalised(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """GRPO's credit (arXiv 2402.03300, Section 4.1.2): A = (R - mean) / (std + 1e-6) over the tree's trajectories.

    R is a trajectory's return, std the sample standard deviation, and every action of the trajectory gets A. A group
    of equal returns has A = 0. An action that several trajectories share gets the mean of theirs, so on a forked tree
    this is the outcome reward on the tree, an ablation of CARL.
    """
    return [_group_normalised(tree) for tree in trees]


def _group_normalised(tree: RolloutTree) -> FloatArray:
    leaves, returns = trajectory_returns(tree)
    if np.ptp(returns) == 0:  # rounding would not leave the mean of equal returns exactly equal to them
        return np.zeros(len(tree.nodes))
    return mean_over_leaves(tree, leaves, (returns - returns.mean()) / (returns.std(ddof=1) + STD_EPSILON))


def trajectory_returns(tree: RolloutTree) -> tuple[IntArray, FloatArray]:
    """Ids of the leaves, and the return of the trajectory from the root to each."""
    so_far = np.zeros(len(tree.nodes))
    for node in tree.nodes:
        if node.parent is not None:
            so_far[node.id] = so_far[node.parent] + node.reward
    leaves = np.array([node.id for node in tree.leaves()])
    return leaves, so_far[leaves]


def mean_over_leaves(tree: RolloutTree, leaves: IntArray, scores: FloatArray) -> FloatArray:
    """What every edge inherits from the trajectories that share it: the mean of their scores; 0 at roots.

    Args:
        tree: complete.
        leaves: ids of all leaves.
        scores: one for each, such as an advantage of its trajectory.

    Returns:
        float array by node id.
    """
    below, count = np.zeros(len(tree.nodes)), np.zeros(len(tree.nodes))
    below[leaves], count[leaves] = scores, 1
    for node in reversed(tree.nodes):
        if node.parent is not None:
            below[node.parent] += below[node.id]
            count[node.parent] += count[node.id]
    mean = below / count
    mean[[root.id for root in tree.roots()]] = 0.0
    return mean
