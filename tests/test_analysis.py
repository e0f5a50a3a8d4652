# ruff: noqa: RUF001 (typographic apostrophes are what is tested)
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.retrieval import analysis
from carl_gym.retrieval.analysis import Encoder, QueryEncoder, analyze, words

# What Lucene 10's EnglishAnalyzer (Anserini's DefaultEnglishAnalyzer) gives for these texts.
LUCENE = {
    "O'Neil's dogs’ dog’s a.b.c. U.S.A. 3.14 1,000,000 a,b 10:30 don't 'quoted' rock'n'roll": (
        "o'neil dog dog a.b.c u.s.a 3.14 1,000,000 b 10 30 don't quot rock'n'rol"
    ),
    "foo:bar U.S. snake_case __init__ ___ a_b 1_000 C++ e-mail": "foo:bar u. snake_cas __init__ a_b 1_000 c e mail",
    "x-ray 12th 4x4 1.5kg a1.b2 1.a a.1 3,a 1;2 AT&T a@b.c": "x rai 12th 4x4 1.5kg a1 b2 1 1 3 1;2 t b.c",
    "relational possibly apology apologies terribly ably": "relat possibl apolog apolog terribl abli",
    "biology geology logi bli nobly ye es ess": "biologi geologi logi bli nobli ye es ess",
    "is as by yes the and ties dies caresses ponies feed agreed": "ye ti di caress poni feed agre",
    "Zürich naïve cafe\u0301 İstanbul ΣΊΣΥΦΟΣ straße m² Ⅳ": "zürich naïv cafe\u0301 istanbul σίσυφοσ straße m ⅳ",
    "x\u00adsoft zero\u200bwidth zwj\u200djoin dog\uff07s": "x\u00adsoft zero width zwj\u200djoin dog",
    "東京タワー ひらがな カタカナ 한국어 ภาษาไทย हिन्दी русский": (
        "東 京 タワー ひ ら が な カタカナ 한국어 ภาษาไทย हिन्दी русский"
    ),
    "😀 👍🏽 🇫🇷 a™ l'été d’Or '90s 10€ $5.00 50%": "😀 👍🏽 🇫🇷 ™ l'été d’or 90 10 5.00 50",
    "!? \x01": "",
}


@pytest.mark.parametrize("text", LUCENE)
def test_terms_are_those_of_lucene(text: str) -> None:
    assert analyze(text) == LUCENE[text].split()


def test_long_words_are_cut() -> None:
    assert [len(word) for word in words("x" * 600 + " é" + "y" * 300)] == [255, 255, 90, 255, 46]


@given(st.text("aB_'.,;:1 s\n-é’\u0301", max_size=40))
def test_both_expressions_find_the_same_words(text: str) -> None:
    """ASCII has an expression of its own: it is several times faster."""
    text = text.encode("ascii", "ignore").decode()
    assert words(text) == analysis._WORD.findall(text)


@given(st.text(max_size=60))
def test_any_text_can_be_analysed_and_an_encoder_numbers_the_same_terms(text: str) -> None:
    vocabulary: dict[str, int] = {}
    numbers = [number for number in Encoder(vocabulary)(text) if number >= 0]
    terms = list(vocabulary)
    assert [terms[number] for number in numbers] == analyze(text)


def test_a_megabyte_without_a_blank_is_analysed_in_linear_time() -> None:
    for text in ("a" * 1_000_000, "é" * 1_000_000, "a.b'" * 250_000, "'" * 1_000_000 + "é", "_" * 1_000_000):
        assert "".join(words(text)).replace("'", "") in text.replace("'", "")


def test_queries_are_numbered_by_the_terms_that_the_vocabulary_has() -> None:
    encode = QueryEncoder({"dog": 7, "run": 3})
    numbers, offsets = encode(["Running dogs run", "", "cats of the", "dog-run\tcat Dog"])
    assert numbers.tolist() == [3, 7, 3, 7, 3, 7] and offsets.tolist() == [0, 3, 3, 3, 6]
    numbers, offsets = encode([])
    assert numbers.tolist() == [] and offsets.tolist() == [0]


@given(st.lists(st.text(max_size=30), max_size=5))
def test_a_query_gets_the_numbers_of_its_terms(texts: list[str]) -> None:
    terms = [analyze(text) for text in texts]
    vocabulary = {term: number for number, term in enumerate({term for words in terms for term in words})}
    numbers, offsets = QueryEncoder(vocabulary)(texts)
    found = [numbers[a:b].tolist() for a, b in pairwise(offsets)]
    assert found == [[vocabulary[term] for term in words] for words in terms]


def test_a_full_memo_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "_MEMO", 1)
    encode = QueryEncoder({"run": 0, "dog": 1})
    for _ in range(2):
        assert encode(["running dogs the running dogs"])[0].tolist() == [0, 1, 0, 1]
