"""Controls: what an algorithm would do if its credit knew nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm
from carl_gym.algorithms.credit import FloatArray
from carl_gym.rollouts.tree import RolloutTree, derive_seed


def with_shuffled_advantages(algorithm: Algorithm) -> Algorithm:
    """The same, but every trained action gets the advantage of another one of the same training step, drawn at random.

    Size and sign of the advantages stay as they are and what they say about actions goes: whatever a run with them
    learns, it does not learn from credit. The draw depends on the seeds of the trees alone.
    """

    def shuffled(trees: Sequence[RolloutTree]) -> list[FloatArray]:
        advantages, selected = algorithm.credit(trees), algorithm.selection(trees)
        rng = np.random.default_rng(derive_seed("shuffle", *(tree.seed for tree in trees)))
        pool = rng.permutation(np.concatenate([a[mask] for a, mask in zip(advantages, selected, strict=True)]))
        taken = 0
        for advantage, mask in zip(advantages, selected, strict=True):
            count = int(mask.sum())
            advantage[mask] = pool[taken : taken + count]
            taken += count
        return advantages

    return replace(algorithm, name=f"{algorithm.name} (shuffled)", credit=shuffled)
