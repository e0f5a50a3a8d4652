"""What a run was made with: kept in its folder by every process that works on it."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from carl_gym.tracking.mlflow_tracker import git_tags

PROVENANCE_FILE = "provenance.jsonl"


def sign(folder: Path) -> None:
    """Add the code and the machine of this process to a run's folder."""
    with (folder / PROVENANCE_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"commit": commit(), "machine": machine()}) + "\n")


def signatures(folder: Path) -> tuple[str, str]:
    """Commits and machines of a run, in order; several where it was broken off and went on elsewhere."""
    lines = [json.loads(line) for line in (folder / PROVENANCE_FILE).read_text(encoding="utf-8").splitlines()]
    commits, machines = (dict.fromkeys(str(line[name]) for line in lines) for name in ("commit", "machine"))
    return ", ".join(commits), "; ".join(machines)


def commit() -> str:
    """Of the code that runs, with a "+" after it when files were changed since; "unknown" outside a checkout."""
    tags = git_tags()
    if "mlflow.source.git.commit" not in tags:
        return "unknown"
    return tags["mlflow.source.git.commit"][:12] + ("+" if tags["mlflow.source.git.dirty"] == "true" else "")


def machine() -> str:
    """Processor, cores that this process may use, memory."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, {platform.system()}"
