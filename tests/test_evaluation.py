"""Evaluation: scores worked out by hand, what is known per kind of question, and repeatable play."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from test_judge import Endpoint, compares

from carl_gym.agents.agent import Agent
from carl_gym.agents.scripted import ByteTranscript, OraclePolicy, RandomValidPolicy
from carl_gym.envs.judge import Judge, JudgeSettings
from carl_gym.envs.registration import make_task
from carl_gym.envs.schemas import read_examples
from carl_gym.envs.state import Hop, Question
from carl_gym.envs.task import SearchTask
from carl_gym.errors import ConfigError, DataError
from carl_gym.evaluation import (
    Episode,
    break_down,
    evaluate,
    gold_recall,
    held_out_first,
    play,
    questions_fingerprint,
    summarise,
)
from carl_gym.evaluation.setting import hops, traits

IDS = itertools.count()


def episode(**changes: object) -> Episode:
    """An episode without an answer worth anything, of a question of its own unless told otherwise."""
    usual = {
        "question_id": f"q{next(IDS)}", "question": "?", "gold_answers": ("a",), "sample": 0, "status": "answered",
        "answer": "a", "em": 0.0, "f1": 0.0, "cover_em": 0.0, "turns": 2, "searches": 1, "accesses": 0, "reads": 0,
        "invalid_actions": 0, "gold_title_recall": None, "gold_title_opened": None, "prompt_tokens": None,
        "generated_tokens": None, "actions": (("search", "x"), ("answer", "a")),
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


def test_several_episodes_of_a_question_are_one_observation():
    found = summarise(
        [
            episode(question_id=id, sample=sample, em=em, f1=f1, accesses=sample, reads=1, generated_tokens=10,
                    prompt_tokens=100 * sample)
            for id, scores in (("a", [(1.0, 1.0), (0.0, 0.5)]), ("b", [(0.0, 0.0), (0.0, 0.0)]))
            for sample, (em, f1) in enumerate(scores)
        ]
    )  # fmt: skip
    assert (found.questions, found.samples) == (2, 2)
    assert (found.em, found.f1, found.pass_at_k) == (0.25, 0.375, 0.5)
    assert (found.em_low, found.em_high) == (0.0, 0.5), "two questions can only give means of 0, 1/4 and 1/2"
    assert (found.pass_at_k_low, found.pass_at_k_high) == (0.0, 1.0)
    assert (found.accesses, found.reads, found.prompt_tokens, found.generated_tokens) == (0.5, 1.0, 50.0, 10.0)
    logged = found.metrics("eval/x")
    assert logged["eval/x_pass_at_k"] == 0.5 and "eval/x_samples" not in logged


def test_unequal_numbers_of_episodes_have_no_mean():
    with pytest.raises(ConfigError, match="same number of episodes"):
        summarise([episode(question_id="a"), episode(question_id="a", sample=1), episode(question_id="b")])
    with pytest.raises(ConfigError, match="same number of episodes"):
        summarise([])


def test_a_value_that_does_not_exist_is_nan_and_left_out_of_the_metrics():
    found = summarise([episode(em=1.0, f1=1.0)])
    assert math.isnan(found.gold_title_recall) and math.isnan(found.gold_title_opened)
    logged = found.metrics("eval/greedy")
    assert logged["eval/greedy_em"] == 1.0
    assert "eval/greedy_gold_title_recall" not in logged and "eval/greedy_gold_title_opened" not in logged
    assert "eval/greedy_questions" not in logged
    missing = {"questions", "samples", "gold_title_recall", "gold_title_opened", "prompt_tokens", "generated_tokens"}
    missing |= {f"{name}{end}" for name in ("judge", "pass_at_k") for end in ("", "_low", "_high")}
    assert {name.removeprefix("eval/greedy_") for name in logged} == {
        f.name for f in dataclasses.fields(found)
    } - missing
    assert all(math.isfinite(value) for value in logged.values())
    assert "eval/greedy_gold_title_recall" in summarise([episode(gold_title_recall=0.0)]).metrics("eval/greedy")


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
    assert (first.searches, first.accesses, first.reads) == (len(titles), len(titles), 0)
    assert (first.sample, first.prompt_tokens, first.generated_tokens, first.judge) == (0, None, None, None)
    assert Episode.from_dict(json.loads(json.dumps(first.as_dict())), "here") == first


def test_what_is_no_episode_is_refused_with_its_place():
    stored = episode().as_dict()
    for broken in ({}, stored | {"colour": "red"}, stored | {"actions": [["search"]]}, stored | {"actions": None}):
        with pytest.raises(DataError, match="file, line 3: no episode"):
            Episode.from_dict(broken, "file, line 3")


def played(task: SearchTask, seed: int, chunk: int = 256, samples: int = 1) -> list[Episode]:
    policy = RandomValidPolicy(task)
    parts = play(
        task, policy, ByteTranscript(), questions(task), temperature=1.0, seed=seed, chunk=chunk, samples=samples
    )
    return [episode for part in parts for episode in part]


def test_samples_of_a_question_differ_and_do_not_depend_on_their_number_or_chunks(wiki):
    four = played(wiki, seed=0, samples=4)
    assert [(e.question_id, e.sample) for e in four] == [(q.id, n) for q in questions(wiki) for n in range(4)]
    assert four == played(wiki, seed=0, samples=4, chunk=7) == played(wiki, seed=0, samples=4, chunk=1)
    assert [e for e in four if e.sample == 0] == played(wiki, seed=0)
    assert [e for e in four if e.sample < 2] == played(wiki, seed=0, samples=2)
    different = sum(len({e.actions for e in four[i : i + 4]}) == 4 for i in range(0, len(four), 4))
    assert different > 35


def test_tokens_are_those_of_the_prefixes_and_the_actions(tiny_agent: Agent):
    task = make_task("carl/MiniWiki-v0", split="test", questions=5)
    transcript = tiny_agent.transcript
    ((first, *_),) = play(task, tiny_agent.policy, transcript, questions(task), temperature=0.0)
    assert first.generated_tokens <= first.turns * transcript.max_tokens
    prompt = len(transcript.prompt(task.observation(task.initial(questions(task)[0]))))
    assert first.prompt_tokens >= first.turns * prompt and (first.turns > 1 or first.prompt_tokens == prompt)


class Served(RandomValidPolicy):
    """Counts tokens as a server does: a thousand read and ten written per action."""

    usage = SimpleNamespace(prompt_tokens=5, completion_tokens=7)

    def sample(self, requests):
        self.usage.prompt_tokens += 1000 * len(requests)
        self.usage.completion_tokens += 10 * len(requests)
        return super().sample(requests)


def test_tokens_that_a_server_counted_are_shared_out_without_loss(wiki, monkeypatch: pytest.MonkeyPatch):
    from carl_gym.evaluation import episodes

    monkeypatch.setattr(episodes, "ScriptedPolicy", int)  # this one stands for a hosted model
    found = [e for part in play(wiki, Served(wiki), ByteTranscript(), questions(wiki), temperature=1.0, chunk=16)
             for e in part]  # fmt: skip
    actions = sum(e.turns for e in found)
    assert sum(e.prompt_tokens for e in found) == 1000 * actions
    assert sum(e.generated_tokens for e in found) == 10 * actions
    longest, shortest = max(found, key=lambda e: e.turns), min(found, key=lambda e: e.turns)
    assert longest.prompt_tokens > shortest.prompt_tokens


def test_a_judge_is_asked_about_every_answer(wiki):
    endpoint = Endpoint(compares)
    asked, transcript = questions(wiki)[:20], ByteTranscript()
    try:
        with Judge(JudgeSettings(endpoint.url, "judge-1")) as judge:
            guesses = play(wiki, RandomValidPolicy(wiki), transcript, asked, temperature=1.0, samples=3, judge=judge)
            truth = play(wiki, OraclePolicy(wiki), transcript, asked, temperature=1.0, judge=judge)
            found = [e for part in itertools.chain(guesses, truth) for e in part]
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
    assert {e.judge for e in found} == {0.0, 1.0} and None in {e.answer for e in found}
    assert all(e.judge == float(e.answer in e.gold_answers) for e in found)
    answers = {(e.question, e.answer) for e in found if e.answer}
    assert len(endpoint.requests) == len(answers), "none about an episode without an answer, none twice"
    assert summarise(found[:60]).judge == pytest.approx(np.mean([e.judge for e in found[:60]]))


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


# -- kinds of questions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (Question("x", "?", ("a",), type="bridge", level="hard"), {"type": "bridge", "level": "hard"}),
        (Question("3hop1__1_2_3", "?", ("a",)), {"hops": "3"}),
        (Question("x", "?", ("a",), type="2hop"), {"hops": "2"}),
        (Question("x", "?", ("a",), type="inference", decomposition=(Hop("t", "r", "a"),) * 2),
         {"type": "inference", "hops": "2"}),
        (Question("x", "?", ("a",)), {}),
    ],
)  # fmt: skip
def test_what_is_known_of_a_question(question: Question, expected: dict[str, str]):
    assert traits(question) == expected
    assert hops(question) == (int(expected["hops"]) if "hops" in expected else None)


def test_results_per_kind_by_hand():
    asked = {id: Question(id, "?", ("a",), type=type) for id, type in (("a", "bridge"), ("b", "bridge"), ("c", ""))}
    found = break_down(
        [episode(question_id=id, em=em, f1=em) for id, em in (("a", 1.0), ("b", 0.0), ("c", 1.0))], asked
    )
    assert list(found) == ["type"] and list(found["type"]) == ["bridge"]
    assert (found["type"]["bridge"].questions, found["type"]["bridge"].em) == (2, 0.5)


def test_miniwiki_is_broken_down_by_hops(wiki):
    parts = play(wiki, OraclePolicy(wiki), ByteTranscript(), questions(wiki), temperature=0.0)
    found = break_down([e for part in parts for e in part], wiki.questions)
    assert list(found) == ["hops"] and list(found["hops"]) == ["2", "3"]
    assert [found["hops"][n].turns for n in "23"] == [5.0, 7.0]
    assert sum(group.questions for group in found["hops"].values()) == 40


def test_levels_come_with_the_records():
    plain = {"id": "1", "question": "?", "answers": ["a"], "type": "bridge", "level": "easy"}
    (example,) = read_examples([("here", plain)])
    assert traits(example.question) == {"type": "bridge", "level": "easy"}


def test_a_set_of_questions_has_a_fingerprint(wiki):
    asked = questions(wiki)
    assert questions_fingerprint(asked) == questions_fingerprint(reversed(asked))
    changed = [dataclasses.replace(asked[0], answers=("other",)), *asked[1:]]
    assert len({questions_fingerprint(q) for q in (asked, asked[1:], changed)}) == 3
