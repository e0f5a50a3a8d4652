"""Rollouts one step ahead of the learner: which weights sample what, how rows are corrected, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import STEPS, config, last_checkpoint, metrics, same_training, without_times

from carl_gym.agents.agent import load_agent
from carl_gym.errors import ConfigError, PolicyError
from carl_gym.rollouts.collector import RolloutsDropped, collect
from carl_gym.training.checkpoints import checkpoints
from carl_gym.training.config import TrainConfig
from carl_gym.training.credited import credit_trees, trained_rows
from carl_gym.training.loss import ppo_clip, truncated_importance
from carl_gym.training.preemption import Preempted
from carl_gym.training.questions import take_questions
from carl_gym.training.segments import Row
from carl_gym.training.trainer import Trainer

AHEAD = "rollouts ahead"


def tensors(*columns: tuple[float, ...]) -> list[torch.Tensor]:
    logprobs, *others = (torch.tensor(column, dtype=torch.float64) for column in columns)
    return [logprobs.requires_grad_(), *others]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "held"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),  # fresh: the policy gradient
        (1.5, 2.0, -3.0, -3.0, 0.0),  # below the cap: the importance weight as it is
        (5.0, 2.0, -4.0, -4.0, 1.0),  # the cap holds it, and it still has a gradient
        (5.0, -2.0, 4.0, 4.0, 1.0),
        (0.1, -2.0, 0.2, 0.2, 0.0),
    ],
)
def test_known_answers(ratio, advantage, loss, slope, held):
    values = tensors((math.log(ratio) - 3,), (-3.0,), (advantage,), (1.0,))
    terms = truncated_importance(*values, cap=2.0)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(loss)
    assert values[0].grad.item() == pytest.approx(slope)
    assert float(terms.clipped) == held
    assert float(terms.gap) == pytest.approx(abs(math.log(ratio)), abs=1e-12)


def test_where_nothing_is_stale_it_is_the_clipped_loss():
    found = []
    for loss in (lambda *v: ppo_clip(*v, 0.2, 0.2), lambda *v: truncated_importance(*v, cap=2.0)):
        values = tensors((-1.0, -2.0), (-1.0, -2.0), (0.5, -1.5), (0.25, 0.75))
        terms = loss(*values)
        terms.loss.backward()
        found.append((terms.loss.item(), *values[0].grad.tolist()))
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize(("cap", "unbiased"), [(math.inf, True), (1.0, False)])
def test_samples_of_older_weights_have_the_expected_gradient_of_the_new_ones(cap, unbiased):
    """Over all actions of one state, weighted as the older policy draws them."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    older = torch.tensor([1.0, 0.2, -1.0, 0.4], dtype=torch.float64).log_softmax(0)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (wanted,) = torch.autograd.grad(-(logits.softmax(0) * advantages).sum(), logits)
    terms = truncated_importance(logits.log_softmax(0), older, advantages, older.exp(), cap)
    (found,) = torch.autograd.grad(terms.loss, logits)
    assert torch.allclose(found, wanted) == unbiased


# -- runs ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Watched:
    """A run that remembers the rows of every optimiser step, and the version of the weights that took it."""

    trainer: Trainer
    rows: list[list[Row]] = dataclasses.field(default_factory=list)
    lags: list[set[int]] = dataclasses.field(default_factory=list)
    samplers: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        update, sample = self.trainer.learner.update, self.trainer.agent.policy.sample

        def updated(rows, *others):
            self.rows.append(list(rows))
            self.lags.append({self.trainer.agent.policy.version - row.policy_version for row in rows})
            return update(rows, *others)

        def sampled(requests):
            self.samplers.add(threading.current_thread().name.rpartition("_")[0])
            return sample(requests)

        self.trainer.learner.update = updated
        self.trainer.agent.policy.sample = sampled


def ahead(agent: Path, folder: Path, **changes: object) -> TrainConfig:
    return config(agent, folder, one_step_off=True, minibatches=1, learning_rate=3e-3, **changes)


@pytest.fixture(scope="module")
def run(tiny_agent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, Path]:
    folder = tmp_path_factory.mktemp("ahead") / "run"
    watched = Watched(Trainer(ahead(tiny_agent_folder, folder)))
    list(watched.trainer.run())
    return watched, folder


def test_rows_are_one_version_behind_but_after_evaluations_and_checkpoints(run):
    watched, folder = run
    assert watched.lags == [{0}, {1}, {0}, {1}]  # both come after steps 2 and 4
    assert AHEAD in watched.samplers
    assert [row["step"] for row in metrics(folder)] == list(range(STEPS + 1))
    gaps = [row["update/logprob_gap"] for row in metrics(folder)[1:]]
    assert max(gaps[::2]) < 1e-3 < min(gaps[1::2])


def test_a_step_ahead_is_rolled_out_with_the_weights_of_the_step_before(run, tiny_agent_folder):
    trainer = run[0].trainer
    base = load_agent(str(tiny_agent_folder), device="cpu")
    trees = collect(
        trainer.task,
        base.policy,
        base.transcript,
        take_questions(trainer.questions, 1, 3, trainer.config.seed),
        trainer.algorithm.explorer,
        seed=trainer.config.seed,
        step=2,
    )
    wanted = trained_rows(trainer.algorithm, credit_trees(trainer.algorithm, trees))
    second = run[0].rows[1]
    assert len(second) == len(wanted) > 0
    for row, other in zip(second, wanted, strict=True):
        assert np.array_equal(row.tokens, other.tokens)
        assert np.allclose(row.logprobs, other.logprobs, atol=1e-5)


def test_a_resumed_run_does_what_it_would_have_done(run, tiny_agent_folder, tmp_path):
    for metric in Trainer(ahead(tiny_agent_folder, tmp_path / "run")).run():
        if metric["step"] == 3:  # the checkpoint is that of step 2, and step 4 was begun
            break
    list(Trainer(ahead(tiny_agent_folder, tmp_path / "run", resume=True)).run())
    assert same_training(tmp_path / "run", run[1])
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(run[1]))


def test_told_to_end_it_drops_what_is_under_way(tiny_agent_folder, tmp_path):
    trainer = Trainer(ahead(tiny_agent_folder, tmp_path / "run", steps=50, save_every=50, eval_every=50))
    sample, begun = trainer.agent.policy.sample, threading.Event()

    def slow(requests):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
        return sample(requests)

    trainer.agent.policy.sample = slow
    update = trainer.learner.update

    def told(*arguments):
        begun.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)

    trainer.learner.update = told
    with pytest.raises(Preempted):
        list(trainer.run())
    assert last_checkpoint(tmp_path / "run").name == "step-000001"


def test_what_goes_wrong_ahead_ends_the_run(tiny_agent_folder, tmp_path):
    trainer = Trainer(ahead(tiny_agent_folder, tmp_path / "run"))
    sample = trainer.agent.policy.sample

    def broken(requests):
        if threading.current_thread() is not threading.main_thread():
            raise PolicyError("the server is gone")
        return sample(requests)

    trainer.agent.policy.sample = broken
    with pytest.raises(PolicyError, match="the server is gone"):
        list(trainer.run())
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("schedule", ["ticks", "async"])
def test_rollouts_that_are_dropped_end_at_the_next_action(schedule, run):
    trainer, dropped = run[0].trainer, threading.Event()
    dropped.set()
    questions = trainer.questions[:2]
    with pytest.raises(RolloutsDropped):
        collect(
            trainer.task,
            trainer.agent.policy,
            trainer.agent.transcript,
            questions,
            trainer.algorithm.explorer,
            seed=0,
            step=1,
            schedule=schedule,
            dropped=dropped,
        )


@pytest.mark.parametrize(("lag", "allowed"), [(0, True), (1, True), (2, False), (-1, False)])
def test_rows_that_are_staler_than_is_corrected_for_are_refused(lag, allowed, run):
    trainer, rows = run[0].trainer, run[0].rows[0]
    version = trainer.agent.policy.version - lag
    stale = [dataclasses.replace(rows[0], policy_version=version), *rows[1:0]]
    if allowed:
        trainer.sampler.check_fresh(stale)
        return
    with pytest.raises(PolicyError, match=rf"version {version} of the weights sampled .* version {version + lag};"):
        trainer.sampler.check_fresh(stale)


def test_in_step_nothing_may_be_stale(tiny_agent_folder, tmp_path):
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", eval_questions=0))
    trainer.agent.policy.version += 1
    with pytest.raises(PolicyError, match="at most 0 behind is allowed"):
        trainer.sampler.check_fresh([Row(*(np.zeros(1),) * 5, policy_version=0)])


def test_a_cap_is_a_positive_number(tiny_agent_folder, tmp_path):
    with pytest.raises(ConfigError, match="importance_cap must be a number above 0"):
        ahead(tiny_agent_folder, tmp_path / "run", importance_cap=0.0)
