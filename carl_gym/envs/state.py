"""The values that environments are made of. A state is a value: storing it is a snapshot, and
starting again from a stored one is a fork. Nothing here refers to a live object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NoReturn, cast, get_args

from carl_gym.errors import StateError

SCHEMA_VERSION = 2
"""Raised whenever the meaning of a stored state changes; states of another version are refused."""

MAX_ARGUMENT_CHARS = 512
"""Longest tool argument a state keeps; a longer one makes the action invalid (code `too_long`)."""

ActionKind = Literal["search", "access", "read", "answer", "invalid"]
Status = Literal["running", "answered", "out_of_turns"]
Extra = int | float | str
"""What a wrapper may keep in a state: finite numbers and texts."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a question's decomposition: `answer` is the `relation` of the entity with page `title`."""

    title: str
    relation: str
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answers and, where known, supporting titles, decomposition, original split and level."""

    id: str
    text: str
    answers: tuple[str, ...]
    supporting_titles: tuple[str, ...] = ()
    type: str = ""
    decomposition: tuple[Hop, ...] = ()
    split: str = ""
    level: str = ""


class ParsedAction(NamedTuple):
    """What an agent's text means to the environment. (A tuple: a step makes one, and tuples are made fastest.)

    Attributes:
        kind: the tool, or `invalid`.
        argument: query, title or answer; "" for read and when invalid.
        code: "ok", or why the action is invalid (one of `protocol.CODES`).
    """

    kind: ActionKind
    argument: str = ""
    code: str = "ok"

    @property
    def valid(self) -> bool:
        """Whether the text was a complete, well-formed action that the rules allowed."""
        return self.kind != "invalid"


class Turn(NamedTuple):
    """One action and what it brought up; texts live in the corpus.

    Attributes:
        action: as understood.
        passage_ids: the hits of a search, best first; the passage that an access or read showed.
        page: which page of that passage was shown, from 0.
    """

    action: ParsedAction
    passage_ids: tuple[str, ...] = ()
    page: int = 0


class Tally(NamedTuple):
    """Counts over a history, carried from turn to turn so that nobody counts the whole history at every step.

    Attributes:
        question: what the titles belong to.
        invalid: invalid actions.
        repeated: searches whose query had been made before, refused ones included.
        found: supporting titles that came up, one bit each in the question's order.
        opened: supporting titles that were opened, likewise.
        queries: of the searches, in lower case.
    """

    question: Question
    invalid: int = 0
    repeated: int = 0
    found: int = 0
    opened: int = 0
    queries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EnvState:
    """Everything that the future of an episode depends on.

    Attributes:
        question_id: key into the task's questions.
        turns: the history, oldest first; its length is the used part of the turn budget.
        status: `running`, or how the episode ended.
        card: hash of the environment card that made the state.
        corpus: fingerprint of the corpus that the passage ids point into.
        schema: `SCHEMA_VERSION` of the writer.
        extras: what wrappers keep with the state, sorted by key.
        tally: derived from the rest by the task that made the state; no part of its value, and never stored.
    """

    question_id: str
    turns: tuple[Turn, ...] = ()
    status: Status = "running"
    card: str = ""
    corpus: str = ""
    schema: int = SCHEMA_VERSION
    extras: tuple[tuple[str, Extra], ...] = ()
    tally: Tally | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def terminal(self) -> bool:
        """Whether the episode is over."""
        return self.status != "running"

    def __reduce__(self) -> tuple[type[EnvState], tuple[object, ...]]:
        """Pickle and copy the value without its tally."""
        return EnvState, (
            self.question_id, self.turns, self.status, self.card, self.corpus, self.schema, self.extras,
        )  # fmt: skip

    def extra(self, key: str, default: Extra | None = None) -> Extra | None:
        """The value that a wrapper keeps under `key`, else `default`."""
        for name, value in self.extras:
            if name == key:
                return value
        return default

    def with_extra(self, key: str, value: Extra) -> EnvState:
        """This state with `value` under `key`. Raises StateError for what JSON cannot keep as it is."""
        _check_extra(key, value)
        extras = tuple(sorted({**dict(self.extras), key: value}.items()))
        state = EnvState(self.question_id, self.turns, self.status, self.card, self.corpus, self.schema, extras)
        return with_tally(state, self.tally)

    def to_json(self) -> str:
        """The state as compact JSON text; `from_json` gives back an equal state in any process.

        A turn is `[kind, argument, code, passage ids, page]` without the defaults at its end.
        """
        record: dict[str, object] = {
            "schema": self.schema,
            "card": self.card,
            "corpus": self.corpus,
            "question_id": self.question_id,
            "status": self.status,
            "turns": [_turn_to_list(turn) for turn in self.turns],
        }
        if self.extras:
            record["extras"] = dict(self.extras)
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> EnvState:
        """Read `to_json`'s text. Every type is checked; whether ids and turns make sense is `SearchTask.validate`'s.

        Raises:
            StateError: not JSON, or not a state of this schema version.
        """
        try:
            record = json.loads(text, parse_constant=_no_constant)
        except (ValueError, TypeError, RecursionError) as error:
            raise _not_a_state(f"{type(error).__name__}: {error}") from error
        if not isinstance(record, dict):
            raise _not_a_state(f"expected a JSON object, found {type(record).__name__}")
        schema = record.pop("schema", None)
        if type(schema) is int and schema != SCHEMA_VERSION:
            raise StateError(
                f"state has schema version {schema}, this carl_gym reads {SCHEMA_VERSION}; "
                "replay the episode's actions with this version instead"
            )
        extras = record.pop("extras", {})
        if type(schema) is not int or not isinstance(extras, dict) or set(record) != _KEYS:
            raise _not_a_state(f"its keys are {', '.join(sorted(map(repr, record))) or 'none'}")
        for key, value in extras.items():
            _check_extra(key, value)
        question_id, card, corpus = (_text(record[key], key) for key in ("question_id", "card", "corpus"))
        status = record["status"]
        if status not in get_args(Status):
            raise _not_a_state(f"status {status!r}")
        turns = tuple(map(_turn_from_list, _list(record["turns"], "turns")))
        return EnvState(question_id, turns, status, card, corpus, schema, tuple(sorted(extras.items())))


def make_state(
    question_id: str,
    turns: tuple[Turn, ...],
    status: Status,
    card: str,
    corpus: str,
    extras: tuple[tuple[str, Extra], ...],
    tally: Tally,
) -> EnvState:
    """A state with its tally. (Writing slots takes half the time of a frozen constructor, and every step makes one.)"""
    state = _new(EnvState)
    _set_question_id(state, question_id)
    _set_turns(state, turns)
    _set_status(state, status)
    _set_card(state, card)
    _set_corpus(state, corpus)
    _set_schema(state, SCHEMA_VERSION)
    _set_extras(state, extras)
    _set_tally(state, tally)
    return state


def with_tally(state: EnvState, tally: Tally | None) -> EnvState:
    """Put `tally` into `state`, in place: it is derived from the state, which means the same with and without it."""
    _set_tally(state, tally)
    return state


def _slot(name: str) -> Callable[[EnvState, object], None]:
    return cast(Callable[[EnvState, object], None], getattr(EnvState, name).__set__)


_new = object.__new__
_set_question_id, _set_turns, _set_status = _slot("question_id"), _slot("turns"), _slot("status")
_set_card, _set_corpus, _set_schema = _slot("card"), _slot("corpus"), _slot("schema")
_set_extras, _set_tally = _slot("extras"), _slot("tally")

_KEYS = {"question_id", "turns", "status", "card", "corpus"}
_DEFAULTS: tuple[object, ...] = ("", "ok", [], 0)


def _turn_to_list(turn: Turn) -> list[object]:
    values: list[object] = [turn.action.kind, turn.action.argument, turn.action.code, list(turn.passage_ids), turn.page]
    while len(values) > 1 and values[-1] == _DEFAULTS[len(values) - 2]:
        values.pop()
    return values


def _turn_from_list(raw: object) -> Turn:
    values = _list(raw, "a turn")
    if not 1 <= len(values) <= 5:
        raise _not_a_state(f"a turn has {len(values)} values")
    kind, argument, code, ids, page = [*values, *_DEFAULTS[len(values) - 1 :]]
    if kind not in get_args(ActionKind):
        raise _not_a_state(f"action {kind!r}")
    argument = _text(argument, "an argument")
    if len(argument) > MAX_ARGUMENT_CHARS:
        raise _not_a_state(f"an argument has {len(argument)} characters")
    if type(page) is not int or page < 0:
        raise _not_a_state(f"page {page!r}")
    passage_ids = tuple(_text(id, "a passage id") for id in _list(ids, "passage ids"))
    return Turn(ParsedAction(cast(ActionKind, kind), argument, _text(code, "a code")), passage_ids, page)


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise _not_a_state(f"{what} is {type(value).__name__} and no list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not _encodable(value):
        raise _not_a_state(f"{what} is {value!r} and no text")
    return value


def _check_extra(key: object, value: object) -> None:
    good = type(value) in (int, str) or (type(value) is float and math.isfinite(value))
    if not (good and isinstance(key, str) and _encodable(key) and _encodable(value)):
        raise StateError(f"extra {key!r} = {value!r}: a state keeps finite numbers and texts under names")


def _encodable(value: object) -> bool:
    """Whether a text can be written as UTF-8: a lone surrogate cannot. Everything that is no text can."""
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _not_a_state(problem: str) -> StateError:
    return StateError(f"not a carl_gym state: {problem}; pass the text that EnvState.to_json gave")
