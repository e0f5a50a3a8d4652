"""Fork order: worked out by hand, and equal to a literal Algorithm 1 on a thousand random trees."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from rollout_toys import ByteTranscript, PathTask, Sketch, questions, random_policy

from carl_gym.errors import ConfigError
from carl_gym.rollouts import EntropyForking, RandomForking, RolloutTree, RootExplorer, collect


def test_roots_of_each_explorer():
    assert RootExplorer(3).roots() == (3,)
    assert EntropyForking(initial=3).roots() == RandomForking(initial=3).roots() == (1, 1, 1)
    assert EntropyForking(initial=3, root="merged").roots() == (3,)


def test_fork_order_of_a_hand_made_tree():
    sketch = Sketch()
    tree = sketch.tree
    explorer = EntropyForking(initial=1, forks=4)
    s0 = sketch.root()
    s1 = sketch.edge(s0, h=1.0)
    s2 = sketch.edge(s1, h=3.0)
    sketch.edge(s2, h=2.0, end=True)
    # H/n: s0 1, s1 3, s2 2.
    assert explorer.next(tree) == [s1]
    s4 = sketch.edge(s1, h=1.0, trajectory=1)
    sketch.edge(s4, h=0.5, end=True, trajectory=1)
    # H(s1) = (3 + 1)/2 = 2, n = 2. H/n: s0 1, s1 1, s2 2, s4 0.5.
    assert explorer.next(tree) == [s2]
    sketch.edge(s2, h=2.0, end=True, trajectory=2)
    # H(s2) = 2, n = 2. s0, s1, s2 tie at 1: the lowest (trajectory, depth) is s0's.
    assert explorer.next(tree) == [s0]
    sketch.edge(s0, h=3.0, end=True, trajectory=3)
    # H(s0) = 2, n = 2: still a tie at 1.
    assert explorer.next(tree) == [s0]
    sketch.edge(s0, h=2.0, end=True, trajectory=4)
    assert explorer.next(tree) == []  # N forks are done


def test_ties_go_to_the_lower_trajectory_before_the_lower_depth():
    sketch = Sketch()
    root0, root1 = sketch.root(0), sketch.root(1)
    # Nodes arrive in the other order: trajectory 1 first.
    sketch.edge(root1, h=1.0, end=True, trajectory=1)
    deep = sketch.edge(root0, h=0.5, trajectory=0)
    sketch.edge(deep, h=1.0, end=True, trajectory=0)
    assert EntropyForking(initial=2, forks=1).next(sketch.tree) == [deep]


def test_separate_roots_are_denser_than_a_merged_one():
    for root, expected in (("separate", "root"), ("merged", "state")):
        sketch = Sketch()
        r0 = sketch.root(0)
        r1 = sketch.root(1) if root == "separate" else r0
        state = sketch.edge(r0, h=1.0, trajectory=0)
        sketch.edge(state, h=0.75, end=True, trajectory=0)
        sketch.edge(r1, h=1.0, end=True, trajectory=1)
        # Roots: H/n = 1 when separate, 1/2 when merged. The state: 0.75.
        assert EntropyForking(2, 1, root=root).next(sketch.tree) == [{"root": r0, "state": state}[expected]]


def test_several_forks_a_round_are_the_top_states():
    sketch = Sketch()
    a = sketch.root()
    b = sketch.edge(a, h=2.0)
    c = sketch.edge(b, h=1.0)
    sketch.edge(c, h=3.0, end=True)
    assert EntropyForking(1, 4, forks_per_round=2).next(sketch.tree) == [c, a]
    assert EntropyForking(1, 4, forks_per_round=9).next(sketch.tree) == [c, a, b]
    assert EntropyForking(1, 1, forks_per_round=2).next(sketch.tree) == [c]  # only one fork is left


def test_a_deterministic_policy_is_not_forked():
    sketch = Sketch()
    a = sketch.root()
    b = sketch.edge(a, h=0.0)
    sketch.edge(b, h=0.0, end=True)
    assert EntropyForking(1, 16).next(sketch.tree) == []
    (tree,) = collect(
        PathTask(3), random_policy(sure=1.0), ByteTranscript(), questions(1), EntropyForking(4, 16), seed=0, step=0
    )
    assert len(tree.leaves()) == 4


@pytest.mark.parametrize("explorer", [EntropyForking, RandomForking])
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"initial": 0}, r"initial \(N0\) must be an integer >= 1, not 0"),
        ({"initial": 1.5}, r"initial \(N0\)"),
        ({"forks": -1}, r"forks \(N\) must be an integer >= 0, not -1"),
        ({"forks_per_round": 0}, "forks_per_round must be an integer >= 1"),
        ({"root": "shared"}, "root must be one of separate, merged, not 'shared'"),
    ],
)
def test_settings_that_cannot_work_are_refused(explorer, settings, message):
    with pytest.raises(ConfigError, match=message):
        explorer(**settings)


def test_root_explorer_needs_a_rollout():
    with pytest.raises(ConfigError, match="rollouts must be an integer >= 1, not 0"):
        RootExplorer(0)


# -- Algorithm 1, literally ------------------------------------------------------------------------

Key = tuple[int, int]  # (trajectory number, depth) names a state without any tree


def algorithm_1(sampled: list[list[Fraction]], n0: int, forks: int, merged: bool) -> list[Key]:
    """The states that Algorithm 1 forks, in order, from what its rollouts would sample.

    sampled[i] holds h of each action that trajectory i samples, from where it starts. Exact arithmetic.
    """
    H: dict[Key, Fraction] = {}
    n: dict[Key, int] = {}

    def record(state: Key, h: Fraction) -> None:
        if state not in H:
            H[state], n[state] = h, 1
        else:
            n[state] += 1
            H[state] += (h - H[state]) / n[state]

    for i in range(n0):
        for t, h in enumerate(sampled[i]):
            record((0, 0) if merged and t == 0 else (i, t), h)

    chosen: list[Key] = []
    for i in range(n0, n0 + forks):
        best, lowest = None, None
        for state in sorted(H):
            if H[state] == 0:
                continue
            density = n[state] / H[state]
            if lowest is None or density < lowest:
                best, lowest = state, density
        if best is None:
            break
        chosen.append(best)
        record(best, sampled[i][0])
        for t, h in enumerate(sampled[i][1:], start=best[1] + 1):
            record((i, t), h)
    return chosen


def what_was_sampled(tree: RolloutTree) -> list[list[Fraction]]:
    rollouts: dict[int, dict[int, Fraction]] = {}
    for node in tree.nodes:
        if node.action is not None:
            logprobs = [Fraction(logprob) for logprob in node.action.logprobs]
            rollouts.setdefault(node.trajectory, {})[node.depth] = -sum(logprobs) / len(logprobs)
    return [[h for _, h in sorted(rollouts[i].items())] for i in range(len(rollouts))]


def forked_states_in_order(tree: RolloutTree, n0: int) -> list[Key]:
    starts: dict[int, Key] = {}
    for node in tree.nodes:
        if node.parent is not None:
            source = tree.nodes[node.parent]
            starts.setdefault(node.trajectory, (source.trajectory, source.depth))
    return [starts[i] for i in range(n0, len(starts))]


def test_fork_order_equals_a_literal_algorithm_1_on_a_thousand_random_trees():
    compared, stopped_early, tied = 0, 0, 0
    for case in range(40):
        ties = case % 2 == 0
        n0, forks = 1 + case % 5, (case * 7) % 20
        root = "merged" if case % 3 == 0 else "separate"
        policy = random_policy(stop=0.25, ties=ties, sure=0.7 if case % 8 == 0 else 0.1)
        trees = collect(
            PathTask(8),
            policy,
            ByteTranscript(),
            questions(25),
            EntropyForking(n0, forks, root=root),
            seed=case,
            step=0,
        )
        for tree in trees:
            expected = algorithm_1(what_was_sampled(tree), n0, forks, root == "merged")
            assert forked_states_in_order(tree, n0) == expected
            compared += 1
            stopped_early += len(expected) < forks
            priorities = [tree.H(node.id) / tree.n(node.id) for node in tree.recorded() if tree.H(node.id) > 0]
            tied += len(priorities) > len(set(priorities))
    assert compared == 1000
    assert stopped_early > 10 and tied > 300  # the hard cases were among them


# -- random forks ------------------------------------------------------------------------------------


def test_random_forks_are_uniform_over_recorded_states():
    """One fork on a chain of 5 states: each is chosen in about a fifth of 5,000 trees (4 sigma = 113)."""
    trees = collect(
        PathTask(5), random_policy(stop=0.0), ByteTranscript(), questions(5000), RandomForking(1, 1), seed=1, step=0
    )
    sites = Counter(key for tree in trees for key in forked_states_in_order(tree, 1))
    assert sorted(sites) == [(0, depth) for depth in range(5)]
    assert all(abs(count - 1000) < 113 for count in sites.values())


def test_random_forks_do_not_depend_on_what_was_sampled():
    def sites(ties: bool, sure: float) -> list[list[Key]]:
        policy = random_policy(stop=0.0, ties=ties, sure=sure)
        explorer = RandomForking(2, 6)
        trees = collect(PathTask(4), policy, ByteTranscript(), questions(20), explorer, seed=5, step=2)
        return [forked_states_in_order(tree, 2) for tree in trees]

    assert sites(ties=False, sure=0.0) == sites(ties=True, sure=1.0)


def test_random_forks_follow_the_seed_of_the_tree():
    def first_sites(seed: int, step: int) -> list[list[Key]]:
        policy = random_policy(stop=0.0)
        trees = collect(PathTask(4), policy, ByteTranscript(), questions(20), RandomForking(1, 3), seed=seed, step=step)
        return [forked_states_in_order(tree, 1) for tree in trees]

    assert first_sites(0, 0) == first_sites(0, 0)
    assert first_sites(0, 0) != first_sites(1, 0)
    assert first_sites(0, 0) != first_sites(0, 1)
