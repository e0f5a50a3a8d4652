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


def tree_difference(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """CARL's credit (arXiv 2512.04949, Algorithm 2, Eq. 11): A(u -> v) = r(u -> v) + V(v) - V(u).

    No group mean, no normalisation, no critic. The advantages of one state's actions sum to 0, and an action without
    siblings has none. V(u) contains the child itself, so the expected gradient at a state with k children is
    (1 - 1/k) of the policy gradient there.
    """
    advantages = []
    for tree in trees:
        value = values(tree)
        advantage = np.zeros(len(tree.nodes))
        for node in tree.nodes:
            if node.parent is not None:
                advantage[node.id] = node.reward + value[node.id] - value[node.parent]
        advantages.append(advantage)
    return advantages


def group_normalised(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """GRPO's credit (arXiv 2402.03300, Section 4.1.2): A = (R - mean) / (std + 1e-6) over the tree's trajectories.

    R is a trajectory's return, std the sample standard deviation, and every action of the trajectory gets A. A group
    of equal returns has A = 0. An action that several trajectories share gets the mean of theirs, so on a forked tree
    this is the outcome reward on the tree, an ablation of CARL.
    """
    return [_group_normalised(tree) for tree in trees]


def _group_normalised(tree: RolloutTree) -> FloatArray:
    so_far = np.zeros(len(tree.nodes))
    for node in tree.nodes:
        if node.parent is not None:
            so_far[node.id] = so_far[node.parent] + node.reward
    leaves = np.array([node.id for node in tree.leaves()])
    returns = so_far[leaves]

    below = np.zeros(len(tree.nodes))  # sum of A over the leaves below a node
    count = np.zeros(len(tree.nodes))
    count[leaves] = 1
    if np.ptp(returns) > 0:  # rounding would not leave the mean of equal returns exactly equal to them
        below[leaves] = (returns - returns.mean()) / (returns.std(ddof=1) + STD_EPSILON)
    for node in reversed(tree.nodes):
        if node.parent is not None:
            below[node.parent] += below[node.id]
            count[node.parent] += count[node.id]
    advantage = below / count
    advantage[[root.id for root in tree.roots()]] = 0.0
    return advantage
