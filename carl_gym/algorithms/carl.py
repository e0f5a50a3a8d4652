"""CARL and CARL-Lite: fork where the policy is uncertain, train where it forked. And their ablations."""

from __future__ import annotations

from typing import Literal, get_args

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import (
    Credit,
    group_normalised,
    inherited,
    leaf_weighted_difference,
    leave_one_out_difference,
    tree_difference,
)
from carl_gym.algorithms.selection import Reduction, below_a_fork, forked_states
from carl_gym.algorithms.settings import require_word
from carl_gym.errors import ConfigError
from carl_gym.rollouts.explorers import EntropyForking, EntropyMeasure, RandomForking, RootRecord

ForkBy = Literal["entropy", "token-sum", "exact-entropy", "random"]
Advantage = Literal["tree", "leave-one-out", "leaf-weighted", "outcome"]
Update = Literal["forked", "all"]

CREDITS: dict[Advantage, Credit] = {
    "tree": tree_difference,
    "leave-one-out": leave_one_out_difference,
    "leaf-weighted": leaf_weighted_difference,
    "outcome": group_normalised,
}


@register_algorithm("carl-lite-update-all", initial=1, update="all")
@register_algorithm("carl-lite-token-sum", initial=1, fork_by="token-sum")
@register_algorithm("carl-lite-random-fork", initial=1, fork_by="random")
@register_algorithm("carl-lite-outcome", initial=1, advantage="outcome")
@register_algorithm("carl-lite-leaf-weighted", initial=1, advantage="leaf-weighted")
@register_algorithm("carl-update-all", update="all")
@register_algorithm("carl-token-sum", fork_by="token-sum")
@register_algorithm("carl-random-fork", fork_by="random")
@register_algorithm("carl-outcome", advantage="outcome")
@register_algorithm("carl-leaf-weighted", advantage="leaf-weighted")
@register_algorithm("carl-lite", initial=1)
@register_algorithm("carl")
def carl(
    initial: int = 8,
    forks: int = 16,
    forks_per_round: int = 1,
    root: RootRecord = "separate",
    fork_by: ForkBy = "entropy",
    advantage: Advantage = "tree",
    update: Update = "forked",
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

    The paper's ablations (Section 5) and the project's are settings, and names that begin with carl- or carl-lite-:

        random-fork     fork_by="random"           a uniformly drawn recorded state is forked
        token-sum       fork_by="token-sum"        H is the entropy of whole actions, not of their mean token
        outcome         advantage="outcome"        every edge gets the mean over the leaves below it of (R - mean) / std
        leaf-weighted   advantage="leaf-weighted"  V(u) = mean over the leaves below u
        update-all      update="all"               an action without siblings gets the advantage of the nearest edge
                                                   before it that has any; dropped are those before the first fork

    and without a name: fork_by="exact-entropy", where H is of the token distributions instead of the sampled
    log-probs, and advantage="leave-one-out", where V(u) leaves out the child itself.

    Raises:
        ConfigError: a setting out of its range.
    """
    for name, value, known in (
        ("fork_by", fork_by, get_args(ForkBy)),
        ("advantage", advantage, get_args(Advantage)),
        ("update", update, get_args(Update)),
    ):
        require_word(name, value, known)
    if forks == 0 and (root == "separate" or initial == 1):
        raise ConfigError(
            "carl with forks=0 has no siblings to compare, and so nothing to train on; give at least 1, or root=merged "
            "with an initial of 2 or more"
        )
    sizes = initial, forks, forks_per_round, root
    measures: dict[ForkBy, EntropyMeasure] = {"entropy": "mean", "token-sum": "sum", "exact-entropy": "exact"}
    credit = CREDITS[advantage]
    return Algorithm(
        name="carl",
        explorer=RandomForking(*sizes) if fork_by == "random" else EntropyForking(*sizes, measures[fork_by]),
        credit=inherited(credit) if update == "all" else credit,
        selection=below_a_fork if update == "all" else forked_states,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("entropies",) if fork_by == "exact-entropy" else (),
    )
