"""What becomes of a run whose MLflow store is away for a while, or does not answer: a real server, and SQLite."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import config, metrics, mlflow_steps, run_record

from benchmarks.servers import Server, mlflow_server
from carl_gym.errors import ConfigError
from carl_gym.tracking.mlflow_tracker import MlflowTracker
from carl_gym.training.trainer import Trainer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    (tmp_path / "server").mkdir()
    running = mlflow_server(tmp_path / "server")
    try:
        running.ready()
        yield running
    finally:
        running.signal(signal.SIGKILL)


def start(uri: str, output_dir: Path, **settings: object) -> MlflowTracker:
    return MlflowTracker(uri, "test", output_dir=output_dir, params={"seed": 1}, **settings)


def test_what_a_server_missed_is_made_up_for(server: Server, tmp_path: Path) -> None:
    values = [{"reward": float(step), "eval/em": 1.0} for step in range(7)]
    one, two = start(server.url, tmp_path / "one"), start(server.url, tmp_path / "two")
    for tracker in (one, two):
        tracker.log_step(0, values[0])

    # It hangs: what was sent to it arrives later, and is sent again.
    server.signal(signal.SIGSTOP)
    with pytest.warns(UserWarning, match="does not take step 1: .*The run goes on") as said:
        one.log_step(1, values[1])
        one.log_step(2, values[2])
    assert len(said) == 1, "once per outage, and the second step did not wait for the server"
    server.signal(signal.SIGCONT)
    with pytest.warns(UserWarning, match="is back, and has what it lacked"):
        one.finish()

    # It is gone, and comes back while one run is at it; the other has ended by then.
    server.signal(signal.SIGKILL)
    with pytest.warns(UserWarning) as said:
        two.log_step(1, values[1])
        (tmp_path / "note.txt").write_text("a note")
        two.log_artifact(tmp_path / "note.txt")
        two.finish()
    assert "lacks step 1 to the status FINISHED (3 in all)" in str(said[-1].message)
    assert "the same command with --resume adds it" in str(said[-1].message)
    with pytest.raises(ConfigError, match=r"MLflow cannot use the store.*is it up\?"):
        start(server.url, tmp_path / "three")
    server.ready()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two = start(server.url, tmp_path / "two", run_id=two.run_id)
        two.log_rows([{"step": step, **values[step]} for step in range(3)])
        two.finish()
    for tracker in (one, two):
        run = tracker._client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert mlflow_steps(server.url, tracker.run_id) == {"reward": [0, 1, 2], "eval/em": [0, 1, 2]}


def test_a_run_whose_sqlite_store_is_locked_goes_on_and_resuming_it_adds_the_rest(
    tiny_agent_folder: Path, tmp_path: Path
) -> None:
    folder, store = tmp_path / "run", tmp_path / "mlflow.db"
    options = {"tracking_uri": f"sqlite:///{store}", "steps": 2, "save_every": 1}
    run = Trainer(config(tiny_agent_folder, folder, **options)).run()
    next(run)
    with contextlib.closing(sqlite3.connect(store)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.warns(UserWarning) as said:
            assert len(list(run)) == 2
    assert "does not take step 1: " in str(said[0].message)
    assert "the same command with --resume adds it" in str(said[-1].message)
    assert (folder / "summary.json").is_file()
    run_id = run_record(folder)["run_id"]
    assert set(map(tuple, mlflow_steps(options["tracking_uri"], run_id).values())) == {(0,)}
    assert list(Trainer(config(tiny_agent_folder, folder, resume=True, **options)).run()) == []
    logged = mlflow_steps(options["tracking_uri"], run_id)
    for name in set().union(*metrics(folder)) - {"step"}:
        assert logged[name] == [int(row["step"]) for row in metrics(folder) if name in row], name
