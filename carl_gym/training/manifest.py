"""What the files of a checkpoint were when they were written, so that a run does not go on with damaged ones.

A flipped bit in weights loads like any other. Every checkpoint therefore holds sizes and checksums of its files, which
are compared before a run is resumed. A damaged checkpoint is set aside, with a warning, for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from carl_gym.errors import DataError
from carl_gym.files import write_json

MANIFEST = "files.json"
DAMAGED = "damaged-"
"""What a damaged checkpoint's name begins with from then on."""


def write_manifest(folder: Path) -> None:
    """Write down the sizes and checksums of all files in a folder, in a file of its own."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = (path.relative_to(folder).as_posix() for path in files)
    entries = ({"bytes": path.stat().st_size, "sha256": _checksum(path)} for path in files)
    write_json(folder / MANIFEST, dict(zip(names, entries, strict=True)))


def damage(folder: Path) -> str:
    """Which file of a folder is not what the manifest says, and how; "" if all are, or there is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return ""
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(path.read_bytes()).items()}
        for name, (size, digest) in expected.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes, and had {size:,} when it was written"
            if _checksum(folder / name) != digest:
                return f"{name} has other contents than when it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return ""


def without_damaged(folders: Sequence[Path]) -> list[Path]:
    """Checkpoints up to the newest whose files are what was written; later ones are set aside under another name.

    Args:
        folders: oldest first.

    Raises:
        DataError: there are checkpoints, and none of them is whole. They are left where they are.
    """
    found: dict[Path, str] = {}
    for folder in reversed(folders):
        if not (problem := damage(folder)):
            break
        found[folder] = problem
    if folders and len(found) == len(folders):
        listed = "; ".join(f"{folder}: {problem}" for folder, problem in found.items())
        raise DataError(f"no checkpoint to resume from is whole ({listed}); delete them to begin anew")
    whole = list(folders[: len(folders) - len(found)])
    for folder, problem in found.items():
        aside = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        warnings.warn(
            f"{folder} is damaged ({problem}). The run goes on from {whole[-1].name}, and the damaged one is now "
            f"{aside.name}: delete it when you have looked at it",
            stacklevel=2,
        )
    if whole and not (whole[-1] / MANIFEST).is_file():
        warnings.warn(
            f"{whole[-1]} was written without checksums, by an older version: damage would not be noticed", stacklevel=2
        )
    return whole


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
