"""Dense retrieval: every passage is a vector, and a FAISS index finds those nearest to the query's.

Building encodes the corpus block by block (resumable: a finished block is a file), trains the index on a sample and
adds block by block. A saved index is memory-mapped, so processes on one machine share it, and the encoder is loaded
with the first query.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from carl_gym.errors import ConfigError, RetrievalError
from carl_gym.retrieval.corpus import BLOCK, Corpus, Passage
from carl_gym.retrieval.encoders import Encoder, EncoderSettings, Vectors, load_encoder
from carl_gym.retrieval.retriever import Progress, Retriever, SearchResults, check_k, silent

if TYPE_CHECKING:
    import faiss

TRAINING_VECTORS_PER_LIST = 64
"""FAISS asks for 39 at least."""

_MARGIN = 16
"""Found beyond `k`, so that what ties with the k-th is ordered before it is cut."""

_PROBE = Passage("probe", "Hamlet", "A tragedy by William Shakespeare, written around 1600 and set in Denmark.")
"""Its vector tells encoders apart: all shards of a corpus must give the same one."""

_DIGITS = 6
"""Scores are rounded to this many decimals: the last bits of a float depend on what else is in the batch."""

_IMPORTED_BY = os.getpid()


@dataclass(frozen=True, slots=True)
class DenseSettings(EncoderSettings):
    """What a dense recipe may set, beside the encoder.

    Attributes:
        index: a FAISS index factory string. `{nlist}` becomes a number of lists that suits the corpus. PQ needs
            re-ranking (`...,RFlat` or `...,Refine(SQ8)`): without it half of the neighbours are lost.
        search: FAISS search parameters, such as `nprobe=32` (IVF), `efSearch=128` (HNSW) or `k_factor_rf=8`
            (candidates per result that are re-ranked).
    """

    index: str = "Flat"
    search: str = ""


class Dense(Retriever):
    """Ranks passages by the inner product of their vector and the query's. Every passage has a score.

    Made by `build` or `load`. Threads may search at once. A forked process may search only if OpenMP has one thread
    there: libraries that have started more hang in the child, so `search` raises instead; spawned ones always may.
    Equal scores keep the order of the corpus. HNSW graphs that several threads built differ from build to build.
    """

    Settings = DenseSettings
    SEARCH_SETTINGS = frozenset({"search", "query_prefix"})
    SHARDABLE = True

    def __init__(self, corpus: Corpus, settings: DenseSettings | None, index: faiss.Index, sample: Vectors) -> None:
        super().__init__(corpus, settings)
        self._ids = corpus.ids
        self._index = index
        self._sample = sample
        self._encoder: Encoder | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()
        _set_search(index, self.settings)

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        settings: DenseSettings | None = None,
        *,
        work: Path | None = None,
        progress: Progress = silent,
    ) -> Dense:
        """Encode and index a corpus. Memory: the index and one block, and all vectors when there is no `work`.

        Args:
            corpus: what to search.
            settings: encoder and index.
            work: finished blocks of embeddings are kept here and found again.
            progress: told of passages encoded, then added.

        Raises:
            RetrievalError: the encoder cannot be loaded or gives NaN.
            ConfigError: `index` or `search` mean nothing to FAISS or do not suit the corpus, or `work` holds
                embeddings of something else.
        """
        import faiss

        settings = settings or DenseSettings()
        _refuse_fork()
        encoder = load_encoder(encoder_settings(settings))
        factory = settings.index.replace("{nlist}", str(number_of_lists(len(corpus))))
        dimension = encoder.dimension

        def refused(error: RuntimeError) -> ConfigError:
            return ConfigError(
                f"index = {settings.index!r} cannot be made for {len(corpus)} passages of {dimension} dimensions: "
                f"{_first_line(error)}"
            )

        # What FAISS does not understand comes out here, not after hours of encoding.
        try:
            index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise refused(error) from error
        _set_search(index, settings)
        blocks = list(_embed(corpus, encoder, work, progress))
        if not index.is_trained:
            progress(f"training {factory}", 0, 1)
            try:
                index.train(_training_sample(blocks, factory))
            except RuntimeError as error:
                raise refused(error) from error
        for block in blocks:
            index.add(np.ascontiguousarray(block))
            progress("indexing", index.ntotal, len(corpus))
        return cls(corpus, settings, index, encoder.passages([_sampled(corpus)]))

    def save(self, folder: Path) -> None:
        """Write the index, and the vector of one passage to know the encoder by."""
        import faiss

        faiss.write_index(self._index, str(folder / "index.faiss"))
        np.save(folder / "sample.npy", self._sample)
        size = (folder / "index.faiss").stat().st_size
        (folder / "size.json").write_text(json.dumps({"bytes": size}), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, corpus: Corpus, settings: DenseSettings | None = None) -> Dense:
        """Memory-map a saved index. Raises OSError or ValueError when it is damaged or of another corpus."""
        import faiss

        path = folder / "index.faiss"
        size = json.loads((folder / "size.json").read_text(encoding="utf-8"))["bytes"]
        if path.stat().st_size != size:  # FAISS would map it, and the process would die at the first missing page
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected {size}")
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise ValueError(f"{path}: {_first_line(error)}") from error
        sample = np.load(folder / "sample.npy")
        if index.ntotal != len(corpus) or sample.shape != (1, index.d):
            raise ValueError(
                f"{path}: {index.ntotal} vectors of {index.d} dimensions, expected {len(corpus)} of {sample.shape[-1]}"
            )
        return cls(corpus, settings, index, sample)

    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        """The `k` passages with the highest scores for each query, fewer only if the corpus has fewer (or if IVF
        lists that were looked into have).

        Raises:
            RetrievalError: the encoder cannot be loaded or is not the one that the index was built with; or this is
                a forked process in which the libraries below would hang.
        """
        check_k(k)
        if not queries:
            return SearchResults([], [])
        vectors = self._ready().queries(queries)
        total = self._index.ntotal
        wanted = min(k + _MARGIN, total)
        found = self._nearest(vectors, wanted)
        # FAISS cuts ties anywhere: where those with the k-th may go on beyond what was found, look further.
        while wanted < total and any(len(best) == wanted and best[k - 1][1] == best[-1][1] for best in found):
            wanted = min(4 * wanted, total)
            found = self._nearest(vectors, wanted)
        ids = self._ids
        return SearchResults(
            [[ids[row] for row, _ in best[:k]] for best in found], [[score for _, score in best[:k]] for best in found]
        )

    def probe(self) -> Sequence[float]:
        """The vector by which the index knows its encoder."""
        return [round(value, 4) for value in self._sample[0].tolist()]

    def _nearest(self, vectors: Vectors, count: int) -> list[list[tuple[int, float]]]:
        """Row and score of the best `count` of each query, ties by row; fewer where FAISS found no more."""
        scores, rows = self._index.search(vectors, count)
        return [_ordered(*pair) for pair in zip(scores, rows, strict=True)]

    def _ready(self) -> Encoder:
        """The encoder, loaded and compared with the one that built the index before its first use."""
        if os.getpid() != self._process:
            self._process, self._lock = os.getpid(), threading.Lock()  # the parent's may have been held by a thread
        _refuse_fork()
        with self._lock:
            if self._encoder is None:
                encoder = load_encoder(encoder_settings(self.settings))
                vector = encoder.passages([_sampled(self.corpus)])
                # Other devices and library versions change the last digits, another model changes everything.
                if vector.shape != self._sample.shape or not np.allclose(vector, self._sample, atol=0.02):
                    raise RetrievalError(
                        f"encoder {self.settings.encoder!r} gives vectors of {vector.shape[1]} dimensions that differ "
                        f"from the index's {self._sample.shape[1]}: the model has changed since the index was built; "
                        "delete the index, or put the model back"
                    )
                self._encoder = encoder
            return self._encoder


def encoder_settings(settings: EncoderSettings) -> EncoderSettings:
    """The encoder's part of a recipe: recipes that differ in the index only share one encoder."""
    return EncoderSettings(**{f.name: getattr(settings, f.name) for f in fields(EncoderSettings)})


def number_of_lists(passages: int) -> int:
    """How many IVF lists suit a corpus: the power of two next to 4 sqrt(n), with at least 39 passages for each."""
    wanted = 2 ** round(np.log2(4 * passages**0.5))
    return int(max(1, min(wanted, passages // 39)))


def _set_search(index: faiss.Index, settings: DenseSettings) -> None:
    """Set the search parameters of an index, which may be empty. Raises ConfigError where it has no such ones."""
    if settings.search:
        import faiss

        try:
            faiss.ParameterSpace().set_index_parameters(index, settings.search)  # type: ignore[arg-type]  # its stubs
        except RuntimeError as error:
            raise ConfigError(
                f"search = {settings.search!r} does not fit the index {settings.index!r}: {_first_line(error)}"
            ) from error


def _embed(corpus: Corpus, encoder: Encoder, work: Path | None, progress: Progress) -> Iterator[Vectors]:
    """The corpus' vectors in blocks; with `work`, files that are mapped, and made only if they are not there."""
    if work:
        _claim(work, corpus, encoder)
    total, passages = len(corpus), iter(corpus)
    for number, start in enumerate(range(0, total, BLOCK)):
        batch = list(islice(passages, BLOCK))
        path = work / f"embeddings-{number:06d}.npy" if work else None
        if path is None or not path.is_file():
            vectors = encoder.passages(batch, lambda done, start=start: progress("encoding", start + done, total))  # type: ignore[misc]
            if path:
                part = path.with_suffix(".part")
                with part.open("wb") as file:
                    np.save(file, vectors)
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(path)
        yield np.load(path, mmap_mode="r") if path else vectors


def _claim(work: Path, corpus: Corpus, encoder: Encoder) -> None:
    """Write down whose embeddings these are, or check it. Raises ConfigError if they are of something else."""
    mine = {"corpus": corpus.fingerprint, "shard": BLOCK, **asdict(encoder.settings)}
    del mine["query_prefix"]
    path = work / "embeddings.json"
    work.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(mine), encoding="utf-8")
        part.rename(path)
    elif json.loads(path.read_text(encoding="utf-8")) != mine:
        raise ConfigError(f"{work} holds embeddings of another corpus or encoder; delete it or choose another folder")


def _training_sample(blocks: Sequence[Vectors], factory: str) -> Vectors:
    """A seeded random sample, as large as the lists and codes of an index need."""
    lists = max([1024, *(int(number) for number in re.findall(r"IVF(\d+)", factory))])
    total = sum(len(block) for block in blocks)
    chosen = np.sort(np.random.default_rng(0).permutation(total)[: lists * TRAINING_VECTORS_PER_LIST])
    parts, start = [], 0
    for block in blocks:
        low, high = np.searchsorted(chosen, [start, start + len(block)])
        parts.append(block[chosen[low:high] - start])
        start += len(block)
    return np.concatenate(parts)


def _ordered(scores: Vectors, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[tuple[int, float]]:
    """Row and score, ties by row. FAISS fills up with row -1 where it found too few."""
    found = [
        (row, round(score, _DIGITS)) for row, score in zip(rows.tolist(), scores.tolist(), strict=True) if row >= 0
    ]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def _sampled(corpus: Corpus) -> Passage:
    """The passage whose vector an index keeps to know its encoder by: its first, or one that all shards share."""
    return _PROBE if corpus.shard else next(iter(corpus))


def _refuse_fork() -> None:
    """Raise RetrievalError where OpenMP would hang: several threads in a process that was forked."""
    if os.getpid() == _IMPORTED_BY:
        return
    import faiss
    import torch

    threads = max(faiss.omp_get_max_threads(), torch.get_num_threads())
    if threads > 1 or torch.cuda.is_initialized():
        raise RetrievalError(
            f"this process was forked, and OpenMP has {threads} threads: dense retrieval would hang here. Start it "
            "with multiprocessing's spawn (AsyncVectorEnv: context='spawn'), or set OMP_NUM_THREADS=1 for the parent"
        )


def _first_line(error: Exception) -> str:
    """FAISS' message without the C++ signature before it."""
    return str(error).strip().splitlines()[0].rpartition("Error: ")[2]
