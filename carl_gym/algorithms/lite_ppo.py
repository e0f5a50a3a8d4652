"""Lite PPO: GRPO with the standard deviation of the batch instead of the group's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import STD_EPSILON, FloatArray, per_trajectory, relative, trajectory_returns
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree


@register_algorithm("lite-ppo")
def lite_ppo(
    rollouts: int = 16,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Lite PPO (Liu et al., "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning", arXiv 2508.08221).

    Rollout: G = `rollouts` trajectories from the root.

    Credit: every action of trajectory i gets  A_i = (R_i - mean of R over the question's group) /
    (std of R over the whole batch + 1e-6).  A group whose returns hardly differ is not blown up as by GRPO.

    Update, over the tokens of all actions of all trajectories of the batch, with PPO's clip and no critic:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    As in the authors' framework (alibaba/ROLL, `reward_norm` with `norm_mean_type="group"`, `norm_std_type="batch"`)
    the deviation is the sample standard deviation of the returns around the batch's mean, not around their groups'.
    Differs: ROLL's example adds a KL term and a dual clip, neither of which the paper's combination has.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    return Algorithm(
        name="lite-ppo",
        explorer=RootExplorer(rollouts),
        credit=batch_scaled,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )


def batch_scaled(trees: Sequence[RolloutTree]) -> list[FloatArray]:
    """Lite PPO's credit (arXiv 2508.08221): A = (R - mean over the tree) / (std over all trees + 1e-6).

    A group of equal returns has A = 0. An action that several trajectories share gets the mean of theirs.
    """
    everything = np.concatenate([np.zeros(0), *(trajectory_returns(tree)[1] for tree in trees)])
    spread = float(everything.std(ddof=1)) if len(everything) > 1 else 0.0
    return per_trajectory(trees, lambda returns: relative(returns, scaled=False) / (spread + STD_EPSILON))
