"""Whole training steps beside the naive way, as Markdown tables.

    python benchmarks/step_speed.py [--algorithms carl-lite carl grpo] [--questions 16] [--steps 3]

A step is what the trainer calls one: rollouts of `--questions` questions, credit, two optimiser steps, weights to the
sampler. The naive way (benchmarks/naive.py) generates every action with transformers' `generate` from the whole prefix
and trains one full row per leaf; algorithm, questions, optimiser and micro-batch budget are the same, and so is the
gradient. Each side runs in processes of its own, one per number of threads, which take turns step by step; the first
step of each is a warm-up. Of its numbers of threads each side is judged by its better one. Wall-clock time includes
everything between two steps, for ours also metrics and MLflow; CPU time, of all threads, suffers less from other jobs
on the machine.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

Side = Literal["ours", "naive"]
PARTS = ("sample", "environment", "update")
HEAD = (
    "", "", "threads", "questions/s, median", "best", "s per step", "actions/s", "sample", "environment", "update",
    "other", "tokens through the update", "peak MiB",
)  # fmt: skip
_step: Callable[[], dict[str, float]]
"""What a worker process repeats."""


@dataclass(frozen=True)
class Options:
    """Measure questions per second of a training step, and where its time goes."""

    algorithms: tuple[str, ...] = ("carl-lite", "carl", "grpo")
    """Algorithms."""
    agent: str = "tiny"
    """Agent card, model folder or hub id, with a token for each closing tag."""
    env: str = "carl/MiniWiki-v0"
    """Environment id."""
    questions: int = 16
    """Questions, and so trees, per training step."""
    steps: int = 3
    """Timed steps of each side."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of torch threads to try."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Measured:
    """The timed steps of one side with one number of threads, seconds and names as in the trainer's metrics."""

    side: Side
    threads: int
    steps: list[dict[str, float]]

    def median(self, name: str) -> float:
        return median(step[name] for step in self.steps)


def main(options: Options) -> None:
    rows, ratios = [], []
    for algorithm in options.algorithms:
        measured = measure(algorithm, options)
        rows += [line(algorithm, one, options) for one in measured]
        best = {
            side: min((m for m in measured if m.side == side), key=lambda m: m.median("wall"))
            for side in ("ours", "naive")
        }
        ratios.append(ratio_line(algorithm, best["ours"], best["naive"]))
    print(f"{options.agent} on {options.env}, {options.questions} questions per step, {options.device}.\n")
    print("| " + " | ".join(HEAD) + " |\n|---|---|" + "---:|" * (len(HEAD) - 2))
    print("\n".join(rows))
    print("\n| ours / naive, each at its better number of threads | questions/s | of single steps | per CPU second |")
    print("|---|---:|---:|---:|")
    print("\n".join(ratios))


def measure(algorithm: str, options: Options) -> list[Measured]:
    """All sides and numbers of threads, alternating."""
    sides: list[tuple[Side, int]] = [(side, n) for n in options.threads for side in ("ours", "naive")]
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="step-speed-")))
        workers = [
            stack.enter_context(ProcessPoolExecutor(1, spawn, begin, (algorithm, *side, folder, options)))
            for side in sides
        ]
        rounds = [[worker.submit(timed).result() for worker in workers] for _ in range(options.steps + 1)]
    return [Measured(*side, [steps[i] for steps in rounds[1:]]) for i, side in enumerate(sides)]


def begin(algorithm: str, side: Side, threads: int, folder: Path, options: Options) -> None:
    """In a worker: load everything."""
    import transformers
    from naive import NaiveTrainer

    from carl_gym.training.config import TrainConfig
    from carl_gym.training.trainer import Trainer

    global _step
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = TrainConfig(
        algorithm=algorithm, agent=options.agent, env=options.env, questions_per_step=options.questions,
        steps=options.steps + 2, save_every=options.steps + 2, eval_questions=0, device=options.device,
        threads=threads, output_dir=folder / f"{side}-{threads}" / "run",
    )  # fmt: skip
    if side == "naive":
        trainer, numbers = NaiveTrainer(config), itertools.count(1)
        _step = lambda: trainer.step(next(numbers))  # noqa: E731
    else:
        run = Trainer(config).run()
        next(run)  # step 0 is the evaluation, of no question here
        _step = lambda: next(run)  # noqa: E731


def timed() -> dict[str, float]:
    """In a worker: one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = _step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return metrics | {"wall": wall, "cpu": cpu, "peak": peak}


def line(algorithm: str, measured: Measured, options: Options) -> str:
    wall = sum(step["wall"] for step in measured.steps)
    shares = [sum(step[f"time/{part}"] for step in measured.steps) / wall for part in PARTS]
    cells = [
        f"{options.questions / measured.median('wall'):.2f}",
        f"{options.questions / min(step['wall'] for step in measured.steps):.2f}",
        f"{measured.median('wall'):.2f}",
        f"{sum(step['rollout/actions_generated'] for step in measured.steps) / wall:,.0f}",
        *(f"{share:.0%}" for share in [*shares, 1 - sum(shares)]),
        f"{measured.median('update/tokens'):,.0f}",
        f"{measured.steps[-1]['peak']:,.0f}",
    ]
    return f"| {algorithm} | {measured.side} | {measured.threads} | " + " | ".join(cells) + " |"


def ratio_line(algorithm: str, ours: Measured, naive: Measured) -> str:
    single = [slow["wall"] / fast["wall"] for slow, fast in zip(naive.steps, ours.steps, strict=True)]
    cells = [
        f"{naive.median('wall') / ours.median('wall'):.2f}",
        f"{min(single):.2f} to {max(single):.2f}",
        f"{naive.median('cpu') / ours.median('cpu'):.2f}",
    ]
    return f"| {algorithm} ({ours.threads} against {naive.threads}) | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
