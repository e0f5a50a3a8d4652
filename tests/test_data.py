import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from carl_gym.envs import data
from carl_gym.envs.state import Question
from carl_gym.errors import DataError
from carl_gym.retrieval.corpus import Passage

RECORDS: list[dict[str, Any]] = [
    {
        "id": "5a8b57f25542995d1e6f1371",
        "question": "Were both bridges built of stone?",
        "answer": "no",
        "type": "comparison",
        "level": "hard",
        "supporting_facts": {"title": ["North Bridge", "South Bridge", "North Bridge"], "sent_id": [0, 0, 1]},
        "context": {
            "title": ["North Bridge", "South Bridge", "Empty"],
            "sentences": [["North Bridge is of stone.", " It is old."], ["South Bridge is of steel."], []],
        },
    },
    {
        "id": "5a8c7595554299585d9e36b6",
        "question": "In which city is the older bridge?",
        "answer": "Ystad",
        "type": "bridge",
        "level": "medium",
        "supporting_facts": {"title": ["North Bridge"], "sent_id": [1]},
        "context": {
            "title": ["North Bridge", "Ystad"],
            "sentences": [["North Bridge is of stone.", " It is old."], ["Ystad is a city."]],
        },
    },
]
"""Two records in the exact schema of hotpotqa/hotpot_qa, fullwiki (made up)."""

QUESTION = {"id": "q", "question": "Who?", "answers": ["Ada"], "supporting_titles": ["A", "A", "B"], "type": "bridge"}
PASSAGE = {"id": "p", "title": "A", "text": "Ada."}


def write_folder(folder: Path, questions: list[Any], passages: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("questions", questions), ("corpus", passages)):
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def check_mapping(loaded: data.Data) -> None:
    assert loaded.questions == (
        Question(RECORDS[0]["id"], RECORDS[0]["question"], ("no",), ("North Bridge", "South Bridge"), "comparison"),
        Question(RECORDS[1]["id"], RECORDS[1]["question"], ("Ystad",), ("North Bridge",), "bridge"),
    )
    assert loaded.corpus.passages == (
        Passage("North Bridge", "North Bridge", "North Bridge is of stone. It is old."),
        Passage("South Bridge", "South Bridge", "South Bridge is of steel."),
        Passage("Ystad", "Ystad", "Ystad is a city."),
    )


@pytest.mark.parametrize("format", ["json", "parquet"])
def test_records_of_the_original_schema_are_mapped(tmp_path: Path, format: str) -> None:
    """Through the real `datasets` library, in both of its spellings of a list of structs."""
    import datasets

    path = tmp_path / f"records.{format}"
    if format == "json":
        path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    else:
        datasets.Dataset.from_list(RECORDS).to_parquet(path)
    loaded = datasets.load_dataset(format, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    check_mapping(data.from_hotpot_records(loaded, "records"))
    rows = [
        record
        | {key: [dict(zip(record[key], row, strict=True)) for row in zip(*record[key].values(), strict=True)]
           for key in ("supporting_facts", "context")}
        for record in RECORDS
    ]  # fmt: skip
    check_mapping(data.from_hotpot_records(rows, "rows"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "records, record 0: key 'answer' is ''"),
        ({"context": None}, "records, record 0: key 'context' is None"),
        ({"supporting_facts": {"sent_id": []}}, "expected HotpotQA's table with a 'title' column"),
    ],
)
def test_a_malformed_hub_record_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.from_hotpot_records([RECORDS[0] | change], "records")


def test_the_datasets_cache_is_used_without_network(tmp_path: Path) -> None:
    """A cache as `datasets` leaves it behind after a download; a new process finds it with offline mode on."""
    import datasets

    path = tmp_path / "validation.parquet"
    datasets.Dataset.from_list(RECORDS).to_parquet(path)
    cache = tmp_path / "cache"
    datasets.load_dataset("parquet", data_files={"validation": str(path)}, cache_dir=str(cache))
    prepared = next(cache.glob("parquet/*/*/*/dataset_info.json")).parent
    target = cache / "hotpotqa___hotpot_qa" / "fullwiki" / "0.0.0" / ("0" * 40)
    target.parent.mkdir(parents=True)
    prepared.rename(target)
    (target / "parquet-validation.arrow").rename(target / "hotpot_qa-validation.arrow")
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"dataset_name": "hotpot_qa", "config_name": "fullwiki"}
    info["splits"]["validation"]["dataset_name"] = "hotpot_qa"
    (target / "dataset_info.json").write_text(json.dumps(info))

    code = """
import os, sys, warnings
warnings.simplefilter("error")
import gymnasium as gym, carl_gym
env = gym.make("carl/HotpotQA-v0").unwrapped
print(env.source, env.task.is_mini)
"""
    environment = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "CARL_GYM_CACHE": str(tmp_path / "index")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True,
        cwd=Path(data.PACKAGE).parent,
    )  # fmt: skip
    assert run.stdout.strip() == "hotpotqa/hotpot_qa, fullwiki, validation (2 questions, 3 passages) False"


def test_data_dir_comes_first_then_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_folder(tmp_path / "one", [QUESTION], [PASSAGE])
    monkeypatch.setenv("CARL_GYM_DATA", str(tmp_path / "root"))
    write_folder(tmp_path / "root" / "hotpotqa", [QUESTION, QUESTION | {"id": "r"}], [PASSAGE])
    assert len(data.load_named("hotpotqa", data_dir=one).questions) == 1
    found = data.load_named("hotpotqa")
    assert found.source == f"hotpotqa:{tmp_path / 'root' / 'hotpotqa'} (2 questions, 1 passages)"
    assert not found.is_mini
    assert found.questions[0] == Question("q", "Who?", ("Ada",), ("A", "B"), "bridge")


@pytest.mark.parametrize("root", [None, "elsewhere"])
def test_the_mini_set_comes_last_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str | None) -> None:
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    if root:
        monkeypatch.setenv("CARL_GYM_DATA", str(tmp_path / root))
    with pytest.warns(UserWarning, match="using the mini set") as caught:
        env = gym.make("carl/HotpotQA-v0").unwrapped
    (message,) = (str(w.message) for w in caught if "mini set" in str(w.message))
    for part in ("not hotpotqa scores", "CARL_GYM_DATA", "offline mode is on", "pass data_dir="):
        assert part in message
    assert env.source.startswith("mini set (") and env.task.is_mini
    _, info = env.reset(seed=0)
    assert info["source"] == env.source


def test_data_that_nobody_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    with pytest.raises(DataError, match=r"no data for 'mine' .*pass data_dir= or set CARL_GYM_DATA"):
        data.load_named("mine")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (QUESTION | {"id": "r", "answers": []}, r"questions\.jsonl, line 2: the question has no answer"),
        (QUESTION | {"id": "r", "answers": ["", " "]}, "line 2: the question has no answer"),
        (QUESTION | {"id": "r", "answers": 3}, "line 2: key 'answers' is 3"),
        ({"id": "r", "question": "Who?"}, "line 2: key 'answers' is None"),
        (QUESTION | {"id": "r", "question": ""}, "line 2: key 'question' is ''"),
        (QUESTION | {"id": "r", "supporting_titles": "A"}, "line 2: key 'supporting_titles' is 'A'"),
        (QUESTION, "line 2: id 'q' was already used in line 1"),
        ('{"id": "r",', "line 2: not valid JSON"),
    ],
)
def test_a_malformed_question_is_named_by_file_line_and_key(tmp_path: Path, bad: Any, message: str) -> None:
    folder = write_folder(tmp_path, [QUESTION, bad], [PASSAGE])
    with pytest.raises(DataError, match=message) as error:
        gym.make("carl/HotpotQA-v0", data_dir=str(folder))
    assert str(folder) in str(error.value)


def test_a_folder_without_questions_or_passages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither corpus\.jsonl nor corpus\.jsonl\.gz"):
        data.load_folder(tmp_path, "x")
    with pytest.raises(DataError, match="there are no questions in this file"):
        data.load_folder(write_folder(tmp_path / "a", [], [PASSAGE]), "x")
    with pytest.raises(DataError, match="the corpus is empty"):
        data.load_folder(write_folder(tmp_path / "b", [QUESTION], []), "x")


def test_a_folder_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split='train': .* has no splits"):
        data.load_named("hotpotqa", data_dir=write_folder(tmp_path, [QUESTION], [PASSAGE]), split="train")
    with pytest.raises(DataError, match="the splits with answers are 'train' and 'validation'"):
        data.load_hub(*data.HUB["hotpotqa"], "test")


def test_an_answer_may_be_a_single_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [{"id": "q", "question": "Who?", "answer": "Ada"}], [PASSAGE])
    assert data.load_folder(folder, "x").questions == (Question("q", "Who?", ("Ada",)),)


def test_miniwiki_takes_its_arguments_from_make() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("carl/MiniWiki-v0", world=3, split="test", questions=10, hops=(2,)).unwrapped
    assert env.source == "MiniWiki world 3, split test"
    assert len(env.task.questions) == 10
    other = gym.make("carl/MiniWiki-v0", world=4, split="test", questions=10).unwrapped
    assert other.task.corpus.fingerprint != env.task.corpus.fingerprint


def test_real_hotpotqa_is_read_whole(hotpotqa_dir: Path) -> None:
    loaded = data.load_folder(hotpotqa_dir, "hotpotqa")
    assert len(loaded.questions) >= 500 and len(loaded.corpus) >= 15_000
    for question in loaded.questions:
        assert all(loaded.corpus.by_title(title) for title in question.supporting_titles)
