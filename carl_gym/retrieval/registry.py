"""From a recipe to a retriever: index cards (retrieval_index/*.toml) and the kinds there are."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carl_gym.cards import beside, find_card, load_card, make_card
from carl_gym.errors import CardError
from carl_gym.retrieval.builder import index_folder, open_or_build
from carl_gym.retrieval.corpus import Corpus
from carl_gym.retrieval.retriever import Progress, Retriever, check_shardable, silent

KINDS = {
    "bm25": "carl_gym.retrieval.bm25:BM25",
    "dense": "carl_gym.retrieval.dense:Dense",
    "hybrid": "carl_gym.retrieval.hybrid:Hybrid",
    "lucene": "carl_gym.retrieval.lucene:Lucene",
    "remote": "carl_gym.retrieval.remote:Remote",
}
"""Retrievers by the name that cards use, imported when they are needed."""


@dataclass(frozen=True, slots=True)
class IndexCard:
    """A recipe for an index (retrieval_index/*.toml).

    Attributes:
        id: name of the recipe.
        description: one sentence for people.
        kind: one of `KINDS`, or the import path `package.module:Class` of a `Retriever`.
        corpus: what to index when nothing else is said (`scripts/build_index.py`): a path (see `corpus_of`); empty for
            recipes that fit any corpus.
        cache: keep the built index on disk; off for generated corpora, which take milliseconds to index.
        settings: what the retriever's `Settings` allow.
    """

    id: str
    description: str
    kind: str = "bm25"
    corpus: str = ""
    cache: bool = True
    settings: dict[str, object] = field(default_factory=dict)


def retriever_class(kind: str) -> type[Retriever]:
    """The class of a kind or import path. Raises CardError naming what is known."""
    path = KINDS.get(kind, kind)
    module, _, name = path.partition(":")
    if not (module and name):
        raise CardError(f"unknown retriever {kind!r}; one of {', '.join(KINDS)}, or a path like package.module:Class")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CardError(f"retriever {kind!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Retriever)):
        raise CardError(f"{kind!r} is no Retriever; derive it from carl_gym.retrieval.Retriever")
    return found


def class_and_settings(card: IndexCard) -> tuple[type[Retriever], Any]:
    """What a recipe asks for: the class of its kind and an instance of the class's `Settings`. Raises CardError."""
    cls = retriever_class(card.kind)
    return cls, make_card(cls.Settings, card.settings, f"index card {card.id}, [settings]")


def corpus_of(recipe: str) -> str:
    """The corpus that a recipe names, "" where it names none.

    A recipe in retrieval_index/ is the user's and may name any file. One that is given as a file may be a stranger's:
    it names a corpus beside it, and cannot have another file of this machine indexed or served.

    Args:
        recipe: its name, or the path of its .toml file.

    Raises:
        CardError: no such recipe, or its corpus is outside of its folder.
    """
    corpus = load_card("retrieval_index", recipe, IndexCard).corpus
    if corpus and recipe.endswith(".toml"):
        return str(beside(find_card("retrieval_index", recipe), "corpus", corpus) or corpus)
    return corpus


def make_retriever(card: IndexCard | str, corpus: Corpus, progress: Progress = silent) -> Retriever:
    """The retriever of a recipe over a corpus.

    Built indexes are kept in the cache folder (see `builder`) and opened from there the next time, unless the card
    says `cache = false` or the class has no index (no `save` of its own).

    Args:
        card: a recipe, its name, or the path of its .toml file.
        corpus: what to search.
        progress: told how a build goes.

    Raises:
        CardError: unknown recipe or kind, or settings that are not allowed.
        ConfigError: the corpus is a shard, and the retriever none whose results could be merged.
        RetrievalError: the index can be neither read nor built.
    """
    if isinstance(card, str):
        card = load_card("retrieval_index", card, IndexCard)
    cls, settings = class_and_settings(card)
    check_shardable(cls, corpus.shard)
    if not _is_kept(card, cls):
        return cls.build(corpus, settings, progress=progress)
    return open_or_build(card.kind, cls, settings, corpus, progress)


def index_folders(card: IndexCard, corpus: Corpus) -> list[tuple[str, Path]]:
    """Where the built indexes of a recipe over a corpus belong, each with its kind: one, or those of a hybrid's parts,
    and none for what is kept nowhere. Raises CardError as `make_retriever`.
    """
    _, settings = class_and_settings(card)
    parts = settings.parts if card.kind == "hybrid" else ()
    cards = [load_card("retrieval_index", name, IndexCard) for name in parts] or [card]
    kept = [(card.kind, *class_and_settings(card)) for card in cards if _is_kept(card, retriever_class(card.kind))]
    return [(kind, index_folder(kind, cls, settings, corpus)) for kind, cls, settings in kept]


def _is_kept(card: IndexCard, cls: type[Retriever]) -> bool:
    """Whether the built index of a recipe is kept on disk."""
    return card.cache and cls.save is not Retriever.save
