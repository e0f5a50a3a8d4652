"""Segments and rows: every trained action stands unmasked in exactly one row, behind the tokens that it followed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, Sketch, after, questions, random_policy

from carl_gym.agents.policy import Completion
from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.algorithms.credit import tree_difference
from carl_gym.algorithms.selection import all_actions, forked_states
from carl_gym.envs.state import EnvState
from carl_gym.rollouts import RolloutTree, collect
from carl_gym.training.segments import Row, rows, segments


def random_tree(seed: int, size: int, roots: int) -> RolloutTree:
    """Any shape: every new node hangs on a random old one that has not ended. Every token id is unique in the tree."""
    rng = random.Random(seed)
    tree = Sketch().tree
    ids = iter(range(1000, 10**6))
    for _ in range(roots):
        tree.add_root(EnvState("q0"), _take(ids, rng.randint(1, 4)))
    for _ in range(size):
        parent = rng.choice([node for node in tree.nodes if not node.terminal])
        tokens = _take(ids, rng.randint(1, 5))
        action = Completion(tokens, tuple(-rng.random() for _ in tokens), "go", "stop")
        end = rng.random() < 0.2
        observation = () if end else _take(ids, rng.randint(0, 3))
        tree.add_child(parent.id, action, after(parent.state, "go"), observation, rng.random(), end, False, 0)
    return tree


def _take(ids: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(next(ids) for _ in range(count))


def export(tree: RolloutTree, advantages: np.ndarray, weights: np.ndarray) -> list[Row]:
    return rows(segments(tree, advantages, weights))


trees = st.builds(random_tree, st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 4))


@st.composite
def labelled(draw: st.DrawFn) -> tuple[RolloutTree, np.ndarray, np.ndarray]:
    """A random tree with random advantages and weights, many of them 0."""
    tree = draw(trees)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    edge = np.array([node.parent is not None for node in tree.nodes])
    advantages = np.where(edge & (rng.random(len(edge)) < draw(st.sampled_from([0.2, 0.7, 1.0]))), rng.normal(), 0.0)
    weights = np.where(edge & (rng.random(len(edge)) < draw(st.sampled_from([0.2, 0.7, 1.0]))), rng.random(), 0.0)
    return tree, advantages * rng.normal(size=len(edge)), weights


# -- segments --------------------------------------------------------------------------------------


def test_a_segment_holds_the_action_then_what_was_observed():
    sketch = Sketch()
    root = sketch.root()
    child = sketch.edge(root, h=0.5, tokens=3)
    sketch.edge(child, h=0.25, tokens=2, end=True)
    first, second, third = segments(sketch.tree, np.array([0, 1.5, -2.0]), np.array([0, 0.25, 0.125]))
    assert (first.parent, second.parent, third.parent) == (None, 0, 1)
    assert (first.tokens.tolist(), first.action_length, first.logprobs.tolist()) == ([1, 2, 3], 0, [])
    assert (second.tokens.tolist(), second.action_length) == ([100, 101, 102, 9], 3)
    assert (third.tokens.tolist(), third.action_length) == ([100, 101], 2)
    assert second.logprobs.tolist() == [-0.5] * 3
    assert (second.advantage, second.weight, third.advantage, third.weight) == (1.5, 0.25, -2.0, 0.125)
    assert {segment.policy_version for segment in (first, second, third)} == {0}


@given(labelled())
def test_segments_put_together_along_a_path_give_the_prefix(case):
    tree, advantages, weights = case
    parts = segments(tree, advantages, weights)
    for node in tree.nodes:
        joined = np.concatenate([parts[step.id].tokens for step in tree.path(node.id)])
        assert tuple(joined.tolist()) == tree.prefix(node.id)


# -- rows, by hand ---------------------------------------------------------------------------------


def test_siblings_get_a_row_each_and_their_common_action_trains_in_the_first():
    sketch = Sketch()
    root = sketch.root()
    common = sketch.edge(root, h=1.0, tokens=2)
    left, right = sketch.edge(common, h=2.0, tokens=3, end=True), sketch.edge(common, h=3.0, tokens=1, end=True)
    first, second = export(sketch.tree, np.array([0, 1, 2, 3.0]), np.array([0, 0.1, 0.2, 0.3]))
    assert (left, right) == (2, 3)
    assert first.tokens.tolist() == [1, 2, 3, 100, 101, 9, 100, 101, 102]
    assert first.positions.tolist() == [3, 4, 6, 7, 8]
    assert first.logprobs.tolist() == [-1, -1, -2, -2, -2]
    assert first.advantages.tolist() == [1, 1, 2, 2, 2]
    assert first.weights.tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.2])
    assert second.tokens.tolist() == [1, 2, 3, 100, 101, 9, 100]
    assert second.positions.tolist() == [6]
    assert (second.logprobs.tolist(), second.advantages.tolist()) == ([-3], [3])


def test_a_row_ends_with_its_last_trained_action():
    sketch = Sketch()
    trained = sketch.edge(sketch.root(), tokens=2)
    sketch.edge(sketch.edge(trained), end=True)
    (row,) = export(sketch.tree, np.array([0, 1, 0, 5.0]), np.array([0, 0.5, 0.5, 0]))
    assert row.tokens.tolist() == [1, 2, 3, 100, 101]
    assert row.positions.tolist() == [3, 4]


def test_actions_without_advantage_or_weight_need_no_row():
    sketch = Sketch()
    root = sketch.root()
    sketch.edge(root, end=True)
    sketch.edge(root, end=True)
    assert export(sketch.tree, np.array([0, 0, 1.0]), np.array([0, 0.5, 0])) == []
    assert export(sketch.tree, np.zeros(3), np.zeros(3)) == []


def test_a_tree_without_actions_has_no_rows():
    sketch = Sketch()
    sketch.root()
    assert export(sketch.tree, np.zeros(1), np.zeros(1)) == []


def test_the_initial_rollouts_of_a_forest_have_rows_of_their_own():
    sketch = Sketch()
    for trajectory in range(2):
        sketch.edge(sketch.root(trajectory), trajectory=trajectory, end=True)
    found = export(sketch.tree, np.array([0, 1, 0, 1.0]), np.array([0, 0.5, 0, 0.5]))
    assert [row.tokens.tolist() for row in found] == [[1, 2, 3, 100]] * 2


# -- rows, on random trees -------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(labelled())
def test_every_trained_action_is_unmasked_once_and_nothing_else_is(case):
    tree, advantages, weights = case
    # Token ids are unique in the tree, so a trained token names its action and its place in it.
    expected = Counter(
        (token, logprob, np.float32(advantages[node.id]), np.float32(weights[node.id]))
        for node in tree.nodes
        if node.action and advantages[node.id] != 0 and weights[node.id] > 0
        for token, logprob in zip(node.action.token_ids, np.float32(node.action.logprobs), strict=True)
    )
    found = Counter(
        entry
        for row in export(tree, advantages, weights)
        for entry in zip(row.tokens[row.positions].tolist(), row.logprobs, row.advantages, row.weights, strict=True)
    )
    assert found == expected
    assert set(found.values()) <= {1}


@settings(max_examples=300, deadline=None)
@given(labelled())
def test_a_row_is_the_prefix_that_its_last_action_was_sampled_after_and_that_action(case):
    tree, advantages, weights = case
    ends = {node.action.token_ids[-1]: node for node in tree.nodes if node.action}
    for row in export(tree, advantages, weights):
        node = ends[int(row.tokens[-1])]
        prefix = tree.prefix(node.id)
        assert tuple(row.tokens.tolist()) == prefix[: len(prefix) - len(node.observation_tokens)]
        assert row.positions[-1] == len(row.tokens) - 1
        assert (np.diff(row.positions) > 0).all() and row.positions[0] >= 1


@settings(max_examples=300, deadline=None)
@given(labelled())
def test_there_are_as_many_rows_as_trained_actions_without_one_below(case):
    tree, advantages, weights = case
    trained = {node.id for node in tree.nodes if advantages[node.id] != 0 and weights[node.id] > 0}
    above = {step.id for node in trained for step in tree.path(node)[:-1]}
    assert len(export(tree, advantages, weights)) == len(trained - above)


@settings(max_examples=100, deadline=None)
@given(st.lists(trees, min_size=1, max_size=4), st.sampled_from(["action", "token"]), st.booleans())
def test_the_weights_of_a_batch_sum_to_one_when_every_selected_action_has_an_advantage(batch, reduction, everything):
    selected = (all_actions if everything else forked_states)(batch)
    weights = token_weights(batch, selected, reduction)
    total = sum(
        float(row.weights.sum())
        for tree, weight in zip(batch, weights, strict=True)
        for row in export(tree, np.ones(len(tree.nodes)), weight)
    )
    assert total == pytest.approx(1.0 if any(mask.any() for mask in selected) else 0.0, abs=1e-5)


@pytest.mark.parametrize("name", ["carl", "carl-lite", "grpo"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_collected_trees_carry_what_the_algorithm_decided(name, seed):
    algorithm = get_algorithm(name)
    task = PathTask(6, lambda path: (len(path) % 3) / 2)
    batch = collect(task, random_policy(), ByteTranscript(), questions(3), algorithm.explorer, seed=seed, step=1)
    advantages, selected = algorithm.credit(batch), algorithm.selection(batch)
    weights = token_weights(batch, selected, algorithm.loss_reduction)
    for tree, advantage, mask, weight in zip(batch, advantages, selected, weights, strict=True):
        found = export(tree, advantage, weight)
        trained = [node for node in tree.nodes if mask[node.id] and advantage[node.id] != 0 and node.action]
        assert sum(len(row.positions) for row in found) == sum(len(node.action.token_ids) for node in trained)
        objective = sum(float((row.weights * row.advantages).sum()) for row in found)
        expected = sum(weight[node.id] * advantage[node.id] * len(node.action.token_ids) for node in trained)
        assert objective == pytest.approx(expected, abs=1e-6)


def test_there_are_never_more_rows_than_leaves():
    algorithm = get_algorithm("carl")
    for tree in collect(
        PathTask(6, len), random_policy(), ByteTranscript(), questions(5), algorithm.explorer, seed=0, step=0
    ):
        (advantages,), (mask,) = tree_difference([tree]), forked_states([tree])
        assert 0 < len(export(tree, advantages, mask / mask.sum())) <= len(tree.leaves())
