"""The study of fork choice: its ways to choose, its budgets, and what it says of the forks."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, Sketch, ToyPolicy, action, path, questions, random_policy

from benchmarks.fork_choice import (
    CARL,
    RULES,
    Affordable,
    Fork,
    Grown,
    Options,
    PilotForking,
    Pilots,
    Rule,
    Tally,
    Worth,
    as_json,
    forks_of,
    grow,
    make_explorer,
    midrank,
    states_of,
    study,
    summarise,
    tables,
    weigh,
)
from carl_gym.agents.agent import load_agent
from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.algorithms import get_algorithm
from carl_gym.envs.registration import make_task
from carl_gym.rollouts import EntropyForking, RandomForking, RolloutTree, collect


def two_states() -> tuple[RolloutTree, int, int]:
    """root --h = 2--> inner --h = 1--> end."""
    sketch = Sketch()
    root = sketch.root()
    inner = sketch.edge(root, 2.0)
    sketch.edge(inner, 1.0, end=True)
    return sketch.tree, root, inner


def pilots(at_root: float, at_inner: float, count: int = 2) -> Pilots:
    """Every pilot action has the h of its state."""

    def act(request: SampleRequest, rng: random.Random) -> Completion:
        assert request.state is not None
        return action(-at_inner if path(request.state) else -at_root)

    return Pilots(ToyPolicy(act), ByteTranscript(), count)


# Choosing


@pytest.mark.parametrize(
    ("at_root", "at_inner", "leaders", "chosen", "spent"),
    [
        # Root: (2 + .4 + .4) / 3 = .933; inner: (1 + 2 + 2) / 3 = 1.667.
        (0.4, 2.0, False, "inner", 4),
        # The root leads by its single action and gets a pilot: .933. Then inner leads with 1, and gets one too: 1.667.
        (0.4, 2.0, True, "inner", 4),
        # The same, but the inner state falls to (1 + .5 + .5) / 3 = .667, and the root leads again.
        (0.4, 0.5, True, "root", 4),
        # The root keeps the lead with (2 + 1.9 + 1.9) / 3 = 1.933, and nobody asks about the inner state.
        (1.9, 9.0, True, "root", 2),
        # Where everyone gets a pilot, (1 + 9 + 9) / 3 = 6.333 is found.
        (1.9, 9.0, False, "inner", 4),
    ],
)
def test_a_pilot_decides_by_the_mean_over_its_own_and_the_trees_actions(
    at_root: float, at_inner: float, leaders: bool, chosen: str, spent: int
) -> None:
    tree, root, inner = two_states()
    assert EntropyForking(1, 5).next(tree) == [root], "one sampled action says root"
    found = pilots(at_root, at_inner)
    assert PilotForking(1, 5, found, leaders).next(tree) == [{"root": root, "inner": inner}[chosen]]
    assert found.spent(tree) == spent


def test_a_pilot_is_sampled_once_and_its_mean_is_divided_by_the_number_of_children() -> None:
    # Root: (2 + 2 + 2) / 3 = 2, forked. With a second child of h = 2 it has H / n = (2 + 2 + 2 + 2) / 4 / 2 = 1, and
    # inner has (1 + 1.2 + 1.2) / 3 = 1.133.
    tree, root, inner = two_states()
    found = pilots(2.0, 1.2)
    explorer = PilotForking(1, 5, found, leaders=False)
    assert explorer.next(tree) == [root]
    other = Sketch(tree).edge(root, 2.0, end=True, trajectory=1)
    assert tree.nodes[other].terminal
    assert explorer.next(tree) == [inner]
    assert found.spent(tree) == 4


def test_equal_roots_share_a_pilot() -> None:
    sketch = Sketch()
    for trajectory in range(3):
        sketch.edge(sketch.root(trajectory), 1.0, end=True, trajectory=trajectory)
    found = pilots(1.0, 1.0)
    assert PilotForking(3, 5, found, leaders=False).next(sketch.tree) == [0]
    assert found.spent(sketch.tree) == 2


def test_certain_states_are_not_forked_and_the_number_of_forks_ends() -> None:
    sketch = Sketch()
    sketch.edge(sketch.root(), 0.0, end=True)
    certain = pilots(0.0, 0.0)
    assert PilotForking(1, 5, certain, leaders=True).next(sketch.tree) == []
    tree, _, _ = two_states()
    assert PilotForking(1, 0, pilots(1.0, 1.0), leaders=False).next(tree) == []


# Budgets


def even_tree(budget: float) -> RolloutTree:
    """A trajectory of 4 actions, and forks of 4 actions each: all of the root, which alone is uncertain."""

    def act(request: SampleRequest, rng: random.Random) -> Completion:
        assert request.state is not None
        return action(-0.001 if path(request.state) else -100.0)

    explorer = Affordable(EntropyForking(1, 1000), 1, {"q0": budget})
    (tree,) = collect(PathTask(4), ToyPolicy(act), ByteTranscript(), questions(1), explorer, seed=0, step=0)
    return tree


@pytest.mark.parametrize(("budget", "actions"), [(4, 4), (5.9, 8), (9.9, 8), (10, 12), (12, 12), (13.9, 12), (14, 16)])
def test_trees_end_closest_to_their_budget(budget: float, actions: int) -> None:
    # A fork costs 4 actions, so a tree has 4, 8, 12, ... The first fork is thought to cost 2, half a trajectory: it is
    # made from 4 + 1 on. Later ones are known to cost 4: 8 becomes 12 from 10 on, and 12 becomes 16 from 14 on.
    assert even_tree(budget).actions_generated == actions


def test_a_pilot_that_would_exceed_the_budget_is_not_sampled() -> None:
    tree, root, _ = two_states()  # 2 actions, 2 states: a pilot of 2 everywhere costs 4, a fork is thought to cost 1
    found = pilots(1.0, 1.0)
    explorer = PilotForking(1, 5, found, leaders=False)
    assert Affordable(explorer, 1, {"q0": 6.4}).next(tree) == []
    assert found.spent(tree) == 0
    assert Affordable(explorer, 1, {"q0": 6.5}).next(tree) == [root]
    assert found.spent(tree) == 4


def test_the_leaders_pilot_is_all_that_a_choice_has_to_pay() -> None:
    tree, root, _ = two_states()
    found = pilots(1.9, 9.0)
    explorer = PilotForking(1, 5, found, leaders=True)
    assert Affordable(explorer, 1, {"q0": 4.4}).next(tree) == []
    assert Affordable(explorer, 1, {"q0": 4.5}).next(tree) == [root]
    assert found.spent(tree) == 2


def test_entropies_are_asked_for_where_the_rule_needs_them() -> None:
    for name, rule in RULES.items():
        explorer = Affordable(make_explorer(rule, 1, 2, pilots(1, 1)), 1, {})
        assert explorer.needs_entropies == (name == "exact entropy")


# What was chosen


def test_forks_are_read_off_the_tree() -> None:
    # Trajectory 0 with h = 1, 3 and return .5 + .25; trajectories 1 and 2 fork its second state. The first of these two
    # is chosen by 3, with returns .75 and 0; the second by (3 + .5) / 2 = 1.75, and is no pair.
    sketch = Sketch()
    root = sketch.root()
    inner = sketch.edge(root, 1.0, 0.5)
    sketch.edge(inner, 3.0, 0.25, end=True)
    sketch.edge(inner, 0.5, -0.5, end=True, trajectory=1)
    sketch.edge(inner, 0.1, 1.0, end=True, trajectory=2)
    prefix = sketch.tree.prefix(inner)
    assert forks_of(sketch.tree, 1, Rule(), pilots(1, 1)) == [
        Fork("q0", prefix, 1, 1, 3.0, (0.75, 0.0)),
        Fork("q0", prefix, 1, 2, 1.75, None),
    ]


def test_the_h_of_a_choice_is_in_the_rules_own_measure() -> None:
    # An action of log-probs -1, -3 and entropies .5, 1.5: 2 nats per token, 4 in all, and exactly 1 per token.
    tree = RolloutTree(questions(1)[0], 0, 7)
    sketch = Sketch(tree)
    root = sketch.root()
    first = action(-1.0, -3.0)
    known = Completion(first.token_ids, first.logprobs, first.text, first.finish_reason, (0.5, 1.5))
    tree.add_child(root, known, tree.nodes[root].state, (), 0.0, True, False, 0)
    sketch.edge(root, 1.0, end=True, trajectory=1)
    hs = {measure: forks_of(tree, 1, Rule(measure), pilots(1, 1))[0].h for measure in ("mean", "sum", "exact")}
    assert hs == {"mean": 2.0, "sum": 4.0, "exact": 1.0}


def test_the_h_of_a_choice_has_its_pilot_in_it() -> None:
    tree, root, _ = two_states()
    found = pilots(0.5, 0.4)
    assert PilotForking(1, 5, found, leaders=True).next(tree) == [root]  # (2 + .5 + .5) / 3 = 1 ties with inner's 1
    Sketch(tree).edge(root, 1.0, end=True, trajectory=1)
    (fork,) = forks_of(tree, 1, Rule(pilot=2, leaders=True), found)
    assert fork.h == pytest.approx(1.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3]))
def test_carls_forks_had_the_largest_density_when_they_were_chosen(seed: int, initial: int) -> None:
    grown = grow(PathTask(4), random_policy(), ByteTranscript(), questions(2), CARL, initial, 6, None, seed)
    for tree in grown.trees:
        forks = grown.forks[tree.question.id]
        assert len(forks) == 6
        for number, fork in enumerate(forks, initial):
            densities = [
                -sum(sum(c.logprobs) / len(c.logprobs) for c in taken) / len(taken) ** 2
                for node in tree.nodes
                if (
                    taken := [
                        child.action
                        for id in node.children
                        if (child := tree.nodes[id]).trajectory < number and child.action is not None
                    ]
                )
            ]
            assert fork.h / fork.before == pytest.approx(max(densities))
        assert grown.spent[tree.question.id] == tree.actions_generated


def test_carls_trees_are_those_of_the_algorithm() -> None:
    asked = questions(3)
    grown = grow(PathTask(4), random_policy(), ByteTranscript(), asked, CARL, 1, 16, None, 5)
    explorer = get_algorithm("carl-lite").explorer
    assert grown.trees == collect(PathTask(4), random_policy(), ByteTranscript(), asked, explorer, seed=5, step=0)


# What it was worth


def coin_policy(act: Callable[[random.Random], str]) -> ToyPolicy:
    """One-token-per-bit actions: h = 2, sum 4, exact 1, if entropies are asked for."""

    def sample(request: SampleRequest, rng: random.Random) -> Completion:
        text = act(rng) if request.temperature else "a"
        known = (0.5, 1.5) if request.entropies else ()
        return Completion((ord(text), 1), (-1.0, -3.0), text, "stop", known)

    return ToyPolicy(sample)


def test_states_are_measured_with_fresh_actions() -> None:
    # Only "b" and then "a" pays. The first action is a coin; greedy goes on with "a", so it decides all: C = 1/2.
    task = PathTask(2, payoff=lambda path: float(path == ("b", "a")))
    policy = coin_policy(lambda rng: rng.choice("ab"))
    grown = grow(task, policy, ByteTranscript(), questions(1), "random", 2, 4, None, 3)
    states = states_of([grown])
    worth = weigh(task, policy, ByteTranscript(), states, resamples=64, seed=0)
    assert {path(state.state)[:1] for state in states.values()} == {(), ("a",), ("b",)}
    for state, found in worth.items():
        assert found.fresh == {"mean": 2.0, "sum": 4.0, "exact": 1.0}
        depth, first = states[state].depth, path(states[state].state)[:1]
        if depth == 0:
            assert found.criticality == pytest.approx(0.5, abs=0.1)
            assert found.variance == pytest.approx(found.criticality**2 * 64 / 63)
        else:  # after "b" the second action matters as well
            assert found.settled == (first == ("a",))


def test_equal_states_are_measured_once() -> None:
    task = PathTask(2)
    policy = coin_policy(lambda rng: "a")  # one path: three initial trajectories have two different states
    one = grow(task, policy, ByteTranscript(), questions(2), CARL, 3, 2, None, 0)
    two = grow(task, policy, ByteTranscript(), questions(2), "random", 3, 2, None, 0)
    states = states_of([one, two])
    assert len(states) == 4
    assert sorted({question for question, _ in states}) == ["q0", "q1"]
    assert len({state.key for state in states.values()}) == 4, "different random numbers"


def test_rank_counts_equal_ones_half() -> None:
    assert midrank(0.2, [0.0, 0.2, 0.2, 0.5]) == (1 + 0.5 + 0.5) / 4


def by_hand() -> tuple[Tally, Tally, dict[tuple[str, tuple[int, ...]], Worth]]:
    """Two questions; see `test_a_row_of_the_tables_by_hand`."""
    fresh = {"mean": 0.5, "sum": 1.0, "exact": 0.25}
    worth = {
        ("q0", (1,)): Worth(0.4, 0.2, False, fresh),
        ("q0", (2,)): Worth(0.0, 0.0, True, fresh),
        ("q1", (1,)): Worth(0.1, 0.1, False, fresh),
    }
    rule = Tally(
        forks={
            "q0": [Fork("q0", (1,), 0, 1, 2.0, (1.0, 0.0)), Fork("q0", (2,), 1, 2, 1.0, None)],
            "q1": [Fork("q1", (1,), 0, 1, 0.5, (0.0, 0.5))],
        },
        ranks={"q0": [1.0, 0.0], "q1": [0.25]},
        actions={"q0": 10, "q1": 6},
        pilots={"q0": 4, "q1": 0},
        trained={"q0": 4, "q1": 2},
        nonzero={"q0": 2, "q1": 2},
    )
    carl = Tally(forks={"q0": [Fork("q0", (2,), 1, 1, 3.0, None)], "q1": [Fork("q1", (1,), 0, 1, 0.5, None)]})
    return rule, carl, worth


def test_a_row_of_the_tables_by_hand() -> None:
    rule, carl, worth = by_hand()
    row = summarise("pilot 2", 1, rule, carl, worth)
    assert (row.forks, row.actions, row.pilot_actions, row.pairs) == (1.5, 8, 2, 2)
    assert row.criticality[0] == pytest.approx(((0.4 + 0) / 2 + 0.1) / 2)
    assert row.over_carl[0] == pytest.approx(((0.2 - 0) + (0.1 - 0.1)) / 2)
    assert row.rank == pytest.approx((0.5 + 0.25) / 2)
    assert row.settled == pytest.approx((0.5 + 0) / 2)
    assert row.h_chosen == pytest.approx((1.5 + 0.5) / 2)
    assert row.h_fresh == 0.5
    assert row.nonzero[0] == pytest.approx((0.5 + 1.0) / 2)
    assert row.nonzero_per_100 == pytest.approx(100 * 4 / 16)
    assert row.old_minus_new[0] == pytest.approx((1.0 - 0.5) / 2)
    assert row.value_variance == pytest.approx((1 / 4 + 0.25 / 4) / 2)  # .15625
    assert row.from_action == pytest.approx((0.2 / 2 + 0.1 / 2) / 2 / 0.15625)


def test_no_fork_at_all_leaves_numbers_empty() -> None:
    _, carl, worth = by_hand()
    none = Tally(
        forks={"q0": []}, ranks={"q0": []}, actions={"q0": 5}, pilots={"q0": 0}, trained={"q0": 0}, nonzero={"q0": 0}
    )
    row = summarise("pilot 4", 8, none, carl, worth)
    assert (row.forks, row.actions, row.pairs, row.nonzero_per_100) == (0, 5, 0, 0)
    assert all(map(math.isnan, (row.criticality[0], row.rank, row.h_chosen, row.nonzero[0], row.from_action)))


def test_the_share_of_trained_actions_with_an_advantage() -> None:
    # The root's two actions lead to returns 1 and 0 (A = 1/2, -1/2); inner's to 1 and 1 (A = 0, 0): two of four.
    sketch = Sketch()
    root = sketch.root()
    inner = sketch.edge(root)
    sketch.edge(inner, reward=1.0, end=True)
    sketch.edge(inner, reward=1.0, end=True, trajectory=1)
    sketch.edge(root, reward=0.0, end=True, trajectory=2)
    tree = sketch.tree
    grown = Grown(CARL, 1, [tree], {"q0": 3}, {"q0": forks_of(tree, 1, Rule(), pilots(1, 1))})
    some = Worth(0.3, 0.1, False, {"mean": 1.0, "sum": 1.0, "exact": 1.0})
    more = Worth(0.5, 0.3, False, some.fresh)
    tally = Tally()
    tally.add(grown, {("q0", tree.prefix(root)): some, ("q0", tree.prefix(inner)): more})
    assert (tally.trained, tally.nonzero) == ({"q0": 4}, {"q0": 2})
    assert tally.actions == {"q0": 4 + 3}
    assert tally.ranks == {"q0": [0.75, 0.25]}, "inner is above one of the two states and equal to itself"


# All of it


def test_a_small_study_of_a_model(tiny_agent_folder: Path, tmp_path: Path) -> None:
    agent = load_agent(str(tiny_agent_folder), device="cpu", trainable=False)
    task = make_task("carl/MiniWiki-v0", questions=2)
    options = Options(questions=2, initial=(1, 2), forks=4, resamples=2)
    found = study(task, agent.policy, agent.transcript, list(task.questions.values()), options)
    rows = {(row.initial, row.rule): row for row in found.results}
    assert set(rows) == {(initial, rule) for initial in (1, 2) for rule in RULES}
    for (initial, rule), row in rows.items():
        assert row.actions < rows[initial, CARL].actions + task.card.turns  # what one more fork can be at most
        assert (row.pilot_actions > 0) <= (RULES[rule].pilot > 0)
        assert not math.isnan(row.h_fresh) or row.forks == 0
    assert rows[1, CARL].forks == 4
    text = tables(found)
    assert text.count("\n| 2 | ") == 2 * len(RULES)
    stored = json.loads(json.dumps(as_json(found, options), allow_nan=False))
    assert len(stored["results"]) == len(rows)
    assert len(stored["forks"]) == sum(round(2 * row.forks) for row in found.results)
    assert stored["options"]["agent"] == "tiny"


def test_all_rules_start_from_the_same_trajectories() -> None:
    policy = ToyPolicy(lambda request, rng: replace(random_policy().act(request, rng), entropies=(1.0,)))
    trees = [grow(PathTask(4), policy, ByteTranscript(), questions(2), rule, 2, 3, None, 9).trees for rule in RULES]
    for others in trees[1:]:
        for one, other in zip(trees[0], others, strict=True):
            first = [node.action for node in one.nodes if node.trajectory < 2]
            assert first == [node.action for node in other.nodes if node.trajectory < 2]


def test_a_random_choice_is_the_explorers() -> None:
    assert make_explorer(RULES["random"], 2, 3, pilots(1, 1)) == RandomForking(2, 3)
