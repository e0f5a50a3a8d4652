"""Dr. GRPO, RLOO and Lite PPO on hand-made groups, worked out in the comments."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import Sketch

from carl_gym.algorithms import get_algorithm, group_normalised, token_weights
from carl_gym.algorithms.dr_grpo import dr_grpo, group_centred
from carl_gym.algorithms.lite_ppo import batch_scaled, lite_ppo
from carl_gym.algorithms.rloo import leave_one_out, rloo
from carl_gym.errors import ConfigError
from carl_gym.rollouts import RolloutTree, RootExplorer

CREDITS = [group_centred, leave_one_out, batch_scaled]
FACTORIES = [dr_grpo, rloo, lite_ppo]


def group(*returns: float) -> RolloutTree:
    """One root, one trajectory of two actions per return, half of it paid on each action."""
    sketch = Sketch()
    root = sketch.root()
    for number, total in enumerate(returns):
        middle = sketch.edge(root, reward=total / 2, tokens=1 + number, trajectory=number)
        sketch.edge(middle, reward=total / 2, end=True, trajectory=number)
    return sketch.tree


def of_each(*advantages: float) -> list[float]:
    """What the nodes of `group` should have when its trajectories have these advantages."""
    return [0.0, *(advantage for advantage in advantages for _ in range(2))]


# -- advantages ------------------------------------------------------------------------------------


def test_dr_grpo_subtracts_the_mean_and_divides_by_nothing():
    # Mean 0.5.
    (advantage,) = group_centred([group(1, 0, 0.25, 0.75)])
    assert advantage == pytest.approx(of_each(0.5, -0.5, -0.25, 0.25))


def test_rloo_subtracts_the_mean_of_the_others():
    # 1 - (0 + 0.5)/2 = 0.75; 0 - (1 + 0.5)/2 = -0.75; 0.5 - (1 + 0)/2 = 0.
    (advantage,) = leave_one_out([group(1, 0, 0.5)])
    assert advantage == pytest.approx(of_each(0.75, -0.75, 0))


def test_lite_ppo_takes_the_mean_of_the_group_and_the_deviation_of_the_batch():
    # Returns 1, 0, 3, 3, 2: mean 1.8, sum of squares 0.64 + 3.24 + 1.44 + 1.44 + 0.04 = 6.8, sample variance 1.7.
    # Group means 0.5, 3 and 2.
    one, two, three = batch_scaled([group(1, 0), group(3, 3), group(2)])
    assert one == pytest.approx(of_each(0.5 / 1.7**0.5, -0.5 / 1.7**0.5), abs=1e-5)
    assert not two.any() and not three.any()


def test_lite_ppo_does_not_blow_up_a_group_whose_returns_hardly_differ():
    hard, easy = group(1, 0), group(0.5, 0.51)
    assert abs(group_normalised([hard, easy])[1]).max() == pytest.approx(
        abs(group_normalised([hard])[0]).max(), abs=1e-3
    )
    # Returns 1, 0, 0.5, 0.51: standard deviation 0.408; 0.005 / 0.408.
    assert abs(batch_scaled([hard, easy])[1]).max() == pytest.approx(0.01225, abs=1e-4)


def test_an_action_that_trajectories_share_gets_the_mean_of_theirs():
    # 0 -> 1 -> {2: 1, 3: 0.5}, 0 -> 4: 0. Returns 1, 0.5, 0, mean 0.5, sample standard deviation 0.5.
    sketch = Sketch()
    root = sketch.root()
    shared = sketch.edge(root)
    sketch.edge(shared, reward=1.0, end=True)
    sketch.edge(shared, reward=0.5, end=True, trajectory=1)
    sketch.edge(root, end=True, trajectory=2)
    for credit, expected in (
        (group_centred, [0, 0.25, 0.5, 0, -0.5]),
        (leave_one_out, [0, 0.375, 0.75, 0, -0.75]),
        (batch_scaled, [0, 0.5, 1, 0, -1]),
    ):
        assert credit([sketch.tree])[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("returns", [(0.1,) * 16, (0.7,) * 3, (1 / 3,) * 7, (0.35,)])
def test_a_group_of_equal_returns_has_exactly_no_advantage(credit, returns):
    alone, beside = credit([group(*returns)])[0], credit([group(1, 0), group(*returns)])[1]
    assert not alone.any() and not beside.any() and len(alone) == 1 + 2 * len(returns)


@pytest.mark.parametrize("credit", CREDITS)
def test_no_trees_have_no_advantages(credit):
    assert credit([]) == []


GROUPS = st.lists(st.lists(st.integers(-8, 8).map(lambda x: x / 4), min_size=2, max_size=6), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_rloo_is_dr_grpo_scaled_by_n_over_n_minus_one(groups):
    trees = [group(*returns) for returns in groups]
    for returns, centred, left_out in zip(groups, group_centred(trees), leave_one_out(trees), strict=True):
        n = len(returns)
        assert left_out == pytest.approx(centred * n / (n - 1), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_lite_ppo_is_dr_grpo_over_one_number_for_the_batch_and_grpo_where_the_batch_is_one_group(groups):
    trees = [group(*returns) for returns in groups]
    centred, scaled = np.concatenate(group_centred(trees)), np.concatenate(batch_scaled(trees))
    spread = np.std([total for returns in groups for total in returns], ddof=1)
    assert scaled == pytest.approx(centred / (spread + 1e-6), abs=1e-9)
    assert batch_scaled(trees[:1])[0] == pytest.approx(group_normalised(trees[:1])[0], abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(GROUPS, st.integers(-20, 20))
def test_a_bonus_for_every_trajectory_changes_no_advantage(groups, bonus):
    trees = [group(*returns) for returns in groups]
    richer = [group(*(total + bonus for total in returns)) for returns in groups]
    for credit in CREDITS:
        assert np.concatenate(credit(richer)) == pytest.approx(np.concatenate(credit(trees)), abs=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_rloo_is_the_policy_gradient_in_expectation_and_dr_grpo_falls_short_by_one_over_n(k):
    """All outcomes of k draws from a policy that chooses between two answers with probability p and 1 - p."""
    p, paid = 0.3, (1.0, 0.25)
    exact = p * (1 - p) * (paid[0] - paid[1])  # d/d(logit) of p paid[0] + (1 - p) paid[1]
    mean = {leave_one_out: 0.0, group_centred: 0.0}
    for drawn in itertools.product((0, 1), repeat=k):
        probability = np.prod([(p, 1 - p)[answer] for answer in drawn])
        tree = group(*(paid[answer] for answer in drawn))
        score = np.array([(1 - p, -p)[answer] for answer in drawn])  # d log pi(answer) / d(logit)
        for credit in mean:
            mean[credit] += probability * float((score * credit([tree])[0][1::2]).mean())
    assert mean[leave_one_out] == pytest.approx(exact)
    assert mean[group_centred] == pytest.approx(exact * (1 - 1 / k))


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, credit, reduction",
    [("dr-grpo", group_centred, "constant"), ("rloo", leave_one_out, "constant"), ("lite-ppo", batch_scaled, "token")],
)
def test_they_are_registered_with_their_own_credit_and_loss(name, credit, reduction):
    algorithm = get_algorithm(name)
    assert algorithm.name == name
    assert algorithm.credit is credit
    assert algorithm.loss_reduction == reduction
    assert algorithm.explorer == RootExplorer(16)
    assert get_algorithm(name, rollouts=5).explorer == RootExplorer(5)


@pytest.mark.parametrize("name", ["dr-grpo", "rloo"])
def test_every_token_weighs_the_same_however_long_its_trajectory_is(name):
    algorithm, tree = get_algorithm(name), group(1, 0, 0)  # trajectories of 2, 3 and 4 tokens
    (weights,) = token_weights([tree], algorithm.selection([tree]), algorithm.loss_reduction)
    assert weights[0] == 0
    assert weights[1:] == pytest.approx(np.full(6, 1 / (3 * 256)))


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    "given, message",
    [
        ({"rollouts": 1}, "rollouts must be at least 2"),
        ({"rollouts": 0}, "rollouts must be an integer >= 1"),
        ({"rollouts": 2.5}, "rollouts must be an integer"),
        ({"clip_low": 1.0}, "clip_low"),
        ({"clip_high": 0}, "clip_high"),
        ({"loss_reduction": "mean"}, "loss_reduction must be one of"),
    ],
)
def test_settings_that_cannot_work_are_refused(factory, given, message):
    with pytest.raises(ConfigError, match=message):
        factory(**given)
