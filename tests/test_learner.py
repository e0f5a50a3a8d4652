"""The learner against a naive reference that runs every trained action on its own, in plain transformers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from carl_gym.agents.agent import load_agent
from carl_gym.algorithms import Algorithm, get_algorithm, token_weights
from carl_gym.envs.registration import make_task
from carl_gym.errors import CarlGymError
from carl_gym.rollouts import RolloutTree, collect
from carl_gym.training.learner import Learner
from carl_gym.training.packing import micro_batches
from carl_gym.training.segments import Row, rows, segments

NAMES = ("carl", "carl-lite", "grpo")
SETTINGS = {"carl": {"initial": 2, "forks": 5}, "carl-lite": {"forks": 6}, "grpo": {"rollouts": 4}}
UNCLIPPED = 1e9


@dataclasses.dataclass(frozen=True)
class Batch:
    """Trees that a model sampled, and what an algorithm decided about them."""

    model: PreTrainedModel
    algorithm: Algorithm
    temperature: float
    trees: list[RolloutTree]
    advantages: list[np.ndarray]
    weights: list[np.ndarray]

    def rows(self) -> list[Row]:
        return [
            row
            for parts in zip(self.trees, self.advantages, self.weights, strict=True)
            for row in rows(segments(*parts))
        ]

    def learner(self, **changes: object) -> Learner:
        """A learner on a copy of the model."""
        given = {"learning_rate": 1e-3, "temperature": self.temperature, "max_grad_norm": UNCLIPPED, **changes}
        return Learner(copy.deepcopy(self.model), **given)


def collected(folder: Path, name: str, temperature: float = 1.0) -> Batch:
    agent = load_agent(str(folder), device="cpu")
    task = make_task("carl/MiniWiki-v0", questions=4)
    algorithm = get_algorithm(name, **SETTINGS[name])
    questions = list(task.questions.values())
    sampled = collect(
        task, agent.policy, agent.transcript, questions, algorithm.explorer, seed=1, step=1, temperature=temperature
    )
    selected = algorithm.selection(sampled)
    weights = token_weights(sampled, selected, algorithm.loss_reduction)
    return Batch(agent.model, algorithm, temperature, sampled, algorithm.credit(sampled), weights)


@pytest.fixture(scope="module", params=NAMES)
def batch(request: pytest.FixtureRequest, tiny_agent_folder: Path) -> Batch:
    return collected(tiny_agent_folder, request.param)


@pytest.fixture(scope="module")
def carl_batch(tiny_agent_folder: Path) -> Batch:
    return collected(tiny_agent_folder, "carl")


def naive(batch: Batch, model: PreTrainedModel) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient, a forward pass per selected action, zero advantages included."""
    model = copy.deepcopy(model)
    low, high = batch.algorithm.clip_low, batch.algorithm.clip_high
    total = 0.0
    for tree, advantages, weights in zip(batch.trees, batch.advantages, batch.weights, strict=True):
        for node in tree.nodes:
            if node.parent is None or weights[node.id] == 0:
                continue
            prefix, action = tree.prefix(node.parent), node.action.token_ids
            logits = model(torch.tensor([[*prefix, *action]])).logits[0, len(prefix) - 1 : -1] / batch.temperature
            logprobs = torch.log_softmax(logits, -1)[range(len(action)), action]
            ratio = torch.exp(logprobs - torch.tensor(node.action.logprobs))
            advantage = advantages[node.id]
            gain = torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)
            loss = -weights[node.id] * gain.sum()
            loss.backward()
            total += loss.item()
    return total, [parameter.grad for parameter in model.parameters()]


def clipped_share(batch: Batch) -> float:
    """Share, by weight, of the trained tokens whose gradient the clip stops; where the advantage is 0 there is none."""
    stopped = total = 0.0
    for row in batch.rows():
        with torch.no_grad():
            logits = batch.model(torch.from_numpy(row.tokens)[None]).logits[0, row.positions - 1]
        logprobs = torch.log_softmax(logits / batch.temperature, -1)[range(len(logits)), row.tokens[row.positions]]
        ratio = np.exp(logprobs.numpy() - row.logprobs)
        low, high = batch.algorithm.clip_low, batch.algorithm.clip_high
        clipped = ((row.advantages > 0) & (ratio > 1 + high)) | ((row.advantages < 0) & (ratio < 1 - low))
        stopped += float(row.weights[clipped].sum())
        total += float(row.weights.sum())
    return stopped / total


def gradient(learner: Learner) -> list[torch.Tensor]:
    return [parameter.grad for parameter in learner.model.parameters()]


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def distance(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    """Relative to the norm of the second."""
    return norm([a - b for a, b in zip(one, two, strict=True)]) / norm(two)


def weights_of(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


def disturbed(batch: Batch, scale: float) -> Batch:
    """The same trees, for a model whose weights have moved since."""
    model = copy.deepcopy(batch.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn_like(parameter)
    return dataclasses.replace(batch, model=model)


# -- the gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 1500, 10**6])
def test_loss_and_gradient_equal_the_naive_reference_however_rows_are_batched(batch, batch_tokens):
    learner = batch.learner(batch_tokens=batch_tokens)
    metrics = learner.update(batch.rows(), batch.algorithm.clip_low, batch.algorithm.clip_high)
    loss, expected = naive(batch, batch.model)
    assert norm(expected) > 1e-3  # there is something to learn
    assert metrics.loss == pytest.approx(loss, abs=1e-6)
    assert metrics.grad_norm == pytest.approx(norm(expected), rel=1e-5)
    assert distance(gradient(learner), expected) < 1e-5


def test_they_are_equal_off_policy_too_where_clips_stop_part_of_the_gradient(batch):
    moved = disturbed(batch, 0.1)
    learner = moved.learner()
    metrics = learner.update(moved.rows(), moved.algorithm.clip_low, moved.algorithm.clip_high)
    loss, expected = naive(moved, moved.model)
    assert 0.05 < metrics.clip_fraction < 0.95
    assert metrics.clip_fraction == pytest.approx(clipped_share(moved), abs=1e-4)
    assert metrics.gap > 0.1
    assert metrics.loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert distance(gradient(learner), expected) < 1e-5


def test_the_temperature_of_sampling_is_that_of_the_ratio(tiny_agent_folder):
    batch = collected(tiny_agent_folder, "carl", temperature=0.7)
    learner = batch.learner()
    metrics = learner.update(batch.rows(), batch.algorithm.clip_low, batch.algorithm.clip_high)
    assert metrics.gap < 1e-3
    assert distance(gradient(learner), naive(batch, batch.model)[1]) < 1e-5


def test_actions_of_zero_advantage_count_in_the_mean_but_need_no_row(carl_batch):
    """Half of the advantages set to 0: the reference runs these actions, the rows leave them out."""
    rng = np.random.default_rng(0)
    halved = [advantages * (rng.random(len(advantages)) < 0.5) for advantages in carl_batch.advantages]
    batch = dataclasses.replace(carl_batch, advantages=halved)
    trained = sum(len(row.positions) for row in batch.rows())
    assert 0 < trained < sum(len(row.positions) for row in carl_batch.rows())
    learner = batch.learner()
    learner.update(batch.rows(), 0.2, 0.2)
    assert distance(gradient(learner), naive(batch, batch.model)[1]) < 1e-5


def test_before_the_first_step_the_gap_to_the_sampler_is_numerical_noise(batch):
    metrics = batch.learner().update(batch.rows(), 0.2, 0.2)
    assert metrics.gap < 1e-3
    assert metrics.clip_fraction == 0


# -- the step --------------------------------------------------------------------------------------


def test_a_step_raises_the_objective_and_leaves_the_samplers_log_probs_behind(carl_batch):
    learner = carl_batch.learner(learning_rate=1e-4)
    first, second = (learner.update(carl_batch.rows(), 0.2, 0.2) for _ in range(2))
    assert second.loss < first.loss
    assert second.gap > first.gap


def test_gradients_are_scaled_down_to_the_largest_norm_and_the_metric_is_the_norm_before(carl_batch):
    free, bounded = carl_batch.learner(), carl_batch.learner(max_grad_norm=1e-3)
    metrics = [learner.update(carl_batch.rows(), 0.2, 0.2) for learner in (free, bounded)]
    assert metrics[0].grad_norm == metrics[1].grad_norm > 1e-3
    assert norm(gradient(bounded)) == pytest.approx(1e-3, rel=1e-2)


def test_the_same_batch_gives_the_same_weights_bit_for_bit(carl_batch):
    learners = [carl_batch.learner() for _ in range(2)]
    for learner in learners:
        learner.update(carl_batch.rows(), 0.2, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(*map(weights_of, learners), strict=True))


def test_metrics_count_tokens_and_give_the_mean_entropy(carl_batch):
    found = carl_batch.rows()
    metrics = carl_batch.learner(batch_tokens=1, packing="rows").update(found, 0.2, 0.2)
    assert metrics.tokens == sum(len(row.tokens) for row in found)  # each row alone: no padding
    entropies = []
    with torch.no_grad():
        for row in found:
            logprobs = carl_batch.model(torch.from_numpy(row.tokens)[None]).logits[0, row.positions - 1].log_softmax(-1)
            entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    assert metrics.entropy == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)


def test_bfloat16_computes_nearly_the_same_and_keeps_weights_in_float32(carl_batch):
    exact, rough = carl_batch.learner(), carl_batch.learner(autocast=torch.bfloat16)
    for learner in (exact, rough):
        learner.update(carl_batch.rows(), 0.2, 0.2)
    assert all(parameter.dtype == torch.float32 for parameter in rough.model.parameters())
    assert 1e-5 < distance(gradient(rough), gradient(exact)) < 0.2


# -- what cannot be learned from -------------------------------------------------------------------


def test_nothing_to_train_is_no_step(carl_batch):
    learner = carl_batch.learner()
    before = weights_of(learner)
    assert learner.update([], 0.2, 0.2) is None
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(learner), strict=True))


@pytest.mark.parametrize("field", ["advantages", "logprobs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_and_leaves_weights_and_optimiser_alone(carl_batch, field, value):
    if (field, value) == ("logprobs", float("inf")):
        value = float("-inf")  # a ratio of infinity; +inf would only be a ratio of 0
    good = carl_batch.rows()
    row = good[-1]
    spoiled = getattr(row, field).copy()
    spoiled[0] = value
    learner, clean = carl_batch.learner(), carl_batch.learner()
    before = weights_of(learner)
    with pytest.raises(CarlGymError, match="not finite; no step was taken"):
        learner.update([*good[:-1], dataclasses.replace(row, **{field: spoiled})], 0.2, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(learner), strict=True))
    for one in (learner, clean):
        one.update(good, 0.2, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(learner), weights_of(clean), strict=True))


def test_broken_weights_are_an_error_too(carl_batch):
    learner = carl_batch.learner()
    with torch.no_grad():
        next(iter(learner.model.parameters()))[0, 0] = float("nan")
    with pytest.raises(CarlGymError, match="not finite"):
        learner.update(carl_batch.rows(), 0.2, 0.2)


# -- micro-batches ---------------------------------------------------------------------------------


def blank(length: int) -> Row:
    return Row(np.zeros(length, dtype=np.int64), *(np.zeros(0) for _ in range(4)))


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget):
    given_rows = [blank(length) for length in lengths]
    parts = micro_batches(given_rows, budget)
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, given_rows))
    for part in parts:
        assert part
        assert len(part) == 1 or len(part) * max(len(row.tokens) for row in part) <= budget


def test_micro_batches_group_rows_of_similar_length():
    parts = micro_batches([blank(length) for length in (3, 90, 5, 100, 4)], 200)
    assert [[len(row.tokens) for row in part] for part in parts] == [[100, 90], [5, 4, 3]]
