"""The prefix cache against a naive one: the set of all stored prefixes, and keys and values made from a prefix."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carl_gym.agents.kv_cache import PrefixCache

LAYERS, HEADS, DIM = 2, 1, 2
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 4
UNBOUNDED = 1 << 40

sequences = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


def keys_and_values(tokens: Sequence[int], start: int = 0) -> torch.Tensor:
    """Keys and values (layers, 2, tokens, heads, head_dim) that, as real ones do, depend on all that came before."""
    kv = torch.empty(LAYERS, 2, len(tokens), HEADS, DIM)
    for end in range(1, len(tokens) + 1):
        kv[:, :, end - 1] = float(hash(tuple(tokens[:end])) % 1_000_003)
    kv += torch.arange(LAYERS * 2 * DIM).reshape(LAYERS, 2, 1, 1, DIM) * 1e6  # every layer, key and value is its own
    return kv[:, :, start:]


def longest(stored: set[tuple[int, ...]], tokens: tuple[int, ...]) -> int:
    """The naive search."""
    return max((n for n in range(1, len(tokens) + 1) if tokens[:n] in stored), default=0)


def prefixes(tokens: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {tokens[:n] for n in range(1, len(tokens) + 1)}


def check(cache: PrefixCache, tokens: tuple[int, ...]) -> int:
    """What the cache finds has the right length and content; returns the length."""
    found, pieces = cache.find(tokens)
    assert sum(piece.shape[2] for piece in pieces) == found
    if found:
        assert torch.equal(torch.cat(pieces, dim=2), keys_and_values(tokens[:found]))
    return found


def put(cache: PrefixCache, tokens: tuple[int, ...]) -> None:
    """Store a sequence as a policy does: only what was not found is handed over."""
    found, _ = cache.find(tokens)
    cache.insert(tokens, keys_and_values(tokens, found), found)


def cached(cache: PrefixCache, inserted: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """All prefixes that the cache still holds, by asking for each."""
    return {p for p in set().union(*map(prefixes, inserted), set()) if cache.find(p)[0] == len(p)}


@given(st.lists(st.lists(sequences, min_size=1, max_size=4), max_size=8), st.lists(sequences, max_size=8))
@settings(deadline=None)
def test_finds_the_longest_stored_prefix_with_its_own_keys_and_values(
    batches: list[list[tuple[int, ...]]], queries: list[tuple[int, ...]]
) -> None:
    """Sequences of a batch are all looked up before the first is stored, so they overlap in every way."""
    cache, stored = PrefixCache(UNBOUNDED), set[tuple[int, ...]]()
    for batch in batches:
        found = [check(cache, tokens) for tokens in batch]
        assert found == [longest(stored, tokens) for tokens in batch]
        for tokens, start in zip(batch, found, strict=True):
            cache.insert(tokens, keys_and_values(tokens, start), start)
            stored |= prefixes(tokens)
    for tokens in queries:
        assert check(cache, tokens) == longest(stored, tokens)
    assert cache.bytes == len(stored) * TOKEN_BYTES, "a shared prefix is stored once"


@given(
    st.integers(0, 12),
    st.lists(st.tuples(sequences, st.booleans(), st.booleans()), min_size=1, max_size=16),
)
@settings(deadline=None)
def test_eviction_keeps_the_bound_and_never_lies(room: int, steps: list[tuple[tuple[int, ...], bool, bool]]) -> None:
    """Whatever is dropped, also between a look-up and its insertion, what is still found is right."""
    cache, inserted = PrefixCache(room * TOKEN_BYTES), set[tuple[int, ...]]()
    for tokens, shrink_between, shrink_after in steps:
        start = check(cache, tokens)
        if shrink_between:
            cache.shrink()
        cache.insert(tokens, keys_and_values(tokens, start), start)
        inserted.add(tokens)
        if shrink_after:
            cache.shrink()
            assert cache.bytes <= cache.max_bytes
        for other in inserted:
            check(cache, other)
        assert cache.bytes == len(cached(cache, inserted)) * TOKEN_BYTES
    cache.shrink()
    assert cache.bytes <= cache.max_bytes


def test_the_bound_is_used() -> None:
    """Eviction stops as soon as the rest fits."""
    cache = PrefixCache(6 * TOKEN_BYTES)
    for tokens in [(0, 1, 2), (1, 2, 0), (2, 1)]:
        put(cache, tokens)
    cache.shrink()
    assert cache.bytes == 5 * TOKEN_BYTES


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_the_least_recently_used_goes_first(kept: int) -> None:
    cache = PrefixCache(3 * TOKEN_BYTES)
    branches = [(7, 0, 0), (7, 1, 1), (7, 2, 2)]
    for tokens in branches:
        put(cache, tokens)
    cache.find(branches[kept])
    cache.shrink()
    assert [cache.find(tokens)[0] for tokens in branches] == [3 if i == kept else 1 for i in range(3)]


def test_a_prefix_outlives_what_hangs_on_it() -> None:
    """A parent is never dropped before its children, whose keys and values mean nothing without it."""
    cache = PrefixCache(2 * TOKEN_BYTES)
    put(cache, (1, 2))
    put(cache, (1, 2, 3, 4))
    put(cache, (1, 2, 5, 6))
    cache.shrink()
    assert check(cache, (1, 2, 3, 4)) == check(cache, (1, 2, 5, 6)) == 2


def test_insertion_after_an_eviction_stores_nothing_that_hangs_in_the_air() -> None:
    cache = PrefixCache(UNBOUNDED)
    put(cache, (1, 2, 3))
    start, _ = cache.find((1, 2, 3, 4))
    cache.max_bytes = 0
    cache.shrink()
    cache.insert((1, 2, 3, 4), keys_and_values((1, 2, 3, 4), start), start)
    assert cache.find((1, 2, 3, 4)) == (0, [])
    assert cache.bytes == 0
    put(cache, (1, 2, 3, 4))
    assert check(cache, (1, 2, 3, 4)) == 4


def test_a_split_in_the_middle_keeps_both_halves() -> None:
    cache = PrefixCache(UNBOUNDED)
    put(cache, (1, 2, 3, 4, 5))
    put(cache, (1, 2, 9))
    assert check(cache, (1, 2, 3, 4, 5)) == 5
    assert check(cache, (1, 2, 9, 9)) == 3
    assert check(cache, (1, 2, 4)) == 2
    assert cache.bytes == 6 * TOKEN_BYTES


def test_clear_forgets_everything() -> None:
    cache = PrefixCache(UNBOUNDED)
    put(cache, (1, 2, 3))
    cache.clear()
    assert cache.bytes == 0
    assert cache.find((1, 2, 3)) == (0, [])
    put(cache, (1, 2))
    assert check(cache, (1, 2, 3)) == 2


def test_the_cache_keeps_its_own_copy() -> None:
    """The policy goes on writing to the buffer that it inserts from."""
    cache = PrefixCache(UNBOUNDED)
    buffer = keys_and_values((1, 2, 3))
    cache.insert((1, 2, 3), buffer, 0)
    buffer.zero_()
    assert check(cache, (1, 2, 3)) == 3
