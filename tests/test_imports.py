"""What `import carl_gym` costs: heavy libraries are imported where they are used, never before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "transformers", "vllm", "mlflow", "jnius", "jpype", "pyserini", "datasets", "matplotlib", "faiss", "numba",
    "fastapi", "sentence_transformers", "trl", "verifiers",
}  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a new interpreter, started in the checkout, after the statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    root = Path(__file__).parents[1]
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import carl_gym",
        "import carl_gym, gymnasium\ngymnasium.spec('carl/HotpotQA-v0'), gymnasium.spec('carl/MiniWiki-v0')",
        "import gymnasium\ngymnasium.make('carl_gym:carl/MiniWiki-v0').reset(seed=0)",
        "import carl_gym.tracking.mlflow_tracker, carl_gym.tracking.tree_figure, carl_gym.tracking.curves",
        "import carl_gym.rollouts.collector, carl_gym.algorithms",
        "import carl_gym.agents.openai_policy",
    ],
)
def test_heavy_libraries_stay_out(statement):
    loaded = modules_after(statement)
    assert "carl_gym" in loaded
    assert not loaded & HEAVY
