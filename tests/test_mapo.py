"""MAPO's mixed advantage, on groups worked out by hand."""

import numpy as np
import pytest
from rollout_toys import Sketch

from carl_gym.algorithms import get_algorithm
from carl_gym.algorithms.mapo import mixed_advantage
from carl_gym.errors import ConfigError
from carl_gym.rollouts import RolloutTree, RootExplorer


def group(*trajectories: tuple[float, ...]) -> RolloutTree:
    """One root, and one trajectory per tuple of rewards."""
    sketch = Sketch()
    root = sketch.root()
    for number, rewards in enumerate(trajectories):
        state = root
        for turn, reward in enumerate(rewards, start=1):
            state = sketch.edge(state, reward=reward, end=turn == len(rewards), trajectory=number)
    return sketch.tree


def test_returns_are_compared_by_turn_and_rewards_over_all_turns():
    # Rewards (1, 0) and (0, 2). gamma = 1/2: returns (1, 0) and (1, 2).
    # First turns 1, 1: equal, 0. Second turns 0, 2: -1, 1.
    # Rewards 1, 0, 0, 2: mean 0.75, variance (0.0625 + 0.5625 + 0.5625 + 1.5625)/4 = 0.6875, std 0.82916:
    # 0.30151, -0.90453, -0.90453, 1.50756.
    tree = group((1.0, 0.0), (0.0, 2.0))
    (by_turn,) = mixed_advantage([tree], turn_weight=1, gamma=0.5)
    assert by_turn == pytest.approx([0, 0, -1, 0, 1], abs=1e-4)
    (immediate,) = mixed_advantage([tree], turn_weight=0, gamma=0.5)
    assert immediate == pytest.approx([0, 0.30151, -0.90453, -0.90453, 1.50756], abs=1e-4)
    (mixed,) = mixed_advantage([tree], turn_weight=0.75, gamma=0.5)
    assert mixed == pytest.approx(0.75 * by_turn + 0.25 * immediate)


def test_a_reward_at_the_end_alone_is_grpos_by_turn_and_the_same_for_all_turns_before_it():
    # Returns 1, 0, 0; the third rollout ends after one turn. First turns 1, 0, 0: mean 1/3, std sqrt(2)/3:
    # 1.41421, -0.70711, -0.70711. Second turns 1, 0: 1, -1.
    # Rewards 0, 1, 0, 0, 0: mean 0.2, std 0.4: 2 for the rewarded turn, -0.5 for every other.
    (advantage,) = mixed_advantage([group((0.0, 1.0), (0.0, 0.0), (0.0,))], turn_weight=0.5, gamma=1.0)
    assert 2 * advantage == pytest.approx([0, 1.41421 - 0.5, 1 + 2, -0.70711 - 0.5, -1 - 0.5, -0.70711 - 0.5], abs=1e-4)


def test_equal_rollouts_have_no_advantage_but_for_when_they_were_paid():
    (advantage,) = mixed_advantage([group((0.1, 0.7), (0.1, 0.7))], turn_weight=1.0, gamma=1.0)
    assert not advantage.any()
    (advantage,) = mixed_advantage([group((0.3, 0.3), (0.3, 0.3))], turn_weight=0.5, gamma=0.0)
    assert not advantage.any()


def test_questions_are_normalised_apart():
    one, two = group((0.0, 1.0), (0.0, 0.0)), group((0.0, 5.0), (2.0, 0.0), (1.0,))
    together = mixed_advantage([one, two], turn_weight=0.5, gamma=1.0)
    for tree, advantage in zip((one, two), together, strict=True):
        (alone,) = mixed_advantage([tree], turn_weight=0.5, gamma=1.0)
        assert np.array_equal(advantage, alone)


def test_mapo_is_a_group_method_of_its_defaults():
    algorithm = get_algorithm("mapo")
    assert algorithm.explorer == RootExplorer(16) and algorithm.requires == ()
    tree = group((0.0, 1.0), (0.0, 0.0))
    (advantage,) = algorithm.credit([tree])
    (expected,) = mixed_advantage([tree], turn_weight=0.5, gamma=1.0)
    assert np.array_equal(advantage, expected)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rollouts": 1}, "rollouts must be at least 2"),
        ({"rollouts": 0}, "rollouts must be an integer >= 1"),
        ({"turn_weight": 1.5}, "turn_weight must be a number from 0 to 1, not 1.5"),
        ({"gamma": -0.1}, "gamma must be a number from 0 to 1, not -0.1"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        get_algorithm("mapo", **overrides)
