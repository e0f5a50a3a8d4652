"""An evaluation on disk: its settings, every finished episode, and how a killed one goes on.

config.json       what was asked for, and the data that it met
episodes.jsonl    a line per finished episode, flushed chunk by chunk
summary.json, summary.md, mlflow_runs.json
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from filelock import FileLock, Timeout

from carl_gym.errors import ConfigError, DataError
from carl_gym.evaluation.episodes import Episode
from carl_gym.files import write_json

CONFIG_FILE = "config.json"
EPISODES_FILE = "episodes.jsonl"
RUNS_FILE = "mlflow_runs.json"
LOCK_FILE = ".lock"
MAY_CHANGE = (
    "resume", "chunk", "threads", "urls", "tracking_uri", "experiment", "price_in", "price_out", "output_dir",
)  # fmt: skip
"""Options that a resumed evaluation may give anew: they do not change what is played."""


class Record(NamedTuple):
    """A line of episodes.jsonl.

    Attributes:
        env, agent: whose episode it is.
        seconds: its share of the time that its chunk took.
        episode: what remains of it.
    """

    env: str
    agent: str
    seconds: float
    episode: Episode


class EpisodeStore:
    """The folder of an evaluation. Construction reads and checks; `open` is the first to write.

    Args:
        folder: where it is, or will be.
        config: JSON values that say what is evaluated; kept in config.json.
        resume: go on with the evaluation in the folder.

    Raises:
        ConfigError: the folder is in use; or there is no evaluation to resume, or one with another config (named).
    """

    def __init__(self, folder: Path, config: Mapping[str, object], *, resume: bool) -> None:
        self.folder = folder
        self.records: list[Record] = []
        self._config = json.loads(json.dumps(config))
        self._resume = resume
        self._file: io.TextIOBase | None = None
        self._lock = FileLock(folder / LOCK_FILE)
        if resume:
            self._check_config()
        else:
            check_unused(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def open(self) -> None:
        """Make the folder, or read what is in it and cut off the line that a kill left half written. Once is enough.

        Raises:
            ConfigError: the folder cannot be made, or another process evaluates into it.
            DataError: a line of episodes.jsonl other than the last is damaged.
        """
        if self._file is not None:
            return
        path = self.folder / EPISODES_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            if not self._resume:
                write_json(self.folder / CONFIG_FILE, self._config)
            path.touch()
            self.records = list(read_episodes(path))
            whole = path.read_bytes()
            if not whole.endswith(b"\n"):
                with path.open("r+b") as raw:
                    raw.truncate(whole.rfind(b"\n") + 1)
            self._file = path.open("a", encoding="utf-8")
        except Timeout as error:
            raise ConfigError(f"another process evaluates into {self.folder}; wait for it or stop it") from error
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written to ({error}); pass another --output-dir") from error

    def of(self, env: str, agent: str) -> list[Record]:
        """What is there of an agent in an environment, in the order in which it was played."""
        return [record for record in self.records if (record.env, record.agent) == (env, agent)]

    def append(self, env: str, agent: str, episodes: Sequence[Episode], seconds: float) -> None:
        """Keep the episodes of a chunk, which took `seconds` together. They survive a kill from here on."""
        if self._file is None:
            raise ConfigError(f"{self.folder} is not open for writing; call open() first")
        share = round(seconds / len(episodes), 6)
        for episode in episodes:
            line = {"env": env, "agent": agent, "seconds": share, **episode.as_dict()}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.records.append(Record(env, agent, share, episode))
        self._file.flush()

    def _check_config(self) -> None:
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(
                f"{self.folder} holds no evaluation to resume ({CONFIG_FILE} is missing); leave out --resume"
            )
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); start anew in another --output-dir") from error
        if changed := differences(before, self._config, ignore=MAY_CHANGE):
            raise ConfigError(
                f"the evaluation in {self.folder} has other settings ({'; '.join(changed)}); resume with the same "
                "ones, or start anew in another --output-dir"
            )


def check_unused(folder: Path) -> None:
    """Raises ConfigError when something is there already.

    Hidden files, such as the lock, do not count, nor does an evaluation that ended before its first episode.
    """
    if not folder.exists():
        return
    if folder.is_dir():
        names = {path.name for path in folder.iterdir() if path.name[0] != "."}
        never_began = EPISODES_FILE in names and not (folder / EPISODES_FILE).stat().st_size
        if not names or (never_began and names <= {CONFIG_FILE, EPISODES_FILE, RUNS_FILE}):
            return
    raise ConfigError(
        f"{folder} is not an empty folder (it may hold another evaluation); pass another --output-dir, or --resume to "
        "go on with the evaluation in it"
    )


def read_episodes(path: Path) -> Iterator[Record]:
    """The lines of an episodes.jsonl; a last line that a kill left half written is left out.

    Raises:
        DataError: no such file, or another line is damaged or comes twice; names the line.
    """
    seen: set[tuple[str, str, str, int]] = set()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); it lies beside the summary.json of a result"
        ) from error
    for number, line in enumerate(lines[:-1], 1):  # what comes after the last line break is no whole line
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
            env, agent, seconds = str(values.pop("env")), str(values.pop("agent")), float(values.pop("seconds"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: no line of an evaluation ({error!r}); remove it and --resume") from error
        episode = Episode.from_dict(values, where)
        key = env, agent, episode.question_id, episode.sample
        if key in seen:
            raise DataError(f"{where}: this episode is there already; remove the line and --resume")
        seen.add(key)
        yield Record(env, agent, seconds, episode)


def differences(
    one: Mapping[str, object], other: Mapping[str, object], ignore: Sequence[str] = (), prefix: str = ""
) -> list[str]:
    """What differs between nested mappings, `name: value -> other value` each; names of levels are joined by dots."""
    found = []
    for name in [*one, *(name for name in other if name not in one)]:
        before, now = one.get(name), other.get(name)
        if name in ignore or before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now, ignore, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}: {before} -> {now}")
    return found
