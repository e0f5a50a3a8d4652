"""English text to index terms, as Lucene's EnglishAnalyzer does it: the analysis of Pyserini's and Anserini's BM25.

Words by Unicode's rules (UAX #29), possessives off, lower case, 33 stop words out, the Porter stemmer. Terms equal
Lucene's on ordinary text, so that BM25 numbers can be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import regex
import Stemmer

Longs = npt.NDArray[np.int64]

STOP_WORDS = frozenset(
    re.findall(r"\w+", """
    a an and are as at be but by for if in into is it no not of on or such that the their then there these they this
    to was will with
    """)
)  # fmt: skip
"""Lucene's English stop words."""

LONGEST_WORD = 255
"""Lucene's StandardTokenizer cuts longer words into pieces of this length, in UTF-16 units; here, in characters."""

_MEMO = 1_000_000
"""Words whose term is remembered. English Wikipedia has several times as many, nearly all of them rare."""
_WIDTH = np.dtype(np.int64).itemsize

V = TypeVar("V")


def analyze(text: str) -> list[str]:
    """The terms of a text, in order, with repetitions."""
    return list(filter(None, map(analyze_word, words(text))))


class QueryEncoder:
    """The terms of English texts as numbers in a vocabulary, those that it lacks left out. What stands between two
    blanks is looked up once and remembered, within bounds: no word spans a blank. Threads may share one.

    Args:
        vocabulary: terms and their numbers; it must not change any more.
    """

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self._vocabulary = vocabulary
        self._memo = _Memo(self._numbers, _MEMO)

    def __call__(self, texts: Iterable[str]) -> tuple[Longs, Longs]:
        """The numbers of the texts' terms, one text after another, in order and with repetitions; text i has those from
        `offsets[i]` to `offsets[i + 1]` of the second array.
        """
        encoded = [b"".join(map(self._memo.__getitem__, text.split())) for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)]) // _WIDTH
        return np.frombuffer(b"".join(encoded), np.int64), offsets

    def _numbers(self, text: str) -> bytes:
        """As an array's bytes: nothing puts many pieces together faster than joining bytes."""
        return np.array([self._vocabulary[t] for t in analyze(text) if t in self._vocabulary], np.int64).tobytes()


class Encoder:
    """The terms of English texts as numbers: positions in a vocabulary that grows with the texts.

    Args:
        vocabulary: terms and their numbers so far; new terms are added to it.
    """

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary
        self._memo = _Memo(self._number, _MEMO)

    def __call__(self, text: str) -> list[int]:
        """The numbers of a text's terms, in order; -1 stands for a stop word."""
        return list(map(self._memo.__getitem__, words(text)))

    def _number(self, word: str) -> int:
        term = analyze_word(word)
        return self._vocabulary.setdefault(term, len(self._vocabulary)) if term else -1


def words(text: str) -> list[str]:
    """The words of a text in order: what UAX #29 says, without punctuation."""
    if text.isascii():
        found = _ASCII_WORD.findall(text)
    else:
        # Blanks part words in every script, and Python's own engine is several times faster on what is ASCII.
        found = []
        for i, part in enumerate(_NOT_ASCII.split(text)):
            found += (_WORD if i % 2 else _ASCII_WORD).findall(part)
    if len(text) <= LONGEST_WORD:
        return found
    return found if max(map(len, found), default=0) <= LONGEST_WORD else [p for word in found for p in _pieces(word)]


def _pieces(word: str) -> list[str]:
    return [word[i : i + LONGEST_WORD] for i in range(0, len(word), LONGEST_WORD)]


def analyze_word(word: str) -> str:
    """The index term of a word; empty for a stop word."""
    if len(word) > 1 and word[-1] in "sS" and word[-2] in "'\u2019\uff07":
        word = word[:-2]
    # Java lowers each character by itself; str.lower knows of two letters that depend on or become others.
    word = word.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()
    if len(word) <= 2:
        return "" if word in STOP_WORDS else word
    return "" if word in STOP_WORDS else _stem(word)


def _stem(word: str) -> str:
    """Porter's algorithm with its author's two later changes (-bli, -logi), which Lucene has and Snowball has not."""
    if match := _BLI.search(word):
        word = word[: match.end()] + "e"
    elif match := _LOGI.search(word):
        word = word[: match.end()]
    stemmed: str = _PORTER.stemWord(word)
    return stemmed


class _Memo(dict[str, V]):
    """A dict that computes what it lacks, and keeps it until it is full."""

    def __init__(self, compute: Callable[[str], V], size: int) -> None:
        self._compute, self._size = compute, size

    def __missing__(self, word: str) -> V:
        value = self._compute(word)
        if len(self) < self._size and len(word) <= LONGEST_WORD:
            self[word] = value
        return value


_ASCII_WORD = re.compile(
    r"(?:(?<!_)_+)?[A-Za-z0-9][A-Za-z0-9_]*"
    r"(?:[.:',;](?:(?<=[A-Za-z][.:'])(?=[A-Za-z])|(?<=[0-9][.,;'])(?=[0-9]))[A-Za-z0-9_]+)*"
)
"""Letters and digits in a row, joined by "_", by one of . : ' between letters and by one of . , ; ' between digits."""

_NOT_ASCII = re.compile(r"((?<!\S)[^\s\x80-\U0010ffff]*+[^\x00-\x7f]\S*)")
"""What stands between two blanks and is not all ASCII."""

# The same for all of Unicode: letters L, numbers N, connectors E, katakana K, marks and joiners X, which stay with
# what precedes them. Ideographs and hiragana are words one by one; what is written without spaces, and emoji, as runs.
_X = r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*+"
_L = rf"(?:[\p{{WB=ALetter}}\p{{WB=Hebrew_Letter}}]{_X})++"
_N = rf"(?:\p{{WB=Numeric}}{_X})++"
_E = rf"(?:\p{{WB=ExtendNumLet}}{_X})"
_LETTERS = rf"{_L}(?:[\p{{WB=MidLetter}}\p{{WB=MidNumLet}}:\uff1a']{_X}{_L})*+"
_NUMBER = rf"{_N}(?:[\p{{WB=MidNum}}\p{{WB=MidNumLet}}']{_X}{_N})*+"
_RUN = rf"(?:(?:{_LETTERS}|{_NUMBER})++|(?:\p{{WB=Katakana}}{_X})++)"
_EMOJI = r"(?:\p{Extended_Pictographic}|[0-9#*]\ufe0f?\u20e3)"
_WORD = regex.compile(
    rf"{_EMOJI}{_X}(?:(?<=\u200d){_EMOJI}{_X})*+"
    rf"|(?:(?<![\p{{WB=ExtendNumLet}}\p{{WB=Extend}}\p{{WB=Format}}\p{{WB=ZWJ}}]){_E}++)?+{_RUN}(?:{_E}++{_RUN})*+{_E}*+"
    rf"|[\p{{Script=Han}}\p{{Script=Hiragana}}]{_X}"
    rf"|(?:\p{{Line_Break=Complex_Context}}{_X})++"
    rf"|(?:\p{{WB=Regional_Indicator}}{_X}){{2}}"
)

_ROOT = r"(?:[aeiou]|(?<=[^aeiou])y)[^aeiou].*"
"""A vowel and then a consonant: Porter's measure of what stands before the suffix is not zero."""
_BLI = re.compile(rf"{_ROOT}?bl(?=(?:y|is?|ies)$)")
_LOGI = re.compile(rf"{_ROOT}?log(?=(?:y|is?|ies)$)")
_PORTER = Stemmer.Stemmer("porter")
