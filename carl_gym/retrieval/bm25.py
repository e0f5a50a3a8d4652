"""BM25 over title and text: Lucene's analysis and scores, worked out when the index is built.

An index is a matrix of scores, passage by term, stored by term: for each term the rows that hold it, ascending, and
what it is worth there. A search adds up the columns of its terms. The files are those of the library bm25s, which can
open them (`bm25s.BM25.load`); a loaded index is memory-mapped, so that processes share it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from carl_gym.cards import bounded
from carl_gym.errors import RetrievalError
from carl_gym.retrieval.analysis import Encoder, QueryEncoder
from carl_gym.retrieval.builder import sync, sync_tree
from carl_gym.retrieval.corpus import Corpus
from carl_gym.retrieval.retriever import Progress, Retriever, SearchResults, check_k, silent

if TYPE_CHECKING:
    from types import ModuleType

    from carl_gym.retrieval.bm25_columns import Columns

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
S = TypeVar("S", bound=np.generic)

PART_TOKENS = 4_000_000
"""How many tokens are counted at once while an index is built: some 200 MB of memory."""

KERNEL_WORK = 100_000
"""The compiled kernel is imported where queries x passages reach this: below, it would never pay."""


COLUMNS_FROM = 40_000
COLUMNS_K = 2000
"""From how many passages on, and for how many results at most (one in so many passages), coarse scores come first."""


@dataclass(frozen=True, slots=True)
class BM25Settings:
    """What a BM25 recipe may set.

    Attributes:
        k1: how slowly a repeated term saturates.
        b: how strongly long passages are discounted.
        title_weight: how often a passage's title counts, beside its text.
    """

    k1: float = bounded(0.0, 10.0, 0.9)
    b: float = bounded(0.0, 1.0, 0.4)
    title_weight: int = bounded(1, 10, 1)


class Index(NamedTuple):
    """The matrix of scores by term (bm25s' CSC layout), and the terms.

    Attributes:
        data: scores, all above 0.
        indices: the passage's row of each score; ascending within a term.
        indptr: term t has the scores `indptr[t]` to `indptr[t + 1]`.
        vocabulary: terms and their numbers.
    """

    data: Floats
    indices: Ints
    indptr: Longs
    vocabulary: dict[str, int]


class BM25(Retriever):
    """Scores passages by BM25 (Lucene's variant, exact lengths).

    Only passages that share a term with the query are found; ties keep the corpus' order. Thread-safe, fork-safe, and
    spawned processes map the files of a loaded index again.
    """

    Settings = BM25Settings
    FORMAT_VERSION = 2

    def __init__(
        self,
        corpus: Corpus,
        settings: BM25Settings | None = None,
        *,
        index: Index | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(corpus, settings)
        self._index = build_index(corpus, self.settings) if index is None else index
        self._folder = folder
        self._is_sound = folder is None
        self._ids = corpus.ids
        self._encode = QueryEncoder(self._index.vocabulary)
        self._highest = np.zeros(len(self._index.vocabulary), np.float32)  # filled in by the compiled search
        self._columns: Columns | None = None

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        settings: BM25Settings | None = None,
        *,
        work: Path | None = None,
        progress: Progress = silent,
    ) -> BM25:
        """Index a corpus, reading it once. With `work`, parts go to disk as they are counted, a killed build goes on
        after the last one, and memory does not grow with the passages (but with the vocabulary).
        """
        settings = settings or BM25Settings()
        return cls(corpus, settings, index=build_index(corpus, settings, work, progress))

    def save(self, folder: Path) -> None:
        """Write the index as bm25s would."""
        index = self._index
        for name, array in zip(_ARRAYS, (index.data, index.indices, index.indptr), strict=True):
            np.save(folder / f"{name}.csc.index.npy", np.asarray(array))
        text = json.dumps(index.vocabulary, ensure_ascii=False)
        (folder / "vocab.index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        parameters = {
            "k1": self.settings.k1, "b": self.settings.b, "delta": 0.5, "method": "lucene", "idf_method": "lucene",
            "dtype": "float32", "int_dtype": "int32", "num_docs": len(self.corpus), "backend": "numpy",
        }  # fmt: skip
        (folder / "params.index.json").write_text(json.dumps(parameters))

    @classmethod
    def load(cls, folder: Path, corpus: Corpus, settings: BM25Settings | None = None) -> BM25:
        """Memory-map a saved index."""
        settings = settings or BM25Settings()
        # Plain array views of the mapped memory: slicing numpy's memmap class is much slower.
        data, indices, indptr = (np.asarray(np.load(folder / f"{n}.csc.index.npy", mmap_mode="r")) for n in _ARRAYS)
        text = (folder / "vocab.index.json").read_text(encoding="utf-8", errors="surrogatepass")
        vocabulary = json.loads(text)
        parameters = json.loads((folder / "params.index.json").read_text())
        found = (parameters["num_docs"], parameters["k1"], parameters["b"])
        if found != (expected := (len(corpus), settings.k1, settings.b)):
            raise ValueError(f"{folder}: passages, k1 and b of the index are {found}; expected {expected}")
        if not (len(data) == len(indices) == indptr[-1] and len(indptr) == len(vocabulary) + 1):
            raise ValueError(f"{folder}: the files of the index do not fit together; build it again")
        return cls(corpus, settings, index=Index(data, indices, indptr, vocabulary), folder=folder)

    def __reduce__(self) -> tuple[object, ...]:
        if self._folder is not None:
            return type(self).load, (self._folder, self.corpus, self.settings)
        return functools.partial(type(self), index=self._index), (self.corpus, self.settings)

    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        """At most `k` passages per query that share a term with it, best first; ties in corpus order.

        Raises:
            ConfigError: `k` is below 1.
            RetrievalError: the loaded index is damaged.
        """
        check_k(k)
        terms, offsets = self._encode(queries)
        if kernel := _kernel_for(len(queries) * len(self._ids)):
            return self._compiled(kernel, terms, offsets, k)
        found = [self._best(terms[start:end], k) for start, end in pairwise(offsets.tolist())]
        ids = self._ids
        return SearchResults([[ids[row] for row in rows] for rows, _ in found], [scores for _, scores in found])

    def _compiled(self, kernel: ModuleType, terms: Longs, offsets: Longs, k: int) -> SearchResults:
        """`_best` for each query, compiled; other threads run meanwhile."""
        passages = len(self._ids)
        k = min(k, passages)
        if not self._is_sound:
            self._check()
        rows, scores, counts = self._found(kernel, terms, offsets, k)
        sizes = counts.tolist()
        ids = list(map(self._ids.__getitem__, rows.ravel().tolist()))
        return SearchResults(
            [ids[start : start + size] for start, size in zip(range(0, len(ids), k), sizes, strict=True)],
            [row[:size] for row, size in zip(scores.tolist(), sizes, strict=True)],
        )

    def _found(self, kernel: ModuleType, terms: Longs, offsets: Longs, k: int) -> tuple[Longs, Floats, Longs]:
        """What the kernel's search returns, by way of coarse scores where that is faster: in large corpora."""
        passages, matrix = len(self._ids), self._index[:3]

        def exact(terms: Longs, offsets: Longs) -> tuple[Longs, Floats, Longs]:
            found: tuple[Longs, Floats, Longs] = kernel.search(*matrix, self._highest, passages, terms, offsets, k)
            return found

        if passages < COLUMNS_FROM or k * COLUMNS_K > passages:
            return exact(terms, offsets)
        from carl_gym.retrieval import bm25_columns

        columns = self._columns
        if columns is None:  # two threads may both make them: they are equal
            columns = self._columns = bm25_columns.make_columns(*matrix, passages)
        if np.diff(offsets).max(initial=0) > columns.longest:
            return exact(terms, offsets)
        rows, scores, counts = bm25_columns.search(*matrix, columns, passages, terms, offsets, k)
        for q in np.flatnonzero(counts < 0).tolist():
            again = exact(terms[offsets[q] : offsets[q + 1]], offsets[q : q + 2] - offsets[q])
            rows[q], scores[q], counts[q] = (values[0] for values in again)
        return rows, scores, counts

    def _check(self) -> None:
        """Look once through what was loaded: compiled code checks no bounds, and a wrong row could end the process."""
        _, indices, indptr, _ = self._index
        rows = indices.view(np.uint32)  # a negative row is a very large one
        if indptr[0] != 0 or (np.diff(indptr) < 0).any() or rows.max(initial=0) >= len(self._ids):
            raise RetrievalError(f"{self._folder}: the index is damaged; delete this folder, and it is built again")
        self._is_sound = True

    def _best(self, terms: Longs, k: int) -> tuple[list[int], list[float]]:
        """Rows and scores of the k best passages for a query's terms, in numpy."""
        if not len(terms):
            return [], []
        data, indices, indptr, _ = self._index
        columns = list(map(slice, indptr[terms].tolist(), indptr[terms + 1].tolist()))
        scores = np.zeros(len(self._ids), np.float32)
        for column in columns:
            scores[indices[column]] += data[column]  # the rows of a term are distinct
        # The passages of one term, when there are k of them, have k scores that the k best cannot be below. So only
        # those at or above are sorted, and everything that ties with the k-th stays in until the stable sort decides.
        sizes = [column.stop - column.start for column in columns]
        enough = [(size, i) for i, size in enumerate(sizes) if size >= k]
        if enough:
            of_term = scores[indices[columns[min(enough)[1]]]]
            found = np.flatnonzero(scores >= np.partition(of_term, -k)[-k])
        else:
            found = np.unique(np.concatenate([indices[column] for column in columns]))
        values = scores[found]
        best = np.argsort(-values, kind="stable")[:k]
        return found[best].tolist(), values[best].tolist()


def build_index(corpus: Corpus, settings: BM25Settings, work: Path | None = None, progress: Progress = silent) -> Index:
    """The index of a corpus: count the terms of part after part, then put the parts together term by term.

    Args:
        corpus: read once, in order.
        settings: k1, b, and how much titles count.
        work: where parts are kept (see `Retriever.build`); None keeps them in memory.
        progress: told the passages counted, then the terms scored.
    """
    parts, vocabulary = _count(corpus, settings.title_weight, work, progress)
    terms = len(vocabulary)
    frequency = np.zeros(terms, np.int64)
    for part in parts:
        frequency += np.bincount(part.terms, minlength=terms)
    lengths = np.concatenate([part.lengths for part in parts])
    indptr = np.concatenate([[0], np.cumsum(frequency)])
    size = int(indptr[-1])
    idf = np.log(1 + (len(lengths) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
    norm = settings.k1 * (1 - settings.b + settings.b * lengths / max(lengths.mean(), 1e-9))
    data, indices = _empty(work, "data", np.float32, size), _empty(work, "indices", np.int32, size)
    first = 0
    while first < terms:
        # As many terms as have PART_TOKENS scores together, but at least one.
        last = max(first + 1, int(np.searchsorted(indptr, indptr[first] + PART_TOKENS, "right")) - 1)
        pieces = [(part, *np.searchsorted(part.terms, (first, last))) for part in parts]
        term = np.concatenate([part.terms[a:b] for part, a, b in pieces])
        order = np.argsort(term, kind="stable")  # parts follow each other in the corpus: rows stay ascending
        term = term[order]
        rows = np.concatenate([part.rows[a:b] for part, a, b in pieces])[order]
        counts = np.concatenate([part.counts[a:b] for part, a, b in pieces])[order].astype(np.float64)
        here = slice(indptr[first], indptr[last])
        indices[here] = rows
        data[here] = idf[term] * (counts / (norm[rows] + counts))
        first = last
        progress("scoring terms", last, terms)
    return Index(data, indices, indptr, vocabulary)


class _Part(NamedTuple):
    """Counted terms of some passages, sorted by term and row, and the passages' lengths."""

    terms: Ints
    rows: Ints
    counts: Ints
    lengths: Ints


def _count(
    corpus: Corpus, title_weight: int, work: Path | None, progress: Progress
) -> tuple[list[_Part], dict[str, int]]:
    vocabulary: dict[str, int] = {}
    parts: list[_Part] = []
    if work is not None:
        while (folder := work / f"part{len(parts):05d}").is_dir():
            try:
                part = _load_part(folder)
                terms = json.loads((folder / "terms.json").read_text("utf-8", "surrogatepass"))
            except (OSError, ValueError, EOFError):  # a disk that lost power: counted again, with all that build on it
                for later in [path for path in work.glob("part*") if path.name >= folder.name]:
                    shutil.rmtree(later)
                break
            parts.append(part)
            for term in terms:
                vocabulary[term] = len(vocabulary)
    done, total = sum(len(part.lengths) for part in parts), len(corpus)
    known = len(vocabulary)
    for tokens, lengths in _encode(corpus, title_weight, vocabulary, done):
        row = np.repeat(np.arange(done, done + len(lengths), dtype=np.int64), lengths)
        keys, counts = np.unique((tokens.astype(np.int64) << 32 | row)[tokens >= 0], return_counts=True)
        words = np.bincount(row[tokens >= 0] - done, minlength=len(lengths))  # without stop words
        part = _Part(*(a.astype(np.int32) for a in (keys >> 32, keys & 0xFFFFFFFF, counts, words)))
        if work is not None:
            folder = work / f"part{len(parts):05d}"
            _save_part(folder, part, list(vocabulary)[known:])
            part = _load_part(folder)
            known = len(vocabulary)
        parts.append(part)
        done += len(lengths)
        progress("counting terms", done, total)
    return parts, vocabulary


def _encode(
    corpus: Corpus, title_weight: int, vocabulary: dict[str, int], skip: int
) -> Iterator[tuple[Ints, list[int]]]:
    """Term numbers (-1: stop word) and lengths of the passages after the first `skip`, part by part."""
    encode = Encoder(vocabulary)
    tokens: list[Ints] = []
    lengths: list[int] = []
    size = 0
    for row, passage in enumerate(corpus):
        if row < skip:
            continue
        tokens.append(np.array(encode(f"{f'{passage.title} ' * title_weight}{passage.text}"), np.int32))
        lengths.append(len(tokens[-1]))
        size += lengths[-1]
        if size >= PART_TOKENS:
            yield np.concatenate(tokens), lengths
            tokens, lengths, size = [], [], 0
    if lengths:
        yield np.concatenate(tokens), lengths


def _save_part(folder: Path, part: _Part, terms: list[str]) -> None:
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, array in part._asdict().items():
        np.save(unfinished / f"{name}.npy", array)
    text = json.dumps(terms, ensure_ascii=False)
    (unfinished / "terms.json").write_text(text, "utf-8", "surrogatepass")
    sync_tree(unfinished)
    unfinished.rename(folder)
    sync(folder.parent)


def _load_part(folder: Path) -> _Part:
    part = _Part(*(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _Part._fields))
    if not len(part.terms) == len(part.rows) == len(part.counts):
        raise ValueError(f"{folder}: the files of the part do not fit together")
    return part


def _empty(work: Path | None, name: str, dtype: type[S], size: int) -> npt.NDArray[S]:
    """An array of this size, in a file where there is a folder for it."""
    if work is None or size == 0:
        return np.empty(size, dtype)
    return np.lib.format.open_memmap(work / f"{name}.npy", "w+", dtype, (size,))


def _kernel_for(work: int) -> ModuleType | None:
    """The compiled search for this many queries x passages: where it pays to import it, and always once it is there."""
    return _kernel() if work >= KERNEL_WORK or _kernel.cache_info().currsize else None


@functools.cache
def _kernel() -> ModuleType | None:
    """The compiled search, if numba is there (`pip install carl-gym[fast]`); it finds exactly what `_best` does."""
    try:
        from carl_gym.retrieval import bm25_kernel
    except ImportError:
        return None
    return bm25_kernel


_ARRAYS = ("data", "indices", "indptr")
