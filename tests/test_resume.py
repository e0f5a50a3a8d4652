"""A run that was stopped, at any point and by any means, and resumed ends bit for bit where it would have ended."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import (
    STEPS,
    arguments,
    config,
    last_checkpoint,
    metrics,
    mlflow_steps,
    run_record,
    same_training,
    weights,
    without_times,
)

from carl_gym.errors import DataError
from carl_gym.tracking.mlflow_tracker import MlflowTracker
from carl_gym.training.checkpoints import checkpoints
from carl_gym.training.trainer import Trainer


class Stopped(BaseException):
    """Stands for whatever ends a process; nothing catches it."""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def whole(tiny_agent_folder: Path, tmp_path_factory: pytest.TempPathFactory, uri: str) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    list(Trainer(config(tiny_agent_folder, folder, tracking_uri=uri)).run())
    return folder


def start(agent: Path, folder: Path, uri: str, rows: int) -> None:
    """Train until so many rows were logged, and stop."""
    run = Trainer(config(agent, folder, tracking_uri=uri)).run()
    assert len(list(itertools.islice(run, rows))) == rows
    run.close()


def resume(agent: Path, folder: Path, uri: str) -> list[dict[str, float]]:
    return list(Trainer(config(agent, folder, tracking_uri=uri, resume=True)).run())


def check(folder: Path, whole: Path, uri: str) -> None:
    """Same weights, same metrics, and every step once in both logs."""
    assert same_training(folder, whole)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert without_times(rows) == without_times(metrics(whole))
    logged = mlflow_steps(uri, run_record(folder)["run_id"])
    for name in set().union(*rows) - {"step"}:
        assert logged[name] == [int(row["step"]) for row in rows if name in row], name


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        (1, 1),  # before the first step
        (2, 1),  # before the first checkpoint: step 1 is done again
        (3, 3),  # right after a checkpoint
        (4, 3),  # a step past it
    ],
)
def test_a_stopped_run_goes_on_after_its_last_checkpoint(rows, first, tiny_agent_folder, tmp_path, whole, uri):
    start(tiny_agent_folder, tmp_path / "run", uri, rows)
    record = run_record(tmp_path / "run")
    again = resume(tiny_agent_folder, tmp_path / "run", uri)
    assert [row["step"] for row in again] == list(range(first, STEPS + 1))
    assert run_record(tmp_path / "run") == record
    check(tmp_path / "run", whole, uri)


def test_a_run_may_be_stopped_many_times(tiny_agent_folder, tmp_path, whole, uri):
    start(tiny_agent_folder, tmp_path / "run", uri, 2)
    for rows in (2, 1):
        run = Trainer(config(tiny_agent_folder, tmp_path / "run", tracking_uri=uri, resume=True)).run()
        assert list(itertools.islice(run, rows))
        run.close()
    resume(tiny_agent_folder, tmp_path / "run", uri)
    check(tmp_path / "run", whole, uri)


def test_checkpoints_written_beside_training_are_the_same(tiny_agent_folder, tmp_path, whole, uri):
    """Steps 1, 2 and 3 go on while the checkpoint before is written; the run is resumed from one of them."""
    options = {"tracking_uri": uri, "background_saves": True, "save_every": 1}
    for metric in Trainer(config(tiny_agent_folder, tmp_path / "run", **options)).run():
        if metric["step"] == 3:
            break
    assert last_checkpoint(tmp_path / "run").name == "step-000003"
    list(Trainer(config(tiny_agent_folder, tmp_path / "run", resume=True, **options)).run())
    assert same_training(tmp_path / "run", whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_resuming_a_finished_run_changes_nothing(tiny_agent_folder, whole, uri):
    before = weights(last_checkpoint(whole))
    assert resume(tiny_agent_folder, whole, uri) == []
    after = weights(last_checkpoint(whole))
    assert all(torch.equal(before[name], after[name]) for name in before)
    check(whole, whole, uri)


def test_stopped_while_writing_a_checkpoint(tiny_agent_folder, tmp_path, whole, uri, monkeypatch):
    folder = tmp_path / "run"
    save = torch.save

    def stop_halfway(state: object, path: Path) -> None:
        if "step-000004" in str(path):
            path.write_bytes(b"half of a")
            raise Stopped
        save(state, path)

    monkeypatch.setattr("carl_gym.training.checkpoints.torch.save", stop_halfway)
    with pytest.raises(Stopped):
        list(Trainer(config(tiny_agent_folder, folder, tracking_uri=uri)).run())
    monkeypatch.undo()
    assert (folder / "checkpoints" / ".partial-step-000004").is_dir()
    assert [path.name for path in checkpoints(folder)] == ["step-000002"]
    (folder / "checkpoints" / ".partial-step-000003").mkdir()  # of another save that broke off
    resume(tiny_agent_folder, folder, uri)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    check(folder, whole, uri)


@pytest.mark.parametrize(("moment", "step"), [("before", 0), ("after", 0), ("after", 3)])
def test_stopped_while_logging_a_step(step, moment, tiny_agent_folder, tmp_path, whole, uri, monkeypatch):
    log_step = MlflowTracker.log_step

    def stop(tracker: MlflowTracker, number: int, values: dict[str, float]) -> None:
        if number == step and moment == "before":
            raise Stopped
        log_step(tracker, number, values)
        if number == step:
            raise Stopped

    monkeypatch.setattr(MlflowTracker, "log_step", stop)
    with pytest.raises(Stopped):
        list(Trainer(config(tiny_agent_folder, tmp_path / "run", tracking_uri=uri)).run())
    monkeypatch.undo()
    resume(tiny_agent_folder, tmp_path / "run", uri)
    check(tmp_path / "run", whole, uri)


def test_a_line_of_the_metrics_that_was_cut_off_is_dropped(tiny_agent_folder, tmp_path, whole, uri):
    start(tiny_agent_folder, tmp_path / "run", uri, 3)
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "rollout/rew')
    resume(tiny_agent_folder, tmp_path / "run", uri)
    check(tmp_path / "run", whole, uri)


def test_metrics_that_are_not_all_there_are_told(tiny_agent_folder, tmp_path, uri):
    start(tiny_agent_folder, tmp_path / "run", uri, 3)  # steps 0, 1 and 2, and a checkpoint
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"metrics.jsonl is damaged: of steps 0 to 2 it has 2"):
        Trainer(config(tiny_agent_folder, tmp_path / "run", tracking_uri=uri, resume=True))


@pytest.mark.parametrize(
    ("name", "said"), [("model.safetensors", r"model\.safetensors has other contents"), ("files.json", "")]
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_it(name, said, tiny_agent_folder, tmp_path, whole, uri):
    options = {"tracking_uri": uri, "save_every": 1}
    folder, run = tmp_path / "run", Trainer(config(tiny_agent_folder, tmp_path / "run", **options)).run()
    assert len(list(itertools.islice(run, 4))) == 4  # steps 2 and 3 are saved
    run.close()
    flip_a_bit(last_checkpoint(folder) / name)
    with pytest.warns(UserWarning, match=rf"step-000003 is damaged \({said}.*goes on from step-000002.*damaged-step"):
        again = list(Trainer(config(tiny_agent_folder, folder, resume=True, **options)).run())
    assert [row["step"] for row in again] == [3, 4]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "damaged-step-000003",
        "step-000003",
        "step-000004",
    ]
    check(folder, whole, uri)


def test_without_a_whole_checkpoint_nothing_is_touched(tiny_agent_folder, tmp_path, uri):
    start(tiny_agent_folder, tmp_path / "run", uri, 3)
    state = last_checkpoint(tmp_path / "run") / "trainer.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    rows = metrics(tmp_path / "run")
    with pytest.raises(DataError, match=r"step-000002: trainer.pt has .* bytes, and had .*delete them to begin anew"):
        resume(tiny_agent_folder, tmp_path / "run", uri)
    assert metrics(tmp_path / "run") == rows
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("content", [b"", b"half of a", None])
def test_a_checkpoint_without_checksums_that_cannot_be_read_is_an_error(content, tiny_agent_folder, tmp_path, uri):
    """As older versions wrote them."""
    start(tiny_agent_folder, tmp_path / "run", uri, 3)
    state = last_checkpoint(tmp_path / "run") / "trainer.pt"
    state.with_name("files.json").unlink()
    state.write_bytes(state.read_bytes()[:-1000] if content is None else content)
    rows = metrics(tmp_path / "run")
    with (
        pytest.warns(UserWarning, match="without checksums"),
        pytest.raises(DataError, match="delete it to resume from an older one"),
    ):
        resume(tiny_agent_folder, tmp_path / "run", uri)
    assert metrics(tmp_path / "run") == rows


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# -- a real process, killed for real ---------------------------------------------------------------


def launch(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", "from carl_gym.training.cli import main; main()", *words],
            env=environment,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def steps_logged(folder: Path) -> int:
    """The last step of which a complete line exists; -1 while there is none."""
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") - 1 if path.is_file() else -1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_9_in_the_middle_of_a_step_then_resume_gives_the_weights_of_a_run_that_was_never_stopped(
    tiny_agent_folder, tmp_path
):
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    for folder in (one, two):
        folder.parent.mkdir()
    log_one, log_two = one.parent / "log.txt", two.parent / "log.txt"
    uninterrupted = launch(arguments(tiny_agent_folder, one), log_one)
    killed = launch(arguments(tiny_agent_folder, two), log_two)
    try:
        while steps_logged(two) < 3:  # step 2 has a checkpoint, step 3 has none
            assert killed.poll() is None, log_two.read_text(encoding="utf-8")
            time.sleep(0.02)
        time.sleep(0.2)  # into step 4
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        assert not (two / "summary.json").exists()
        run_id = run_record(two)["run_id"]
        resumed = launch([*arguments(tiny_agent_folder, two), "--resume"], log_two)
        for process, log in ((resumed, log_two), (uninterrupted, log_one)):
            assert process.wait(timeout=300) == 0, log.read_text(encoding="utf-8")
    finally:
        for process in (uninterrupted, killed):
            process.kill()
    assert same_training(one, two)
    start, end = weights(tiny_agent_folder), weights(last_checkpoint(two))
    assert any(not torch.equal(start[name], end[name]) for name in start)
    rows = metrics(two)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert without_times(rows) == without_times(metrics(one))
    record = run_record(two)
    assert record["run_id"] == run_id
    logged = mlflow_steps(record["tracking_uri"], run_id)
    for name in set().union(*rows) - {"step"}:
        assert logged[name] == [int(row["step"]) for row in rows if name in row], name
