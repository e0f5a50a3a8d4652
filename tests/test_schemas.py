"""Records in the exact schema of each benchmark (all made up), from files and through the real `datasets` library."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.envs.data_card import FieldMap
from carl_gym.envs.schemas import SCHEMAS, Context, Example, detect, read_examples, read_records
from carl_gym.envs.state import Hop, Question
from carl_gym.errors import CardError, DataError

BRIDGES = (
    Context("North Bridge", "North Bridge is of stone. It is old."),
    Context("South Bridge", "South Bridge is of steel."),
)

HOTPOTQA = {
    "_id": "5a8b57f25542995d1e6f1371",
    "answer": "no",
    "question": "Were both bridges built of stone?",
    "supporting_facts": [["North Bridge", 0], ["South Bridge", 0], ["North Bridge", 1]],
    "context": [
        ["North Bridge", ["North Bridge is of stone.", " It is old."]],
        ["South Bridge", ["South Bridge is of steel."]],
    ],
    "type": "comparison",
    "level": "hard",
}
HOTPOTQA_HUB = {
    "id": HOTPOTQA["_id"],
    **{key: HOTPOTQA[key] for key in ("question", "answer", "type", "level")},
    "supporting_facts": {"title": ["North Bridge", "South Bridge", "North Bridge"], "sent_id": [0, 0, 1]},
    "context": {
        "title": ["North Bridge", "South Bridge"],
        "sentences": [["North Bridge is of stone.", " It is old."], ["South Bridge is of steel."]],
    },
}
BOTH = Example(
    Question(
        HOTPOTQA["_id"], HOTPOTQA["question"], ("no",), ("North Bridge", "South Bridge"), "comparison", level="hard"
    ),
    BRIDGES,
)

TWOWIKI = {
    "_id": "8813f87c0bdd11eba7f7acde48001122",
    "type": "compositional",
    "question": "In which city was the builder of North Bridge born?",
    "context": [
        ["North Bridge", ["North Bridge was built by Ada Berg.", "It is of stone."]],
        ["Ada Berg", ["Ada Berg was born in Ystad."]],
    ],
    "supporting_facts": [["North Bridge", 0], ["Ada Berg", 0]],
    "evidences": [["North Bridge", "builder", "Ada Berg"], ["Ada Berg", "place of birth", "Ystad"]],
    "answer": "Ystad",
    "evidences_id": [["Q1", "builder", "Q2"], ["Q2", "place of birth", "Q3"]],
    "answer_id": "Q3",
    "entity_ids": "Q1_Q2",
}
TWOWIKI_TEXTS = TWOWIKI | {key: json.dumps(TWOWIKI[key]) for key in ("context", "supporting_facts", "evidences")}
TWOWIKI_REPACKED = {
    "id": TWOWIKI["_id"],
    **{key: TWOWIKI[key] for key in ("question", "answer", "type", "evidences")},
    "supporting_facts": {"title": ["North Bridge", "Ada Berg"], "sent_id": [0, 0]},
    "context": {
        "title": ["North Bridge", "Ada Berg"],
        "sentences": [["North Bridge was built by Ada Berg.", "It is of stone."], ["Ada Berg was born in Ystad."]],
    },
}
BUILDER = Example(
    Question(
        TWOWIKI["_id"], TWOWIKI["question"], ("Ystad",), ("North Bridge", "Ada Berg"), "compositional",
        (Hop("North Bridge", "builder", "Ada Berg"), Hop("Ada Berg", "place of birth", "Ystad")),
    ),
    (
        Context("North Bridge", "North Bridge was built by Ada Berg. It is of stone."),
        Context("Ada Berg", "Ada Berg was born in Ystad."),
    ),
)  # fmt: skip

MUSIQUE = {
    "id": "2hop__460946_294723",
    "paragraphs": [
        {"idx": 0, "title": "Bridge", "paragraph_text": "A bridge spans water.", "is_supporting": False},
        {"idx": 1, "title": "Ada Berg", "paragraph_text": "She was born in Ystad.", "is_supporting": True},
        {"idx": 2, "title": "Bridge", "paragraph_text": "North Bridge was built by Ada Berg.", "is_supporting": True},
    ],
    "question": "Where was the builder of North Bridge born?",
    "question_decomposition": [
        {"id": 460946, "question": "North Bridge >> builder", "answer": "Ada Berg", "paragraph_support_idx": 2},
        {"id": 294723, "question": "#1 >> place of birth", "answer": "Ystad", "paragraph_support_idx": 1},
    ],
    "answer": "Ystad",
    "answer_aliases": ["Ystad, Sweden"],
    "answerable": True,
}
HOPS = Example(
    Question(
        MUSIQUE["id"], MUSIQUE["question"], ("Ystad", "Ystad, Sweden"), ("Bridge", "Ada Berg"), "",
        (Hop("Bridge", "North Bridge >> builder", "Ada Berg"), Hop("Ada Berg", "#1 >> place of birth", "Ystad")),
    ),
    (
        Context("Bridge", "A bridge spans water."),
        Context("Ada Berg", "She was born in Ystad."),
        Context("Bridge", "North Bridge was built by Ada Berg."),
    ),
)  # fmt: skip

NQ = {"question": "who built north bridge", "answer": ["Ada Berg", "A. Berg"]}
NQ_EXAMPLE = Example(Question("nq-open-0", "who built north bridge", ("Ada Berg", "A. Berg")), ())

TRIVIAQA_HUB = {
    "question": "Who built North Bridge?",
    "question_id": "tc_2",
    "question_source": "http://www.triviacountry.com/",
    "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
    "search_results": {
        "description": [], "filename": [], "rank": [], "title": [], "url": [], "search_context": [],
    },
    "answer": {
        "aliases": ["Ada Berg", "Berg, Ada"],
        "normalized_aliases": ["ada berg", "berg ada"],
        "matched_wiki_entity_name": "",
        "normalized_matched_wiki_entity_name": "",
        "normalized_value": "ada berg",
        "type": "WikipediaEntity",
        "value": "Ada Berg",
    },
}  # fmt: skip
TRIVIAQA = {
    "Data": [
        {
            "Answer": {
                "Aliases": ["Ada Berg", "Berg, Ada"], "MatchedWikiEntityName": "Ada Berg",
                "NormalizedAliases": ["ada berg", "berg ada"], "NormalizedMatchedWikiEntityName": "ada berg",
                "NormalizedValue": "ada berg", "Type": "WikipediaEntity", "Value": "Ada Berg",
            },
            "EntityPages": [], "Question": "Who built North Bridge?", "QuestionId": "tc_2",
            "QuestionSource": "http://www.triviacountry.com/", "SearchResults": [],
        }
    ],
    "Domain": "unfiltered", "Split": "dev", "VerifiedEval": False, "Version": 1.0,
}  # fmt: skip
TRIVIA = Question("tc_2", "Who built North Bridge?", ("Ada Berg", "Berg, Ada", "ada berg", "berg ada"))

POPQA = {
    "id": "4222362", "subj": "North Bridge", "prop": "architect", "obj": "Ada Berg", "subj_id": "1850297",
    "prop_id": "22", "obj_id": "2834605", "s_aliases": "[]", "o_aliases": '["A. Berg"]', "s_uri": "http://a/Q1",
    "o_uri": "http://a/Q2", "s_wiki_title": "North Bridge", "o_wiki_title": "Ada Berg", "s_pop": "142",
    "o_pop": "25692", "question": "Who was the architect of North Bridge?",
    "possible_answers": '["Ada Berg", "A. \\"Stone\\" Berg"]',
}  # fmt: skip
POP = Example(
    Question("4222362", POPQA["question"], ("Ada Berg", 'A. "Stone" Berg'), ("North Bridge",), "architect"), ()
)

BAMBOOGLE = {"Question": "Who was king when North Bridge was built?", "Answer": "Sven II, the Bold"}
BOLD = Example(Question("bamboogle-0", BAMBOOGLE["Question"], (BAMBOOGLE["Answer"],)), ())

FLASHRAG = {
    "id": "dev_0", "question": "Who built North Bridge?", "golden_answers": ["Ada Berg"],
    "metadata": {"type": "bridge", "supporting_facts": {"title": ["North Bridge"], "sent_id": [0]}},
}  # fmt: skip
FLASH = Example(Question("dev_0", "Who built North Bridge?", ("Ada Berg",), ("North Bridge",), "bridge"), ())

SEARCH_R1 = {
    "id": "test_0",
    "question": "Who built North Bridge?",
    "golden_answers": ["Ada Berg"],
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Answer the given question. Who built North Bridge?\n"}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Ada Berg", "A. Berg"]}},
    "extra_info": {"split": "test", "index": 0},
    "metadata": None,
}
R1 = Example(Question("nq-test_0", "Who built North Bridge?", ("Ada Berg", "A. Berg"), type="nq", split="test"), ())

RECORDS: list[tuple[str, dict[str, Any], Example]] = [
    ("hotpotqa", HOTPOTQA, BOTH),
    ("hotpotqa", HOTPOTQA_HUB, BOTH),
    ("2wikimultihopqa", TWOWIKI, BUILDER),
    ("2wikimultihopqa", TWOWIKI_TEXTS, BUILDER),
    ("2wikimultihopqa", TWOWIKI_REPACKED, BUILDER),
    ("musique", MUSIQUE, HOPS),
    ("nq-open", NQ, NQ_EXAMPLE),
    ("triviaqa", TRIVIAQA_HUB, Example(TRIVIA, ())),
    ("popqa", POPQA, POP),
    ("bamboogle", BAMBOOGLE, BOLD),
    ("flashrag", FLASHRAG, FLASH),
    ("search-r1", SEARCH_R1, R1),
    (
        "plain",
        {"id": "q", "question": "Who?", "answer": "Ada", "supporting_titles": ["A", "A"], "type": "x", "split": "dev"},
        Example(Question("q", "Who?", ("Ada",), ("A",), "x", split="dev"), ()),
    ),
]


def read(*records: Any, **options: Any) -> list[Example]:
    return list(read_examples(((f"record {n}", record) for n, record in enumerate(records)), **options))


@pytest.mark.parametrize(("schema", "record", "example"), RECORDS)
def test_a_record_is_recognised_and_read(schema: str, record: dict[str, Any], example: Example) -> None:
    assert detect(record, "here") == schema
    assert read(record) == read(record, schema=schema) == [example]


@pytest.mark.parametrize(("schema", "record", "example"), RECORDS)
def test_records_mean_the_same_through_the_datasets_library(
    schema: str, record: dict[str, Any], example: Example, tmp_path: Path
) -> None:
    """As JSON lines, and as parquet when its columns can be told apart by type (rows of text and number cannot)."""
    import datasets

    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record) + "\n")
    options: dict[str, Any] = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    mixed = record is HOTPOTQA or record is TWOWIKI
    if not mixed:
        loaded = datasets.load_dataset("json", data_files=str(path), **options)
        assert read(*loaded) == [example]
        table = tmp_path / "records.parquet"
        loaded.to_parquet(table)
        assert read(*datasets.load_dataset("parquet", data_files=str(table), **options)) == [example]
        assert list(read_examples(read_records(table))) == [example]
    assert list(read_examples(read_records(path))) == [example]


def write(path: Path, content: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_original_file_is_read(tmp_path: Path, ending: str) -> None:
    """The file forms that the data sets are published in."""
    import datasets

    def examples(name: str, content: str) -> list[Example]:
        return list(read_examples(read_records(write(tmp_path / f"{name}{ending}", content))))

    assert examples("hotpot_dev_fullwiki_v1.json", json.dumps([HOTPOTQA])) == [BOTH]
    assert examples("dev.json", json.dumps([TWOWIKI])) == [BUILDER]
    assert examples("musique_ans_v1.0_dev.jsonl", json.dumps(MUSIQUE) + "\n") == [HOPS]
    assert examples("NQ-open.dev.jsonl", json.dumps(NQ) + "\n") == [NQ_EXAMPLE]
    (trivia,) = examples("unfiltered-web-dev.json", json.dumps(TRIVIAQA))
    assert trivia.question == Question(TRIVIA.id, TRIVIA.text, TRIVIA.answers, split="dev")

    for name, row, example, delimiter in (("popQA.tsv", POPQA, POP, "\t"), ("bamboogle.csv", BAMBOOGLE, BOLD, ",")):
        plain = tmp_path / name
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), delimiter=delimiter)
            writer.writeheader()
            writer.writerow(row)
        assert examples(name, plain.read_text()) == [example]
        loaded = datasets.load_dataset(
            "csv", data_files=str(plain), delimiter=delimiter, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert read(*loaded) == [example]


def test_answers_may_be_arrays() -> None:
    """What pandas gives for a list column of a parquet file."""
    target = {"ground_truth": {"target": np.array(["Ada Berg", "A. Berg"], dtype=object)}}
    assert read(SEARCH_R1 | {"reward_model": target}) == [R1]
    assert read(FLASHRAG | {"golden_answers": np.array(["Ada Berg"])}) == [FLASH]


def test_questions_without_ids_are_numbered_and_carry_their_split() -> None:
    first, second = read(NQ, NQ | {"question": "and south bridge"}, split="dev")
    assert (first.question.id, second.question.id) == ("nq-open-dev-0", "nq-open-dev-1")
    assert first.question.split == second.question.split == "dev"


def test_files_that_unite_data_sets_keep_their_ids_apart() -> None:
    one, two = read(SEARCH_R1, SEARCH_R1 | {"data_source": "hotpotqa"})
    assert (one.question.id, two.question.id) == ("nq-test_0", "hotpotqa-test_0")


def test_unanswerable_questions_are_left_out() -> None:
    """MuSiQue-Full holds each question a second time, under the same id, without its supporting paragraphs."""
    assert read(MUSIQUE, MUSIQUE | {"answerable": False}) == [HOPS]


def test_own_fields_are_a_map_and_need_no_schema() -> None:
    record = {"meta": {"uid": 7}, "q": {"text": "Who?"}, "gold": [{"a": "Ada"}], "pages": ["A"], "part": "dev"}
    fields = FieldMap("meta.uid", "q.text", "gold.0.a", "pages", "", "part")
    assert read(record, fields=fields) == [Example(Question("7", "Who?", ("Ada",), ("A",), split="dev"), ())]
    (example,) = read(HOTPOTQA, schema="hotpotqa", fields=FieldMap(type="level"))
    assert example.question.type == "hard" and example.contexts == BRIDGES


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Who?"}, "record 0: a record with the keys prompt is in no known schema; known schemas and "
                             "their keys: plain: answers, id, question; hotpotqa"),
        ({"id": "1", "question": "Who?", "answers": ["A"], "golden_answers": ["B"]}, "could be plain or flashrag"),
        (HOTPOTQA | {"question": " "}, "record 0: key 'question' is ' '"),
        (HOTPOTQA | {"answer": ""}, "the question has no answer under key 'answer'"),
        (HOTPOTQA | {"answer": 3}, "key 'answer' is 3; expected a text or a list of texts"),
        (HOTPOTQA | {"context": None}, "key 'context' is missing; expected rows of title"),
        (HOTPOTQA | {"context": [["A", "text"]]}, "key 'context' is .*expected rows of title"),
        (HOTPOTQA | {"supporting_facts": {"sent_id": []}}, "key 'supporting_facts' is {'sent_id': .*expected rows of"),
        (HOTPOTQA | {"supporting_facts": "North"}, "key 'supporting_facts' is a text that is no JSON"),
        (TWOWIKI | {"evidences": [["a", "b"]]}, "key 'evidences' is .*expected rows of fact"),
        (MUSIQUE | {"paragraphs": [{"title": "A"}]}, "key 'paragraphs' is .* expected rows of idx"),
        (TRIVIAQA_HUB | {"answer": {"value": "<unk>", "aliases": [], "normalized_aliases": []}}, "no answer under"),
        (TRIVIAQA_HUB | {"answer": "Ada"}, "expected TriviaQA's table with 'value' and 'aliases'"),
        (POPQA | {"possible_answers": "[]"}, "no answer under key 'possible_answers'"),
        (SEARCH_R1 | {"extra_info": {"split": ["test"]}}, "key 'extra_info.split' is"),
    ],
)  # fmt: skip
def test_a_record_that_does_not_fit_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(record)


def test_a_repeated_id_and_an_unknown_schema_are_refused() -> None:
    with pytest.raises(DataError, match=f"record 1: id '{HOTPOTQA['_id']}' was already used in record 0"):
        read(HOTPOTQA, HOTPOTQA)
    with pytest.raises(CardError, match="unknown schema 'hotpot'; one of auto, plain, hotpotqa"):
        read(HOTPOTQA, schema="hotpot")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.json", '{"a": 1}', "cannot be read as .json: expected a list of records"),
        ("q.json", '{"a": 1}\n{"a": 2}', "cannot be read as .json: Extra data"),
        ("q.csv", "Question,Answer\nWho?\n", "line 2 has not the 2 cells of the header"),
        ("q.csv", "Question,Answer\nWho?,A,B\n", "line 2 has not the 2 cells of the header"),
        ("q.parquet", "no", "cannot be read as .parquet"),
        ("q.txt", "Who?", "questions are read from .jsonl, .json, .csv, .tsv"),
        ("q.jsonl", "{", "line 1: not valid JSON"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        list(read_records(write(tmp_path / name, content)))
    assert str(tmp_path / name) in str(error.value)
    with pytest.raises(DataError, match="no such file"):
        list(read_records(tmp_path / "none.csv"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_whatever_a_record_holds_it_is_read_or_refused_with_a_data_error(data: st.DataObject) -> None:
    _, record, _ = data.draw(st.sampled_from(RECORDS))
    key = data.draw(st.sampled_from(sorted(record)))
    with contextlib.suppress(DataError):
        read(record | {key: data.draw(values)})


def test_every_schema_is_tested() -> None:
    assert {schema for schema, _, _ in RECORDS} == set(SCHEMAS)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "bamboogle.csv"
    path.write_bytes(b"\xef\xbb\xbfQuestion,Answer\nWho?,Ada\n")
    (example,) = read_examples(read_records(path))
    assert example.question.answers == ("Ada",)


@pytest.mark.parametrize("cell", ["['a', 'b']", '["a", "b"'])
def test_a_broken_list_of_answers_is_refused(cell: str) -> None:
    records = [("line 1", {"question": "Who?", "golden_answers": cell, "id": "1"})]
    with pytest.raises(DataError, match="is no JSON list"):
        list(read_examples(records))
