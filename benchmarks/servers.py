"""Server processes of this machine that benchmarks and tests train against: retrieval, vLLM, MLflow."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600.0
"""Seconds without any progress after which a benchmark gives up."""
START = 300.0
"""Seconds that a server gets to start in."""
INDEX = "miniwiki-bm25"
"""MiniWiki's own; of the retrieval servers as well."""
RECIPE = """
id = "replicas"
description = "Two replicas."
kind = "remote"
cache = false

[settings]
url = "{url}"
timeout = 2.0
retries = 4
"""


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

    def start(self) -> None:
        """Start it, or start it again, and do not wait for it."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    def ready(self) -> None:
        """Up and running, started if it is not. Raises as `wait`."""
        if not self.running:
            self.start()
        self.signal(signal.SIGCONT)
        self.wait()

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError with the end of its output when it ends, or after START seconds."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.running:
            with contextlib.suppress(OSError), urllib.request.urlopen(self._health, timeout=5):
                return
            time.sleep(0.2)
        said = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{self._command} did not start; its output in {self._log} ends with:\n{said}")

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        """To all of its processes; they are gone when this returns, if it kills."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()


def agent_server(agent: str, log: Path, environment: Mapping[str, str] | None = None) -> Server:
    """`vllm serve` for an agent."""
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return Server(["scripts/serve_agent.py", agent], "/health", log, {**settings, **(environment or {})})


def mlflow_server(folder: Path) -> Server:
    """`mlflow server` with all that it keeps in a folder, mlflow.db and log.txt among it."""
    places = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder)]
    command = ["-m", "mlflow", "server", "--workers", "1", *places]
    # Without the six processes for jobs that nobody gives it.
    return Server(command, "/health", folder / "log.txt", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})


@dataclass
class Servers:
    """Started when they are first asked for. A context manager that leaves none of them running, also when the process
    is told to end."""

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

        def one(name: str) -> Server:
            return self._ready(name, lambda: Server(command, "/healthz", self.folder / f"{name}.log"))

        return [one("retrieval-0"), one("retrieval-1")]

    def recipe(self, path: Path) -> Path:
        """A file that says to search on them."""
        path.write_text(RECIPE.format(url=",".join(server.url for server in self.retrieval())), encoding="utf-8")
        return path

    def mlflow(self) -> Server:
        store = self.folder / "mlflow-server"
        store.mkdir(exist_ok=True)
        return self._ready("mlflow", lambda: mlflow_server(store))

    def vllm(self, number: int = 0) -> Server:
        """One with the tiny agent; different numbers are different ones."""
        name = f"vllm-{number}"
        return self._ready(name, lambda: agent_server("tiny", self.folder / f"{name}.log"))

    def _ready(self, name: str, make: Callable[[], Server]) -> Server:
        if name not in self.found:
            self.found[name] = make()
        self.found[name].ready()
        return self.found[name]

    def pids(self) -> list[int]:
        """Of their first processes."""
        return [server.pid for server in self.found.values()]

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.found.values():
            server.signal(signal.SIGKILL)
