"""Small training runs, as real processes that faults can be injected into (faults.py)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servers import INDEX, PATIENCE, ROOT, Servers

STEPS = 6
RUN = {
    "algorithm": "carl-lite", "forks": 2, "steps": STEPS, "questions-per-step": 3, "minibatches": 2,
    "train-questions": 8, "eval-questions": 2, "eval-every": 3, "save-every": 1, "keep": 2, "threads": 1,
    "device": "cpu",
}  # fmt: skip
FIRST = 2.0
"""Seconds after step 0 within which a moment is chosen; later ones are within the time that the step before took."""
CONTEXT: Any = multiprocessing.get_context("forkserver")
"""Runs are forked from a process that has imported what they need: that is most of what starting one takes."""
CONTEXT.set_forkserver_preload(
    [
        "carl_gym.training.cli",
        "carl_gym.training.trainer",
        "matplotlib.pyplot",
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.tracking.rest_store",
    ]
)


def train(words: Sequence[str], processes: int, log: str, environment: Mapping[str, str]) -> None:
    """What a process of its own does: the training command, alone or under PyTorch's launcher."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    if processes > 1:
        from torch.distributed.run import main as launch

        launch(["--standalone", f"--nproc-per-node={processes}", str(ROOT / "scripts" / "train_carl.py"), *words])
    else:
        from carl_gym.training.cli import main

        main(words)


class Stuck(RuntimeError):
    """A run that does not go on."""


class Missed(RuntimeError):
    """A run that ended before its fault."""


class Run:
    """A training run in a folder of its own, and the process that is at it."""

    def __init__(self, servers: Servers, folder: Path, rng: random.Random, backend: str, world: Sequence[str]) -> None:
        self.servers, self.folder, self.rng, self.world = servers, folder, rng, world
        self.output = folder / "disk" / "run"
        self.starts = self.spoiled = 0
        # Beside the output directory, as it is by default, when that disk is to be full; else one store for all.
        self.store = (self.output.parent if "disk" in world else servers.folder) / "mlflow.db"
        self.uri = f"sqlite:///{self.store}"
        self.environment: dict[str, str] = {}
        self.moment = ""
        self._options: dict[str, object] = {}
        if "fsdp" in world:  # as accelerate's launcher puts scripts/configs/fsdp2.yaml
            self.environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        if "mlflow" in world:
            self.uri, self.store = servers.mlflow().url, servers.folder / "mlflow-server" / "mlflow.db"
            self.environment |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        if "retrieval" in world:
            # The evaluation's questions are of another world.
            self._options |= {
                "env-args": f"index={servers.recipe(folder / 'remote.toml')}",
                "eval-args": f"index={INDEX}",
            }
        if backend == "vllm-server":
            self._options |= {"backend": backend, "urls": servers.vllm().url}
        self._start()

    @property
    def log(self) -> Path:
        """Output of the process that was started last."""
        return self.folder / f"log-{self.starts}.txt"

    def _start(self) -> None:
        self.starts += 1
        options = {**RUN, **self._options, "output-dir": self.output, "tracking-uri": self.uri}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        words += ["--resume"] if (self.output / "config.json").is_file() else []
        arguments = (words, 2 if "ranks" in self.world else 1, str(self.log), self.environment)
        self.process = CONTEXT.Process(target=train, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def again(self) -> int:
        """Start it once more and wait for its end; the exit code."""
        self._start()
        code, self.spoiled = self.wait(), 0  # a damaged checkpoint has been put aside
        return code

    def wait(self) -> int:
        """The exit code of the process that is at it."""
        last, since = -2, time.monotonic()
        while self.process.exitcode is None:
            if self.logged() != last:
                last, since = self.logged(), time.monotonic()
            if time.monotonic() - since > PATIENCE:
                self.stop()
                raise Stuck(f"no progress in {PATIENCE:g} s")
            time.sleep(0.05)
        return self.process.exitcode

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()

    @property
    def lines(self) -> list[str]:
        """Of the metrics: a step each."""
        path = self.output / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return text.splitlines()[: text.count("\n")]

    def logged(self) -> int:
        """The last step that was logged; -1 before the first line."""
        return len(self.lines) - 1

    def wait_for_step(self, step: int) -> bool:
        """Until it was logged; False when the process ended before."""
        since = time.monotonic()
        while self.logged() < step and self.process.exitcode is None:
            if time.monotonic() - since > PATIENCE:
                raise Stuck(f"step {step} did not come in {PATIENCE:g} s")
            time.sleep(0.02)
        return self.logged() >= step

    def wait_for_moment(self, first: int) -> None:
        """A random one in a random step after the `first`."""
        step = self.rng.randrange(first, STEPS)
        self.wait_for_step(step - 1)
        before = time.monotonic()
        self.wait_for_step(step)
        pause = self.rng.random() * (time.monotonic() - before if step else FIRST)
        time.sleep(pause)
        if self.process.exitcode is not None:
            raise Missed(f"{self.folder}: the run ended before the fault; its output is there in {self.log.name}")
        self.moment = f"{pause:.2f} s after step {self.logged()}"

    def checkpoints(self) -> list[Path]:
        return sorted((self.output / "checkpoints").glob("step-*"))

    def committed(self) -> int:
        """The step of the newest checkpoint that no fault has spoiled; 0 without one."""
        found = self.checkpoints()
        whole = found[: len(found) - self.spoiled]
        return int(whole[-1].name.removeprefix("step-")) if whole else 0

    def said(self, text: str) -> bool:
        """Whether the output of the process that was started last holds it."""
        return text in self.log.read_text(encoding="utf-8", errors="replace")
