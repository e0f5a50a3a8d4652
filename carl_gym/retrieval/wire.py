"""What server and client say to each other: the one place where the shapes of the protocol are written down.

Searching follows Search-R1's server (search_r1/search/retrieval_server.py), opening pages ASearcher's
(tools/local_retrieval_server.py); rows carry the keys that the clients of both look for.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import orjson

from carl_gym.retrieval.corpus import Passage, join_contents, split_contents
from carl_gym.retrieval.retriever import Retriever

CORPUS_HEADER = "x-corpus-fingerprint"
"""Response header: the fingerprint of the corpus that the answer comes from."""
RETRIEVER_HEADER = "x-retriever-fingerprint"
"""Response header: `retriever_fingerprint` of what searched it."""

Row = dict[str, Any]
"""A passage in a response: keys id, url (the id again: what /access takes), title, contents."""


def row(passage: Passage) -> Row:
    """A passage as a row; `passage_of` is its inverse."""
    return {"id": passage.id, "url": passage.id, "title": passage.title, "contents": join_contents(passage)}


def passage_of(value: object) -> Passage:
    """The passage in a row, of our server (exactly what was sent) or of another one that gives `contents`.

    Rows without an id, as Search-R1's server gives them from a Lucene index, get a hash of their contents.

    Raises:
        ValueError: the row has not the keys or types that it must have.
    """
    if not isinstance(value, dict) or not isinstance(text := value.get("contents"), str):
        raise ValueError(f"expected a row with a text under 'contents', found {clipped(value)}")
    match value.get("id"):
        case str(name) if name:
            pass
        case int(number) if not isinstance(number, bool):
            name = str(number)
        case None:
            name = blake2b(text.encode(), digest_size=16).hexdigest()
        case other:
            raise ValueError(f"expected an id, found {clipped(other)}")
    title = value.get("title")
    if isinstance(title, str) and text.startswith(f'"{title}"\n'):
        return Passage(name, title, text[len(title) + 3 :])
    return Passage(name, *split_contents(text))


def retriever_fingerprint(retriever: Retriever) -> str:
    """Hash of what the retriever says its scores depend on."""
    settings = orjson.dumps(retriever.describe(), option=orjson.OPT_SORT_KEYS)
    return blake2b(settings, digest_size=16).hexdigest()


def clipped(value: object, length: int = 80) -> str:
    """A value for an error message, not longer than that."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
