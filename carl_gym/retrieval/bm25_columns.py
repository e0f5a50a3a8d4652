"""The search of BM25 in large corpora, compiled: coarse scores of all passages first, exact ones of the few best.

The lists of common words are long, and adding them up is most of a search. So these words are kept a second time as
columns: a byte per passage, the score in steps and rounded up, which vector instructions add for many passages at
once. No coarse score is too low, and none too high by more than a step per word. That tells which passages can be among
the best, and only their scores are added up as numpy does in bm25.py: the results are equal to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from carl_gym.retrieval.bm25_kernel import Floats, Ints, Longs, compiled, offer, sift_down

Bytes = npt.NDArray[np.uint8]
Coarse = npt.NDArray[np.uint16]

COMMON = 32
"""A word is common when one passage in so many has it."""

BUDGET = 1 << 28
"""Most bytes for all columns."""

BLOCK = 128
"""Passages that are looked at together."""

_STEPS = 250
"""Of the highest score of a common word: with one more it fits a byte."""

_TILE = 1 << 13
"""Passages whose coarse scores are added up together: those and the columns' bytes fit the fastest cache."""

_SEARCH = 32
"""Rows of a list that are read in the time in which one is searched for."""

_FEW = 4096
"""Rows of one list among which the first bound is looked for."""


class Columns(NamedTuple):
    """What an index' common words are worth, by passage.

    Attributes:
        slots: for each term the number of its column, or -1.
        steps: scores, uint8[columns + 1, passages in whole blocks]; the last column is empty.
        starts: where the passages of block b begin in a column's list, int64[columns, blocks + 1].
        scale: steps in a score of 1.
        longest: terms that a query may have: with more, coarse scores could overflow.
    """

    slots: Ints
    steps: Bytes
    starts: Longs
    scale: np.float32
    longest: int


def make_columns(data: Floats, indices: Ints, indptr: Longs, passages: int) -> Columns:
    """The columns of an index (see `bm25.Index`): of its most common words, as many as `BUDGET` has room for."""
    blocks = -(-passages // BLOCK)
    sizes = np.diff(indptr)
    terms = np.flatnonzero(sizes * COMMON > passages)
    terms = terms[np.argsort(-sizes[terms], kind="stable")[: BUDGET // (blocks * BLOCK)]]
    slots = np.full(len(sizes), -1, np.int32)
    slots[terms] = np.arange(len(terms))
    top = max((data[indptr[term] : indptr[term + 1]].max() for term in terms), default=data.max(initial=1))
    scale = np.float32(_STEPS / top)
    steps, starts = _fill(data, indices, indptr, terms, scale, blocks)
    most = int(data.max(initial=1) * scale) + 2
    return Columns(slots, steps, starts, scale, np.iinfo(np.uint16).max // most)


@compiled
def _fill(
    data: Floats, indices: Ints, indptr: Longs, terms: Longs, scale: np.float32, blocks: int
) -> tuple[Bytes, Longs]:
    steps = np.zeros((len(terms) + 1, blocks * BLOCK), np.uint8)
    starts = np.zeros((len(terms), blocks + 1), np.int64)
    for slot, term in enumerate(terms):
        start, end = indptr[term], indptr[term + 1]
        block = 0
        for i in range(start, end):
            row = np.uint32(indices[i])
            steps[slot, row] = np.uint8(np.int32(data[i] * scale) + 1)
            while block * BLOCK <= row:
                starts[slot, block] = i
                block += 1
        starts[slot, block:] = end
    return steps, starts


@compiled
def _put(coarse: Coarse, a: Bytes, b: Bytes, c: Bytes, d: Bytes) -> None:
    for i in range(len(coarse)):
        coarse[i] = np.uint16(np.uint16(a[i]) + np.uint16(b[i]) + np.uint16(c[i]) + np.uint16(d[i]))


@compiled
def _add(coarse: Coarse, a: Bytes, b: Bytes, c: Bytes, d: Bytes) -> None:
    for i in range(len(coarse)):
        coarse[i] += np.uint16(np.uint16(a[i]) + np.uint16(b[i]) + np.uint16(c[i]) + np.uint16(d[i]))


@compiled
def _any_from(block: Coarse, least: np.uint16) -> np.bool:
    """Whether any of a block's scores is at least `least`."""
    found = np.uint16(0)
    for i in range(BLOCK):  # a sum, and without a way out: so it becomes vector instructions
        found = np.uint16(found + np.uint16(block[i] >= least))
    return found > 0


@compiled
def _last(rows: Ints, row: int | np.int32) -> np.int64:
    """The last place of ascending rows that is not beyond `row`; 0 if there is none."""
    start, size = np.int64(0), len(rows)
    while size > 1:
        half = size >> 1
        start += half * np.int64(rows[np.uint32(start + half)] <= row)  # no branch, which would be guessed wrong
        size -= half
    return start


@compiled
def _add_up(
    coarse: Coarse, data: Floats, indices: Ints, columns: Columns, starts: Longs, ends: Longs, slot: Longs
) -> None:
    """Coarse scores of all passages for a query's terms: term t's list is from `starts[t]` to `ends[t]`."""
    _, steps, _, scale, _ = columns
    common = np.append(slot[slot >= 0], np.full(4, len(steps) - 1))  # by fours, filled up with the empty column
    for base in range(0, len(coarse), _TILE):
        tile = coarse[base : base + _TILE]
        end = base + len(tile)
        for i in range(0, max(len(common) - 4, 1), 4):
            a, b = steps[common[i]][base:end], steps[common[i + 1]][base:end]
            c, d = steps[common[i + 2]][base:end], steps[common[i + 3]][base:end]
            if i == 0:
                _put(tile, a, b, c, d)
            else:
                _add(tile, a, b, c, d)
    for t in range(len(slot)):
        if slot[t] < 0:
            rows, values = indices[starts[t] : ends[t]], data[starts[t] : ends[t]]
            for i in range(len(rows)):
                coarse[np.uint32(rows[i])] += np.uint16(np.int32(values[i] * scale) + 1)


@compiled
def _candidates(
    coarse: Coarse, some: Ints, slack: int, heap_scores: Floats, heap_rows: Longs, found: Ints
) -> tuple[int, np.uint16]:
    """Puts the passages that can be among the best into `found`, ascending: all from a coarse score on.

    Args:
        coarse: of all passages.
        some: rows of passages, all different: the first bound comes from them.
        slack: how far below the k-th best coarse score one of the k best passages can have its own.
        heap_scores, heap_rows: room for k.
        found: room for them; where it is too small, as many are put in.

    Returns:
        How many there are, `len(found)` where there are more; and the score.
    """
    k = len(heap_scores)
    bound, size = np.float32(0), 0
    for row in some:
        score = np.float32(coarse[np.uint32(row)])
        if size < k or score > bound:
            size = offer(heap_scores, heap_rows, size, score, row)
            if size == k:
                bound = heap_scores[0]
    least = np.uint16(max(1, int(bound) - slack))
    size, m = 0, 0
    for base in range(0, len(coarse), BLOCK):
        block = coarse[base : base + BLOCK]
        if _any_from(block, least):
            for i in range(BLOCK):
                if block[i] >= least:
                    if m == len(found):
                        return m, least
                    found[m] = base + i
                    m += 1
                    score = np.float32(block[i])
                    if score >= bound:
                        size = offer(heap_scores, heap_rows, size, score, base + i)
                        if size == k and heap_scores[0] > bound:
                            bound = heap_scores[0]
                            least = np.uint16(max(1, int(bound) - slack))
    kept = 0
    for row in found[:m]:
        if coarse[np.uint32(row)] >= least:
            found[kept] = row
            kept += 1
    return kept, least


@compiled
def _sum(
    found: Ints, least: np.uint16, coarse: Coarse, data: Floats, indices: Ints, columns: Columns,
    starts: Longs, ends: Longs, slot: Longs, sums: Floats,
) -> None:  # fmt: skip
    """Puts the exact scores of the found passages, which are those with a coarse one from `least` on, into `sums`."""
    sums[:] = 0
    for t in range(len(slot)):
        rows, values = indices[starts[t] : ends[t]], data[starts[t] : ends[t]]
        if slot[t] >= 0:
            column, of_block = columns.steps[slot[t]], columns.starts[slot[t]]
            for j in range(len(found)):
                if column[np.uint32(found[j])] > 0:
                    block = np.uint32(found[j]) // np.uint32(BLOCK)
                    start = of_block[block]
                    sums[j] += data[start + _last(indices[start : of_block[block + 1]], found[j])]
        elif len(found) * _SEARCH < len(rows):
            for j in range(len(found)):
                at = _last(rows, found[j])
                if rows[at] == found[j]:
                    sums[j] += values[at]
        else:
            for i in range(len(rows)):
                if coarse[np.uint32(rows[i])] >= least:
                    sums[_last(found, rows[i])] += values[i]


@compiled
def search(
    data: Floats, indices: Ints, indptr: Longs, columns: Columns, passages: int, terms: Longs, offsets: Longs, k: int
) -> tuple[Longs, Floats, Longs]:
    """The k best passages for each query: as `bm25_kernel.search`, and what it returns.

    No query may have more than `columns.longest` terms. A count of -1 says that too many passages are nearly as good
    as the best: that query is not for this search.
    """
    queries = len(offsets) - 1
    best_rows = np.zeros((queries, k), np.int64)
    best_scores = np.zeros((queries, k), np.float32)
    counts = np.zeros(queries, np.int64)
    coarse = np.zeros(columns.steps.shape[1], np.uint16)
    found = np.zeros(1024 + 8 * k + passages // 64, np.int32)
    sums = np.zeros(len(found), np.float32)
    for q in range(queries):
        own = terms[offsets[q] : offsets[q + 1]]
        if len(own) == 0:
            continue
        starts, ends = indptr[own], indptr[own + 1]
        slot = columns.slots[own].astype(np.int64)
        _add_up(coarse, data, indices, columns, starts, ends, slot)
        rarest = 0
        for t in range(len(own)):
            if ends[t] - starts[t] < ends[rarest] - starts[rarest] or ends[rarest] - starts[rarest] < k:
                rarest = t if ends[t] - starts[t] >= k else rarest
        some = indices[starts[rarest] : min(ends[rarest], starts[rarest] + max(k, _FEW))]
        # A passage among the best is as good as the k-th best, and its coarse score is at most so much below its.
        slack = len(own) + 2 + len(own) // 64
        heap_scores, heap_rows = best_scores[q], best_rows[q]
        m, least = _candidates(coarse, some, slack, heap_scores, heap_rows, found)
        if m == len(found):
            counts[q] = -1
            continue
        _sum(found[:m], least, coarse, data, indices, columns, starts, ends, slot, sums[:m])
        size = 0
        for j in range(m):
            size = offer(heap_scores, heap_rows, size, sums[j], found[j])
        counts[q] = size
        for end in range(size - 1, 0, -1):
            heap_scores[0], heap_scores[end] = heap_scores[end], heap_scores[0]
            heap_rows[0], heap_rows[end] = heap_rows[end], heap_rows[0]
            sift_down(heap_scores, heap_rows, end)
    return best_rows, best_scores, counts
