"""CARL's ablations and the control with shuffled advantages, on trees made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from rollout_toys import ByteTranscript, PathTask, Sketch, action, after, questions, random_policy

from carl_gym.agents.policy import Completion
from carl_gym.algorithms import get_algorithm
from carl_gym.algorithms.controls import with_shuffled_advantages
from carl_gym.errors import ConfigError, PolicyError
from carl_gym.rollouts import EntropyForking, RandomForking, RolloutTree, collect


def uneven() -> RolloutTree:
    """0 -> 1 -> {2, 3 -> {4, 5}}: three leaves of returns 1, 0 and 0, two of them behind the same action."""
    sketch = Sketch()
    one = sketch.edge(sketch.root())
    sketch.edge(one, reward=1.0, end=True)
    three = sketch.edge(one, trajectory=1)
    sketch.edge(three, end=True, trajectory=1)
    sketch.edge(three, end=True, trajectory=2)
    return sketch.tree


def credit(name: str, tree: RolloutTree) -> list[float]:
    return get_algorithm(name).credit([tree])[0].tolist()


def test_leaf_weighted_values_count_leaves_and_plain_ones_count_children():
    # Plain: V(3) = 0, V(1) = (1 + 0) / 2. Leaf-weighted: V(1) = 1/3, over three leaves.
    assert credit("carl", uneven()) == pytest.approx([0, 0, 1 / 2, -1 / 2, 0, 0])
    assert credit("carl-leaf-weighted", uneven()) == pytest.approx([0, 0, 2 / 3, -1 / 3, 0, 0])


def test_leave_one_out_compares_an_action_with_its_siblings_alone():
    algorithm = get_algorithm("carl-lite", advantage="leave-one-out")
    assert algorithm.credit([uneven()])[0].tolist() == pytest.approx([0, 0, 1, -1, 0, 0])


def test_the_outcome_reward_on_the_tree_is_the_mean_over_the_leaves_below():
    # Returns 1, 0, 0: mean 1/3, sample std sqrt(1/3); (1 - 1/3) / sqrt(1/3) = 2 / sqrt(3), the others -1 / sqrt(3).
    high, low = 2 / np.sqrt(3), -1 / np.sqrt(3)
    assert credit("carl-lite-outcome", uneven()) == pytest.approx([0, 0, high, low, low, low], abs=1e-5)
    assert get_algorithm("carl-outcome").selection([uneven()])[0].tolist() == [False, False, True, True, True, True]


def test_update_all_inherits_the_advantage_before_and_drops_what_has_none():
    sketch = Sketch()
    one = sketch.edge(sketch.root())  # before the first fork: nothing to inherit
    two = sketch.edge(one)
    sketch.edge(sketch.edge(two), reward=1.0, end=True)
    three = sketch.edge(one, trajectory=1)
    sketch.edge(three, end=True, trajectory=1)
    other = sketch.edge(sketch.root(3), trajectory=3)
    tree = sketch.tree
    assert [tree.nodes[other].parent, other] == [7, 8]
    for name in ("carl-update-all", "carl-lite-update-all"):
        algorithm = get_algorithm(name)
        assert algorithm.credit([tree])[0].tolist() == pytest.approx([0, 0, 1 / 2, 1 / 2, 1 / 2, -1 / 2, -1 / 2, 0, 0])
        assert algorithm.selection([tree])[0].tolist() == [False, False, *[True] * 5, False, False]


def test_names_are_settings_of_carl():
    for prefix, initial in (("carl", 8), ("carl-lite", 1)):
        assert get_algorithm(f"{prefix}-random-fork").explorer == RandomForking(initial, 16)
        assert get_algorithm(f"{prefix}-token-sum").explorer == EntropyForking(initial, 16, measure="sum")
    exact = get_algorithm("carl-lite", fork_by="exact-entropy")
    assert (exact.explorer, exact.requires) == (EntropyForking(1, 16, measure="exact"), ("entropies",))


def add(tree: RolloutTree, parent: int, completion: Completion) -> int:
    state = after(tree.nodes[parent].state, "x")
    return tree.add_child(parent, completion, state, (9,), 0.0, False, False, 0)


def test_each_measure_of_entropy_forks_another_state():
    sketch = Sketch()
    root = sketch.root()
    # Per token .9 against .5; summed .9 against 2.0; exact .2 against .1 and then .8.
    one = add(sketch.tree, root, Completion((1,), (-0.9,), "x", "stop", (0.2,)))
    two = add(sketch.tree, one, Completion((1, 2, 3, 4), (-0.5,) * 4, "x", "stop", (0.1,) * 4))
    add(sketch.tree, two, Completion((1,), (-0.1,), "x", "stop", (0.8,)))
    chosen = {measure: EntropyForking(1, 1, measure=measure).next(sketch.tree) for measure in ("mean", "sum", "exact")}
    assert chosen == {"mean": [root], "sum": [one], "exact": [two]}


def test_exact_entropies_that_a_policy_does_not_give_are_missed_loudly():
    sketch = Sketch()
    add(sketch.tree, sketch.root(), action(-0.5))
    with pytest.raises(PolicyError, match="needs a policy that gives entropies"):
        EntropyForking(1, 1, measure="exact").next(sketch.tree)
    with pytest.raises(ConfigError, match="measure must be one of mean, sum, exact, not 'top-k'"):
        EntropyForking(measure="top-k")


def test_shuffling_keeps_the_advantages_and_forgets_whose_they_are():
    def pay(path: tuple[str, ...]) -> float:
        return float(len(path) == 5 and path.count("a") > 1)

    algorithm = get_algorithm("carl-lite", forks=8)
    trees = collect(
        PathTask(5, pay), random_policy(stop=0.0), ByteTranscript(), questions(40), algorithm.explorer, seed=1, step=0
    )
    control = with_shuffled_advantages(algorithm)
    assert control.selection is algorithm.selection and "shuffled" in control.name
    selected = algorithm.selection(trees)

    def trained(advantages: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([a[mask] for a, mask in zip(advantages, selected, strict=True)])

    real, shuffled = trained(algorithm.credit(trees)), trained(control.credit(trees))
    assert sorted(real) == sorted(shuffled) and (real != 0).sum() > 100
    assert abs(np.corrcoef(real, shuffled)[0, 1]) < 4 / np.sqrt(len(real))
    assert (trained(control.credit(trees)) == shuffled).all()  # the same draw for the same trees
    for advantage, mask in zip(control.credit(trees), selected, strict=True):
        assert not advantage[~mask].any()


@pytest.mark.parametrize("settings", [{"forks": 0}, {"forks": 0, "initial": 1, "root": "merged"}])
def test_a_tree_without_siblings_is_refused(settings):
    with pytest.raises(ConfigError, match="forks=0 has no siblings to compare"):
        get_algorithm("carl", **settings)
