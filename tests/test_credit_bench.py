"""The credit bench: its estimators on what can be worked out, and the facts that it must show."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.credit_bench import (
    QUICK,
    Options,
    Running,
    StateForking,
    ValueSums,
    answer_logprob,
    bench_of,
    by_explorer,
    collected,
    main,
    make_bench,
    measure,
    parse_algorithm,
    rank_correlation,
    references,
)
from carl_gym.agents.tabular import backward, enumerate_mdp
from carl_gym.algorithms import get_algorithm
from carl_gym.envs.critical_tree import CriticalTask, CriticalTreeSettings
from carl_gym.errors import ConfigError
from carl_gym.evaluation.estimates import CellSums, cosine_of_mean, mean_and_error, mean_cosine, ratio_and_error
from carl_gym.rollouts import EntropyForking, RandomForking

SMALL = replace(Options(**QUICK), batches=40, batch_actions=400)


# -- estimators ----------------------------------------------------------------------------------------


def test_bias_and_variance_of_a_cell_worked_by_hand():
    """One cell, exact value 1, two batches: estimates {2, 4} and {3}.

    Errors {1, 3} and {2}: mse = (1 + 9 + 4) / 3 = 14/3. Pairs from different batches: (1 * 2 + 3 * 2) * 2 / 4 = 4, so
    bias = 2 and sd^2 = 14/3 - 4 = 2/3. Best factor: (2 + 4 + 3) / (4 + 16 + 9) = 9/29.
    """
    sums = CellSums(2)
    sums.add(np.array([0, 0]), np.array([2.0, 4.0]))
    sums.add(np.array([0]), np.array([3.0]))
    exact = np.array([1.0, 5.0])  # the second cell never comes up
    assert sums.errors(exact) == pytest.approx((2, math.sqrt(2 / 3), math.sqrt(14 / 3), 1))
    assert sums.best_factor(exact) == pytest.approx(9 / 29)


def test_cells_of_one_batch_count_nowhere():
    sums = CellSums(2)
    sums.add(np.array([0, 0, 1]), np.array([9.0, 9.0, 1.0]))
    assert all(map(math.isnan, sums.errors(np.ones(2)))) and CellSums(1).best_factor(np.ones(1)) == 0
    sums.add(np.array([1]), np.array([1.0]))
    assert sums.errors(np.ones(2)) == pytest.approx((0, 0, 0, 1))


def test_bias_is_found_below_the_noise():
    """500 cells, each estimated once in each of 40 batches with bias 0.3 and sd 1; without bias it comes out near 0."""
    rng = np.random.default_rng(0)
    exact = rng.normal(size=500)
    for bias in (0.0, 0.3):
        sums = CellSums(500)
        for _ in range(40):
            sums.add(np.arange(500), exact + bias + rng.normal(size=500))
        found, sd, rmse, size = sums.errors(exact)
        assert abs(found - bias) < 0.06 and abs(sd - 1) < 0.02
        assert rmse**2 == pytest.approx(found**2 + sd**2) and size == pytest.approx(np.sqrt(np.mean(exact**2)))


def test_the_cosine_of_the_mean_is_cleared_of_noise():
    """E[g] at 60 degrees to the vector: cosine 0.5, although single draws are nearly orthogonal to it."""
    rng = np.random.default_rng(1)
    mean = np.zeros(1000)
    mean[:2] = 0.5, math.sqrt(0.75)
    draws = mean + 0.3 * rng.normal(size=(200, 1000))
    value, error = cosine_of_mean(draws @ draws.T, draws[:, 0], 1.0)
    assert error < 0.05 and abs(value - 0.5) < 4 * error
    assert mean_cosine(draws @ draws.T, draws[:, 0], 1.0)[0] < 0.1
    assert all(map(math.isnan, cosine_of_mean(np.eye(4), np.ones(4), 1.0)))  # no two draws have anything in common


def test_a_batch_without_gradient_has_cosine_0():
    gram = np.array([[4.0, 0.0], [0.0, 0.0]])
    assert mean_cosine(gram, np.array([2.0, 0.0]), 1.0) == (0.5, 0.5)  # of 1 and 0: sd sqrt(1/2), over sqrt(2)


def test_means_and_ratios_with_their_errors():
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)  # sd sqrt(2), over sqrt(2)
    assert all(map(math.isnan, mean_and_error([])))
    # Rows (x, y) = (1, 1), (3, 1), (2, 2): ratio 6/4; residuals -0.5, 1.5, -1; sqrt(3/2 * 3.5) / 4.
    assert ratio_and_error(np.array([[1.0, 1.0], [3.0, 1.0], [2.0, 2.0]])) == pytest.approx((1.5, math.sqrt(5.25) / 4))
    assert all(map(math.isnan, ratio_and_error(np.array([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0]]))))


def test_rank_correlation_with_weights():
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 20, 40]), np.ones(3)) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1]), np.array([1.0, 5, 2])) == pytest.approx(-1)
    # Ranks 1, 2, 3 against 1, 3, 2: Spearman 1/2; the same where a state counts as if it stood there twice.
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2]), np.ones(3)) == pytest.approx(0.5)
    doubled = rank_correlation(np.array([1.0, 2, 3, 3]), np.array([1.0, 3, 2, 2]), np.ones(4))
    weighted = rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2]), np.array([1.0, 1, 2]))
    assert weighted == pytest.approx(doubled)


# -- what goes in --------------------------------------------------------------------------------------


def test_algorithms_with_settings():
    merged = parse_algorithm("carl(root=merged, initial=4)")
    assert merged.name == "carl(root=merged, initial=4)" and merged.explorer == EntropyForking(4, 16, root="merged")
    assert parse_algorithm("grpo").name == "grpo"
    for text in ("no such", "carl(no_such=1)", "carl(root=merged", "no-such"):
        with pytest.raises(ConfigError):
            parse_algorithm(text)
    with pytest.raises(ConfigError, match="no_such"):
        main(replace(SMALL, settings=("no_such",)))
    for wrong in ({"batches": 1}, {"batch_actions": 0}, {"seed": -1}, {"value_noise": -0.1}, {"threshold": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            main(replace(SMALL, **wrong))


def test_algorithms_with_equal_explorers_share_trees():
    names = [[a.name for a in group] for group in by_explorer([*map(get_algorithm, ("carl", "grpo", "carl-outcome"))])]
    assert names == [["carl", "carl-outcome"], ["grpo"]]


def test_batches_have_as_many_trees_as_make_the_actions():
    """Trees of n rollouts of 4 actions; a batch has about 400 actions, and at least one tree."""
    bench = make_bench("middling", SMALL)
    for rollouts, trees in ((16, 6), (3, 33), (200, 1)):
        (result,), _, _ = measure(bench, [get_algorithm("grpo", rollouts=rollouts)], replace(SMALL, batches=2))
        assert (result.trees_per_batch, result.actions_per_batch) == (trees, trees * rollouts * 4)


def test_the_answer_is_known_as_far_as_the_trail_was_followed():
    """Two critical turns, three options: ln(1/3) per token before the first one, half of it after one right turn."""
    task = CriticalTask(CriticalTreeSettings(turns=3, critical=(1, 2), slips=0.0, trees=1))
    start = task.initial(task.questions["tree0"])
    assert answer_logprob(task, start) == pytest.approx(-math.log(3))
    following = [task.transition(start, text) for text in task.actions]
    assert sorted(answer_logprob(task, state) for state in following) == pytest.approx(
        [-math.log(3), -math.log(3), -math.log(3) / 2]
    )
    right = max(following, key=lambda state: answer_logprob(task, state))
    assert max(answer_logprob(task, task.transition(right, text)) for text in task.actions) == pytest.approx(0)


def test_trees_carry_exact_scores_and_nan_at_their_ends():
    bench = make_bench("middling", SMALL)
    batch = collected(bench, get_algorithm("carl").explorer, SMALL, step=0, count=3)
    for tree, edges in zip(batch.trees, batch.edges, strict=True):
        assert len(edges.nodes) == tree.actions_generated
        for node in tree.nodes:
            v, known = tree.scores["state_value"][node.id], tree.scores["answer_logprob"][node.id]
            if node.terminal:
                assert math.isnan(v) and math.isnan(known)
            else:
                assert v == bench.exact.v[bench.policy.state(node.observation_tokens)]
                assert known == answer_logprob(bench.task, node.state)
    noisy = make_bench("middling", replace(SMALL, value_noise=0.5))
    assert 0.3 < np.std(noisy.critic - noisy.exact.v) < 0.7


def test_batches_go_on_where_the_questions_of_the_one_before_ended():
    bench = make_bench("middling", SMALL)
    explorer = get_algorithm("grpo").explorer
    asked = [[tree.question.id for tree in collected(bench, explorer, SMALL, step, 3).trees] for step in range(2)]
    assert asked == [["tree0", "tree1", "tree2"], ["tree3", "tree0", "tree1"]]


# -- what comes out ------------------------------------------------------------------------------------


def test_exact_advantages_have_no_error_and_point_along_the_gradient():
    bench = make_bench("middling", SMALL)
    group = [a for a in references(bench) if a.name == "(exact A, rollouts)"]
    (result,), _, failed = measure(bench, group, SMALL)
    assert not failed and result.raw[:3] == pytest.approx((0, 0, 0), abs=1e-9) and result.factor == pytest.approx(1)
    value, error = result.cosine
    assert abs(value - 1) < max(4 * error, 0.005) and error < 0.03 and 0.5 < result.one_batch[0] < 1
    assert abs(result.actions_per_batch - SMALL.batch_actions) < 150 and result.trained == 1


def test_forks_hardly_bend_the_exact_gradient_and_carls_update_set_does():
    bench = make_bench("middling", SMALL)
    group = {a.name: a for a in references(bench) if "CARL's trees" in a.name}
    results = {one.name: one for one in measure(bench, list(group.values()), SMALL)[0]}
    part, everything = results["(exact A, CARL's trees)"], results["(exact A, CARL's trees, all actions)"]
    assert everything.trained == 1 > part.trained
    assert everything.cosine[0] > 0.95 and everything.one_batch[0] > part.one_batch[0] + 0.05


def test_shuffled_advantages_say_nothing():
    bench = make_bench("middling", SMALL)
    shuffled, grpo = references(bench)[-1], get_algorithm("grpo")
    control, real = measure(bench, [shuffled, grpo], SMALL)[0]
    assert abs(control.one_batch[0]) < 0.1 < 0.4 < real.one_batch[0]
    assert control.scaled[2] / control.scaled[3] > 0.99 > real.scaled[2] / real.scaled[3]


def test_the_expected_gradient_of_dr_grpo_is_the_true_one():
    """No std and a constant denominator: nothing is left that bends the direction."""
    bench = make_bench("middling", SMALL)
    grpo = get_algorithm("grpo")
    centred = replace(grpo, loss_reduction="constant", credit=lambda trees: [a * s for a, s in _centred(grpo, trees)])
    (result,), _, _ = measure(bench, [centred], SMALL)
    value, error = result.cosine
    assert error < 0.05 and abs(value - 1) < 4 * error + 0.01


def _centred(grpo, trees):
    """GRPO's advantages, and the std that each tree's were divided by."""
    for tree, advantage in zip(trees, grpo.credit(trees), strict=True):
        returns = [tree.trajectory_return(leaf.id) for leaf in tree.leaves()]
        yield advantage, np.std(returns, ddof=1) + 1e-6


def test_the_emphasis_of_tokens_reaches_advantages_and_gradient():
    """Twice the emphasis is twice the advantage; an emphasis of 0 leaves nothing."""
    bench = make_bench("middling", SMALL)
    batch = collected(bench, get_algorithm("grpo").explorer, SMALL, 0, 4)
    sizes = []
    for factor in (1.0, 2.0, 0.0):
        algorithm = replace(
            get_algorithm("grpo"),
            emphasis=lambda tree, f=factor: [
                np.full(len(n.action.token_ids) if n.action else 0, f) for n in tree.nodes
            ],
        )
        running = Running(bench, algorithm)
        running.add(batch)
        sizes.append((np.linalg.norm(running.gradients[0]), running.sums.square.sum()))
    assert sizes[0][0] > 0 and sizes[1] == pytest.approx((2 * sizes[0][0], 4 * sizes[0][1])) and sizes[2] == (0, 0)


WORLD = replace(SMALL, turns=5, critical=(2, 4), batch_actions=600, seed=3)


def explored(explorer, batches=150):
    """The values of this explorer's trees, in a world in which entropy can tell critical turns."""
    bench = make_bench("habits", WORLD)
    sums = ValueSums(bench)
    for step in range(batches):
        sums.add(collected(bench, explorer, WORLD, step, 8))
    return sums.explored(explorer)


def test_values_at_random_sites_are_unbiased_and_slopes_are_1_less_1_over_k():
    """CARL's App. A, for sites that are chosen independently of the sampled actions."""
    found = explored(RandomForking(1, 6))
    for value, error in found.errors.values():
        assert abs(value) < 4.5 * error < 0.05
    for k, (slope, error) in found.slopes.items():
        if not math.isnan(slope):
            assert abs(slope - (1 - 1 / k)) < 4.5 * error + 0.01
    assert found.slopes[2][1] < 0.03


def test_values_at_sites_chosen_by_the_sampled_surprise_are_tilted():
    value, error = explored(EntropyForking(1, 6)).errors["root", "plain"]
    assert abs(value) > 5 * error


def test_leaf_weighting_is_biased_where_states_choose_the_sites_and_plain_values_are_not():
    """Worked by hand. Two turns, two options, each with probability 1/2 at the start; the right one pays 1, the other
    one 0.1, so V = 0.55. The start and the state after the wrong option are uncertain and fork, the third one does not.

    Two children of the start: both right (1/4) give 1, both wrong (1/4) give 0.1, one of each (1/2) gives 0.55 by the
    plain mean, and by its three leaves (1 + 0.1 + 0.1) / 3 = 0.4. Expected: 0.55 plain, 0.475 leaf-weighted.
    """
    task = CriticalTask(CriticalTreeSettings(turns=2, options=2, critical=(1,), stake=0.9, slips=0.0, trees=1))
    mdp = enumerate_mdp(task)
    logits = np.zeros((3, 2))
    right = mdp.after[0, backward(mdp)[0].argmax()]
    logits[right] = 8.0, 0.0
    bench = bench_of("by hand", task, mdp, logits, SMALL, np.random.default_rng(0))
    assert bench.exact.value == pytest.approx(0.55)
    sums = ValueSums(bench)
    sums.add(collected(bench, StateForking(), SMALL, 0, 4000))
    errors = sums.explored(StateForking()).errors
    value, error = errors["root", "plain"]
    assert abs(value) < 4.5 * error
    value, error = errors["root", "leaf-weighted"]
    assert abs(value + 0.075) < 4.5 * error < 0.03


def test_the_whole_bench_prints_its_tables(capsys):
    main(Options(quick=True, algorithms=("carl", "carl(root=merged)", "grpo")))
    lines = capsys.readouterr().out.splitlines()
    for name in ("carl", "carl(root=merged)", "grpo", "(exact A, rollouts)", "grpo (shuffled)"):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 2
    assert any(line.startswith("| EntropyForking(root=merged) |") for line in lines)
    assert not any("left out" in line for line in lines)


def test_an_algorithm_that_cannot_run_is_left_out_with_its_reason(capsys, monkeypatch):
    def fails(trees):
        raise ConfigError("it needs what is not there")

    broken = replace(get_algorithm("grpo"), name="broken", credit=fails)
    monkeypatch.setattr("benchmarks.credit_bench.chosen", lambda names: ([broken, get_algorithm("grpo")], {}))
    main(Options(quick=True))
    out = capsys.readouterr().out
    assert "- broken left out: it needs what is not there" in out and "| broken |" not in out and "| grpo |" in out
