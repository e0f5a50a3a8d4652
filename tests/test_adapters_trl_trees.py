"""Our trees in TRL's trainer: gradients are our learner's, every row trains once, and what cannot work is refused."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="the TRL library is not installed")

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig

import carl_gym
from carl_gym.adapters.trl import dataset
from carl_gym.adapters.trl_trees import CarlTrainer, row_tensors, rows_per_process
from carl_gym.agents.agent import Agent, load_agent
from carl_gym.algorithms import Algorithm, get_algorithm
from carl_gym.envs.task import SearchTask
from carl_gym.errors import CarlGymError, ConfigError
from carl_gym.training.credited import credit_trees, trained_rows
from carl_gym.training.learner import Learner
from carl_gym.training.segments import Row

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ALGORITHM = get_algorithm("carl-lite", initial=2, forks=6)
GRPO = get_algorithm("grpo", rollouts=4)


def with_credit(value: float) -> Algorithm:
    """GRPO where every action has this advantage."""
    return dataclasses.replace(GRPO, credit=lambda trees: [np.full(len(tree.nodes), value) for tree in trees])


@pytest.fixture(scope="module")
def task() -> SearchTask:
    return carl_gym.make_task("carl/MiniWiki-v0", questions=6)


@pytest.fixture(scope="module")
def short() -> SearchTask:
    """Episodes that are over before anything is found out."""
    return carl_gym.make_task("carl/MiniWiki-v0", questions=6, turns=2)


@pytest.fixture
def tiny() -> Agent:
    """The agent that comes with the package."""
    return load_agent("tiny", device="cpu")


def config(folder: Path, **options: Any) -> GRPOConfig:
    """Two questions with room for 8 rows each, in two micro-batches."""
    values = {
        "max_steps": 1, "num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3, "max_grad_norm": 0.0, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    return GRPOConfig(output_dir=str(folder), **{**values, **options})


class Watch(TrainerCallback):
    """Weights before every optimiser step, and the gradients that it is about to take."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor | None]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        self.gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in named})


def learner_gradient(
    weights: dict[str, torch.Tensor], rows: list[Row], algorithm: Algorithm
) -> dict[str, torch.Tensor]:
    """What `Learner` has for a gradient of these rows at these weights."""
    agent = load_agent("tiny", device="cpu")
    assert agent.model is not None
    agent.model.load_state_dict(weights, strict=False)
    learner = Learner(agent.model, learning_rate=1e-3, max_grad_norm=math.inf, packing="rows")
    learner.update(rows, algorithm.clip_low, algorithm.clip_high)
    return {name: p.grad for name, p in agent.model.named_parameters() if p.grad is not None}


def distance(ours: dict[str, Any], others: dict[str, Any]) -> float:
    """Norm of the difference, relative to that of `others`."""
    assert ours.keys() == others.keys()
    return norm({name: ours[name].double() - others[name].double() for name in ours}) / norm(others)


def norm(gradient: dict[str, Any]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))


@pytest.mark.parametrize(("micro_batches", "tolerance"), [(1, 1e-6), (4, 1e-5)])
def test_gradients_are_those_of_the_learner(
    micro_batches: int, tolerance: float, task: SearchTask, tiny: Agent, tmp_path: Path
) -> None:
    """In the same batch; and in others up to rounding, by which the learner's own gradients differ too when its batches
    do (3e-6 of their norm here).
    """
    watch = Watch()
    args = config(
        tmp_path, num_iterations=2, max_steps=2,
        per_device_train_batch_size=16 // micro_batches, gradient_accumulation_steps=micro_batches,
    )  # fmt: skip
    trainer = CarlTrainer(tiny, task, ALGORITHM, args=args, callbacks=[watch])
    trainer.train()
    rows = trained_rows(ALGORITHM, credit_trees(ALGORITHM, trainer.trees))
    assert len(trainer.trees) == 2 and len(rows) > 4
    first, second = (learner_gradient(weights, rows, ALGORITHM) for weights in watch.weights)
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    # The second step is on the same rows, with ratios that are not 1.
    for gradient, expected, entry in zip(watch.gradients, (first, second), logged, strict=True):
        assert distance(gradient, expected) < tolerance
        assert entry["grad_norm"] == pytest.approx(norm(expected), rel=tolerance)
    assert logged[0]["clip_ratio/region_mean"] == 0 and logged[1]["clip_ratio/region_mean"] > 0
    assert logged[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert logged[0]["rollout/rows"] == len(rows) and logged[0]["reward"] == logged[0]["rollout/reward"]


@pytest.mark.parametrize("name", ["grpo", "igpo", "actfocus", "gigpo"])
def test_algorithms_of_every_kind_take_a_step(name: str, task: SearchTask, tiny: Agent, tmp_path: Path) -> None:
    """With what they require: gold answers, thoughts, repeated states."""
    trainer = CarlTrainer(tiny, task, get_algorithm(name, rollouts=4), args=config(tmp_path))
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "grad_norm" in entry)
    assert math.isfinite(entry["grad_norm"]) and entry["rollout/trajectories"] == 8
    assert (entry["grad_norm"] > 0) == (entry["rollout/rows"] > 0)


def test_without_advantages_nothing_moves(short: SearchTask, tiny: Agent, tmp_path: Path) -> None:
    """Not even by weight decay."""
    watch = Watch()
    args = config(tmp_path, weight_decay=0.1, max_grad_norm=1.0)
    trainer = CarlTrainer(tiny, short, with_credit(0), args=args, callbacks=[watch])
    trainer.train()
    assert all(gradient is None for gradient in watch.gradients[0].values())
    assert all(torch.equal(p, watch.weights[0][name]) for name, p in trainer.model.named_parameters())
    (entry,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    assert entry["rollout/rows"] == 0 and entry["rollout/filler_rows"] == 2


def test_the_data_loader_of_trl_decides_on_the_questions(short: SearchTask, tiny: Agent, tmp_path: Path) -> None:
    asked: list[str] = []

    class Asked(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            asked.extend(tree.question.id for tree in trainer.trees)

    some = dataset(short).select(range(1, 5))
    args = config(tmp_path, max_steps=-1, num_train_epochs=1)
    trainer = CarlTrainer(tiny, short, with_credit(1), args=args, train_dataset=some, callbacks=[Asked()])
    trainer.train()
    assert trainer.state.global_step == 2 and sorted(asked) == sorted(some["question_id"])


def a_row(rng: np.random.Generator) -> Row:
    size = int(rng.integers(2, 30))
    positions = np.unique([*rng.integers(1, size, 5), size - 1])
    values = rng.normal(size=(2, len(positions))).astype(np.float32)
    return Row(rng.integers(50, size=size), positions, *values, np.abs(values[0]) + np.float32(0.1))


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_every_row_goes_to_one_micro_batch_of_one_process(count: int, processes: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [a_row(rng) for _ in range(count)]
    each = rows_per_process(count, processes, steps)
    assert each % steps == 0 and each * processes >= max(count, steps)
    assert each // steps <= max(1, math.ceil(count / (processes * steps)))  # no more than TRL's own batches hold
    seen: Counter[bytes] = Counter()
    for process in range(processes):
        batch = row_tensors(rows[process::processes], each, pad=99)
        assert all(len(tensor) == each for tensor in batch.values())
        where = batch["token_weights"] > 0
        for index in range(each):
            at = where[index].nonzero()[:, 0].numpy()
            if len(at):
                names = ("old_per_token_logps", "advantages", "token_weights")
                tokens = batch["input_ids"][index, : at[-1] + 1].numpy()
                seen[b"".join(a.tobytes() for a in (tokens, at, *(batch[n][index].numpy()[at] for n in names)))] += 1
    arrays = ("tokens", "positions", "logprobs", "advantages", "weights")
    wanted = Counter(b"".join(getattr(row, n).tobytes() for n in arrays) for row in rows)
    assert seen == wanted


def test_too_many_rows_are_an_error_and_not_cut_off(short: SearchTask, tiny: Agent, tmp_path: Path) -> None:
    args = config(tmp_path, num_generations=2, per_device_train_batch_size=2)
    trainer = CarlTrainer(tiny, short, with_credit(1), args=args)
    with pytest.raises(CarlGymError, match=r"2 trees have 8 rows, .* room for 4; raise num_generations, .* to 4 per"):
        trainer.train()


def test_what_trl_cannot_give_is_refused_before_training(task: SearchTask, tiny: Agent, tmp_path: Path) -> None:
    def refused(
        match: str, algorithm: str = "carl-lite", data: Any = None, agent: Agent = tiny, **options: Any
    ) -> None:
        with pytest.raises(ConfigError, match=match):
            CarlTrainer(agent, task, algorithm, args=config(tmp_path, **options), train_dataset=data)

    refused("'ppo' trains a critic", "ppo")
    refused("unknown algorithm 'carl-lit', did you mean 'carl-lite'", "carl-lit")
    refused("has no weights here", agent=dataclasses.replace(tiny, model=None))
    refused(
        r"GRPOConfig\(epsilon=0.3\) does not go with CarlTrainer: the algorithm has its own loss; leave it at 0.2",
        epsilon=0.3,
    )
    refused(r"beta=0.1", beta=0.1)
    refused(r"top_p=0.9\) .* the agent samples", top_p=0.9)
    refused("steps_per_generation is 4 and gradient_accumulation_steps 2", steps_per_generation=4)
    rows = dataset(task)
    refused("no question_id", data=rows.remove_columns("question_id"))
    refused("'nobody'", data=rows.map(lambda row: {"question_id": "nobody"}))
    refused("2 rows and 1 different", data=rows.select([0, 0]))
    refused("has 1 questions and an optimiser step takes 2", data=rows.select([0]))


def test_evaluation_is_refused(task: SearchTask, tiny: Agent, tmp_path: Path) -> None:
    trainer = CarlTrainer(tiny, task, ALGORITHM, args=config(tmp_path))
    with pytest.raises(ConfigError, match=r"carl_gym.evaluation.evaluate"):
        trainer.evaluate(dataset(task))
