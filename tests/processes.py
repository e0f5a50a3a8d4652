"""Programs in several connected processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(processes: int, *command: object, settings: str = "ddp.yaml") -> None:
    """Run a program in that many connected processes, as docs/scaling.md has it.

    Args:
        settings: of the launcher, of the project or anywhere.
    """
    file = TESTS.parent / "scripts" / "configs" / settings
    run = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    run += ["--num_processes", str(processes), "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    done = subprocess.run([*run, *map(str, command)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr.partition("Root Cause")[0][-6000:]
