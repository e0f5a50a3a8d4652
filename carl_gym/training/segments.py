"""From credited trees to what trains: segments keep the tree, rows are its plain linear export.

    RolloutTree + advantages + weights --segments--> one Segment per node --rows--> sequences for a simple learner

A packer that trains each shared prefix once takes segments; other trainers take rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carl_gym.algorithms.credit import FloatArray
from carl_gym.errors import PolicyError
from carl_gym.rollouts.tree import RolloutTree


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens that one node adds to its parent's: the action into it, then what was observed (or the prompt).

    Attributes:
        node_id: position in the tree's list of segments.
        parent: `node_id` of the segment before; None at a root.
        policy_version: which weights sampled the action.
        tokens: (n,) ids.
        action_length: the first so many tokens are the action; the rest are never trained on.
        logprobs: (action_length,) log-probs at sampling.
        advantage: of the action, the same for each of its tokens.
        weight: of each action token in the loss; 0 when the action is not trained.
        emphasis: (action_length,) factors on the advantage; None: 1 for every token.
    """

    node_id: int
    parent: int | None
    policy_version: int
    tokens: np.ndarray
    action_length: int
    logprobs: np.ndarray
    advantage: float
    weight: float
    emphasis: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One linear sequence and its trained positions, with which arrays other than `tokens` are aligned.

    Attributes:
        tokens: (n,) ids, prompt first.
        positions: (m,) columns of trained tokens, ascending, each at least 1.
        logprobs: (m,) log-probs at sampling.
        advantages: (m,) advantages.
        weights: (m,) loss weights.
        policy_version: which weights sampled the trained tokens.
    """

    tokens: np.ndarray
    positions: np.ndarray
    logprobs: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray
    policy_version: int = 0


def segments(
    tree: RolloutTree, advantages: FloatArray, weights: FloatArray, emphasis: Sequence[FloatArray] | None = None
) -> list[Segment]:
    """One segment per node, in node order (a parent before its children).

    Args:
        tree: complete.
        advantages: by node id, of the edge into the node.
        weights: by node id, of each token of that edge.
        emphasis: by node id, a factor for each token of that edge.

    Raises:
        PolicyError: log-probs are not known.
    """
    found = []
    for node in tree.nodes:
        action = node.action.token_ids if node.action else ()
        logprobs = node.action.logprobs if node.action else ()
        if not all(map(math.isfinite, logprobs)):
            raise PolicyError(
                f"an action on question {tree.question.id!r} has log-probs that are not known; train on rollouts of "
                "a model that gives them (a hosted model does not)"
            )
        found.append(
            Segment(
                node_id=node.id,
                parent=node.parent,
                policy_version=tree.policy_version,
                tokens=np.array([*action, *node.observation_tokens], dtype=np.int64),
                action_length=len(action),
                logprobs=np.array(logprobs, dtype=np.float32),
                advantage=float(advantages[node.id]),
                weight=float(weights[node.id]),
                emphasis=None if emphasis is None else emphasis[node.id],
            )
        )
    return found


def rows(tree: Sequence[Segment]) -> list[Row]:
    """The fewest sequences in which every trained action is unmasked exactly once.

    A row runs from the root to a trained action that has no trained action below it, and ends there. An action of
    zero advantage has no gradient: it stays in the denominator, which the weights carry, but needs no row.
    """
    trains = [segment.weight > 0 and segment.advantage != 0 for segment in tree]
    below = [False] * len(tree)  # whether something trains below
    for segment in reversed(tree):
        if segment.parent is not None:
            below[segment.parent] |= trains[segment.node_id] or below[segment.node_id]
    taken: set[int] = set()
    found = []
    for end in tree:
        if not trains[end.node_id] or below[end.node_id]:
            continue
        path = [end]
        while path[-1].parent is not None:
            path.append(tree[path[-1].parent])
        path.reverse()
        fresh = [trains[segment.node_id] and segment.node_id not in taken for segment in path]
        taken.update(segment.node_id for segment in path)
        found.append(_row(path, fresh))
    return found


def _row(path: list[Segment], trained: list[bool]) -> Row:
    starts = np.cumsum([0, *(len(segment.tokens) for segment in path)])
    parts = [(segment, int(start)) for segment, start, fresh in zip(path, starts, trained, strict=False) if fresh]
    lengths = [segment.action_length for segment, _ in parts]
    last = path[-1]
    return Row(
        tokens=np.concatenate([*(segment.tokens for segment in path[:-1]), last.tokens[: last.action_length]]),
        positions=np.concatenate([np.arange(start, start + segment.action_length) for segment, start in parts]),
        logprobs=np.concatenate([segment.logprobs for segment, _ in parts]),
        advantages=np.concatenate([_token_advantages(segment) for segment, _ in parts]),
        weights=np.repeat(np.array([segment.weight for segment, _ in parts], dtype=np.float32), lengths),
        policy_version=last.policy_version,
    )


def _token_advantages(segment: Segment) -> np.ndarray:
    every = np.full(segment.action_length, segment.advantage, dtype=np.float32)
    return every if segment.emphasis is None else every * segment.emphasis.astype(np.float32)
