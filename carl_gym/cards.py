"""Cards: TOML files that users edit, read by one loader into frozen dataclasses and validated on the way.

A card's dataclass is its schema: a field is a `str`, `int`, `float` or `bool`, a `Literal[...]`, a
`tuple[..., ...]` of these, a `dict[str, object]` for a table that somebody else checks, or another dataclass, given as
a table or (with `kind` in the field's metadata) by the name of its own card; `bounded` limits numbers and `matching`
texts. Environments, agents and indexes use the same loader.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal, TypeVar

from carl_gym.errors import CardError
from carl_gym.paths import card_folders

Kind = Literal["envs", "agents", "retrieval_index"]
C = TypeVar("C")


def bounded(low: float, high: float, default: float | None = None) -> typing.Any:
    """A dataclass field whose number must lie in [low, high]; required when it has no default."""
    metadata = {"bounds": (low, high)}
    return field(metadata=metadata) if default is None else field(default=default, metadata=metadata)


def matching(pattern: str, expected: str, default: str | None = None) -> typing.Any:
    """A dataclass field whose text must match a regular expression as a whole; required when it has no default."""
    metadata = {"pattern": pattern, "expected": expected}
    return field(metadata=metadata) if default is None else field(default=default, metadata=metadata)


def load_card(kind: Kind, name: str | Path, cls: type[C], overrides: Mapping[str, object] | None = None) -> C:
    """Read and validate a card.

    Args:
        kind: the folder it belongs to.
        name: its name (the file name without .toml), or the path of a .toml file.
        cls: the dataclass to make.
        overrides: values that replace the file's; they pass the same validation.

    Raises:
        CardError: no such card, or an unknown, missing or wrong value; names the file, the key, the value and
            what is allowed.
    """
    path = find_card(kind, name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CardError(f"{path}: cannot be read as TOML: {error}") from error
    return make_card(cls, values | dict(overrides or {}), str(path))


def find_card(kind: Kind, name: str | Path) -> Path:
    """The file of a card: a path as it is, a name in the checkout's folder and then in the package's.

    Raises:
        CardError: there is none; lists the names that exist.
    """
    if str(name).endswith(".toml"):
        if not Path(name).is_file():
            raise CardError(f"{name}: no such card file")
        return Path(name)
    cards = list_cards(kind)
    if str(name) not in cards:
        suggestion = _suggest(str(name), cards)
        raise CardError(f"no card {str(name)!r} in {kind}/{suggestion}; cards there: {', '.join(cards)}")
    return cards[str(name)]


def beside(card: Path, key: str, value: str) -> Path | None:
    """The file or folder beside a card that a value of it names; None where there is none.

    Args:
        card: the card's file.
        key: whose value it is, for the message.
        value: a relative path, or something else, such as a hub id, that is no path at all.

    Raises:
        CardError: the value leads out of the card's folder: it is absolute, or goes up by `..` or through a link.
    """
    folder, path = card.parent.resolve(), Path(value)
    if not (path.is_absolute() or ".." in path.parts):
        if not (folder / path).exists():
            return None
        if (folder / path).resolve().is_relative_to(folder):
            return card.parent / path
    raise CardError(
        f"{card}: {key} = {value!r} leads out of the card's folder; a card names what lies beside it. Move that there, "
        "or say where it is yourself, on the command line or in a call"
    )


def list_cards(kind: Kind) -> dict[str, Path]:
    """Every card of a kind by name; the checkout's come before the package's."""
    found: dict[str, Path] = {}
    for folder in card_folders(kind):
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def make_card(cls: type[C], values: Mapping[str, object], where: str) -> C:
    """A card of class `cls` from plain values. Raises CardError naming `where`, the key and what is allowed."""
    types_by_name = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := [key for key in values if key not in fields]:
        raise CardError(
            f"{where}: unknown key {unknown[0]!r}{_suggest(unknown[0], fields)}; known keys: {', '.join(fields)}"
        )
    required = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [key for key in required if key not in values]:
        raise CardError(f"{where}: missing key {missing[0]!r}; required keys: {', '.join(required)}")
    return cls(**{key: _checked(types_by_name[key], fields[key], value, where) for key, value in values.items()})


def parse_assignments(items: typing.Iterable[str]) -> dict[str, object]:
    """Values from a command line, `key=value` each; a value is read as TOML, and as a text where it is none.

    Raises:
        CardError: an item without a key and an equals sign, or a key that comes twice.
    """
    values: dict[str, object] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not (key and equals):
            raise CardError(f"{item!r} is no assignment; write key=value, such as top_k=5 or index=hybrid")
        if key in values:
            raise CardError(f"{key} is given twice; give it once")
        try:
            values[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    return values


def _checked(hint: object, spec: dataclasses.Field[object], value: object, where: str) -> object:
    """`value` as the type that a field asks for, or a CardError."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, dict):
            return make_card(hint, value, f"{where}, [{spec.name}]")
        kind = spec.metadata.get("kind")
        if kind and isinstance(value, str):
            return load_card(kind, value, hint)
        raise _wrong(where, spec.name, value, f"the name of a card in {kind}/" if kind else "a table")
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise _wrong(where, spec.name, value, "one of " + ", ".join(map(repr, typing.get_args(hint))))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, spec.name, value, "a list")
        return tuple(_checked(typing.get_args(hint)[0], spec, item, where) for item in value)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise _wrong(where, spec.name, value, "a table")
        return value
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise _wrong(where, spec.name, value, _NAMES[hint])
    low, high = spec.metadata.get("bounds", (-math.inf, math.inf))
    if hint in (int, float) and not low <= value <= high:
        raise _wrong(where, spec.name, value, f"{_NAMES[hint]} from {low:g} to {high:g}")
    if hint is str and not re.fullmatch(spec.metadata.get("pattern", "(?s:.*)"), str(value)):
        raise _wrong(where, spec.name, value, spec.metadata["expected"])
    return value


_NAMES: dict[object, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _wrong(where: str, key: str, value: object, expected: str) -> CardError:
    return CardError(f"{where}: {key} = {value!r} ({type(value).__name__}); expected {expected}")


def _suggest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
