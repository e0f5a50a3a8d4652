"""What sampling computes of its prompts, as a Markdown table: every token of a rollout tree should be prefilled once.

    OMP_NUM_THREADS=1 python benchmarks/prefill.py [--backends transformers vllm] [--questions 16]

Rollouts on MiniWiki, in another world for each line, so that nothing is cached from before. "Asked" are the tokens of
all prefixes that an action was sampled after, "unique" the same with a beginning that several prefixes share counted
once, "computed" what went through the model before an action's first token, by the backend's own counters. The bound
is unique plus one cache block per request: a prefix's last token is always computed. Computed can be less than unique,
since sampled actions are in the cache when they come back in a prefix. With `system` each prompt begins with a text of
that many tokens, the same for all questions, as a chat's does.
"""

from __future__ import annotations

import itertools
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast

import torch
import transformers
import tyro

from carl_gym.agents.agent import load_agent
from carl_gym.agents.policy import Completion, Policy, SampleRequest, Transcript
from carl_gym.agents.prefill import BLOCK, common
from carl_gym.agents.transformers_policy import TransformersPolicy
from carl_gym.agents.vllm_policy import VllmPolicy
from carl_gym.algorithms import get_algorithm
from carl_gym.envs.registration import make_task
from carl_gym.rollouts import collect

Backend = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Options:
    """Count the prompt tokens that are asked for, unique and computed."""

    agent: str = "tiny"
    """Agent card, model folder or hub id."""
    backends: tuple[Backend, ...] = ("transformers", "vllm")
    """What samples; each runs in a process of its own."""
    algorithms: tuple[str, ...] = ("carl-lite", "carl", "grpo")
    """Algorithms whose rollouts are counted: CARL with N0 = 1, with N0 = 8, and groups of 16."""
    questions: int = 16
    """Questions, and so trees, rolled out together."""
    system: tuple[int, ...] = (0, 400)
    """Tokens that every prompt begins with."""
    threads: int = 1
    """CPU threads of torch; vLLM takes OMP_NUM_THREADS."""


@dataclass(frozen=True)
class LongPrompt:
    """Another transcript with a text before every prompt."""

    transcript: Transcript
    system: tuple[int, ...]

    @property
    def max_tokens(self) -> int:
        return self.transcript.max_tokens

    @property
    def context(self) -> int:
        return self.transcript.context

    def prompt(self, question_text: str, /) -> tuple[int, ...]:
        """The long text, and then what the other transcript says."""
        return (*self.system, *self.transcript.prompt(question_text))

    def observation(self, text: str, action: Sequence[int], /) -> tuple[int, ...]:
        return self.transcript.observation(text, action)


class Recorder:
    """A policy that keeps the prefixes it is asked for."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.version = policy.version
        self.prefixes: list[tuple[int, ...]] = []

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        self.prefixes += [tuple(request.prefix) for request in requests]
        return self.policy.sample(requests)

    def __getattr__(self, name: str) -> object:
        return getattr(self.policy, name)


def main(options: Options) -> None:
    print(f"Agent {options.agent}, {options.questions} questions.\n")
    print("| backend | rollouts | system prompt | requests | asked | unique | computed | computed / unique | bound |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for backend in options.backends:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for line in process.submit(lines, backend, options).result():
                print(line, flush=True)


def lines(backend: Backend, options: Options) -> list[str]:
    """The table's rows of one backend."""
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    agent = load_agent(options.agent, backend=backend, device="cpu", trainable=False)
    assert agent.tokenizer is not None
    found = []
    for world, (length, name) in enumerate(itertools.product(options.system, options.algorithms), 1):
        task = make_task("carl/MiniWiki-v0", world=world, questions=options.questions)
        passages = itertools.cycle(passage.text for passage in task.corpus)
        text: list[int] = []
        while len(text) < length:
            text += agent.tokenizer.encode(next(passages), add_special_tokens=False)
        transcript = LongPrompt(agent.transcript, tuple(text[:length]))
        policy, before = Recorder(agent.policy), computed(agent.policy)
        collect(
            task, cast(Policy, policy), transcript, list(task.questions.values()), get_algorithm(name).explorer,
            seed=0, step=0,
        )  # fmt: skip
        new, unique, requests = computed(agent.policy) - before, unique_tokens(policy.prefixes), len(policy.prefixes)
        block = BLOCK if backend == "transformers" else vllm_block()
        asked, bound = sum(map(len, policy.prefixes)), unique + block * requests
        counts = " | ".join(f"{n:,}" for n in (length, requests, asked, unique, new))
        kept = "kept" if new <= bound else "broken"
        found.append(f"| {backend} | {name} | {counts} | {new / unique:.2f} | {bound:,}: {kept} |")
    if isinstance(agent.policy, VllmPolicy):
        agent.policy.close()
    return found


def computed(policy: Policy) -> int:
    """Prompt tokens that went through the model so far."""
    if isinstance(policy, TransformersPolicy):
        return policy.counters.computed_tokens
    assert isinstance(policy, VllmPolicy)
    counted = policy.counters()
    return counted["prompt_tokens"] - counted["cached_tokens"]


def vllm_block() -> int:
    """Tokens in a cache block of vLLM on a CPU."""
    from carl_gym.agents import vllm_engine

    return vllm_engine.CPU_BLOCK


def unique_tokens(prefixes: Sequence[tuple[int, ...]]) -> int:
    """Tokens of all prefixes, a beginning that several share counted once."""
    ordered = sorted(set(prefixes))
    return sum(len(b) - common(a, b) for a, b in itertools.pairwise([(), *ordered]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
