"""EMPG: GRPO whose advantages are larger where the policy was sure, and larger before steps where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import ClassVar, Literal, get_args

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, group_normalised
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group, require_weights, require_word
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree

Measure = Literal["exact", "sampled"]

EPSILON = 1e-8


@register_algorithm("empg")
def empg(
    rollouts: int = 16,
    scaling: float = 1.0,
    clarity_scaling: float = 1.0,
    clarity_weight: float = 0.1,
    measure: Measure = "exact",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Entropy-modulated policy gradients, on GRPO (Wang et al., arXiv 2509.09265, ICLR 2026).

    Rollout: G = `rollouts` trajectories from the root.

    Credit (Eq. 7-12): A_i = (R_i - mean(R)) / (std(R) + 1e-6) over the question's trajectories; H_t is the mean entropy
    of the tokens of action t; over all actions of the batch, with k = `scaling`, k' = `clarity_scaling`,
    zeta = `clarity_weight`:

        H'_t   = (H_t - min H) / (max H - min H + 1e-8)
        g_t    = exp(-k H'_t) / (mean of exp(-k H') + 1e-8)         self-calibrating: 1 in the mean
        f_t    = exp(-k' H'_t)                                      clarity
        A_mod  = A_i g_t + zeta f_{t+1}                             no bonus for the last action of a trajectory
        A(i,t) = A_mod - mean of A_mod over all actions

    Update, over the tokens of all actions of all trajectories of the batch:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    measure = "exact" takes the entropy of the distributions that the tokens were drawn from, as the authors do;
    "sampled" takes the negative log-probs of the sampled tokens, whose expectation that is, for policies that give no
    entropies.

    The equations and defaults are those of the authors' listing (project page, `compute_empg_advantage`). Differs: a
    group of equal returns keeps A_i = 0, as in `grpo` here; no KL term.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    require_weights(scaling=scaling, clarity_scaling=clarity_scaling, clarity_weight=clarity_weight)
    require_word("measure", measure, get_args(Measure))
    exact = measure == "exact"
    return Algorithm(
        name="empg",
        explorer=EntropyRoots(rollouts) if exact else RootExplorer(rollouts),
        credit=partial(
            entropy_modulated,
            scaling=scaling,
            clarity_scaling=clarity_scaling,
            clarity_weight=clarity_weight,
        ),
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("entropies",) if exact else (),
    )


@dataclass(frozen=True, slots=True)
class EntropyRoots(RootExplorer):
    """Independent rollouts from one root, whose actions come with the entropies of their tokens."""

    needs_entropies: ClassVar[bool] = True


def entropy_modulated(
    trees: Sequence[RolloutTree], *, scaling: float, clarity_scaling: float, clarity_weight: float
) -> list[FloatArray]:
    """EMPG's credit (arXiv 2509.09265, Eq. 7-12), over all actions of all trees.

    Where an action was continued several times, the bonus is the mean over what follows.
    """
    acted = [np.array([node.parent is not None for node in tree.nodes], dtype=np.bool_) for tree in trees]
    entropies = [step_entropies(tree) for tree in trees]
    pooled = np.concatenate([np.zeros(0), *(h[mask] for h, mask in zip(entropies, acted, strict=True))])
    if not len(pooled):
        return [np.zeros(len(tree.nodes)) for tree in trees]
    low, spread = pooled.min(), np.ptp(pooled) + EPSILON
    mean_gain = np.exp(-scaling * (pooled - low) / spread).mean() + EPSILON
    modulated = []
    for tree, advantage, entropy, mask in zip(trees, group_normalised(trees), entropies, acted, strict=True):
        level = np.where(mask, entropy - low, 0.0) / spread
        clarity = np.exp(-clarity_scaling * level)
        changed = advantage * np.exp(-scaling * level) / mean_gain
        for node in tree.nodes:
            if node.parent is not None:
                changed[node.parent] += clarity_weight * clarity[node.id] / tree.n(node.parent)
        modulated.append(np.where(mask, changed, 0.0))
    centre = np.concatenate([a[mask] for a, mask in zip(modulated, acted, strict=True)]).mean()
    return [np.where(mask, advantage - centre, 0.0) for advantage, mask in zip(modulated, acted, strict=True)]


def step_entropies(tree: RolloutTree) -> FloatArray:
    """H of every action in nats per token, by node id: exact where the policy told it, else h(a|s); 0 at roots."""
    return np.array(
        [
            fmean(node.action.entropies) if node.action and node.action.entropies else tree.h(node.id)
            for node in tree.nodes
        ]
    )
