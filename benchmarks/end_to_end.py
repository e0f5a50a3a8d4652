"""The whole system on one machine: trainer processes, two vLLM servers and two retrieval servers, as Markdown tables.

    OMP_NUM_THREADS=1 python benchmarks/end_to_end.py [--steps 12] [--arms one two fsdp2 zero3 off]

The tiny agent learns MiniWiki with CARL-Lite once per arm, on the same questions and with the same random numbers: in
one process, in two under `accelerate launch` with the configurations of scripts/configs/ (the learner whole in each,
or split by FSDP2 or DeepSpeed's ZeRO-3), and in two with `--one-step-off`. Every action comes from a vLLM server, every
search of the rollouts from a retrieval server, and the weights go to the servers after each step. Runs that are
finished in OUTPUT_DIR are not done again, and one that was interrupted goes on. Linux only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal, TypeAlias

import tyro
from servers import INDEX, ROOT, Servers

Arm = Literal["one", "two", "fsdp2", "zero3", "off"]
ARMS: dict[Arm, tuple[str, str, tuple[str, ...]]] = {
    "one": ("one process", "", ()),
    "two": ("two processes", "ddp.yaml", ()),
    "fsdp2": ("two, FSDP2", "fsdp2.yaml", ()),
    "zero3": ("two, ZeRO-3", "zero3.yaml", ()),
    "off": ("two, one step off", "ddp.yaml", ("--one-step-off",)),
}
"""Title, configuration of the launcher ("": none), options."""
PHASES = ("rollout", "update", "sync")
SAME = ("actions_generated", "actions_trained", "rollout/em", "rollout/reward")
"""What two runs have in common as long as no draw fell otherwise."""
Metrics: TypeAlias = list[dict[str, float]]


@dataclass(frozen=True)
class Options:
    """Train end to end, and compare."""

    steps: int = 12
    """Training steps."""
    questions: int = 8
    """Questions of a step."""
    eval_every: int = 4
    """Steps between evaluations."""
    eval_questions: int = 200
    """Held-out questions."""
    arms: tuple[Arm, ...] = tuple(ARMS)
    """Which runs."""
    seed: int = 0
    """Of all runs."""
    output_dir: Path = Path("runs/end-to-end")
    """Where they go."""


def main() -> None:
    options = tyro.cli(Options)
    options = replace(options, output_dir=options.output_dir.resolve())
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with Servers(options.output_dir) as servers:
        found = {arm: run(arm, servers, options) for arm in options.arms}
    print(report(found))


def run(arm: Arm, servers: Servers, options: Options) -> Metrics:
    """One training run, unless it is there; its metrics."""
    folder = options.output_dir / arm
    if not (folder / "summary.json").is_file():
        recipe = servers.recipe(options.output_dir / "remote.toml")
        urls = [servers.vllm(number).url for number in range(2)]
        _, config, extra = ARMS[arm]
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "scripts" / "configs" / config)]
        launcher += ["--main_process_port", "0"]
        command = [sys.executable, *(launcher if config else []), str(ROOT / "scripts" / "train_carl.py")]
        command += ["--algorithm", "carl-lite", "--backend", "vllm-server", "--urls", *urls]
        # The evaluation's questions are of another world, which the retrieval servers do not have.
        command += ["--env-args", f"index={recipe}", "--eval-args", f"index={INDEX}"]
        command += ["--steps", str(options.steps), "--questions-per-step", str(options.questions)]
        command += ["--eval-every", str(options.eval_every), "--eval-questions", str(options.eval_questions)]
        command += ["--save-every", str(options.eval_every), "--tree-questions", "0", "--threads", "1"]
        command += ["--seed", str(options.seed), "--output-dir", str(folder), *extra]
        command += ["--resume"] if (folder / "config.json").is_file() else []
        with (options.output_dir / f"{arm}.log").open("ab") as log:
            trainer = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = trainer.wait()
        finally:  # whatever ends this process ends all of theirs
            with contextlib.suppress(ProcessLookupError):
                os.killpg(trainer.pid, signal.SIGKILL)
        if code:
            raise SystemExit(f"the run of {arm} ended with code {code}; its output is in {log.name}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def report(found: dict[Arm, Metrics]) -> str:
    """Tables: what was learned, how long it took, and from which step on runs were different."""
    titles = [ARMS[arm][0] for arm in found]
    lines = ["Held-out EM, sampled / greedy:", "", f"| step | {' | '.join(titles)} |", "|---:|" + "---:|" * len(titles)]
    evaluations = [{int(row["step"]): row for row in rows if "eval/sampled_em" in row} for rows in found.values()]
    for step in sorted(set().union(*evaluations)):
        scores = (
            f"{100 * rows[step]['eval/sampled_em']:.1f} / {100 * rows[step]['eval/greedy_em']:.1f}"
            if step in rows
            else ""
            for rows in evaluations
        )
        lines.append(f"| {step} | {' | '.join(scores)} |")
    columns = [f"{phase}, s" for phase in PHASES]
    lines += [
        "",
        "Medians of the steps after the first. The gap is the largest between log-probs of a server and the learner on "
        "trained tokens (one step off: of the weights before the step and after), the canary's the same on fixed "
        "prefixes, right after weights were pushed.",
        "",
        f"| | actions generated | trained | step, s | {' | '.join(columns)} | gap, nats | canary, nats |",
        "|---|---:|---:|---:|" + "---:|" * len(columns) + "---:|---:|",
    ]
    for title, rows in zip(titles, found.values(), strict=True):
        steps = [row for row in rows if row["step"] > 0]
        times = [[row[f"time/{phase}"] for row in steps[1:]] for phase in PHASES]
        whole = [later["seconds"] - before["seconds"] for before, later in itertools.pairwise(steps)]
        gaps = (max(row.get(f"update/{name}", 0.0) for row in steps) for name in ("logprob_gap", "canary_gap"))
        numbers = (f"{median(values):.1f}" for values in (whole, *times))
        last = steps[-1]
        lines.append(
            f"| {title} | {last['actions_generated']:,.0f} | {last['actions_trained']:,.0f} | {' | '.join(numbers)} | "
            f"{' | '.join(f'{gap:.0e}' for gap in gaps)} |"
        )
    if one := found.get("one"):
        for arm in ("two", "fsdp2", "zero3"):
            if arm in found:
                lines += ["", f"{ARMS[arm][0]}: {first_difference(one, found[arm])}"]
    return "\n".join(lines)


def first_difference(one: Metrics, other: Metrics) -> str:
    """From where on a run is not that of one process."""
    same = f"{', '.join(SAME)} are those of one process"
    for mine, theirs in zip(one, other, strict=True):
        if names := [name for name in SAME if mine.get(name) != theirs.get(name)]:
            return f"{same} before step {mine['step']:.0f}, where {', '.join(names)} differ."
    return f"{same} at every step."


if __name__ == "__main__":
    main()
