"""SALT: trajectories of a question as one graph; a transition that several of them share gets the mean of theirs."""

from __future__ import annotations

from collections.abc import Sequence

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.anchors import same_transition
from carl_gym.algorithms.credit import FloatArray, group_normalised
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree


@register_algorithm("salt")
def salt(
    rollouts: int = 16,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Step-level advantages by a trajectory graph, on GRPO (Li et al., arXiv 2510.20022, Findings of EACL 2026).

    Rollout: G = `rollouts` trajectories from the root.

    Credit: GRPO's  A_i = (R_i - mean(R)) / (std(R) + 1e-6)  over the question's trajectories, then

        A(i, t) = mean of A_j over the transitions (s, a, s') of the question's trajectories j that equal the one of
                  trajectory i at t

    A step that good and bad trajectories have in common is neutral; one that a single trajectory took keeps that
    trajectory's advantage. States are what the agent observes (`anchors`), actions what the environment understood.

    Update, over the tokens of all actions of all trajectories of the batch:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    No code was released. The rule is as the paper's abstract and the account of SALT by Yao et al. ("Back to the
    Definition", GRAFT, Appendix A.3) have it. Whether SALT asks for more before it merges two steps, such as a common
    history, could not be established and is left out. The loss is that of `grpo` here.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    return Algorithm(
        name="salt",
        explorer=RootExplorer(rollouts),
        credit=merged_transitions,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("repeated states",),
    )


def merged_transitions(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """SALT's credit (arXiv 2510.20022): GRPO's advantages, averaged over equal transitions (s, a, s')."""
    advantages = group_normalised(trees)
    for tree, advantage in zip(trees, advantages, strict=True):
        for group in same_transition(tree):
            advantage[group] = advantage[group].mean()
    return advantages
