"""What an algorithm is: three independent choices about a rollout tree, and how the loss averages.

    explorer    what is rolled out next             (carl_gym.rollouts.explorers)
    credit      advantage of every action           (carl_gym.algorithms.credit)
    selection   which actions train                 (carl_gym.algorithms.selection)

Collector and learner are blind to it. Algorithms are registered by name, one file each.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

from carl_gym.algorithms.credit import Credit
from carl_gym.algorithms.selection import Reduction, Selection
from carl_gym.errors import ConfigError
from carl_gym.rollouts.explorers import Explorer


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A named combination.

    Attributes:
        name: what runs and tables call it.
        explorer: what is rolled out next.
        credit: trees -> per tree, the advantage of the edge into each node id.
        selection: trees -> per tree, whether the edge into each node id trains.
        clip_low: PPO's probability ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_high: see `clip_low`.
        loss_reduction: "action": mean over actions, each the mean over its tokens; "token": mean over tokens.

    Raises:
        ConfigError: a clip or reduction out of its range.
    """

    name: str
    explorer: Explorer
    credit: Credit
    selection: Selection
    clip_low: float = 0.2
    clip_high: float = 0.2
    loss_reduction: Reduction = "action"

    def __post_init__(self) -> None:
        _require_between("clip_low", self.clip_low, 0, 1)
        _require_between("clip_high", self.clip_high, 0, math.inf)
        if self.loss_reduction not in get_args(Reduction):
            allowed = ", ".join(get_args(Reduction))
            raise ConfigError(f"loss_reduction must be one of {allowed}, not {self.loss_reduction!r}")


Factory = Callable[..., Algorithm]
Setting = int | float | str

_REGISTRY: dict[str, tuple[Factory, dict[str, Setting]]] = {}


def register_algorithm(name: str, **defaults: Setting) -> Callable[[Factory], Factory]:
    """Decorate a function that builds an `Algorithm`, to make it available by name.

    Args:
        name: the name for `get_algorithm`.
        defaults: values of this name that differ from the function's own defaults.
    """

    def decorate(factory: Factory) -> Factory:
        _REGISTRY[name] = (factory, defaults)
        return factory

    return decorate


def algorithm_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


def get_algorithm(name: str, **overrides: Setting) -> Algorithm:
    """Build a registered algorithm, its vetted settings changed by `overrides`.

    Raises:
        ConfigError: unknown name or setting (the message lists the known ones), or a value out of its range.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"unknown algorithm {name!r}{_hint(name, algorithm_names())}")
    factory, defaults = _REGISTRY[name]
    settings = list(inspect.signature(factory).parameters)
    for setting in overrides:
        if setting not in settings:
            raise ConfigError(f"unknown setting {setting!r} of algorithm {name!r}{_hint(setting, settings)}")
    return replace(factory(**{**defaults, **overrides}), name=name)


def _require_between(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or not low < value < high:
        raise ConfigError(f"{name} must be a number between {low} and {high}, both excluded, not {value!r}")


def _hint(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return (f", did you mean {close[0]!r}?" if close else ";") + f" known: {', '.join(known)}"
