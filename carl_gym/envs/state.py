"""The values that environments are made of. A state is a value: storing it is a snapshot, and
starting again from a stored one is a fork. Nothing here refers to a live object.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from carl_gym.errors import StateError

SCHEMA_VERSION = 1
"""Raised whenever the meaning of a stored state changes; states of another version are refused."""

MAX_ARGUMENT_CHARS = 512
"""Longest tool argument a state keeps; a longer one makes the action invalid (code `too_long`)."""

ActionKind = Literal["search", "access", "answer", "invalid"]
Status = Literal["running", "answered", "out_of_turns"]


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a question's decomposition: `answer` is the `relation` of the entity with page `title`."""

    title: str
    relation: str
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answers and, where known, supporting titles and decomposition."""

    id: str
    text: str
    answers: tuple[str, ...]
    supporting_titles: tuple[str, ...] = ()
    type: str = ""
    decomposition: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What an agent's text means to the environment.

    Attributes:
        kind: the tool, or `invalid`.
        argument: query, title or answer; "" when invalid.
        code: "ok", or why the action is invalid (one of `protocol.INVALID_HINTS`).
    """

    kind: ActionKind
    argument: str = ""
    code: str = "ok"

    @property
    def valid(self) -> bool:
        """Whether the text was a complete, well-formed action."""
        return self.kind != "invalid"


@dataclass(frozen=True, slots=True)
class Turn:
    """One action and the ids of the passages that it brought up (texts live in the corpus)."""

    action: ParsedAction
    passage_ids: tuple[str, ...] = ()


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
    """

    question_id: str
    turns: tuple[Turn, ...] = ()
    status: Status = "running"
    card: str = ""
    corpus: str = ""
    schema: int = SCHEMA_VERSION

    @property
    def terminal(self) -> bool:
        """Whether the episode is over."""
        return self.status != "running"

    def to_json(self) -> str:
        """The state as JSON text; `from_json` gives back an equal state in any process."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> EnvState:
        """Read `to_json`'s text.

        Raises:
            StateError: not JSON, or not a state of this schema version.
        """
        try:
            raw = json.loads(text)
            if raw["schema"] != SCHEMA_VERSION:
                raise StateError(
                    f"state has schema version {raw['schema']}, this carl_gym reads {SCHEMA_VERSION}; "
                    "replay the episode's actions with this version instead"
                )
            turns = tuple(Turn(ParsedAction(**turn["action"]), tuple(turn["passage_ids"])) for turn in raw.pop("turns"))
            return EnvState(turns=turns, **raw)
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"not a carl_gym state: {error!r}; pass the text that EnvState.to_json gave") from error
