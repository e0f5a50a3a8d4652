"""A criticality study on disk, and how an interrupted one goes on.

config.json         what was asked for, and the data that it met
visited.jsonl       a line per state to measure, with all that it takes to go on from it; written once
measured.jsonl      a line per measured state, in the same order, flushed chunk by chunk
criticality.json, criticality.md, criticality.png, criticality.svg
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from carl_gym.envs.state import EnvState, Question
from carl_gym.errors import ConfigError, DataError, StateError
from carl_gym.evaluation.criticality import MeasuredState, VisitedState
from carl_gym.evaluation.store import CONFIG_FILE, LOCK_FILE, differences
from carl_gym.files import write_json

VISITED_FILE = "visited.jsonl"
MEASURED_FILE = "measured.jsonl"
MAY_CHANGE = ("device", "threads", "chunk", "urls", "output_dir")
"""Options that may differ when a study goes on: they do not change what is measured."""

_NAMES = tuple(field.name for field in fields(MeasuredState))
_LISTS = ("actions", "hs", "fresh_hs", "fresh_exact_hs", "returns", "scores")


class CriticalityStore:
    """The folder of a study. Construction reads and checks; `open` is the first to write.

    Args:
        folder: where it is, or will be. The study in it goes on; nothing has to be said for that.
        config: JSON values that say what is measured; kept in config.json.

    Raises:
        ConfigError: the folder holds something else, or a study with another config (named).
    """

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        self.folder = folder
        self.visited: list[VisitedState] | None = None
        self.measured: list[MeasuredState] = []
        self._config = json.loads(json.dumps(config))
        self._file: io.TextIOBase | None = None
        self._lock = FileLock(folder / LOCK_FILE)
        if (folder / VISITED_FILE).is_file():
            self._check_config()
        elif not _unused(folder):
            raise ConfigError(f"{folder} is not an empty folder and holds no study; pass another --output-dir")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    @property
    def left(self) -> list[VisitedState]:
        """The states that are still to be measured, in order."""
        return (self.visited or [])[len(self.measured) :]

    def open(self, questions: Mapping[str, Question]) -> None:
        """Make the folder, or read what is in it and cut off the line that a kill left half written.

        Args:
            questions: by id.

        Raises:
            ConfigError: the folder cannot be made, or another process works in it.
            DataError: a file of the study is damaged.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            write_json(self.folder / CONFIG_FILE, self._config)
            if (path := self.folder / VISITED_FILE).is_file():
                self.visited = [_visited(line, questions, where) for line, where in _lines(path)]
            path = self.folder / MEASURED_FILE
            path.touch()
            self.measured = [_measured(line, where) for line, where in _lines(path)]
            for visited, measured in zip(self.visited or (), self.measured, strict=False):
                if visited.key != measured.key:
                    raise DataError(f"{path} does not belong to {VISITED_FILE} beside it; start anew in another folder")
            if len(self.measured) > len(self.visited or ()):
                raise DataError(f"{path} has more states than {VISITED_FILE} beside it; start anew in another folder")
            with path.open("r+b") as raw:
                raw.truncate(path.read_bytes().rfind(b"\n") + 1)
            self._file = path.open("a", encoding="utf-8")
        except Timeout as error:
            raise ConfigError(f"another process works in {self.folder}; wait for it or stop it") from error
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written to ({error}); pass another --output-dir") from error

    def keep_visited(self, states: Sequence[VisitedState]) -> None:
        """Keep the states to measure: all of them or, after a kill, none."""
        path = self.folder / VISITED_FILE
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(_visited_values(s)) + "\n" for s in states), encoding="utf-8")
        partial.replace(path)
        self.visited = list(states)

    def append(self, states: Sequence[MeasuredState]) -> None:
        """Keep the states of a chunk, the next ones of `left`. They survive a kill from here on."""
        if self._file is None:
            raise ConfigError(f"{self.folder} is not open for writing; call open() first")
        for state in states:
            self._file.write(json.dumps(measured_values(state)) + "\n")
        self._file.flush()
        self.measured += states

    def _check_config(self) -> None:
        path = self.folder / CONFIG_FILE
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); pass another --output-dir") from error
        if changed := differences(before, self._config, ignore=MAY_CHANGE):
            raise ConfigError(
                f"{self.folder} holds another run ({'; '.join(changed)}); give the same options to go on with it, or "
                "another --output-dir"
            )


def measured_values(state: MeasuredState) -> dict[str, Any]:
    """JSON values by name."""
    return {name: getattr(state, name) for name in _NAMES}


def _unused(folder: Path) -> bool:
    """Whether a study may begin there: nothing is there but what one leaves that failed before its first state."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(p.name[0] == "." or p.name in (CONFIG_FILE, MEASURED_FILE) for p in folder.iterdir())


def _measured(line: str, where: str) -> MeasuredState:
    try:
        values = json.loads(line)
        state = MeasuredState(**values | {name: tuple(values[name]) for name in _LISTS})
        sizes = {len(values[name]) for name in _LISTS if values[name]}
        if len(sizes) != 1 or min(sizes) < 2:
            raise ValueError(f"lists of {sorted(sizes)} actions")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: no measured state ({error!r}); start anew in another --output-dir") from error
    return state


def _visited_values(state: VisitedState) -> dict[str, Any]:
    return {
        "question_id": state.question.id,
        "trajectory": state.trajectory,
        "depth": state.depth,
        "action": state.action,
        "h": state.h,
        "exact_h": state.exact_h,
        "reward": state.reward,
        "state": state.state.to_json(),
        "prefix": state.prefix,
    }


def _visited(line: str, questions: Mapping[str, Question], where: str) -> VisitedState:
    try:
        values = json.loads(line)
        question = questions[values.pop("question_id")]
        state, prefix = EnvState.from_json(values.pop("state")), tuple(map(int, values.pop("prefix")))
        return VisitedState(question=question, state=state, prefix=prefix, **values)
    except (ValueError, KeyError, TypeError, AttributeError, StateError) as error:
        raise DataError(f"{where}: no visited state ({error!r}); start anew in another --output-dir") from error


def _lines(path: Path) -> list[tuple[str, str]]:
    """Whole lines, and how messages call each; what comes after the last line break is none."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
