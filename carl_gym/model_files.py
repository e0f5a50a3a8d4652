"""What the folder of a model may bring: settings and weights, which are data. Code, and pickles that can hold some, are
refused before anything else of the folder is read.

Asked by all that loads models: agents (agents/agent.py, scripts/serve_agent.py) and encoders (retrieval/encoders.py).
The loaders are told the same (`trust_remote_code=False`, `use_safetensors=True`); here a folder is refused as a whole
and the user learns why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
"""Files whose `auto_map` says which code in the folder transformers should import."""
MODULES = "modules.json"
"""Which classes a sentence-transformers model is made of, and in which folders their weights are."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that torch unpickles."""


def brings_code(source: str) -> str:
    """Why a model, adapter or encoder is not loaded; "" where nothing of it is code.

    Args:
        source: its folder or hub id. Of a hub id the settings are looked at, as far as they can be had; its weights are
            the loader's affair.
    """
    return next(_reasons(source), "")


def _reasons(source: str) -> Iterator[str]:
    for name in SETTINGS:
        settings = _settings(source, name)
        if isinstance(settings, dict) and settings.get("auto_map"):
            yield (
                f"{name} of {source!r} asks for code of its own (auto_map), and code from models is never run. If "
                "transformers has the architecture itself, delete auto_map in a copy of the folder; else take another "
                "model"
            )
    modules = [module for module in _settings(source, MODULES) or () if isinstance(module, dict)]
    for module in modules:
        if not str(module.get("type")).startswith("sentence_transformers."):
            yield (
                f"{MODULES} of {source!r} asks for code of its own ({module.get('type')!r}), and code from models is "
                "never run; expected classes of sentence_transformers"
            )
    folder = Path(source)
    if folder.is_dir():
        for part in ("", *(str(module.get("path", "")) for module in modules)):
            yield from _pickles(folder, part)


def _pickles(folder: Path, part: str) -> Iterator[str]:
    """Why the weights in a folder of a model are not read: there are pickles only, or the index names other files."""
    if not _stays_inside(part):
        yield f"{MODULES} in {folder} names the folder {part!r}; expected one inside of it"
        return
    files = sorted(path.name for path in (folder / part).glob("*") if path.is_file())
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in files):
        yield (
            f"the weights in {folder / part} are {pickles[0]}, a format that can run code when it is loaded; only "
            "safetensors are read. Get a version with model.safetensors, or convert it where you trust it "
            "(save_pretrained of transformers writes safetensors)"
        )
    for name in files:
        if name.endswith(".safetensors.index.json"):
            index = _settings(str(folder / part), name)
            named = index.get("weight_map") if isinstance(index, dict) else None
            for shard in {str(shard) for shard in named.values()} if isinstance(named, dict) else ():
                if not (shard.endswith(".safetensors") and _stays_inside(shard)):
                    yield f"{folder / part / name} names {shard!r}; expected safetensors files beside it"


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _settings(source: str, name: str) -> Any:
    """What a JSON file of a folder or hub id holds; None where there is none, or none that can be read: the loader will
    say so."""
    path: str | Path | None = Path(source) / name
    if not Path(source).is_dir():
        from transformers.utils import cached_file  # slow to import, and folders do without

        try:
            path = cached_file(
                source,
                name,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError):  # no hub id
            return None
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
