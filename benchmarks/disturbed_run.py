"""Small training runs and the servers that they use, as real processes that faults can be injected into (faults.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
RUN = {
    "algorithm": "carl-lite", "forks": 2, "steps": STEPS, "questions-per-step": 3, "minibatches": 2,
    "train-questions": 8, "eval-questions": 2, "eval-every": 3, "save-every": 1, "keep": 2, "threads": 1,
    "device": "cpu",
}  # fmt: skip
FIRST = 2.0
"""Seconds after step 0 within which a moment is chosen; later ones are within the time that the step before took."""
PATIENCE = 600.0
"""Seconds without any progress after which the benchmark itself gives up."""
INDEX = "miniwiki-bm25"
"""MiniWiki's own; of the retrieval servers as well."""
RECIPE = """
id = "faults"
description = "Two replicas."
kind = "remote"
cache = false

[settings]
url = "{url}"
timeout = 2.0
retries = 4
"""
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


class Server:
    """A server process, with all its children, that can be killed, stopped, and started again on the same port."""

    def __init__(
        self, command: Sequence[str], path: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self._health, self._log = self.url + path, log
        self._command = [sys.executable, *command, "--port", str(port)]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.ready()

    def ready(self) -> None:
        """Up and running, started if it is not."""
        if self._process is None or self._process.poll() is not None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=ROOT, stdout=log, stderr=log, env=self._environment, start_new_session=True
                )
        self.signal(signal.SIGCONT)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(self._health, timeout=5):
                return
            time.sleep(0.2)
        raise SystemExit(f"{self._command} did not start; its output is in {self._log}")

    def signal(self, number: int) -> None:
        """To all of its processes; they are gone when this returns, if it kills."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()


@dataclass
class Servers:
    """Started when they are first asked for, and used for all injections."""

    folder: Path
    found: dict[str, Server] = field(default_factory=dict)

    def retrieval(self) -> list[Server]:
        """Two replicas."""
        corpus = self.folder / "corpus.jsonl"
        if not corpus.is_file():
            from carl_gym import make_task

            lines = (json.dumps(dataclasses.asdict(passage)) for passage in make_task("carl/MiniWiki-v0").corpus)
            corpus.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        command = ["scripts/serve_retrieval.py", "--corpus", str(corpus), "--index", INDEX]
        return [self._ready(f"retrieval-{i}", command, "/healthz") for i in range(2)]

    def mlflow(self) -> Server:
        store = self.folder / "mlflow-server"
        store.mkdir(exist_ok=True)
        places = ["--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}", "--artifacts-destination", str(store)]
        # Without the six processes for jobs that nobody gives it.
        environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return self._ready("mlflow", ["-m", "mlflow", "server", "--workers", "1", *places], "/health", environment)

    def vllm(self) -> Server:
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        return self._ready("vllm", ["scripts/serve_agent.py", "tiny"], "/health", environment)

    def _ready(
        self, name: str, command: Sequence[str], path: str, environment: Mapping[str, str] | None = None
    ) -> Server:
        if name not in self.found:
            self.found[name] = Server(command, path, self.folder / f"{name}.log", environment)
        self.found[name].ready()
        return self.found[name]

    def close(self) -> None:
        for server in self.found.values():
            server.signal(signal.SIGKILL)


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


class Run:
    """A training run in a folder of its own, and the process that is at it."""

    def __init__(self, servers: Servers, folder: Path, rng: random.Random, backend: str, world: str) -> None:
        self.servers, self.folder, self.rng, self.world = servers, folder, rng, world
        self.output = folder / "disk" / "run"
        self.starts = self.spoiled = 0
        # Beside the output directory, as it is by default, when that disk is to be full; else one store for all.
        self.store = (self.output.parent if world == "disk" else servers.folder) / "mlflow.db"
        self.uri = f"sqlite:///{self.store}"
        self.environment: dict[str, str] = {}
        self.moment = ""
        self._options: dict[str, object] = {}
        if world == "mlflow":
            self.uri, self.store = servers.mlflow().url, servers.folder / "mlflow-server" / "mlflow.db"
            self.environment = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        if world == "retrieval":
            recipe = folder / "remote.toml"
            recipe.write_text(RECIPE.format(url=",".join(server.url for server in servers.retrieval())))
            # The evaluation's questions are of another world.
            self._options |= {"env-args": f"index={recipe}", "eval-args": f"index={INDEX}"}
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
        arguments = (words, 2 if self.world == "ranks" else 1, str(self.log), self.environment)
        self.process = CONTEXT.Process(target=train, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def again(self) -> int:
        """Start it once more and wait for its end; the exit code."""
        self._start()
        return self.wait()

    def wait(self) -> int:
        """The exit code of the process that is at it."""
        last, since = -2, time.monotonic()
        while self.process.exitcode is None:
            if self.logged() != last:
                last, since = self.logged(), time.monotonic()
            if time.monotonic() - since > PATIENCE:
                self.stop()
                raise SystemExit(f"{self.folder}: no progress in {PATIENCE:g} s")
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
                raise SystemExit(f"{self.folder}: step {step} did not come in {PATIENCE:g} s")
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
            raise SystemExit(f"{self.folder}: the run ended before the fault; its output is there in {self.log.name}")
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
