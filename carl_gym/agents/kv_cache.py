"""A byte-bounded radix tree over token prefixes that keeps their keys and values.

Forks and fresh turns share one path: whatever part of a prefix was ever computed with the current weights is
found here, the rest is computed. The tree belongs to one policy and is emptied whenever the weights change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from carl_gym.agents.prefill import common


@dataclass(eq=False, slots=True)
class _Segment:
    """Tokens on one edge of the radix tree, with keys and values of shape (layers, 2, tokens, heads, head_dim)."""

    tokens: tuple[int, ...]
    kv: torch.Tensor
    parent: _Segment | None
    children: dict[int, _Segment] = field(default_factory=dict)
    used: int = 0


class PrefixCache:
    """Keys and values by token prefix.

    Args:
        max_bytes: the least recently used leaves are dropped when the tensors take more.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._root = _Segment((), torch.empty(0), None)
        self._clock = 0
        self.bytes = 0

    def find(self, tokens: Sequence[int]) -> tuple[int, list[torch.Tensor]]:
        """The longest cached prefix of `tokens`: its length, and its keys and values in pieces, in order."""
        self._clock += 1
        node, start, pieces = self._root, 0, []
        while start < len(tokens):
            child = node.children.get(tokens[start])
            if child is None:
                break
            shared = common(child.tokens, tokens[start : start + len(child.tokens)])
            child.used = self._clock
            pieces.append(child.kv[:, :, :shared])
            start += shared
            if shared < len(child.tokens):
                break
            node = child
        return start, pieces

    def insert(self, tokens: Sequence[int], kv: torch.Tensor, start: int) -> None:
        """Keep keys and values of `tokens[start:]` (`kv` holds just these); `tokens[:start]` came from `find`.

        What has been inserted meanwhile is kept, so two requests with one prefix store it once.
        """
        node, done = self._root, 0
        while done < len(tokens):
            child = node.children.get(tokens[done])
            if child is None:
                break
            shared = common(child.tokens, tokens[done : done + len(child.tokens)])
            done += shared
            node = child if shared == len(child.tokens) else self._split(child, shared)
        if done < start:
            return  # an eviction came in between: there is nothing to hang the rest on
        if done < len(tokens):
            piece = kv[:, :, done - start :].clone()
            node.children[tokens[done]] = _Segment(tuple(tokens[done:]), piece, node, used=self._clock)
            self.bytes += piece.nbytes

    def shrink(self) -> None:
        """Drop least recently used leaves until the tree is within its bound."""
        while self.bytes > self.max_bytes:
            leaves = sorted((s for s in self._segments() if not s.children), key=lambda s: s.used)
            for leaf in leaves:
                assert leaf.parent is not None
                del leaf.parent.children[leaf.tokens[0]]
                self.bytes -= leaf.kv.nbytes
                if self.bytes <= self.max_bytes:
                    break

    def _segments(self) -> list[_Segment]:
        found, stack = [], list(self._root.children.values())
        while stack:
            found.append(stack.pop())
            stack.extend(found[-1].children.values())
        return found

    def _split(self, node: _Segment, at: int) -> _Segment:
        """Cut a segment in two; returns the upper half."""
        assert node.parent is not None
        # Clones, so that evicting one half frees its memory.
        upper = _Segment(node.tokens[:at], node.kv[:, :, :at].clone(), node.parent, {node.tokens[at]: node}, node.used)
        node.parent.children[node.tokens[0]] = upper
        node.tokens, node.kv, node.parent = node.tokens[at:], node.kv[:, :, at:].clone(), upper
        return upper
