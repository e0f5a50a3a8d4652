"""A tree worked out by hand, and what must hold for every tree."""

import itertools
import math
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, Sketch, action, after, questions, random_policy

from carl_gym.agents.policy import Completion
from carl_gym.envs.state import EnvState
from carl_gym.errors import PolicyError, StateError
from carl_gym.rollouts import RandomForking, RolloutTree, collect
from carl_gym.rollouts.tree import action_entropy, derive_seed


def hand_made() -> RolloutTree:
    """A root (0) with children 1 and 3; trajectory 0 is 0-1-2, trajectory 1 is 0-3, trajectory 2 is 0-1-4."""
    tree = RolloutTree(questions(1)[0], policy_version=3)
    start = EnvState("q0")
    root = tree.add_root(start, (1, 2))
    one = tree.add_child(
        root, Completion((10, 11), (-1.0, -3.0), "x", "stop"), after(start, "x"), (5,), 0.25, False, False, 0
    )
    state = tree.nodes[one].state
    tree.add_child(one, Completion((20,), (-0.5,), "y", "stop"), after(state, "y"), (), 1.0, True, False, 0)
    tree.add_child(
        root, Completion((30, 31, 32), (0.0, -3.0, 0.0), "z", "eos"), after(start, "z"), (), 0.5, True, True, 1
    )
    tree.add_child(one, Completion((40,), (-1.5,), "w", "stop"), after(state, "w"), (), 0.0, True, False, 2)
    return tree


def test_entropies_of_the_hand_made_tree():
    tree = hand_made()
    assert [tree.h(node.id) for node in tree.nodes] == [0.0, 2.0, 0.5, 1.0, 1.5]
    assert [tree.H(node.id) for node in tree.nodes] == [1.5, 1.0, 0.0, 0.0, 0.0]
    assert [tree.n(node.id) for node in tree.nodes] == [2, 2, 0, 0, 0]


def test_shape_of_the_hand_made_tree():
    tree = hand_made()
    assert [node.depth for node in tree.nodes] == [0, 1, 2, 1, 2]
    assert [node.children for node in tree.nodes] == [[1, 3], [2, 4], [], [], []]
    assert [node.id for node in tree.roots()] == [0]
    assert [node.id for node in tree.recorded()] == [0, 1]
    assert [node.id for node in tree.leaves()] == [2, 3, 4]
    assert [node.id for node in tree.path(4)] == [0, 1, 4]
    assert tree.trajectories == 3
    assert tree.actions_generated == 4


def test_prefixes_and_returns_of_the_hand_made_tree():
    tree = hand_made()
    assert tree.prefix(0) == (1, 2)
    assert tree.prefix(1) == (1, 2, 10, 11, 5)
    assert tree.prefix(4) == (1, 2, 10, 11, 5, 40)
    assert [tree.trajectory_return(leaf) for leaf in (2, 3, 4)] == [1.25, 0.5, 0.25]


def test_a_terminal_node_cannot_be_extended():
    tree = hand_made()
    with pytest.raises(StateError, match=r"node 2 .*terminal"):
        tree.add_child(2, action(-1.0), tree.nodes[2].state, (), 0.0, True, False, 3)
    assert len(tree.nodes) == 5


@pytest.mark.parametrize("broken", [Completion((), (), "", "eos"), Completion((1, 2), (-1.0,), "x", "stop")])
def test_an_action_needs_tokens_and_their_logprobs(broken):
    tree = hand_made()
    with pytest.raises(PolicyError, match="one log-prob for each"):
        tree.add_child(0, broken, tree.nodes[0].state, (), 0.0, True, False, 3)
    assert len(tree.nodes) == 5 and tree.nodes[0].children == [1, 3]


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=20))
def test_h_is_the_negative_mean_logprob(logprobs):
    assert action_entropy(action(*logprobs)) == pytest.approx(-math.fsum(logprobs) / len(logprobs))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.randoms())
def test_H_is_the_mean_of_h_whatever_the_order(entropies, random):
    shuffled = random.sample(entropies, len(entropies))
    means = []
    for order in (entropies, shuffled):
        sketch = Sketch()
        root = sketch.root()
        for count, h in enumerate(order, start=1):
            sketch.edge(root, h, end=True)
            assert sketch.tree.H(root) == pytest.approx(math.fsum(order[:count]) / count)
        means.append(sketch.tree.H(root))
    assert means[0] == means[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_prefixes_paths_and_counts_agree_on_random_trees(seed):
    (tree,) = collect(
        PathTask(6), random_policy(), ByteTranscript(), questions(1), RandomForking(3, 6), seed=seed, step=0
    )
    for node in tree.nodes:
        prefix = list(tree.path(node.id)[0].observation_tokens)
        for before, here in itertools.pairwise(tree.path(node.id)):
            assert here.parent == before.id and here.id in before.children and here.depth == before.depth + 1
            prefix += [*here.action.token_ids, *here.observation_tokens]
        assert tree.prefix(node.id) == tuple(prefix)
        assert tree.prefix_length(node.id) == len(prefix)
    assert tree.actions_generated == sum(len(node.children) for node in tree.nodes)
    assert len(tree.leaves()) == tree.trajectories == 9
    assert {node.trajectory for node in tree.leaves()} == set(range(9))


def test_a_tree_survives_pickling():
    tree = hand_made()
    assert pickle.loads(pickle.dumps(tree)) == tree


def test_derived_seeds_are_the_same_in_every_process_and_differ_by_key():
    keys = [(0,), (1,), (0, 0), ("0",), (0, "q1"), (0, "q", 1), (0, 1, "q"), (1, 0, "q")]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    program = f"from carl_gym.rollouts.tree import derive_seed; print([derive_seed(*key) for key in {keys!r}])"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(seeds)
