"""From a card to an environment: Gymnasium ids for every card, and tasks for those who need no shell.

Registering is cheap (the card's id is read, nothing else); data is loaded when an environment is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import tomllib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium as gym

from carl_gym.cards import list_cards, load_card, make_card
from carl_gym.envs import data
from carl_gym.envs.cards import EnvCard
from carl_gym.envs.gym_env import SearchEnv
from carl_gym.envs.questions import select
from carl_gym.envs.task import SearchTask
from carl_gym.errors import CardError
from carl_gym.retrieval.registry import make_retriever

if TYPE_CHECKING:
    from carl_gym.envs.vector_env import SearchVectorEnv

CRITICAL_TREE = "carl/CriticalTree-v0"

_paths: dict[str, Path] = {}


def register_card(path: str | Path) -> str:
    """Make the environment of a card known to Gymnasium, and return its id.

    Raises:
        CardError: the card is missing or malformed.
    """
    card = load_card("envs", Path(path), EnvCard)
    _register(card.id, Path(path).resolve())
    return card.id


def register_cards() -> None:
    """Register every card in envs/. One that cannot be read is left out with a warning: the others still work."""
    for path in list_cards("envs").values():
        try:
            _register(tomllib.loads(path.read_text(encoding="utf-8"))["id"], path)
        except (OSError, ValueError, KeyError, gym.error.Error) as error:
            warnings.warn(f"{path} is not registered: {error!r}", stacklevel=2)


def register_critical_tree() -> None:
    """Register the exact test bench. It has no card: there is neither data nor a retriever in it."""
    gym.register(CRITICAL_TREE, entry_point="carl_gym.envs.critical_tree:CriticalTreeEnv")


def make_task(card: str | Path | EnvCard, **kwargs: object) -> SearchTask:
    """The pure task of an environment, with its data loaded and its index built.

    Args:
        card: a registered id, the path of a card file, or a card.
        kwargs: values that replace the card's; arguments of the data (`data.load_named` or `data.load_miniwiki`); a
            choice of questions (`questions.select`). The corpus may be the URL of a retrieval server.

    Raises:
        CardError: unknown id, unknown argument, or a value that is not allowed.
        DataError: the data is missing or malformed, or no question is left.
        ConfigError: a choice of questions, or a size of a generated world, that cannot be.
    """
    fields = _card_arguments()
    overrides = {key: value for key, value in kwargs.items() if key in fields}
    card = env_card(card, overrides)
    load = _loader(card)
    of_data, of_questions, known = _keywords(load), _keywords(select), task_arguments(card)
    for key in kwargs:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            suggestion = f" (did you mean {close[0]!r}?)" if close else ""
            raise CardError(f"{card.id}: unknown argument {key!r}{suggestion}; arguments: {', '.join(sorted(known))}")
    if str(kwargs.get("corpus")).startswith(("http://", "https://")) and card.index.kind != "remote":
        if "index" in overrides:
            raise CardError(f"{card.id}: a server is searched by index='remote', not {card.index.id!r}; leave it out")
        card = env_card(card, {"index": "remote"})
    loaded = load(**{key: value for key, value in kwargs.items() if key in of_data})
    choice = {key: value for key, value in kwargs.items() if key in of_questions}
    questions = select(loaded.questions, loaded.source, **choice)  # type: ignore[arg-type]
    source = loaded.source
    if len(questions) != len(loaded.questions):
        source += f", {len(questions)} of its questions"
    retriever = make_retriever(card.index, loaded.corpus)
    return SearchTask(questions, loaded.corpus, retriever, card, source, loaded.is_mini)


def task_arguments(card: str | Path | EnvCard) -> set[str]:
    """Names of the keyword arguments that `make_task` takes for a card. Raises CardError on an unknown id."""
    return {*_card_arguments(), *_keywords(_loader(env_card(card))), *_keywords(select)}


def make_env(card: str, **kwargs: object) -> SearchEnv:
    """What `gymnasium.make` calls; arguments of `SearchEnv`, and as for `make_task`."""
    shell, others = _shell_arguments(SearchEnv, kwargs)
    return SearchEnv(make_task(card, **others), **shell)  # type: ignore[arg-type]


def make_vector_env(card: str, num_envs: int = 1, **kwargs: object) -> SearchVectorEnv:
    """What `gymnasium.make_vec` calls; arguments of `SearchVectorEnv`, and as for `make_task`."""
    from carl_gym.envs.vector_env import SearchVectorEnv

    shell, others = _shell_arguments(SearchVectorEnv, kwargs)
    return SearchVectorEnv(make_task(card, **others), num_envs, **shell)  # type: ignore[arg-type]


def env_card(card: str | Path | EnvCard, overrides: Mapping[str, object] | None = None) -> EnvCard:
    """The card of a registered id or a file, with overrides applied. Raises CardError."""
    if isinstance(card, EnvCard):
        values = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}
        return make_card(EnvCard, values | dict(overrides or {}), card.id)
    if not str(card).endswith(".toml"):
        id = str(card).removeprefix("carl_gym:")
        if id not in _paths:
            close = difflib.get_close_matches(id, _paths, n=1)
            suggestion = f" (did you mean {close[0]!r}?)" if close else ""
            raise CardError(f"unknown environment {id!r}{suggestion}; known ids: {', '.join(sorted(_paths))}")
        card = _paths[id]
    return load_card("envs", card, EnvCard, overrides)


def _card_arguments() -> set[str]:
    return {field.name for field in dataclasses.fields(EnvCard)} - {"id", "description", "data"}


def _loader(card: EnvCard) -> Callable[..., data.Data]:
    return data.load_miniwiki if card.data.name == "miniwiki" else functools.partial(data.load_named, card.data)


def _keywords(function: Callable[..., object]) -> set[str]:
    """The names of a function's keyword-only parameters."""
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _shell_arguments(
    shell: Callable[..., object], kwargs: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """Arguments of the Gymnasium shell, and the task's."""
    names = _keywords(shell)
    return {k: v for k, v in kwargs.items() if k in names}, {k: v for k, v in kwargs.items() if k not in names}


def _register(id: str, path: Path) -> None:
    _paths[id] = path
    gym.register(
        id,
        entry_point="carl_gym.envs.registration:make_env",
        vector_entry_point="carl_gym.envs.registration:make_vector_env",
        kwargs={"card": id},
    )
