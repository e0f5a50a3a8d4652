import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from test_schemas import BAMBOOGLE, HOTPOTQA, HOTPOTQA_HUB, MUSIQUE, NQ

from carl_gym.envs import data
from carl_gym.envs.data_card import DataCard, FieldMap
from carl_gym.envs.registration import env_card, make_task
from carl_gym.envs.state import Question
from carl_gym.errors import CardError, ConfigError, DataError
from carl_gym.retrieval.corpus import Passage

RECORDS = [HOTPOTQA_HUB, HOTPOTQA_HUB | {"id": "5a8c7595554299585d9e36b6", "question": "Was one?"}]
"""Two records in the exact schema of hotpotqa/hotpot_qa, fullwiki (made up)."""

QUESTION = {"id": "q", "question": "Who?", "answers": ["Ada"], "supporting_titles": ["A", "A", "B"], "type": "bridge"}
PASSAGE = {"id": "p", "title": "A", "text": "Ada."}


def write_folder(folder: Path, questions: list[Any], passages: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("questions", questions), ("corpus", passages)):
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


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
    assert run.stdout.strip() == "hotpotqa/hotpot_qa, fullwiki, validation (2 questions, 2 passages) False"


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
    for part in (
        "not hotpotqa scores",
        "CARL_GYM_DATA",
        "offline mode is on",
        "pass questions= and corpus= (paths), data_dir=",
    ):
        assert part in message
    assert env.source.startswith("mini set (") and env.task.is_mini
    _, info = env.reset(seed=0)
    assert info["source"] == env.source


def test_data_that_nobody_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    with pytest.raises(
        DataError, match=r"no data for 'mine' \(CARL_GYM_DATA is not set\); pass questions= and corpus="
    ):
        data.load_named("mine")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (QUESTION | {"id": "r", "answers": []}, r"questions\.jsonl, line 2: the question has no answer"),
        (QUESTION | {"id": "r", "answers": ["", " "]}, "line 2: the question has no answer"),
        (QUESTION | {"id": "r", "answers": 3}, "line 2: key 'answers' or 'answer' is 3"),
        ({"id": "r", "question": "Who?"}, "line 2: key 'answers' or 'answer' is missing"),
        (QUESTION | {"id": "r", "question": ""}, "line 2: key 'question' is ''"),
        (QUESTION | {"id": "r", "supporting_titles": 7}, "line 2: key 'supporting_titles' is 7"),
        (QUESTION, r"line 2: id 'q' was already used in .*questions\.jsonl, line 1"),
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
    with pytest.raises(DataError, match="there are no questions"):
        data.load_folder(write_folder(tmp_path / "a", [], [PASSAGE]), "x")
    with pytest.raises(DataError, match="the corpus is empty"):
        data.load_folder(write_folder(tmp_path / "b", [QUESTION], []), "x")


def test_a_split_that_the_hub_has_no_answers_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    card = env_card("carl/HotpotQA-v0").data
    with pytest.raises(DataError, match="the splits of hotpotqa/hotpot_qa that have answers are train, validation"):
        data.load_named(card, source_split="test")


@pytest.mark.parametrize("asked", ["dev", "validation"])
def test_the_hub_is_asked_for_the_split_that_the_user_named(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """The hub's records themselves come through the real library in test_schemas and in the cache test above."""
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    wanted: list[tuple[str, str, str]] = []

    def load_hub(*names: str) -> Any:
        wanted.append(names)
        return RECORDS

    monkeypatch.setattr(data, "load_hub", load_hub)
    task = make_task("carl/HotpotQA-v0", source_split=asked)
    assert wanted == [("hotpotqa/hotpot_qa", "fullwiki", "validation")]
    assert {question.split for question in task.questions.values()} == {"validation"}


def test_an_answer_may_be_a_single_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [{"id": "q", "question": "Who?", "answer": "Ada"}], [PASSAGE])
    assert data.load_folder(folder, "x").questions == (Question("q", "Who?", ("Ada",)),)


# --- files and corpora by path ----------------------------------------------------------------------------------------


def write_json(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(list(records)) if path.suffix == ".json" else "\n".join(map(json.dumps, records)))
    return path


def test_questions_by_path_bring_their_own_passages(tmp_path: Path) -> None:
    """A file as HotpotQA's authors publish it, given to an environment as it is."""
    path = write_json(tmp_path / "hotpot_dev_fullwiki_v1.json", HOTPOTQA)
    for id in ("carl/HotpotQA-v0", "carl/SearchQA-v0"):
        task = make_task(id, questions=path)
        assert [passage.title for passage in task.corpus] == ["North Bridge", "South Bridge"]
        assert task.corpus["North Bridge"].text == "North Bridge is of stone. It is old."
        assert task.source.endswith(f"{path} (1 questions, 2 passages)") and not task.is_mini


def test_passages_of_one_title_have_ids_of_their_own(tmp_path: Path) -> None:
    """MuSiQue has many texts under a title; the first keeps the title as its id, so that it is what access opens."""
    other = MUSIQUE | {
        "id": "2hop__1_2",
        "paragraphs": [
            *MUSIQUE["paragraphs"],
            {"idx": 3, "title": "Bridge", "paragraph_text": "Third.", "is_supporting": False},
            {"idx": 4, "title": "Bridge #2", "paragraph_text": "A title like an id.", "is_supporting": False},
        ],
    }
    task = make_task("carl/MuSiQue-v0", questions=write_json(tmp_path / "dev.jsonl", MUSIQUE, other))
    assert list(task.corpus) == [
        Passage("Bridge", "Bridge", "A bridge spans water."),
        Passage("Ada Berg", "Ada Berg", "She was born in Ystad."),
        Passage("Bridge #2", "Bridge", "North Bridge was built by Ada Berg."),
        Passage("Bridge #3", "Bridge", "Third."),
        Passage("Bridge #2 #2", "Bridge #2", "A title like an id."),
    ]


def test_the_users_own_questions_and_passages_need_no_code(tmp_path: Path) -> None:
    questions = write_json(tmp_path / "asked.jsonl", QUESTION)
    passages = write_json(tmp_path / "handbook.jsonl", PASSAGE)
    env = gym.make("carl/SearchQA-v0", questions=str(questions), corpus=str(passages), reward="em").unwrapped
    assert env.source == f"searchqa:{questions} over {passages} (1 questions, 1 passages)"
    env.reset(seed=0)
    assert env.step("<answer>Ada</answer>")[1] == 1.0
    assert env.task.label == "carl/SearchQA-v0"


def test_searchqa_without_data_says_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    with pytest.raises(DataError, match=r"no data for 'searchqa' .*pass questions= and corpus= \(paths\), data_dir="):
        gym.make("carl/SearchQA-v0")
    with pytest.raises(DataError, match="come without passages; this environment needs passages: pass corpus="):
        gym.make("carl/SearchQA-v0", questions=str(write_json(tmp_path / "q.jsonl", QUESTION)))
    with pytest.raises(DataError, match="both say where the questions are"):
        make_task("carl/SearchQA-v0", questions="a", data_dir="b")


def test_open_domain_questions_without_passages_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    questions = write_json(tmp_path / "NQ-open.dev.jsonl", NQ)
    with pytest.raises(DataError, match=r"without passages.*scripts/build_index\.py wiki18-bm25.* corpus="):
        make_task("carl/NQ-v0", questions=questions)
    task = make_task("carl/NQ-v0", questions=questions, corpus=write_json(tmp_path / "corpus.jsonl", PASSAGE))
    assert list(task.questions) == ["nq-open-0"] and len(task.corpus) == 1


def test_wiki18_is_found_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "bamboogle", [], [])
    (tmp_path / "bamboogle" / "corpus.jsonl").unlink()
    (tmp_path / "bamboogle" / "questions.jsonl").write_text(json.dumps(QUESTION))
    monkeypatch.setenv("CARL_GYM_DATA", str(tmp_path))
    with pytest.raises(DataError, match="without passages"):
        make_task("carl/Bamboogle-v0")
    (tmp_path / "wiki18").mkdir()
    wiki = write_json(tmp_path / "wiki18" / "corpus.jsonl", PASSAGE)
    assert f"over {wiki} (1 questions, 1 passages)" in make_task("carl/Bamboogle-v0").source


def test_a_corpus_on_disk_is_taken_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As scripts/build_index.py leaves it behind, by argument and as wiki-18 in the data folder."""
    from carl_gym.retrieval.mapped_corpus import MappedCorpus, map_corpus

    monkeypatch.setenv("CARL_GYM_DATA", str(tmp_path))
    questions = write_json(tmp_path / "questions.jsonl", QUESTION)
    map_corpus([Passage("p", "A", "Ada.")], tmp_path / "wiki18")
    for arguments in ({}, {"corpus": tmp_path / "wiki18"}):
        task = make_task("carl/NQ-v0", questions=questions, **arguments)
        assert isinstance(task.corpus, MappedCorpus) and f"over {tmp_path / 'wiki18'} (1 q" in task.source


def test_triviaqa_searches_the_union_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "b", [QUESTION], [PASSAGE | {"id": "b"}])
    write_folder(tmp_path / "a", [QUESTION], [PASSAGE | {"id": "a"}])
    (write_folder(tmp_path / "corpus_only", [], [PASSAGE]) / "questions.jsonl").unlink()
    (write_folder(tmp_path / "triviaqa", [QUESTION], []) / "corpus.jsonl").unlink()
    monkeypatch.setenv("CARL_GYM_DATA", str(tmp_path))
    task = make_task("carl/TriviaQA-v0")
    assert list(task.corpus.ids) == ["a", "b"]
    assert task.source == f"triviaqa:{tmp_path / 'triviaqa'} over the union of a, b (1 questions, 2 passages)"
    assert make_task("carl/NQ-v0", data_dir=tmp_path / "a", corpus="union").source.startswith(
        f"nq:{tmp_path / 'a'} over the union of a, b"
    )
    monkeypatch.delenv("CARL_GYM_DATA")
    with pytest.raises(DataError, match=r"corpus='union' unites .* CARL_GYM_DATA, which is not set"):
        make_task("carl/NQ-v0", data_dir=tmp_path / "a", corpus="union")


def test_a_union_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (write_folder(tmp_path / "triviaqa", [QUESTION], []) / "corpus.jsonl").unlink()
    monkeypatch.setenv("CARL_GYM_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no folder of .* holds both"):
        make_task("carl/TriviaQA-v0")


def test_an_environment_on_a_server_behaves_as_one_on_the_same_passages(tmp_path: Path) -> None:
    from carl_gym.retrieval.server import create_app, serving

    questions = write_json(tmp_path / "questions.jsonl", QUESTION)
    passages = [PASSAGE, PASSAGE | {"id": "r", "title": "B", "text": "Ada again. " * 300}]
    corpus = write_json(tmp_path / "corpus.jsonl", *passages)
    local = make_task("carl/SearchQA-v0", questions=questions, corpus=corpus)
    actions = ["<search>Ada</search>", "<access>B</access>", "<read/>", "<answer>Ada</answer>"]
    with serving(create_app(local.retriever)) as url:
        remote = make_task("carl/SearchQA-v0", questions=questions, corpus=url)
        assert remote.card.index.kind == "remote" and f" over {url} (1 questions, 2 passages)" in remote.source
        assert remote.corpus.fingerprint == local.corpus.fingerprint
        seen = []
        for task in (local, remote):
            state = task.initial(task.questions["q"])
            texts = []
            for action in actions:
                state = task.transition(state, action)
                texts.append(task.observation(state))
            seen.append((texts, state.turns, state.status))
    assert seen[0] == seen[1]


def test_a_server_is_searched_remotely_or_not_at_all() -> None:
    with pytest.raises(CardError, match="a server is searched by index='remote', not 'bm25'"):
        make_task("carl/HotpotQA-v0", corpus="http://127.0.0.1:9", index="bm25")


def test_a_card_with_fields_of_its_own_reads_files_by_them(tmp_path: Path) -> None:
    card = DataCard("mine", fields=FieldMap(id="uid", question="q", answers="gold.text"))
    path = write_json(tmp_path / "q.jsonl", {"uid": "1", "q": "Who?", "gold": {"text": ["Ada"]}})
    corpus = write_json(tmp_path / "c.jsonl", PASSAGE)
    assert data.load_named(card, questions=path, corpus=corpus).questions == (Question("1", "Who?", ("Ada",)),)


def test_a_csv_file_is_taken_too(tmp_path: Path) -> None:
    path = tmp_path / "bamboogle.csv"
    path.write_text('Question,Answer\n{Question},"{Answer}"\n'.format(**BAMBOOGLE))
    corpus = write_json(tmp_path / "c.jsonl", PASSAGE)
    (question,) = data.load_named("bamboogle", questions=path, corpus=corpus).questions
    assert question.answers == (BAMBOOGLE["Answer"],)


def test_miniwiki_takes_its_arguments_from_make() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("carl/MiniWiki-v0", world=3, split="test", questions=10, hops=(2,)).unwrapped
    assert env.source == "MiniWiki world 3, split test"
    assert len(env.task.questions) == 10
    other = gym.make("carl/MiniWiki-v0", world=4, split="test", questions=10).unwrapped
    assert other.task.corpus.fingerprint != env.task.corpus.fingerprint


def test_the_mini_set_takes_the_place_of_every_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    names = ("HotpotQA", "2WikiMultihopQA", "MuSiQue", "Bamboogle", "NQ", "TriviaQA", "PopQA")
    for name in names:
        with pytest.warns(UserWarning, match=f"Scores on it are not {name.lower()} scores"):
            task = make_task(f"carl/{name}-v0")
        assert task.is_mini and task.label == f"mini set in place of carl/{name}-v0"


def test_the_mini_set_has_no_splits_to_train_and_evaluate_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARL_GYM_DATA", raising=False)
    with pytest.warns(UserWarning), pytest.raises(DataError, match="do not say which split they are from"):
        make_task("carl/HotpotQA-v0", source_split="dev")


def test_a_choice_that_cannot_be_is_an_error_of_configuration() -> None:
    with pytest.raises(ConfigError, match="limit=0"):
        make_task("carl/MiniWiki-v0", limit=0)


@pytest.mark.parametrize("name", ["data_dir", "questions", "corpus"])
@pytest.mark.parametrize("value", [["a.jsonl"], 3, True])
def test_what_is_no_path_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* is no path"):
        make_task("carl/HotpotQA-v0", **{name: value})


@pytest.mark.parametrize(
    ("name", "questions", "passages"),
    [("hotpotqa", 670, 18_258), ("2wikimultihopqa", 932, 12_003), ("musique", 830, 7_721), ("popqa", 454, 5_215),
     ("nq", 359, 4_759), ("bamboogle", 75, 1_763)],
)  # fmt: skip
def test_real_data_is_read_whole(data_root: Path, name: str, questions: int, passages: int) -> None:
    loaded = data.load_folder(data_root / name, name)
    assert (len(loaded.questions), len(loaded.corpus)) == (questions, passages)
    for question in loaded.questions:
        assert question.split in ("train", "dev", "test")
        assert all(loaded.corpus.by_title(title) for title in question.supporting_titles)


def test_real_triviaqa_has_the_passages_of_the_others(data_root: Path) -> None:
    loaded = data.load_named(env_card("carl/TriviaQA-v0").data)
    assert (len(loaded.questions), len(loaded.corpus)) == (380, 49_719)
    assert "over the union of 2wikimultihopqa, bamboogle, hotpotqa, musique, nq, popqa" in loaded.source
