"""Faults injected into real training runs at random moments: what happened, what was lost, and where the runs ended.

    OMP_NUM_THREADS=1 python benchmarks/faults.py [--faults kill disk] [--times 20] [--backend vllm-server]

An injection is a training run of its own (the tiny agent on MiniWiki, 6 small steps, a checkpoint after each) that
meets one fault, at a random moment after step 0, and is started again with `--resume` as long as it ends with an error
or asks for it. Servers are real processes on this machine. The end is compared with that of a run nobody disturbed:

- state: weights, optimiser and random state of the last checkpoint, bit for bit;
- metrics: metrics.jsonl, except for times;
- kept: what was logged up to the checkpoint that the run was resumed from is still there, letter for letter;
- MLflow: every metric of every step once.

With vLLM runs do not repeat bit for bit: state and metrics then only have to be there, for every step once.
Finished injections are lines of OUTPUT_DIR/injections.jsonl and are not done again; the folder of one that did not
end as it should stays. Linux only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from disturbed_run import STEPS, Missed, Run, Stuck
from fault_kinds import FAULTS
from servers import Servers

ATTEMPTS = 5
"""Starts of one run, after which it counts as lost."""
STUCK = 124
"""Instead of the exit code of a run that did not go on."""
DRAWS = 5
"""Moments that are tried for an injection, where a run is over before them."""
BACKENDS = ("transformers", "vllm-server")


@dataclass(frozen=True)
class Options:
    """Inject faults into training runs and see where the runs end."""

    faults: tuple[str, ...] = ()
    """Which; all that the backend has by default. `--list` names them."""
    times: int = 20
    """Injections of each."""
    backend: Literal["transformers", "vllm-server"] = "transformers"
    """What samples. vllm-server starts one server on this machine."""
    seed: int = 0
    """Of the random moments and places."""
    output_dir: Path = Path("runs/faults")
    """Where runs, and the record of finished injections, go."""
    list: bool = False
    """Only say which faults there are."""
    report: bool = False
    """Inject nothing; print the table of what is recorded, of both backends."""


@dataclass(frozen=True)
class Injection:
    """What became of one."""

    backend: str
    fault: str
    number: int
    moment: str
    """When and what exactly."""
    codes: list[int]
    """Of the run's processes, in order: exit codes, negative for signals."""
    redone: int
    """Most steps that were logged and had to be done again after one start."""
    kept: bool
    state: bool
    metrics: bool
    mlflow: bool
    seconds: float

    @property
    def ok(self) -> bool:
        return self.codes[-1] == 0 and self.state and self.metrics and self.kept and self.mlflow


@dataclass(frozen=True)
class End:
    """How a run ended, to be compared with how another did.

    Attributes:
        state: digest of weights, optimiser and random numbers; "" where there is no checkpoint of the last step.
        rows: of metrics, without what differs from run to run.
    """

    state: str
    rows: list[dict[str, float]]


def end_of(run: Run) -> End:
    import torch
    from safetensors.torch import load_file

    from carl_gym.training.checkpoints import SHARDS

    found = run.checkpoints()
    if not found or found[-1].name != f"step-{STEPS:06d}":
        return End("", [])
    saved = torch.load(found[-1] / "trainer.pt", weights_only=True)
    optimizer = {
        f"{key}/{name}": value
        for key, entry in saved["optimizer"].get("state", {}).items()
        for name, value in entry.items()
    }
    for shard in (found[-1] / SHARDS).glob("*.safetensors"):
        optimizer |= {f"{shard.name}/{name}": value for name, value in load_file(shard).items()}
    if not optimizer:
        raise SystemExit(f"{found[-1]}: no state of the optimiser, whole or in shards")
    digest = hashlib.sha256()
    for name, tensor in sorted(
        {**load_file(found[-1] / "model.safetensors"), **optimizer, "rng": saved["rng"]}.items()
    ):
        digest.update(name.encode() + tensor.numpy().tobytes())
    own = ("seconds", "cpu_seconds")
    rows = [{k: v for k, v in json.loads(line).items() if k not in own and "time/" not in k} for line in run.lines]
    return End(digest.hexdigest(), rows)


def in_mlflow(run: Run) -> bool:
    """Whether its MLflow run has every metric of every step once."""
    run_id = json.loads((run.output / "mlflow_run.json").read_text(encoding="utf-8"))["run_id"]
    with contextlib.closing(sqlite3.connect(run.store, timeout=60)) as store:  # not by MLflow: it keeps the file open
        status = store.execute("SELECT status FROM runs WHERE run_uuid = ?", [run_id]).fetchone()
        found = store.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", [run_id]).fetchall()
    rows = [json.loads(line) for line in run.lines]
    expected = [(name, row["step"]) for row in rows for name in row if name != "step"]
    own = [metric for metric in found if not metric[0].startswith("system/")]  # MLflow's, by the clock
    return status == ("FINISHED",) and sorted(own) == sorted(expected)


def inject(name: str, number: int, options: Options, servers: Servers, undisturbed: End) -> Injection:
    """One run with one fault. Its folder stays if it did not end as it should."""
    rng = random.Random(f"{options.seed} {options.backend} {name} {number}")
    for draw in range(DRAWS):
        started = time.monotonic()
        try:
            return _inject(name, number, options, servers, undisturbed, rng)
        except Missed:
            if draw == DRAWS - 1:
                raise
        except Stuck as error:
            seconds = round(time.monotonic() - started, 1)
            return Injection(options.backend, name, number, str(error), [STUCK], 0, False, False, False, False, seconds)
    raise AssertionError


def _inject(
    name: str, number: int, options: Options, servers: Servers, undisturbed: End, rng: random.Random
) -> Injection:
    fault, started = FAULTS[name], time.monotonic()
    folder = options.output_dir / f"{options.backend}-{name}-{number}"
    with under_way(servers, folder, rng, options.backend, fault.world) as run:
        run.wait_for_moment(fault.first)
        with fault.happen(run):
            codes, redone, kept = [run.wait()], 0, True
        while (codes[-1] or run.said("the same command with --resume")) and len(codes) < ATTEMPTS:
            before, committed = run.lines, run.committed()
            codes.append(run.again())
            # Times differ in a step that was done again.
            pairs = enumerate(zip(before, run.lines, strict=False))
            same = next((i for i, (old, new) in pairs if old != new), len(before))
            redone = max(redone, len(before) - same)
            kept = kept and same > committed
        end = end_of(run)
        injection = Injection(
            options.backend, name, number, run.moment, codes, redone, kept,
            state=bool(end.state) and (end.state == undisturbed.state or options.backend != "transformers"),
            metrics=end.rows == undisturbed.rows
            or (options.backend != "transformers" and [row["step"] for row in end.rows] == list(range(STEPS + 1))),
            mlflow=in_mlflow(run), seconds=round(time.monotonic() - started, 1),
        )  # fmt: skip
    if injection.ok:
        shutil.rmtree(folder)
    return injection


@contextmanager
def under_way(servers: Servers, folder: Path, rng: random.Random, backend: str, world: Sequence[str]) -> Iterator[Run]:
    """A run that was started, in a new folder; nothing of it is left running."""
    disk = folder / "disk"
    if disk.is_mount():  # of a benchmark that was killed
        subprocess.run(["umount", str(disk)], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    disk.mkdir(parents=True)
    if "disk" in world:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "faults", str(disk)], check=True)
    try:
        run = Run(servers, folder, rng, backend, world)
        try:
            yield run
        finally:
            run.stop()
    finally:
        if "disk" in world:
            subprocess.run(["umount", str(disk)], check=True)


def undisturbed_end(servers: Servers, options: Options, world: Sequence[str]) -> End:
    """How a run ends that nothing happens to; remembered in the output directory."""
    path = options.output_dir / f"{'-'.join(('undisturbed', options.backend, *world))}.json"
    if not path.is_file():
        with under_way(servers, path.with_suffix(""), random.Random(0), options.backend, world) as run:
            if run.wait() or not in_mlflow(run):
                raise SystemExit(f"{run.folder}: a run that nothing happened to failed")
            path.write_text(json.dumps(dataclasses.asdict(end_of(run))), encoding="utf-8")
    return End(**json.loads(path.read_text(encoding="utf-8")))


def table(done: Sequence[Injection], backend: str) -> str:
    """What became of all injections into runs of a backend, by fault, with the failures named below."""
    end = "ended as undisturbed" if backend == "transformers" else "ended with every step once"
    lines = [
        "| fault | times | exit codes of the process | starts after it, most | steps done again, most | "
        f"committed steps lost | MLflow complete | {end} |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, fault in FAULTS.items():
        if found := [injection for injection in done if injection.fault == name]:
            codes = Counter(injection.codes[0] for injection in found)
            cells = [
                fault.title,
                len(found),
                ", ".join(f"{code}{f' ({n})' if len(codes) > 1 else ''}" for code, n in codes.most_common()),
                max(len(injection.codes) - 1 for injection in found),
                max(injection.redone for injection in found),
                sum(not injection.kept for injection in found),
                sum(injection.mlflow for injection in found),
                sum(injection.ok for injection in found),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [f"\nNot as it should be: {injection}" for injection in done if not injection.ok]
    return "\n".join(lines)


def main(options: Options) -> None:
    names = options.faults or tuple(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        raise SystemExit(f"no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    chosen = [name for name in names if not (why_not(name, options.backend))]
    if options.list:
        for name in names:
            print(f"{name}: {FAULTS[name].title} {why_not(name, options.backend)}".strip())
        return
    options = dataclasses.replace(options, output_dir=options.output_dir.resolve())
    options.output_dir.mkdir(parents=True, exist_ok=True)
    record = options.output_dir / "injections.jsonl"
    text = record.read_text(encoding="utf-8") if record.is_file() else ""
    done = [Injection(**json.loads(line)) for line in text.splitlines()[: text.count("\n")]]
    if not text.endswith("\n"):  # a line that was cut off
        record.write_text("".join(text.splitlines(keepends=True)[: len(done)]), encoding="utf-8")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before the process that runs are forked from imports it
    with Servers(options.output_dir) as servers:
        for number in range(0 if options.report else options.times):
            for name in chosen:
                if (options.backend, name, number) not in {(i.backend, i.fault, i.number) for i in done}:
                    # Rounding differs with the number of processes, and what is compared with their layout.
                    world = [part for part in FAULTS[name].world if part in ("ranks", "fsdp")]
                    injection = inject(name, number, options, servers, undisturbed_end(servers, options, world))
                    print("ok" if injection.ok else "NOT AS IT SHOULD BE", injection, file=sys.stderr, flush=True)
                    with record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(dataclasses.asdict(injection)) + "\n")
                    done.append(injection)
    for backend in BACKENDS:
        if found := [injection for injection in done if injection.backend == backend]:
            print(f"### {backend}\n\n{table(found, backend)}\n")


def why_not(name: str, backend: str) -> str:
    """Why a fault cannot be injected here; "" if it can."""
    world = FAULTS[name].world
    if "vllm" in world and backend != "vllm-server":
        return "(with --backend vllm-server)"
    return "(needs root, to mount a small disk)" if "disk" in world and os.getuid() != 0 else ""


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
