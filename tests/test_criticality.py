"""Criticality: measured values against exact ones, statistics against hand and brute force, studies that are killed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, ToyPolicy, path, questions
from scipy import stats

from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.envs.state import EnvState, Question
from carl_gym.errors import CarlGymError, ConfigError, DataError, PolicyError
from carl_gym.evaluation.criticality import MeasuredState, VisitedState, choose, measure, visit
from carl_gym.evaluation.criticality_report import markdown
from carl_gym.evaluation.criticality_store import CriticalityStore
from carl_gym.evaluation.criticality_summary import (
    association,
    brunner_munzel_p,
    cliffs_delta,
    distribution,
    midranks,
    spearman,
    summarise_criticality,
)
from carl_gym.tracking.criticality_figure import draw_criticality
from scripts import measure_criticality
from scripts.measure_criticality import main

SCRIPT = ("--agent", "random", "--env", "carl/MiniWiki-v0", "--questions", "40", "--resamples", "5")


# -- a world whose criticality is known ----------------------------------------------------------------


def chooser(likely: float = 0.8, *, entropies: bool = True) -> ToyPolicy:
    """ "a" with probability `likely`, else "b"; greedily "a"."""

    def act(request: SampleRequest, rng: random.Random) -> Completion:
        chosen = "a" if request.temperature == 0 or rng.random() < likely else "b"
        entropy = -(likely * math.log(likely) + (1 - likely) * math.log(1 - likely))
        known = (entropy,) if entropies and request.entropies else ()
        return Completion((ord(chosen),), (math.log(likely if chosen == "a" else 1 - likely),), chosen, "stop", known)

    return ToyPolicy(act)


def second_decides(actions: tuple[str, ...]) -> float:
    """0.25 for the first action, whatever it is; 1 for the third when the second was "a"."""
    return 0.25 if len(actions) == 1 else float(actions[1] == "a") if len(actions) == 3 else 0.0


TASK = PathTask(3, second_decides)


def second_was_a(state: EnvState) -> float:
    return float(path(state)[1] == "a")


def studied(
    policy: ToyPolicy | None = None, *, count: int = 20, resamples: int = 8, chunk: int = 32, entropies: bool = False
) -> list[MeasuredState]:
    policy = policy or chooser()
    states = visit(TASK, policy, ByteTranscript(), questions(count), entropies=entropies)
    parts = measure(
        TASK, policy, ByteTranscript(), states, second_was_a, resamples=resamples, chunk=chunk, entropies=entropies
    )
    return [state for part in parts for state in part]


def test_criticality_is_that_of_the_exact_distribution():
    # At depth 0 the second action follows greedily and is "a", so R = 1.25 whatever is drawn: C = 0. At depth 1
    # R = 1.25 with probability .8, else .25: C = sqrt(.8 * .2) = .4. At depth 2 all is decided: C = 0.
    measured = studied(count=12, resamples=400)
    assert [state.depth for state in measured] == [0, 1, 2] * 12
    second = [state for state in measured if state.depth == 1]
    assert {state.fate for state in second} == {"open"}
    for state in measured:
        if state.depth != 1:
            assert state.criticality == state.variance == 0.0
            assert state.fate in (("won",) if state.depth == 0 else ("won", "lost"))
            assert set(state.returns) == {1.25 if state.fate == "won" else 0.25}
    # 4,800 draws; bounds of 4.5 standard errors, which are .4 / sqrt(4800) of the mean return, |1 - 2 p| = .6 of that
    # of the variance, and .4 log 4 / sqrt(4800) of the mean of h = -log .8 or -log .2.
    error = 4.5 * 0.4 / math.sqrt(4800)
    assert np.mean([state.mean_return for state in second]) == pytest.approx(0.25 + 0.8, abs=error)
    assert np.mean([state.variance for state in second]) == pytest.approx(0.16, abs=0.6 * error)
    assert np.mean([state.criticality for state in second]) == pytest.approx(0.4, abs=0.02)
    h = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert np.mean([state.mean_h for state in second]) == pytest.approx(h, abs=math.log(4) * error)
    assert np.mean([np.mean(state.hs) for state in second]) == pytest.approx(h, abs=math.log(4) * error)
    assert {round(state.h, 6) for state in second} == {round(-math.log(p), 6) for p in (0.8, 0.2)}
    assert {state.action for state in measured} == {"search"}


def test_the_variance_is_unbiased_and_the_criticality_low():
    # K = 2 at p = .8: the two returns differ with probability .32. ddof = 0 gives std .5 then, so E[C] = .16, and
    # ddof = 1 gives variance .5, so E[variance] = .16 = p (1 - p).
    second = [state for state in studied(count=2000, resamples=2) if state.depth == 1]
    assert {state.criticality for state in second} == {0.0, 0.5} and {state.variance for state in second} == {0.0, 0.5}
    error = 4.5 * 0.5 * math.sqrt(0.32 * 0.68 / 2000)
    assert np.mean([state.variance for state in second]) == pytest.approx(0.16, abs=error)
    assert np.mean([state.criticality for state in second]) == pytest.approx(0.16, abs=error)


def test_the_first_action_is_sampled_where_the_state_was_and_the_rest_is_greedy():
    policy = chooser()
    states = visit(TASK, policy, ByteTranscript(), questions(3), samples=2)
    assert len({state.key for state in states}) == len(states) == 3 * 2 * 3
    policy.batches.clear()
    list(measure(TASK, policy, ByteTranscript(), states, second_was_a, resamples=5, entropies=True))
    fresh, first, *rest = policy.batches
    for batch in (fresh, first):
        assert [(r.prefix, r.state) for r in batch] == [(s.prefix, s.state) for s in states for _ in range(5)]
        assert {request.temperature for request in batch} == {1.0}
    assert len({request.seed for request in (*fresh, *first)}) == 2 * 5 * len(states)
    assert all(r.entropies for r in fresh) and not any(r.entropies for batch in (first, *rest) for r in batch)
    assert len(rest) == 2 and {request.temperature for batch in rest for request in batch} == {0.0}
    for batch in rest:  # equal prefixes are asked once
        assert len({(request.prefix, request.state) for request in batch}) == len(batch)
    # Five actions at a state are "a" or "b": at most two prefixes to go on from. States at depth 2 are over by then.
    assert len(rest[0]) <= 2 * sum(state.depth < 2 for state in states)


def test_a_measurement_depends_on_neither_chunk_nor_company():
    together = studied(chunk=32)
    assert studied(chunk=1) == together and studied(chunk=7) == together
    assert studied(count=3) == together[:9]


def test_other_seeds_give_other_draws():
    states = visit(TASK, chooser(), ByteTranscript(), questions(10))
    assert states != visit(TASK, chooser(), ByteTranscript(), questions(10), seed=1)
    (one,), (other,) = (
        measure(TASK, chooser(), ByteTranscript(), states, second_was_a, seed=seed) for seed in (0, 1)
    )  # fmt: skip
    assert [state.key for state in one] == [state.key for state in other] and one != other


def test_exact_entropies_are_kept_where_there_are_any():
    exact = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    for state in studied(count=2, entropies=True):
        assert state.exact_h == pytest.approx(exact) and state.fresh_exact_hs == pytest.approx((exact,) * 8)
        assert state.mean_exact_h == pytest.approx(exact)
    for state in studied(count=2):
        assert state.exact_h is None and state.fresh_exact_hs == () and state.mean_exact_h is None


def test_a_state_without_room_for_an_action_is_not_visited():
    def act(request: SampleRequest, rng: random.Random) -> Completion:
        full = len(path(request.state)) == 1
        return Completion((1,), (0.0,) if full else (-1.0,), "" if full else "a", "context" if full else "stop")

    states = visit(TASK, ToyPolicy(act), ByteTranscript(), questions(2))
    assert [state.depth for state in states] == [0, 0]


def test_what_cannot_be_measured_is_refused():
    silent = ToyPolicy(lambda request, rng: Completion((1,), (math.nan,), "a", "stop"))
    with pytest.raises(PolicyError, match="need log-probs, and this policy gives none"):
        visit(TASK, silent, ByteTranscript(), questions(1))
    states = visit(TASK, chooser(), ByteTranscript(), questions(1))
    with pytest.raises(ConfigError, match="at least 2, not 1"):
        next(measure(TASK, chooser(), ByteTranscript(), states, second_was_a, resamples=1))
    with pytest.raises(ConfigError, match="4 states asked for, but the trajectories have 3"):
        choose(states, 4)


def test_states_are_chosen_by_seed_and_kept_in_order():
    states = visit(TASK, chooser(), ByteTranscript(), questions(20))
    assert choose(states, 0) == states
    chosen = choose(states, 25, seed=3)
    places = [states.index(state) for state in chosen]
    assert places == sorted(set(places)) and len(places) == 25
    assert choose(states, 25, seed=3) == chosen != choose(states, 25, seed=4)


# -- statistics ----------------------------------------------------------------------------------------


def test_cliffs_delta_by_hand():
    # Pairs of (1, 2, 4) and (2, 3): 1 < 2, 1 < 3, 2 = 2, 2 < 3, 4 > 2, 4 > 3, so (2 - 3) / 6.
    assert cliffs_delta(np.array([1.0, 2.0, 4.0]), np.array([2.0, 3.0])) == pytest.approx(-1 / 6)
    assert cliffs_delta(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert cliffs_delta(np.array([1.0, 1.0]), np.array([1.0])) == 0.0
    assert cliffs_delta(np.array([]), np.array([1.0])) is None


few = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12).map(np.array)


@given(few, few)
def test_cliffs_delta_is_that_of_all_pairs(x, y):
    pairs = np.sign(x[:, None] - y[None, :])
    assert cliffs_delta(x, y) == pytest.approx(pairs.mean(), abs=1e-12)


def test_midranks_and_rank_correlation_by_hand():
    assert midranks(np.array([5.0, 1.0, 5.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    # Ranks (1, 2, 3) against (1, 3, 2): 1 - 6 (0 + 1 + 1) / (3 * 8) = .5.
    assert spearman(np.array([0.1, 0.2, 0.9]), np.array([1.0, 7.0, 3.0])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None and spearman(np.ones(1), np.ones(1)) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_rank_correlation_is_scipys(pairs):
    x, y = np.array(pairs, dtype=float).T
    if np.ptp(x) and np.ptp(y):
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    else:
        assert spearman(x, y) is None


def test_the_brunner_munzel_test_on_its_papers_example():
    # Brunner and Munzel 2000, pain scores: W = 3.1375, p = .005786.
    x = np.array([1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 1, 1], dtype=float)
    y = np.array([3, 3, 4, 3, 1, 2, 3, 1, 1, 5, 4], dtype=float)
    assert brunner_munzel_p(x, y) == pytest.approx(0.005786, abs=1e-6)
    assert brunner_munzel_p(y, x) == pytest.approx(0.005786, abs=1e-6)
    assert brunner_munzel_p(x[:1], y) is None
    assert brunner_munzel_p(np.array([1.0, 2.0]), np.array([3.0, 4.0])) is None  # no pair out of order: no variance


def test_the_distribution_by_hand():
    found = distribution([0.0, 0.0, 0.049, 0.05, 0.15, 0.4, 0.41, 0.5])
    assert found["near_zero"] == 3 / 8 and found["high"] == 2 / 8
    assert found["mean"] == pytest.approx(1.559 / 8)
    assert found["histogram"]["edges"] == pytest.approx([0.05 * i for i in range(13)])
    assert found["histogram"]["counts"] == [3, 1, 0, 1, 0, 0, 0, 0, 2, 0, 1, 0]
    assert sum(distribution([0.1, 2.0])["histogram"]["counts"]) == 2


def state(
    question: str,
    returns: tuple[float, ...],
    h: float,
    *,
    fresh: float | None = None,
    same: float = 0.5,
    depth: int = 0,
    action: str = "search",
) -> MeasuredState:
    """A state with these returns, and of each kind of entropy a single value; an F1 of 0 or 1 besides."""
    k = len(returns)
    fresh = h if fresh is None else fresh
    scores = tuple(float(value >= 1) for value in returns)
    return MeasuredState(
        question, 0, depth, action, h, None, (action,) * k, (same,) * k, (fresh,) * k, (), returns, scores
    )


def four_states() -> list[MeasuredState]:
    """Criticalities .5, 0, 0, .25."""
    return [
        state("q0", (0.0, 0.0, 1.0, 1.0), 0.9),
        state("q0", (0.1, 0.1, 0.1, 0.1), 0.3, fresh=0.7, depth=1, action="answer"),
        state("q1", (1.1, 1.1, 1.1, 1.1), 0.1),
        state("q1", (1.0, 1.0, 0.5, 0.5), 0.5, depth=1),
    ]


def test_a_summary_by_hand():
    states = four_states()
    assert [s.criticality for s in states] == [0.5, 0.0, 0.0, 0.25]
    assert [s.fate for s in states] == ["open", "lost", "won", "open"]
    assert states[0].variance == pytest.approx(1 / 3)
    summary = summarise_criticality(states)
    assert (summary["states"], summary["questions"], summary["resamples"]) == (4, 2, 4)
    assert summary["criticality"]["near_zero"] == 0.5 and summary["criticality"]["high"] == 0.25
    assert summary["criticality"]["mean"] == pytest.approx(0.1875)
    assert summary["score_criticality"]["high"] == 0.5  # .5 also where the returns are 1 and .5
    assert summary["root_mean_variance"] == pytest.approx(math.sqrt((1 / 3 + 1 / 12) / 4))
    assert summary["fates"] == {"lost": 1, "open": 2, "won": 1}
    # Halves of returns: all four states are equal within each half, so nothing can be told of them.
    assert summary["halves"] is summary["ceiling"] is None
    assert summary["near_zero_of_half"] == 1.0  # though only half of the states are near zero by all four returns
    assert set(summary["entropy"]) == {"one_sample", "mean_of_k", "mean_of_same_k"}  # no exact ones are known
    one, mean = (summary["entropy"][name]["all"] for name in ("one_sample", "mean_of_k"))
    # h ranks 4, 2, 1, 3 against C ranks 4, 1.5, 1.5, 3: Pearson's is 4.5 / sqrt(5 * 4.5).
    assert one["spearman"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    # The only state above .4 has the largest h; those with some spread, .9 and .5, exceed .3 and .1 in every pair.
    assert one["high"] | {"brunner_munzel_p": 0, "cliffs_delta_interval": 0} == {
        "upper": 1, "lower": 3, "upper_median": 0.9, "lower_median": 0.3, "cliffs_delta": 1.0,
        "cliffs_delta_interval": 0, "brunner_munzel_p": 0,
    }  # fmt: skip
    assert one["not_near_zero"]["cliffs_delta"] == 1.0
    assert mean["not_near_zero"]["cliffs_delta"] == 0.5  # .5 < .7 is one pair of four the other way
    assert summary["entropy"]["mean_of_same_k"]["all"]["spearman"] is None
    assert summary["entropy"]["one_sample"]["open"]["states"] == 2
    assert summary["by_depth"]["1"]["states"] == 2 and summary["by_action"]["answer"]["criticality"] == 0.0
    assert list(summary["by_fate"]) == ["lost", "open", "won"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_halves_reproduce_what_is_there():
    # Two halves of two: (0, 1) and (0, 1) have spread .5, (0, 0) and (0, 0) none.
    spread, none = (0.0, 1.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0)
    assert summarise_criticality([state("q", spread, 0.1), state("q", none, 0.2)])["halves"] == pytest.approx(1.0)
    # Spreads of the halves .5, 0, 0 and .5, .5, 0 have midranks 3, 1.5, 1.5 and 2.5, 2.5, 1: r = .75 / 1.5 = .5, and
    # sqrt(2 / 2 * .5 / .75) = sqrt(2 / 3). Three of the six are near zero.
    half = (0.0, 0.0, 0.0, 1.0)
    found = summarise_criticality([state("q", returns, 0.1) for returns in (spread, half, none)])
    assert found["halves"] == pytest.approx(0.5) and found["ceiling"] == pytest.approx(math.sqrt(2 / 3))
    assert found["near_zero_of_half"] == pytest.approx(0.5)
    assert summarise_criticality([state("q", spread[:2], 0.1), state("q", none[:2], 0.2)])["halves"] is None


def test_intervals_are_over_questions():
    # Within each question h and C agree perfectly; a hundred states of one question are no more than that question.
    rng = random.Random(0)
    many = [
        state(f"q{n}", (0.0, 1.0) if agrees == (n % 2 == 0) else (0.0, 0.0), float(agrees))
        for n in range(10)
        for agrees in (True, False)
        for _ in range(20)
    ]
    rng.shuffle(many)
    found = association(many, "one_sample")
    assert found["spearman"] == pytest.approx(0.0, abs=1e-9)  # half of the questions say +1, half say -1
    low, high = found["spearman_interval"]
    # By states (400 of them) the interval would be about +-.1; by 10 questions of +-1 it is about +-.6.
    assert low < -0.35 and high > 0.35
    alone = association([s for s in many if s.question_id == "q0"], "one_sample")
    assert alone["spearman"] == pytest.approx(1.0) and alone["spearman_interval"] is None


def test_pages_and_pictures_of_every_kind_of_study(tmp_path: Path):
    for number, states in enumerate((four_states(), four_states()[:1], four_states()[1:3])):
        summary = summarise_criticality(states)
        page = markdown(summary, {"agent": "x"})
        assert "- agent: x" in page and f"| search | {sum(s.action == 'search' for s in states)} |" in page
        draw_criticality(states, summary, tmp_path / str(number), "x")
        picture = (tmp_path / f"{number}.svg").read_text("utf-8")
        near = summary["criticality"]["near_zero"]
        assert f"{len(states)} states: {near:.0%} below 0.05" in picture and "criticality C(s)" in picture
    with pytest.raises(CarlGymError, match="at least one"):
        draw_criticality([], {}, tmp_path / "none")


def test_a_difference_is_shown_when_both_sides_have_some_states():
    # C = .5 of the first ones, with h = .9; C = 0 and h = .1 of the rest: delta = 1, p undefined.
    def line(high: int) -> str:
        states = [state("q", (0.0, 1.0), 0.9)] * high + [state("q", (0.0, 0.0), 0.1)] * 9
        page = markdown(summarise_criticality(states), {})
        return next(line for line in page.splitlines() if line.startswith("| h of one action"))

    assert line(4) == "| h of one action | 1.00 | - | - | - | - |"
    assert line(5) == "| h of one action | 1.00 | 1.00 | - | 1.00 | - |"


# -- studies on disk -----------------------------------------------------------------------------------


def kept(folder: Path, config: dict[str, object], count: int) -> tuple[list[VisitedState], list[MeasuredState]]:
    """A study in the folder with `count` of its states measured."""
    states = visit(TASK, chooser(), ByteTranscript(), questions(3))
    (measured,) = measure(TASK, chooser(), ByteTranscript(), states, second_was_a)
    with CriticalityStore(folder, config) as store:
        store.open(by_id())
        store.keep_visited(states)
        store.append(measured[:count])
    return states, measured


def by_id() -> dict[str, Question]:
    return {question.id: question for question in questions(3)}


def test_a_study_comes_back_from_disk_and_goes_on_from_any_byte(tmp_path: Path):
    states, measured = kept(tmp_path, {"seed": 1}, 4)
    whole = (tmp_path / "measured.jsonl").read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        (tmp_path / "measured.jsonl").write_bytes(whole[:size])
        with CriticalityStore(tmp_path, {"seed": 1}) as store:
            store.open(by_id())
            there = whole[:size].count(b"\n")
            assert store.visited == states and store.measured == measured[:there] and store.left == states[there:]
            store.append(measured[there:4])
        assert (tmp_path / "measured.jsonl").read_bytes() == whole


def test_another_study_is_neither_continued_nor_overwritten(tmp_path: Path):
    kept(tmp_path, {"seed": 1, "chunk": 3}, 2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"holds another run \(seed: 1 -> 2\)"):
        CriticalityStore(tmp_path, {"seed": 2, "chunk": 3})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with CriticalityStore(tmp_path, {"seed": 1, "chunk": 5}) as store:  # this changes nothing that is measured
        store.open(by_id())
        with pytest.raises(ConfigError, match="another process works in"):
            CriticalityStore(tmp_path, {"seed": 1, "chunk": 5}).open(by_id())


def test_a_study_that_never_began_does_not_stand_in_the_way(tmp_path: Path):
    with CriticalityStore(tmp_path / "a", {"seed": 1}) as store:
        store.open(by_id())
    with CriticalityStore(tmp_path / "a", {"seed": 2}) as store:
        store.open(by_id())
        assert store.visited is None and store.left == []
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        CriticalityStore(tmp_path / "b", {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("visited.jsonl", lambda text: text.replace('"q1"', '"q9"', 1), "line 4: no visited state"),
        ("visited.jsonl", lambda text: text.replace("schema", "scheme"), "line 1: no visited state"),
        ("measured.jsonl", lambda text: text.replace('"h"', '"x"', 1), "line 1: no measured state"),
        (
            "measured.jsonl",
            lambda text: text.replace('"depth": 1', '"depth": 2', 1),
            "does not belong to visited.jsonl",
        ),
        ("measured.jsonl", lambda text: text + text.splitlines(True)[0], "has more states than"),
        ("measured.jsonl", lambda text: text.replace('"scores": [1.0, ', '"scores": ['), "line 1: no measured state"),
    ],
)
def test_a_damaged_study_is_named(tmp_path: Path, name: str, change: Callable[[str], str], message: str):
    kept(tmp_path, {}, 9)
    before = (tmp_path / name).read_text("utf-8")
    (tmp_path / name).write_text(change(before), "utf-8")
    assert (tmp_path / name).read_text("utf-8") != before
    with pytest.raises(DataError, match=message), CriticalityStore(tmp_path, {}) as store:
        store.open(by_id())


# -- the script ----------------------------------------------------------------------------------------


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "criticality.json").read_text("utf-8"))


def test_a_killed_study_ends_like_one_run_and_a_finished_one_is_shown_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main([*SCRIPT, "--output-dir", str(tmp_path / "whole")])
    whole = result(tmp_path / "whole")
    names = {file.name for file in (tmp_path / "whole").glob("[!.]*")}
    assert names == {
        "config.json", "visited.jsonl", "measured.jsonl", "criticality.json", "criticality.md", "criticality.png",
        "criticality.svg",
    }  # fmt: skip
    assert whole["summary"]["states"] == len(whole["states"]) > 80 and whole["summary"]["questions"] == 40
    assert {len(row["returns"]) for row in whole["states"]} == {5}
    page = (tmp_path / "whole" / "criticality.md").read_text("utf-8")
    assert f"- command: {whole['command']}\n- commit: {whole['commit']}\n- machine: {whole['machine']}\n" in page
    assert "measure_criticality.py" in whole["command"] and str(tmp_path / "whole") in whole["command"]
    assert {row["fate"] for row in whole["states"]} == {"lost", "open"}  # a random agent wins now and then
    for row in whole["states"]:
        assert row["criticality"] == pytest.approx(np.std(row["returns"]), abs=1e-12)
        # The random agent draws one of n equally likely actions: every draw has the log-prob -log n on its first token.
        assert row["exact_h"] == pytest.approx(row["h"])

    folder = tmp_path / "killed"
    folder.mkdir()
    for name in ("config.json", "visited.jsonl"):
        (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    half = (tmp_path / "whole" / "measured.jsonl").read_bytes()
    (folder / "measured.jsonl").write_bytes(half[: len(half) // 2])
    main([*SCRIPT, "--chunk", "5", "--output-dir", str(folder)])
    assert result(folder)["states"] == whole["states"] and result(folder)["summary"] == whole["summary"]

    def again(*_: object, **__: object) -> None:
        raise AssertionError("measured anew")

    monkeypatch.setattr(measure_criticality, "visit", again)
    monkeypatch.setattr(measure_criticality, "measure", again)
    capsys.readouterr()
    main([*SCRIPT, "--output-dir", str(folder)])
    assert "is there already" in (shown := capsys.readouterr().out) and "By depth" in shown
    with pytest.raises(SystemExit):
        main([*SCRIPT, "--seed", "1", "--output-dir", str(folder)])
    assert "holds another run (seed: 0 -> 1)" in " ".join(capsys.readouterr().err.split())


def test_a_model_folder_is_measured(tiny_agent_folder: Path, tmp_path: Path) -> None:
    options = ("--questions", "3", "--resamples", "3", "--states", "6", "--device", "cpu", "--threads", "1")
    main(["--agent", str(tiny_agent_folder), *options, "--output-dir", str(tmp_path / "out")])
    found = result(tmp_path / "out")
    assert found["summary"]["states"] == 6 and found["config"]["setting"]["questions"] == 3
    assert set(found["summary"]["entropy"]) == {
        "one_sample", "mean_of_k", "exact_one_sample", "exact_mean_of_k", "mean_of_same_k"
    }  # fmt: skip
    for row in found["states"]:
        assert len(row["returns"]) == len(row["fresh_hs"]) == len(row["fresh_exact_hs"]) == 3
        assert row["h"] >= 0 and row["exact_h"] >= 0 and all(0 <= value <= 1.1 for value in row["returns"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resamples", "1"), "--resamples (1) must be at least 2"),
        (("--samples", "0"), "--samples (0) must be at least 1"),
        (("--threads", "0"), "--threads (0) must be at least 1"),
        (("--env", "carl/MiniWikki-v0"), "did you mean 'carl/MiniWiki-v0'?"),
        (("--states", "100000"), "100000 states asked for, but the trajectories have"),
        (("--agent", "hosted.toml"), "a hosted model tells no log-probs"),
        (("--agent", "no/such/model"), "no/such/model"),
        (("--env-args", "colour=1"), "unknown argument 'colour'"),
    ],
)
def test_bad_input_is_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    card = 'id = "hosted"\ndescription = "x"\nmodel = "gpt"\nbackend = "openai"\nurls = ["http://127.0.0.1:1"]\n'
    Path("hosted.toml").write_text(card + 'transcript = "chat"\n', "utf-8")
    with pytest.raises(SystemExit) as stopped:
        main([*SCRIPT, *options, "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert message in " ".join((shown.out + shown.err).replace("│", " ").split())
    assert not (tmp_path / "out" / "visited.jsonl").exists()
