"""Dr. GRPO: GRPO without the two divisions that bias it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, per_trajectory, relative
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree


@register_algorithm("dr-grpo")
def dr_grpo(
    rollouts: int = 16,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "constant",
) -> Algorithm:
    """GRPO done right (Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv 2503.20783).

    Rollout: G = `rollouts` trajectories from the root.

    Credit: every action of trajectory i gets  A_i = R_i - mean(R),  over the question's group. No division by the
    standard deviation, which would weigh up questions that are nearly always or nearly never solved.

    Update, over the N trajectories of the batch, with a constant where GRPO divides by the length of each:

        J = 1/(256 N) sum_i sum over the tokens j of i of min(rho_j A_i, clip(rho_j, 1 - clip_low, 1 + clip_high) A_i)

    Differs from the paper's code (sail-sg/oat, `critic_type="drgrpo"`): its constant is the longest response that can
    be generated. The constant only changes what the clip of the gradient's norm and Adam's epsilon see.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    return Algorithm(
        name="dr-grpo",
        explorer=RootExplorer(rollouts),
        credit=group_centred,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )


def group_centred(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """Dr. GRPO's credit (arXiv 2503.20783): A = R - mean(R) over the tree's trajectories.

    A group of equal returns has A = 0. An action that several trajectories share gets the mean of theirs.
    """
    return per_trajectory(trees, partial(relative, scaled=False))
