"""CARL and CARL-Lite: fork where the policy is uncertain, train where it forked."""

from __future__ import annotations

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import tree_difference
from carl_gym.algorithms.selection import Reduction, forked_states
from carl_gym.rollouts.explorers import EntropyForking, RootRecord


@register_algorithm("carl-lite", initial=1)
@register_algorithm("carl")
def carl(
    initial: int = 8,
    forks: int = 16,
    forks_per_round: int = 1,
    root: RootRecord = "separate",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "action",
) -> Algorithm:
    """Criticality-aware RL (Shen et al., arXiv 2512.04949); "carl-lite" is N0 = 1.

    Rollout (Algorithm 1): N0 = `initial` trajectories from the root, then N = `forks` more, each from the recorded
    state of largest H / n at that time, where H is the mean length-normalised entropy of the n actions sampled there.

    Credit (Algorithm 2):  V(u) = mean over children v of r + V(v),    A(u -> v) = r + V(v) - V(u).

    Update (Eq. 13), over D_upd = actions whose source state has at least two children, all others dropped:

        J = 1/|D_upd| sum_{a in D_upd} 1/|a| sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    rho_j is the ratio of the token's probability to that at sampling. No KL term, no critic, no normalisation.

    Raises:
        ConfigError: a setting out of its range.
    """
    return Algorithm(
        name="carl",
        explorer=EntropyForking(initial, forks, forks_per_round, root),
        credit=tree_difference,
        selection=forked_states,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
    )
