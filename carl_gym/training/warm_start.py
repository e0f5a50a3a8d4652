"""The tiny agent's origin: a tokenizer and a small transformer, trained to imitate noisy expert traces on MiniWiki.

training worlds -> noisy expert -> traces -> byte-level BPE + Llama model -> agents/tiny/
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from carl_gym.agents.transcript import InlineTranscript
from carl_gym.envs.miniwiki import generate
from carl_gym.envs.protocol import TAGS
from carl_gym.envs.registration import make_task
from carl_gym.training.expert import Noise, Trace, imitate

EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class WarmStartConfig:
    """Sizes and settings of the warm start.

    Attributes:
        worlds: training worlds that traces come from.
        traces_per_world: expert episodes in each.
        epochs: passes over the traces.
        batch_tokens: tokens per optimiser step.
        matrix_learning_rate: Muon's peak, for the hidden matrices, after 3 % linear warm-up; cosine to 5 % of it.
        learning_rate: AdamW's peak, for embeddings and norms; same shape.
        observation_weight: weight of an observation token's loss against an action token's 1.
        hidden, layers, heads, intermediate: the model; head_dim is hidden / heads (32 or 64 for vLLM on CPU).
        merges: BPE merges for text outside MiniWiki.
        hops: hops of the questions; a number that stands twice is twice as likely.
        seed: of worlds, traces, initial weights and order.
        noise: the expert's errors.
    """

    worlds: int = 200
    traces_per_world: int = 300
    epochs: int = 1
    batch_tokens: int = 4096
    matrix_learning_rate: float = 0.02
    learning_rate: float = 3e-3
    observation_weight: float = 0.1
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    intermediate: int = 320
    merges: int = 400
    hops: tuple[int, ...] = (2, 2, 3, 3, 4)
    seed: int = 0
    noise: Noise = field(default_factory=Noise)


def make_traces(config: WarmStartConfig) -> Iterator[list[Trace]]:
    """Expert traces, a list per training world. Worlds count down from -1: reinforcement uses 0 and up."""
    for world in range(-1, -1 - config.worlds, -1):
        rng = random.Random(f"traces {config.seed} {world}")
        count, hops = config.traces_per_world, config.hops
        facts = generate(world, split="train", questions=count, hops=hops)
        task = make_task("carl/MiniWiki-v0", world=world, split="train", questions=count, hops=hops)
        yield [imitate(task, facts, question, config.noise, rng) for question in task.questions.values()]


def build_tokenizer(texts: Iterable[str], prose: Iterable[str], merges: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that can encode any text, with every common word of `texts` as one token.

    Words of the embedded world enter the vocabulary whole (`ignore_merges`, as in Llama 3), so that names are single
    tokens without the intermediate merges; `merges` are learned on `prose` for everything else.
    """
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), level])
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(prose, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = dict(learned["vocab"])
    tags = re.compile("|".join(map(re.escape, TAGS)))
    counts: dict[str, int] = {}
    for text in texts:
        for piece, _ in split.pre_tokenize_str(tags.sub("\n", text)):
            counts[piece] = counts.get(piece, 0) + 1
    for piece in sorted(piece for piece, count in counts.items() if count >= 20 and piece not in vocab):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in learned["merges"]], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD])
    tokenizer.add_tokens(list(TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def build_model(config: WarmStartConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised small Llama model for the tokenizer."""
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 16) * 16,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(shape)


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised trace: ids and the loss weight of each."""

    ids: np.ndarray
    weights: np.ndarray


def encode(traces: Sequence[Trace], transcript: InlineTranscript, observation_weight: float) -> list[Example]:
    """Token ids as the agent will see them, action tokens weighted 1."""
    examples = []
    for trace in traces:
        ids: list[int] = []
        weights: list[float] = []
        for turn, (observation, action) in enumerate(zip(trace.observations, trace.actions, strict=True)):
            seen = transcript.observation(observation, ()) if turn else transcript.prompt(observation)
            done = transcript.tokenizer.encode(action, add_special_tokens=False)
            ids += [*seen, *done]
            weights += [observation_weight] * len(seen) + [1.0] * len(done)
        examples.append(Example(np.array(ids), np.array(weights, dtype=np.float32)))
    return examples


def train(
    model: LlamaForCausalLM,
    examples: Sequence[Example],
    config: WarmStartConfig,
    report: Callable[[int, int, float, float], None],
) -> None:
    """Imitate the examples; `report(step, steps, loss per action token, tokens per second)` is called now and then."""
    rng = random.Random(config.seed)
    batches = [batch for _ in range(config.epochs) for batch in _batches(examples, config.batch_tokens, rng)]
    # Muon takes the hidden matrices, as it is meant to; embeddings and norms stay with AdamW.
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=config.matrix_learning_rate, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def shape(step: int) -> float:
        progress = step / len(batches)
        return min(1.0, (step + 1) / (0.03 * len(batches) + 1)) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, shape) for optimizer in optimizers]
    model.train()
    losses, tokens, started = [], 0, time.perf_counter()
    for step, batch in enumerate(batches):
        width = max(len(example.ids) for example in batch)
        ids, weights = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width)
        for row, example in enumerate(batch):
            ids[row, : len(example.ids)] = torch.from_numpy(example.ids)
            weights[row, : len(example.ids)] = torch.from_numpy(example.weights)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        chosen = weights[:, 1:] > 0
        logits = model.lm_head(hidden[chosen])
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][chosen], reduction="none")
        weight = weights[:, 1:][chosen]
        model.zero_grad()
        ((loss * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(float(loss.detach()[weight == 1].mean()))
        tokens += sum(len(example.ids) for example in batch)
        if step % 50 == 49 or step + 1 == len(batches):
            report(step + 1, len(batches), sum(losses) / len(losses), tokens / (time.perf_counter() - started))
            losses.clear()
    model.eval()


def _batches(examples: Sequence[Example], batch_tokens: int, rng: random.Random) -> list[list[Example]]:
    """Batches of similar lengths in random order; short examples are taken from a shuffled stream."""
    shuffled = rng.sample(list(examples), len(examples))
    batches: list[list[Example]] = []
    for pool in itertools.batched(shuffled, 512) if hasattr(itertools, "batched") else _chunks(shuffled, 512):
        batch: list[Example] = []
        for example in sorted(pool, key=lambda e: len(e.ids)):
            if batch and (len(batch) + 1) * len(example.ids) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(example)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def _chunks(items: list[Example], size: int) -> list[list[Example]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def general_prose() -> list[str]:
    """Prose that the package carries, for merges outside MiniWiki's vocabulary."""
    folder = resources.files("carl_gym") / "data" / "mini_hotpotqa"
    return [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
