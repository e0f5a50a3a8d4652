"""HGPO: groups of actions taken in the same state, after more and more of the same history."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.anchors import same_situation
from carl_gym.algorithms.credit import FloatArray, group_normalised, relative, returns_to_go
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_counts, require_group, require_shares, require_weights
from carl_gym.errors import ConfigError
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree


@register_algorithm("hgpo")
def hgpo(
    rollouts: int = 16,
    history: int = 2,
    exponent: float = 1.0,
    gamma: float = 0.95,
    episode_group: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Hierarchy-of-groups policy optimisation (He et al., arXiv 2602.22817, ICLR 2026).

    Rollout: N = `rollouts` trajectories from the root.

    Credit: G_k(t) are the actions of the question that were taken after the same last k observations as action t,
    k = 1 (the same state, GiGPO's group) to `history` + 1. R_t = r_t + gamma R_{t+1} is the discounted return.

        A_k(t) = (R_t - mean) / (std + 1e-6)  over G_k(t)
        A(t)   = sum_k w_k A_k(t) / sum_k w_k,    w_k = (k + 1)^exponent

    over the k with A_k(t) != 0: a group of one, or of equal returns, says nothing and has no weight. Groups of longer
    history are smaller and compare more alike. With `episode_group` the whole trajectory's advantage A_0 = (R_i -
    mean) / (std + 1e-6) takes part with w_0 = 1; without it an action that nothing can be compared with has A = 0.

    Update, over the tokens of all actions of all trajectories of the batch:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    Groups, weights, std (the group's own, not the sample's) and defaults are those of the released code
    (langfengQ/verl-agent, recipe/hgpo: core_hgpo.py and its training scripts), which numbers groups by observations;
    summaries of the paper have w_k = (k + 1)^exponent with k = 0 for the state alone.

    Differs from that code: the agent sees all that came before, not the last `history` turns, so contexts differ even
    in the smallest group; no KL term, no penalty on invalid actions but the environment's.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    require_counts(0, history=history)
    require_shares(gamma=gamma)
    require_weights(exponent=exponent)
    if not isinstance(episode_group, bool):
        raise ConfigError(f"episode_group must be true or false, not {episode_group!r}")
    return Algorithm(
        name="hgpo",
        explorer=RootExplorer(rollouts),
        credit=partial(hierarchical, gamma=gamma, history=history, exponent=exponent, episode_group=episode_group),
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("repeated states",),
    )


def hierarchical(
    trees: Sequence[RolloutTree], *, gamma: float, history: int, exponent: float, episode_group: bool
) -> list[FloatArray]:
    """HGPO's credit (arXiv 2602.22817): the weighted mean of advantages in groups of ever longer common history."""
    advantages = []
    for tree, episode in zip(trees, group_normalised(trees), strict=True):
        to_go = returns_to_go(tree, gamma)
        levels = [(1.0, episode)] if episode_group else []
        for states in range(1, history + 2):
            level = np.zeros(len(tree.nodes))
            for group in same_situation(tree, states):
                level[group] = relative(to_go[group], ddof=0)
            levels.append(((states + 1) ** exponent, level))
        weights = sum((weight * (level != 0) for weight, level in levels), np.zeros(len(tree.nodes)))
        total = sum((weight * level for weight, level in levels), np.zeros(len(tree.nodes)))
        advantages.append(np.divide(total, weights, out=np.zeros(len(tree.nodes)), where=weights > 0))
    return advantages
