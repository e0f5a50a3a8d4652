"""Rows as verl's tensors: nothing is lost on the way there and back, and verl's loss on them is ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rollout_toys import ByteTranscript, PathTask, questions, random_policy

from carl_gym.adapters.verl import rows_of_verl_batch, verl_batch
from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.errors import ConfigError
from carl_gym.rollouts import collect
from carl_gym.training.loss import ppo_clip
from carl_gym.training.segments import Row, rows, segments

PAD = 0


def rows_of_trees(seed: int, name: str = "carl", reduction: str = "action") -> list[Row]:
    """What an algorithm would train on after rolling out a few toy trees."""
    algorithm = get_algorithm(name, loss_reduction=reduction)
    trees = collect(
        PathTask(4, lambda path: path.count("a")),
        random_policy(),
        ByteTranscript(),
        questions(3),
        algorithm.explorer,
        seed=seed,
        step=1,
    )
    advantages, selected = algorithm.credit(trees), algorithm.selection(trees)
    weights = token_weights(trees, selected, algorithm.loss_reduction)
    return [row for parts in zip(trees, advantages, weights, strict=True) for row in rows(segments(*parts))]


def row(*tokens: int, at: tuple[int, ...]) -> Row:
    values = np.arange(1, len(at) + 1, dtype=np.float32)
    return Row(np.array(tokens), np.array(at), -values, values / 2, values / 10)


def assert_equal(ours: list[Row], others: list[Row]) -> None:
    assert len(ours) == len(others)
    for one, two in zip(ours, others, strict=True):
        for name in Row.__slots__:
            a, b = np.asarray(getattr(one, name)), np.asarray(getattr(two, name))
            assert a.dtype == b.dtype and np.array_equal(a, b), name


@given(st.integers(0, 10**6), st.sampled_from(["carl", "grpo", "tree-grpo"]), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_rows_come_back_as_they_were(seed: int, name: str, more: int, longer: int) -> None:
    found = rows_of_trees(seed, name)
    assume(found)  # a toy now and then earns the same on every path
    prompt, response = max(int(r.positions[0]) for r in found), max(len(r.tokens) - int(r.positions[0]) for r in found)
    batch = verl_batch(found, PAD, prompt_length=prompt + more, response_length=response + longer)
    assert_equal(rows_of_verl_batch(batch), found)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    shuffled = rows_of_verl_batch({key: value[order] for key, value in batch.items()})
    assert_equal(shuffled, [found[i] for i in order])


def test_a_batch_by_hand() -> None:
    batch = verl_batch([row(5, 6, 7, 8, 9, at=(2, 4)), row(5, 7, at=(1,))], pad_token_id=99)
    assert batch["prompts"].tolist() == [[5, 6], [99, 5]]
    assert batch["responses"].tolist() == [[7, 8, 9], [7, 99, 99]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [99, 5, 7, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 1, 1]]  # verl's compute_position_id_with_mask
    assert batch["response_mask"].tolist() == [[1, 0, 1], [1, 0, 0]]
    assert batch["old_log_probs"].tolist() == batch["rollout_log_probs"].tolist() == [[-1, 0, -2], [-1, 0, 0]]
    assert batch["advantages"].tolist() == [[0.5, 0, 1], [0.5, 0, 0]]
    assert torch.equal(batch["rollout_is_weights"], 2 * batch["token_weights"])
    assert batch["policy_version"].tolist() == [0, 0]
    whole = ("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask", "policy_version")
    assert {name for name, tensor in batch.items() if tensor.dtype == torch.int64} == set(whole)
    assert all(tensor.dtype == torch.float32 for name, tensor in batch.items() if name not in whole)


def verl_loss(batch: dict[str, torch.Tensor], log_prob: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """`compute_policy_loss_vanilla` and `agg_loss(loss_agg_mode="seq-mean-token-sum")`, with clip_ratio_c = 1e9."""
    advantages, mask = batch["advantages"], batch["response_mask"]
    ratio = torch.exp(torch.clamp(log_prob - batch["old_log_probs"], min=-20.0, max=20.0))
    losses = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - low, 1 + high))
    losses = torch.where(advantages < 0, torch.min(-advantages * 1e9, losses), losses) * batch["rollout_is_weights"]
    some = (mask.sum(-1) > 0).float()
    return (torch.sum(losses * mask, dim=-1) * some).sum() / some.sum()


@pytest.mark.parametrize("reduction", ["action", "token", "trajectory", "constant"])
def test_verls_loss_on_a_batch_is_ours_for_every_reduction(reduction: str) -> None:
    found = rows_of_trees(3, reduction=reduction)
    batch = verl_batch(found, PAD)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch["advantages"].shape, generator=generator) * 0.5
    log_prob = (batch["old_log_probs"] + noise).requires_grad_()
    theirs = verl_loss(batch, log_prob, 0.2, 0.28)
    (gradient,) = torch.autograd.grad(theirs, log_prob)

    mask = batch["response_mask"] > 0
    ours = ppo_clip(
        log_prob[mask], *(batch[name][mask] for name in ("old_log_probs", "advantages", "token_weights")), 0.2, 0.28
    )
    (expected,) = torch.autograd.grad(ours.loss, log_prob)
    assert ours.clipped > 0
    torch.testing.assert_close(theirs, ours.loss)
    torch.testing.assert_close(gradient, expected)
    # In micro-batches of equal size, each a mean over its rows and then divided by their number.
    even = {name: tensor[: len(found) // 2 * 2] for name, tensor in batch.items()}
    halves = [{name: tensor.chunk(2)[i] for name, tensor in even.items()} for i in (0, 1)]
    logs = log_prob[: len(found) // 2 * 2].chunk(2)
    parts = sum(verl_loss(half, log, 0.2, 0.28) / 2 for half, log in zip(halves, logs, strict=True))
    whole = verl_loss(even, log_prob[: len(found) // 2 * 2], 0.2, 0.28)
    torch.testing.assert_close(parts, whole)


def test_misuse_is_told() -> None:
    found = [row(5, 6, 7, 8, at=(2, 3))]
    with pytest.raises(ConfigError, match="no rows"):
        verl_batch([], PAD)
    with pytest.raises(ConfigError, match="prompt has 2 tokens, more than prompt_length=1"):
        verl_batch(found, PAD, prompt_length=1)
    with pytest.raises(ConfigError, match="response_length=1"):
        verl_batch(found, PAD, response_length=1)
    batch = verl_batch(found, PAD)
    with pytest.raises(ConfigError, match="no 'advantages'"):
        rows_of_verl_batch({name: tensor for name, tensor in batch.items() if name != "advantages"})
    with pytest.raises(ConfigError, match=r"advantages has the shape \(1, 4\)"):
        rows_of_verl_batch({**batch, "advantages": torch.zeros(1, 4)})
    with pytest.raises(ConfigError, match="row 0 of the batch has nothing to train"):
        rows_of_verl_batch({**batch, "response_mask": torch.zeros_like(batch["response_mask"])})
    with pytest.raises(ConfigError, match="trains on padding"):
        rows_of_verl_batch({**batch, "attention_mask": torch.tensor([[1, 1, 1, 0]])})
