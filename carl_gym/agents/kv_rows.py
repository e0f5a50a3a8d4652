"""Keys and values of the rows that are being sampled, and attention to them.

A row is one sequence. Rows of similar length lie in a block, each with the same room, so that one matrix product serves
the block. A pass of the model is over parts, each some rows of a block with the same number of new tokens. Where the
model takes attention from outside, the tokens of all parts go through it as one sequence without padding, and only
attention sees parts. Any other model gets a pass per part and a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from carl_gym.agents.tree_attention import odd_attention
from carl_gym.errors import PolicyError

_NAME = "carl_rows"
_active: ContextVar[KvRows] = ContextVar("rows that the model attends to")


@dataclass(slots=True, eq=False)
class Block:
    """`size` rows with `room` positions each, from the place `start` of the memory on."""

    start: int
    size: int
    room: int


@dataclass(slots=True)
class Part:
    """Rows next to each other in a block, and what their new tokens see.

    Attributes:
        start: place of the first row.
        rows: number of rows.
        room: positions between one row and the next.
        columns: new tokens per row.
        visible: positions that any of them sees.
        mask: (rows, columns, visible or more), added to the scores; None when the new tokens are the last of the
            visible ones, and each sees all that came before it.
    """

    start: int
    rows: int
    room: int
    columns: int
    visible: int
    mask: torch.Tensor | None = None


class KvRows(Cache):
    """Memory for rows, lent out in blocks. It grows as needed, and must be emptied when what it holds may be no number.

    A place is one position of a row for all layers and heads. `kv` has the shape (layers, 2, places * heads, head_dim);
    within a row a head's positions are next to each other.

    Args:
        model: whose keys and values these are; it is used in place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(layers=[])
        config = model.config
        self.model = model
        self.layer_count = int(config.num_hidden_layers)
        self.heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        # A model loaded with attention of its own choice keeps it.
        self.packs = config._attn_implementation == "sdpa" and bool(
            model._supports_attention_backend and model._can_set_attn_implementation()
        )
        self.kv = torch.zeros(self.layer_count, 2, 0, self.head_dim, dtype=model.dtype, device=model.device)
        self._blocks: list[Block] = []
        self._parts: Sequence[Part] = []
        self._places = torch.empty(0)
        self._layer = 0

    def clear(self) -> None:
        """Forget everything, rows under way included."""
        if (self.kv.dtype, self.kv.device) != (self.model.dtype, self.model.device):
            self.release()
        self._blocks = []
        with torch.inference_mode():
            self.kv.zero_()  # fresh memory would cost more

    def release(self) -> None:
        """Forget everything and free the memory."""
        self._blocks = []
        self.kv = self.kv.new_zeros(self.layer_count, 2, 0, self.head_dim).to(self.model.device, self.model.dtype)

    @property
    def bytes_per_place(self) -> int:
        """What attention reads in one layer for one position of one row."""
        return 2 * self.heads * self.head_dim * self.kv.itemsize

    # Blocks

    def lend(self, size: int, room: int) -> Block:
        """A block of rows; its old content is finite, and means nothing."""
        start, wanted = 0, size * room
        for block in self._blocks:
            if block.start - start >= wanted:
                break
            start = block.start + block.size * block.room
        places = self.kv.shape[2] // self.heads
        if start + wanted > places:
            grown = self.kv.new_zeros(
                *self.kv.shape[:2], max(start + wanted, places * 3 // 2) * self.heads, self.head_dim
            )
            if self._blocks:
                grown[:, :, : start * self.heads] = self.kv[:, :, : start * self.heads]
            self.kv = grown
        block = Block(start, size, room)
        self._blocks = sorted([*self._blocks, block], key=lambda block: block.start)
        return block

    def give_back(self, block: Block) -> None:
        """The block's rows are done."""
        self._blocks.remove(block)

    def rows(self, block: Block) -> torch.Tensor:
        """Keys and values of a block (layers, 2, rows, heads, room, head_dim), to read and write."""
        taken = self.kv[:, :, block.start * self.heads : (block.start + block.size * block.room) * self.heads]
        return taken.view(self.layer_count, 2, block.size, self.heads, block.room, self.head_dim)

    # A pass of the model

    @contextmanager
    def _attended(self) -> Iterator[None]:
        """Within it the model attends to these rows."""
        config, active = self.model.config, _active.set(self)
        before = config._attn_implementation
        if self.packs:
            config._attn_implementation = _NAME  # what set_attn_implementation does, without its walk over all modules
        try:
            yield
        finally:
            _active.reset(active)
            config._attn_implementation = before

    def forward(
        self, parts: Sequence[Part], ids: torch.Tensor, positions: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (tokens, width) of the parts' new tokens, whose keys and values are written on the way.

        Args:
            parts: in the order of the tokens.
            ids: (tokens,), part by part and in it row by row.
            positions: (tokens,) in their rows.
            places: (tokens, heads) where their keys and values go, in rows of `kv`.
        """
        if self.packs:
            column = all(part.columns == 1 for part in parts)
            shape = (-1, 1) if column else (1, -1)
            return self._pass(parts, ids.view(shape), positions.view(shape), places, None)
        hidden, start = [], 0
        for part in parts:
            tokens = slice(start, start := start + part.rows * part.columns)
            shape = (part.rows, part.columns)
            mask = causal_mask(part, self.kv) if part.mask is None else part.mask[:, :, : part.visible]
            mask = mask.expand(part.rows, -1, -1).unsqueeze(1)
            inputs = ids[tokens].view(shape), positions[tokens].view(shape), places[tokens]
            hidden.append(self._pass([part], *inputs, mask))
        return torch.cat(hidden)

    def _pass(
        self,
        parts: Sequence[Part],
        ids: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        self._parts, self._places = parts, places.reshape(-1)
        with self._attended():
            hidden: torch.Tensor = self.model.base_model(
                input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self, use_cache=True
            ).last_hidden_state
        return hidden.reshape(ids.numel(), -1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values (batch, heads, tokens, head_dim). Returns what a model's own attention sees."""
        self._layer = layer_idx
        for kept, new in zip(self.kv[layer_idx], (key_states, value_states), strict=True):
            if (new.shape[1], new.shape[3]) != (self.heads, self.head_dim):
                raise PolicyError(
                    f"{type(self.model).__name__} keeps {new.shape[1]} heads of {new.shape[3]} for a token, and its "
                    f"config says {self.heads} of {self.head_dim}; sampling with backend transformers has no form for "
                    "it, take another backend"
                )
            kept.index_copy_(0, self._places, new.transpose(1, 2).reshape(-1, self.head_dim))
        if self.packs:
            return key_states, value_states
        keys, values = (self._seen(kept, self._parts[0]) for kept in self.kv[layer_idx])
        return keys, values

    def _seen(self, kept: torch.Tensor, part: Part) -> torch.Tensor:
        """Keys or values (rows, heads, visible, head_dim) of a part, where they lie."""
        heads, room, dim = self.heads, part.room, self.head_dim
        shape, strides = (part.rows, heads, part.visible, dim), (heads * room * dim, room * dim, dim, 1)
        return kept.as_strided(shape, strides, kept.storage_offset() + part.start * heads * dim)

    def attend(self, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of new tokens (tokens, heads, head_dim), part by part, to their rows."""
        kept_keys, kept_values = self.kv[self._layer]
        outputs, start = [], 0
        for part in self._parts:
            asked = query[start : (start := start + part.rows * part.columns)]
            keys, values = self._seen(kept_keys, part), self._seen(kept_values, part)
            attend = _attend_column if part.columns == 1 else _attend_run
            outputs.append(attend(asked, keys, values, part, scale))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def causal_mask(part: Part, like: torch.Tensor) -> torch.Tensor:
    """The mask (columns, visible) of a part that has none, with the type and device of `like`."""
    first = part.visible - part.columns
    mask = torch.full((part.columns, part.visible), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(first + 1)


def _attend_column(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: Part, scale: float
) -> torch.Tensor:
    """One new token per row. Plain products: fused kernels, made for many queries, are several times slower."""
    rows, heads, visible, dim = keys.shape
    scores = torch.matmul((query * scale).view(rows, heads, -1, dim), keys.transpose(2, 3))
    if part.mask is not None:
        scores += part.mask[:, :, :visible].unsqueeze(1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights, values).view(rows, -1, dim)


def _attend_run(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: Part, scale: float
) -> torch.Tensor:
    """The new tokens of one row."""
    first = part.columns == part.visible
    if not first and part.mask is None:
        part.mask = causal_mask(part, keys).unsqueeze(0)  # once for all layers
    out = nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=None if first or part.mask is None else part.mask.unsqueeze(1),  # the fused kernel wants 4 dimensions
        is_causal=first,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: (batch, heads, tokens, head_dim) -> (batch, tokens, heads, head_dim)."""
    if odd := odd_attention(others):
        raise PolicyError(
            f"{type(module).__name__} attends with {', '.join(odd)}, which sampling has no form for; load the model "
            "with attn_implementation='eager'"
        )
    batch, heads, tokens, dim = query.shape
    asked = query.transpose(1, 2).reshape(batch * tokens, heads, dim)
    seen = _active.get().attend(asked, dim**-0.5 if scaling is None else scaling)
    return seen.view(batch, tokens, heads, dim), None


AttentionInterface.register(_NAME, _attend)
