"""Sub-sets of questions and their order: by original split, by id, shuffled, shortened, shared out.

Applied in this order: `source_split`, `question_ids`, `shuffle`, `limit`, `shard`. Every step is a function of its
arguments and of the questions' ids alone, so that machines that share nothing agree.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from carl_gym.envs.state import Question
from carl_gym.errors import ConfigError, DataError

VALIDATION = ("dev", "validation")
"""Two names for one split: data sets use either."""


def select(
    questions: Sequence[Question],
    source: str,
    *,
    source_split: str | None = None,
    question_ids: Sequence[str] | str | Path | None = None,
    shuffle: int | None = None,
    limit: int | None = None,
    shard: Sequence[int] | None = None,
) -> tuple[Question, ...]:
    """Some of the questions, in an order.

    Args:
        questions: all of them, with unique ids.
        source: names them in errors.
        source_split: only those of this split of the original data; `dev` and `validation` mean the same.
        question_ids: only these, in this order: a list, or a file with one id a line (.json: a list).
        shuffle: seed of a random order. A question's place depends on seed and id alone: sub-sets keep the order.
        limit: the first so many.
        shard: `(i, n)`: part i of n, counted from 0; the parts are disjoint and together complete.

    Raises:
        ConfigError: a limit below 1, a shard that does not exist, or an argument of another type.
        DataError: an unknown or repeated id, or nothing is left; says what there is.
    """
    chosen = list(questions)
    if source_split is not None:
        chosen = _of_split(chosen, source_split, source)
    if question_ids is not None:
        chosen = _by_id(chosen, question_ids, source if source_split is None else f"{source}, split {source_split}")
    if shuffle is not None:
        if type(shuffle) is not int:
            raise ConfigError(f"shuffle={shuffle!r}; expected a whole number, the seed of the order")
        chosen.sort(key=lambda question: blake2b(f"{shuffle} {question.id}".encode("utf-8", "surrogatepass")).digest())
    if limit is not None:
        if type(limit) is not int or limit < 1:
            raise ConfigError(f"limit={limit!r}; expected a whole number of at least 1")
        chosen = chosen[:limit]
    if shard is not None:
        part, parts = _shard(shard)
        if part >= len(chosen):
            raise DataError(f"{source}: part {part} of {parts} of {len(chosen)} questions is empty; take fewer parts")
        chosen = chosen[part::parts]
    return tuple(chosen)


def same_split(one: str, other: str) -> bool:
    """Whether two names mean one split."""
    return one == other or (one in VALIDATION and other in VALIDATION)


def _of_split(questions: list[Question], split: str, source: str) -> list[Question]:
    chosen = [question for question in questions if same_split(question.split, split)]
    if not chosen:
        counts = Counter(question.split for question in questions if question.split)
        there = ", ".join(f"{name} ({count} questions)" for name, count in sorted(counts.items()))
        raise DataError(
            f"{source}: no question is of the split {split!r}; "
            + (f"splits there: {there}" if there else "the questions do not say which split they are from")
        )
    return chosen


def _by_id(questions: list[Question], ids: Sequence[str] | str | Path, source: str) -> list[Question]:
    where = f"question_ids from {ids}" if isinstance(ids, (str, Path)) else "question_ids"
    wanted = _read_ids(Path(ids)) if isinstance(ids, (str, Path)) else _list(ids)
    known = {question.id: question for question in questions}
    if not wanted:
        raise DataError(f"{where}: the list is empty; name at least one question")
    if len(set(wanted)) != len(wanted):
        repeated = next(id for id, count in Counter(wanted).items() if count > 1)
        raise DataError(f"{where}: {repeated!r} is named twice; name every question once")
    if missing := [id for id in wanted if id not in known]:
        close = difflib.get_close_matches(str(missing[0]), known, n=1)
        raise DataError(
            f"{where}: {source} has no question {missing[0]!r}"
            + (f" (and {len(missing) - 1} more of these)" if missing[1:] else "")
            + (f"; did you mean {close[0]!r}?" if close else f"; an id there is {next(iter(known))!r}")
        )
    return [known[id] for id in wanted]


def _list(ids: object) -> list[str]:
    wanted: list[Any] = list(ids) if isinstance(ids, Iterable) else [ids]
    if not all(isinstance(id, str) for id in wanted):
        raise ConfigError(f"question_ids={ids!r}; expected a list of ids (texts), or the path of a file with them")
    return wanted


def _read_ids(path: Path) -> list[str]:
    """The ids in a file: a JSON list for .json, else one a line."""
    try:
        text = path.read_text(encoding="utf-8")
        ids = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"question_ids: {path} cannot be read: {error}") from error
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise DataError(f"question_ids: {path} holds no list of texts; write one id a line, or a JSON list of ids")
    return [id for id in ids if id]


def _shard(shard: Sequence[int]) -> tuple[int, int]:
    if isinstance(shard, str) or not isinstance(shard, Sequence) or [type(n) for n in shard] != [int, int]:
        raise ConfigError(f"shard={shard!r}; expected (i, n): part i of n, counted from 0")
    part, parts = shard
    if not 0 <= part < parts:
        raise ConfigError(f"shard={tuple(shard)!r}: there is no part {part} of {parts}; parts count from 0")
    return part, parts
