"""`metrics.jsonl`: a line of metrics for every step, on the disk before the checkpoint that counts on it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


def append_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write the line of a step."""
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint that survives a power cut must not be ahead of it


def kept_metrics(folder: Path, step: int) -> list[dict[str, float]]:
    """The metrics of the steps up to that of the checkpoint; later lines are dropped, since they are done again.

    Args:
        folder: of the run.
        step: of the checkpoint that is resumed from, or 0.
    """
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = []
    for line in lines:
        try:
            metrics = json.loads(line)
        except ValueError:  # cut off by a kill in mid-write; whatever follows is later still
            break
        if metrics["step"] <= step:
            kept.append(metrics)
    if 0 < step >= len(kept):
        warnings.warn(
            f"{path} is damaged: of steps 0 to {step} it has {len(kept)}; the rest may be in MLflow", stacklevel=2
        )
    if lines:
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept), encoding="utf-8")
        partial.replace(path)
    return kept
