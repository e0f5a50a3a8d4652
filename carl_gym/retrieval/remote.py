"""Searching over HTTP: a retriever and a corpus that live in another process, or on another machine.

Works with our server (`server.py`), whose answers say which corpus and retriever they come from, and with plain
Search-R1 servers, which say neither. Whatever a server does wrong is a `RetrievalError`, never an empty result.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from carl_gym.errors import ConfigError, RetrievalError
from carl_gym.retrieval.connection import Connection, RemoteSettings
from carl_gym.retrieval.corpus import Corpus, Passage, title_key
from carl_gym.retrieval.retriever import Progress, Retriever, SearchResults, check_k, silent
from carl_gym.retrieval.sharded import Hit, Servers, merged

V = TypeVar("V")

KEPT_PASSAGES = 50_000
"""Passages that a `RemoteCorpus` remembers: what a search brought is mostly what is opened next."""
TITLE_CANDIDATES = 20
"""How far down the results for a title a passage with that title is looked for, where there is no /titles."""


class _Recent(OrderedDict[str, V]):
    """The most recently used values, at most `KEPT_PASSAGES`. Used under `_lock` only."""

    def keep(self, key: str, value: V) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > KEPT_PASSAGES:
            self.popitem(last=False)

    def recall(self, key: str) -> V | None:
        if key not in self:
            return None
        self.move_to_end(key)
        return self[key]


_lock = threading.Lock()
"""Over all remembered passages. Held while the process forks, so that no child inherits it locked."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class RemoteCorpus(Corpus):
    """The passages of servers: fetched when they are asked for, and a number of them remembered.

    A Search-R1 server gives passages as search results only. Of its corpus, `[id]` knows what results have brought to
    this process, `len` counts that, and `by_title` searches for the title.

    Args:
        servers: of the corpus.

    Attributes:
        fingerprint: of the corpus that the servers have: the same as when that is opened locally.
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.fingerprint = servers.info.corpus
        self._passages: _Recent[Passage] = _Recent()
        self._titles: _Recent[Passage] = _Recent()

    @property
    def ids(self) -> Sequence[str]:
        """Not to be had. Raises RetrievalError."""
        raise RetrievalError(f"{self.servers.url} does not list its passages; open its corpus locally for that")

    def __iter__(self) -> Iterator[Passage]:
        raise RetrievalError(f"{self.servers.url} does not list its passages; open its corpus locally for that")

    def __len__(self) -> int:
        return self.servers.info.passages or len(self._passages)

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and self.fetch([passage_id])[0] is not None

    def __getitem__(self, passage_id: str) -> Passage:
        passage = self.fetch([passage_id])[0]
        if passage is not None:
            return passage
        if self.servers.info.api == "carl":
            raise KeyError(passage_id)
        raise RetrievalError(
            f"passage {passage_id!r} has not been among the results of {self.servers.url} in this process, and a "
            f"Search-R1 server cannot be asked for it; serve the corpus with scripts/serve_retrieval.py"
        )

    def fetch(self, ids: Sequence[str]) -> list[Passage | None]:
        """The passages with these ids, None for those that there are not; one request to each shard for what is not
        remembered.
        """
        with _lock:
            known = {id: self._passages.recall(id) for id in ids}
        unknown = [id for id, passage in known.items() if passage is None and _encodable(id)]
        if unknown and self.servers.info.api == "carl":
            for found in self.servers.each(lambda connection: _passages(connection, unknown)):
                known.update(found)
            self.remember(passage for passage in known.values() if passage is not None)
        return [known[id] for id in ids]

    def by_title(self, title: str) -> Passage | None:
        """The first passage with this title; of a Search-R1 server, the best result of a search for the title that
        has it.
        """
        key = title_key(title)
        if not key or not _encodable(key):
            return None
        with _lock:
            passage = self._titles.recall(key)
        if passage is not None:
            return passage
        found = self.servers.each(lambda connection: _titled(connection, title))
        passage = next((passage for passage in found if passage is not None), None)
        if passage is not None:
            self.remember([passage])
            with _lock:
                self._titles.keep(key, passage)
        return passage

    def remember(self, passages: Iterable[Passage]) -> None:
        """Keep passages for later."""
        with _lock:
            for passage in passages:
                self._passages.keep(passage.id, passage)


class Remote(Retriever):
    """Searches on a server, or on those of all shards of a corpus, whose results it merges by score.

    Args:
        corpus: the server's (`remote_corpus`), or a local copy of it, which must be the same to the letter.
        settings: where and how; the corpus' own where it is a `RemoteCorpus` and the settings name no URL.

    Raises:
        ConfigError: no URL.
        RetrievalError: a server cannot be reached, or has another corpus, or the shards are not all of it.
    """

    Settings = RemoteSettings

    def __init__(self, corpus: Corpus, settings: RemoteSettings | None = None) -> None:
        if settings is None:
            settings = corpus.servers.settings if isinstance(corpus, RemoteCorpus) else RemoteSettings()
        elif isinstance(corpus, RemoteCorpus) and not settings.url:
            settings = replace(settings, url=corpus.servers.settings.url)
        if not settings.url:
            raise ConfigError(
                "no server to search on: set url in the index card, or give the corpus as http://host:port"
            )
        if isinstance(corpus, RemoteCorpus) and corpus.servers.settings == settings:
            self.servers = corpus.servers
        else:
            named = corpus.servers if isinstance(corpus, RemoteCorpus) else None
            self.servers = Servers(
                settings, trusted=named is not None and named.trusted and named.settings.url == settings.url
            )
        info = self.servers.info
        if (info.api == "carl" or isinstance(corpus, RemoteCorpus)) and info.corpus != corpus.fingerprint:
            raise RetrievalError(
                f"{self.servers.url} serves another corpus (fingerprint {info.corpus}, {info.passages:,} passages) "
                f"than the one given ({corpus.fingerprint}); give the same file to both, or no corpus here but the URL"
            )
        super().__init__(corpus, settings)
        self._remote = corpus if isinstance(corpus, RemoteCorpus) else RemoteCorpus(self.servers)

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        settings: RemoteSettings | None = None,
        *,
        work: Path | None = None,
        progress: Progress = silent,
    ) -> Remote:
        """Connect: there is nothing to index."""
        return cls(corpus, settings)

    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        """What the servers find.

        Raises:
            ConfigError: `k` is below 1.
            RetrievalError: a server fails or answers nonsense, or nobody answers for a shard.
        """
        check_k(k)
        clean = [query if _encodable(query) else query.encode("utf-8", "replace").decode() for query in queries]
        local = None if self._remote is self.corpus else self.corpus
        by_shard = self.servers.each(lambda connection: _hits(connection, clean, k, local))
        found = [merged(hits, k) for hits in zip(*by_shard, strict=True)]
        self._remote.remember(passage for hits in found for passage, _ in hits)
        return SearchResults(
            [[passage.id for passage, _ in hits] for hits in found], [[score for _, score in hits] for hits in found]
        )

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in order, by one request. Raises KeyError on an id that the servers lack."""
        if self._remote is not self.corpus:
            return super().get(ids)
        found = self._remote.fetch(ids)
        return [self.corpus[id] if passage is None else passage for id, passage in zip(ids, found, strict=True)]

    def describe(self) -> dict[str, str | int | float]:
        """The servers' URLs and what their own retriever says."""
        info = self.servers.info
        server = {f"server_{key}": value for key, value in info.describe.items()}
        return {"retriever": "Remote", "url": self.servers.url, "api": info.api, **server}


def remote_corpus(url: str, **settings: Any) -> RemoteCorpus:
    """The corpus of the server at a URL, or of several (see `RemoteSettings`).

    Args:
        url: such as http://127.0.0.1:8000.
        **settings: others of `RemoteSettings`.

    Raises:
        ConfigError: the URL is none.
        RetrievalError: nobody answers there, or no retrieval server does, or shards do not make a whole.
    """
    return RemoteCorpus(Servers(RemoteSettings(url, **settings), trusted=True))


def _hits(connection: Connection, queries: Sequence[str], k: int, local: Corpus | None) -> list[list[Hit]]:
    """At most `k` results for each query, which `local` must have if there is such a copy."""
    found: list[list[Hit]] = []
    for part in connection.parts(queries):
        request = {"queries": part, "topk": k, "return_scores": True}
        found += map(connection.hits, connection.post("/retrieve", request, len(part)))
    for hits in found:
        if len(hits) > k:
            connection.fail("/retrieve", f"{len(hits)} results for a query, asked for {k}")
        if connection.info.api == "carl" and len({passage.id for passage, _ in hits}) < len(hits):
            connection.fail("/retrieve", "the same passage twice in the results of a query")
        for passage, _ in hits:
            if local is not None and passage.id not in local:
                connection.fail("/retrieve", f"passage {passage.id!r}, which the local corpus does not have")
    return found


def _passages(connection: Connection, ids: Sequence[str]) -> dict[str, Passage]:
    """Those of the passages with these ids that its servers have."""
    found: dict[str, Passage] = {}
    for part in connection.parts(ids):
        rows = connection.post("/passages", {"ids": part}, len(part))
        for id, row in zip(part, rows, strict=True):
            if row is not None:
                found[id] = connection.passage(row, "/passages")
                if found[id].id != id:
                    connection.fail("/passages", f"another passage than the one asked for ({id!r})")
    return found


def _titled(connection: Connection, title: str) -> Passage | None:
    """The first passage with this title that its servers have."""
    if connection.info.api == "carl":
        (row,) = connection.post("/titles", {"titles": [title]}, 1)
        return None if row is None else connection.passage(row, "/titles")
    request = {"queries": [title], "topk": TITLE_CANDIDATES, "return_scores": True}
    found = (hit[0] for hit in connection.hits(*connection.post("/retrieve", request, 1)))
    return next((passage for passage in found if title_key(passage.title) == title_key(title)), None)


def _encodable(text: str) -> bool:
    """Whether it can be sent: not with half of a surrogate pair, which no corpus holds either."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
