"""What can happen to a training run (faults.py injects it): processes that die or hang, full disks, damaged files."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from disturbed_run import Run

VLLM_HANGS = (70.0, 120.0)
"""Seconds; a hang is noticed after 50 to 60 s, and the run waits for a server for 300."""


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run.

    Attributes:
        title: for the table.
        happen: called at the random moment; after its yield comes what an operator does once the process has ended.
        world: what the run has: ranks (two processes), fsdp (FSDP2 in them), retrieval (two servers), mlflow (a
            server), disk (a small one), vllm.
        first: the fault comes after that step at the earliest.
    """

    title: str
    happen: Callable[[Run], AbstractContextManager[None]]
    world: tuple[str, ...] = ()
    first: int = 0


@contextmanager
def kill(run: Run) -> Iterator[None]:
    os.kill(run.pid, signal.SIGKILL)
    yield


@contextmanager
def kill_rank(run: Run) -> Iterator[None]:
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    rank = run.rng.randrange(len(ranks))
    os.kill(int(ranks[rank]), signal.SIGKILL)
    run.moment += f", rank {rank}"
    yield


@contextmanager
def terminate(run: Run) -> Iterator[None]:
    os.kill(run.pid, signal.SIGTERM)
    yield


@contextmanager
def fill_disk(run: Run) -> Iterator[None]:
    """Leave less room than a checkpoint takes, down to nothing; make room before the run is resumed."""
    left = run.rng.choice([0, run.rng.randrange(8 << 20)])
    ballast = run.output.parent / "ballast"
    with ballast.open("wb") as file:
        for _ in range(10):
            disk = os.statvfs(run.output)
            with contextlib.suppress(OSError):  # the run has taken some meanwhile
                os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - left))
                break
        else:
            raise RuntimeError(f"{ballast}: the disk of the run cannot be filled")
    run.moment += f", {left:,} bytes left"
    yield
    ballast.unlink()


@contextmanager
def damage(run: Run) -> Iterator[None]:
    """Kill the run, and cut off or change something in its newest checkpoint."""
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    file = run.rng.choice(sorted(path for path in run.checkpoints()[-1].iterdir() if path.stat().st_size))
    content = bytearray(file.read_bytes())
    place = run.rng.randrange(len(content))
    if run.rng.random() < 0.5:
        content[place] ^= 1 << run.rng.randrange(8)
        run.moment += f", a bit of {file.name} flipped"
    else:
        content = content[:place]
        run.moment += f", {file.name} cut off"
    file.write_bytes(content)
    run.spoiled = 1
    yield


@contextmanager
def kill_replica(run: Run) -> Iterator[None]:
    run.rng.choice(run.servers.retrieval()).signal(signal.SIGKILL)
    yield


@contextmanager
def kill_replicas(run: Run) -> Iterator[None]:
    """Both; they are back after a while, for which the run may or may not have waited."""
    for server in run.servers.retrieval():
        server.signal(signal.SIGKILL)
    pause = run.rng.uniform(0, 8)
    run.moment += f", for {pause:.1f} s"
    time.sleep(pause)
    run.servers.retrieval()
    yield


@contextmanager
def hang_replica(run: Run) -> Iterator[None]:
    run.rng.choice(run.servers.retrieval()).signal(signal.SIGSTOP)
    yield


@contextmanager
def kill_mlflow(run: Run) -> Iterator[None]:
    """It is back two steps later, or when the run has ended."""
    run.servers.mlflow().signal(signal.SIGKILL)
    run.wait_for_step(run.logged() + 2)
    run.servers.mlflow()
    yield


@contextmanager
def kill_mlflow_for_good(run: Run) -> Iterator[None]:
    run.servers.mlflow().signal(signal.SIGKILL)
    yield
    run.servers.mlflow()


@contextmanager
def hang_mlflow(run: Run) -> Iterator[None]:
    run.servers.mlflow().signal(signal.SIGSTOP)
    run.wait_for_step(run.logged() + 2)
    run.servers.mlflow()
    yield


@contextmanager
def lock_mlflow(run: Run) -> Iterator[None]:
    """Another program has the SQLite file to itself for two steps."""
    with contextlib.closing(sqlite3.connect(run.store, timeout=60)) as store:
        store.execute("BEGIN EXCLUSIVE")
        run.wait_for_step(run.logged() + 2)
        store.rollback()
    yield


@contextmanager
def kill_vllm(run: Run) -> Iterator[None]:
    run.servers.vllm().signal(signal.SIGKILL)
    run.servers.vllm()
    yield


@contextmanager
def hang_vllm(run: Run) -> Iterator[None]:
    pause = run.rng.uniform(*VLLM_HANGS)
    run.servers.vllm().signal(signal.SIGSTOP)
    time.sleep(pause)
    run.servers.vllm()
    run.moment += f", for {pause:.0f} s"
    yield


FAULTS = {
    "kill": Fault("kill -9 of the trainer", kill),
    "rank": Fault("kill -9 of one of two trainer processes", kill_rank, ("ranks",)),
    "rank-fsdp": Fault("kill -9 of one of two FSDP2 processes", kill_rank, ("ranks", "fsdp")),
    "sigterm": Fault("SIGTERM to the trainer", terminate),
    "sigterm-ranks": Fault("SIGTERM to the launcher of two processes", terminate, ("ranks",)),
    "disk": Fault("full disk", fill_disk, ("disk",)),
    "disk-fsdp": Fault("full disk, two FSDP2 processes", fill_disk, ("ranks", "fsdp", "disk")),
    "damage": Fault("kill -9, and the newest checkpoint damaged", damage, first=4),
    "retrieval": Fault("kill -9 of one of two retrieval servers", kill_replica, ("retrieval",)),
    "retrieval-all": Fault(
        "kill -9 of both retrieval servers, back after 0-8 s and their start", kill_replicas, ("retrieval",)
    ),
    "retrieval-hang": Fault("one of two retrieval servers hangs", hang_replica, ("retrieval",)),
    "mlflow": Fault("kill -9 of the MLflow server, back after two steps", kill_mlflow, ("mlflow",)),
    "mlflow-gone": Fault("kill -9 of the MLflow server, back after the run's end", kill_mlflow_for_good, ("mlflow",)),
    "mlflow-hang": Fault("the MLflow server hangs for two steps", hang_mlflow, ("mlflow",)),
    "mlflow-locked": Fault("MLflow's SQLite file locked for two steps", lock_mlflow),
    "vllm": Fault("kill -9 of the only vLLM server, then started again", kill_vllm, ("vllm",)),
    "vllm-hang": Fault("the only vLLM server hangs for 70-120 s", hang_vllm, ("vllm",)),
}
