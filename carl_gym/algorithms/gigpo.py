"""GiGPO: groups of trajectories, and inside them groups of actions taken in the same state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.anchors import relative, returns_to_go, same_situation
from carl_gym.algorithms.credit import FloatArray, mean_over_leaves, trajectory_returns
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.errors import ConfigError
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
    if rollouts == 1:
        raise ConfigError("rollouts must be at least 2: a group of one has no advantage to learn from")
    for name, value, high in (("gamma", gamma, 1.0), ("step_weight", step_weight, math.inf)):
        if not isinstance(value, (int, float)) or not 0 <= value <= high or math.isinf(value):
            raise ConfigError(f"{name} must be a finite number from 0 to {high:g}, not {value!r}")
    if norm not in get_args(Norm):
        raise ConfigError(f"norm must be one of {', '.join(get_args(Norm))}, not {norm!r}")
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
    return [_anchored(tree, gamma, step_weight, scaled) for tree in trees]


def _anchored(tree: RolloutTree, gamma: float, step_weight: float, scaled: bool) -> FloatArray:
    leaves, returns = trajectory_returns(tree)
    advantage = mean_over_leaves(tree, leaves, relative(returns, scaled=scaled))
    to_go = returns_to_go(tree, gamma)
    for group in same_situation(tree):
        advantage[group] += step_weight * relative(to_go[group], scaled=scaled)
    return advantage
