"""The log-probs that training differentiates, against log_softmax of the whole model's logits."""

from __future__ import annotations

import math

import pytest
import torch
from model_toys import KINDS, chain_model, random_model

from carl_gym.agents.logprob_model import LogprobModel

VOCABULARY = 50


def batch(rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_entropy_are_those_of_the_full_logits(kind: str, temperature: float) -> None:
    model, ids = random_model(kind, VOCABULARY), batch()
    rows, columns = torch.tensor([0, 0, 2, 1, 2]), torch.tensor([1, 11, 5, 3, 5])  # any order, repeats allowed
    logprobs, entropy = LogprobModel(model)(ids, rows, columns, temperature)
    full = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.double() / temperature, dim=-1)
    asked = full[rows, columns - 1]
    torch.testing.assert_close(logprobs.double(), asked[torch.arange(5), ids[rows, columns]], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(asked.exp() * asked).sum(-1), atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_full_logits() -> None:
    model, ids = random_model("qwen2-grouped", VOCABULARY), batch()
    rows, columns = torch.tensor([0, 1, 2]), torch.tensor([1, 11, 5])
    logprobs, entropy = LogprobModel(model)(ids, rows, columns, 0.7)
    assert not entropy.requires_grad
    ours = torch.autograd.grad(logprobs.sum(), list(model.parameters()))
    full = torch.log_softmax(model(input_ids=ids, use_cache=False).logits / 0.7, dim=-1)
    reference = torch.autograd.grad(full[rows, columns - 1, ids[rows, columns]].sum(), list(model.parameters()))
    for left, right in zip(ours, reference, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_known_distributions() -> None:
    """A fair coin has ln 2 nats, a loaded one less; a certain successor none; and a uniform head ln V."""
    distributions = {1: {2: 0.5, 3: 0.5}, 2: {1: 0.9, 3: 0.1}, 3: {1: 1.0}}
    model = chain_model(VOCABULARY, distributions)
    ids = torch.tensor([[1, 2, 3, 1, 3]])
    columns = torch.arange(1, 5)
    logprobs, entropy = LogprobModel(model)(ids, torch.zeros_like(columns), columns)
    loaded = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert logprobs.tolist() == pytest.approx([math.log(p) for p in (0.5, 0.1, 1.0, 0.5)], abs=1e-5)
    assert entropy.tolist() == pytest.approx([math.log(2), loaded, 0.0, math.log(2)], abs=1e-5)
    torch.nn.init.zeros_(model.lm_head.weight)
    logprobs, entropy = LogprobModel(model)(ids, torch.zeros_like(columns), columns, temperature=0.3)
    assert logprobs.tolist() == pytest.approx([-math.log(VOCABULARY)] * 4, abs=1e-5)
    assert entropy.tolist() == pytest.approx([math.log(VOCABULARY)] * 4, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_do_not_matter(kind: str) -> None:
    """A row's log-probs are the same alone, beside others, and with any tokens to its right."""
    scorer, ids = LogprobModel(random_model(kind, VOCABULARY)), batch(rows=1, length=8)
    columns = torch.arange(1, 8)
    alone, _ = scorer(ids, torch.zeros_like(columns), columns)
    for filler in (0, VOCABULARY - 1):
        padded = torch.full((3, 20), filler)
        padded[1, :8] = ids[0]
        padded[2] = batch(rows=1, length=20)[0]
        beside, _ = scorer(padded, torch.ones_like(columns), columns)
        torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)


def test_log_probs_are_float32_whatever_the_weights_are() -> None:
    scorer = LogprobModel(random_model("llama", VOCABULARY).to(torch.bfloat16))
    logprobs, entropy = scorer(batch(), torch.tensor([0, 1]), torch.tensor([4, 4]))
    assert logprobs.dtype == entropy.dtype == torch.float32
