"""What a retriever is: one class with one required method.

A retriever finds passages of one corpus. Those that search an index also say how it is built, saved and loaded;
`registry.make_retriever` then keeps built indexes on disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from carl_gym.errors import ConfigError
from carl_gym.retrieval.corpus import Corpus, Passage

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and out of how much."""


def silent(what: str, done: int, total: int) -> None:
    """The `Progress` that tells nobody."""


def check_k(k: int) -> None:
    """Raise ConfigError unless `k` is a number of results that can be asked for."""
    if k < 1:
        raise ConfigError(f"k is {k}; a search needs at least 1")


def check_shardable(cls: type[Retriever], shard: object) -> None:
    """Raise ConfigError where a retriever of this class would search a shard, and what it finds could not be merged.

    Args:
        cls: of the retriever.
        shard: what is searched, such as `2/8`; nothing ("", None) for a whole corpus.
    """
    if shard and not cls.SHARDABLE:
        raise ConfigError(
            f"{cls.__name__} cannot search shard {shard} of a corpus: its scores or ranks depend on passages of the "
            "other shards (BM25 counts words in all of them), so that what the shards find could not be merged. Take "
            "a dense recipe, or the whole corpus"
        )


class SearchResults(NamedTuple):
    """What a batch of queries found.

    Attributes:
        ids: for each query at most k passage ids, best first.
        scores: the same shape; higher is better.
    """

    ids: list[list[str]]
    scores: list[list[float]]


@dataclass(frozen=True, slots=True)
class NoSettings:
    """For retrievers without any."""


class Retriever(ABC):
    """Finds passages of a corpus.

    `search` may be called from several threads at once, and in processes forked or spawned after construction unless
    the class says otherwise. A failed search raises `RetrievalError`: an empty list means that nothing matched.

    Attributes:
        Settings: frozen dataclass of what an index card may set in its `[settings]` table.
        FORMAT_VERSION: raised whenever saved indexes of this class would be read differently.
        SEARCH_SETTINGS: settings that change searches and not the index: changing them builds nothing anew.
        SHARDABLE: whether a score depends on nothing but query and passage, so that what is found in the shards of a
            corpus can be merged by score.
        corpus: what is searched.
        settings: how.
    """

    Settings: ClassVar[type] = NoSettings
    FORMAT_VERSION: ClassVar[int] = 1
    SEARCH_SETTINGS: ClassVar[frozenset[str]] = frozenset()
    SHARDABLE: ClassVar[bool] = False

    def __init__(self, corpus: Corpus, settings: Any = None) -> None:
        self.corpus = corpus
        self.settings = self.Settings() if settings is None else settings

    @abstractmethod
    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        """At most `k` passages per query, best first. The same queries always give the same results."""

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in order. Raises KeyError on an id that the corpus lacks."""
        return [self.corpus[id] for id in ids]

    @classmethod
    def build(
        cls, corpus: Corpus, settings: Any = None, *, work: Path | None = None, progress: Progress = silent
    ) -> Self:
        """The retriever of a corpus, indexed anew.

        Args:
            corpus: what to search.
            settings: an instance of `Settings`; the default one for None.
            work: a folder that outlives a killed build: finished parts may be kept there and are used when the
                build is called again. None: all in memory.
            progress: called as the work goes on.
        """
        return cls(corpus, settings)

    def save(self, folder: Path) -> None:
        """Write the index into an empty folder. Raises ConfigError for retrievers that have none."""
        raise ConfigError(f"{type(self).__name__} keeps no index; set cache = false in its card")

    @classmethod
    def load(cls, folder: Path, corpus: Corpus, settings: Any = None) -> Self:
        """What `save` wrote, memory-mapped where that is possible. Raises OSError or ValueError when damaged."""
        raise ConfigError(f"{cls.__name__} keeps no index; set cache = false in its card")

    def describe(self) -> dict[str, str | int | float]:
        """What scores depend on, for reports."""
        return {"retriever": type(self).__name__, **asdict(self.settings)}

    def probe(self) -> Sequence[float]:
        """Numbers that are the same for all shards of a corpus, up to rounding, if their scores may be compared: what
        `describe` cannot tell, such as other weights under the same name.
        """
        return ()
