"""PPO with a critic that values states between turns, and generalised advantages over turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, CriticSettings, register_algorithm
from carl_gym.algorithms.credit import FloatArray
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_shares
from carl_gym.errors import ConfigError, StateError
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree

VARIANCE_EPSILON = 1e-8


@register_algorithm("ppo")
def ppo(
    rollouts: int = 16,
    gamma: float = 1.0,
    lam: float = 1.0,
    critic_learning_rate: float = 1e-3,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Turn-level PPO (Schulman et al., arXiv 1707.06347; over turns: Li et al., "Turn-PPO", arXiv 2512.17008).

    Rollout: `rollouts` trajectories from the root; as many as the group methods have, though it needs no group.

    Credit (GAE, Schulman et al., arXiv 1506.02438, over turns t; a turn is one action, V(terminal) = 0):

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lam A_{t+1}

    and then whitened over all actions of the batch, (A - mean) / sqrt(variance + 1e-8). V(s_t) is the critic's, read
    off the last token before the action, before this step's update.

    Critic: a transformer of its own that starts as the policy's, regressed on  V(s_t) + A_t  (not whitened), the
    lambda return; its loss is 1/2 (V - target)^2, mean over states.

    Update, over the tokens of all actions of the batch:

        J = 1/(number of tokens) sum_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)

    gamma = lam = 1 are those of the code released with VAGEN (mll-lab-nu/VAGEN, estimator `no_concat_gae`, of which
    the equations are too) and of VinePPO's PPO runs (McGill-NLP/VinePPO, `trainers/lam1.jsonnet`): a young critic then
    is a mere baseline and biases nothing. With few turns smaller values can pay: Turn-PPO is reported to do best at
    gamma 0.99, lam 0.9. The critic's learning rate is above the policy's, as in VAGEN's examples (1e-5, 1e-6).

    Differs from that code: whitening is over actions, not over tokens; one step of the critic per step of the policy;
    no clip of the value's change; no KL term. Turn-PPO clips the ratio of whole turns, this that of tokens.

    Raises:
        ConfigError: a setting out of its range.
    """
    require_shares(gamma=gamma, lam=lam)
    if not isinstance(critic_learning_rate, (int, float)) or not 0 < critic_learning_rate < np.inf:
        raise ConfigError(f"critic_learning_rate must be a number above 0, not {critic_learning_rate!r}")
    return Algorithm(
        name="ppo",
        explorer=RootExplorer(rollouts),
        credit=partial(whitened_gae, gamma=gamma, lam=lam),
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        requires=("critic",),
        critic=CriticSettings(partial(lambda_returns, gamma=gamma, lam=lam), critic_learning_rate),
    )


def whitened_gae(trees: Sequence[RolloutTree], *, gamma: float, lam: float) -> list[FloatArray]:
    """The generalised advantage of every action, whitened over all actions of all trees.

    Raises:
        StateError: a state has no value in `tree.scores["state_value"]`.
    """
    return whitened(trees, [gae(tree, gamma=gamma, lam=lam) for tree in trees])


def lambda_returns(trees: Sequence[RolloutTree], *, gamma: float, lam: float) -> list[FloatArray]:
    """What V of each state should be: V(u) + A, mean over the actions that were taken there; 0 where there are none.

    Raises:
        StateError: a state has no value in `tree.scores["state_value"]`.
    """
    found = []
    for tree in trees:
        advantage, target = gae(tree, gamma=gamma, lam=lam), critic_values(tree)
        for node in tree.recorded():
            target[node.id] += advantage[node.children].mean()
        found.append(target)
    return found


def gae(tree: RolloutTree, *, gamma: float, lam: float) -> FloatArray:
    """Generalised advantage estimates (arXiv 1506.02438, Eq. 16) of the edge into every node; 0 at roots.

        A(u -> v) = r + gamma V(v) - V(u) + gamma lam (mean of A over the edges out of v)

    Trajectories that share no state have one edge out of every state: then it is GAE as it is known.
    """
    value = critic_values(tree)
    advantage, onward = np.zeros(len(tree.nodes)), np.zeros(len(tree.nodes))
    for node in reversed(tree.nodes):  # children come after their parents
        if node.parent is not None:
            delta = node.reward + gamma * value[node.id] - value[node.parent]
            advantage[node.id] = delta + gamma * lam * onward[node.id]
            onward[node.parent] += advantage[node.id] / tree.n(node.parent)
    return advantage


def critic_values(tree: RolloutTree) -> FloatArray:
    """V by node id, as the critic left it in the tree; 0 where nothing follows.

    Raises:
        StateError: a state that an action was taken in has no value.
    """
    states = [node.id for node in tree.recorded()]
    value = np.zeros(len(tree.nodes))
    if "state_value" in tree.scores:
        value[states] = tree.scores["state_value"][states]
    if "state_value" not in tree.scores or np.isnan(value[states]).any():
        raise StateError(
            f"the critic has not valued all states of question {tree.question.id!r}; call Critic.score on complete "
            'trees before credit reads tree.scores["state_value"]'
        )
    return value


def whitened(trees: Sequence[RolloutTree], advantages: Sequence[FloatArray]) -> list[FloatArray]:
    """(A - mean) / sqrt(variance + 1e-8) over all edges of all trees, with the sample variance; 0 at roots.

    As `masked_whiten` of TRL and verl does. Advantages that are all equal become 0.
    """
    edges = [np.array([node.parent is not None for node in tree.nodes], dtype=np.bool_) for tree in trees]
    found = [np.zeros(len(advantage)) for advantage in advantages]
    everything = np.concatenate([np.zeros(0), *(a[edge] for a, edge in zip(advantages, edges, strict=True))])
    if len(everything) < 2 or np.ptp(everything) == 0:
        return found
    scale = 1 / np.sqrt(everything.var(ddof=1) + VARIANCE_EPSILON)
    for result, advantage, edge in zip(found, advantages, edges, strict=True):
        result[edge] = (advantage[edge] - everything.mean()) * scale
    return found
