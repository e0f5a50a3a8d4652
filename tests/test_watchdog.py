"""The watchdog names the process and the phase that hangs."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from training_runs import arguments, config

from carl_gym.agents.agent import load_agent
from carl_gym.training.trainer import Trainer
from carl_gym.training.watchdog import Watchdog


def test_what_takes_too_long_is_named_with_the_place_and_named_again(capfd: pytest.CaptureFixture[str]) -> None:
    dog = Watchdog("process 1 of 4", 0.3)
    with dog.watching(), dog.phase("update"):
        time.sleep(0.8)
    said = capfd.readouterr().err
    assert said.count("process 1 of 4 has been in 'update' for ") == 2
    assert "test_what_takes_too_long_is_named_with_the_place" in said


def test_many_short_phases_are_no_long_one(capfd: pytest.CaptureFixture[str]) -> None:
    dog = Watchdog("a process", 0.5)
    with dog.watching(), dog.phase("step"):
        for _ in range(8):
            with dog.phase("rollout"):
                time.sleep(0.1)
    time.sleep(0.7)  # nothing is watched any more
    assert capfd.readouterr().err == ""


def test_a_run_that_hangs_in_its_rollouts_says_so(tiny_agent_folder: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", steps=1, eval_questions=0, hang_seconds=0.5))
    sample, calls = trainer.agent.policy.sample, []

    def slow(requests):
        calls.append(len(requests))
        time.sleep(1.2 if len(calls) == 1 else 0)
        return sample(requests)

    monkeypatch.setattr(trainer.agent.policy, "sample", slow)
    list(trainer.run())
    assert "process 0 of 1 has been in 'rollout' for " in capfd.readouterr().err


def test_a_run_that_hangs_at_its_start_says_so(tiny_agent_folder: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    def slow(*arguments, **options):
        time.sleep(1.2)
        return load_agent(*arguments, **options)

    monkeypatch.setattr("carl_gym.training.trainer.load_agent", slow)
    Trainer(config(tiny_agent_folder, tmp_path / "run", hang_seconds=0.5))
    assert "process 0 of 1 has been in 'start' for " in capfd.readouterr().err


def test_a_process_that_waits_for_one_that_never_comes_says_so(tiny_agent_folder: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "train_carl.py"
    words = arguments(tiny_agent_folder, tmp_path / "run", hang_seconds=0.5)
    with socket.socket() as taken:  # so that nothing else listens there
        taken.bind(("127.0.0.1", 0))
        world = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **world, "MASTER_PORT": str(taken.getsockname()[1])}
        run = subprocess.Popen([sys.executable, script, *words], env=environment, stderr=subprocess.PIPE, text=True)
        limit = threading.Timer(240, run.kill)
        limit.daemon = True
        limit.start()
        with run:
            assert run.stderr is not None
            said = "".join(itertools.takewhile(lambda line: "launched" not in line, run.stderr))
            run.kill()
        limit.cancel()
    assert "process 1 of 2 has been in 'connecting to the other processes' for " in said
    assert "accelerate/state.py" in said, "where it is, down to our own call"


def test_the_thread_does_not_keep_a_process_alive() -> None:
    code = "from carl_gym.training.watchdog import Watchdog; dog = Watchdog('x', 100.0); dog.watching().__enter__()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60, check=False)
    assert done.returncode == 0
