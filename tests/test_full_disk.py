"""A full disk elsewhere than at a checkpoint, which test_preemption.py has: an error that says where and what to do."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from carl_gym.agents.weight_transfer import DiskTransfer
from carl_gym.console import run_command
from carl_gym.errors import PolicyError


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_command_that_meets_a_full_disk_ends_with_2_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: print("x", file=open("/dev/full", "w", buffering=1)))  # noqa: SIM115
    assert "No space left on device. Make room, and start the command again" in capsys.readouterr().err


def test_other_errors_of_files_keep_their_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        run_command(lambda: Path("/no/such/file").touch())


def test_weights_for_servers_that_find_no_room(tmp_path: Path) -> None:
    weights, transfer = {"w": torch.zeros(1 << 16)}, DiskTransfer(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(PolicyError, match=r"cannot be written to .*weights-one.*--weights-dir"):
            transfer.publish(weights, "one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    transfer.publish(weights, "two")
    assert [path.name for path in tmp_path.iterdir()] == ["weights-two.safetensors"]
