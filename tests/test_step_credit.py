"""Step credit without trees: advantages of hand-made rollouts, worked out in the comments, and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, after, questions, random_policy

from carl_gym.agents.policy import Completion
from carl_gym.algorithms import Algorithm, get_algorithm, group_normalised
from carl_gym.algorithms.anchors import same_situation, same_transition
from carl_gym.algorithms.credit import relative, returns_to_go
from carl_gym.algorithms.empg import empg
from carl_gym.algorithms.gigpo import gigpo
from carl_gym.algorithms.hgpo import hgpo
from carl_gym.algorithms.igpo import igpo
from carl_gym.algorithms.salt import salt
from carl_gym.envs.state import EnvState
from carl_gym.errors import ConfigError, StateError
from carl_gym.rollouts import RolloutTree, RootExplorer, collect

FACTORIES = (gigpo, hgpo, salt, igpo, empg)


def rollouts(*trajectories: tuple[str, float], entropies: str = "") -> RolloutTree:
    """Independent rollouts of one question: steps such as "a:x b:y c" (action a shows observation x, ...), and returns.

    Nodes are numbered along the trajectories, from 1 on. The texts of two actions never agree, what the environment
    understood does.

    Args:
        trajectories: steps, and what the last of them pays.
        entropies: one for each action, as numbers with blanks; by default 1 each, and then as the tree's own h.
    """
    tree = RolloutTree(questions(1)[0], policy_version=0, seed=7)
    root = tree.add_root(EnvState("q0"), (1, 2, 3))
    exact = iter(map(float, entropies.split()))
    for number, (steps, total) in enumerate(trajectories):
        here, words = root, steps.split()
        for index, word in enumerate(words):
            name, _, seen = word.partition(":")
            last = index == len(words) - 1
            told = (next(exact),) if entropies else ()
            tokens = Completion((len(tree.nodes),), (-1.0,), f"{name}, thought {len(tree.nodes)}", "stop", told)
            here = tree.add_child(
                here,
                tokens,
                after(tree.nodes[here].state, name),
                () if last else tuple(seen.encode()),
                total if last else 0.0,
                last,
                False,
                number,
            )
    return tree


def credit(algorithm: Algorithm, *trees: RolloutTree) -> list[float]:
    """The advantages of all actions, tree by tree, after a look at what is no action."""
    found = algorithm.credit(trees)
    assert [len(advantage) for advantage in found] == [len(tree.nodes) for tree in trees]
    assert all(advantage[0] == 0 for advantage in found)
    return [float(x) for advantage in found for x in advantage[1:]]


# Anchors


def test_actions_meet_where_the_agent_observes_the_same():
    # Observed at 1 x, 2 y, 3 end; 4 x, 5 x, 6 end; 7 y, 8 x, 9 end. Actions are named by where they led.
    tree = rollouts(("a:x b:y c", 1.0), ("a:x d:x e", 0.0), ("f:y g:x h", 0.0))
    assert same_situation(tree) == [[1, 4, 7], [2, 5, 6, 9], [3, 8]]
    # last two observations: (root, x): 2, 5; (x, y): 3; (x, x): 6; (root, y): 8; (y, x): 9
    assert same_situation(tree, 2) == [[2, 5], [3], [6], [8], [9]]
    assert same_situation(tree, 3) == [[3], [6], [9]]
    assert same_situation(tree, 4) == []


def test_equal_transitions_share_state_action_and_next_state():
    # a leads from the root to x twice, and once to y; from x, b ends twice and leads to z once.
    tree = rollouts(("a:x b", 1.0), ("a:x b", 0.0), ("a:y b", 0.0), ("c:x b:z d", 0.0))
    assert same_transition(tree) == [[1, 3], [2, 4], [5], [6], [7], [8], [9]]


def test_an_action_that_the_environment_did_not_record_is_known_by_its_text():
    tree = RolloutTree(questions(1)[0], policy_version=0)
    root = tree.add_root(EnvState("q0"), (1,))
    for text in ("go", "stay", "go"):
        tree.add_child(root, Completion((5,), (-1.0,), text, "stop"), EnvState("q0"), (), 0.0, True, False, 0)
    assert same_transition(tree) == [[1, 3], [2]]


def test_scores_relative_to_a_group():
    # Mean 2; sample variance (1 + 0 + 1)/2 = 1, the group's own 2/3.
    scores = np.array([1.0, 2.0, 3.0])
    assert relative(scores) == pytest.approx([-1, 0, 1], abs=1e-5)
    assert relative(scores, ddof=0) == pytest.approx([-1.2247449, 0, 1.2247449], abs=1e-5)
    assert relative(scores, scaled=False).tolist() == [-1, 0, 1]
    assert relative(np.array([0.1, 0.1, 0.1])).tolist() == [0, 0, 0]
    assert relative(np.array([5.0]), scaled=False).tolist() == [0]


def test_discounted_returns_to_go():
    # R = 1, 0.5, 0.25 from the end of the first rollout; 0 at the root.
    assert returns_to_go(rollouts(("a:x b:y c", 1.0), ("d", 0.5)), 0.5).tolist() == [0, 0.25, 0.5, 1, 0.5]


# GiGPO

GROUPS = rollouts(("a:x b", 1.0), ("a:x c", 0.0), ("d:x e:y f", 1.0))
"""Nodes 1, 2; 3, 4; 5, 6, 7."""


def test_gigpo_adds_the_advantage_among_actions_of_the_same_state():
    # Episodes: mean 2/3: 1/3, -2/3, 1/3. Discounted by 1/2: .5 1; 0 0; .25 .5 1.
    # Root {.5, 0, .25}: .25, -.25, 0. x {1, 0, .5}: .5, -.5, 0. y {1}: 0.
    third = 1 / 3
    expected = [third + 0.25, third + 0.5, -2 * third - 0.25, -2 * third - 0.5, third, third, third]
    assert credit(gigpo(gamma=0.5, norm="none"), GROUPS) == pytest.approx(expected)


def test_gigpo_scales_by_the_standard_deviation_of_each_group():
    # Episodes: sample variance (1/9 + 4/9 + 1/9)/2 = 1/3: .57735, -1.15470, .57735. Root: std .25; x: std .5: 1, -1, 0.
    a = 0.5773503
    expected = [a + 2, a + 2, -2 * a - 2, -2 * a - 2, a, a, a]
    assert credit(gigpo(gamma=0.5, step_weight=2.0), GROUPS) == pytest.approx(expected, abs=1e-4)


def test_gigpo_without_step_weight_is_grpo():
    assert credit(gigpo(step_weight=0.0), GROUPS) == group_normalised([GROUPS])[0][1:].tolist()


SHAPES = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.0, 0.25, 1.0])), min_size=2, max_size=6)


def without_repeats(shapes: list[tuple[int, float]]) -> RolloutTree:
    """Rollouts of given lengths and returns, in which every observation and every action comes once."""
    steps = [
        (" ".join(f"a{number}.{step}:o{number}.{step}" for step in range(length)), total)
        for number, (length, total) in enumerate(shapes)
    ]
    return rollouts(*steps)


@settings(max_examples=50, deadline=None)
@given(SHAPES)
def test_gigpo_without_repeated_states_is_the_episode_part_and_the_root_group(shapes):
    tree = without_repeats(shapes)
    (episode,) = group_normalised([tree])
    (advantage,) = gigpo(gamma=0.9).credit([tree])
    first = [node.id for node in tree.nodes if node.depth == 1]
    expected = episode.copy()
    expected[first] += relative(returns_to_go(tree, 0.9)[first])
    assert advantage == pytest.approx(expected)


# HGPO


def test_hgpo_weighs_groups_of_longer_common_history_more():
    # 1 x, 2 z, 3; 4 x, 5 z, 6; 7 y, 8 z, 9. Returns 1, 0, .5 at gamma 1.
    tree = rollouts(("a:x b:z c", 1.0), ("a:x d:z e", 0.0), ("f:y g:z h", 0.5))
    # Same state, weight 2: root {1, 0, .5}, own std sqrt(1/6): u, -u, 0 with u = 1.2247449; x {1, 0}: 1, -1; y alone;
    # z {1, 0, .5}: u, -u, 0. Two observations, weight 3: (root, x): 1, -1; (x, z): 1, -1; the others are alone.
    # c: (2 u + 3)/5 = 1.0898980. h has the mean return in z and is alone in (y, z).
    u, c = 1.2247449, 1.0898980
    expected = [u, 1, c, -u, -1, -c, 0, 0, 0]
    assert credit(hgpo(history=1, gamma=1.0), tree) == pytest.approx(expected, abs=1e-5)
    # With A_0 = 1, -1, 0 (sample std .5) of weight 1: a: (1 + 2 u)/3; b: (1 + 2 + 3)/6; c: (1 + 2 u + 3)/6.
    a, c = 1.1498299, 1.0749150
    expected = [a, 1, c, -a, -1, -c, 0, 0, 0]
    assert credit(hgpo(history=1, gamma=1.0, episode_group=True), tree) == pytest.approx(expected, abs=1e-5)


def test_hgpo_gives_no_weight_to_a_group_that_says_nothing():
    # In z, c has the mean return (.5 of 1, 0, .5), so only (x, z) {.5, 0} counts: 1, not (2 * 0 + 3 * 1)/5.
    tree = rollouts(("a:x b:z c", 0.5), ("a:x d:z e", 0.0), ("f:y g:z h", 1.0))
    advantage = credit(hgpo(history=1, gamma=1.0), tree)
    assert advantage[2] == pytest.approx(1, abs=1e-5)
    # exponent 0: e = (-u - 1)/2 with u = 1.2247449.
    assert credit(hgpo(history=1, gamma=1.0, exponent=0.0), tree)[5] == pytest.approx(-1.1123724, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.integers(0, 3))
def test_hgpo_without_repeated_states_compares_at_the_root_alone(shapes, history):
    tree = without_repeats(shapes)
    (advantage,) = hgpo(history=history).credit([tree])
    first = [node.id for node in tree.nodes if node.depth == 1]
    expected = np.zeros(len(tree.nodes))
    expected[first] = relative(returns_to_go(tree, 0.95)[first], ddof=0)
    assert advantage == pytest.approx(expected)


# SALT


def test_salt_averages_equal_transitions():
    # GRPO: mean 2/3, sample std sqrt(1/3): .5773503, -1.1547005, .5773503. (root, a, x) is shared by a good and a bad
    # rollout: -.2886751. (x, b, end) by two good ones; c and d were taken once.
    tree = rollouts(("a:x b", 1.0), ("a:x c", 0.0), ("d:x b", 1.0))
    good, bad = 0.5773503, -1.1547005
    expected = [(good + bad) / 2, good, (good + bad) / 2, bad, good, good]
    assert credit(salt(), tree) == pytest.approx(expected, abs=2e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_salt_keeps_the_sum_of_advantages_and_every_group_has_one(seed):
    trees = sampled(seed)
    for tree, before, after_ in zip(trees, group_normalised(trees), salt().credit(trees), strict=True):
        assert after_.sum() == pytest.approx(before.sum(), abs=1e-9)
        for group in same_transition(tree):
            assert np.ptp(after_[group]) == 0


@given(SHAPES)
@settings(max_examples=30, deadline=None)
def test_salt_without_repeated_transitions_is_grpo(shapes):
    tree = without_repeats(shapes)
    assert credit(salt(), tree) == pytest.approx(group_normalised([tree])[0][1:])


def sampled(seed: int) -> list[RolloutTree]:
    """Rollouts of a small world in which states and actions come up again and again."""

    def payoff(path: tuple[str, ...]) -> float:
        return len(set(path)) / 3 if len(path) == 4 or path[-1] == "stop" else 0.0

    task = PathTask(4, payoff)
    return collect(task, random_policy(), ByteTranscript(), questions(2), RootExplorer(5), seed=seed, step=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_advantages_among_actions_of_a_state_sum_to_zero(seed):
    trees = sampled(seed)
    episodes = gigpo(step_weight=0.0).credit(trees)
    for tree, episode, both in zip(trees, episodes, gigpo().credit(trees), strict=True):
        for group in same_situation(tree):
            assert (both - episode)[group].sum() == pytest.approx(0, abs=1e-9)


# IGPO


def believed() -> RolloutTree:
    """Two rollouts of two turns. How likely the answer is: .2 at the root, .5 after a (return 1), .1 after c (0)."""
    tree = rollouts(("a:x b", 1.0), ("c:y d", 0.0))
    tree.scores["answer_logprob"] = np.log([0.2, 0.5, np.nan, 0.1, np.nan])
    return tree


def test_igpo_normalises_gains_and_outcomes_together_and_sums_them_to_the_end():
    # r: .3 1; -.1 0. Mean .3, variance (0 + .49 + .16 + .09)/4 = .185, std .4301163: 0, 1.627467, -.929981, -.697486.
    # gamma 1/2: a: 0 + 1.627467/2; c: -.929981 - .697486/2.
    expected = [0.813734, 1.627467, -1.278724, -0.697486]
    assert credit(igpo(gamma=0.5), believed()) == pytest.approx(expected, abs=1e-5)


def test_igpo_can_normalise_gains_and_outcomes_apart():
    # Gains .3, -.1: 1, -1; outcomes 1, 0: 1, -1; a: 1 + 1.
    assert credit(igpo(pool="separate"), believed()) == pytest.approx([2, 1, -2, -1], abs=1e-4)


def test_igpo_can_take_gains_of_log_probabilities():
    # Root -2; after a -1, after c -2, after e -3: gains 1, 0, -1, own std sqrt(2/3): u = 1.2247449. Outcomes 0, 0, 0.
    tree = rollouts(("a:x b", 0.0), ("c:y d", 0.0), ("e:z f", 0.0))
    tree.scores["answer_logprob"] = np.array([-2.0, -1, np.nan, -2, np.nan, -3, np.nan])
    expected = [1.2247449, 0, 0, 0, -1.2247449, 0]
    assert credit(igpo(gain="logprob", pool="separate"), tree) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_igpo_with_nothing_to_gain_is_grpo(shapes):
    tree = without_repeats(shapes)
    tree.scores["answer_logprob"] = np.array([math.nan if node.terminal else -1.0 for node in tree.nodes])
    ends = [node.id for node in tree.leaves()]
    outcome = dict(zip(ends, relative(np.array([tree.nodes[end].reward for end in ends]), ddof=0), strict=True))
    (advantage,) = igpo(pool="separate").credit([tree])
    for end in ends:
        for node in tree.path(end)[1:]:
            assert advantage[node.id] == pytest.approx(outcome[end])


def test_igpo_says_whose_answers_were_not_scored():
    unknown = believed()
    unknown.scores["answer_logprob"][1] = np.nan  # an action was taken there
    for tree in (rollouts(("a", 1.0), ("b", 0.0)), unknown):
        with pytest.raises(StateError, match=r"'q0'.*answer_logprob"):
            igpo().credit([tree])


# EMPG


def test_empg_modulates_by_entropy_over_the_whole_batch():
    # GRPO on returns 1, 0: a = .7071058 and -a (std .7071068, + 1e-6). H = 0 4 0 0 over both trees: H' = 0 1 0 0.
    # k = ln 2: exp(-k H') = 1 .5 1 1, mean .875: g = 8/7 4/7 8/7 8/7. k' = ln 4: f = 1 .25 1 1. zeta = .1.
    # A_mod: 8a/7 + .025; 4a/7; -8a/7 + .1; -8a/7. Their mean is (-4a/7 + .125)/4 = -.0697651.
    tree = rollouts(("a:x b", 1.0), ("c:y d", 0.0), entropies="0 4 0 0")
    algorithm = empg(scaling=math.log(2), clarity_scaling=math.log(4))
    expected = [0.9028860, 0.4738255, -0.6383558, -0.7383558]
    assert credit(algorithm, tree) == pytest.approx(expected, abs=1e-6)
    # A tree of its own, with A = 0, moves the minimum to -4: H' = .5 1 .5 .5, and 0 for its one action.
    # exp(-k H') = v .5 v v 1 with v = .7071068, mean (3 v + 1.5)/5 = .7242641; f = .5 .25 .5 .5; A_mod:
    # a v/.7242641 + .025 = .7153549; a .5/.7242641 = .4881545; -.6903549 + .05 = -.6403549; -.6903549; 0.
    # Their mean is -.0254401.
    alone = rollouts(("e", 0.0), entropies="-4")
    expected = [0.7407950, 0.5135946, -0.6149148, -0.6649148, 0.0254401]
    assert credit(algorithm, tree, alone) == pytest.approx(expected, abs=1e-6)


def test_empg_falls_back_on_sampled_entropies():
    # Every action has h = 1, so g = f = 1; zeta = .1 goes to the two first actions, the mean .05 from all.
    algorithm = empg(measure="sampled")
    assert algorithm.requires == () and algorithm.explorer == RootExplorer(16)
    tree = rollouts(("a:x b", 1.0), ("c:y d", 0.0))
    a = 0.7071058
    assert credit(algorithm, tree) == pytest.approx([a + 0.05, a - 0.05, -a + 0.05, -a - 0.05], abs=1e-6)


def test_empg_asks_for_entropies():
    algorithm = empg(rollouts=3)
    assert algorithm.requires == ("entropies",)
    assert algorithm.explorer.needs_entropies and list(algorithm.explorer.roots()) == [3]


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 10_000))
def test_empg_is_centred_and_without_modulation_it_is_grpo_about_its_mean(shapes, seed):
    rng = np.random.default_rng(seed)
    entropies = " ".join(map(str, rng.exponential(size=sum(length for length, _ in shapes))))
    steps = [(" ".join(f"a:o{step}" for step in range(length)), total) for length, total in shapes]
    tree = rollouts(*steps, entropies=entropies)
    assert np.mean(credit(empg(), tree)) == pytest.approx(0, abs=1e-9)
    plain = group_normalised([tree])[0][1:]
    flat = credit(empg(scaling=0.0, clarity_weight=0.0), tree)
    assert flat == pytest.approx(plain - plain.mean(), abs=1e-6)


# Settings


@pytest.mark.parametrize("factory", FACTORIES)
def test_they_run_on_independent_rollouts_and_train_every_action(factory):
    algorithm = get_algorithm(factory.__name__, rollouts=4)
    assert algorithm.name == factory.__name__
    assert list(algorithm.explorer.roots()) == [4] and algorithm.explorer.next(GROUPS) == []
    assert [mask.tolist() for mask in algorithm.selection([GROUPS])] == [[False, *[True] * 7]]


@pytest.mark.parametrize(
    ("factory", "wrong", "named"),
    [
        *[(factory, {"rollouts": 1}, "rollouts must be at least 2") for factory in FACTORIES],
        *[(factory, {"rollouts": 0}, "rollouts must be an integer") for factory in FACTORIES],
        (gigpo, {"gamma": 1.1}, "gamma"),
        (gigpo, {"gamma": "high"}, "gamma"),
        (gigpo, {"step_weight": -1.0}, "step_weight"),
        (gigpo, {"step_weight": math.inf}, "step_weight"),
        (gigpo, {"norm": "var"}, "norm must be one of std, none"),
        (hgpo, {"history": -1}, "history"),
        (hgpo, {"history": 1.5}, "history"),
        (hgpo, {"exponent": math.nan}, "exponent"),
        (hgpo, {"gamma": -0.1}, "gamma"),
        (hgpo, {"episode_group": "yes"}, "episode_group"),
        (igpo, {"gamma": 2.0}, "gamma"),
        (igpo, {"gain": "bits"}, "gain must be one of probability, logprob"),
        (igpo, {"pool": "none"}, "pool must be one of joint, separate"),
        (empg, {"scaling": -1.0}, "scaling"),
        (empg, {"clarity_scaling": math.inf}, "clarity_scaling"),
        (empg, {"clarity_weight": math.nan}, "clarity_weight"),
        (empg, {"measure": "guessed"}, "measure must be one of exact, sampled"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(factory, wrong, named):
    with pytest.raises(ConfigError, match=named):
        factory(**wrong)
