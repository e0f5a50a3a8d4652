"""A training run's options from a TOML file, as defaults of the command line.

A key is the name of an option of `TrainConfig`, and paths count from the working directory, as on the command line.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from pathlib import Path

from carl_gym.cards import make_card
from carl_gym.errors import CardError, ConfigError
from carl_gym.training.config import TrainConfig


def read_options(path: Path) -> dict[str, object]:
    """The options that a file sets, by name, checked each by itself and together.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key, a wrong type or a value that cannot work; names the
            file, the key and what is allowed.
    """
    hints = typing.get_type_hints(TrainConfig)
    # Without a default that a file could have written, so that what it left out can be told apart.
    schema = dataclasses.make_dataclass("TrainFile", [(name, _in_toml(hint), None) for name, hint in hints.items()])
    try:
        card: object = make_card(schema, tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error}); pass --config a .toml file of options") from error
    except CardError as error:
        raise ConfigError(str(error)) from error
    found = {name: value for name, value in vars(card).items() if value is not None}
    found |= {
        name: Path(str(value)) for name, value in found.items() if Path in (hints[name], *typing.get_args(hints[name]))
    }
    try:
        TrainConfig(**found)
    except (ConfigError, CardError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def _in_toml(hint: object) -> object:
    """The type of an option as a file writes it: no None, which is to leave it out, and a path as a text."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return str if hint is Path else hint
