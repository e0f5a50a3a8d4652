"""TreeRL: fork where the policy was least sure of a token; value differences to the root and to the parent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, sum_over_leaves, trajectory_returns
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_counts
from carl_gym.algorithms.tree_grpo import states_by_root
from carl_gym.errors import PolicyError
from carl_gym.rollouts.tree import Node, RolloutTree


@register_algorithm("treerl")
def treerl(
    trees: int = 3,
    forks: int = 2,
    rounds: int = 1,
    branches: int = 2,
    clip_low: float = 0.2,
    clip_high: float = 0.26,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """TreeRL (Hou et al., "LLM Reinforcement Learning with On-Policy Tree Search", arXiv 2506.11902), fork at turns.

    Rollout (EPTree): M = `trees` trajectories from the root; then, L = `rounds` times, in the tree that grows from
    each, the N = `forks` actions with the least likely token are forked: T = `branches` new trajectories from the state
    that the action was taken in. M (1 + N L T) leaves per question: 15.

    Credit (Eq. 2-4, with the weight of its code): V(s) is the mean return of the trajectories through s, n(s) their
    number; of an action p -> s

        R(s) = (V(s) - V(root) + V(s) - V(p)) / sqrt(n(s)),        A(p -> s) = n(s) R(s)

    The first difference is the paper's global advantage, the second its local one, and the root is the question: one
    for all M trees. n(s) stands before R because each trajectory is a row of the code's loss, so that an action that n
    of them share is trained n times; the root keeps that from outweighing the others.

    Update, over the tokens of all actions:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    (M, N, L, T) is (6, 2, 1, 2) in the released script, 30 leaves of which 16 are trained; here M is halved, and all
    are trained. The code's upper clip is 1.3 * 0.2. Means over leaves are biased where the sampled tokens decide what
    is forked.

    Differs from the paper and its code (THUDM/TreeRL, `openrlhf/trainer/ppo_utils/entropy_chain_local_manager.py`,
    `tree_node.py`, `parallel_mcts.py`):
        the paper forks *at* the least likely token, in the middle of a text; here the whole turn is sampled again;
        tokens after an answer cannot be forked there; here any turn can;
        in the code both values that are subtracted are divided by the root of their own number of leaves, the returns
        are centred on the mean of the others (a factor n/(n - 1)), an action whose local advantage is 0 takes that of
        the action before it, and 16 trajectories are drawn, one of them right if any is; here it is R(s);
        the code averages within trajectories first; with forked trajectories that have tokens in common, the mean over
        tokens is the nearest.

    Raises:
        ConfigError: a setting out of its range.
    """
    return Algorithm(
        name="treerl",
        explorer=UnlikelyTokenForking(trees, forks, rounds, branches),
        credit=global_and_local,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )


@dataclass(frozen=True, slots=True)
class UnlikelyTokenForking:
    """EPTree at turns: in each tree, fork the actions that contain the least likely tokens.

    The first action of a fork is not forked itself: it was sampled from a state that had just been forked. Ties go
    to the lowest (trajectory, depth). Where a tree has fewer such actions than `forks`, they are taken again.

    Attributes:
        trees: M, at least 1: initial trajectories, each with a root record of its own.
        forks: N, at least 1: actions forked in every tree and round.
        rounds: L, at least 1.
        branches: T, at least 1: new trajectories for every fork.

    Raises:
        ConfigError: a value out of its range.
    """

    trees: int = 3
    forks: int = 2
    rounds: int = 1
    branches: int = 2

    def __post_init__(self) -> None:
        require_counts(trees=self.trees, forks=self.forks, rounds=self.rounds, branches=self.branches)

    def roots(self) -> tuple[int, ...]:
        """One root record for every tree."""
        return (1,) * self.trees

    def next(self, tree: RolloutTree) -> list[int]:
        """All forks of a round at once, tree by tree. Raises PolicyError where log-probs are not known."""
        if (tree.trajectories - self.trees) // (self.trees * self.forks * self.branches) >= self.rounds:
            return []
        if any(math.isnan(tree.h(node.id)) for node in tree.nodes):
            raise PolicyError("forking by log-probs needs them, and this policy gives none; use another explorer")
        chosen: list[int] = []
        for states in states_by_root(tree).values():
            unlikely = sorted(_surprises(tree, states), key=lambda found: -found[0])  # a stable sort
            for _, state in islice(cycle(unlikely), self.forks):
                chosen += [state] * self.branches
        return chosen


def _surprises(tree: RolloutTree, states: Sequence[Node]) -> Iterable[tuple[float, int]]:
    """-log p of the least likely token of the action with which the trajectory of each state went on, and the state."""
    for state in states:
        for child in state.children:
            action = tree.nodes[child].action
            if action and tree.nodes[child].trajectory == state.trajectory:
                yield -min(action.logprobs), state.id


def global_and_local(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """TreeRL's credit (arXiv 2506.11902, Eq. 2-4), summed over the trajectories that share an action.

        A(p -> s) = sqrt(n(s)) (2 V(s) - V(root) - V(p)),        V(s) = mean return over the n(s) leaves below s

    All roots are one state, so V(p) = V(root) for first actions.
    """
    return [_global_and_local(tree) for tree in trees]


def _global_and_local(tree: RolloutTree) -> FloatArray:
    leaves, returns = trajectory_returns(tree)
    if np.ptp(returns) == 0:  # rounding would not leave the mean of equal returns exactly equal to them
        return np.zeros(len(tree.nodes))
    count = sum_over_leaves(tree, leaves, np.ones(len(leaves)))  # 0 at roots
    value = sum_over_leaves(tree, leaves, returns - returns.mean()) / np.maximum(count, 1)  # V(s) - V(root)
    advantage = np.zeros(len(tree.nodes))
    for node in tree.nodes:
        if node.parent is not None:
            advantage[node.id] = math.sqrt(count[node.id]) * (2 * value[node.id] - value[node.parent])
    return advantage
