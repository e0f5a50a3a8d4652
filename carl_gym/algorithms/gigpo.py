"""GiGPO: groups of trajectories, and inside them groups of actions taken in the same state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.anchors import same_situation
from carl_gym.algorithms.credit import FloatArray, per_trajectory, relative, returns_to_go
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group, require_shares, require_weights, require_word
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree

Norm = Literal["std", "none"]


@register_algorithm("gigpo")
def gigpo(
    rollouts: int = 16,
    step_weight: float = 1.0,
    gamma: float = 0.95,
    norm: Norm = "std",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Group-in-group policy optimisation (Feng et al., arXiv 2505.10978).

    Rollout: N = `rollouts` trajectories from the root.

    Credit (Eq. 3-8), with F = std of the group ("std") or 1 ("none"):

        A_E(i)    = (R_i - mean(R)) / F                 over the question's trajectories, R the sum of rewards
        R_t       = r_t + gamma R_{t+1}                 discounted return from action t on
        A_S(i, t) = (R_t - mean) / F                    over the actions that were taken in the same ("anchor") state
        A(i, t)   = A_E(i) + step_weight A_S(i, t)

    A state is what the agent observes now (`anchors`), so an action whose state came up once has A_S = 0. The actions
    at the root always form a group.

    Update, over the tokens of all actions of all trajectories of the batch:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    gamma and step_weight are the paper's; norm = "std" is what the authors' search runs use
    (langfengQ/verl-agent, examples/gigpo_trainer/run_search.sh).

    Differs from that code (gigpo/core_gigpo.py): mean and std of A_E are over trajectories, as in the paper, where the
    code counts a trajectory once per step; states are equal or not, where the search runs also group observations of
    90 % similar text; the agent sees all that came before, not the last few turns; no KL term, no penalty on invalid
    actions but the environment's.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    require_shares(gamma=gamma)
    require_weights(step_weight=step_weight)
    require_word("norm", norm, get_args(Norm))
    return Algorithm(
        name="gigpo",
        explorer=RootExplorer(rollouts),
        credit=partial(anchored, gamma=gamma, step_weight=step_weight, scaled=norm == "std"),
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("repeated states",),
    )


def anchored(trees: Sequence[RolloutTree], *, gamma: float, step_weight: float, scaled: bool) -> list[FloatArray]:
    """GiGPO's credit (arXiv 2505.10978, Eq. 8): trajectory's advantage plus that among the same state's actions."""
    advantages = per_trajectory(trees, partial(relative, scaled=scaled))
    for tree, advantage in zip(trees, advantages, strict=True):
        to_go = returns_to_go(tree, gamma)
        for group in same_situation(tree):
            advantage[group] += step_weight * relative(to_go[group], scaled=scaled)
    return advantages
