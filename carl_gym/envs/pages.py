"""Long texts in parts: the beginning of a text within a limit, and pages. Limits count characters or tokens."""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from carl_gym.cards import beside, list_cards
from carl_gym.errors import CardError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

K = TypeVar("K")
V = TypeVar("V")


class Ruler:
    """Measures and cuts texts.

    Args:
        tokenizer: what counts; None for characters. Tokens are those of the text encoded as a whole, without any that
            the tokenizer adds.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    def shorten(self, text: str, length: int) -> str:
        """The longest beginning of `text` within `length` that ends a sentence, else one that ends a word.

        A first word that is itself longer is cut. Reads no more of a long text than it needs.
        """
        if self._tokenizer is None:
            return text if len(text) <= length else text[: _cut(text, 0, length)]
        size = 8 * length + 64
        while True:
            starts = self._token_starts(text[:size])
            # The last tokens of a beginning may differ from the whole text's, so some more than needed are asked for.
            if size >= len(text) or len(starts) > length + 8:
                break
            size *= 2
        return text if len(starts) <= length else text[: _cut(text, 0, starts[length])]

    def page_starts(self, text: str, length: int) -> tuple[int, ...]:
        """Where the pages of `text` begin: page i is `text[starts[i]:starts[i + 1]]`, so that nothing is lost.

        A page is within `length` apart from the white space around it, and ends a sentence or a word as `shorten` does.
        At least one page; linear in the length of the text.
        """
        starts = [0]
        position = _skip_space(text, 0)
        tokens = None if self._tokenizer is None else self._token_starts(text)
        while True:
            if tokens is None:
                bound = position + length
            else:
                after = bisect_left(tokens, position) + length
                bound = tokens[after] if after < len(tokens) else len(text)
            if bound >= len(text):
                return tuple(starts)
            end = _cut(text, position, max(bound, position + 1))  # one character, however many tokens it takes
            position = _skip_space(text, end)
            if position == len(text):
                return tuple(starts)
            starts.append(position)

    def _token_starts(self, text: str) -> list[int]:
        assert self._tokenizer is not None
        return [start for start, _ in self._tokenizer.encode(text, add_special_tokens=False).offsets]


class Memo(Generic[K, V]):
    """Values worth keeping, up to a total weight; when it is reached, all are dropped and it starts again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weight = 0
        self._values: dict[K, V] = {}
        self.get = self._values.get
        """The value kept under a key, else None."""

    def keep(self, key: K, value: V, weight: int) -> V:
        """Keep `value` unless it alone outweighs the limit, and return it."""
        if self._weight + weight > self._limit:
            self._values.clear()
            self._weight = 0
        if weight <= self._limit:
            self._values[key] = value
            self._weight += weight
        return value


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name: a folder with tokenizer.json (or that file), an agent card's model, or a hub id.

    Raises:
        CardError: there is none.
    """
    from tokenizers import Tokenizer

    try:
        for path in _tokenizer_files(name):
            if path.is_file():
                tokenizer = Tokenizer.from_file(str(path))
                break
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception for files and hub alike
        raise CardError(
            f"tokenizer {name!r} cannot be loaded: {error}; give a folder with tokenizer.json, an agent's name or a "
            "hub id"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ruler(tokenizer: str) -> Ruler:
    """The ruler of a card: characters for "", else tokens. Raises CardError as `load_tokenizer` does."""
    return Ruler(load_tokenizer(tokenizer) if tokenizer else None)


def _tokenizer_files(name: str) -> list[Path]:
    """Where a tokenizer of this name may lie on disk."""
    files = [Path(name), Path(name) / "tokenizer.json"]
    if card := list_cards("agents").get(name):
        model = tomllib.loads(card.read_text(encoding="utf-8")).get("model", "")
        if folder := beside(card, "model", str(model)):
            files.append(folder / "tokenizer.json")
    return files


def _cut(text: str, start: int, bound: int) -> int:
    """Where the longest good part of `text[start:bound]` ends; there is text behind `bound`."""
    head = text[start : bound + 1]
    sentence = max(head.rfind(". "), head.rfind("! "), head.rfind("? "))
    if sentence > 0:
        return start + sentence + 1
    words = head.rsplit(None, 1)
    part = words[0] if len(words) == 2 and not head[-1].isspace() else head[: bound - start]
    return start + len(part.rstrip())


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
