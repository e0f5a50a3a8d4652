"""What algorithms' settings may be: one check for each kind, with the name of the setting in its message."""

from __future__ import annotations

import math
from collections.abc import Sequence

from carl_gym.errors import ConfigError


def require_group(rollouts: int) -> None:
    """Raises ConfigError for a group of one. (Explorers refuse what is no count.)"""
    if rollouts == 1:
        raise ConfigError("rollouts must be at least 2: a group of one has no advantage to learn from")


def require_counts(at_least: int = 1, /, **counts: int) -> None:
    """Raises ConfigError for what is not an integer of at least `at_least`."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ConfigError(f"{name} must be an integer >= {at_least}, not {value!r}")


def require_shares(**shares: float) -> None:
    """Raises ConfigError for what is not a number from 0 to 1."""
    for name, value in shares.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"{name} must be a number from 0 to 1, not {value!r}")


def require_weights(**weights: float) -> None:
    """Raises ConfigError for what is not a finite number of at least 0."""
    for name, value in weights.items():
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a number >= 0, not {value!r}")


def require_word(name: str, value: str, known: Sequence[str]) -> None:
    """Raises ConfigError for a word that is not one of the known ones."""
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
