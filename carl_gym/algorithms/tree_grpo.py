"""Tree-GRPO: a few trees per question, expanded at random turns; outcomes scored within the tree and across trees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, IntArray, relative, sum_over_leaves, trajectory_returns
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_counts
from carl_gym.rollouts.tree import Node, RolloutTree


@register_algorithm("tree-grpo")
def tree_grpo(
    trees: int = 4,
    expansions: int = 3,
    rounds: int = 1,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Tree-GRPO (Ji et al., "Tree Search for LLM Agent Reinforcement Learning", arXiv 2509.21240).

    Rollout: M = `trees` trajectories, each the first of a tree of its own; then, L = `rounds` times, in every tree
    N = `expansions` uniformly drawn non-terminal states (the root among them, with replacement) are rolled out to the
    end. M (1 + N L) leaves per question: 16.

    Credit: trajectory i, with return R_i, in tree T of question q gets

        A_i = (R_i - mean of R in T) / (std of R in T + 1e-6)  +  (R_i - mean of R in q) / (std of R in q + 1e-6)

    and an action gets the sum of A_i over the trajectories that it is part of: every trajectory is a row of the
    loss in the paper's code, so an action that k of them share is trained k times.

    Update, over the tokens of all actions:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    The paper's code (AMAP-ML/Tree-GRPO, `search_r1/llm_agent/tree_node.py`, `generation_ts.py`,
    `verl/trainer/ppo/ray_trainer_ts.py`, estimator `tree`) has M = 2, N = 2, L = 1, so 6 leaves; here there are as many
    as GRPO has rollouts. Differs from it: no KL term (0.001 there) and no dual clip; an action is encoded and trained
    once, with the sum, so the number of tokens counts it once, and where the clip acts it acts on the sum.

    Raises:
        ConfigError: a setting out of its range.
    """
    return Algorithm(
        name="tree-grpo",
        explorer=RandomExpansion(trees, expansions, rounds),
        credit=tree_relative,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )


@dataclass(frozen=True, slots=True)
class RandomExpansion:
    """Trees of one trajectory each, then rounds in which every tree is expanded at uniformly drawn states.

    The draws come from the tree's seed, the round and the number of the root, and the states of a round are those that
    were there before it: nothing depends on the order in which results arrive.

    Attributes:
        trees: M, at least 1: root records.
        expansions: N, at least 1: new trajectories in every tree and round.
        rounds: L, at least 1.

    Raises:
        ConfigError: a value out of its range.
    """

    trees: int = 4
    expansions: int = 3
    rounds: int = 1

    def __post_init__(self) -> None:
        require_counts(trees=self.trees, expansions=self.expansions, rounds=self.rounds)

    def roots(self) -> tuple[int, ...]:
        """One root record for every tree."""
        return (1,) * self.trees

    def next(self, tree: RolloutTree) -> list[int]:
        """All expansions of a round at once, tree by tree."""
        number = (tree.trajectories - self.trees) // (self.trees * self.expansions)
        if number >= self.rounds:
            return []
        chosen: list[int] = []
        for root, states in states_by_root(tree).items():
            draw = random.Random(tree.seed_for("expand", number, tree.nodes[root].trajectory))
            chosen += [state.id for state in draw.choices(states, k=self.expansions)]
        return chosen


def tree_relative(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """Tree-GRPO's credit (arXiv 2509.21240): intra-tree plus inter-tree relative advantage, summed over trajectories.

    A root record is a tree. Where returns are all equal, in a tree or over the question, that part is 0.
    """
    return [_tree_relative(tree) for tree in trees]


def _tree_relative(tree: RolloutTree) -> FloatArray:
    leaves, returns = trajectory_returns(tree)
    score = relative(returns)
    owner = root_of(tree)[leaves]
    for root in tree.roots():
        score[owner == root.id] += relative(returns[owner == root.id])
    return sum_over_leaves(tree, leaves, score)


def root_of(tree: RolloutTree) -> IntArray:
    """By node id, the id of the root that the node hangs from."""
    root = np.arange(len(tree.nodes))
    for node in tree.nodes:  # parents come first
        if node.parent is not None:
            root[node.id] = root[node.parent]
    return root


def states_by_root(tree: RolloutTree) -> dict[int, list[Node]]:
    """For every root, in the order of its trajectory, the non-terminal states below it and itself, in that of theirs.

    States of one trajectory come by depth. Node ids may depend on the order in which results arrived; this does not.
    """
    root = root_of(tree)
    states = {node.id: list[Node]() for node in sorted(tree.roots(), key=lambda node: node.trajectory)}
    for node in sorted(tree.recorded(), key=lambda node: (node.trajectory, node.depth)):
        states[int(root[node.id])].append(node)
    return states
