"""Speed of sampling with a language-model agent on MiniWiki, beside transformers' `generate`, as a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/agent_speed.py [--agent tiny] [--threads 1]

Prefixes come from the oracle's episodes, so they look like those of a trained agent; the tokens after them are sampled
by the agent at temperature 1. Only tokens up to the closing tag count. `generate` (benchmarks/naive.py) does the same
requests in the same process, one after the other with the policy, and each keeps its best of `--repeats`. Whole
training steps are in step_speed.py.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
import tyro
from naive import GeneratePolicy

from carl_gym.agents.agent import Agent, load_agent
from carl_gym.agents.policy import Policy, SampleRequest
from carl_gym.agents.scripted import OraclePolicy
from carl_gym.envs.registration import make_task
from carl_gym.envs.task import SearchTask

SIBLINGS = 16
Prefixes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Options:
    """Measure tokens per second on fresh prefixes, on siblings, and on prefixes that grew by a turn."""

    agent: str = "tiny"
    """Agent card, model folder or hub id, with a token for each closing tag."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """CPU threads of torch."""
    batches: tuple[int, ...] = (16, 128)
    """Batch sizes of sampling."""
    repeats: int = 3
    """Measurements of each speed, after one warm-up; the best counts."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    agent = load_agent(options.agent, device=options.device)
    assert agent.model is not None and agent.tokenizer is not None
    task = make_task("carl/MiniWiki-v0", questions=600)
    naive = GeneratePolicy(agent.model, agent.tokenizer, [f"</{tool}>" for tool in task.card.tools])
    parameters = sum(p.numel() for p in agent.model.parameters())
    print(f"Agent {options.agent}: {parameters:,} parameters, {options.device}, {options.threads} thread(s).\n")
    print("| prefixes | batch | mean prefix | policy, tokens/s | transformers generate, tokens/s | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for batch in options.batches:
        for name, prefixes, before in cases(agent, task, batch):
            ours, theirs = measure(agent, naive, prefixes, before, options.repeats)
            mean = sum(map(len, prefixes)) / len(prefixes)
            print(f"| {name} | {batch} | {mean:,.0f} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} |", flush=True)


def cases(agent: Agent, task: SearchTask, batch: int) -> list[tuple[str, Prefixes, Prefixes]]:
    """What the prefixes are, the prefixes, and those that were sampled from before."""
    fresh = oracle_prefixes(agent, task, batch)
    few = oracle_prefixes(agent, task, max(1, batch // SIBLINGS))
    siblings = [prefix for prefix in few for _ in range(min(SIBLINGS, batch))]
    first = agent.policy.sample(to_requests(agent, fresh, stream=0))
    question = next(iter(task.questions.values()))
    observation = agent.transcript.observation(task.observation(task.initial(question)), ())
    grown = [(*p, *done.token_ids, *observation) for p, done in zip(fresh, first, strict=True)]
    return [
        ("all different, nothing cached", fresh, ()),
        (f"{min(SIBLINGS, batch)} siblings each, nothing cached", siblings, ()),
        ("a turn later, cached up to there", grown, fresh),
    ]


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


def measure(agent: Agent, naive: Policy, prefixes: Prefixes, before: Prefixes, repeats: int) -> tuple[float, float]:
    """Best tokens per second of the policy and of `generate`, in turns; the first round warms up.

    Every round has the same random numbers, and so the same tokens.
    """
    requests = to_requests(agent, prefixes, stream=1)
    ours, theirs = [], []
    for _ in range(repeats + 1):
        agent.policy.sync()  # empties the prefix cache
        if before:
            agent.policy.sample(to_requests(agent, before, stream=0))
        ours.append(tokens_per_second(agent.policy, requests))
        theirs.append(tokens_per_second(naive, requests))
    return max(ours[1:]), max(theirs[1:])


def tokens_per_second(policy: Policy, requests: Sequence[SampleRequest]) -> float:
    start = time.perf_counter()
    completions = policy.sample(requests)
    return sum(len(done.token_ids) for done in completions) / (time.perf_counter() - start)


def to_requests(agent: Agent, prefixes: Prefixes, stream: int) -> list[SampleRequest]:
    return [
        SampleRequest(prefix, seed=stream * 1_000_003 + i, max_tokens=agent.transcript.max_tokens)
        for i, prefix in enumerate(prefixes)
    ]


if __name__ == "__main__":
    main(tyro.cli(Options))
