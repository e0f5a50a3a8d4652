"""An arm of the benchmark: an algorithm with its settings, as it is named on the command line.

carl-lite                            an algorithm as it is
carl:initial=4,root=merged           with settings of its own
grpo:minibatches=4                   with settings of the training loop (options of `TrainConfig`)
carl:initial=2@carl                  with the learning rate that is chosen for the arm `carl`
grpo:rollouts=8@3e-4                 with this learning rate
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from carl_gym.cards import parse_assignments
from carl_gym.errors import CardError, ConfigError
from carl_gym.training.config import TrainConfig

EQUAL = (
    "algorithm", "algorithm_args", "env", "data_dir", "env_args", "eval_args", "agent", "steps", "max_actions",
    "learning_rate", "train_questions", "eval_questions", "curve_questions", "eval_every", "eval_actions",
    "save_every", "seed", "threads", "output_dir", "resume", "tracking_uri", "experiment", "device", "urls",
    "weights_dir",
)  # fmt: skip
"""What an arm may not set: the benchmark does, for all alike."""
FOR_ALL = ("experiment", "device", "urls", "weights_dir")
"""Of these, what `--settings` sets."""

_CONTINUES = re.compile(r"\w+=")


@dataclass(frozen=True)
class Arm:
    """An algorithm with settings.

    Attributes:
        name: as it was given, without the rate.
        algorithm: its registered name.
        config: options of `TrainConfig` that differ from those of the other arms.
        algorithm_args: settings of the algorithm, key=value each.
        rate: "" where the learning rate is searched, else the rate or the name of the arm that it is taken from.
    """

    name: str
    algorithm: str
    config: Mapping[str, object] = field(default_factory=dict)
    algorithm_args: tuple[str, ...] = ()
    rate: str = ""

    @property
    def slug(self) -> str:
        """The name as a name of a folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.name)


def parse_arms(texts: Iterable[str]) -> tuple[Arm, ...]:
    """Arms from words, each with one arm or several with commas between them.

    A comma also separates settings: what follows it belongs to the arm before when it begins as a setting, `key=`.

    Raises:
        ConfigError: no arm, one that is named twice or cannot be read, or a rate from an arm that is not there.
    """
    words: list[str] = []
    for text in texts:
        for position, part in enumerate(filter(None, map(str.strip, text.split(",")))):
            if position and _CONTINUES.match(part):
                words[-1] += f",{part}"
            else:
                words.append(part)
    arms = tuple(map(_parse_arm, words))
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"the arms are {', '.join(names) or 'none'}: name at least one, and each once")
    for arm in arms:
        if arm.rate and not _is_number(arm.rate) and arm.rate not in names:
            raise ConfigError(
                f"{arm.name}@{arm.rate}: after the @ comes a learning rate above 0 or the name of another arm, out of "
                f"{', '.join(names)}"
            )
    for arm in arms:
        rate_of(arm, {other.name: other for other in arms})
    return arms


def rate_of(arm: Arm, arms: Mapping[str, Arm]) -> Arm | float:
    """The learning rate that an arm is given, or the arm whose search decides it (itself, by default).

    Raises:
        ConfigError: arms that take their rates from each other.
    """
    seen = [arm.name]
    while arm.rate:
        if _is_number(arm.rate):
            return float(arm.rate)
        arm = arms[arm.rate]
        if arm.name in seen:
            raise ConfigError(f"{' -> '.join([*seen, arm.name])}: these arms take their learning rates from each other")
        seen.append(arm.name)
    return arm


def make_config(values: Mapping[str, object]) -> TrainConfig:
    """A training configuration from plain values: lists become tuples, and the texts of paths become paths.

    Raises:
        ConfigError: an unknown option, or a value that it cannot have.
    """
    known = TrainConfig.__dataclass_fields__
    if unknown := [name for name in values if name not in known]:
        raise ConfigError(f"unknown training option {unknown[0]!r}; known: {', '.join(known)}")
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name in ("output_dir", "weights_dir"):
        if isinstance(typed.get(name), str):
            typed[name] = Path(str(typed[name]))
    try:
        return TrainConfig(**typed)  # type: ignore[arg-type]  # __post_init__ looks at the values
    except TypeError as error:
        raise ConfigError(f"a training option has a value of the wrong kind ({error}): {dict(values)}") from error


def assignments(items: Iterable[str]) -> dict[str, object]:
    """Options of `TrainConfig` from key=value; True and False are read as Python and as TOML write them.

    Raises:
        ConfigError: an item that is no assignment, or a key that comes twice.
    """
    try:
        values = parse_assignments(items)
    except CardError as error:
        raise ConfigError(str(error)) from error
    spelled: dict[object, bool] = {"True": True, "False": False}
    return {name: spelled.get(value, value) if isinstance(value, str) else value for name, value in values.items()}


def _parse_arm(text: str) -> Arm:
    named, _, rate = text.partition("@")
    algorithm, colon, settings = named.partition(":")
    items = settings.split(",") if colon else []
    values = assignments(items)
    own = [name for name in values if name not in TrainConfig.__dataclass_fields__]
    for name in values:
        if name in EQUAL:
            raise ConfigError(f"{text}: {name} is the same for all arms; set it for the whole benchmark")
    return Arm(
        name=named,
        algorithm=algorithm,
        config={name: value for name, value in values.items() if name not in own},
        algorithm_args=tuple(sorted(_spelled(item) for item in items if item.partition("=")[0] in own)),
        rate=rate,
    )


def _spelled(item: str) -> str:
    """True and False as the training options read them."""
    name, _, value = item.partition("=")
    return f"{name}={value.lower() if value in ('True', 'False') else value}"


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
