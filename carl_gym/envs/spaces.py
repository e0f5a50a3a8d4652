"""Spaces of text that check type and length only.

`gymnasium.spaces.Text` knows a fixed set of characters; actions and passages may contain any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Space

_WORDS = ("river", "city", "film", "author", "born", "capital", "director", "music", "prize", "1984", "Zürich", "東京")


class TextSpace(Space[str]):
    """Every string of at most `max_length` characters."""

    def __init__(self, max_length: int = 1_000_000, seed: int | np.random.Generator | None = None) -> None:
        self.max_length = max_length
        super().__init__(seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Text has no fixed size."""
        return False

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """One to six random words. Neither a mask nor probabilities are supported."""
        if mask is not None or probability is not None:
            raise ValueError("a text space samples without mask and probability; pass None")
        words = self.np_random.choice(_WORDS, size=self.np_random.integers(1, 7))
        return " ".join(words.tolist())[: self.max_length]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.max_length == self.max_length


class ActionSpace(TextSpace):
    """Every string is an action that can be taken; samples are well-formed ones."""

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A search, an access or an answer with random words."""
        tool = self.np_random.choice(["search", "access", "answer"])
        return f"<{tool}>{super().sample(mask, probability)}</{tool}>"
