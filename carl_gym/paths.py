"""Where cards are looked for and where built indexes go: the checkout first, then the installed package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The repository's root when the package runs from a checkout, else None."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "envs").is_dir() else None


def card_folders(kind: str) -> list[Path]:
    """Folders that may hold cards of a kind (`envs`, `agents`, `retrieval_index`), in order of precedence."""
    root = checkout()
    return ([root / kind] if root else []) + [PACKAGE / "_cards" / kind]


def cache_folder() -> Path:
    """Where built indexes live: `CARL_GYM_CACHE`, else the checkout's retrieval_index/, else the user's cache."""
    if path := os.environ.get("CARL_GYM_CACHE"):
        return Path(path).expanduser()
    if root := checkout():
        return root / "retrieval_index"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carl_gym"
