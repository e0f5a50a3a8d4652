"""VinePPO: which rollouts value a state, and what of them trains; worked out in the comments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, Sketch, questions, random_policy

from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.algorithms.vineppo import (
    AuxiliaryRollouts,
    main_actions,
    monte_carlo_difference,
    monte_carlo_values,
    vineppo,
)
from carl_gym.errors import ConfigError, StateError
from carl_gym.rollouts import RolloutTree, collect


def vine(last: float = 1.0) -> RolloutTree:
    """One main trajectory 0 -> 1 -> 2, which pays 0.1 and then `last`, and two auxiliary rollouts from each state.

    From 0: 3 -> 4 pays 0.2 and 0.4, 5 pays 0. From 1: 6 pays 1, 7 pays 0.5.
    """
    sketch = Sketch()
    root = sketch.root()
    one = sketch.edge(root, reward=0.1)
    sketch.edge(one, reward=last, end=True)
    three = sketch.edge(root, reward=0.2, trajectory=1)
    sketch.edge(three, reward=0.4, end=True, trajectory=1)
    sketch.edge(root, reward=0.0, end=True, trajectory=2)
    sketch.edge(one, reward=1.0, end=True, trajectory=3)
    sketch.edge(one, reward=0.5, end=True, trajectory=4)
    return sketch.tree


# -- credit ----------------------------------------------------------------------------------------


def test_a_state_is_valued_by_its_auxiliary_rollouts_alone():
    # V(0) = (0.6 + 0)/2 = 0.3, without the main trajectory's 1.1; V(1) = (1 + 0.5)/2 = 0.75; V(2) = 0, terminal.
    assert monte_carlo_values(vine(), main=1) == pytest.approx([0.3, 0.75, 0, 0, 0, 0, 0, 0])


def test_advantages_of_the_main_trajectory_are_differences_of_values():
    # A(0 -> 1) = 0.1 + 0.75 - 0.3 = 0.55; A(1 -> 2) = 1 + 0 - 0.75 = 0.25; none for auxiliary actions.
    (advantage,) = monte_carlo_difference([vine()], main=1)
    assert advantage == pytest.approx([0, 0.55, 0.25, 0, 0, 0, 0, 0])


def test_what_a_main_trajectory_earns_at_its_end_moves_the_advantage_of_its_last_action_alone():
    (won,), (lost,) = (monte_carlo_difference([vine(last)], main=1) for last in (1.0, 0.0))
    assert won - lost == pytest.approx([0, 0, 1, 0, 0, 0, 0, 0])


def test_main_trajectories_share_the_value_of_the_root():
    # Two main trajectories of one action, paying 1 and 0; one auxiliary rollout pays 0.4.
    sketch = Sketch()
    root = sketch.root()
    for number, reward in enumerate((1.0, 0.0, 0.4)):
        sketch.edge(root, reward=reward, end=True, trajectory=number)
    (advantage,) = monte_carlo_difference([sketch.tree], main=2)
    assert advantage == pytest.approx([0, 0.6, -0.4, 0])


def test_only_main_actions_train():
    algorithm = get_algorithm("vineppo", main=1, auxiliary=2)
    (mask,) = algorithm.selection([vine()])
    assert mask.tolist() == [False, True, True, *[False] * 5]
    (weights,) = token_weights([vine()], [mask], algorithm.loss_reduction)
    assert weights == pytest.approx([0, 0.5, 0.5, 0, 0, 0, 0, 0])


def test_a_state_without_auxiliary_rollouts_is_an_error():
    sketch = Sketch()
    sketch.edge(sketch.root(), end=True)
    with pytest.raises(StateError, match="state 0 of question 'q0' has no auxiliary rollouts"):
        monte_carlo_difference([sketch.tree], main=1)


# -- rollouts --------------------------------------------------------------------------------------


def rolled_out(explorer: AuxiliaryRollouts, seed: int = 0, horizon: int = 4, stop: float = 0.3) -> list[RolloutTree]:
    task = PathTask(horizon, lambda path: len(set(path)) / 3 - 0.1 * len(path))
    policy = random_policy(stop=stop)
    return collect(task, policy, ByteTranscript(), questions(2), explorer, seed=seed, step=0)


@pytest.mark.parametrize("main, auxiliary, turns", [(1, 1, 1), (1, 2, 4), (4, 3, 5), (3, 1, 2)])
def test_the_cost_is_as_the_docstring_says(main, auxiliary, turns):
    for tree in rolled_out(AuxiliaryRollouts(main, auxiliary), horizon=turns, stop=0.0):
        # G T + K (T + G T (T - 1) / 2); 155 for 4, 3, 5.
        extra = auxiliary * (turns + main * turns * (turns - 1) // 2)
        assert tree.actions_generated == main * turns + extra


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
def test_every_state_of_a_main_trajectory_and_no_other_gets_its_auxiliary_rollouts(seed, main, auxiliary):
    for tree in rolled_out(AuxiliaryRollouts(main, auxiliary), seed):
        assert all(leaf.terminal for leaf in tree.leaves())
        for state in tree.recorded():
            extra = [child for child in state.children if tree.nodes[child].trajectory >= main]
            if state.trajectory < main:
                assert len(extra) == auxiliary
                assert len(state.children) - len(extra) == (main if state.parent is None else 1)
            else:
                assert len(state.children) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_advantages_add_up_to_what_a_main_trajectory_earned_above_the_value_of_the_root(seed):
    trees = rolled_out(AuxiliaryRollouts(3, 2), seed)
    for tree, advantage, mask in zip(
        trees, monte_carlo_difference(trees, main=3), main_actions(trees, main=3), strict=True
    ):
        value = monte_carlo_values(tree, main=3)[0]
        leaves = [leaf for leaf in tree.leaves() if leaf.trajectory < 3]
        assert len(leaves) == 3
        for leaf in leaves:
            along = sum(advantage[node.id] for node in tree.path(leaf.id))
            assert along == pytest.approx(tree.trajectory_return(leaf.id) - value)
        assert not advantage[~mask].any()


def test_auxiliary_rollouts_are_numbered_by_place_not_by_order_of_arrival():
    explorer = AuxiliaryRollouts(2, 1)
    sketch = Sketch()
    root = sketch.root()
    second = sketch.edge(root, trajectory=1)  # arrives before the first trajectory's
    sketch.edge(second, end=True, trajectory=1)
    first = sketch.edge(root, trajectory=0)
    sketch.edge(first, end=True, trajectory=0)
    assert explorer.roots() == (2,)
    assert explorer.next(sketch.tree) == [root, first, second]
    assert AuxiliaryRollouts(2, 3).next(sketch.tree) == [root] * 3 + [first] * 3 + [second] * 3
    sketch.edge(root, end=True, trajectory=2)
    assert explorer.next(sketch.tree) == []


def test_the_value_of_the_root_is_the_policys_expected_return_on_average():
    """Random actions a, b, c, or stop with probability 0.3, at most 2: exact value by enumeration of their number."""
    # Reward 1 for an action "a": the first action is "a" with 0.7/3, the second (if the first did not stop) too.
    task = PathTask(2, lambda path: float(path[-1] == "a"))
    policy = random_policy(stop=0.3)
    explorer = AuxiliaryRollouts(1, 4)
    trees = collect(task, policy, ByteTranscript(), questions(2), explorer, seed=3, step=0)
    for step in range(1, 400):
        trees += collect(task, policy, ByteTranscript(), questions(2), explorer, seed=3, step=step)
    found = np.array([monte_carlo_values(tree, main=1)[0] for tree in trees])
    exact = 0.7 / 3 + 0.7 * 0.7 / 3
    assert abs(found.mean() - exact) < 4 * found.std() / len(found) ** 0.5
    # So the advantages of main actions, which V does not depend on, have mean 0.
    total = np.array([advantage.sum() for advantage in monte_carlo_difference(trees, main=1)])
    assert abs(total.mean()) < 4 * total.std() / len(total) ** 0.5


# -- settings --------------------------------------------------------------------------------------


def test_it_is_registered_with_settings():
    algorithm = get_algorithm("vineppo", main=2, auxiliary=9)
    assert algorithm.explorer == AuxiliaryRollouts(2, 9)
    assert algorithm.credit([]) == [] and algorithm.selection([]) == []
    assert get_algorithm("vineppo").explorer == AuxiliaryRollouts(4, 3)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"main": 0}, "main must be an integer >= 1, not 0"),
        ({"auxiliary": 0}, "auxiliary must be an integer >= 1, not 0"),
        ({"auxiliary": 1.5}, "auxiliary must be an integer"),
        ({"main": True}, "main must be an integer"),
        ({"clip_low": 2}, "clip_low"),
        ({"loss_reduction": "sum"}, "loss_reduction"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        vineppo(**given)
