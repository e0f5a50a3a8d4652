"""Programs in several connected processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(processes: int, *command: object, sharded: bool = False) -> None:
    """Run a program in that many connected processes, as `torchrun` does, and `accelerate launch` with it."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    done = subprocess.run([*run, *map(str, command)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr.partition("Root Cause")[0][-6000:]
