"""All servers of a corpus, which may be cut into shards: whether they belong together, and one ranking out of many.

In `http://a,http://b;http://c` commas stand between servers of the same passages (`connection.py`: one of them is
asked) and semicolons between shards (here: all of them are asked, at once). Each server says which shard it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from typing import TypeVar

import numpy as np

from carl_gym.errors import RetrievalError
from carl_gym.retrieval.connection import Connection, RemoteSettings, ServerInfo
from carl_gym.retrieval.corpus import Passage, Shard
from carl_gym.retrieval.wire import clipped

T = TypeVar("T")

Hit = tuple[Passage, float]
"""A passage and its score."""

PROBE_TOLERANCE = 0.02
"""Between numbers of two probes. Other devices and library versions change the last digits, another model all."""

HOW_TO_NAME = "name the servers of each shard once, with ';' between shards and ',' between servers of the same shard"


class Servers:
    """The servers of one corpus: of all of it, or of its shards.

    Args:
        settings: with the URLs.
        trusted: as for `Connection`.

    Attributes:
        connections: to the servers of each shard, in the order of the corpus; one for a corpus in one piece.
        info: what they are together.
        url: the URLs, as they were named.

    Raises:
        ConfigError: a URL is none, or holds a password.
        RetrievalError: a server cannot be reached or is no retrieval server; or a shard is missing, is named twice, or
            does not belong to the others.
    """

    def __init__(self, settings: RemoteSettings, *, trusted: bool = False) -> None:
        self.settings, self.trusted = settings, trusted
        connections, silent = [], []
        for group in settings.url.split(";"):
            try:
                connections.append(Connection(replace(settings, url=group), trusted=trusted))
            except RetrievalError as error:
                silent.append(error)
        if silent and not connections:
            raise silent[0]
        self.connections = _in_order(connections, silent)
        self.url = ";".join(connection.url for connection in connections)
        info = self.connections[0].info
        self.info = replace(info, corpus=info.shard.corpus, passages=info.shard.passages) if info.shard else info

    def each(self, ask: Callable[[Connection], T]) -> list[T]:
        """What the servers of each shard answer, in the order of the corpus.

        Raises:
            RetrievalError: a shard failed, and which.
        """

        def of_shard(connection: Connection) -> T:
            try:
                return ask(connection)
            except RetrievalError as error:
                if (shard := connection.info.shard) is None:
                    raise
                raise RetrievalError(f"shard {shard} of the corpus failed: {error}") from error

        if len(self.connections) == 1:
            return [of_shard(self.connections[0])]
        with ThreadPoolExecutor(len(self.connections)) as threads:
            return list(threads.map(of_shard, self.connections))


def merged(hits: Iterable[Sequence[Hit]], k: int) -> list[Hit]:
    """The `k` best of what the shards found for a query: what the whole corpus gives.

    Args:
        hits: of each shard in the order of the corpus, best first.
        k: how many to keep.
    """
    # Equal scores keep the order of the corpus: the sort is stable. (FAISS' own merging orders them as heaps do.)
    return sorted(chain.from_iterable(hits), key=lambda hit: -hit[1])[:k]


def _in_order(connections: Sequence[Connection], silent: Sequence[RetrievalError]) -> tuple[Connection, ...]:
    """The connections in the order of the corpus, after a check that they are all of it. Raises RetrievalError."""
    first = connections[0]
    if len(connections) == 1 and not silent and first.info.shard is None:
        return (first,)
    found: dict[int, Connection] = {}
    for connection in connections:
        shard = _shard_of(connection)
        _check_alike(first, connection)
        if other := found.get(shard.number):
            raise RetrievalError(f"{other.url} and {connection.url} both serve shard {shard}; {HOW_TO_NAME}")
        found[shard.number] = connection
    shard = _shard_of(first)
    if len(found) < shard.count:
        # The first few: how many there should be is what a server says.
        missing = islice((f"{number}/{shard.count}" for number in range(shard.count) if number not in found), 8)
        there = ", ".join(f"{_shard_of(found[number])} at {found[number].url}" for number in sorted(found))
        why = "".join(f"; {error}" for error in silent)
        raise RetrievalError(
            f"{shard.count - len(found)} of {shard.count} shards of the corpus are missing: {', '.join(missing)}. "
            f"There are {there}; {HOW_TO_NAME}{why}"
        )
    return tuple(found[number] for number in sorted(found))


def _shard_of(connection: Connection) -> Shard:
    """Which shard its servers have. Raises RetrievalError where they have none."""
    if (shard := connection.info.shard) is None:
        raise RetrievalError(
            f"{connection.url} serves a whole corpus and no shard, so that it cannot be one of several; put ',' "
            "between servers of the same passages, or serve shards (scripts/serve_retrieval.py --shard)"
        )
    return shard


def _check_alike(first: Connection, other: Connection) -> None:
    """Raise RetrievalError unless both have shards of the same corpus and rank them alike."""
    one, two = _shard_of(first), _shard_of(other)
    both = f"{first.url} and {other.url}"
    if replace(one, number=0) != replace(two, number=0):
        raise RetrievalError(
            f"{both} serve shards of different corpora, or of a corpus cut into different numbers of shards: "
            f"{one} of {one.corpus} ({one.passages:,} passages), {two} of {two.corpus} ({two.passages:,} passages)"
        )
    if first.info.retriever != other.info.retriever:
        raise RetrievalError(
            f"{both} rank passages differently, so that their scores do not compare: {_differences(first, other)}; "
            "serve all shards by the same recipe, with the encoder under the same name"
        )
    if not _close(first.info, other.info):
        raise RetrievalError(
            f"{both} were indexed by different encoders, both named {first.info.describe.get('encoder')!r}: they give "
            "the same text different vectors; build the shards with the same model"
        )


def _differences(first: Connection, other: Connection) -> str:
    one, two = first.info.describe, other.info.describe
    keys = [key for key in sorted({*one, *two}) if one.get(key) != two.get(key)]
    return ", ".join(f"{key} = {clipped(one.get(key))} and {clipped(two.get(key))}" for key in keys)


def _close(one: ServerInfo, two: ServerInfo) -> bool:
    return len(one.probe) == len(two.probe) and bool(np.allclose(one.probe, two.probe, rtol=0, atol=PROBE_TOLERANCE))
