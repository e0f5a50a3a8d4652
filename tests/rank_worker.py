"""What every process of tests/test_ranks.py runs: five optimiser steps on its share of stored rows, in all forms."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from carl_gym.agents import logprob_model
from carl_gym.agents.agent import load_agent
from carl_gym.agents.logprob_model import LogprobModel, evaluation_mode
from carl_gym.training.adapter import Adapter
from carl_gym.training.learner import Learner, NotFinite
from carl_gym.training.loss import LossTerms, ppo_clip
from carl_gym.training.ranks import Ranks, launched
from carl_gym.training.segments import Row

torch.set_num_threads(1)


def train(
    ranks: Ranks,
    agent: Path,
    shares: Path,
    out: Path,
    *,
    checkpointing: bool = False,
    bf16: bool = False,
    lora: bool = False,
) -> None:
    """`shares`: for every step a list of rows for each process. Leaves weights and metrics behind."""
    model = new_model(agent, lora)
    autocast = torch.bfloat16 if bf16 else None
    settings = {"batch_tokens": 700, "gradient_checkpointing": checkpointing, "autocast": autocast, "ranks": ranks}
    learner = Learner(model, learning_rate=1e-3, **settings)
    found = []
    for number, step in enumerate(pickle.loads(shares.read_bytes())):
        rows = [row for share in step for row in share] if ranks.count == 1 else step[ranks.index]
        if number == 2:
            refuse_what_is_not_finite(learner, rows)
        found.append(learner.update(rows, 0.2, 0.2))
        before = learner.weights()
        seen = logprobs(learner.model)  # between steps, as the canary does
    weights, state = learner.weights(), learner.state()
    assert same_state(before, weights), "a forward pass changes nothing"
    again = Learner(new_model(agent, lora), learning_rate=1e-3, ranks=ranks)
    if learner.writes_shards:
        learner.write_shards(out.with_suffix(".shards"))
        again.read_shards(out.with_suffix(".shards"))
    else:
        again.load_state(ranks.agree(state))
    same = again.state()
    if ranks.is_main:
        assert same_state(state, same), "what one learner remembers, another one goes on with"
        plain = new_model(agent, lora=False)
        plain.load_state_dict(weights, strict=False)  # tied weights are there once
        assert bf16 or torch.allclose(seen, logprobs(LogprobModel(plain)), atol=1e-5)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out.with_suffix(".safetensors"))
        out.with_suffix(".pickle").write_bytes(pickle.dumps(found))


def refuse_what_is_not_finite(learner: Learner, rows: list[Row]) -> None:
    """Gradients, or the loss alone, in one process: no process takes the step, and the next one is as ever."""
    spoiled = [replace(row, advantages=row.advantages * np.nan) if learner.ranks.is_main else row for row in rows]
    with pytest.raises(NotFinite, match=r"loss \(nan\)"):
        learner.update(spoiled, 0.2, 0.2)

    def infinite(*terms: object) -> LossTerms:
        found = ppo_clip(*terms)
        return replace(found, loss=found.loss + np.inf) if learner.ranks.is_main else found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFinite, match=r"loss \(inf\)"):
        patch.setattr("carl_gym.training.learner.ppo_clip", infinite)
        learner.update(rows, 0.2, 0.2)


def logprobs(model: LogprobModel) -> torch.Tensor:
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad(), evaluation_mode(model):
        return model(ids, torch.tensor([0, 1, 1]), torch.tensor([3, 5, 9]))[0]


def go_on_from_shards_of_fsdp2(ranks: Ranks, agent: Path, shares: Path, folder: Path) -> None:
    rows = pickle.loads(shares.read_bytes())[1][ranks.index]
    one, other = (
        Learner(new_model(agent, lora=False), learning_rate=1e-3, ranks=replace(ranks, zero3=zero3))
        for zero3 in (None, ranks.zero3)
    )
    one.update(rows, 0.2, 0.2)
    one.write_shards(folder / "shards")
    other.read_shards(folder / "shards")
    state, same = one.state(), other.state()
    if ranks.is_main:
        assert same_state(state, same)


def same_state(one: object, other: object) -> bool:
    """Whether nested dicts and sequences hold equal tensors and values."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return one == other


def new_model(agent: Path, lora: bool) -> PreTrainedModel:
    model = copy.deepcopy(load_agent(str(agent), device="cpu").model)
    if lora:
        torch.manual_seed(0)
        Adapter(model, rank=4, alpha=8.0)
    return model


if __name__ == "__main__":
    agent, shares, folder = map(Path, sys.argv[1:])
    ranks = launched("cpu" if torch.accelerator.is_available() else None)
    if ranks.zero3:
        train(ranks, agent, shares, folder / f"zero3-{ranks.count}", checkpointing=True)
        train(ranks, agent, shares, folder / f"zero3-lora-{ranks.count}", lora=True)
        train(ranks, agent, shares, folder / f"bf16-{ranks.count}", bf16=True, checkpointing=True)
        go_on_from_shards_of_fsdp2(ranks, agent, shares, folder)
        logprob_model.CHUNK = 1 << 15  # processes with more rows would call the head more often
        train(ranks, agent, shares, folder / f"zero3-chunks-{ranks.count}", checkpointing=True)
        cpu = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        offloading = replace(ranks, zero3=ranks.zero3 | cpu)
        train(offloading, agent, shares, folder / f"zero3-offload-{ranks.count}")
    else:
        train(replace(ranks, sharded=False), agent, shares, folder / f"ddp-{ranks.count}")
        train(replace(ranks, sharded=True), agent, shares, folder / f"fsdp-{ranks.count}", checkpointing=True)
        train(replace(ranks, sharded=True), agent, shares, folder / f"bf16-{ranks.count}", bf16=True)
        train(replace(ranks, sharded=True, offload=True), agent, shares, folder / f"offload-{ranks.count}")
        for kind, sharded in (("ddp", False), ("fsdp", True)):
            train(replace(ranks, sharded=sharded), agent, shares, folder / f"{kind}-lora-{ranks.count}", lora=True)
    ranks.wait()
