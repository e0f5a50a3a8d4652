"""Tree-GRPO, TreeRL and ARPO: advantages and forks of hand-made trees, and what their explorers promise of any tree."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, Sketch, ToyPolicy, after, questions, random_policy

from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.algorithms import get_algorithm
from carl_gym.algorithms.arpo import EntropyRiseBranching, summed_group_normalised
from carl_gym.algorithms.tree_grpo import RandomExpansion, tree_relative
from carl_gym.algorithms.treerl import UnlikelyTokenForking, global_and_local
from carl_gym.errors import ConfigError, PolicyError
from carl_gym.rollouts import RolloutTree, collect
from carl_gym.rollouts.explorers import Explorer

ALL = ["tree-grpo", "treerl", "arpo"]
SEEDS = st.integers(0, 10_000)


def entropic_policy(stop: float = 0.2) -> ToyPolicy:
    """A random policy whose tokens have random entropies, where they are asked for."""
    plain = random_policy(stop=stop)

    def act(request: SampleRequest, rng: random.Random) -> Completion:
        action = plain.act(request, rng)
        entropies = tuple(rng.expovariate(1.0) for _ in action.token_ids)
        return replace(action, entropies=entropies) if request.entropies else action

    return ToyPolicy(act)


def grown(explorer: Explorer, seed: int, *, horizon: int = 5, stop: float = 0.2) -> RolloutTree:
    task = PathTask(horizon, payoff=lambda path: len(set(path)) / 3)
    (tree,) = collect(task, entropic_policy(stop), ByteTranscript(), questions(1), explorer, seed=seed, step=0)
    return tree


def place(tree: RolloutTree, node_id: int) -> tuple[int, int]:
    """What names a state whatever its id is."""
    return tree.nodes[node_id].trajectory, tree.nodes[node_id].depth


def forked(tree: RolloutTree, initial: int) -> list[tuple[int, int]]:
    """Where each trajectory after the initial ones started, in their order."""
    starts = {}
    for node in tree.nodes:
        if node.parent is not None and node.trajectory not in starts:
            starts[node.trajectory] = place(tree, node.parent)
    return [starts[number] for number in range(initial, tree.trajectories)]


# -- Tree-GRPO: credit ----------------------------------------------------------------------------


def two_trees() -> RolloutTree:
    """Tree 0: 0 -> 2 -> {3: 1, 4: 0}; tree 1: 1 -> {5: 0, 6: 0}."""
    sketch = Sketch()
    first, second = sketch.root(0), sketch.root(1)
    shared = sketch.edge(first, trajectory=0)
    sketch.edge(shared, reward=1.0, end=True, trajectory=0)
    sketch.edge(shared, reward=0.0, end=True, trajectory=2)
    sketch.edge(second, reward=0.0, end=True, trajectory=1)
    sketch.edge(second, reward=0.0, end=True, trajectory=3)
    return sketch.tree


def test_tree_grpo_adds_the_advantage_in_the_tree_to_that_over_the_question_and_sums_where_they_share():
    # Question: returns 1, 0, 0, 0, mean 1/4, sample std 1/2: 1.5, -0.5, -0.5, -0.5.
    # Tree 0: returns 1, 0, mean 1/2, sample std 1/sqrt(2): 0.70711, -0.70711. Tree 1: equal returns, 0.
    # Leaves: 2.20711, -1.20711, -0.5, -0.5. The shared action: 2.20711 - 1.20711 = 1.
    (advantage,) = tree_relative([two_trees()])
    assert advantage == pytest.approx([0, 0, 1, 2.20711, -1.20711, -0.5, -0.5], abs=1e-4)


def test_equal_returns_have_no_advantage_in_any_tree_method():
    sketch = Sketch()
    for root in [sketch.root(number) for number in range(3)]:
        number = sketch.tree.nodes[root].trajectory
        middle = sketch.edge(root, reward=0.1, trajectory=number)
        sketch.edge(middle, reward=0.6, end=True, trajectory=number)
        sketch.edge(middle, reward=0.6, end=True, trajectory=3 + number)
    for credit in (tree_relative, global_and_local, summed_group_normalised):
        (advantage,) = credit([sketch.tree])
        assert not advantage.any()


# -- Tree-GRPO: expansion --------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_tree_is_expanded_as_often_as_told_at_its_own_states(seed, trees, expansions, rounds):
    tree = grown(RandomExpansion(trees, expansions, rounds), seed)
    assert len(tree.roots()) == trees
    assert len(tree.leaves()) == trees * (1 + expansions * rounds)
    assert Counter(tree.path(leaf.id)[0].trajectory for leaf in tree.leaves()) == {
        number: 1 + expansions * rounds for number in range(trees)
    }


def test_expansion_draws_every_non_terminal_state_alike_and_no_other():
    # Per tree the root and two states; the leaf is never drawn. 3000 draws, 1/3 each: within 5 standard deviations.
    drawn: Counter[int] = Counter()
    for seed in range(1000):
        sketch = Sketch(RolloutTree(questions(1)[0], policy_version=0, seed=seed))
        state = sketch.root()
        states = [state, (state := sketch.edge(state)), (state := sketch.edge(state))]
        sketch.edge(state, end=True)
        chosen = RandomExpansion(trees=1, expansions=3).next(sketch.tree)
        assert len(chosen) == 3
        drawn.update(chosen)
    assert set(drawn) == set(states)
    assert all(abs(count - 1000) < 5 * (3000 * 1 / 3 * 2 / 3) ** 0.5 for count in drawn.values())


def test_a_second_round_draws_from_what_the_first_one_found():
    found = Counter(
        trajectory >= 2
        for seed in range(20)
        for trajectory, _ in forked(grown(RandomExpansion(2, 2, 2), seed, stop=0.0), 2)[4:]
    )
    assert found[True] and found[False]


# -- TreeRL ----------------------------------------------------------------------------------------


def chain(sketch: Sketch, number: int, *uncertainties: tuple[float, ...]) -> list[int]:
    """A root and one trajectory of it; -log p of the tokens of each action. Returns the states."""
    states = [sketch.root(number)]
    for surprises in uncertainties:
        add(sketch, states, number, Completion(tuple(range(len(surprises))), tuple(-x for x in surprises), "a", "stop"))
    add(sketch, states, number, Completion((7,), (-0.1,), "stop", "stop"), end=True)
    return states[:-1]


def add(sketch: Sketch, path: list[int], number: int, action: Completion, *, end: bool = False) -> None:
    parent = sketch.tree.nodes[path[-1]]
    state = after(parent.state, action.text)
    path.append(sketch.tree.add_child(parent.id, action, state, () if end else (9,), 0.0, end, False, number))


def test_treerl_forks_the_turns_with_the_least_likely_tokens_of_each_tree():
    sketch = Sketch()
    a = chain(sketch, 0, (1.0, 1.0), (0.0, 3.0, 0.0), (2.0,))
    b = chain(sketch, 1, (0.5,), (0.25, 0.25))
    # The least likely tokens of a's actions have -log p 1, 3, 2 and 0.1 (the answer); of b's 0.5, 0.25 and 0.1.
    # By the mean, a's first action would have come with the second (both 1).
    forks = UnlikelyTokenForking(trees=2, forks=2, branches=2).next(sketch.tree)
    assert forks == [a[1], a[1], a[2], a[2], b[0], b[0], b[1], b[1]]


def test_treerl_forks_again_where_a_tree_has_too_few_turns_and_never_at_a_forks_own_first_action():
    sketch = Sketch()
    (only,) = chain(sketch, 0)
    assert UnlikelyTokenForking(trees=1, forks=2, branches=1).next(sketch.tree) == [only, only]
    explorer = UnlikelyTokenForking(trees=1, forks=1, rounds=2, branches=1)
    assert explorer.next(sketch.tree) == [only]
    path = [only]
    add(sketch, path, 1, Completion((1,), (-9.0,), "a", "stop"))
    add(sketch, path, 1, Completion((1,), (-0.5,), "stop", "stop"), end=True)
    # -9 is of the fork's first action, which does not count; -0.5 is before -0.1, that of the first trajectory.
    assert explorer.next(sketch.tree) == [path[1]]
    add(sketch, [path[1]], 2, Completion((1,), (-0.5,), "stop", "stop"), end=True)
    assert explorer.next(sketch.tree) == []


def test_treerl_values_differ_from_the_question_and_from_the_parent():
    # Two trees: 0 -> 2 -> {3: 1, 4: 0}, 1 -> {5: 0, 6: 0}. V(root) = 1/4 for both roots; V(2) = 1/2, n = 2.
    # A(2) = sqrt(2) (2/2 - 1/4 - 1/4) = 0.70711; A(3) = 2 - 1/4 - 1/2 = 1.25; A(4) = 0 - 1/4 - 1/2 = -0.75;
    # A(5) = A(6) = 0 - 1/4 - 1/4 = -0.5.
    (advantage,) = global_and_local([two_trees()])
    assert advantage == pytest.approx([0, 0, 0.5**0.5, 1.25, -0.75, -0.5, -0.5])


def test_treerl_needs_log_probs():
    sketch = Sketch()
    chain(sketch, 0, (float("nan"),))
    with pytest.raises(PolicyError, match="this policy gives none"):
        UnlikelyTokenForking(trees=1).next(sketch.tree)


# -- ARPO ------------------------------------------------------------------------------------------


def thinking(*entropies: float, text: str = "a") -> Completion:
    return Completion(tuple(range(len(entropies))), (-1.0,) * len(entropies), text, "stop", entropies)


def wandering(*means: float) -> Sketch:
    """One trajectory whose actions have these entropies; the last one ends it."""
    sketch = Sketch()
    path = [sketch.root()]
    for number, mean in enumerate(means, start=1):
        add(sketch, path, 0, thinking(mean, mean), end=number == len(means))
    return sketch


def test_arpo_branches_where_entropy_rose_after_the_first_action():
    # A chance of 1/2 + 100 (H - H(root)) is certainty at state 1 (H = 2 > 1) and none at state 2 (H = 0.5 < 1).
    sketch = wandering(1.0, 2.0, 0.5)
    certain = EntropyRiseBranching(initial=1, rollouts=3, entropy_weight=100)
    assert certain.next(sketch.tree) == [1]
    add(sketch, [1], 1, thinking(0.0), end=True)
    assert certain.next(sketch.tree) == [0]  # nothing branches any more: the rest starts at the root
    add(sketch, [0], 2, thinking(0.0), end=True)
    assert certain.next(sketch.tree) == []


def test_arpo_looks_at_the_first_tokens_of_an_action_alone():
    sketch = Sketch()
    path = [sketch.root()]
    add(sketch, path, 0, thinking(1.0, 1.0))
    add(sketch, path, 0, thinking(2.0, 0.0, 0.0, 0.0), end=True)  # mean 2 of the first, 1 of two, 0.5 of all
    for window, forks in ((1, [1]), (4, [0])):
        explorer = EntropyRiseBranching(initial=1, rollouts=2, entropy_weight=100, window=window)
        assert explorer.next(sketch.tree) == forks


def test_arpo_spends_its_budget_on_shallow_states_and_branches_branches():
    # Everything branches: state 1 first, then state 2 and the branch's own second state, for which one is left.
    sketch = wandering(1.0, 1.0, 1.0)
    explorer = EntropyRiseBranching(initial=1, rollouts=3, branch_probability=1.0, entropy_weight=0)
    assert explorer.next(sketch.tree) == [1]
    path = [1]
    add(sketch, path, 1, thinking(1.0))
    add(sketch, path, 1, thinking(1.0), end=True)
    assert explorer.next(sketch.tree) == [2]
    assert replace(explorer, rollouts=4).next(sketch.tree) == [2, path[1]]


def synchronous(tree: RolloutTree, explorer: EntropyRiseBranching) -> list[tuple[int, int]]:
    """Where branches start, by ARPO's own loop: all trajectories act at once, and those that go on may branch."""
    own = {place(tree, node.id): node for node in reversed(tree.nodes)}

    def mean(action: Completion | None) -> float:
        assert action
        seen = action.entropies[: explorer.window]
        return sum(seen) / len(seen)

    depth_of = dict.fromkeys(range(explorer.initial), 0)
    active = list(depth_of)
    starts: list[tuple[int, int]] = []
    total = explorer.initial
    while active or total < explorer.rollouts:
        if not active:
            starts.append((0, 0))
            depth_of[total], active = 0, [total]
            total += 1
        for trajectory in active:
            depth_of[trajectory] += 1
        active = [number for number in active if not own[number, depth_of[number]].terminal]
        for trajectory in list(active):
            depth = depth_of[trajectory]
            state = own[trajectory, depth]
            rise = mean(own[trajectory, depth + 1].action) - mean(tree.path(state.id)[1].action)
            chance = random.Random(tree.seed_for("branch", trajectory, depth)).random()
            if total < explorer.rollouts and chance < explorer.branch_probability + explorer.entropy_weight * rise:
                starts.append((trajectory, depth))
                depth_of[total] = depth
                active.append(total)
                total += 1
    return starts


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(2, 12), st.sampled_from([0.0, 0.34, 5.0]), st.sampled_from([0.0, 0.5, 1]))
def test_arpo_branches_as_its_synchronous_loop_does(seed, initial, rollouts, weight, probability):
    explorer = EntropyRiseBranching(initial, max(initial, rollouts), probability, weight, window=3)
    tree = grown(explorer, seed)
    assert len(tree.leaves()) == explorer.rollouts
    assert forked(tree, initial) == synchronous(tree, explorer)


def test_arpo_sums_group_advantages_over_the_trajectories_that_share_an_action():
    # 0 -> 1 -> {2: 1, 3: 0}, 0 -> 4: 0, 0 -> 5: 1. Mean 1/2, sample std 1/sqrt(3): +- 0.86603.
    # Action 1 has the sum of 2's and 3's: 0.
    sketch = Sketch()
    root = sketch.root()
    shared = sketch.edge(root)
    sketch.edge(shared, reward=1.0, end=True)
    sketch.edge(shared, reward=0.0, end=True, trajectory=1)
    sketch.edge(root, reward=0.0, end=True, trajectory=2)
    sketch.edge(root, reward=1.0, end=True, trajectory=3)
    (advantage,) = summed_group_normalised([sketch.tree])
    assert advantage == pytest.approx([0, 0, 0.86603, -0.86603, -0.86603, 0.86603], abs=1e-4)


def test_arpo_asks_for_entropies_and_says_so_where_there_are_none():
    assert EntropyRiseBranching().needs_entropies and get_algorithm("arpo").requires == ("entropies",)
    sketch = Sketch()
    sketch.edge(sketch.edge(sketch.root()), end=True)
    with pytest.raises(PolicyError, match="one of question 'q0' has none; use backend transformers"):
        EntropyRiseBranching(initial=1).next(sketch.tree)


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, leaves", [("tree-grpo", 16), ("treerl", 15), ("arpo", 16)])
def test_leaves_of_the_default_settings(name, leaves):
    tree = grown(get_algorithm(name).explorer, seed=1)
    assert len(tree.leaves()) == leaves


@pytest.mark.parametrize("name", ALL)
def test_trees_are_reproducible_and_depend_on_their_seed(name):
    explorer = get_algorithm(name).explorer
    starts = [forked(grown(explorer, seed, stop=0.0), sum(explorer.roots())) for seed in (1, 1, 2)]
    assert starts[0] == starts[1] != starts[2]


SMALL: dict[str, Callable[[], Explorer]] = {
    "tree-grpo": lambda: RandomExpansion(2, 3),
    "treerl": lambda: UnlikelyTokenForking(2, 2),
    "arpo": lambda: EntropyRiseBranching(2, 5),
}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_what_is_forked_does_not_depend_on_the_order_in_which_results_arrived(name, seed):
    """Two trajectories with ties in everything, recorded one after the other or the other way round."""
    explorer = SMALL[name]()
    chosen = []
    for order in ((0, 1), (1, 0)):
        sketch = Sketch(RolloutTree(questions(1)[0], policy_version=0, seed=seed))
        roots = [sketch.root(number) for number in range(len(explorer.roots()))]
        for number in order:
            path = [roots[number % len(roots)]]  # two trees of one trajectory, or one of two
            for turn in range(4):
                add(sketch, path, number, thinking(1.0 if turn % 2 else 2.0), end=turn == 3)
        chosen.append([place(sketch.tree, node) for node in explorer.next(sketch.tree)])
    assert chosen[0] == chosen[1] != []


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("tree-grpo", {"trees": 0}, "trees must be an integer >= 1, not 0"),
        ("tree-grpo", {"expansions": 0}, "expansions must be an integer >= 1, not 0"),
        ("tree-grpo", {"rounds": 1.5}, "rounds must be an integer >= 1, not 1.5"),
        ("treerl", {"forks": 0}, "forks must be an integer >= 1"),
        ("treerl", {"branches": True}, "branches must be an integer >= 1, not True"),
        ("treerl", {"clip_high": -1}, "clip_high"),
        ("arpo", {"initial": 0}, "initial must be an integer >= 1"),
        ("arpo", {"initial": 9, "rollouts": 8}, r"at least 2 and at least initial \(9\), not 8"),
        ("arpo", {"initial": 1, "rollouts": 1}, "rollouts must be at least 2"),
        ("arpo", {"branch_probability": 1.1}, "branch_probability must be a number from 0 to 1, not 1.1"),
        ("arpo", {"entropy_weight": -0.1}, "entropy_weight must be a number >= 0, not -0.1"),
        ("arpo", {"window": 0}, "window must be an integer >= 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        get_algorithm(name, **overrides)
