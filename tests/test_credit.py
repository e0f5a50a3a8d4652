"""V and A of hand-made trees, worked out in the comments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, Sketch, questions, random_policy

from carl_gym.algorithms import group_normalised, tree_difference, values
from carl_gym.algorithms.credit import leaf_weighted_difference, leave_one_out_difference
from carl_gym.algorithms.vineppo import monte_carlo_difference
from carl_gym.rollouts import EntropyForking, RandomForking, RolloutTree, RootExplorer, collect


def nested() -> RolloutTree:
    """0 -> {1 -> {2: 1.0, 3 -> 4: 0.0, 5: 0.5}, 6: 0.2}: node 1 has three children, leaves pay as written."""
    sketch = Sketch()
    root = sketch.root()
    one = sketch.edge(root)
    sketch.edge(one, reward=1.0, end=True)
    three = sketch.edge(one, trajectory=1)
    sketch.edge(three, reward=0.0, end=True, trajectory=1)
    sketch.edge(one, reward=0.5, end=True, trajectory=2)
    sketch.edge(root, reward=0.2, end=True, trajectory=3)
    return sketch.tree


def test_values_and_advantages_of_a_nested_tree():
    # V(3) = 0; V(1) = (1 + 0 + 0.5)/3 = 0.5; V(0) = (0.5 + 0.2)/2 = 0.35, not the leaf mean 1.7/4.
    assert values(nested()) == pytest.approx([0.35, 0.5, 0, 0, 0, 0, 0])
    (advantage,) = tree_difference([nested()])
    assert advantage == pytest.approx([0, 0.15, 0.5, -0.5, 0, 0, -0.15])


def test_immediate_rewards_count_where_they_are_paid():
    # 0 -(-0.1)-> 1 -> {2: 1, 3: 0}; 0 -(0.3)-> 4 -> 5: 0.
    sketch = Sketch()
    root = sketch.root()
    one = sketch.edge(root, reward=-0.1)
    sketch.edge(one, reward=1.0, end=True)
    sketch.edge(one, reward=0.0, end=True)
    four = sketch.edge(root, reward=0.3)
    sketch.edge(four, reward=0.0, end=True)
    # V(1) = 0.5, V(4) = 0; V(0) = ((-0.1 + 0.5) + (0.3 + 0))/2 = 0.35.
    assert values(sketch.tree) == pytest.approx([0.35, 0.5, 0, 0, 0, 0])
    (advantage,) = tree_difference([sketch.tree])
    assert advantage == pytest.approx([0, 0.05, 0.5, -0.5, -0.05, 0])


def test_separate_roots_are_valued_apart():
    sketch = Sketch()
    for number, reward in enumerate((1.0, 0.0)):
        sketch.edge(sketch.root(number), reward=reward, end=True, trajectory=number)
    assert values(sketch.tree) == pytest.approx([1, 0, 0, 0])
    (advantage,) = tree_difference([sketch.tree])
    assert advantage == pytest.approx([0, 0, 0, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_tree_differences_of_siblings_sum_to_zero_and_telescope_along_paths(seed):
    def payoff(path: tuple[str, ...]) -> float:
        return len(set(path)) / 3 - 0.1 * len(path)

    explorer = EntropyForking(3, 8, root="merged")
    trees = collect(PathTask(6, payoff), random_policy(), ByteTranscript(), questions(2), explorer, seed=seed, step=0)
    for tree, advantage in zip(trees, tree_difference(trees), strict=True):
        for node in tree.recorded():
            assert sum(advantage[child] for child in node.children) == pytest.approx(0, abs=1e-12)
        for leaf in tree.leaves():
            along = sum(advantage[node.id] for node in tree.path(leaf.id))
            assert along == pytest.approx(tree.trajectory_return(leaf.id) - values(tree)[0])


def group(*returns: float) -> RolloutTree:
    """One root, one trajectory of two actions per return, half of it paid on each action."""
    sketch = Sketch()
    root = sketch.root()
    for number, total in enumerate(returns):
        middle = sketch.edge(root, reward=total / 2, trajectory=number)
        sketch.edge(middle, reward=total / 2, end=True, trajectory=number)
    return sketch.tree


def test_grpo_advantages_of_a_hand_made_group():
    # Mean 0.5, sample variance (4 * 0.25)/3 = 1/3: A = +-0.5 / (0.5773502692 + 1e-6) = +-0.8660239.
    (advantage,) = group_normalised([group(1, 0, 0, 1)])
    a = 0.8660239
    assert advantage == pytest.approx([0, a, a, -a, -a, -a, -a, a, a], abs=1e-7)


def test_groups_are_normalised_apart():
    one, other = group(1, 0), group(10, 30, 20)
    together = group_normalised([one, other])
    assert np.array_equal(together[0], group_normalised([one])[0])
    # Mean 20, sample std 10.
    assert together[1] == pytest.approx([0, -1, -1, 1, 1, 0, 0], abs=1e-6)


@pytest.mark.parametrize("returns", [(0.1,) * 16, (0.7,) * 3, (1 / 3,) * 7, (0.35,)])
def test_a_group_of_equal_returns_has_exactly_no_advantage(returns):
    (advantage,) = group_normalised([group(*returns)])
    assert not advantage.any() and len(advantage) == 1 + 2 * len(returns)


def test_an_action_that_trajectories_share_gets_the_mean_of_theirs():
    # Leaves 2, 4, 5, 6 return 1, 0, 0.5, 0.2: mean 0.425, std sqrt(0.5675/3) = 0.43493.
    (advantage,) = group_normalised([nested()])
    leaf = {2: 0.575, 4: -0.425, 5: 0.075, 6: -0.225}
    expected = [0, (0.575 - 0.425 + 0.075) / 3, leaf[2], leaf[4], leaf[4], leaf[5], leaf[6]]
    assert advantage == pytest.approx(np.array(expected) / 0.43493, abs=1e-4)


@pytest.mark.parametrize("explorer", [RootExplorer(5), RandomForking(2, 4)])
def test_credit_of_a_batch_is_the_credit_of_each_tree(explorer):
    task = PathTask(5, lambda path: float(len(path)))
    trees = collect(task, random_policy(), ByteTranscript(), questions(3), explorer, seed=0, step=0)
    for credit in (tree_difference, group_normalised):
        batch = credit(trees)
        assert [len(advantage) for advantage in batch] == [len(tree.nodes) for tree in trees]
        for tree, advantage in zip(trees, batch, strict=True):
            assert np.array_equal(advantage, credit([tree])[0])
            assert all(advantage[root.id] == 0 for root in tree.roots())


@pytest.mark.parametrize("total", [0.1, 0.6, 1.0, 1.1])
@pytest.mark.parametrize("k", range(2, 13))
def test_equal_returns_below_a_state_leave_exactly_no_advantage(total, k):
    """Six times 0.1 / 6 is not 0.1: a plain sum would leave advantages of 1e-17, which count as trained edges."""
    sketch = Sketch()
    root = sketch.root()
    for number in range(k):
        middle = sketch.edge(root, trajectory=number)
        for _ in range(1 + number % 3):  # so that numbers of leaves differ
            sketch.edge(middle, reward=total, end=True, trajectory=number)
    for credit in (tree_difference, leave_one_out_difference, leaf_weighted_difference):
        assert not credit([sketch.tree])[0].any()
    flat = Sketch()
    root = flat.root()
    for number in range(k + 1):
        flat.edge(root, reward=total, end=True, trajectory=number)
    assert not monte_carlo_difference([flat.tree], main=1)[0].any()
