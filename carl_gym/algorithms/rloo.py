"""RLOO: REINFORCE whose baseline is the mean of the other rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, per_trajectory
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree


@register_algorithm("rloo")
def rloo(
    rollouts: int = 16,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "constant",
) -> Algorithm:
    """REINFORCE leave-one-out (Ahmadian et al., "Back to Basics", arXiv 2402.14740; Kool et al., 2019).

    Rollout: k = `rollouts` trajectories from the root.

    Credit: every action of trajectory i gets  A_i = R_i - 1/(k - 1) sum over j != i of R_j.  The baseline does not
    depend on the trajectory itself, so the policy gradient is unbiased.

    Update: the paper's action is the whole trajectory, whose log-prob is the sum over its tokens. So is this, over the
    N trajectories of the batch:

        J = 1/(256 N) sum_i sum over the tokens j of i of min(rho_j A_i, clip(rho_j, 1 - clip_low, 1 + clip_high) A_i)

    At the weights that sampled, its gradient is REINFORCE's, 1/(256 N) sum_i A_i grad log pi(trajectory i). Since
    A_i = k/(k - 1) (R_i - mean(R)), it differs from Dr. GRPO's by that factor alone.

    Differs from the paper: it has no clip (which acts only once the weights have moved), and has a KL penalty in the
    reward. The constant only changes what the clip of the gradient's norm and Adam's epsilon see.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    return Algorithm(
        name="rloo",
        explorer=RootExplorer(rollouts),
        credit=leave_one_out,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )


def leave_one_out(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """RLOO's credit (arXiv 2402.14740): A_i = R_i - mean of R_j over the tree's other trajectories j.

    A group of equal returns has A = 0, and so has a group of one. An action that several trajectories share gets the
    mean of theirs.
    """
    return per_trajectory(trees, _without_itself)


def _without_itself(returns: FloatArray) -> FloatArray:
    if np.ptp(returns) == 0:  # rounding would not leave the mean of equal returns exactly equal to them
        return np.zeros(len(returns))
    return returns - (returns.sum() - returns) / (len(returns) - 1)
