"""BM25 over title and text: bm25s scores, Snowball stems, one index on disk per corpus and settings.

The index is built once, kept in the cache folder under a hash of everything that it depends on, and
memory-mapped when it is loaded, so that processes share it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from carl_gym.paths import cache_folder
from carl_gym.retrieval.corpus import Corpus, Hit

if TYPE_CHECKING:
    import bm25s

FORMAT_VERSION = 1
"""Raised whenever tokenisation or the stored files change; older indexes are left alone and rebuilt."""

_WORD = re.compile(r"\w+")
_logger = logging.getLogger(__name__)


class BM25:
    """A `Retriever` that scores passages by BM25 (Lucene's variant).

    Args:
        corpus: what to search.
        k1: how slowly a repeated term saturates; >= 0.
        b: how strongly long passages are discounted, in [0, 1].
        cache: keep the index on disk. Turn off for small, generated corpora: building takes milliseconds.
    """

    def __init__(self, corpus: Corpus, k1: float = 1.2, b: float = 0.75, *, cache: bool = True) -> None:
        # bm25s and its dependencies take a while to import, and agents on remote retrievers never need them.
        import bm25s
        import Stemmer
        from bm25s.stopwords import STOPWORDS_EN

        self._ids = [passage.id for passage in corpus.passages]
        self._stem = Stemmer.Stemmer("english").stemWord
        self._terms: dict[str, str] = dict.fromkeys(STOPWORDS_EN, "")
        folder = _index_folder(corpus, k1, b) if cache else None
        index = _load(folder) if folder else None
        if index is None:
            vocabulary: dict[str, int] = {"": 0}
            documents = [
                [vocabulary.setdefault(term, len(vocabulary)) for term in self._tokenize(f"{p.title} {p.text}")]
                for p in corpus.passages
            ]
            if not any(documents):
                documents[0] = [vocabulary[""]]  # bm25s divides by the mean length
            index = bm25s.BM25(k1=k1, b=b, method="lucene")
            index.index((documents, vocabulary), show_progress=False)
            if folder:
                _save(index, folder)
        self._index = index
        self._vocabulary: dict[str, int] = index.vocab_dict

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most `k` passages per query that share a term with it, best first; ties in corpus order."""
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[Hit]:
        vocabulary = self._vocabulary
        terms = [vocabulary[term] for term in self._tokenize(query) if term in vocabulary]
        if not terms:
            return []
        scores = self._index.get_scores_from_ids(terms)
        # Everything that ties with the k-th best stays in until the stable sort has decided.
        threshold = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
        found = np.flatnonzero(scores >= threshold if threshold > 0 else scores)
        values = scores[found]
        best = np.argsort(-values, kind="stable")[:k]
        ids = self._ids
        return [Hit(ids[i], s) for i, s in zip(found[best].tolist(), values[best].tolist(), strict=True)]

    def _tokenize(self, text: str) -> list[str]:
        """Stems of the words that are no stop words, in order. Stems are remembered: words recur."""
        terms, stem = self._terms, self._stem
        result = []
        for word in _WORD.findall(text.lower()):
            term = terms.get(word)
            if term is None:
                term = stem(word)
                if len(terms) < 1_000_000:
                    terms[word] = term
            if term:
                result.append(term)
        return result


def _index_folder(corpus: Corpus, k1: float, b: float) -> Path:
    import bm25s

    key = json.dumps([FORMAT_VERSION, bm25s.__version__, corpus.fingerprint, float(k1), float(b)])
    return cache_folder() / f"bm25-{blake2b(key.encode(), digest_size=12).hexdigest()}"


def _load(folder: Path) -> bm25s.BM25 | None:
    import bm25s

    if not folder.is_dir():
        return None
    try:
        index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        # Plain array views of the mapped memory: slicing numpy's memmap class is much slower.
        index.scores |= {name: np.asarray(index.scores[name]) for name in ("data", "indices", "indptr")}
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        _logger.warning("%s: damaged index (%s); building it again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _save(index: bm25s.BM25, folder: Path) -> None:
    """Write beside the target and rename: other processes see a whole index or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        index.save(Path(temporary) / "index", show_progress=False)
        try:
            os.rename(Path(temporary) / "index", folder)
        except OSError:
            # Another process was first; its index has the same content.
            if not folder.is_dir():
                raise
