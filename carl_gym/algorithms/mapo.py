"""MAPO: what follows from a turn against the same turn of other rollouts, mixed with what it paid at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, relative, returns_to_go, turn_normalised
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group, require_shares
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree


@register_algorithm("mapo")
def mapo(
    rollouts: int = 16,
    turn_weight: float = 0.5,
    gamma: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """The mixed advantage of MAPO (Zhang et al., "Mixed Advantage Policy Optimization for Long-Horizon Multi-Turn
    Dialogue", arXiv 2603.06194; called MICA in its third version). Not MAPO of arXiv 2509.18849, which has no turns.

    Rollout: G = `rollouts` trajectories from the root.

    Credit: r_t is the reward of turn t, G_t = sum_{j >= t} gamma^(j-t) r_j the return from it on:

        A_t = w z(G_t over the t-th turns of the question's rollouts)  +  (1 - w) z(r_t over all their turns)

    with w = `turn_weight` and z(x) = (x - mean) / (std + 1e-6), the standard deviation that of the population; a group
    of one, or of equals, has z = 0.

    Update, over the tokens of all actions of all trajectories of the batch:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    w = 1/2 is the paper's. The equations are those of its third version, whose second term is over the question's
    rollouts (the first version speaks of batch-level normalisation). gamma = 1 and the population's standard deviation
    are choices made here: neither could be established from the paper or its code.

    Differs from the paper: there a judge model pays after every turn how much closer to its goal the dialogue came.
    Here rewards are the environment's, and the search environments pay once, at the end. Then the first term is
    GRPO's advantage, but among the rollouts that got as far, and the second is the same negative number for all turns
    but the last, and says of the last alone what it is worth. No KL term.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    require_shares(turn_weight=turn_weight, gamma=gamma)
    return Algorithm(
        name="mapo",
        explorer=RootExplorer(rollouts),
        credit=partial(mixed_advantage, turn_weight=turn_weight, gamma=gamma),
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )


def mixed_advantage(trees: Sequence[RolloutTree], *, turn_weight: float, gamma: float) -> list[FloatArray]:
    """MAPO's credit (arXiv 2603.06194): returns normalised by turn, mixed with rewards normalised over all turns.

    On a tree that forks, the return from an edge is the mean over what follows it.
    """
    advantages = []
    for tree in trees:
        edges = np.array([node.parent is not None for node in tree.nodes])
        rewards = np.array([node.reward for node in tree.nodes])
        immediate = np.zeros(len(tree.nodes))
        immediate[edges] = relative(rewards[edges], ddof=0)
        by_turn = turn_normalised(tree, returns_to_go(tree, gamma))
        advantages.append(turn_weight * by_turn + (1 - turn_weight) * immediate)
    return advantages
