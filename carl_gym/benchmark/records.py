"""What is kept of a finished cell: a line of JSON, small enough to commit, with all that tables and figures need."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from carl_gym.agents.card import resolve
from carl_gym.benchmark.cell_process import BEFORE_FILE
from carl_gym.benchmark.plan import Cell, settings_key
from carl_gym.benchmark.provenance import signatures
from carl_gym.envs.registration import env_card
from carl_gym.errors import DataError

FloatArray = npt.NDArray[np.float64]

CUMULATIVE = ("step", "actions_generated", "actions_trained", "tokens_trained", "seconds", "cpu_seconds")
"""Totals that metrics.jsonl has under these names."""
SCORES = ("sampled_em", "greedy_em", "sampled_f1", "greedy_f1")


@dataclass(frozen=True)
class Record:
    """A finished cell.

    Attributes:
        arm, learning_rate, seed, phase: which one, for people; `config` decides.
        hash: of what counts of `config` and `start`, when it was made.
        start: fingerprint of the weights that it started from, and of both cards.
        commit: of the code; "+" after it stands for uncommitted changes. Several where the run was broken off.
        machine: what it ran on; likewise.
        questions: number and fingerprint of the evaluation questions, in order.
        sampled_em, greedy_em: exact match per question of the last evaluation, see `pack`.
        sampled_em_before: likewise, before training; "" where it was not measured on all of the questions.
        points: per evaluation, from before training to the end, by name: step, actions_generated, actions_trained,
            tokens_trained (of trained actions), actions_with_advantage (those trained actions whose advantage is not
            0), tokens_processed (through the model in updates), optimiser_steps,
            seconds and cpu_seconds (of rollouts and updates), sampled_em, greedy_em, sampled_f1, greedy_f1, and
            entropy, the mean of `rollout/action_entropy` since the evaluation before. None where there is no value.
            The last evaluation has all questions, those before it the first `curve_questions` of the configuration.
        config: options of the training run, without places.
    """

    arm: str
    learning_rate: float
    seed: int
    phase: str
    hash: str
    start: str
    commit: str
    machine: str
    questions: tuple[int, str]
    sampled_em: str
    greedy_em: str
    sampled_em_before: str
    points: Mapping[str, Sequence[float | None]]
    config: Mapping[str, object]

    @cached_property
    def key(self) -> str:
        """Equal to `Cell.key` of the cell that this is a result of."""
        return settings_key(self.config, self.start)

    def column(self, name: str) -> FloatArray:
        """Values of all evaluations, NaN where there is none."""
        return np.array([np.nan if value is None else value for value in self.points[name]], dtype=float)

    def last(self, name: str) -> float:
        """Value at the last evaluation."""
        return float(self.column(name)[-1])

    def curve(self, name: str) -> FloatArray:
        """Values of all evaluations on the questions that all of them have; `sampled_em` and `greedy_em` only."""
        values, count = self.column(name), self.config.get("curve_questions")
        if isinstance(count, int):
            values[-1] = self.per_question(name)[:count].mean()
        return values

    def per_question(self, name: str) -> FloatArray:
        """`sampled_em`, `greedy_em` or `sampled_em_before` per question, (n,)."""
        return unpack(getattr(self, name), self.questions[0])


class Records:
    """The finished cells in a file, found by what they were."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: dict[str, Record] = {}
        self._size = -1
        self.reload()

    def reload(self) -> None:
        """Read what is there now; several runners may write to the file."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size == self._size:
            return
        self._size = size
        for record in read_records(self.path):
            self._by_key.setdefault(record.key, record)

    def get(self, cell: Cell) -> Record | None:
        """The result of a cell, or None."""
        return self._by_key.get(cell.key)

    def score(self, cell: Cell) -> float | None:
        """Final sampled EM of a cell, or None."""
        record = self.get(cell)
        return None if record is None else record.last("sampled_em")

    def add(self, record: Record) -> None:
        """Append a record to the file, after cutting off a line that a kill left half written; once, whoever else adds
        it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a+b") as file:
            self.reload()
            if record.key in self._by_key:
                return
            file.seek(0)
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
            self._by_key[record.key] = record


def read_records(path: Path) -> list[Record]:
    """The lines of a cells.jsonl; none without the file. A last line that a kill left half written is left out.

    Raises:
        DataError: another line is damaged; names it.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values = json.loads(line)
            values["questions"] = tuple(values["questions"])
            records.append(Record(**values))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not the record of a cell ({error!r}); remove the line") from error
    return records


def is_finished(cell: Cell) -> bool:
    """Whether the run of a cell came to its end."""
    return (cell.config.output_dir / "summary.json").is_file()


def record_of(cell: Cell) -> Record:
    """The record of a finished run, from what is in its folder.

    Raises:
        DataError: files are missing or damaged, or the run had no evaluation.
    """
    folder = cell.config.output_dir
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        ids = [str(id) for id in scores["questions"]]
        made_with, made_on = signatures(folder)
        kept = folder / BEFORE_FILE
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
        return Record(
            arm=cell.arm,
            learning_rate=cell.config.learning_rate,
            seed=cell.config.seed,
            phase=cell.phase,
            hash=cell.key,
            start=cell.start,
            commit=made_with,
            machine=made_on,
            questions=(len(ids), blake2b(json.dumps(ids).encode(), digest_size=8).hexdigest()),
            sampled_em=pack(scores["sampled_em"]),
            greedy_em=pack(scores["greedy_em"]),
            sampled_em_before=pack(before["sampled_em"])
            if before and before["questions"] == scores["questions"]
            else "",
            points=points(rows, cell.config.minibatches),
            config={name: value for name, value in cell.config.as_dict().items() if name not in PLACES},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} does not hold the results of a finished run with evaluations ({error!r}); remove the folder to "
            "run the cell again"
        ) from error


PLACES = ("output_dir", "tracking_uri", "urls", "weights_dir", "resume")


def points(rows: Sequence[Mapping[str, float]], minibatches: int) -> dict[str, list[float | None]]:
    """What a run had spent and reached at each of its evaluations.

    Args:
        rows: of metrics.jsonl, from step 0 on.
        minibatches: optimiser steps per training step, skipped ones included.

    Raises:
        ValueError: no row has an evaluation.
    """
    evaluated = [index for index, row in enumerate(rows) if "eval/sampled_em" in row]
    if not evaluated:
        raise ValueError("metrics.jsonl has no evaluation")
    steps = np.cumsum([minibatches - row["update/skipped"] if "update/skipped" in row else 0 for row in rows])
    tokens = np.cumsum([row.get("update/tokens", 0.0) for row in rows])
    found: dict[str, list[float | None]] = {
        name: [_rounded(rows[index].get(name)) for index in evaluated] for name in CUMULATIVE
    }
    moved = np.cumsum([row.get("rollout/actions_with_advantage", 0.0) for row in rows])
    found["actions_with_advantage"] = [int(moved[index]) for index in evaluated]
    found["optimiser_steps"] = [int(steps[index]) for index in evaluated]
    found["tokens_processed"] = [int(tokens[index]) for index in evaluated]
    for name in SCORES:
        found[name] = [_rounded(rows[index].get(f"eval/{name}")) for index in evaluated]
    entropies = [
        [row["rollout/action_entropy"] for row in rows[start + 1 : end + 1] if "rollout/action_entropy" in row]
        for start, end in pairwise([-1, *evaluated])
    ]
    found["entropy"] = [_rounded(float(np.mean(values))) if values else None for values in entropies]
    return found


def pack(scores: Sequence[float]) -> str:
    """Scores of 0 and 1 as a hexadecimal number with a bit per question, the first question's bit first.

    Raises:
        ValueError: a score is neither 0 nor 1.
    """
    if any(score not in (0, 1) for score in scores):
        raise ValueError("exact match per question must be 0 or 1")
    return np.packbits(np.array(scores, dtype=np.uint8)).tobytes().hex()


def unpack(text: str, count: int) -> FloatArray:
    """The inverse of `pack`, for so many questions."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
    return bits[:count].astype(float)


def start_fingerprint(agent: str, env: str) -> str:
    """Of what all runs start from beside their options: both cards, and the agent's weights and tokenizer.

    Files of a model that does not lie on this machine do not count, nor do names, descriptions and places.

    Raises:
        CardError: there is no such environment, or a card is damaged.
    """
    card, model = resolve(agent)
    cards = {"agent": asdict(card), "env": asdict(env_card(env))}
    for values in (cards["agent"], cards["env"], cards["env"]["data"], cards["env"]["index"]):
        for name in UNCOUNTED_OF_CARDS:
            values.pop(name, None)
    digest = blake2b(json.dumps(cards, sort_keys=True, default=str).encode(), digest_size=8)
    for pattern in ("*.safetensors", "tokenizer.json"):
        for file in sorted(Path(model).glob(pattern)) if Path(model).is_dir() else ():
            digest.update(file.read_bytes())
    return digest.hexdigest()


UNCOUNTED_OF_CARDS = ("id", "description", "model", "urls", "licence", "citation", "homepage", "cache")


def machines(records: Iterable[Record]) -> list[str]:
    """Where records were made, each place once."""
    return sorted({record.machine for record in records})


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
