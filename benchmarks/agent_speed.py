"""Speed and memory of sampling and training with a language-model agent on MiniWiki, as Markdown tables.

    python benchmarks/agent_speed.py [--agent tiny] [--threads 1]

Prefixes come from the oracle's episodes, so they look like those of a trained agent; the tokens after them are
sampled by the agent at temperature 1. Only tokens up to the closing tag count. Plain transformers `generate` does the
same requests in the same process, one after the other with the policy, and each keeps its best of `repeats`.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

from carl_gym.agents.agent import Agent, load_agent
from carl_gym.agents.policy import SampleRequest
from carl_gym.agents.scripted import OraclePolicy
from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.envs.protocol import STOP_STRINGS
from carl_gym.envs.registration import make_task
from carl_gym.envs.task import SearchTask
from carl_gym.rollouts.collector import collect
from carl_gym.training.config import TrainConfig
from carl_gym.training.learner import Learner
from carl_gym.training.segments import Row, rows, segments
from carl_gym.training.trainer import Trainer

SIBLINGS = 16
ALGORITHMS = ("carl-lite", "carl", "grpo")


@dataclass(frozen=True)
class Options:
    """Measure tokens per second, where a training step spends its time, and peak memory."""

    agent: str = "tiny"
    """Agent card, model folder or hub id."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """CPU threads of torch."""
    batches: tuple[int, ...] = (16, 128)
    """Batch sizes of sampling."""
    questions: int = 8
    """Questions, and so trees, per training step; more fill the sampling batches of carl-lite better."""
    steps: int = 2
    """Training steps per algorithm, at least 2; the first is a warm-up and not counted."""
    repeats: int = 2
    """Measurements of each sampling and update speed, after one warm-up; the best counts."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    agent = load_agent(options.agent, device=options.device)
    assert agent.model is not None
    task = make_task("carl/MiniWiki-v0", questions=600)
    parameters = sum(p.numel() for p in agent.model.parameters())
    print(f"Agent {options.agent}: {parameters:,} parameters, {options.device}, {options.threads} thread(s).\n")
    shares_table(options)
    training_table(agent, task, options)
    print()
    sampling_table(agent, task, options)


def sampling_table(agent: Agent, task: SearchTask, options: Options) -> None:
    """The policy against `generate` on fresh prefixes, on siblings, and on prefixes that grew by a turn."""
    print("| prefixes | batch | mean prefix | policy, tokens/s | transformers generate, tokens/s | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for batch in options.batches:
        fresh = oracle_prefixes(agent, task, batch)
        few = oracle_prefixes(agent, task, max(1, batch // SIBLINGS))
        siblings = [prefix for prefix in few for _ in range(min(SIBLINGS, batch))]
        first = agent.policy.sample(to_requests(agent, fresh, stream=0))
        question = next(iter(task.questions.values()))
        observation = agent.transcript.observation(task.observation(task.initial(question)), ())
        grown = [(*p, *done.token_ids, *observation) for p, done in zip(fresh, first, strict=True)]

        def warm(fresh: list[tuple[int, ...]] = fresh) -> None:
            agent.policy.sample(to_requests(agent, fresh, stream=0))

        for name, prefixes, prepare in (
            ("all different, nothing cached", fresh, None),
            (f"{min(SIBLINGS, batch)} siblings each, nothing cached", siblings, None),
            ("a turn later, cached up to there", grown, warm),
        ):
            ours, theirs = measure_sampling(agent, prefixes, prepare, options.repeats)
            mean = sum(map(len, prefixes)) / len(prefixes)
            print(f"| {name} | {batch} | {mean:,.0f} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} |", flush=True)


def measure_sampling(
    agent: Agent, prefixes: Sequence[tuple[int, ...]], prepare: Callable[[], None] | None, repeats: int
) -> tuple[float, float]:
    """Best tokens per second of the policy and of `generate`, in turns; the first round warms up.

    Every round has the same random numbers, and so the same tokens.
    """
    requests = to_requests(agent, prefixes, stream=1)
    ours, theirs = [], []
    for _ in range(repeats + 1):
        agent.policy.sync()  # empties the prefix cache
        if prepare:
            prepare()
        start = time.perf_counter()
        completions = agent.policy.sample(requests)
        ours.append(sum(len(done.token_ids) for done in completions) / (time.perf_counter() - start))
        start = time.perf_counter()
        tokens = generate(agent, prefixes)
        theirs.append(tokens / (time.perf_counter() - start))
    return max(ours[1:]), max(theirs[1:])


def to_requests(agent: Agent, prefixes: Sequence[tuple[int, ...]], stream: int) -> list[SampleRequest]:
    return [
        SampleRequest(prefix, seed=stream * 1_000_003 + i, max_tokens=agent.transcript.max_tokens)
        for i, prefix in enumerate(prefixes)
    ]


@torch.inference_mode()
def generate(agent: Agent, prefixes: Sequence[tuple[int, ...]]) -> int:
    """Sample with transformers' own `generate`, padded on the left; returns the number of tokens up to the stop."""
    tokenizer, model = agent.tokenizer, agent.model
    assert tokenizer is not None and model is not None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(map(len, prefixes))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prefixes], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes], device=model.device)
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=agent.transcript.max_tokens,
        stop_strings=list(STOP_STRINGS),
        tokenizer=tokenizer,
        pad_token_id=pad,
    )[:, width:]
    # `generate` fills up with padding once a row has stopped.
    return int((out != pad).sum())


def oracle_prefixes(agent: Agent, task: SearchTask, count: int) -> list[tuple[int, ...]]:
    """Different prefixes of 0 to 3 turns."""
    assert agent.tokenizer is not None
    oracle, found = OraclePolicy(task), []
    for index, question in enumerate(itertools.islice(task.questions.values(), count)):
        state = task.initial(question)
        prefix = [*agent.transcript.prompt(task.observation(state))]
        for _ in range(index % 4):
            action = oracle.actions(state)[0]
            state = task.transition(state, action)
            tokens = agent.tokenizer.encode(action, add_special_tokens=False)
            prefix += [*tokens, *agent.transcript.observation(task.observation(state), tokens)]
        found.append(tuple(prefix))
    return found


def training_table(agent: Agent, task: SearchTask, options: Options) -> None:
    """Tokens per second of the update, on the rows of CARL trees."""
    batch = carl_rows(agent, task, options)
    assert agent.model is not None
    learner = Learner(agent.model, learning_rate=0.0)  # weights, and with them the work, stay the same
    speeds, padded = [], 0
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        update = learner.update(batch, 0.2, 0.2)
        if update is None:
            print("\nNo action of these CARL trees has an advantage: there is no update to measure.")
            return
        padded = update.tokens
        speeds.append(1 / (time.perf_counter() - start))
    tokens, trained = sum(len(row.tokens) for row in batch), sum(len(row.positions) for row in batch)
    print("\n| update on CARL rows | value |\n|---|---:|")
    print(f"| tokens/s, without padding | {tokens * max(speeds[1:]):,.0f} |")
    print(f"| rows, mean length | {len(batch)}, {tokens / len(batch):,.0f} |")
    print(f"| trained tokens, share of all | {trained / tokens:.0%} |")
    print(f"| padding, share of all that is computed | {1 - tokens / padded:.0%} |")


def carl_rows(agent: Agent, task: SearchTask, options: Options) -> list[Row]:
    algorithm = get_algorithm("carl")
    questions = list(task.questions.values())[: options.questions]
    agent.policy.sync()
    trees = collect(task, agent.policy, agent.transcript, questions, algorithm.explorer, seed=0, step=0)
    advantages, selected = algorithm.credit(trees), algorithm.selection(trees)
    weights = token_weights(trees, selected, algorithm.loss_reduction)
    return [row for tree, a, w in zip(trees, advantages, weights, strict=True) for row in rows(segments(tree, a, w))]


def shares_table(options: Options) -> None:
    """Where the time of a training step goes, by the trainer's own clocks; each run in a process of its own."""
    print("| algorithm | actions/s | s per step | sample | environment | other rollout | update | peak MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in ALGORITHMS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            steps, peak = process.submit(train, name, options).result()
        rollout, update, sample, environment = (
            sum(step[f"time/{part}"] for step in steps) for part in ("rollout", "update", "sample", "environment")
        )
        total = rollout + update
        shares = (sample, environment, rollout - sample - environment, update)
        actions = sum(step["rollout/actions_generated"] for step in steps) / total
        cells = [f"{actions:,.0f}", f"{total / len(steps):.2f}", *(f"{share / total:.0%}" for share in shares)]
        print(f"| {name} | " + " | ".join([*cells, f"{peak:,.0f}"]) + " |", flush=True)


def train(algorithm: str, options: Options) -> tuple[list[dict[str, float]], float]:
    """Metrics of a training run's steps but the first, and the peak memory of this process in MiB."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="agent-speed-") as folder:
        config = TrainConfig(
            algorithm=algorithm, agent=options.agent, steps=options.steps, questions_per_step=options.questions,
            eval_questions=0, save_every=options.steps, device=options.device, threads=options.threads,
            output_dir=Path(folder) / algorithm,
        )  # fmt: skip
        steps = [metrics for metrics in Trainer(config).run() if "time/rollout" in metrics]
    return steps[1:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(tyro.cli(Options))
