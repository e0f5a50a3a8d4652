"""Sub-sets of questions: disjoint, complete, the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.envs.questions import select
from carl_gym.envs.registration import make_task
from carl_gym.envs.state import Question
from carl_gym.errors import CardError, ConfigError, DataError

QUESTIONS = [Question(f"q{n}", f"Which is {n}?", (str(n),), split=("train", "dev")[n % 2]) for n in range(10)]


def ids(*args: object, **options: object) -> list[str]:
    return [question.id for question in select(QUESTIONS, "ten", **options)]  # type: ignore[arg-type]


questions = st.integers(1, 60).map(lambda n: [Question(f"q{i}", "?", ("a",)) for i in range(n)])


@given(questions, st.integers(1, 60), st.none() | st.integers())
def test_shards_are_disjoint_and_together_complete(all: list[Question], parts: int, seed: int | None) -> None:
    parts = min(parts, len(all))
    shards = [select(all, "x", shuffle=seed, shard=(i, parts)) for i in range(parts)]
    assert sorted(q.id for shard in shards for q in shard) == sorted(q.id for q in all)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(questions, st.integers(), st.data())
def test_a_shuffle_is_a_permutation_that_sub_sets_keep(all: list[Question], seed: int, data: st.DataObject) -> None:
    order = select(all, "x", shuffle=seed)
    assert sorted(q.id for q in order) == sorted(q.id for q in all)
    assert order == select(data.draw(st.permutations(all)), "x", shuffle=seed)
    some = data.draw(st.lists(st.sampled_from(all), min_size=1, unique_by=lambda q: q.id))
    assert select(some, "x", shuffle=seed) == tuple(q for q in order if q in some)


def test_an_order_is_fixed_for_ever_and_depends_on_the_seed() -> None:
    assert ids(shuffle=0) == ["q0", "q9", "q8", "q4", "q6", "q7", "q2", "q3", "q1", "q5"]
    assert len({tuple(ids(shuffle=seed)) for seed in range(20)}) == 20


def test_without_arguments_nothing_changes() -> None:
    assert ids() == [question.id for question in QUESTIONS]


@pytest.mark.parametrize("name", ["dev", "validation"])
def test_a_split_of_the_original_data_has_two_names(name: str) -> None:
    assert ids(source_split=name) == ["q1", "q3", "q5", "q7", "q9"]


def test_ids_come_as_a_list_or_from_a_file_and_set_the_order(tmp_path: Path) -> None:
    wanted = ["q3", "q1", "q8"]
    (tmp_path / "ids.txt").write_text("q3\nq1\n\nq8\n")
    (tmp_path / "ids.json").write_text(json.dumps(wanted))
    for given_ids in (wanted, tuple(wanted), tmp_path / "ids.txt", str(tmp_path / "ids.json")):
        assert ids(question_ids=given_ids) == wanted


def test_steps_apply_in_the_order_that_is_documented() -> None:
    chosen = ids(source_split="dev", question_ids=["q9", "q1", "q5", "q3"], shuffle=4, limit=3)
    assert len(chosen) == 3 and set(chosen) < {"q9", "q1", "q5", "q3"}
    parts = [
        ids(source_split="dev", question_ids=["q9", "q1", "q5", "q3"], shuffle=4, limit=3, shard=[i, 2]) for i in (0, 1)
    ]
    assert parts == [chosen[0::2], chosen[1::2]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_split": "test"}, DataError, r"no question is of the split 'test'; splits there: dev \(5 q.*train"),
        ({"question_ids": ["q1", "q11", "q12"]}, DataError, r"'q11' \(and 1 more of these\); did you mean 'q1'"),
        ({"question_ids": ["zzz"]}, DataError, "ten has no question 'zzz'; an id there is 'q0'"),
        ({"source_split": "dev", "question_ids": ["q0"]}, DataError, "ten, split dev has no question 'q0'"),
        ({"question_ids": ["q1", "q1"]}, DataError, "'q1' is named twice"),
        ({"question_ids": []}, DataError, "the list is empty"),
        ({"question_ids": "none.txt"}, DataError, r"question_ids: none\.txt cannot be read"),
        ({"limit": 0}, ConfigError, "limit=0; expected a whole number of at least 1"),
        ({"limit": "3"}, ConfigError, "limit='3'"),
        ({"question_ids": 3}, ConfigError, r"question_ids=3; expected a list of ids"),
        ({"question_ids": ["q1", ["q2"]]}, ConfigError, r"question_ids=\['q1', \['q2'\]\]; expected a list of ids"),
        ({"shuffle": 1.5}, ConfigError, "shuffle=1.5; expected a whole number"),
        ({"shard": (2, 2)}, ConfigError, "there is no part 2 of 2"),
        ({"shard": (-1, 2)}, ConfigError, "there is no part -1 of 2"),
        ({"shard": 3}, ConfigError, r"shard=3; expected \(i, n\)"),
        ({"shard": "01"}, ConfigError, "shard='01'; expected"),
        ({"shard": (10, 11)}, DataError, "part 10 of 11 of 10 questions is empty"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_is_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ids(**options)


def test_a_file_that_is_no_list_of_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text('{"q1": 1}')
    with pytest.raises(DataError, match="holds no list of texts"):
        ids(question_ids=tmp_path / "ids.json")
    (tmp_path / "ids.json").write_text("[")
    with pytest.raises(DataError, match="cannot be read"):
        ids(question_ids=tmp_path / "ids.json")


def test_questions_without_splits_say_so() -> None:
    with pytest.raises(DataError, match="the questions do not say which split they are from"):
        select([Question("q", "?", ("a",))], "one", source_split="dev")


def test_environments_take_sub_sets_and_say_so() -> None:
    whole = make_task("carl/MiniWiki-v0", questions=30)
    parts = [make_task("carl/MiniWiki-v0", questions=30, shuffle=1, limit=20, shard=(i, 2)) for i in range(2)]
    assert [len(part.questions) for part in parts] == [10, 10]
    assert not parts[0].questions.keys() & parts[1].questions.keys()
    assert parts[0].source == "MiniWiki world 0, split train, 10 of its questions"
    some = list(whole.questions)[5:8]
    assert list(make_task("carl/MiniWiki-v0", questions=30, question_ids=some).questions) == some
    with pytest.raises(CardError, match=r"unknown argument 'shards' \(did you mean 'shard'\?\)"):
        make_task("carl/MiniWiki-v0", shards=(0, 2))


@pytest.mark.parametrize(
    ("name", "training", "evaluation"),
    [("HotpotQA", "train", "dev"), ("2WikiMultihopQA", "train", "validation"), ("MuSiQue", "train", "dev")],
)
def test_real_data_is_split_as_its_authors_did(
    data_root: Path, name: str, training: str, evaluation: str, tmp_path: Path
) -> None:
    train = make_task(f"carl/{name}-v0", source_split=training)
    dev = make_task(f"carl/{name}-v0", source_split=evaluation)
    both = make_task(f"carl/{name}-v0")
    assert train.questions and dev.questions and not train.questions.keys() & dev.questions.keys()
    assert {q.split for q in train.questions.values()} == {"train"}
    assert train.corpus.fingerprint == dev.corpus.fingerprint
    listed = tmp_path / "evaluation.txt"
    listed.write_text("\n".join(dev.questions))
    assert make_task(f"carl/{name}-v0", question_ids=listed).questions == dev.questions
    assert len(both.questions) >= len(train.questions) + len(dev.questions)
