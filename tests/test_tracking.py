"""The tracker against a real SQLite store, read back through MLflow's own client."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from carl_gym.errors import CarlGymError, ConfigError
from carl_gym.tracking.mlflow_tracker import MAX_PARAM_CHARS, MlflowTracker, flatten, git_tags

NAMES = [f"group/metric_{i}" for i in range(30)]


@pytest.fixture
def output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder; the working directory is elsewhere, so that anything dropped there is noticed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "runs" / "one"


def start(output_dir: Path, **settings) -> MlflowTracker:
    return MlflowTracker(None, "test", **{"output_dir": output_dir, "params": {"seed": 1}, **settings})


def history(tracker: MlflowTracker, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracker._client.get_metric_history(tracker.run_id, name))


def test_a_run_is_stored_beside_its_output_folder_and_nowhere_else(output_dir):
    with start(output_dir, params={"seed": 1, "card": {"turns": 8}}, tags={"source": "x"}, run_name="first") as tracker:
        tracker.log_step(0, {"rollout/reward": 0.5})
        tracker.log_step(1, {"rollout/reward": 0.75, "eval/em": 1})
    run = tracker._client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params == {"seed": "1", "card.turns": "8"}
    assert run.data.tags["source"] == "x"
    assert run.data.metrics == {"rollout/reward": 0.75, "eval/em": 1.0}
    assert history(tracker, "rollout/reward") == [(0, 0.5), (1, 0.75)]
    assert tracker.ui_command == f"mlflow ui --backend-store-uri sqlite:///{output_dir.parent / 'mlflow.db'}"
    assert not list(Path.cwd().iterdir())


def test_files_folders_and_mappings_become_artifacts(output_dir, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "tree.txt").write_text("a tree")
    tracker = start(output_dir)
    tracker.log_artifact(tmp_path / "pictures" / "tree.txt", "single")
    tracker.log_artifact(tmp_path / "pictures", "all")
    tracker.log_dict({"card": {"turns": 8}}, "config.json")
    stored = output_dir.parent / "mlartifacts" / tracker.run_id / "artifacts"
    assert (stored / "single" / "tree.txt").read_text() == "a tree"
    assert (stored / "all" / "tree.txt").read_text() == "a tree"
    assert '"turns": 8' in (stored / "config.json").read_text()


def test_a_resumed_run_keeps_the_first_value_of_steps_that_are_done_again(output_dir):
    first = start(output_dir)
    for step in range(5):
        first.log_step(step, {"reward": step, **({"eval/em": step} if step % 4 == 0 else {})})
    second = start(output_dir, run_id=first.run_id, params={"seed": 1, "new": 2})
    for step in range(3, 7):
        second.log_step(step, {"reward": step + 100, "eval/em": step + 100})
    assert second.run_id == first.run_id
    assert history(second, "reward") == [*((s, s) for s in range(5)), (5, 105), (6, 106)]
    assert history(second, "eval/em") == [(0, 0), (4, 4), (5, 105), (6, 106)]
    assert second._client.get_run(first.run_id).data.params == {"seed": "1", "new": "2"}


def test_a_half_written_step_is_completed_and_not_doubled(output_dir):
    """What a store without transactions leaves behind when its writer is killed inside a batch."""
    first = start(output_dir)
    first.log_step(0, dict.fromkeys(NAMES, 0.0))
    for name in NAMES[:7]:
        first._client.log_metric(first.run_id, name, 1.0, step=1)
    second = start(output_dir, run_id=first.run_id)
    second.log_step(1, dict.fromkeys(NAMES, 1.0))
    assert {name: history(second, name) for name in NAMES} == {name: [(0, 0.0), (1, 1.0)] for name in NAMES}


WRITER = """
import sys
from pathlib import Path
from carl_gym.tracking.mlflow_tracker import MlflowTracker

tracker = MlflowTracker(None, "test", output_dir=Path(sys.argv[1]), params={"seed": 1}, run_id=sys.argv[2])
for step in range(int(sys.argv[3]), 10**6):
    tracker.log_step(step, {f"group/metric_{i}": step for i in range(30)})
    print(step, flush=True)
"""


def test_steps_stay_whole_and_single_through_kills(output_dir):
    tracker = start(output_dir)
    delays = random.Random(0)
    done = -1
    for _ in range(3):
        redo_from = max(0, done - 2)  # the last checkpoint lies a few steps back
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(output_dir), tracker.run_id, str(redo_from)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert writer.stdout is not None
        for line in writer.stdout:
            done = int(line)
            if done >= redo_from + 20:
                break
        with suppress(subprocess.TimeoutExpired):  # the kill falls anywhere in the writing of a step
            writer.wait(timeout=delays.uniform(0, 0.02))
        writer.send_signal(signal.SIGKILL)
        done = max([done, *(int(line) for line in writer.stdout.read().split())])
        writer.wait()
        writer.stdout.close()
    resumed = start(output_dir, run_id=tracker.run_id)
    logged = {name: [step for step, _ in history(resumed, name)] for name in NAMES}
    assert Counter(logged[NAMES[0]]) == Counter(range(len(logged[NAMES[0]])))
    assert len(logged[NAMES[0]]) in (done + 1, done + 2)  # the last step may be stored but not yet announced
    assert all(steps == logged[NAMES[0]] for steps in logged.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_refused_and_nothing_of_the_step_logged(output_dir, value):
    tracker = start(output_dir)
    with pytest.raises(CarlGymError, match=r"step 3.*train/loss"):
        tracker.log_step(3, {"rollout/reward": 1.0, "train/loss": value})
    assert tracker._client.get_run(tracker.run_id).data.metrics == {}


def test_resuming_an_unknown_run_is_an_error_that_names_run_and_store(output_dir):
    with pytest.raises(ConfigError, match=r"'feedbeef'.*mlflow\.db.*--tracking-uri"):
        start(output_dir, run_id="feedbeef")


def test_resuming_with_other_parameters_is_an_error_that_names_them(output_dir):
    first = start(output_dir, params={"seed": 1, "learner": {"lr": 0.1}})
    with pytest.raises(ConfigError, match=r"learner\.lr: 0\.1 -> 0\.2"):
        start(output_dir, run_id=first.run_id, params={"seed": 1, "learner": {"lr": 0.2}})


def test_a_parameter_too_long_for_mlflow_is_refused_before_a_run_is_made(output_dir):
    with pytest.raises(ConfigError, match=r"'prompt'.*log_dict"):
        start(output_dir, params={"prompt": "x" * (MAX_PARAM_CHARS + 1)})
    assert not output_dir.parent.exists()


def test_more_parameters_than_mlflow_takes_at_once(output_dir):
    tracker = start(output_dir, params={f"p{i}": i for i in range(250)})
    assert len(tracker._client.get_run(tracker.run_id).data.params) == 250


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_error_inside_the_run_is_its_status(output_dir, error, status):
    tracker = start(output_dir)
    with pytest.raises(error), tracker:
        raise error
    assert tracker._client.get_run(tracker.run_id).info.status == status


def test_the_environment_variable_names_the_store_unless_a_uri_is_given(output_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/from_environment.db")
    assert start(output_dir).uri == f"sqlite:///{tmp_path}/from_environment.db"
    given = f"sqlite:///{tmp_path}/given.db"
    assert MlflowTracker(given, "test", output_dir=output_dir, params={}).uri == given


def test_flatten_joins_nested_names_by_dots():
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": (1, 2)}, "f": {}}) == {"a": 1, "b.c.d": 2, "b.e": (1, 2)}


def test_git_tags_name_commit_and_changes_of_the_checkout_only(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "errors.py").write_text("")
    assert git_tags(package) == {}, "no repository"
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert git_tags(package) == {}, "a package that was only installed inside of somebody's repository"
    git("add", ".")
    git("commit", "-m", "second")
    commit = {"mlflow.source.git.commit": git("rev-parse", "HEAD")}
    assert git_tags(package) == {**commit, "mlflow.source.git.dirty": "false"}
    (package / "errors.py").write_text("changed = True")
    assert git_tags(package) == {**commit, "mlflow.source.git.dirty": "true"}
