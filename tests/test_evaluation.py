"""Evaluation: scores worked out by hand, intervals in known cases, and repeatable play."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carl_gym.agents.scripted import ByteTranscript, OraclePolicy, RandomValidPolicy
from carl_gym.envs.registration import make_task
from carl_gym.envs.state import Question
from carl_gym.envs.task import SearchTask
from carl_gym.rollouts.evaluation import (
    Episode,
    bootstrap_interval,
    evaluate,
    gold_recall,
    held_out_first,
    play,
    summarise,
)


def episode(**changes: object) -> Episode:
    usual = {
        "question_id": "q", "question": "?", "gold_answers": ("a",), "status": "answered", "answer": "a",
        "em": 0.0, "f1": 0.0, "turns": 2, "searches": 1, "invalid_actions": 0,
        "gold_title_recall": None, "gold_title_opened": None, "actions": (("search", "x"), ("answer", "a")),
    }  # fmt: skip
    return Episode(**{**usual, **changes})


@pytest.fixture(scope="module")
def wiki() -> SearchTask:
    return make_task("carl/MiniWiki-v0", split="test", questions=40)


def questions(task: SearchTask) -> list[Question]:
    return list(task.questions.values())


# -- means -----------------------------------------------------------------------------------------


def test_means_over_episodes_by_hand():
    found = summarise(
        [
            episode(em=1.0, f1=1.0, turns=3, searches=2, gold_title_recall=1.0, gold_title_opened=0.5),
            episode(f1=0.5, turns=5, searches=1, invalid_actions=2, gold_title_recall=0.5, gold_title_opened=0.0),
            episode(status="out_of_turns", answer=None, turns=10, searches=3, invalid_actions=7),
            episode(status="out_of_context", answer=None, turns=2, searches=0),
        ]
    )
    assert found.questions == 4
    assert (found.em, found.f1, found.turns, found.searches) == (0.25, 0.375, 5.0, 1.5)
    assert found.invalid == 9 / 20  # of all actions, not a mean of shares
    assert (found.gold_title_recall, found.gold_title_opened) == (0.75, 0.25)  # over those that name titles
    assert found.answered == 0.5


def test_a_value_that_does_not_exist_is_nan_and_left_out_of_the_metrics():
    found = summarise([episode(em=1.0, f1=1.0)])
    assert math.isnan(found.gold_title_recall) and math.isnan(found.gold_title_opened)
    logged = found.metrics("eval/greedy")
    assert logged["eval/greedy_em"] == 1.0
    assert "eval/greedy_gold_title_recall" not in logged and "eval/greedy_gold_title_opened" not in logged
    assert "eval/greedy_questions" not in logged
    assert len(logged) == len(dataclasses.fields(found)) - 3
    assert all(math.isfinite(value) for value in logged.values())
    assert "eval/greedy_gold_title_recall" in summarise([episode(gold_title_recall=0.0)]).metrics("eval/greedy")


# -- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_equal_scores_leave_no_uncertainty(score):
    assert bootstrap_interval(np.full(50, score)) == (score, score)


@pytest.mark.parametrize(("size", "right"), [(400, 200), (500, 175), (10_000, 3_000)])
def test_for_many_questions_it_is_the_normal_interval(size, right):
    scores = np.zeros(size)
    scores[:right] = 1.0
    mean = right / size
    half = 1.96 * math.sqrt(mean * (1 - mean) / size)
    low, high = bootstrap_interval(scores)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_for_two_questions_it_is_all_that_resampling_can_give():
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert bootstrap_interval(np.array([0.0, 1.0]), level=0.4) == (0.5, 0.5)  # half of all resamples are one of each


def test_it_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval((rng.random(100) < 0.3).astype(float)) for _ in range(200)]
    covered = sum(low <= 0.3 <= high for low, high in intervals)
    assert 178 <= covered <= 199  # 190 expected; 4 standard deviations of the count, and a bootstrap is a bit short


@settings(max_examples=50, deadline=None)
@given(arrays(float, st.integers(1, 60), elements=st.floats(0, 1)))
def test_it_lies_around_the_mean_within_the_scores_and_grows_with_the_level(scores):
    low, high = bootstrap_interval(scores)
    assert scores.min() - 1e-12 <= low <= high <= scores.max() + 1e-12
    wider = bootstrap_interval(scores, level=0.999)
    assert wider[0] <= low and high <= wider[1]
    assert wider[0] - 1e-12 <= scores.mean() <= wider[1] + 1e-12
    assert bootstrap_interval(scores) == (low, high)


# -- play ------------------------------------------------------------------------------------------


def test_the_oracle_scores_one_everywhere(wiki):
    found = evaluate(wiki, OraclePolicy(wiki), ByteTranscript(), questions(wiki), temperature=0.0)
    assert (found.questions, found.em, found.em_low, found.em_high) == (40, 1.0, 1.0, 1.0)
    assert (found.f1, found.answered, found.invalid) == (1.0, 1.0, 0.0)
    assert (found.gold_title_recall, found.gold_title_opened) == (1.0, 1.0)
    hops = np.mean([len(question.decomposition) for question in questions(wiki)])
    assert (found.turns, found.searches) == (pytest.approx(2 * hops + 1), pytest.approx(hops))


def test_an_episode_says_what_was_done(wiki):
    ((first, *_),) = play(wiki, OraclePolicy(wiki), ByteTranscript(), questions(wiki), temperature=0.0)
    question = questions(wiki)[0]
    titles = question.supporting_titles
    assert (first.question_id, first.question, first.gold_answers) == (question.id, question.text, question.answers)
    assert first.answer == question.answers[0]
    assert [kind for kind, _ in first.actions] == ["search", "access"] * len(titles) + ["answer"]
    assert [argument for kind, argument in first.actions if kind == "access"] == list(titles)
    json.dumps(dataclasses.asdict(first))


def played(task: SearchTask, seed: int, chunk: int = 256) -> list[Episode]:
    policy = RandomValidPolicy(task)
    parts = play(task, policy, ByteTranscript(), questions(task), temperature=1.0, seed=seed, chunk=chunk)
    return [episode for part in parts for episode in part]


def test_sampled_play_depends_on_the_seed_and_not_on_chunks(wiki):
    assert played(wiki, seed=0) == played(wiki, seed=0, chunk=7) == played(wiki, seed=0, chunk=1)
    assert played(wiki, seed=0) != played(wiki, seed=1)


def test_greedy_evaluation_of_a_model_is_deterministic_whatever_the_seed_and_the_cache(tiny_agent):
    task = make_task("carl/MiniWiki-v0", split="test", questions=6)

    def scores(temperature: float, seed: int) -> list[Episode]:
        parts = play(task, tiny_agent.policy, tiny_agent.transcript, questions(task), temperature=temperature,
                     seed=seed)  # fmt: skip
        return [episode for part in parts for episode in part]

    greedy = scores(0.0, seed=0)
    assert scores(0.0, seed=1) == greedy  # the cache is warm now
    tiny_agent.policy.sync()
    assert scores(0.0, seed=2) == greedy
    assert scores(1.0, seed=1) == scores(1.0, seed=1) != scores(1.0, seed=2)


def test_a_context_that_is_full_ends_an_episode_without_an_answer(wiki):
    question = questions(wiki)[:1]
    short = ByteTranscript(context=len(question[0].text) + 250)
    ((episode,),) = play(wiki, OraclePolicy(wiki), short, question, temperature=0.0)
    assert (episode.status, episode.answer, episode.em) == ("out_of_context", None, 0.0)
    assert summarise([episode]).answered == 0.0


# -- what else an evaluation reports ---------------------------------------------------------------


def test_held_out_questions_come_in_an_order_that_depends_on_ids_alone(wiki):
    asked = questions(wiki)
    order = held_out_first(asked)
    assert held_out_first(reversed(asked)) == order != asked
    assert sorted(question.id for question in order) == sorted(question.id for question in asked)


def test_gold_recall_is_the_share_of_supporting_titles_among_the_best_hits(small_task):
    def asking(text: str, *titles: str) -> Question:
        return Question(text, text, ("x",), titles)

    assert gold_recall(small_task, [asking("Lovelace notes", "Ada Lovelace")], k=1) == 1.0
    assert gold_recall(small_task, [asking("Lovelace notes", "Ada Lovelace", "Markup")], k=1) == 0.5
    both = [asking("Lovelace notes", "Ada Lovelace"), asking("Lovelace", "Markup"), asking("no titles")]
    assert gold_recall(small_task, both, k=1) == 0.5
    assert gold_recall(small_task, [asking("no titles")]) is None
    assert gold_recall(small_task, [asking("born in London", "Ada Lovelace", "Charles Babbage")], k=10) == 1.0
