"""Update sets, token weights, and algorithms by name."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, Sketch, questions, random_policy

from carl_gym.algorithms import (
    all_actions,
    forked_states,
    get_algorithm,
    group_normalised,
    token_weights,
    tree_difference,
)
from carl_gym.errors import ConfigError
from carl_gym.rollouts import EntropyForking, Explorer, RandomForking, RolloutTree, RootExplorer, collect


def forest() -> RolloutTree:
    """Separate roots 0 and 4. 0 -> 1 -> {2, 3}; 4 -> 5. Actions of 2, 1, 4, 3 tokens."""
    sketch = Sketch()
    root = sketch.root(0)
    one = sketch.edge(root, tokens=2)
    sketch.edge(one, tokens=1, end=True)
    sketch.edge(one, tokens=4, end=True, trajectory=2)
    other = sketch.root(1)
    sketch.edge(other, tokens=3, end=True, trajectory=1)
    return sketch.tree


def merged() -> RolloutTree:
    """0 -> {1, 2}, actions of 5 and 1 tokens."""
    sketch = Sketch()
    root = sketch.root()
    sketch.edge(root, tokens=5, end=True, trajectory=0)
    sketch.edge(root, tokens=1, end=True, trajectory=1)
    return sketch.tree


def grown(explorer: Explorer, count: int, seed: int) -> list[RolloutTree]:
    return collect(PathTask(6), random_policy(), ByteTranscript(), questions(count), explorer, seed=seed, step=0)


def test_update_sets_of_hand_made_trees():
    assert [mask.tolist() for mask in forked_states([forest(), merged()])] == [
        [False, False, True, True, False, False],
        [False, True, True],
    ]
    assert [mask.tolist() for mask in all_actions([forest(), merged()])] == [
        [False, True, True, True, False, True],
        [False, True, True],
    ]


def test_token_weights_of_hand_made_trees():
    trees = [forest(), merged()]
    selected = forked_states(trees)  # 4 actions of 1, 4, 5 and 1 tokens
    by_action = token_weights(trees, selected, "action")
    assert by_action[0] == pytest.approx([0, 0, 1 / 4, 1 / 16, 0, 0])
    assert by_action[1] == pytest.approx([0, 1 / 20, 1 / 4])
    by_token = token_weights(trees, selected, "token")
    assert by_token[0] == pytest.approx([0, 0, 1 / 11, 1 / 11, 0, 0])
    assert by_token[1] == pytest.approx([0, 1 / 11, 1 / 11])
    # Trained tokens per trajectory: 1 of number 0, 4 of number 2; 5 and 1. That makes four trajectories.
    by_trajectory = token_weights(trees, selected, "trajectory")
    assert by_trajectory[0] == pytest.approx([0, 0, 1 / 4, 1 / 16, 0, 0])
    assert by_trajectory[1] == pytest.approx([0, 1 / 20, 1 / 4])
    constant = token_weights(trees, selected, "constant")
    assert constant[0] == pytest.approx([0, 0, 1 / 1024, 1 / 1024, 0, 0])
    assert constant[1] == pytest.approx([0, 1 / 1024, 1 / 1024])


def test_a_trajectory_of_several_actions_is_averaged_over_all_its_tokens():
    sketch = Sketch()
    root = sketch.root()
    sketch.edge(sketch.edge(root, tokens=3), tokens=5, end=True)
    sketch.edge(root, tokens=2, end=True, trajectory=1)
    weights = token_weights([sketch.tree], all_actions([sketch.tree]), "trajectory")
    assert weights[0] == pytest.approx([0, 1 / 16, 1 / 16, 1 / 4])


@pytest.mark.parametrize("reduction", ["action", "token", "trajectory"])
@pytest.mark.parametrize("select", [all_actions, forked_states])
def test_weights_of_all_trained_tokens_sum_to_one(select, reduction):
    trees = grown(EntropyForking(2, 6), 12, seed=3)
    weights = token_weights(trees, select(trees), reduction)
    total = sum(
        weight[node.id] * len(node.action.token_ids)
        for tree, weight in zip(trees, weights, strict=True)
        for node in tree.nodes
        if node.action
    )
    assert total == pytest.approx(1)


@pytest.mark.parametrize("reduction", ["action", "token", "trajectory", "constant"])
def test_an_empty_update_set_weighs_nothing(reduction):
    trees = grown(EntropyForking(3, 0), 2, seed=0)
    selected = forked_states(trees)
    assert not any(mask.any() for mask in selected)
    weights = token_weights(trees, selected, reduction)
    assert [weight.tolist() for weight in weights] == [[0.0] * len(tree.nodes) for tree in trees]
    assert token_weights([], [], reduction) == []


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([EntropyForking, RandomForking]), st.integers(1, 6), st.integers(1, 12), st.integers(0, 10_000))
def test_size_of_the_update_set_is_within_the_papers_bounds(explorer, n0, forks, seed):
    """N + 1 <= |D_upd| <= 2 N with separate roots, N0 + N <= |D_upd| <= N0 + 2 N with a merged one."""
    for tree in grown(explorer(n0, forks, root="separate"), 2, seed):
        assert forks + 1 <= forked_states([tree])[0].sum() <= 2 * forks
    if n0 >= 2:
        for tree in grown(explorer(n0, forks, root="merged"), 2, seed):
            assert n0 + forks <= forked_states([tree])[0].sum() <= n0 + 2 * forks


# -- the registry ------------------------------------------------------------------------------------


def test_the_three_algorithms_are_what_the_papers_say():
    carl, lite, grpo = get_algorithm("carl"), get_algorithm("carl-lite"), get_algorithm("grpo")
    assert (carl.name, lite.name, grpo.name) == ("carl", "carl-lite", "grpo")
    assert carl.explorer == EntropyForking(8, 16, 1, "separate")
    assert lite == dataclasses.replace(carl, name="carl-lite", explorer=EntropyForking(1, 16))
    assert (carl.credit, carl.selection, carl.loss_reduction) == (tree_difference, forked_states, "action")
    assert grpo.explorer == RootExplorer(16)
    assert (grpo.credit, grpo.selection, grpo.loss_reduction) == (group_normalised, all_actions, "token")
    assert all((a.clip_low, a.clip_high) == (0.2, 0.2) for a in (carl, lite, grpo))


def test_settings_can_be_overridden():
    lite = get_algorithm("carl-lite", forks=4, root="merged", clip_high=0.28, loss_reduction="token")
    assert lite.explorer == EntropyForking(1, 4, root="merged")
    assert (lite.clip_low, lite.clip_high, lite.loss_reduction) == (0.2, 0.28, "token")
    assert get_algorithm("grpo", rollouts=4).explorer == RootExplorer(4)


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("carll", {}, "unknown algorithm 'carll', did you mean 'carl'.*carl, .*carl-lite, .*grpo"),
        ("sarsa", {}, "unknown algorithm 'sarsa'.*carl, .*carl-lite, .*grpo"),
        ("carl", {"fork": 3}, "unknown setting 'fork' of algorithm 'carl', did you mean 'forks'.*loss_reduction"),
        ("carl", {"fork_by": "size"}, "fork_by must be one of entropy, token-sum, exact-entropy, random, not 'size'"),
        ("carl", {"advantage": []}, "advantage of algorithm 'carl' must be a number, a word, true or false"),
        ("grpo", {"forks": 3}, "unknown setting 'forks' of algorithm 'grpo'.*rollouts"),
        ("carl", {"initial": 0}, r"initial \(N0\) must be an integer >= 1, not 0"),
        ("grpo", {"rollouts": 1}, "rollouts must be at least 2"),
        ("grpo", {"rollouts": 0}, "rollouts must be an integer >= 1"),
        ("carl", {"clip_low": 1.0}, "clip_low must be a number between 0 and 1"),
        ("carl", {"clip_high": float("nan")}, "clip_high must be a number"),
        ("carl", {"clip_high": "wide"}, "clip_high must be a number"),
        (
            "carl",
            {"loss_reduction": "mean"},
            "loss_reduction must be one of action, token, trajectory, .* not 'mean'",
        ),
    ],
)
def test_unknown_names_and_settings_are_refused(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        get_algorithm(name, **overrides)


def test_a_requirement_that_nobody_checks_is_refused():
    with pytest.raises(ConfigError, match="requires 'gold answer', which nobody checks; known: critic, gold answers"):
        dataclasses.replace(get_algorithm("grpo"), requires=("gold answer",))
