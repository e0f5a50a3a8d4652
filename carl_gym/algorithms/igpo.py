"""IGPO: a turn is rewarded for how much likelier it made the gold answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, Gain, answer_belief, relative, trajectory_returns
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group, require_shares, require_word
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree

Pool = Literal["joint", "separate"]


@register_algorithm("igpo")
def igpo(
    rollouts: int = 16,
    gamma: float = 1.0,
    gain: Gain = "probability",
    pool: Pool = "joint",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "trajectory",
) -> Algorithm:
    """Information gain-based policy optimisation (Wang et al., arXiv 2510.14967).

    Rollout: G = `rollouts` trajectories from the root.

    Credit: p(s) = exp(mean_j log pi(y_j | s, y_<j)) is how likely the policy that sampled finds the tokens y of the
    gold answer in state s, per token (`tree.scores["answer_logprob"]` before the exp). Turn t of trajectory i, T turns:

        r_{i,t} = p(s_{t+1}) - p(s_t)  for t < T    information gain
        r_{i,T} = R_i                               outcome
        A_{i,t} = (r_{i,t} - mean) / (std + 1e-6)   over all r of the question ("joint"), or gains and outcomes apart
        A       = A_{i,t} + gamma A_{i,t+1} + ...   discounted sum to the trajectory's end

    With gain = "logprob" the gain is the difference of mean log-probs.

    Update, over the G trajectories of each question, each the mean over its trained tokens:

        J = 1/G sum_i 1/|o_i| sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    Joint normalisation of probabilities is the paper's; the released code (GuoqingWang1/IGPO, `info_gain_type` and
    `info_gain_norm_mode`) has all four combinations.

    Differs from that code: the best of the gold aliases counts, not the first; what the answer is asked with is
    `training.answer_scores`' affair; gains of exactly 0 are part of mean and std; no KL term; the code averages over
    the tokens of the batch.

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    require_shares(gamma=gamma)
    require_word("gain", gain, get_args(Gain))
    require_word("pool", pool, get_args(Pool))
    return Algorithm(
        name="igpo",
        explorer=RootExplorer(rollouts),
        credit=partial(information_gain, gamma=gamma, gain=gain, pool=pool),
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("gold answers",),
    )


def information_gain(trees: Sequence[RolloutTree], *, gamma: float, gain: Gain, pool: Pool) -> list[FloatArray]:
    """IGPO's credit (arXiv 2510.14967): normalised gains and outcomes, summed to the end of the trajectory.

    Where an action was continued several times, what follows is the mean.

    Raises:
        StateError: `tree.scores["answer_logprob"]` is missing, or not finite where an action was taken.
    """
    return [_information_gain(tree, gamma, gain, pool) for tree in trees]


def _information_gain(tree: RolloutTree, gamma: float, gain: Gain, pool: Pool) -> FloatArray:
    belief = answer_belief(tree, gain)
    reward = np.zeros(len(tree.nodes))
    leaves, reward[leaves] = trajectory_returns(tree)
    turns = np.array([node.id for node in tree.nodes if node.parent is not None and node.children], dtype=np.int64)
    parents = np.array([tree.nodes[node].parent for node in turns], dtype=np.int64)
    reward[turns] = belief[turns] - belief[parents]
    advantage = np.zeros(len(tree.nodes))
    for part in [np.concatenate([turns, leaves])] if pool == "joint" else [turns, leaves]:
        advantage[part] = relative(reward[part], ddof=0)
    for node in reversed(tree.nodes):  # children come after their parents
        if node.parent is not None:
            advantage[node.parent] += gamma * advantage[node.id] / tree.n(node.parent)
    advantage[[root.id for root in tree.roots()]] = 0.0
    return advantage
