"""GRPO: independent rollouts per question, scored against each other."""

from __future__ import annotations

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import group_normalised
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group
from carl_gym.rollouts.explorers import RootExplorer


@register_algorithm("grpo")
def grpo(
    rollouts: int = 16,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Group relative policy optimisation (Shao et al., arXiv 2402.03300), without its KL term.

    Rollout: G = `rollouts` trajectories from the root.

    Credit: every action of trajectory i gets  A_i = (R_i - mean(R)) / (std(R) + 1e-6),  over the question's group.

    Update, over the tokens of all actions of all trajectories of the batch:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    The token mean is the usual form today (DAPO, arXiv 2503.14476); the paper first averages within trajectories. A
    group of equal returns has A = 0 and stays in the denominator.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    return Algorithm(
        name="grpo",
        explorer=RootExplorer(rollouts),
        credit=group_normalised,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )
