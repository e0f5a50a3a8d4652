"""Sampling with vLLM beside the transformers policy, as Markdown tables.

    OMP_NUM_THREADS=1 python benchmarks/vllm_speed.py [--threads 1] [--agents tiny 100m] [--concurrent 1 16 64 256]

Both policies run in this process, on the same weights and requests, one after the other; each speed is the best of
`--repeats` after a warm-up. Requests are slices of MiniWiki's text (other text for each number of concurrent actions
and repeat, so that no prefix is cached from before), followed by `--tokens` sampled tokens with nothing to stop them:
both generate the same number. "Shared" prefixes are siblings, 16 to a prefix, as forks are. `100m` is a random Llama of
about 100 million parameters with the tiny agent's tokenizer.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers
import tyro
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from carl_gym.agents import vllm_engine
from carl_gym.agents.agent import load_agent
from carl_gym.agents.card import resolve
from carl_gym.agents.policy import Policy, SampleRequest
from carl_gym.agents.transformers_policy import TransformersPolicy
from carl_gym.agents.vllm_policy import VllmPolicy
from carl_gym.envs.registration import make_task
from carl_gym.rollouts import EntropyForking, RolloutTree, collect

SIBLINGS = 16


@dataclass(frozen=True)
class Options:
    """Measure tokens per second, time of a weight sync, overhead outside the engine, and what forks prefill."""

    agents: tuple[str, ...] = ("tiny", "100m")
    """Agents, or 100m."""
    concurrent: tuple[int, ...] = (1, 16, 64, 256)
    """Numbers of actions sampled at once."""
    prefix: int = 96
    """Tokens before the action."""
    tokens: int = 16
    """Tokens of an action."""
    threads: int = 1
    """CPU threads of torch; vLLM takes OMP_NUM_THREADS when it is imported, so set that to the same."""
    repeats: int = 2
    """Measurements, of which the best counts."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    stream = text_stream()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.agents:
            source = build_100m(Path(folder)) if name == "100m" else name
            model, policies = load(source)
            size = sum(p.numel() for p in model.parameters())
            print(f"\n### {name}: {size:,} parameters, {options.threads} thread(s)\n")
            print(f"{options.prefix} tokens before the action, {options.tokens} in it.\n")
            speed_table(policies, stream, options)
            sync_line(policies["vllm"], model)
            cast(VllmPolicy, policies["vllm"]).close()
            if name != "100m":
                fork_table(source)


def load(source: str) -> tuple[PreTrainedModel, dict[str, Policy]]:
    """The learner's model and both policies; neither stops before the last token."""
    agent = load_agent(source, device="cpu")
    assert agent.model is not None and agent.tokenizer is not None
    model, tokenizer = agent.model, agent.tokenizer
    vllm = VllmPolicy(resolve(source)[1], tokenizer, (), set(), dtype="float32", context=agent.transcript.context)
    reference = TransformersPolicy(model, tokenizer, (), eos=set(), max_batch=256)
    return model, {"transformers": reference, "vllm": vllm}


def build_100m(folder: Path) -> str:
    """A random Llama of GPT-2's shape, saved as an agent."""
    tiny = load_agent("tiny", device="cpu")
    assert tiny.tokenizer is not None
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny.tokenizer), hidden_size=768, intermediate_size=2560, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=1536, eos_token_id=tiny.tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    (folder / "agent.toml").write_text(
        'id = "100m"\ndescription = "random"\nmodel = "."\nprompt = "{observation}"\nobservation = "{observation}"\n'
    )
    return str(folder)


def text_stream() -> Iterator[int]:
    """Endless token ids of MiniWiki's passages."""
    agent = load_agent("tiny", device="cpu")
    assert agent.tokenizer is not None
    for world in itertools.count():
        for passage in make_task("carl/MiniWiki-v0", world=world).corpus:
            yield from agent.tokenizer.encode(passage.text, add_special_tokens=False)


def requests(stream: Iterator[int], count: int, shared: bool, options: Options) -> list[SampleRequest]:
    prefixes = [
        list(itertools.islice(stream, options.prefix)) for _ in range(-(-count // SIBLINGS) if shared else count)
    ]
    return [
        SampleRequest(prefixes[i // SIBLINGS if shared else i], seed=i, max_tokens=options.tokens) for i in range(count)
    ]


def speed_table(policies: dict[str, Policy], stream: Iterator[int], options: Options) -> None:
    print("| concurrent | prefixes | transformers, tokens/s | vLLM, tokens/s | ratio | outside the engine |")
    print("|---:|---|---:|---:|---:|---:|")
    for count, shared in itertools.product(options.concurrent, (False, True)):
        if shared and count < SIBLINGS:
            continue
        best = dict.fromkeys(policies, 0.0)
        outside = 1.0
        for _ in range(options.repeats + 1 if count == options.concurrent[0] else options.repeats):
            asked = requests(stream, count, shared, options)
            for name, policy in policies.items():
                with engine_seconds() as inside:
                    started = time.perf_counter()
                    sampled = policy.sample(asked)
                    seconds = time.perf_counter() - started
                assert sum(len(c.token_ids) for c in sampled) == count * options.tokens
                best[name] = max(best[name], count * options.tokens / seconds)
                if name == "vllm":
                    outside = min(outside, 1 - inside[0] / seconds)
        kind = f"{SIBLINGS} to a prefix" if shared else "all different"
        ours, theirs = best["transformers"], best["vllm"]
        print(
            f"| {count} | {kind} | {ours:,.0f} | {theirs:,.0f} | {theirs / ours:.2f} | {100 * outside:.1f} % |",
            flush=True,
        )


@contextmanager
def engine_seconds() -> Iterator[list[float]]:
    """Seconds spent in vLLM's own `add_request` and `step`, in the one entry of the list."""
    from vllm.v1.engine.llm_engine import LLMEngine

    total = [0.0]
    originals = {name: getattr(LLMEngine, name) for name in ("add_request", "step")}

    def timed(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                total[0] += time.perf_counter() - started

        return call

    for name, original in originals.items():
        setattr(LLMEngine, name, timed(original))
    try:
        yield total
    finally:
        for name, original in originals.items():
            setattr(LLMEngine, name, original)


def sync_line(policy: Policy, model: PreTrainedModel) -> None:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        policy.sync(dict(model.named_parameters()))
        seconds.append(time.perf_counter() - started)
    print(f"\nA weight sync takes {1000 * min(seconds):.0f} ms (best of {len(seconds)}).\n")


def fork_table(source: str) -> None:
    """What CARL trees on MiniWiki have computed in prefill, by vLLM's own counters."""
    agent = load_agent(source, backend="vllm", trainable=False)
    task = make_task("carl/MiniWiki-v0", split="test", questions=16)
    print("| trees | actions | prompt tokens asked | computed | unique | computed / unique |")
    print("|---|---:|---:|---:|---:|---:|")
    assert isinstance(agent.policy, VllmPolicy)
    for initial, forks in ((1, 16), (8, 16)):
        before = agent.policy.counters()
        trees = collect(
            task, agent.policy, agent.transcript, list(task.questions.values()), EntropyForking(initial, forks),
            seed=0, step=0,
        )  # fmt: skip
        after = agent.policy.counters()
        asked = after["prompt_tokens"] - before["prompt_tokens"]
        computed = asked - (after["cached_tokens"] - before["cached_tokens"])
        unique = sum(map(unique_prefix_tokens, trees))
        actions = sum(tree.actions_generated for tree in trees)
        cells = [f"{n:,}" for n in (actions, asked, computed, unique)]
        print(f"| N0 = {initial}, N = {forks} | {' | '.join(cells)} | {computed / unique:.2f} |", flush=True)
    agent.policy.close()
    print(f"\n(16 questions; a cache block has {vllm_engine.CPU_BLOCK} tokens)")


def unique_prefix_tokens(tree: RolloutTree) -> int:
    """Tokens of all the tree's prefixes, a beginning that several share counted once."""
    prefixes = sorted({tuple(tree.prefix(node.parent)) for node in tree.nodes if node.parent is not None})
    return sum(len(b) - common(a, b) for a, b in itertools.pairwise([(), *prefixes]))


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
