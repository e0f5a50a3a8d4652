"""Evaluations that are killed and go on: every finished episode is kept, and the result is that of one run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_judge import Endpoint, compares

from carl_gym.errors import ConfigError, DataError
from carl_gym.evaluation.store import EpisodeStore, differences, read_episodes
from scripts.evaluate import main

ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "output_dir", "resume", "chunk"}


def options(folder: Path, *more: str) -> list[str]:
    asked = ("--env", "carl/MiniWiki-v0", "--questions", "150", "--samples", "6")
    return ["--agents", "random", "heuristic", *asked, "--output-dir", str(folder), *more]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text("utf-8").splitlines()]


def without_times(value: Any) -> Any:
    """A result without what depends on the clock and on how it was started."""
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def summary(folder: Path) -> Any:
    return without_times(json.loads((folder / "summary.json").read_text("utf-8")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody interrupted."""
    folder = tmp_path_factory.mktemp("evaluations") / "whole"
    main(options(folder))
    return folder


def cut(whole: Path, folder: Path, size: int) -> None:
    """What a kill leaves of that evaluation: its config and the first bytes of its episodes."""
    folder.mkdir()
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    (folder / "episodes.jsonl").write_bytes((whole / "episodes.jsonl").read_bytes()[:size])


def test_a_killed_evaluation_goes_on_and_ends_like_one_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *options(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        episodes = folder / "episodes.jsonl"
        while process.poll() is None and not (episodes.exists() and episodes.stat().st_size):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    there = len(list(read_episodes(episodes)))
    assert 0 < there < len(lines(whole)) and not (folder / "summary.json").exists()
    main(options(folder, "--resume"))
    assert without_times(lines(folder)) == without_times(lines(whole))
    assert summary(folder) == summary(whole)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.31, 0.5, 0.77, 0.9999, 1.0])
def test_it_goes_on_from_any_byte(
    whole: Path, tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cut"
    cut(whole, folder, int(share * (whole / "episodes.jsonl").stat().st_size))
    kept = list(read_episodes(folder / "episodes.jsonl"))
    main(options(folder, "--resume", "--chunk", "100"))
    assert without_times(lines(folder)) == without_times(lines(whole)) and summary(folder) == summary(whole)
    assert list(read_episodes(folder / "episodes.jsonl"))[: len(kept)] == kept, "what was there stays as it was"
    assert ("resumed at" in capsys.readouterr().out) == bool(kept)


def test_a_finished_evaluation_plays_nothing_again(whole: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "again"
    cut(whole, folder, (whole / "episodes.jsonl").stat().st_size)
    before = (folder / "episodes.jsonl").read_bytes()
    main(
        options(folder, "--resume", "--chunk", "7", "--price-in", "1", "--price-out", "2")
    )  # what is only reported may change
    assert (folder / "episodes.jsonl").read_bytes() == before
    assert "EM (avg@6) %" in capsys.readouterr().out


def test_a_model_is_not_loaded_when_its_episodes_are_there(tiny_agent_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    asked = ("--env", "carl/MiniWiki-v0", "--questions", "4", "--device", "cpu", "--output-dir", str(folder))
    main(["--agents", str(tiny_agent_folder), *asked])
    weights = tiny_agent_folder / "model.safetensors"
    hidden = weights.rename(weights.with_name("hidden"))
    try:
        main(["--agents", str(tiny_agent_folder), *asked, "--resume"])
    finally:
        hidden.rename(weights)


def test_a_verdict_is_not_paid_for_twice(tmp_path: Path) -> None:
    endpoint = Endpoint(compares)
    try:
        asked = [
            "--agents",
            "heuristic",
            "--env",
            "carl/MiniWiki-v0",
            "--questions",
            "300",
            "--judge",
            endpoint.url,
            "m",
        ]
        main([*asked, "--output-dir", str(tmp_path / "one")])
        needed = len(endpoint.requests)
        stored = (tmp_path / "one" / "episodes.jsonl").read_bytes()
        folder = tmp_path / "two"
        cut(tmp_path / "one", folder, stored.find(b"\n", len(stored) // 2) + 1)
        later = {(e["question"], e["answer"]) for e in lines(tmp_path / "one")[len(lines(folder)) :] if e["answer"]}
        main([*asked, "--output-dir", str(folder), "--resume"])
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
    assert 0 < len(later) < needed and len(endpoint.requests) - needed == len(later)
    assert summary(folder) == summary(tmp_path / "one")


def test_mlflow_runs_go_on(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    asked = ["--agents", "random", "--env", "carl/MiniWiki-v0", "--questions", "20", "--experiment", "resumed"]
    main([*asked, "--output-dir", str(tmp_path / "out")])
    stored = (tmp_path / "out" / "episodes.jsonl").read_bytes()
    (tmp_path / "out" / "episodes.jsonl").write_bytes(stored[: len(stored) // 2])
    main([*asked, "--output-dir", str(tmp_path / "out"), "--resume"])
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("resumed").experiment_id])
    assert run.info.status == "FINISHED" and "eval/sampled_em" in run.data.metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--seed", "1"), "seed: 0 -> 1"),
        (("--temperature", "0.5"), "temperature: 1.0 -> 0.5"),
        (("--samples", "7"), "samples: 6 -> 7"),
        (("--env-args", "top_k=4"), "settings.carl/MiniWiki-v0.top_k: 3 -> 4"),
        (("--world", "1"), "settings.carl/MiniWiki-v0.corpus_fingerprint"),
        (("--agents", "random"), "agents: ['random', 'heuristic'] -> ['random']"),
    ],
)
def test_another_evaluation_is_not_resumed(
    whole: Path, change: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        main(options(whole, "--resume", *change))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no evaluation to resume"):
        EpisodeStore(tmp_path / "none", {}, resume=True)
    (tmp_path / "config.json").write_text("{half", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        EpisodeStore(tmp_path, {}, resume=True)


def test_an_evaluation_that_never_began_is_not_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that cannot be loaded fails after the folder was made; the same command may be given again."""
    (tmp_path / "model").mkdir()
    asked = ["--env", "carl/MiniWiki-v0", "--questions", "5", "--output-dir", str(tmp_path / "out")]
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["--agents", str(tmp_path / "model"), *asked])
        assert "no usable model" in capsys.readouterr().err
    assert (tmp_path / "out" / "episodes.jsonl").stat().st_size == 0
    main(["--agents", "random", *asked])
    assert {line["agent"] for line in lines(tmp_path / "out")} == {"random"}
    with pytest.raises(ConfigError, match="not an empty folder"):
        EpisodeStore(tmp_path / "out", {}, resume=False)


def test_two_processes_cannot_write_into_one_folder(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "out", {"a": 1}, resume=False) as first:
        first.open()
        with (
            EpisodeStore(tmp_path / "out", {"a": 1}, resume=True) as second,
            pytest.raises(ConfigError, match="another process evaluates into"),
        ):
            second.open()
    with EpisodeStore(tmp_path / "out", {"a": 1}, resume=True) as third:
        third.open()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{half\n", "line 3: no line of an evaluation"),
        ("[]\n", "line 3: no line of an evaluation"),
        ('{"env": "e", "agent": "a", "seconds": 1}\n', "line 3: no episode of this version"),
        ("first", "line 3: this episode is there already"),
    ],
)
def test_damage_before_the_last_line_is_named(whole: Path, tmp_path: Path, line: str, message: str) -> None:
    stored = (whole / "episodes.jsonl").read_text("utf-8").splitlines(keepends=True)
    path = tmp_path / "episodes.jsonl"
    path.write_text("".join([*stored[:2], stored[0] if line == "first" else line, *stored[2:4]]), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(read_episodes(path))


def test_differences_are_named_by_their_place() -> None:
    one, other = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}, {"a": 1, "b": {"c": 5, "d": 3}, "f": 6, "e": 4}
    assert differences(one, other) == ["b.c: 2 -> 5", "f: None -> 6"]
    assert differences(one, other, ignore=("c", "f")) == []
