"""From a path to a corpus: small files are read into memory, big ones are mapped from the cache folder."""

from __future__ import annotations

import shutil
from hashlib import blake2b
from pathlib import Path

from carl_gym.errors import DataError
from carl_gym.paths import cache_folder
from carl_gym.retrieval.corpus import Corpus, read_passages
from carl_gym.retrieval.mapped_corpus import FORMAT, MappedCorpus, map_corpus
from carl_gym.retrieval.retriever import Progress, silent

IN_MEMORY = 256 * 2**20
"""Bytes of plain text from which on a corpus is mapped."""

_GZIP = 4
"""How much smaller gzip makes English JSON, roughly: a .gz counts as this many times its size."""


def open_corpus(path: str | Path, mapped: bool | None = None, progress: Progress = silent) -> Corpus:
    """The corpus at a path.

    Args:
        path: JSON lines, plain or .gz (see `read_passages`), or a folder that `map_corpus` wrote.
        mapped: map a file (True) or read it into memory (False); None maps what has more than `IN_MEMORY` bytes.
            A mapped file is copied once into the cache folder, under a name that depends on its path, size and
            time of change.
        progress: told the passages that are mapped.

    Raises:
        DataError: there is nothing, or nothing that can be read; names the file and line.
    """
    path = Path(path)
    if path.is_dir():
        return MappedCorpus(path)
    folder = mapped_folder(path, mapped)
    if folder is None:
        return Corpus.load(path)
    if folder.is_dir():
        try:
            return MappedCorpus(folder)
        except DataError:
            shutil.rmtree(folder, ignore_errors=True)  # damaged; the file it was made from is at hand
    return map_corpus(read_passages(path), folder, progress, source=str(path))


def mapped_folder(path: Path, mapped: bool | None = None) -> Path | None:
    """The folder into which `open_corpus` maps a file; None for one that it reads into memory. Raises DataError where
    there is no file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: no such file or folder") from error
    size = status.st_size * (_GZIP if path.suffix == ".gz" else 1)
    if not (size > IN_MEMORY if mapped is None else mapped):
        return None
    key = f"{FORMAT} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return cache_folder() / f"corpus-{blake2b(key.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()}"
