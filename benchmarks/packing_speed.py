"""The update on real rollout trees: packed, and by rows of three kinds, as Markdown tables.

    python benchmarks/packing_speed.py [--data-dir data/hotpotqa] [--threads 1]

What is compared gives the same gradient (tests/test_packing.py):

    packed          every token that the trained actions need goes through the model once
    pruned rows     one row per trained action that has no trained action below it, ending there
    leaf rows       one whole row per leaf, as trainers without trees have it
    action rows     one row per trained action

MiniWiki's trees are the tiny agent's own. HotpotQA's are grown on the real environment with its long passages, by a
policy that draws from sensible actions, since no small model plays it; a random Llama trains on them, whose tokenizer
is learned from the passages. Without `--data-dir` they use the small set that comes with the package. Every way runs
in a process of its own and takes turns with the others; the best time counts. Memory is the peak above what the
process had before.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import tyro
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from carl_gym.agents.agent import load_agent
from carl_gym.agents.policy import Policy, Transcript
from carl_gym.agents.scripted import ScriptedPolicy
from carl_gym.agents.transcript import InlineTranscript
from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.envs.registration import make_task
from carl_gym.envs.state import EnvState
from carl_gym.envs.task import SearchTask
from carl_gym.rollouts import RolloutTree, collect
from carl_gym.training.learner import Learner
from carl_gym.training.packing import packs, padded, unique_tokens
from carl_gym.training.segments import Row, Segment, rows, segments
from carl_gym.training.warm_start import build_tokenizer

_work: tuple[Learner, list[Row], float]  # of a process that measures one way
WAYS = ("packed", "pruned rows", "leaf rows", "action rows")


@dataclass(frozen=True)
class Options:
    """Measure seconds and memory of the update, and tokens through the model."""

    data_dir: str | None = None
    """Folder with HotpotQA's questions.jsonl and corpus.jsonl."""
    questions: int = 16
    """MiniWiki questions, and so trees."""
    long_questions: int = 4
    """HotpotQA questions."""
    depths: tuple[int, ...] = (4, 8, 16)
    """Turns of an episode, for the curve over depth."""
    forks: tuple[int, ...] = (4, 16, 64)
    """N, for the curve over branching."""
    hidden: int = 128
    """Width of HotpotQA's model."""
    layers: int = 4
    """Its layers."""
    threads: int = 1
    """CPU threads of torch."""
    repeats: int = 2
    """Measurements of each way, after a warm-up; the best counts."""
    batch_tokens: int = 8192
    """Most tokens of a micro-batch."""
    parts: tuple[str, ...] = ("trees", "depth", "branching")
    """Which tables."""


def main(options: Options) -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if "trees" in options.parts:
        where = "given data" if options.data_dir else "the package's small set"
        print(f"{options.questions} questions of MiniWiki, {options.long_questions} of HotpotQA ({where}), N = 16.")
        for title, model, trees in (*miniwiki(options), *hotpot(options, (1, 8), 16, 10)):
            print(f"\n### {title}\n")
            compare(model, trees, options)
    if "depth" in options.parts:
        curve("depth", [(turns, 16) for turns in options.depths], options)
    if "branching" in options.parts:
        curve("branching", [(10, forks) for forks in options.forks], options)


def compare(model: PreTrainedModel, trees: list[list[Segment]], options: Options) -> None:
    """One table: every way on these trees."""
    head("way", "rows", "tokens through the model", "/ unique needed", "s", "times packed", "memory, MiB")
    measured = measure(model, trees, options, WAYS)
    unique = unique_tokens(by_way("packed", trees))
    for way, (seconds, memory) in measured.items():
        batch = by_way(way, trees)
        batches = (packs if way == "packed" else padded)(batch, options.batch_tokens)
        through = sum(one.tokens.size for one in batches)  # as the learner counts them, padding included
        times = seconds / measured["packed"][0]
        line(
            way,
            len(batch),
            f"{through:,}",
            f"{through / unique:.2f}",
            f"{seconds:.2f}",
            f"{times:.1f}",
            f"{memory:,.0f}",
        )


def curve(over: str, shapes: Sequence[tuple[int, int]], options: Options) -> None:
    """One table: CARL-Lite on HotpotQA by (turns, N)."""
    print(f"\n### HotpotQA, CARL-Lite (N0 = 1), over {over}\n")
    head("turns", "N", "unique tokens", "in leaf rows", "packed, s", "leaf rows, s", "leaf / packed", "pruned / packed")
    for turns, forks in shapes:
        ((_, model, trees),) = hotpot(options, (1,), forks, turns)
        if not by_way("packed", trees):
            line(turns, forks, "0: no action has an advantage")
            continue
        measured = measure(model, trees, options, WAYS[:3])
        packed, pruned, leaf = (measured[way][0] for way in WAYS[:3])
        unique, in_leaves = unique_tokens(by_way("packed", trees)), tokens(by_way("leaf rows", trees))
        seconds = (f"{packed:.2f}", f"{leaf:.2f}", f"{leaf / packed:.1f}", f"{pruned / packed:.1f}")
        line(turns, forks, f"{unique:,}", f"{in_leaves / unique:.1f} x", *seconds)


def head(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n|---|" + "---:|" * (len(columns) - 1))


def line(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def tokens(batch: Sequence[Row]) -> int:
    return sum(len(row.tokens) for row in batch)


def by_way(way: str, trees: list[list[Segment]]) -> list[Row]:
    """The rows that a way of training takes; each trained action is unmasked in exactly one."""
    if way in ("packed", "pruned rows"):
        return [row for tree in trees for row in rows(tree)]
    if way == "action rows":
        return [row for tree in trees for end in trained(tree) for row in rows(only(tree, {end}))]
    found = []
    for tree in trees:
        taken: set[int] = set()
        for leaf in {s.node_id for s in tree} - {s.parent for s in tree}:
            path = [leaf]
            while (parent := tree[path[-1]].parent) is not None:
                path.append(parent)
            fresh = (set(path) & trained(tree)) - taken
            taken |= fresh
            if fresh:  # as favourable as can be: a leaf whose actions all trained in other rows is left out
                (row,) = rows(only(tree, fresh))
                whole = np.concatenate([tree[node].tokens for node in reversed(path)])
                found.append(Row(whole, row.positions, row.logprobs, row.advantages, row.weights))
    return found


def trained(tree: list[Segment]) -> set[int]:
    return {segment.node_id for segment in tree if segment.weight > 0 and segment.advantage != 0}


def only(tree: list[Segment], nodes: set[int]) -> list[Segment]:
    """The tree in which these nodes alone train."""
    return [
        Segment(
            s.node_id, s.parent, s.policy_version, s.tokens, s.action_length, s.logprobs, s.advantage,
            s.weight if s.node_id in nodes else 0.0,
        )
        for s in tree
    ]  # fmt: skip


def measure(
    model: PreTrainedModel, trees: list[list[Segment]], options: Options, ways: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Best seconds and peak MiB of one update, by way."""
    with tempfile.TemporaryDirectory(prefix="packing-speed-") as folder:
        model.save_pretrained(folder)
        Path(folder, "trees").write_bytes(pickle.dumps(trees))
        context = multiprocessing.get_context("spawn")
        workers = {way: ProcessPoolExecutor(1, context, prepare, (folder, way, options)) for way in ways}
        seconds: dict[str, float] = dict.fromkeys(ways, float("inf"))
        peaks: dict[str, float] = {}
        for repeat, way in itertools.product(range(options.repeats + 1), ways):
            taken, peaks[way] = workers[way].submit(update).result()
            if repeat:
                seconds[way] = min(seconds[way], taken)
        for worker in workers.values():
            worker.shutdown()
    return {way: (seconds[way], peaks[way]) for way in ways}


def prepare(folder: str, way: str, options: Options) -> None:
    """In the process of one way: the learner and its rows."""
    global _work
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    # A rate of 0: the weights, and with them the work, stay the same.
    learner = Learner(
        model, learning_rate=0.0, packing="tree" if way == "packed" else "rows", batch_tokens=options.batch_tokens
    )
    batch = by_way(way, pickle.loads(Path(folder, "trees").read_bytes()))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    _work = learner, batch, memory("VmRSS")


def update() -> tuple[float, float]:
    """Seconds, and the peak of memory so far above what there was before the first update, in MiB."""
    learner, batch, before = _work
    started = time.perf_counter()
    learner.update(batch, 0.2, 0.2)
    return time.perf_counter() - started, memory("VmHWM") - before


def memory(kind: str) -> float:
    """MiB of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def miniwiki(options: Options) -> list[tuple[str, PreTrainedModel, list[list[Segment]]]]:
    """The tiny agent's trees on MiniWiki, with N0 = 1 and 8, and GRPO's group."""
    agent, task = load_agent("tiny", device="cpu"), make_task("carl/MiniWiki-v0", questions=600)
    assert agent.model is not None
    found = []
    for title, name in (("CARL-Lite (N0 = 1)", "carl-lite"), ("CARL (N0 = 8)", "carl"), ("GRPO", "grpo")):
        trees = grow(task, agent.policy, agent.transcript, name, options.questions, {})
        found.append((f"MiniWiki, {title}, tiny agent", agent.model, trees))
    return found


def hotpot(
    options: Options, initials: Sequence[int], forks: int, turns: int
) -> list[tuple[str, PreTrainedModel, list[list[Segment]]]]:
    """Trees on HotpotQA, and a random model for them."""
    given = {"data_dir": options.data_dir} if options.data_dir else {}
    task = make_task("carl/HotpotQA-v0", turns=turns, **given)
    tokenizer = passage_tokenizer(task)
    transcript = InlineTranscript(tokenizer, "Question: {observation}\n", "\n{observation}\n", 400, 1 << 15)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers, num_attention_heads=options.hidden // 32,
            num_key_value_heads=options.hidden // 64, max_position_embeddings=1 << 15, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    policy = SensiblePolicy(task, tokenizer)
    found = []
    for initial in initials:
        shape = {"initial": initial, "forks": forks}
        trees = grow(task, policy, transcript, "carl", options.long_questions, shape)
        size = sum(p.numel() for p in model.parameters())
        kind = "CARL-Lite (N0 = 1)" if initial == 1 else f"CARL (N0 = {initial})"
        found.append((f"HotpotQA, {kind}, random Llama of {size:,} parameters", model, trees))
    return found


class SensiblePolicy(ScriptedPolicy):
    """Searches for titles and words of the question, opens what it saw, and answers at last, rightly or not."""

    def __init__(self, task: SearchTask, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(task)
        self.tokenizer = tokenizer

    def actions(self, state: EnvState) -> list[str]:
        question, turns = self._question(state), self.task.card.turns
        if len(state.turns) >= turns - 1:
            return [f"<answer>{question.answers[0]}</answer>", "<answer>nobody knows</answer>"]
        rng = random.Random(f"{question.id} {len(state.turns)}")
        words = question.text.split()
        queries = [question.text, " ".join(rng.sample(words, min(4, len(words)))), *question.supporting_titles]
        seen = self._seen(state)
        pages = [rng.choice(seen).title] if seen else []
        found = [*(f"<search>{query}</search>" for query in queries), *(f"<access>{title}</access>" for title in pages)]
        return list(dict.fromkeys(found))

    def _sample(self, request):  # type: ignore[no-untyped-def]
        drawn = super()._sample(request)
        ids = tuple(self.tokenizer.encode(drawn.text, add_special_tokens=False))
        # Not certain anywhere: entropies differ from state to state, as a model's do.
        surprise = random.Random(request.seed).expovariate(2.0)
        return type(drawn)(ids, (-surprise,) * len(ids), drawn.text, drawn.finish_reason)


def passage_tokenizer(task: SearchTask) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 8,000 merges, learned from the corpus."""
    texts = [f"{p.title} {p.text}" for p in itertools.islice(iter(task.corpus), 2000)]
    return build_tokenizer([], texts, merges=8000)


def grow(
    task: SearchTask, policy: Policy, transcript: Transcript, name: str, questions: int, shape: dict[str, int]
) -> list[list[Segment]]:
    """Credited trees as segments."""
    algorithm = get_algorithm(name, **shape)
    chosen = list(task.questions.values())[:questions]
    trees: list[RolloutTree] = collect(task, policy, transcript, chosen, algorithm.explorer, seed=0, step=0)
    weights = token_weights(trees, algorithm.selection(trees), algorithm.loss_reduction)
    return [segments(*parts) for parts in zip(trees, algorithm.credit(trees), weights, strict=True)]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
