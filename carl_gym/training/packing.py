"""Rows -> batches for the model: packed, so that what several rows begin with goes through it once; or padded.

Rows of one tree begin alike, and sorting them puts them in the depth-first order of the tree of their tokens: a row
shares with the one before it as much as with any, and adds the rest. A pack is a stretch of sorted rows, so the
trees of different questions share what their prompts have in common, and a tree that is too large for one pack is cut
between two rows, with the beginning that they share repeated.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from carl_gym.agents.tree_attention import TokenTree
from carl_gym.training.segments import Row

PACK_COST = 64
"""What a pack costs beside its tokens, in tokens: of two ways to cut that repeat as much, fewer packs win."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes through the model at once: token ids, and in aligned arrays the tokens that train.

    Attributes:
        tokens: (rows, columns) ids; one row in depth-first order with a `tree`, right-padded rows without.
        rows: (n,) row of each trained token.
        columns: (n,) one more than the column of the token before it.
        targets: (n,) the trained tokens.
        logprobs: (n,) at sampling.
        advantages: (n,) advantages.
        weights: (n,) loss weights.
        tree: who attends to whom.
    """

    tokens: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    targets: np.ndarray
    logprobs: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray
    tree: TokenTree | None

    def tensors(self, device: torch.device) -> list[torch.Tensor]:
        """All arrays, in the order of their names above."""
        arrays = [getattr(self, field.name) for field in fields(self) if field.name != "tree"]
        return [torch.from_numpy(array).to(device) for array in arrays]


def padded(rows: Sequence[Row], most_tokens: int) -> list[Batch]:
    """Every row by itself, beside others of similar length, in batches of at most `most_tokens` tokens with padding."""
    return [_padded(part) for part in micro_batches(rows, most_tokens)]


def micro_batches(rows: Sequence[Row], most_tokens: int) -> list[list[Row]]:
    """Rows of similar length together, each batch within the token budget (a longer single row stands alone)."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.tokens), reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= most_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _padded(rows: Sequence[Row]) -> Batch:
    tokens = np.zeros((len(rows), max(len(row.tokens) for row in rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
    numbers = np.repeat(np.arange(len(rows)), [len(row.positions) for row in rows])
    columns = np.concatenate([row.positions for row in rows])
    return _batch(tokens, numbers, columns, rows, None)


def _batch(
    tokens: np.ndarray, numbers: np.ndarray, columns: np.ndarray, rows: Sequence[Row], tree: TokenTree | None
) -> Batch:
    targets = np.concatenate([row.tokens[row.positions] for row in rows])
    logprobs, advantages, weights = (
        np.concatenate([getattr(row, name) for row in rows]) for name in ("logprobs", "advantages", "weights")
    )
    return Batch(tokens, numbers, columns, targets, logprobs, advantages, weights, tree)


def packs(rows: Sequence[Row], most_tokens: int) -> list[Batch]:
    """All rows in packs of at most `most_tokens` tokens (a longer single row stands alone), with few repeated."""
    ordered, shared = _sorted(rows)
    return [_pack(ordered[start:stop], shared[start:stop]) for start, stop in _cut(ordered, shared, most_tokens)]


def unique_tokens(rows: Sequence[Row]) -> int:
    """Tokens that must go through the model at least: the different beginnings of what is before a trained token."""
    return sum(_added(*_sorted(rows)))


def _sorted(rows: Sequence[Row]) -> tuple[list[Row], np.ndarray]:
    """Rows in the order of their tokens, and how many tokens each shares with the one before."""
    ordered = sorted(rows, key=lambda row: _inputs(row).astype(">u4").tobytes())
    shared = [_shared(_inputs(one), _inputs(two)) for one, two in itertools.pairwise(ordered)]
    return ordered, np.array([0, *shared][: len(ordered)])


def _added(rows: Sequence[Row], shared: np.ndarray) -> list[int]:
    return [len(_inputs(row)) - int(common) for row, common in zip(rows, shared, strict=True)]


def _inputs(row: Row) -> np.ndarray:
    """The last token of a row is only predicted."""
    return row.tokens[:-1]


def _shared(one: np.ndarray, two: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(two))
    differ = one[:length] != two[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def _cut(rows: Sequence[Row], shared: np.ndarray, most_tokens: int) -> list[tuple[int, int]]:
    """Bounds of the packs: of all ways to cut, the one of fewest tokens in total."""
    count = len(rows)
    before = np.cumsum([0, *_added(rows, shared)])
    alone = shared - before[:-1]  # plus before[stop]: tokens of a pack that starts here
    best, cut, low = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64), 0
    for stop in range(1, count + 1):
        while low < stop - 1 and before[stop] + alone[low] > most_tokens:
            low += 1
        costs = best[low:stop] + alone[low:stop]
        cut[stop] = low + costs.argmin()
        best[stop] = costs.min() + before[stop] + PACK_COST
    bounds = []
    while count:
        bounds.append((int(cut[count]), count))
        count = bounds[-1][0]
    return bounds[::-1]


def _pack(rows: Sequence[Row], shared: np.ndarray) -> Batch:
    path = np.empty(max(len(row.tokens) for row in rows), dtype=np.int64)  # position of the current row's tokens
    tokens, depths, columns = [], [], []
    ends = np.empty(sum(len(row.tokens) for row in rows), dtype=np.int64)
    size = length = 0
    for index, row in enumerate(rows):
        inputs, common = _inputs(row), int(shared[index]) if index else 0
        ends[path[common:length]] = size  # what the last row had and this one has not
        length = len(inputs)
        path[common:length] = np.arange(size, size + length - common)
        tokens.append(inputs[common:])
        depths.append(np.arange(common, length))
        size += length - common
        columns.append(path[row.positions - 1] + 1)
    ends[path[:length]] = size
    found = np.concatenate(columns)
    tree = TokenTree(np.concatenate(depths), ends[:size])
    return _batch(np.concatenate(tokens)[None], np.zeros_like(found), found, rows, tree)
