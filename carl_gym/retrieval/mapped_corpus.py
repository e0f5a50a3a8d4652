"""A corpus bigger than memory: passages in memory-mapped files, opened in milliseconds and shared by processes.

A folder holds titles and texts one after another (passages.bin), the ids likewise (ids.bin), where each string ends
(*.ends, int64), and two tables that find rows by the hash of an id or of a title. The manifest is written last, into
a folder that gets its name when it is whole.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from carl_gym.errors import CarlGymError, DataError
from carl_gym.retrieval.corpus import Corpus, Fingerprint, Passage, Shard, title_key
from carl_gym.retrieval.retriever import Progress, silent

FORMAT = 1
"""Raised whenever folders would be read differently."""

_REPORT = 10_000
"""Passages between two calls of `progress`."""


class MappedCorpus(Corpus):
    """Passages in a folder that `map_corpus` wrote. Behaves as the in-memory corpus of the same passages does.

    Nothing is read but what is asked for. Threads, forked and spawned processes share the mapped pages.

    Args:
        folder: what `map_corpus` wrote.

    Raises:
        DataError: the folder is incomplete, damaged, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = _manifest(self.folder)
        self.fingerprint = str(manifest["fingerprint"])
        count = int(manifest["count"])
        try:
            self.shard = Shard(**manifest["shard"]) if "shard" in manifest else None
            self._passages = _Strings(self.folder, "passages", 2 * count)
            self._ids = _Strings(self.folder, "ids", count)
            self._id_table = _Table(self.folder, "id", count)
            self._title_table = _Table(self.folder, "title", count)
        except (OSError, ValueError, KeyError, TypeError, CarlGymError) as error:
            raise DataError(
                f"{self.folder}: the mapped corpus is damaged ({error}); delete it and map again"
            ) from error

    def __reduce__(self) -> tuple[type[MappedCorpus], tuple[Path]]:
        return type(self), (self.folder,)

    def __iter__(self) -> Iterator[Passage]:
        return map(self._passage, range(len(self)))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, passage_id: str) -> Passage:
        row = self._row(passage_id)
        if row is None:
            raise KeyError(passage_id)
        return self._passage(row)

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and self._row(passage_id) is not None

    def by_title(self, title: str) -> Passage | None:
        """The first passage with this title, ignoring case and extra white space."""
        key = title_key(title)
        for row in self._title_table.rows(key):
            passage = self._passage(row)
            if title_key(passage.title) == key:
                return passage
        return None

    def _row(self, passage_id: str) -> int | None:
        return next((row for row in self._id_table.rows(passage_id) if self._ids[row] == passage_id), None)

    def _passage(self, row: int) -> Passage:
        return Passage(self._ids[row], self._passages[2 * row], self._passages[2 * row + 1])


def map_corpus(
    passages: Iterable[Passage],
    folder: str | Path,
    progress: Progress = silent,
    *,
    source: str = "corpus",
    total: int = 0,
    shard: Shard | None = None,
) -> MappedCorpus:
    """Write passages into a new folder, one by one: memory holds the hashes only, some 40 bytes of each.

    Args:
        passages: at least one, with unique ids; read once.
        folder: must not exist. It appears when everything is written; a killed run leaves a folder beside it that
            has another name, and that the next run deletes.
        progress: told what is done, how many passages, and out of how many (`total`).
        source: where the passages come from, for error messages.
        total: how many passages there will be, if that is known.
        shard: which part of a corpus the passages are, if they are one.

    Raises:
        DataError: no passages, an id that occurs twice, or a folder that cannot be written.
    """
    folder = Path(folder)
    _remove_left_over(folder)
    unfinished = _unfinished(folder, os.getpid())
    try:
        unfinished.mkdir(parents=True)
        _write(passages, unfinished, progress, source, total, shard)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was faster: the same passages are as good as ours, others are not.
            if MappedCorpus(folder).fingerprint != _manifest(unfinished)["fingerprint"]:
                raise DataError(f"{folder}: holds another corpus already; delete it or choose another folder") from None
    except OSError as error:
        raise DataError(
            f"{folder}: the passages cannot be mapped there ({error}); it needs a folder that can be written and has "
            "room, such as one named by CARL_GYM_CACHE"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return MappedCorpus(folder)


def _unfinished(folder: Path, pid: int | str) -> Path:
    """Where a process writes. (With the machine's name: others may share the disk, and number their own processes.)"""
    return folder.with_name(f".{folder.name}.{platform.node()}.{pid}")


def _remove_left_over(folder: Path) -> None:
    """Delete what killed processes of this machine, or an older one with our number, have left of their work."""
    prefix = _unfinished(folder, "").name
    for path in folder.parent.glob(".*"):
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdecimal() and (int(pid) == os.getpid() or not _runs(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def _write(
    passages: Iterable[Passage],
    folder: Path,
    progress: Progress,
    source: str,
    total: int,
    shard: Shard | None,
) -> None:
    fingerprint = Fingerprint()
    id_hashes, title_hashes = array("Q"), array("Q")
    with _StringWriter(folder, "passages") as texts, _StringWriter(folder, "ids") as ids:
        for passage in passages:
            fingerprint.add(passage)
            texts.write(passage.title)
            texts.write(passage.text)
            ids.write(passage.id)
            id_hashes.append(key_hash(passage.id))
            title_hashes.append(key_hash(title_key(passage.title)))
            if len(id_hashes) % _REPORT == 0:
                progress("mapping passages", len(id_hashes), total)
    if not id_hashes:
        raise DataError(f"{source}: the corpus is empty; it needs at least one passage")
    id_table = _save_table(folder, "id", id_hashes)
    _save_table(folder, "title", title_hashes)
    _refuse_repeated_ids(folder, id_table, source)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = {
        "format": FORMAT,
        "count": len(id_hashes),
        "fingerprint": shard.fingerprint if shard else fingerprint.hexdigest(),
        "files": files,
        **({"shard": asdict(shard)} if shard else {}),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    progress("mapping passages", len(id_hashes), len(id_hashes))


def _refuse_repeated_ids(folder: Path, hashes: npt.NDArray[np.uint64], source: str) -> None:
    """Only ids whose hashes are equal can be equal: few, so that they are compared one by one."""
    table, ids = _Table(folder, "id", len(hashes)), _Strings(folder, "ids", len(hashes))
    for hash_value in np.unique(hashes[1:][hashes[1:] == hashes[:-1]]):
        seen: set[str] = set()
        for row in table.rows_of_hash(hash_value):
            if ids[row] in seen:
                raise DataError(f"{source}: two passages have the id {ids[row]!r}; ids must be unique")
            seen.add(ids[row])


def _save_table(folder: Path, name: str, hashes: array[int]) -> npt.NDArray[np.uint64]:
    """Hashes ascending and the rows that they belong to, rows of equal hashes ascending."""
    values = np.frombuffer(hashes, np.uint64)
    order = np.argsort(values, kind="stable")
    np.save(folder / f"{name}_table.rows.npy", order.astype(np.int64))
    np.save(folder / f"{name}_table.hashes.npy", values := values[order])
    return values


class _Table:
    """From a key's hash to the rows that have it."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self._hashes = _load(folder / f"{name}_table.hashes.npy", np.uint64, count)
        self._rows = _load(folder / f"{name}_table.rows.npy", np.int64, count)

    def rows(self, key: str) -> Iterator[int]:
        """Rows, ascending, whose key may be this one: other keys can have the same hash."""
        return self.rows_of_hash(np.uint64(key_hash(key)))

    def rows_of_hash(self, value: np.uint64) -> Iterator[int]:
        """Rows, ascending, whose key has this hash."""
        i = int(np.searchsorted(self._hashes, value))
        while i < len(self._hashes) and self._hashes[i] == value:
            yield int(self._rows[i])
            i += 1


class _StringWriter:
    """Writes what `_Strings` reads."""

    def __init__(self, folder: Path, name: str) -> None:
        self._data, self._ends = (folder / f"{name}.bin").open("wb"), (folder / f"{name}.ends").open("wb")
        self._end = 0

    def write(self, text: str) -> None:
        """Append a string."""
        self._end += self._data.write(text.encode("utf-8", "surrogatepass"))
        self._ends.write(self._end.to_bytes(8, "little"))

    def __enter__(self) -> _StringWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()
        self._ends.close()


class _Strings(Sequence[str]):
    """Strings one after another in a file, decoded when they are asked for."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self._ends = np.asarray(np.memmap(folder / f"{name}.ends", "<i8", "r", shape=(count,)))
        with (folder / f"{name}.bin").open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # An empty file cannot be mapped: all strings are empty.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        if size != self._ends[-1]:
            raise ValueError(f"{name}.bin has {size} bytes instead of {self._ends[-1]}")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)}")
        i %= len(self)
        start = self._ends[i - 1] if i else 0
        return self._data[start : self._ends[i]].decode("utf-8", "surrogatepass")


def _manifest(folder: Path) -> dict[str, Any]:
    """What the folder should hold, after a look at the sizes of its files. Raises DataError."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        version = manifest["format"]
        wrong = [name for name, size in manifest["files"].items() if (folder / name).stat().st_size != size]
        manifest["count"], manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: no whole mapped corpus ({error}); delete it and map again") from error
    if version != FORMAT:
        raise DataError(f"{folder}: written in format {version}, expected {FORMAT}; delete it and map again")
    if wrong:
        raise DataError(f"{folder}: {wrong[0]} does not have the size it was written with; delete it and map again")
    return manifest


def _load(path: Path, dtype: type[np.generic], count: int) -> npt.NDArray[Any]:
    loaded = np.asarray(np.load(path, mmap_mode="r"))
    if loaded.dtype != dtype or loaded.shape != (count,):
        raise ValueError(f"{path.name} holds {loaded.dtype} {loaded.shape} instead of {np.dtype(dtype)} ({count},)")
    return loaded


def key_hash(key: str) -> int:
    """64 bits of an id or title, by which rows are found."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
