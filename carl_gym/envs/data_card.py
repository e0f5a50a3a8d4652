"""The `[data]` table of an environment's card: which questions and passages, found where, read how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from carl_gym.cards import matching

_NAME = r"\w[\w.+-]*"
"""Of a folder or on the hub: no path, which would lead elsewhere."""


@dataclass(frozen=True, slots=True)
class FieldMap:
    """Which fields of a record make up a question; `a.b` names field b of a table a. "" leaves it to the schema.

    Attributes:
        id: unique id; without one, questions are numbered.
        question: what is asked.
        answers: a text, a list of texts, or a JSON list in a text.
        titles: titles of the supporting passages.
        type: kind of question.
        split: split in the original data.
    """

    id: str = ""
    question: str = ""
    answers: str = ""
    titles: str = ""
    type: str = ""
    split: str = ""


@dataclass(frozen=True, slots=True)
class DataCard:
    """Where the questions and passages of an environment come from.

    Attributes:
        name: `miniwiki` for generated worlds, else the folder that CARL_GYM_DATA may hold: letters, digits
            and `_.+-`.
        schema: how original records are read: a name in `schemas.SCHEMAS`, or `auto` to go by their keys.
        fields: where a record's fields differ from the schema's.
        hub: repository on the Hugging Face hub, as owner/name; "" for none.
        config: its configuration.
        hub_split: the split taken from the hub when nobody asks for one.
        hub_splits: the splits that have answers; none for any.
        corpus: where passages come from when neither folder nor arguments hold any: `contexts` (the records' own),
            `wiki18` (the folder `wiki18` of CARL_GYM_DATA), `union` (the corpora of all data sets in CARL_GYM_DATA) or
            `own` (the user's).
        mini: with no data at hand, stand in with the small set in the package, loudly.
        licence: of the data set.
        citation: BibTeX.
        homepage: where the data set is described.
    """

    name: str = matching(_NAME, "the name of a folder: letters, digits and _.+-")
    schema: str = "auto"
    fields: FieldMap = FieldMap()
    hub: str = matching(f"({_NAME}/{_NAME})?", "owner/name", "")
    config: str = ""
    hub_split: str = "validation"
    hub_splits: tuple[str, ...] = ()
    corpus: Literal["contexts", "wiki18", "union", "own"] = "own"
    mini: bool = False
    licence: str = ""
    citation: str = ""
    homepage: str = ""

    DESCRIPTIVE: ClassVar[tuple[str, ...]] = ("licence", "citation", "homepage")
    """Fields for people: they change nothing about an environment and stay out of its card's hash."""
