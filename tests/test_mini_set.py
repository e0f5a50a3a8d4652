"""The mini set is the last-resort data of HotpotQA-v0, so it must be sound without any download."""

import json
import re
import string
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

QUESTION_KEYS = {"id", "question", "answers", "supporting_titles", "type", "level"}
PASSAGE_KEYS = {"id", "title", "text"}


def load(name: str) -> list[dict[str, Any]]:
    text = (files("carl_gym") / "data" / "mini_hotpotqa" / name).read_text(encoding="utf-8")
    # Not splitlines(): it would also split at U+2028, which is legal inside a JSON string.
    return [json.loads(line) for line in text.split("\n") if line]


QUESTIONS = load("questions.jsonl")
CORPUS = load("corpus.jsonl")
TEXTS = {passage["title"]: passage["text"] for passage in CORPUS}
BRIDGES = [question for question in QUESTIONS if question["type"] == "bridge"]
COMPARISONS = [question for question in QUESTIONS if question["type"] == "comparison"]


def normalise(text: str) -> str:
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(text: str, phrase: str) -> bool:
    # Padded, so that "Theo" is not found in "theory".
    return f" {normalise(phrase)} " in f" {normalise(text)} "


def stem(title: str) -> str:
    """The name as running text has it, without "(film)" or ", Massachusetts"."""
    return re.split(r" \(|, ", title)[0]


def passages_of(question: dict[str, Any]) -> list[str]:
    return [f"{title}. {TEXTS[title]}" for title in question["supporting_titles"]]


def by_id(questions: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("question", questions, ids=lambda question: question["id"])


def test_counts() -> None:
    assert len(QUESTIONS) >= 60
    assert len(CORPUS) >= 300
    assert len(BRIDGES) + len(COMPARISONS) == len(QUESTIONS)
    assert len(BRIDGES) >= 40
    assert len(COMPARISONS) >= 20
    assert {"yes", "no"} <= {question["answers"][0] for question in COMPARISONS}


@pytest.mark.parametrize(
    ("rows", "keys"), [(QUESTIONS, QUESTION_KEYS), (CORPUS, PASSAGE_KEYS)], ids=["questions", "corpus"]
)
def test_no_field_is_missing_or_empty(rows: list[dict[str, Any]], keys: set[str]) -> None:
    assert [row for row in rows if set(row) != keys or not all(row.values())] == []


@pytest.mark.parametrize(
    ("rows", "key"),
    [(QUESTIONS, "id"), (QUESTIONS, "question"), (CORPUS, "id"), (CORPUS, "title"), (CORPUS, "text")],
)
def test_unique(rows: list[dict[str, Any]], key: str) -> None:
    counts = Counter(row[key].lower() for row in rows)
    assert [value for value, count in counts.items() if count > 1] == []


def test_passages_are_short_and_name_their_title() -> None:
    assert [title for title, text in TEXTS.items() if not 15 <= len(text.split()) <= 90] == []
    assert [title for title, text in TEXTS.items() if not contains(text, stem(title))] == []


@by_id(QUESTIONS)
def test_fields_and_supporting_titles(question: dict[str, Any]) -> None:
    assert question["level"] == "mini"
    assert question["question"].endswith(("?", "."))
    assert question["answers"] and all(normalise(answer) for answer in question["answers"])
    assert len(set(question["supporting_titles"])) == 2
    assert set(question["supporting_titles"]) <= set(TEXTS)


@by_id(BRIDGES)
def test_bridge_needs_both_hops(question: dict[str, Any]) -> None:
    first, second = passages_of(question)
    assert contains(second, question["answers"][0])
    assert not [answer for answer in question["answers"] if contains(first, answer)]
    assert not {"yes", "no"} & set(question["answers"])
    first_title, second_title = map(stem, question["supporting_titles"])
    assert contains(first, second_title), "the first passage does not lead to the second"
    assert not contains(question["question"], second_title), "the question names the second hop"
    # Same-name titles (the planet and the god Mercury) cannot be told apart by name.
    if first_title != second_title:
        assert not contains(second, first_title), "the second passage suffices"


@by_id(COMPARISONS)
def test_comparison_needs_both_passages(question: dict[str, Any]) -> None:
    first, second = passages_of(question)
    answer = question["answers"][0]
    assert answer in ("yes", "no") or contains(first, answer) or contains(second, answer)
    first_title, second_title = map(stem, question["supporting_titles"])
    assert not contains(first, second_title)
    assert not contains(second, first_title)
