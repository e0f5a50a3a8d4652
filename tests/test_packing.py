"""Packed trees against the plainest reading of their rows: same tokens, same attention, same gradients."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import KINDS, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from carl_gym.agents import logprob_model, tree_attention
from carl_gym.errors import CarlGymError, PolicyError
from carl_gym.training import packing
from carl_gym.training.learner import Learner
from carl_gym.training.packing import Batch, packs, unique_tokens
from carl_gym.training.segments import Row

VOCABULARY = 40


def random_rows(seed: int, *, rows: int = 12, length: int = 40, alphabet: int = VOCABULARY) -> list[Row]:
    """Rows that begin like an earlier one up to a random place, as those of rollout trees do, in any order."""
    rng = np.random.default_rng(seed)
    found: list[Row] = []
    for number in range(rows):
        size = int(rng.integers(2, length + 1))
        tokens = rng.integers(alphabet, size=size)
        if found and rng.random() < 0.85:
            trunk = found[int(rng.integers(len(found)))].tokens
            shared = int(rng.integers(1, min(len(trunk), size) + 1))
            tokens[:shared] = trunk[:shared]
        count = int(rng.integers(1, size))
        positions = np.sort(rng.choice(np.arange(1, size), size=count, replace=False))
        positions[-1] = size - 1  # rows end where their last trained token does
        positions = np.unique(positions)
        found.append(
            Row(
                tokens=tokens,
                positions=positions,
                logprobs=rng.normal(-3, 0.3, len(positions)).astype(np.float32),
                advantages=rng.normal(0, 1, len(positions)).astype(np.float32),
                weights=np.full(len(positions), 1e-2 * (1 + number), dtype=np.float32),
            )
        )
    rng.shuffle(found)  # type: ignore[arg-type]
    return found


def prefixes(batch: Batch) -> list[tuple[int, ...]]:
    """What each trained token of a pack comes after, by who sees whom."""
    assert batch.tree is not None
    size = batch.tokens.shape[1]
    sees = batch.tree.sees(slice(0, size), slice(0, size))
    found = []
    for column in batch.columns:
        path = np.flatnonzero(sees[column - 1])
        assert batch.tree.positions[path].tolist() == list(range(len(path)))
        found.append(tuple(batch.tokens[0, path].tolist()))
    return found


def trained(rows: list[Row]) -> Counter[tuple[object, ...]]:
    """Every trained token with what comes before it and what the loss needs."""
    return Counter(
        (tuple(row.tokens[:column].tolist()), int(row.tokens[column]), *map(float, values))
        for row in rows
        for column, *values in zip(row.positions, row.logprobs, row.advantages, row.weights, strict=True)
    )


def trained_in(batch: Batch) -> Counter[tuple[object, ...]]:
    values = zip(batch.targets, batch.logprobs, batch.advantages, batch.weights, strict=True)
    return Counter((path, int(t), *map(float, rest)) for path, (t, *rest) in zip(prefixes(batch), values, strict=True))


# -- what is packed --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([2, 40]), st.sampled_from([1, 60, 150, 10**6]))
def test_every_trained_token_follows_its_own_prefix_once(seed, count, alphabet, budget):
    rows = random_rows(seed, rows=count, alphabet=alphabet)
    found = packs(rows, budget)
    assert sum(map(trained_in, found), Counter()) == trained(rows)
    longest = max(len(row.tokens) - 1 for row in rows)
    assert all(batch.tokens.size <= max(budget, longest) for batch in found)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([2, 40]))
def test_uncut_no_beginning_is_computed_twice(seed, count, alphabet):
    rows = random_rows(seed, rows=count, alphabet=alphabet)
    beginnings = {tuple(row.tokens[:end].tolist()) for row in rows for end in range(1, len(row.tokens))}
    (batch,) = packs(rows, 10**6)
    assert batch.tokens.size == unique_tokens(rows) == len(beginnings)


def test_nothing_makes_no_pack() -> None:
    assert packs([], 100) == []
    assert unique_tokens([]) == 0


def row(*tokens: int) -> Row:
    """A row whose last token trains."""
    one = np.ones(1, dtype=np.float32)
    return Row(np.array(tokens), np.array([len(tokens) - 1]), one, one, one)


def test_a_small_tree_by_hand():
    """1 2 branches into 3 4 -> 9 and 5 -> 8 -> 9; a second tree starts with 6."""
    (batch,) = packs([row(6, 7, 9), row(1, 2, 5, 8, 9), row(1, 2, 3, 4, 9), row(1, 2, 5, 8)], 100)
    assert batch.tree is not None
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 8, 6, 7]]
    assert batch.tree.positions.tolist() == [0, 1, 2, 3, 2, 3, 0, 1]
    assert batch.tree.ends.tolist() == [6, 6, 4, 4, 6, 6, 8, 8]
    assert sorted(zip(batch.columns - 1, batch.targets, strict=True)) == [(3, 9), (4, 8), (5, 9), (7, 9)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(40, 120))
def test_cuts_repeat_as_few_tokens_as_any_cut_of_the_sorted_rows(seed, count, budget):
    rows = random_rows(seed, rows=count)
    cost = sum(batch.tokens.size + packing.PACK_COST for batch in packs(rows, budget))
    ordered = sorted(rows, key=lambda row: tuple(row.tokens[:-1].tolist()))
    best = np.inf
    for cuts in itertools.product([False, True], repeat=count - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), count]
        parts = [ordered[a:b] for a, b in itertools.pairwise(bounds)]
        sizes = [unique_tokens(part) for part in parts]
        if all(size <= budget or len(part) == 1 for size, part in zip(sizes, parts, strict=True)):
            best = min(best, sum(sizes) + packing.PACK_COST * len(parts))
    assert cost == best


# -- gradients -------------------------------------------------------------------------------------


def deterministic(kind: str, seed: int = 0) -> PreTrainedModel:
    """GPT-2's default is dropout, of which no two passes are the same."""
    model = random_model(kind, VOCABULARY, seed=seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = 0.0
    return model


def reference(model: PreTrainedModel, rows: list[Row]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient in plain transformers, a forward pass of the whole model per row, in float64."""
    model = copy.deepcopy(model).double()
    total = torch.zeros(())
    for one in rows:
        logits = model(input_ids=torch.from_numpy(one.tokens)[None], use_cache=False).logits[0, one.positions - 1]
        logprobs = torch.log_softmax(logits, -1)[range(len(logits)), one.tokens[one.positions]]
        ratio = torch.exp(logprobs - torch.from_numpy(one.logprobs))
        advantages = torch.from_numpy(one.advantages)
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = -(torch.from_numpy(one.weights) * gain).sum()
        loss.backward()
        total = total + loss.detach()
    return float(total), [parameter.grad for parameter in model.parameters()]


def update(model: PreTrainedModel, rows: list[Row], **options: object) -> tuple[float, list[torch.Tensor]]:
    learner = Learner(copy.deepcopy(model), learning_rate=1e-3, max_grad_norm=1e9, **options)
    metrics = learner.update(rows, 0.2, 0.2)
    assert metrics is not None
    return metrics.loss, [parameter.grad for parameter in learner.model.parameters()]


def error(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all parameters."""
    apart = sum(float((a.double() - b).square().sum()) for a, b in zip(ours, exact, strict=True))
    return (apart / sum(float(b.square().sum()) for b in exact)) ** 0.5


@pytest.mark.parametrize("budget", [10**6, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_row_by_row_training(kind: str, budget: int) -> None:
    for seed in range(4):
        model, rows = deterministic(kind, seed), random_rows(seed, rows=4 + 4 * seed)
        loss, gradients = update(model, rows, batch_tokens=budget)
        exact_loss, exact = reference(model, rows)
        assert loss == pytest.approx(exact_loss, rel=1e-5)
        assert error(gradients, exact) <= 1e-5


@pytest.mark.parametrize("kind", ["llama-grouped", "qwen2"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model, rows = random_model(kind, VOCABULARY), random_rows(5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, gradients = update(model, rows)
    model.gradient_checkpointing_disable()
    exact_loss, exact = reference(model, rows)
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert error(gradients, exact) <= 1e-5


@pytest.mark.parametrize("cost", [0, 100, 10**9], ids=["a tile per run", "some joined", "one mask"])
def test_tiles_are_a_matter_of_speed_alone(monkeypatch: pytest.MonkeyPatch, cost: int) -> None:
    monkeypatch.setattr(tree_attention, "TILE_COST", cost)
    model, rows = random_model("llama-grouped", VOCABULARY), random_rows(8, rows=30)
    (batch,) = packs(rows, 10**6)
    assert batch.tree is not None
    tiles = batch.tree.tiles(torch.float32)
    assert len(tiles) == 1 if cost == 10**9 else len(tiles) > 10
    assert error(update(model, rows)[1], reference(model, rows)[1]) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY])
def test_the_head_in_chunks_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model, rows = random_model("llama", VOCABULARY), random_rows(3)
    monkeypatch.setattr(logprob_model, "CHUNK", chunk)
    assert error(update(model, rows)[1], reference(model, rows)[1]) <= 1e-5


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is `width` wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.elements = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_more_logits_exist_at_a_time_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    width, most = 997, 40  # more than the 32 rows that the transposed head has
    monkeypatch.setattr(logprob_model, "CHUNK", most * width)
    model, rows = random_model("llama", width), random_rows(3, rows=30, alphabet=width)
    assert sum(len(row.positions) for row in rows) > 4 * most
    learner = Learner(model, learning_rate=1e-3)
    with Largest(width) as largest:
        learner.update(rows, 0.2, 0.2)
    assert largest.elements == most * width


# -- models that trees do not suit -----------------------------------------------------------------

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def unsuited(kind: str) -> PreTrainedModel:
    if kind == "sliding window":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1))
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1))


@pytest.mark.parametrize("kind", ["sliding window", "dropout"])
def test_a_model_that_trees_do_not_suit_is_refused_and_can_train_on_rows(kind: str) -> None:
    model, rows = unsuited(kind), random_rows(1)
    before = model.config._attn_implementation
    with pytest.raises(PolicyError, match="packing=rows"):
        Learner(model, learning_rate=1e-3)
    assert model.config._attn_implementation == before
    assert Learner(model, learning_rate=1e-3, packing="rows").update(rows, 0.2, 0.2) is not None


def test_a_model_without_flex_attention_is_refused_where_there_is_no_other() -> None:
    """As on a GPU: transformers has none for GPT-2."""
    model = random_model("gpt2", VOCABULARY).to("meta")
    before = model.config._attn_implementation
    with pytest.raises(PolicyError, match="packing=rows"), tree_attention.tree_attention(model):
        pass
    assert model.config._attn_implementation == before


def test_a_model_that_keeps_the_tree_from_its_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama", VOCABULARY)
    layer = model.base_model.layers[1]
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden, tree=None, **named: plain(hidden, **named))
    with pytest.raises(PolicyError, match="did not get the tree"):
        Learner(model, learning_rate=1e-3).update(random_rows(1), 0.2, 0.2)


def test_the_model_keeps_its_own_attention(tmp_path: Path) -> None:
    model, rows = random_model("llama", VOCABULARY), random_rows(1)
    ids = torch.arange(20)[None]
    before, name = model(input_ids=ids).logits, model.config._attn_implementation
    Learner(model, learning_rate=0.0).update(rows, 0.2, 0.2)
    assert model.config._attn_implementation == name
    assert torch.equal(model.eval()(input_ids=ids).logits, before)
    model.save_pretrained(tmp_path)
    assert "carl_tree" not in (tmp_path / "config.json").read_text()


def test_nothing_is_learned_from_a_loss_that_is_not_finite() -> None:
    model, rows = random_model("llama", VOCABULARY), random_rows(1)
    rows[0].advantages[0] = np.nan
    with pytest.raises(CarlGymError, match="not finite"):
        Learner(model, learning_rate=1e-3).update(rows, 0.2, 0.2)


def test_flex_attention_gets_the_same_rule() -> None:
    """What GPUs use; on a CPU it has no backward pass, so only what it computes is compared."""
    from torch.nn.attention.flex_attention import flex_attention

    (batch,) = packs(random_rows(8, rows=30), 10**6)
    tree = batch.tree
    assert tree is not None
    size = len(tree.ends)
    query, key, value = (torch.randn(1, 4, size, 16) for _ in range(3))
    flex = flex_attention(query, key, value, block_mask=tree_attention._block_mask(tree, torch.device("cpu")))
    ours, _ = tree_attention._attend(torch.nn.Identity(), query, key, value, None, tree=tree)
    torch.testing.assert_close(ours.transpose(1, 2), flex, atol=1e-5, rtol=1e-5)
