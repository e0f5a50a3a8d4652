"""Several real processes train as one would, whatever each of them has to do."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_worker import train
from safetensors.torch import load_file

from carl_gym import make_task
from carl_gym.agents.agent import load_agent
from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.rollouts.collector import collect
from carl_gym.training.ranks import ALONE, Ranks, launched
from carl_gym.training.segments import Row, rows, segments

TESTS = Path(__file__).parent
STEPS = 5


def launch(processes: int, *command: object) -> None:
    """Run a program in that many connected processes, as `accelerate launch` and `torchrun` do."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    done = subprocess.run([*run, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr.partition("Root Cause")[0][-6000:]


@pytest.fixture(scope="module")
def trees_of_rows(tiny_agent_folder: Path) -> list[list[list[Row]]]:
    """For every step the rows of six trees of CARL's, with the weights that they have together."""
    agent = load_agent(str(tiny_agent_folder), device="cpu")
    task, algorithm = make_task("carl/MiniWiki-v0", questions=6), get_algorithm("carl", initial=2, forks=5)
    found = []
    for step in range(STEPS):
        questions = list(task.questions.values())
        trees = collect(task, agent.policy, agent.transcript, questions, algorithm.explorer, seed=3, step=step)
        parts = zip(
            trees, algorithm.credit(trees), token_weights(trees, algorithm.selection(trees), "action"), strict=True
        )
        found.append([rows(segments(*part)) for part in parts])
    return found


@pytest.fixture(scope="module")
def alone(
    tiny_agent_folder: Path, trees_of_rows: list[list[list[Row]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one process makes of them."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "rows.pickle").write_bytes(pickle.dumps(trees_of_rows))
    train(ALONE, tiny_agent_folder, folder / "rows.pickle", folder / "alone")
    return folder / "alone"


def uneven(trees: list[list[Row]], step: int, processes: int) -> list[list[Row]]:
    """Shares of a step: the first process has most of it, and the last one nothing in every other step."""
    shares: list[list[Row]] = [[] for _ in range(processes)]
    for number, tree in enumerate(trees):
        owner = max(0, number - len(trees) + processes)
        shares[owner if step % 2 or owner < processes - 1 else 0] += tree
    return shares


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_learn_what_one_would(processes, tiny_agent_folder, trees_of_rows, alone, tmp_path):
    shares = [uneven(trees, step, processes) for step, trees in enumerate(trees_of_rows)]
    assert [not step[-1] for step in shares] == [True, False, True, False, True]
    (tmp_path / "shares.pickle").write_bytes(pickle.dumps(shares))
    launch(processes, TESTS / "rank_worker.py", tiny_agent_folder, tmp_path / "shares.pickle", tmp_path)
    start = dict(load_agent(str(tiny_agent_folder), device="cpu").model.named_parameters())
    expected = load_file(alone.with_suffix(".safetensors"))
    moved = torch.stack([(expected[name] - start[name]).norm() for name in expected]).norm()
    for kind in ("ddp", "fsdp"):
        found = load_file(tmp_path / f"{kind}-{processes}.safetensors")
        assert found.keys() == expected.keys()
        away = torch.stack([(found[name] - expected[name]).norm() for name in expected]).norm()
        size = torch.stack([value.norm() for value in expected.values()]).norm()
        assert away <= 1e-5 * size, kind
        assert away <= 1e-2 * moved, kind  # AdamW makes steps of rounding where a gradient is no more than that
        metrics = pickle.loads((tmp_path / f"{kind}-{processes}.pickle").read_bytes())
        for one, other in zip(metrics, pickle.loads(alone.with_suffix(".pickle").read_bytes()), strict=True):
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
            assert one.loss == pytest.approx(other.loss, abs=1e-5)
            assert one.entropy == pytest.approx(other.entropy, rel=1e-4)
            assert one.gap == pytest.approx(other.gap, rel=1e-2, abs=1e-4)
            assert one.clip_fraction == pytest.approx(other.clip_fraction, abs=1e-2)


def test_a_process_without_a_launcher_is_alone():
    assert launched() is ALONE
    assert (ALONE.mine([1, 2]), ALONE.gather([1, 2]), ALONE.agree("x"), ALONE.total(1.0, 2.0)) == (
        [1, 2],
        [1, 2],
        "x",
        [1.0, 2.0],
    )


def test_shares_are_every_so_many_th_item():
    assert [Ranks(index, 3).mine("abcdefg") for index in range(3)] == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
