"""Time and memory of one training step as the work grows, as Markdown tables with the exponent between neighbours.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--curves questions turns parameters forks] [--quick]

Work is made equal in all but the one quantity: a random Llama samples actions of exactly `--tokens` tokens, every
action is taken as a search for words of the corpus, so that episodes use up their turn budget, and advantages are drawn
at random, so that every selected action trains. Everything else is the trainer's own step. Each point has a process of
its own: one warm-up step, then the median of `--steps`. Seconds are the process's CPU seconds, which other jobs on the
machine disturb least; with more than one thread, or `--clock wall`, they are those of the wall clock. "Growth" is the
peak of the process less what it had when model and data were loaded. An exponent is log(ratio of the values) /
log(ratio of the sizes) between a point and the one before it: 1 is linear, less means that a fixed cost is still being
shared out, and columns that grow by more than 1.15 are named.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

from carl_gym.agents.agent import Agent, load_agent
from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.agents.transformers_policy import TransformersPolicy
from carl_gym.rollouts import RolloutTree
from carl_gym.training.config import TrainConfig
from carl_gym.training.trainer import Trainer

WIDTHS = {"0.5M": (96, 3), "2M": (192, 4), "8M": (320, 6), "30M": (512, 9), "100M": (768, 14)}
"""Hidden size and layers; the vocabulary is the tiny agent's."""
CURVES = {
    "questions": ("8", "16", "32", "64", "128"),
    "turns": ("4", "8", "16", "32"),
    "parameters": tuple(WIDTHS),
    "forks": ("4", "8", "16", "32", "64"),
}
SMALLER: dict[str, dict[str, Any]] = {"parameters": {"questions": 2, "turns": 3, "forks": 4}}
"""What a curve has smaller than the options say, because its last point would take an hour otherwise."""
QUICK = {"questions": ("2", "4"), "turns": ("2", "4"), "parameters": ("0.5M", "2M"), "forks": ("2", "4")}
STEEP = 1.15


@dataclass(frozen=True)
class Options:
    """Measure how a training step's time and memory grow with questions, turns, parameters and forks."""

    curves: tuple[str, ...] = tuple(CURVES)
    """Curves: questions, turns, parameters, forks."""
    algorithm: str = "carl-lite"
    """carl-lite or carl."""
    questions: int = 8
    """Questions per step, where they do not grow."""
    turns: int = 6
    """Turns per episode, where they do not grow."""
    parameters: str = "0.5M"
    """Model, where it does not grow."""
    forks: int = 8
    """N, where it does not grow."""
    tokens: int = 16
    """Tokens of an action."""
    clock: Literal["cpu", "wall"] = "cpu"
    """What seconds are."""
    steps: int = 2
    """Timed steps per point."""
    threads: int = 1
    """CPU threads of torch."""
    quick: bool = False
    """Two small points per curve."""


@dataclass(frozen=True)
class Point:
    """What one step of a size cost: seconds, MiB, and how much work it was."""

    size: float
    step: float
    sample: float
    environment: float
    update: float
    generated: float
    """Tokens sampled."""
    updated: float
    """Tokens through the model in the update, padding included."""
    loaded: float
    peak: float


COLUMNS = {
    "s per step": lambda p: p.step,
    "sample": lambda p: p.sample,
    "environment": lambda p: p.environment,
    "update": lambda p: p.update,
    "ms per sampled token": lambda p: 1000 * p.sample / p.generated,
    "ms per token of the update": lambda p: 1000 * p.update / p.updated,
    "growth MiB": lambda p: p.peak - p.loaded,
}


class SearchingPolicy(TransformersPolicy):
    """Samples as ever, but every action is taken as a search for words that its tokens choose."""

    words: Sequence[str] = ()

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        return [dataclasses.replace(done, text=self._search(done.token_ids)) for done in super().sample(requests)]

    def _search(self, tokens: Sequence[int]) -> str:
        return f"<search>{' '.join(self.words[token % len(self.words)] for token in tokens[:3])}</search>"


def main(options: Options) -> None:
    if options.threads > 1:
        options = dataclasses.replace(options, clock="wall")
    setting = f"{options.algorithm}, {options.threads} thread(s), {options.tokens} tokens per action"
    print(f"{setting}, seconds of the {options.clock} clock")
    for curve in options.curves:
        fixed = dataclasses.replace(options, **SMALLER.get(curve, {}))
        rest = ", ".join(f"{name} {getattr(fixed, name)}" for name in CURVES if name != curve)
        print(f"\n### {curve}\n\nThe others stay: {rest}.\n")
        print("| " + " | ".join([curve, *COLUMNS, "peak MiB", "exponent of the step", "steeper than linear"]) + " |")
        print("|" + "---:|" * (len(COLUMNS) + 3) + "---|")
        before: Point | None = None
        for size in (QUICK if options.quick else CURVES)[curve]:
            changed: dict[str, Any] = {curve: size if curve == "parameters" else int(size)}
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                point = process.submit(measure, curve, dataclasses.replace(fixed, **changed)).result()
            print(line(size, point, before), flush=True)
            before = point


def line(size: str, point: Point, before: Point | None) -> str:
    values = [value(point) for value in COLUMNS.values()]
    cells = [size, *(f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in values), f"{point.peak:,.0f}"]
    if before is None:
        return f"| {' | '.join(cells)} | | |"
    found = {name: exponent(point, before, name) for name in COLUMNS}
    steep = [f"{name} {e:.2f}" for name, e in found.items() if e > STEEP - ("token" in name)]  # per token, linear is 0
    return f"| {' | '.join(cells)} | {found['s per step']:.2f} | {', '.join(steep)} |"


def exponent(point: Point, before: Point, column: str) -> float:
    value = COLUMNS[column]
    if min(value(point), value(before)) <= 0:
        return 0.0
    return math.log(value(point) / value(before)) / math.log(point.size / before.size)


def measure(curve: str, options: Options) -> Point:
    """In a process of its own: the median step, after a warm-up."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.clock == "cpu":
        time.perf_counter = time.process_time  # so that the trainer's own clocks count it, too
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        trainer = prepare(Path(folder), options)
        steps = []
        with closing(cast(Generator[dict[str, float]], trainer.run())) as run:
            next(run)  # step 0, which evaluates nothing
            loaded = peak()
            for _ in range(options.steps + 1):
                started = time.perf_counter()
                steps.append(next(run) | {"step": time.perf_counter() - started})
        model = trainer.agent.model
        assert model is not None
        parameters = sum(parameter.numel() for parameter in model.parameters())
    typical = {name: median(step[name] for step in steps[1:]) for name in steps[1]}
    return Point(
        size=parameters if curve == "parameters" else getattr(options, curve),
        step=typical["step"],
        sample=typical["time/sample"],
        environment=typical["time/environment"],
        update=typical["time/update"],
        generated=typical["rollout/tokens"],
        updated=typical["update/tokens"],
        loaded=loaded,
        peak=peak(),
    )


def prepare(folder: Path, options: Options) -> Trainer:
    """The trainer, with the model, the policy and the credit that make work equal."""
    config = TrainConfig(
        algorithm=options.algorithm, forks=options.forks, agent=build_agent(folder / "agent", options),
        questions_per_step=options.questions, env_args=(f"turns={options.turns}",), steps=options.steps + 2,
        save_every=options.steps + 2, eval_questions=0, device="cpu", threads=options.threads,
        output_dir=folder / "run",
    )  # fmt: skip
    trainer = Trainer(config)
    agent = trainer.agent
    assert agent.model is not None and agent.tokenizer is not None
    policy = SearchingPolicy(agent.model, agent.tokenizer, stop=(), eos=set())
    policy.words = sorted({word for passage in trainer.task.corpus for word in passage.title.split()})
    trainer.agent = dataclasses.replace(agent, policy=policy)
    trainer.algorithm = dataclasses.replace(trainer.algorithm, credit=random_credit)
    return trainer


def random_credit(trees: Sequence[RolloutTree]) -> list[np.ndarray]:
    return [np.random.default_rng(tree.seed % 2**32).choice([-1.0, 1.0], len(tree.nodes)) for tree in trees]


def build_agent(folder: Path, options: Options) -> str:
    """A random Llama with the tiny agent's tokenizer and templates."""
    tiny = load_agent("tiny", device="cpu")
    assert tiny.tokenizer is not None
    width, layers = WIDTHS[options.parameters]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny.tokenizer), hidden_size=width, intermediate_size=8 * width // 3 // 32 * 32,
            num_hidden_layers=layers, num_attention_heads=width // 32, max_position_embeddings=8192,
            eos_token_id=tiny.tokenizer.eos_token_id,
        )
    )  # fmt: skip
    card = dataclasses.replace(tiny.card, max_tokens=options.tokens, context=8192)
    Agent(card, tiny.policy, tiny.transcript, model, tiny.tokenizer).save(folder)
    return str(folder)


def peak() -> float:
    """Of this process's memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
