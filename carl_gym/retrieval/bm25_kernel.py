"""The search of BM25 for many queries or passages, compiled. Imported only where it pays: numba takes its time.

It adds the same float32 numbers in the same order as the numpy path of bm25.py, so the results are equal to the bit.
The best are then looked for among the passages of the query's rarer terms only, as far as the others together cannot
make up a score that is good enough (the idea of MaxScore, Turtle and Flood 1995).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

F = TypeVar("F", bound=Callable[..., object])
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Score = float | np.float32


def compiled(function: F) -> F:
    """Compile on the first call; once per machine where numba finds a folder for its cache."""
    try:
        return cast(F, njit(cache=True, nogil=True)(function))
    except RuntimeError:  # no folder that can be written
        return cast(F, njit(nogil=True)(function))


@compiled
def _worse(score: Score, row: int, other_score: Score, other_row: int) -> bool | np.bool:
    """Whether a passage ranks after another: by a lower score, or by its place in the corpus."""
    return score < other_score or (score == other_score and row > other_row)


@compiled
def sift_down(scores: Floats, rows: Longs, size: int) -> None:
    """Restore the heap (worst passage first) after its first entry was replaced."""
    i = 0
    while True:
        worst = i
        for child in (2 * i + 1, 2 * i + 2):
            if child < size and _worse(scores[child], rows[child], scores[worst], rows[worst]):
                worst = child
        if worst == i:
            return
        scores[i], scores[worst] = scores[worst], scores[i]
        rows[i], rows[worst] = rows[worst], rows[i]
        i = worst


@compiled
def offer(scores: Floats, rows: Longs, size: int, score: Score, row: int) -> int:
    """Put an entry into the heap where there is room or it is better than the worst one. Returns the heap's size."""
    if size == len(scores):
        if _worse(scores[0], rows[0], score, row):
            scores[0], rows[0] = score, row
            sift_down(scores, rows, size)
        return size
    i = size
    while i > 0 and _worse(score, row, scores[(i - 1) // 2], rows[(i - 1) // 2]):
        scores[i], rows[i] = scores[(i - 1) // 2], rows[(i - 1) // 2]
        i = (i - 1) // 2
    scores[i], rows[i] = score, row
    return size + 1


@compiled
def search(
    data: Floats, indices: Ints, indptr: Longs, highest: Floats, passages: int, terms: Longs, offsets: Longs, k: int
) -> tuple[Longs, Floats, Longs]:
    """The k best passages for each query.

    Args:
        data, indices, indptr: the index, see `bm25.Index`.
        highest: for each term of the index its highest score, or 0 as long as nobody has looked: filled in here.
        passages: how many there are.
        terms: the term numbers of all queries, one query after another.
        offsets: query q has the terms `offsets[q]` to `offsets[q + 1]`.
        k: between 1 and `passages`.

    Returns:
        Rows and scores, (queries, k), best first and ties by row; and how many of them each query has.
    """
    queries = len(offsets) - 1
    best_rows = np.zeros((queries, k), np.int64)
    best_scores = np.zeros((queries, k), np.float32)
    counts = np.zeros(queries, np.int64)
    scores = np.zeros(passages, np.float32)
    longest = np.max(np.diff(offsets)) if queries else 0
    starts, ends = np.zeros(longest, np.int64), np.zeros(longest, np.int64)
    rest = np.zeros(longest + 1)  # the most that the terms from this one on can add up to
    for q in range(queries):
        n = 0
        for term in terms[offsets[q] : offsets[q + 1]]:
            start, end = indptr[term], indptr[term + 1]
            for i in range(start, end):
                scores[np.uint32(indices[i])] += data[i]  # unsigned: numba need not look for negative ones
            most = highest[term]
            if most == 0:
                for score in data[start:end]:
                    most = max(most, score)
                highest[term] = most  # at once: other threads may read it
            at = n  # rarest first
            while at > 0 and ends[at - 1] - starts[at - 1] > end - start:
                starts[at], ends[at], rest[at] = starts[at - 1], ends[at - 1], rest[at - 1]
                at -= 1
            starts[at], ends[at], rest[at] = start, end, most
            n += 1
        rest[n] = 0
        for t in range(n - 1, -1, -1):
            rest[t] += rest[t + 1]
        rounding = 1 + n * 2.0**-22  # a float32 sum of n numbers is off by less
        heap_scores, heap_rows = best_scores[q], best_rows[q]
        # The passages of one term, when there are k of them, have k scores that the k best cannot be below.
        bound = np.float32(1e-45)  # above 0
        for t in range(n):
            if ends[t] - starts[t] >= k:
                size = 0
                for row in indices[starts[t] : ends[t]]:
                    size = offer(heap_scores, heap_rows, size, scores[np.uint32(row)], row)
                bound = heap_scores[0]
                break
        size = 0
        for t in range(n):
            if rest[t] * rounding < bound:
                break
            for row in indices[starts[t] : ends[t]]:
                score = scores[np.uint32(row)]
                if score >= bound:
                    size = offer(heap_scores, heap_rows, size, score, row)
                    scores[np.uint32(row)] = 0  # not twice
                    if size == k:
                        bound = heap_scores[0]
        scores[:] = 0
        counts[q] = size
        # Worst to the end, one after the other.
        for end in range(size - 1, 0, -1):
            heap_scores[0], heap_scores[end] = heap_scores[end], heap_scores[0]
            heap_rows[0], heap_rows[end] = heap_rows[end], heap_rows[0]
            sift_down(heap_scores, heap_rows, end)
    return best_rows, best_scores, counts
