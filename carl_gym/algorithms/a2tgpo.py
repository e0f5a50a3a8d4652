"""A2TGPO: how much a turn helped to find the gold answer, against the same turn of the other rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import get_args

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, Gain, answer_belief, relative, trajectory_returns, turn_normalised
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group, require_shares, require_weights, require_word
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree


@register_algorithm("a2tgpo")
def a2tgpo(
    rollouts: int = 16,
    gain: Gain = "logprob",
    gain_weight: float = 0.3,
    gamma: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Agentic turn-group policy optimisation (Chen et al., arXiv 2605.06200), without its adaptive clip.

    Rollout: G = `rollouts` trajectories from the root.

    Credit: p(s) is how likely the policy finds the gold answer in state s. The information gain of turn t is
    IG_t = p(s_t) - p(s_(t-1)), p(s_0) that of the prompt, and every turn but the last has one: after that nothing
    can be read. z_t is IG_t normalised over the t-th turns of the question's rollouts, z_R the return over its
    rollouts. With m such turns,

        A_t = z_R + w / sqrt(m - t + 1) sum_{j=t..m} gamma^(j-t) z_j  for t = 1 .. m,        A_(m+1) = z_R

    with w = `gain_weight`. A sum of n independent z has variance n; the root keeps early turns
    from having larger advantages than late ones. z = (x - mean) / (std + 1e-6), the standard deviation that of the
    population; a group of one has z = 0.

    Update, over the tokens of all actions of all trajectories of the batch:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    The settings are those of the released code (CuSO4-Chen/A-TGPO, `verl/trainer/ppo/core_algos.py`,
    `compute_igpo_step_advantage`, mode `turn-group-v1d`). gain = "logprob" takes p to be the mean log-prob of the
    answer's tokens, as that code does; "probability" is its exponential, as the paper's text has it.

    Left out, for a clip is one for all actions here: the adaptive clip, whose range of a turn is scaled by
    1 + 0.3 (2 sigmoid(z_t) - 1), and the ratio per turn (the geometric mean of its tokens' ratios, which the code
    clips to [0.997, 1.004]). Both act only once the weights have moved within a training step.

    Differs from the code: there the first search has no gain of its own (the first p is that after its result, and
    its tokens share the next turn's advantage), a gain of exactly 0 is left out of its group, and 1e-8 is added to
    variances; the best of the gold aliases counts here, the first one there.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    require_word("gain", gain, get_args(Gain))
    require_weights(gain_weight=gain_weight)
    require_shares(gamma=gamma)
    return Algorithm(
        name="a2tgpo",
        explorer=RootExplorer(rollouts),
        credit=partial(turn_group_gains, gain=gain, gain_weight=gain_weight, gamma=gamma),
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("gold answers",),
    )


def turn_group_gains(trees: Sequence[RolloutTree], *, gain: Gain, gain_weight: float, gamma: float) -> list[FloatArray]:
    """A2TGPO's credit (arXiv 2605.06200): normalised outcome plus the rescaled sum of normalised gains to come.

    An action that several trajectories share gets the mean of theirs.

    Raises:
        StateError: `tree.scores["answer_logprob"]` is missing, or not finite where an action was taken.
    """
    advantages = []
    for tree in trees:
        gains = turn_normalised(tree, information_gain(tree, gain))
        leaves, returns = trajectory_returns(tree)
        total, count = np.zeros(len(tree.nodes)), np.zeros(len(tree.nodes))
        for leaf, outcome in zip(leaves, relative(returns, ddof=0), strict=True):
            path = [node.id for node in tree.path(int(leaf))[1:]]
            to_come = 0.0
            total[path] += outcome
            count[path] += 1
            for terms, turn in enumerate(reversed(path[:-1]), start=1):
                to_come = gains[turn] + gamma * to_come
                total[turn] += gain_weight * to_come / math.sqrt(terms)
        advantages.append(total / np.maximum(count, 1))
    return advantages


def information_gain(tree: RolloutTree, gain: Gain) -> FloatArray:
    """How much more likely the gold answer became by the edge into a node, by node id; nan where nothing can follow.

    Raises:
        StateError: `tree.scores["answer_logprob"]` is missing, or not finite where an action was taken.
    """
    likely = answer_belief(tree, gain)
    gains = np.full(len(tree.nodes), np.nan)
    for node in tree.nodes:
        if node.parent is not None and not node.terminal:
            gains[node.id] = likely[node.id] - likely[node.parent]
    return gains
