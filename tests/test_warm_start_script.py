"""scripts/warm_start.py end to end, on a training set far too small to learn from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from carl_gym.agents.agent import load_agent

ROOT = Path(__file__).resolve().parents[1]


def test_it_writes_a_folder_that_is_an_agent_from_any_working_directory(tmp_path: Path) -> None:
    output = tmp_path / "mine"
    small = ["--settings.worlds", "1", "--settings.traces-per-world", "40", "--settings.layers", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/warm_start.py", "--output", output, "--questions", "3", *small],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "held-out, temperature 0: EM" in done.stdout
    agent = load_agent(str(output))
    assert agent.model.config.num_hidden_layers == 1
    assert agent.card.prompt == load_agent("tiny").card.prompt
