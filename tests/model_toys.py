"""Small models and tokenizers whose behaviour is known, and log-probs by the plainest means there is."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from carl_gym.training.warm_start import build_tokenizer

KINDS = ("llama", "llama-grouped", "qwen2", "qwen2-grouped", "qwen3-wide", "gpt2")


def tag_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, `<|endoftext|>`, `<|pad|>` and one token per tag."""
    return build_tokenizer([], ["a"], merges=0)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: no token for a tag, so `</search>` is nine tokens, one for each byte."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)} | {"▁": 258, ">.": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def random_model(kind: str, vocabulary: int, *, seed: int = 0, context: int = 512) -> PreTrainedModel:
    """A small model of one of `KINDS`, with weights so large that every token of its context matters."""
    torch.manual_seed(seed)
    heads = 2 if kind.endswith(("grouped", "wide")) else 4
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind.startswith("llama"):
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if kind.startswith("qwen2"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at initialisation, and zeros hide mistakes
                torch.nn.init.normal_(parameter, std=0.5)
        return model.eval()
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context, "initializer_range": 0.25}
        tokens = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
        return GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)).eval()  # 4 heads of 16 are wider than hidden_size


def chain_model(
    vocabulary: int, following: Mapping[int, Mapping[int, float]], *, context: int = 512
) -> LlamaForCausalLM:
    """A real Llama that is a Markov chain: after token t, token u has probability `following[t][u]`."""
    hidden = math.ceil(vocabulary / 8) * 8
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=context, rms_norm_eps=1e-12, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, hidden))  # a token is a direction, ...
        model.model.layers[0].self_attn.o_proj.weight.zero_()  # ... which neither attention nor MLP touches
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.fill_(-100.0)
        for token, distribution in following.items():
            for successor, probability in distribution.items():
                # The last norm makes a one-hot vector sqrt(hidden) long.
                model.lm_head.weight[successor, token] = math.log(probability) / math.sqrt(hidden)
    return model


def spell(ids: Sequence[int]) -> dict[int, dict[int, float]]:
    """The chain that writes `ids` one after the other, without choice."""
    return {a: {b: 1.0} for a, b in itertools.pairwise(ids)}


@torch.no_grad()
def plain_logprobs(
    model: PreTrainedModel, prefix: Sequence[int], tokens: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of `tokens` after `prefix`: one sequence, one forward pass of the whole model, no cache, no mask."""
    logits = model(input_ids=torch.tensor([[*prefix, *tokens]]), use_cache=False).logits[0].double()
    after = torch.log_softmax(logits[len(prefix) - 1 : -1] / temperature, dim=-1)
    return after[torch.arange(len(tokens)), torch.tensor(tokens)]


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How many standard deviations the statistic lies above its mean; classes that expect < 5 are pooled."""
    assert set(counts) <= set(expected), "what cannot happen never does"
    total = sum(counts.values())
    rare = [outcome for outcome, probability in expected.items() if probability * total < 5]
    classes = [[outcome] for outcome in expected if outcome not in rare] + ([rare] if rare else [])
    statistic = 0.0
    for outcomes in classes:
        mean = total * sum(expected[outcome] for outcome in outcomes)
        statistic += (sum(counts[outcome] for outcome in outcomes) - mean) ** 2 / mean
    freedom = len(classes) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)
