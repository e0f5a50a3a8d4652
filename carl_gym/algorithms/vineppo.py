"""VinePPO: the value of every state by rollouts of its own, which are used for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, difference, exact_mean, values
from carl_gym.algorithms.selection import BoolArray, Reduction
from carl_gym.algorithms.settings import require_counts
from carl_gym.errors import StateError
from carl_gym.rollouts.tree import RolloutTree


@register_algorithm("vineppo")
def vineppo(
    main: int = 4,
    auxiliary: int = 3,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """VinePPO (Kazemnejad et al., arXiv 2410.01679), with a turn as the step.

    Rollout: G = `main` trajectories from the root; when they are done, K = `auxiliary` more from every non-terminal
    state on them, the root included, which they share. With G trajectories of T actions that is
    G T + K (T + G T (T - 1) / 2) actions: 155 at G = 4, K = 3, T = 5, against 80 for GRPO with 16 rollouts.

    Credit: V(s) is the mean return from s of its K auxiliary rollouts alone; V(terminal) = 0; of a main trajectory

        A(u -> v) = r(u -> v) + V(v) - V(u)

    V does not depend on the action that it judges, so A is unbiased, and what V adds to its variance shrinks with 1/K.

    Update: the actions of the main trajectories; the auxiliary ones are dropped. Over their tokens:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    The paper's main setting is K = 9. Here K = 3, the next smaller one of its released configurations
    (McGill-NLP/VinePPO, `configs/episode_generators/*rolls.jsonnet`: 1, 3, 9, 16): a third of the cost, and still a
    mean of several.

    Segment policy optimisation (Guo et al., SPO, arXiv 2505.23564) is the same estimate (SPO-chain) for segments that
    are cut where the policy is unsure of a token, of which only those tokens train. Here turns are the segments, and
    all their tokens train.

    Differs from the paper's code: advantages are not whitened over the batch (their mean is 0 in expectation, and
    their scale is seen by the clip of the gradient's norm and Adam's epsilon only); one epoch, not two; no KL term.

    Raises:
        ConfigError: a setting out of its range.
    """
    return Algorithm(
        name="vineppo",
        explorer=AuxiliaryRollouts(main, auxiliary),
        credit=partial(monte_carlo_difference, main=main),
        selection=partial(main_actions, main=main),
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )


@dataclass(frozen=True, slots=True)
class AuxiliaryRollouts:
    """Main trajectories from the root, then auxiliary ones from every state on them.

    Main trajectories have the numbers below `main`; that tells them from auxiliary ones in the finished tree.

    Attributes:
        main: G, at least 1.
        auxiliary: K, at least 1, for each state.

    Raises:
        ConfigError: a value out of its range.
    """

    main: int = 4
    auxiliary: int = 3

    def __post_init__(self) -> None:
        require_counts(main=self.main, auxiliary=self.auxiliary)

    def roots(self) -> tuple[int, ...]:
        """One root record with every main trajectory."""
        return (self.main,)

    def next(self, tree: RolloutTree) -> list[int]:
        """All auxiliary rollouts at once, in the order of their states' (trajectory, depth)."""
        if tree.trajectories > self.main:
            return []
        states = sorted(tree.recorded(), key=lambda node: (node.trajectory, node.depth))
        return [state.id for state in states for _ in range(self.auxiliary)]


def main_actions(trees: Sequence[RolloutTree], *, main: int) -> list[BoolArray]:
    """The actions of the first `main` trajectories of every tree."""
    return [
        np.array([node.parent is not None and node.trajectory < main for node in tree.nodes], dtype=np.bool_)
        for tree in trees
    ]


def monte_carlo_difference(trees: Sequence[RolloutTree], *, main: int) -> list[FloatArray]:
    """VinePPO's credit (arXiv 2410.01679, Section 4): A(u -> v) = r + V(v) - V(u), V from auxiliary rollouts alone.

    0 for auxiliary actions.

    Raises:
        StateError: a state of a main trajectory has no auxiliary rollouts.
    """
    selected = main_actions(trees, main=main)
    return [
        np.where(mask, difference(tree, monte_carlo_values(tree, main=main)), 0.0)
        for tree, mask in zip(trees, selected, strict=True)
    ]


def monte_carlo_values(tree: RolloutTree, *, main: int) -> FloatArray:
    """V of the states of the first `main` trajectories, by node id: the mean return of the other rollouts from there.

    0 at all other nodes.

    Raises:
        StateError: there are none from one of the states.
    """
    to_go = values(tree)  # an auxiliary rollout never forks, so this is its return
    value = np.zeros(len(tree.nodes))
    for state in tree.recorded():
        if state.trajectory >= main:
            continue
        returns = [
            tree.nodes[child].reward + to_go[child] for child in state.children if tree.nodes[child].trajectory >= main
        ]
        if not returns:
            raise StateError(
                f"state {state.id} of question {tree.question.id!r} has no auxiliary rollouts to value it by; collect "
                f"with AuxiliaryRollouts(main={main})"
            )
        value[state.id] = exact_mean(returns)
    return value
