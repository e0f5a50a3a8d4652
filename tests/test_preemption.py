"""A run that is told to end saves and ends with a code; what is not finite is skipped; the best agent is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import STEPS, arguments, config, last_checkpoint, metrics, same_training, without_times

from carl_gym.agents.agent import load_agent
from carl_gym.errors import CarlGymError, DataError
from carl_gym.training.checkpoints import checkpoints
from carl_gym.training.learner import Learner
from carl_gym.training.preemption import EXIT_CODE, Preempted, Preemption
from carl_gym.training.trainer import Trainer


@pytest.fixture(scope="module")
def whole(tiny_agent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    list(Trainer(config(tiny_agent_folder, folder)).run())
    return folder


def told_to_end_in(trainer: Trainer, owner: object, method: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process SIGTERM when the trainer calls that method in that step."""
    before, told = getattr(owner, method), []

    def call(*arguments: object, **named: object) -> object:
        if trainer.progress.step == step - 1 and not told:
            told.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*arguments, **named)

    monkeypatch.setattr(owner, method, call)


@pytest.mark.parametrize(("where", "saved"), [("rollout", 1), ("update", 2)])
def test_told_to_end_a_run_saves_what_is_whole_and_goes_on_as_if_nothing_had_happened(
    where, saved, tiny_agent_folder, tmp_path, whole, monkeypatch
):
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", save_every=10))
    owner, method = (trainer.agent.policy, "sample") if where == "rollout" else (trainer.learner, "update")
    told_to_end_in(trainer, owner, method, 2, monkeypatch)
    with pytest.raises(Preempted) as ended:
        list(trainer.run())
    assert ended.value.code == EXIT_CODE == 143
    assert last_checkpoint(tmp_path / "run").name == f"step-{saved:06d}"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    list(Trainer(config(tiny_agent_folder, tmp_path / "run", save_every=10, resume=True)).run())
    assert same_training(tmp_path / "run", whole)
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(whole))


def test_before_the_first_step_there_is_nothing_to_save(tiny_agent_folder, tmp_path, monkeypatch):
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", eval_questions=0))
    told_to_end_in(trainer, trainer.agent.policy, "sample", 1, monkeypatch)  # no evaluation comes before
    with pytest.raises(Preempted):
        list(trainer.run())
    assert checkpoints(tmp_path / "run") == []


def test_a_process_that_gets_sigterm_ends_with_143(tiny_agent_folder, tmp_path):
    words = arguments(tiny_agent_folder, tmp_path / "run", steps=500, save_every=500, eval_every=500)
    command = [sys.executable, "-c", "from carl_gym.training.cli import main; main()", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not log.is_file() or log.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == EXIT_CODE, output
    finally:
        process.kill()
    steps = [int(row["step"]) for row in metrics(tmp_path / "run")]
    assert last_checkpoint(tmp_path / "run").name == f"step-{steps[-1]:06d}"  # nothing that was done is lost


def test_other_threads_leave_signals_alone():
    def look() -> None:
        with Preemption().watched():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[object] = []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


# -- not finite ------------------------------------------------------------------------------------


def spoil(trainer: Trainer, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first optimiser step of these training steps have an advantage that is no number."""
    update = Learner.update
    seen: set[int] = set()

    def spoiled(self: Learner, rows, *clip: float):
        step = trainer.progress.step + 1
        if step in steps and step not in seen and rows:
            seen.add(step)
            rows = [dataclasses.replace(row, advantages=row.advantages * float("nan")) for row in rows]
        return update(self, rows, *clip)

    monkeypatch.setattr(Learner, "update", spoiled)


def test_a_step_that_is_not_finite_is_skipped_told_and_kept(tiny_agent_folder, tmp_path, monkeypatch):
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", bad_updates=2))
    spoil(trainer, {2}, monkeypatch)
    with pytest.warns(UserWarning, match="step 2: the loss .* is not finite.*bad-batch-0"):
        rows = list(trainer.run())
    assert len(rows) == STEPS + 1
    assert [row["update/not_finite"] for row in rows[1:]] == [0, 1, 1, 1]
    assert rows[2]["update/skipped"] == rows[1]["update/skipped"] + 1
    kept = torch.load(tmp_path / "run" / "bad-batch-0.pt")
    assert kept and all(len(row["advantages"]) == len(row["positions"]) < len(row["tokens"]) for row in kept)


def test_too_many_in_a_row_end_the_run(tiny_agent_folder, tmp_path, monkeypatch):
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", minibatches=1, bad_updates=2))
    spoil(trainer, {2, 3}, monkeypatch)
    with (
        pytest.warns(UserWarning, match="Going on"),
        pytest.raises(CarlGymError, match=r"2 optimiser steps in a row were not possible.*bad-batch-0\.pt"),
    ):
        list(trainer.run())
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]


# -- a full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "background"), [("model.safetensors", False), ("trainer.pt", False), ("trainer.pt", True)]
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    file, background, tiny_agent_folder, tmp_path, whole, monkeypatch
):
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", background_saves=background))
    run, save = trainer.run(), Trainer._save
    assert len(list(itertools.islice(run, 3))) == 3  # step 2 is saved
    trainer.saver.settle()

    def save_on_a_full_disk(self: Trainer) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        largest = (last_checkpoint(tmp_path / "run") / file).stat().st_size - 1000  # larger files cannot be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        try:
            save(self)
            self.saver.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(Trainer, "_save", save_on_a_full_disk)
    with pytest.raises(DataError, match=r"step-000004 cannot be written \(.*--resume"):
        list(run)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    list(Trainer(config(tiny_agent_folder, tmp_path / "run", resume=True)).run())
    assert same_training(tmp_path / "run", whole)


# -- what is kept ----------------------------------------------------------------------------------


def test_the_best_agent_stays_beside_the_newest_checkpoints(tiny_agent_folder, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.3, 0.4])
    monkeypatch.setattr(
        Trainer,
        "_evaluate",
        lambda self: {f"eval/{how}_em": score for score in [next(scores)] for how in ("sampled", "greedy")},
    )
    folder = tmp_path / "run"
    list(Trainer(config(tiny_agent_folder, folder, eval_every=1, save_every=1, steps=3, keep=1, keep_best=True)).run())
    assert [path.name for path in checkpoints(folder)] == ["step-000003"]
    (best,) = (folder / "best").iterdir()
    assert best.name == "step-000001"
    assert json.loads((best / "score.json").read_text()) == {"step": 1, "eval/sampled_em": 0.5}
    assert load_agent(str(best), device="cpu").model is not None
    assert any(
        not torch.equal(one, load_file(last_checkpoint(folder) / "model.safetensors")[name])
        for name, one in load_file(best / "model.safetensors").items()
    )
