"""On a small MDP everything can be enumerated: estimates of collector and credit must agree with the exact values.

Three states, two actions, three steps, a reward at every step, a tabular softmax policy. All trajectories have the same
length, so that random fork sites are independent of the sampled actions. Each bound is 4.5 standard errors, and each
test also shows that it would notice: the exact value is many standard errors away from 0.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
from rollout_toys import ByteTranscript, PathTask, ToyPolicy, path, questions

from carl_gym.agents.policy import Completion
from carl_gym.algorithms import (
    all_actions,
    forked_states,
    group_normalised,
    token_weights,
    tree_difference,
    values,
)
from carl_gym.rollouts import EntropyForking, Explorer, Node, RandomForking, RolloutTree, RootExplorer, collect

Array = npt.NDArray[np.float64]

HORIZON, STATES, ACTIONS = 3, 3, 2
NEXT = [[1, 2], [2, 0], [0, 1]]
REWARD = np.array([[0.0, 0.3], [1.0, -0.2], [0.1, 0.8]])
LOGITS = np.array([[1.2, -0.4], [0.2, 0.9], [-0.7, 0.8]])
PI = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
PATHS = list(itertools.product(range(ACTIONS), repeat=HORIZON))


# -- exact, by enumeration -----------------------------------------------------------------------------


def visits(actions: tuple[int, ...]) -> list[tuple[int, int]]:
    """(state, action) along a path that starts in state 0."""
    state, visited = 0, []
    for choice in actions:
        visited.append((state, choice))
        state = NEXT[state][choice]
    return visited


def state_after(actions: tuple[int, ...]) -> int:
    state = 0
    for choice in actions:
        state = NEXT[state][choice]
    return state


def probability(actions: tuple[int, ...], pi: Array = PI) -> float:
    return math.prod(pi[s, a] for s, a in visits(actions))


def total_reward(actions: tuple[int, ...]) -> float:
    return sum(REWARD[s, a] for s, a in visits(actions))


def score(state: int, choice: int) -> Array:
    """Gradient of log pi(choice | state) by the logits."""
    gradient = np.zeros((STATES, ACTIONS))
    gradient[state] = -PI[state]
    gradient[state, choice] += 1
    return gradient


def path_score(actions: tuple[int, ...]) -> Array:
    return sum((score(s, a) for s, a in visits(actions)), np.zeros((STATES, ACTIONS)))


def exact_value(state: int, steps_left: int) -> float:
    return sum(PI[state, a] * exact_q(state, a, steps_left) for a in range(ACTIONS)) if steps_left else 0.0


def exact_q(state: int, choice: int, steps_left: int) -> float:
    return float(REWARD[state, choice]) + exact_value(NEXT[state][choice], steps_left - 1)


def local_gradient(state: int, steps_left: int) -> Array:
    """Gradient of V(state) by the choice of the first action alone."""
    return sum(
        (PI[state, a] * exact_q(state, a, steps_left) * score(state, a) for a in range(ACTIONS)),
        np.zeros((STATES, ACTIONS)),
    )


POLICY_GRADIENT = sum(
    (probability(actions) * total_reward(actions) * path_score(actions) for actions in PATHS),
    np.zeros((STATES, ACTIONS)),
)


def test_the_enumerated_policy_gradient_is_the_derivative_of_the_return():
    def expected_return(logits: Array) -> float:
        pi = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return sum(probability(actions, pi) * total_reward(actions) for actions in PATHS)

    assert math.isclose(expected_return(LOGITS), exact_value(0, HORIZON))
    for index in np.ndindex(STATES, ACTIONS):
        step = np.zeros((STATES, ACTIONS))
        step[index] = 1e-5
        slope = (expected_return(LOGITS + step) - expected_return(LOGITS - step)) / 2e-5
        assert math.isclose(slope, POLICY_GRADIENT[index], abs_tol=1e-8)


# -- estimated, through collector, credit and selection ------------------------------------------------


def tabular_policy() -> ToyPolicy:
    def act(request, rng):
        state = state_after(tuple(int(text) for text in path(request.state)))
        choice = 0 if rng.random() < PI[state, 0] else 1
        return Completion((choice,), (math.log(PI[state, choice]),), str(choice), "stop")

    return ToyPolicy(act)


def sample_trees(explorer: Explorer, count: int, seed: int) -> list[RolloutTree]:
    def payoff(actions: tuple[str, ...]) -> float:
        state, choice = visits(tuple(int(text) for text in actions))[-1]
        return float(REWARD[state, choice])

    task = PathTask(HORIZON, payoff)
    return collect(task, tabular_policy(), ByteTranscript(), questions(count), explorer, seed=seed, step=0)


def mdp_state(node: Node) -> int:
    return state_after(tuple(int(text) for text in path(node.state)))


def edge_score(tree: RolloutTree, node: Node) -> Array:
    assert node.parent is not None and node.action is not None
    return score(mdp_state(tree.nodes[node.parent]), node.action.token_ids[0])


def update(tree: RolloutTree, advantage: Array, weight: Array) -> Array:
    """The gradient that the learner would take at ratio 1: sum over edges of weight * A * grad log pi."""
    gradient = np.zeros((STATES, ACTIONS))
    for node in tree.nodes:
        if weight[node.id]:
            gradient += weight[node.id] * advantage[node.id] * edge_score(tree, node)
    return gradient


def assert_mean(
    samples: list[Array] | list[float], exact: Array | float, *, notices: Array | float | None = None
) -> None:
    """The mean of independent samples is `exact` within 4.5 standard errors.

    `notices`: a wrong answer (by default 0) that must be more than 9 standard errors away, or the test shows nothing.
    """
    data = np.array(samples)
    mean, error = data.mean(axis=0), data.std(axis=0, ddof=1) / math.sqrt(len(data))
    assert np.all(np.abs(mean - exact) <= 4.5 * error + 1e-12), (mean, exact, error)
    assert np.max(np.abs(exact - (0.0 if notices is None else notices)) / (error + 1e-12)) > 9, (exact, error)


def test_grpo_without_its_std_estimates_the_policy_gradient():
    """E[1/n sum_i (R_i - mean R) grad log pi(tau_i)] = (1 - 1/n) grad J: the group mean contains the rollout itself."""
    n, samples = 4, []
    trees = sample_trees(RootExplorer(n), 5000, seed=1)
    for tree, advantage in zip(trees, group_normalised(trees), strict=True):
        returns = np.array([tree.trajectory_return(leaf.id) for leaf in tree.leaves()])
        centred = advantage * (returns.std(ddof=1) + 1e-6)
        (weight,) = token_weights([tree], all_actions([tree]), "token")  # 1 / (n * HORIZON) for each action
        samples.append(HORIZON * update(tree, centred, weight))
    assert_mean(samples, (1 - 1 / n) * POLICY_GRADIENT, notices=POLICY_GRADIENT)


def test_grpo_has_its_exact_expectation():
    """The whole estimator, std included, against its expectation over all 8^3 groups of three trajectories."""
    exact = np.zeros((STATES, ACTIONS))
    for group in itertools.product(PATHS, repeat=3):
        returns = [total_reward(actions) for actions in group]
        mean = sum(returns) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in returns) / 2)
        chance = math.prod(probability(actions) for actions in group)
        for actions, r in zip(group, returns, strict=True):
            exact += chance * (r - mean) / (std + 1e-6) * path_score(actions) / (3 * HORIZON)
    trees = sample_trees(RootExplorer(3), 6000, seed=2)
    samples = [
        update(tree, advantage, token_weights([tree], all_actions([tree]), "token")[0])
        for tree, advantage in zip(trees, group_normalised(trees), strict=True)
    ]
    assert_mean(samples, exact)


def value_errors(trees: list[RolloutTree]) -> tuple[list[float], list[float]]:
    """Per tree, the means over its forked states of V - exact V, and of the exact V."""
    errors, exacts = [], []
    for tree in trees:
        estimate = values(tree)
        forked = [node for node in tree.recorded() if len(node.children) >= 2]
        exact = [exact_value(mdp_state(node), HORIZON - node.depth) for node in forked]
        errors.append(float(np.mean([estimate[node.id] for node in forked]) - np.mean(exact)))
        exacts.append(float(np.mean(exact)))
    return errors, exacts


def test_values_at_random_fork_sites_are_unbiased():
    for n0, forks in ((1, 1), (1, 6), (3, 4)):
        errors, exacts = value_errors(sample_trees(RandomForking(n0, forks), 5000, seed=3))
        assert_mean(errors, 0.0, notices=0.15 * float(np.mean(exacts)))


def test_values_where_entropy_chose_the_fork_are_tilted():
    """The known price of choosing the site by the sampled action's own surprise; the check above would see it."""
    errors, _ = value_errors(sample_trees(EntropyForking(1, 1), 20_000, seed=3))
    assert abs(np.mean(errors)) > 9 * np.std(errors) / math.sqrt(len(errors))


def carl_updates(trees: list[RolloutTree]) -> list[Array]:
    return [
        update(tree, advantage, token_weights([tree], forked_states([tree]), "action")[0])
        for tree, advantage in zip(trees, tree_difference(trees), strict=True)
    ]


def test_one_random_fork_gives_half_of_the_policy_gradient():
    """The site is uniform over the HORIZON steps of the rollout and has k = 2 children: (1 - 1/2) / HORIZON grad J."""
    samples = carl_updates(sample_trees(RandomForking(1, 1), 20_000, seed=4))
    assert_mean(samples, (1 - 1 / 2) / HORIZON * POLICY_GRADIENT, notices=POLICY_GRADIENT / HORIZON)


def test_carl_with_random_forks_is_scaled_by_one_less_the_share_of_the_child_itself():
    """A forked state u contributes k / |D_upd| * (1 - 1/k) of its own policy gradient, forks below it included."""
    for n0, forks, root in ((1, 6, "separate"), (3, 4, "merged")):
        trees = sample_trees(RandomForking(n0, forks, root=root), 4000, seed=5)
        differences, exact = [], []
        for tree, sampled in zip(trees, carl_updates(trees), strict=True):
            forked = [node for node in tree.recorded() if len(node.children) >= 2]
            size = sum(len(node.children) for node in forked)
            expected = sum(
                (
                    len(node.children)
                    / size
                    * (1 - 1 / len(node.children))
                    * local_gradient(mdp_state(node), HORIZON - node.depth)
                    for node in forked
                ),
                np.zeros((STATES, ACTIONS)),
            )
            differences.append(sampled - expected)
            exact.append(expected)
        assert_mean(differences, np.zeros((STATES, ACTIONS)), notices=0.2 * np.mean(exact, axis=0))
