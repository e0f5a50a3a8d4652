"""The few exception types of the library. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

from carl_gym.harmless import visible


class CarlGymError(Exception):
    """Base class: catch this to catch every error that carl-gym raises on purpose."""

    def __str__(self) -> str:
        # Messages quote cards, data and servers, and end up on terminals.
        return visible(super().__str__())


class CardError(CarlGymError):
    """A card (TOML) is missing, malformed, or has an unknown key or a wrong type."""


class DataError(CarlGymError):
    """Questions or passages are missing or malformed; the message names file and line."""


class StateError(CarlGymError):
    """A state does not belong to this environment, or an environment is used out of order."""


class ActionError(CarlGymError, TypeError):
    """What was passed as an action is not text. (Malformed text is an invalid action, not an error.)"""


class PolicyError(CarlGymError):
    """A model, tokenizer or transcript cannot be used as asked."""


class ConfigError(CarlGymError, ValueError):
    """A run was configured with values that cannot work."""


class RetrievalError(CarlGymError):
    """A search failed: a server is down or wrong, an index is damaged. Never an empty result instead."""


class JudgeError(CarlGymError):
    """A model that was asked to judge an answer could not be asked, or gave no verdict."""
