"""Built indexes on disk: found again by what they depend on, whole or not there, checked when they are opened.

An index lies in `<cache folder>/<kind>-<hash>/`: manifest.json says what it is and how large its files are and what
they hash to; the files of the retriever are in index/ beside it. While it is built, `.building-<name>/` next to it
keeps the finished parts, so that a build which was killed goes on; a lock keeps processes that start together from
building it twice; a rename at the end makes it appear whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from carl_gym.errors import CarlGymError, RetrievalError
from carl_gym.paths import cache_folder
from carl_gym.retrieval.corpus import Corpus
from carl_gym.retrieval.retriever import Progress, Retriever, silent

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
"""Of the manifest and the layout of the folder."""

READERS = {"bm25": ("PyStemmer",), "lucene": ("pyserini",)}
"""Packages whose versions decide how an index is written and read, by kind. faiss is not among them: it reads what its
older versions wrote, and encoding a large corpus anew takes days."""

RECORDED = ("bm25s", "PyStemmer", "faiss-cpu", "numpy", "pyserini", "sentence-transformers", "torch", "transformers")
"""Packages whose versions the manifest records."""


def index_folder(kind: str, cls: type[Retriever], settings: Any, corpus: Corpus) -> Path:
    """Where the built index of a corpus belongs: equal folders mean equal indexes.

    Args:
        kind: as in the card.
        cls: the class of that kind.
        settings: an instance of its `Settings`.
        corpus: what is indexed.
    """
    key = {
        "format": FORMAT_VERSION,
        "class_format": cls.FORMAT_VERSION,
        "kind": kind,
        "settings": {name: v for name, v in asdict(settings).items() if name not in cls.SEARCH_SETTINGS},
        "corpus": corpus.fingerprint,
        "libraries": _versions(READERS.get(kind, ())),
    }
    digest = blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return cache_folder() / f"{re.sub('[^A-Za-z0-9]+', '-', kind)}-{digest}"


def open_or_build(
    kind: str, cls: type[Retriever], settings: Any, corpus: Corpus, progress: Progress = silent
) -> Retriever:
    """The retriever whose index is on disk, built first if it is not there or damaged (with a warning).

    Arguments as for `index_folder`.

    Raises:
        RetrievalError: the cache folder cannot be written.
        CarlGymError: whatever the class's `build` and `load` raise on purpose.
    """
    folder = index_folder(kind, cls, settings, corpus)
    if found := _open(folder, cls, settings, corpus):
        return found
    try:
        locks = folder.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with _locked(locks / folder.name, progress):
            # Another process may have built it while this one waited.
            if found := _open(folder, cls, settings, corpus, warn=False):
                return found
            _build(folder, kind, cls, settings, corpus, progress)
    except OSError as error:
        raise RetrievalError(
            f"{folder.parent}: the index cannot be built there ({error}); make room, set CARL_GYM_CACHE to a folder "
            "that can be written, or cache = false in the index card"
        ) from error
    if not (found := _open(folder, cls, settings, corpus)):
        raise RetrievalError(f"{folder}: the index that was just built cannot be read; is the disk sound?")
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a built index, after a check that its files are there in their full size.

    Raises:
        RetrievalError: names the file that is missing, cut short or unreadable.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RetrievalError(f"{folder / MANIFEST}: no manifest of a built index ({error!r})") from error
    for name, size in sizes.items():
        path = folder / "index" / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            raise RetrievalError(f"{path}: {'missing' if actual is None else f'{actual} bytes'}, expected {size} bytes")
    return manifest


def verify_index(folder: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Read every file of a built index and compare it with the manifest's checksum. Returns the manifest.

    Raises:
        RetrievalError: names every file that is not what was written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wrong = []
    total, done = sum(entry["bytes"] for entry in manifest["files"].values()), 0
    for name, entry in manifest["files"].items():
        if _checksum(folder / "index" / name) != entry["blake2b"]:
            wrong.append(name)
        done += entry["bytes"]
        progress("verifying", done, total)
    if wrong:
        raise RetrievalError(f"{folder / 'index'}: changed since it was built: {', '.join(wrong)}; delete {folder}")
    return manifest


def _open(folder: Path, cls: type[Retriever], settings: Any, corpus: Corpus, *, warn: bool = True) -> Retriever | None:
    """The retriever of a built index; None if there is none or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        read_manifest(folder)
    except RetrievalError as error:
        reason = str(error)
    else:
        try:
            return cls.load(folder / "index", corpus, settings)
        except CarlGymError:
            raise  # the index is not to blame: a package is missing, or a setting cannot work here
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            reason = f"{folder}: {error!r}"
    if warn:
        warnings.warn(f"damaged index, building it again: {reason}", stacklevel=4)
    return None


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """One process at a time: the others wait, and say so."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another process that builds this index", 0, 1)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def work_folder(folder: Path) -> Path:
    """Where the finished parts of an index that belongs in `folder` are kept while it is built."""
    return folder.with_name(f".building-{folder.name}")


def _build(folder: Path, kind: str, cls: type[Retriever], settings: Any, corpus: Corpus, progress: Progress) -> None:
    work = work_folder(folder)
    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)  # saved by a build that was killed while it saved
    (work / "parts").mkdir(parents=True, exist_ok=True)
    retriever = cls.build(corpus, settings, work=work / "parts", progress=progress)
    (whole / "index").mkdir(parents=True)
    retriever.save(whole / "index")
    files = {
        path.relative_to(whole / "index").as_posix(): {"bytes": path.stat().st_size, "blake2b": _checksum(path)}
        for path in _files(whole / "index")
    }
    manifest = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "class_format": cls.FORMAT_VERSION,
        "settings": {name: v for name, v in asdict(settings).items() if name not in cls.SEARCH_SETTINGS},
        "corpus": corpus.identity(),
        "libraries": _versions(RECORDED),
        "carl_gym": _versions(["carl-gym"]).get("carl-gym", "unknown"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    (whole / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync_tree(whole)
    if folder.exists():  # damaged
        shutil.rmtree(folder)
    os.rename(whole, folder)
    sync(folder.parent)
    shutil.rmtree(work, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _checksum(path: Path) -> str:
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_tree(folder: Path) -> None:
    """`sync` for a folder and all that it holds."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Make sure that a file's content or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # not every package is installed everywhere
    return found
