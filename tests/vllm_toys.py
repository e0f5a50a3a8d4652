"""Models on disk that vLLM can serve: its attention kernels want heads of 32 at least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from model_toys import plain_logprobs, tag_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from carl_gym.agents.policy import Completion, SampleRequest

TAGS = tag_tokenizer()
CONTEXT = 512
CLASSES: Mapping[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
CARD = """
id = "toy"
description = "for tests"
model = "."
prompt = "Question: {observation}\\n"
observation = "\\n{observation}\\n"
max_tokens = 24
context = 512
"""


def save_model(folder: Path, kind: str = "llama", *, tied: bool = False, scale: float = 0.1) -> PreTrainedModel:
    """Make a model with weights so large that all of its context matters; save it as an agent, and return it."""
    torch.manual_seed(0)
    config, model_class = CLASSES[kind]
    model = model_class(
        config(
            vocab_size=len(TAGS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=CONTEXT, initializer_range=scale,
            tie_word_embeddings=tied, bos_token_id=None, eos_token_id=TAGS.eos_token_id, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    TAGS.save_pretrained(folder)
    (folder / "agent.toml").write_text(CARD)
    return model


def requests(count: int, *, temperature: float, length: int = 60, max_tokens: int = 12) -> list[SampleRequest]:
    """Requests whose prefixes differ in length; every fourth has the same beginning.

    They end in text: of bytes that are none vLLM waits for the rest, and then takes a stop string of the prompt for one
    of the action.
    """
    generator = torch.Generator().manual_seed(1)
    prefixes = [torch.randint(0, len(TAGS), (length + count,), generator=generator).tolist() for _ in range(4)]
    return [
        SampleRequest(
            [*prefixes[i % 4][: length + i], *TAGS.encode("Question")],
            seed=i,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        for i in range(count)
    ]


def gap(model: PreTrainedModel, asked: Sequence[SampleRequest], sampled: Sequence[Completion]) -> float:
    """Largest |log-prob reported - log-prob of one plain forward pass of the whole sequence|, in nats."""
    gaps = []
    for request, completion in zip(asked, sampled, strict=True):
        true = plain_logprobs(model, request.prefix, completion.token_ids, request.temperature or 1.0)
        gaps.append(float((true - torch.tensor(completion.logprobs)).abs().max()))
    return max(gaps)


def optimiser_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Some step that moves every weight."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, len(TAGS), (4, 64), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
