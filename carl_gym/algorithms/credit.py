"""Credit: from complete rollout trees to an advantage for every action. Pure functions of a batch of trees.

Each takes the trees and returns one array per tree, indexed by node id: the advantage of the edge *into* that
node, 0 at roots. The learner gives it to every token of the action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Literal

import numpy as np
import numpy.typing as npt

from carl_gym.errors import StateError
from carl_gym.rollouts.tree import RolloutTree

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Gain = Literal["probability", "logprob"]
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
        if node.children:
            value[node.id] = exact_mean([tree.nodes[child].reward + value[child] for child in node.children])
    return value


def exact_mean(numbers: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The (weighted) mean, of equal numbers exactly that number.

    A plain sum would round: nine returns of 1.0 would have a mean below 1, and with it advantages that are not 0.
    """
    first = numbers[0]
    return first + fmean([number - first for number in numbers], weights)


def leaf_weighted_values(tree: RolloutTree) -> FloatArray:
    """V of every node as the mean over the leaves below it of the return still to come, by node id.

    TreeRL and ARPO estimate values so. It is biased where forks are placed by what was sampled (CARL's ablation).
    """
    value, leaves = np.zeros(len(tree.nodes)), np.ones(len(tree.nodes))
    for node in reversed(tree.nodes):
        if node.children:
            to_come = [tree.nodes[child].reward + value[child] for child in node.children]
            value[node.id] = exact_mean(to_come, weights=leaves[node.children].tolist())
            leaves[node.id] = leaves[node.children].sum()
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
    return per_trajectory(trees, relative)


def per_trajectory(trees: Sequence[RolloutTree], score: Callable[[FloatArray], FloatArray]) -> list[FloatArray]:
    """Every action gets the mean of the scores of the trajectories that share it; `score` takes a tree's returns."""
    found = (trajectory_returns(tree) for tree in trees)
    return [
        mean_over_leaves(tree, leaves, score(returns)) for tree, (leaves, returns) in zip(trees, found, strict=True)
    ]


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


def sum_over_leaves(tree: RolloutTree, leaves: IntArray, scores: FloatArray) -> FloatArray:
    """What every edge gets when each trajectory is trained as a row of its own: the sum of the scores of those that
    share it; 0 at roots.

    Args:
        tree: complete.
        leaves: ids of all leaves.
        scores: one for each, such as an advantage of its trajectory.

    Returns:
        float array by node id.
    """
    total = np.zeros(len(tree.nodes))
    total[leaves] = scores
    for node in reversed(tree.nodes):
        if node.parent is not None:
            total[node.parent] += total[node.id]
    total[[root.id for root in tree.roots()]] = 0.0
    return total


def relative(scores: FloatArray, *, scaled: bool = True, ddof: int = 1) -> FloatArray:
    """Scores relative to their group: (x - mean) / (std + 1e-6), or x - mean where they are not `scaled`.

    0 in a group of one, and in a group of equal scores (rounding would not leave their mean exactly equal to them).

    Args:
        scores: (n,).
        scaled: whether to divide by the standard deviation.
        ddof: 1 for the sample standard deviation, 0 for that of the group itself.
    """
    if len(scores) < 2 or np.ptp(scores) == 0:
        return np.zeros(len(scores))
    centred = scores - scores.mean()
    return centred / (scores.std(ddof=ddof) + STD_EPSILON) if scaled else centred


def turn_normalised(tree: RolloutTree, scores: FloatArray) -> FloatArray:
    """Scores of edges, normalised over those of the same turn: of the tree's edges that are equally deep.

    Args:
        tree: complete.
        scores: by node id; nan for edges that have none.

    Returns:
        float array by node id; 0 for edges without a score, and at roots.
    """
    depth = np.array([node.depth for node in tree.nodes])
    scored = (depth > 0) & ~np.isnan(scores)
    normalised = np.zeros(len(tree.nodes))
    for turn in np.unique(depth[scored]):
        group = scored & (depth == turn)
        normalised[group] = relative(scores[group], ddof=0)
    return normalised


def returns_to_go(tree: RolloutTree, gamma: float) -> FloatArray:
    """The discounted return from every action on, R_t = r_t + gamma R_{t+1}, by node id; 0 at roots.

    Where an action was continued several times, R_{t+1} is the mean.
    """
    to_go = np.zeros(len(tree.nodes))
    for node in reversed(tree.nodes):  # children come after their parents
        if node.parent is None:
            to_go[node.id] = 0.0
        else:
            to_go[node.id] += node.reward
            to_go[node.parent] += gamma * to_go[node.id] / tree.n(node.parent)
    return to_go


def answer_belief(tree: RolloutTree, gain: Gain) -> FloatArray:
    """How likely the gold answer is in every state, by node id, as `gain` measures it; nan at ends.

    Raises:
        StateError: `tree.scores["answer_logprob"]` is missing, or not finite where an action was taken.
    """
    scores = tree.scores.get("answer_logprob")
    if scores is None or not np.isfinite(scores[[node.id for node in tree.recorded()]]).all():
        raise StateError(
            f"the tree of question {tree.question.id!r} does not say how likely its gold answer is in every state; "
            "fill tree.scores['answer_logprob'] with training.answer_scores.answer_logprobs before credit"
        )
    return np.exp(scores) if gain == "probability" else scores
