"""What to compute of the prefixes that are about to be sampled from, and where: pure decisions, no tensors.

Nothing that several prefixes share is computed twice, up to `BLOCK - 1` tokens each: a shared beginning that long is
computed in one of the rows and copied to the others before the rest, so it takes a pass of the model of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 16
"""Shorter shared beginnings are computed once per prefix, as an engine with cache blocks of this size would."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `start:stop` of a prefix to compute; `others` are prefixes that begin alike and get a copy.

    Attributes:
        prefix: position of the prefix in the list that was planned.
        wave: passes of the model that must come before.
    """

    prefix: int
    start: int
    stop: int
    wave: int
    others: tuple[int, ...] = ()


def plan(prefixes: Sequence[tuple[int, ...]], starts: Sequence[int]) -> list[Run]:
    """The runs that complete all prefixes.

    Args:
        prefixes: token ids.
        starts: how many tokens of each are there already. Prefixes that are equal beyond that have the same.
    """
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, (prefix, start) in enumerate(zip(prefixes, starts, strict=True)):
        alike.setdefault((start, prefix[: start + BLOCK]), []).append(i)
    runs: list[Run] = []
    for members in alike.values():
        _split(prefixes, members, starts[members[0]], 0, runs)
    return runs


def _split(prefixes: Sequence[tuple[int, ...]], members: list[int], done: int, wave: int, runs: list[Run]) -> None:
    """The runs of prefixes that are equal up to `done` and further."""
    first, last = min(prefixes[i] for i in members), max(prefixes[i] for i in members)
    if first == last:
        if done < len(first):
            runs.append(Run(members[0], done, len(first), wave, tuple(members[1:])))
        return
    shared = common(first, last)
    if shared - done >= BLOCK:
        runs.append(Run(members[0], done, shared, wave, tuple(members[1:])))
        done, wave = shared, wave + 1
    branches: dict[int | None, list[int]] = {}
    for i in members:
        branches.setdefault(prefixes[i][shared] if shared < len(prefixes[i]) else None, []).append(i)
    for branch in branches.values():
        _split(prefixes, branch, done, wave, runs)


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    if tuple(left) == tuple(right):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def cut(lengths: Sequence[int], per_block: float) -> list[int]:
    """Where to cut rows, sorted by length, into blocks: the ends of the blocks.

    Every row of a block costs as much as its longest, and a block costs as much as `per_block` positions.
    """
    longest = np.asarray(lengths, dtype=np.float64)
    rows = np.arange(1, len(lengths) + 1)
    cost, begin = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=np.intp)
    for end in range(1, len(lengths) + 1):
        whole = cost[:end] + rows[:end][::-1] * longest[end - 1] + per_block
        begin[end] = whole.argmin()
        cost[end] = whole[begin[end]]
    ends, end = [], len(lengths)
    while end:
        ends.append(end)
        end = int(begin[end])
    return ends[::-1]
