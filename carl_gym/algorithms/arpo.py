"""ARPO: trajectories branch after a tool result that made the policy less certain than it was at the start."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, relative, sum_over_leaves, trajectory_returns
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_counts, require_shares, require_weights
from carl_gym.errors import ConfigError, PolicyError
from carl_gym.rollouts.tree import Node, RolloutTree


@register_algorithm("arpo")
def arpo(
    initial: int = 8,
    rollouts: int = 16,
    branch_probability: float = 0.5,
    entropy_weight: float = 0.34,
    window: int = 20,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Agentic reinforced policy optimisation (Dong et al., arXiv 2507.19849).

    Rollout: N = `initial` trajectories from the root. Whenever one of the question's trajectories has read a tool
    result and gone on from there, that state s is branched, once, with probability

        P(s) = alpha + beta (H(s) - H(root)),        alpha = `branch_probability`, beta = `entropy_weight`,

    H being the mean entropy, in nats, of the first k = `window` tokens of the trajectory's action there, and at the
    root of its first action. Branches may branch in turn. The whole group is M = `rollouts`: what is left when no
    trajectory can branch any more starts at the root, one by one.

    Credit: an action gets the sum over its trajectories i of  (R_i - mean(R)) / (std(R) + 1e-6)  over the question's
    M. That is both of the paper's estimates: "soft" trains every trajectory as a row of its own, "hard" gives what d
    trajectories share their mean advantage, in d rows.

    Update, over the tokens of all actions:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    N, M, alpha, k and one branch a time are those of the released code (RUC-NLPIR/ARPO,
    `vllm_rollout_with_tools.py`, `ARPO_7B_Reasoning_1node.sh`). Its beta of 0.2 multiplies the sum over 20 tokens,
    over the log of 151,936 tokens in the vocabulary: 0.2 * 20 / 11.93 = 0.34 per nat of the mean, which does not
    depend on the vocabulary.

    Differs from the code: there H is a sum over the 10 most likely tokens, here over all of them; there the entropy
    of an action decides about the state *after* it, here, as in the paper, about the one that it was taken in; a
    branch's own first action is its H(root) there. An action is encoded and trained once, so the number of tokens
    counts it once, and where the clip acts it acts on the sum. No dual clip. Trajectories run to their end before
    they branch, which changes neither where they branch nor how many do.

    Raises:
        ConfigError: a setting out of its range.
    """
    return Algorithm(
        name="arpo",
        explorer=EntropyRiseBranching(initial, rollouts, branch_probability, entropy_weight, window),
        credit=summed_group_normalised,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("entropies",),
    )


@dataclass(frozen=True, slots=True)
class EntropyRiseBranching:
    """ARPO's adaptive rollout: a state is branched by chance, likelier where entropy rose since the first action.

    Decisions are taken in the order of the paper's synchronous rollout: by depth, and within a depth by the number
    of the trajectory; so the budget goes to shallow states first. The chance of each comes from the tree's seed, the
    trajectory and the depth.

    Attributes:
        initial: N, at least 1.
        rollouts: M, at least 2 and at least `initial`. A complete tree has M leaves.
        branch_probability: alpha, from 0 to 1.
        entropy_weight: beta, at least 0, per nat.
        window: k, at least 1: how many tokens of an action count.

    Raises:
        ConfigError: a value out of its range.
    """

    needs_entropies: ClassVar[bool] = True

    initial: int = 8
    rollouts: int = 16
    branch_probability: float = 0.5
    entropy_weight: float = 0.34
    window: int = 20

    def __post_init__(self) -> None:
        require_counts(initial=self.initial, rollouts=self.rollouts, window=self.window)
        if self.rollouts < max(2, self.initial):
            raise ConfigError(
                f"rollouts must be at least 2 and at least initial ({self.initial}), not {self.rollouts}: it counts "
                "the initial ones"
            )
        require_shares(branch_probability=self.branch_probability)
        require_weights(entropy_weight=self.entropy_weight)

    def roots(self) -> tuple[int, ...]:
        """One root record with every trajectory that starts there."""
        return (self.initial,)

    def next(self, tree: RolloutTree) -> list[int]:
        """The branches of one depth at once, or one more trajectory from the root.

        Goes through all decisions from the start: those that were carried out have a trajectory by now.

        Raises:
            PolicyError: the policy gives no entropies.
        """
        (root,) = tree.roots()
        passed = _states_passed(tree)
        planned = self.initial
        wave = set(range(planned))  # the trajectories that decide now: those from the root, and their branches
        while planned < self.rollouts:
            for depth in sorted(passed):
                forks = [
                    state.id for state in passed[depth] if state.trajectory in wave and self._branches(tree, state)
                ][: self.rollouts - planned]
                if forks and planned == tree.trajectories:
                    return forks
                wave |= set(range(planned, planned + len(forks)))
                planned += len(forks)
            if planned == tree.trajectories and planned < self.rollouts:
                return [root.id]
            wave = {planned}
            planned += 1
        return []

    def _branches(self, tree: RolloutTree, state: Node) -> bool:
        first, taken = tree.path(state.id)[1], _continuation(tree, state)
        rise = self._entropy(tree, taken) - self._entropy(tree, first)
        chance = random.Random(tree.seed_for("branch", state.trajectory, state.depth)).random()
        return chance < self.branch_probability + self.entropy_weight * rise

    def _entropy(self, tree: RolloutTree, edge: Node) -> float:
        if edge.action is None or not edge.action.entropies:
            raise PolicyError(
                f"branching by entropy needs the exact entropies of every action, and one of question "
                f"{tree.question.id!r} has none; use backend transformers"
            )
        return fmean(edge.action.entropies[: self.window])


def _states_passed(tree: RolloutTree) -> dict[int, list[Node]]:
    """By depth, the states after a first action that a trajectory reached by itself and went on from, in its order."""
    passed: dict[int, list[Node]] = {}
    for node in sorted(tree.recorded(), key=lambda node: node.trajectory):
        if node.parent is not None:
            passed.setdefault(node.depth, []).append(node)
    return passed


def _continuation(tree: RolloutTree, state: Node) -> Node:
    """Where the trajectory that reached a state first went from there."""
    return next(tree.nodes[child] for child in state.children if tree.nodes[child].trajectory == state.trajectory)


def summed_group_normalised(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """ARPO's credit (arXiv 2507.19849): GRPO's advantage of a trajectory, summed over those that share an action."""
    advantages = []
    for tree in trees:
        leaves, returns = trajectory_returns(tree)
        advantages.append(sum_over_leaves(tree, leaves, relative(returns)))
    return advantages
