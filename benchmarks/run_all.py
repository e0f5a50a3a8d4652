"""Runs the benchmarks with the commands that their committed results were made with, and stores what they print.

    python benchmarks/run_all.py                       # all that can run here, one after the other
    python benchmarks/run_all.py --only startup step_speed
    python benchmarks/run_all.py --list                # names, minutes, and what would be skipped and why

Each writes benchmarks/results/NAME.md: the command, the commit, the date and the machine, then its tables. A result is
replaced only by a run that went through.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tyro

FOLDER = Path(__file__).parent
DATA = "CARL_GYM_DATA"
COMMANDS = {"cuda": "nvidia-smi", "chromedriver": "chromedriver"}
"""Needs that are there where a command is."""
PACKAGES = ("torch", "transformers", "numpy", "vllm", "trl", "numba", "faiss-cpu", "deepspeed")


@dataclass(frozen=True)
class Benchmark:
    """A script in this folder.

    Attributes:
        name: of the file, without `.py`.
        arguments: as on a shell's command line; `$CARL_GYM_DATA` stands for the folder with real data.
        minutes: roughly, on two cores with nothing else to do.
        needs: modules, "cuda", "chromedriver", or CARL_GYM_DATA: without them it is skipped.
    """

    name: str
    arguments: str = ""
    minutes: int = 5
    needs: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What to type to get the same."""
        return f"OMP_NUM_THREADS=1 python benchmarks/{self.name}.py {self.arguments}".strip()

    @property
    def result(self) -> str:
        """Name of the file that keeps what it printed."""
        return f"{self.name.replace('_', '-')}.md"


BENCHMARKS = (
    Benchmark("agent_speed", minutes=5),
    Benchmark("bm25_speed", f"--sizes 10000 100000 1000000 --data-dir ${DATA}/hotpotqa", 15, ("numba", "bm25s", DATA)),
    Benchmark("collector_speed", minutes=15, needs=("vllm",)),
    Benchmark("credit_bench", minutes=8),
    Benchmark("dense_speed", "--passages 10000 100000", 15, ("faiss", "sentence_transformers")),
    Benchmark("end_to_end", minutes=40, needs=("vllm", "deepspeed")),
    Benchmark("env_comparison", minutes=2),
    Benchmark("env_speed", f"--data-dir ${DATA}/hotpotqa", 3, (DATA,)),
    Benchmark("faults", minutes=240),
    Benchmark("fork_choice", minutes=10),
    Benchmark(
        "packing_speed",
        f"--data-dir ${DATA}/hotpotqa --questions 8 --long-questions 1 --repeats 1 --depths 4 8 --forks 4 16",
        10,
        (DATA,),
    ),
    Benchmark("prefill", minutes=5, needs=("vllm",)),
    Benchmark("retrieval_quality", f"--data-root ${DATA}", 120, ("jnius", "sentence_transformers", DATA)),
    Benchmark("scaling", "--steps 1", 20),
    Benchmark("server_speed", f"--data-dir ${DATA}/hotpotqa", 5, ("jnius", DATA)),
    Benchmark("soak", "--retrieval", 62),
    Benchmark("startup", minutes=5),
    Benchmark("step_speed", "--threads 1", 15),
    Benchmark("trl_comparison", "--seeds 0 1 --eval-every 3", 60, ("trl",)),
    Benchmark("vector_speed", "--sizes 64 64 64 1 8 256", 5, ("numba", DATA)),
    Benchmark("viewer_speed", minutes=1, needs=("selenium", "chromedriver")),
    Benchmark("vllm_speed", minutes=10, needs=("vllm",)),
)


@dataclass(frozen=True)
class Options:
    """Run benchmarks and store their results with command, commit and machine."""

    only: tuple[str, ...] = ()
    """Names of those to run; all by default."""
    list: bool = False
    """Only say what there is."""
    results: Path = FOLDER / "results"
    """Folder for the results."""


def main(options: Options) -> int:
    """Number of benchmarks that failed."""
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if unknown := [name for name in options.only if name not in known]:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.only or known]
    if options.list:
        print("| name | minutes | arguments | |\n|---|---:|---|---|")
        for one in chosen:
            print(f"| {one.name} | {one.minutes} | {one.arguments} | {skipped(one)} |")
        return 0
    commit, failed = state_of_checkout(), 0
    for one in chosen:
        if reason := skipped(one):
            print(f"{one.name}: {reason}", flush=True)
            continue
        print(f"{one.name}: about {one.minutes} min: {one.command}", flush=True)
        failed += not run(one, FOLDER, options.results, commit)
    return failed


def skipped(benchmark: Benchmark) -> str:
    """Why it cannot run here; "" if it can."""
    lacking = [need for need in benchmark.needs if not available(need)]
    return f"skipped, needs {', '.join(lacking)}" if lacking else ""


def available(need: str) -> bool:
    if need == DATA:
        return bool(os.environ.get(DATA))
    if need in COMMANDS:
        return shutil.which(COMMANDS[need]) is not None
    return importlib.util.find_spec(need) is not None


def run(benchmark: Benchmark, folder: Path, results: Path, commit: str) -> bool:
    """Run it and replace its result; False, and the old result stays, when it fails."""
    words = [os.path.expandvars(word) for word in shlex.split(benchmark.arguments)]
    started, load = time.time(), os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, str(folder / f"{benchmark.name}.py"), *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=FOLDER.parent,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    minutes = (time.time() - started) / 60
    if done.returncode:
        print(done.stdout, file=sys.stderr)  # what it had measured until then
        print(
            f"{benchmark.name}: failed with exit status {done.returncode}; its result stays as it was", file=sys.stderr
        )
        return False
    output = done.stdout.replace(os.environ.get(DATA) or "\0", f"${DATA}").strip()
    results.mkdir(parents=True, exist_ok=True)
    (results / benchmark.result).write_text(
        f"{header(benchmark, commit, load, minutes)}\n\n{output}\n", encoding="utf-8"
    )
    return True


def header(benchmark: Benchmark, commit: str, load: float, minutes: float) -> str:
    """What a reader needs to judge the numbers below it."""
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := version(name)))
    return "\n".join(
        [
            f"# {benchmark.name}",
            "",
            f"    {benchmark.command}",
            "",
            f"- commit {commit}; {datetime.now(UTC):%Y-%m-%d}; {minutes:.0f} min; load average before it {load:.1f}",
            f"- {machine()}",
            f"- Python {platform.python_version()}, {versions}",
        ]
    )


def state_of_checkout() -> str:
    """The commit, and whether files other than results differ from it."""
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        return "unknown (no git checkout)"
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", ":/", ":!/benchmarks/results"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return done.stdout.strip() + (" with uncommitted changes" if changed else "")


def machine() -> str:
    """Processor, cores that this process may use, memory, GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}{gpu()}"


def gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command: Sequence[str] = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    names = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    return f", {names[0]}" if names[0] else ""


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
