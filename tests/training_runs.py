"""Small training runs for the tests of trainer, resuming and command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from carl_gym.training.checkpoints import checkpoints
from carl_gym.training.config import TrainConfig

STEPS = 4
OPTIONS = {
    "algorithm": "carl-lite",
    "forks": 2,
    "steps": STEPS,
    "questions_per_step": 3,
    "minibatches": 2,
    "learning_rate": 3e-4,
    "train_questions": 8,
    "eval_questions": 2,
    "eval_every": 2,
    "save_every": 2,
    "threads": 1,
    "device": "cpu",
}
"""Small, and yet the weights move in every step. It is evaluated and saved after steps 2 and 4."""


def config(agent: Path, output_dir: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{**OPTIONS, "agent": str(agent), "output_dir": output_dir, **changes})


def arguments(agent: Path, output_dir: Path, **changes: object) -> list[str]:
    """The same as words of a command line."""
    options = {**OPTIONS, "agent": agent, "output_dir": output_dir, **changes}
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def metrics(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    kept = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return [{k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds")} for row in kept]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def last_checkpoint(output_dir: Path) -> Path:
    return checkpoints(output_dir)[-1]


def same_training(one: Path, two: Path) -> bool:
    """Whether two runs ended with the same weights, optimiser and random numbers, bit for bit, and at the same step."""
    folders = [last_checkpoint(output_dir) for output_dir in (one, two)]
    states = [torch.load(folder / "trainer.pt", weights_only=True) for folder in folders]
    found = [
        [*weights(folder).values(), state["rng"], *_tensors(state["optimizer"]["state"])]
        for folder, state in zip(folders, states, strict=True)
    ]
    return folders[0].name == folders[1].name and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _tensors(state: dict[int, dict[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    return (value for entry in state.values() for value in entry.values())


def mlflow_steps(uri: str, run_id: str) -> dict[str, list[int]]:
    """The steps that every metric was logged at, in order of step."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    names = client.get_run(run_id).data.metrics
    return {name: sorted(metric.step for metric in client.get_metric_history(run_id, name)) for name in names}


def run_record(output_dir: Path) -> dict[str, str]:
    """The MLflow run that a run folder belongs to: run_id, tracking_uri."""
    return json.loads((output_dir / "mlflow_run.json").read_text(encoding="utf-8"))
