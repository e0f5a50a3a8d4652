"""Attention over a token tree that lies in one sequence: every token sees itself and its ancestors, nothing else.

In depth-first order the descendants of token k are exactly the tokens after it up to `ends[k]`, so

    q sees k    <=>    k <= q < ends[k]

and all queries of a stretch of keys are one slice. On CPUs the keys are cut into tiles, each a call of PyTorch's flash
kernel on slices, and the parts are joined by their log-sum-exp: work and memory follow the pairs that see each other,
not the square of the tree. On GPUs the same rule is a FlexAttention block mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from carl_gym.errors import PolicyError

TILE_COST = 4096
"""What a call of the kernel costs, in query-key pairs: below that, computing pairs in vain is cheaper than a call."""
_NAME = "carl_tree"
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_ODD = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class Tile:
    """Keys `start:stop` and the queries `start:end` that see any of them.

    `mask` (end - start, stop - start) is added to the scores; None for a single run of tokens, where all queries from
    `stop` on see all keys.
    """

    start: int
    stop: int
    end: int
    mask: torch.Tensor | None


@dataclass(slots=True)
class TokenTree:
    """Who sees whom in a sequence of tokens that is a tree, or several, in depth-first order.

    Attributes:
        positions: (tokens,) depth of each token.
        ends: (tokens,) one past its last descendant.
        layers: attention layers that have used it.
    """

    positions: np.ndarray
    ends: np.ndarray
    layers: int = 0
    _tiles: dict[torch.dtype, list[Tile]] = field(default_factory=dict)

    def sees(self, queries: slice, keys: slice) -> np.ndarray:
        """(queries, keys) bool."""
        q, k = np.arange(queries.start, queries.stop)[:, None], np.arange(keys.start, keys.stop)
        return (k <= q) & (q < self.ends[keys])

    def tiles(self, dtype: torch.dtype) -> list[Tile]:
        """Cuts the keys; neighbouring runs share a tile where that costs less than a call each."""
        if dtype not in self._tiles:
            self._tiles[dtype] = [self._tile(*bounds, dtype) for bounds in self._cut()]
        return self._tiles[dtype]

    def _cut(self) -> list[tuple[int, int, int]]:
        # Neighbours with one end are parent and child without siblings: a run.
        starts = np.flatnonzero(np.diff(self.ends, prepend=-1)).tolist()
        tiles: list[tuple[int, int, int]] = []
        for start, stop in zip(starts, [*starts[1:], len(self.ends)], strict=True):
            run = (start, stop, int(self.ends[start]))
            if tiles:
                last = tiles[-1]
                joined = (last[0], stop, max(last[2], run[2]))
                if _pairs(joined) < _pairs(last) + _pairs(run) + TILE_COST:
                    tiles[-1] = joined
                    continue
            tiles.append(run)
        return tiles

    def _tile(self, start: int, stop: int, end: int, dtype: torch.dtype) -> Tile:
        if (self.ends[start:stop] == end).all():
            return Tile(start, stop, end, None)
        sees = torch.from_numpy(self.sees(slice(start, end), slice(start, stop)))
        # Not -inf: a query that sees nothing here must get a finite result, which then weighs nothing.
        return Tile(
            start, stop, end, torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min / 4)
        )


def _pairs(tile: tuple[int, int, int]) -> int:
    start, stop, end = tile
    return (stop - start) * (end - start)


def odd_attention(options: Mapping[str, object]) -> list[str]:
    """Which options of a transformers attention function ask for more than scaled products of queries and keys."""
    return [name for name in _ODD if options.get(name) is not None]


def limited_layers(model: PreTrainedModel) -> str:
    """What kinds of layers do not attend to the whole prefix; empty when all do."""
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if not kinds and getattr(model.config, "sliding_window", None):
        return "a sliding window"
    return ", ".join(sorted(kinds - {"full_attention"}))


@contextmanager
def tree_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` attends by the tree that `run_tree` gives it, forward and backward.

    Raises:
        PolicyError: the model does not take attention from outside, or has layers that do not see the whole prefix.
    """
    if limits := limited_layers(model):
        raise PolicyError(
            f"{type(model).__name__} has layers that do not attend to the whole prefix ({limits}), which trees have no "
            "form for; use packing=rows"
        )
    if any(getattr(model.config, name, 0) for name in _DROPOUTS):
        raise PolicyError(
            f"{type(model).__name__} has attention dropout, which trees have no form for; use packing=rows"
        )
    before = model.config._attn_implementation
    name = _NAME if model.device.type == "cpu" else "flex_attention"
    with suppress(ValueError, ImportError):  # a model, or a torch, without FlexAttention
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise PolicyError(
            f"the attention of {type(model).__name__} cannot be exchanged for {name}, which trees need on "
            f"{model.device.type}; use packing=rows"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def run_tree(model: PreTrainedModel, input_ids: torch.Tensor, tree: TokenTree) -> torch.Tensor:
    """Hidden states (1, tokens, width) of a packed sequence (1, tokens); call it within `tree_attention`.

    Raises:
        PolicyError: a layer did not use the tree, or attends in a way that it has no form for.
    """
    positions = torch.from_numpy(tree.positions).to(input_ids.device).unsqueeze(0)
    if input_ids.device.type == "cpu":
        tree.layers = 0
        # A mask of four dimensions is taken as it is: this one, which fits nothing, keeps models from building theirs.
        given: dict[str, object] = {"attention_mask": torch.empty(1, 1, 0, 0), "tree": tree}
    else:
        given = {"attention_mask": _block_mask(tree, input_ids.device)}
    hidden: torch.Tensor = model.base_model(
        input_ids=input_ids, position_ids=positions, use_cache=False, **given
    ).last_hidden_state
    if "tree" in given and tree.layers != model.config.num_hidden_layers:
        raise PolicyError(
            f"{tree.layers} of {model.config.num_hidden_layers} layers of {type(model).__name__} attended by the tree; "
            "use packing=rows"
        )
    return hidden


def _block_mask(tree: TokenTree, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    ends = torch.from_numpy(tree.ends).to(device)

    def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < ends[k])

    return create_block_mask(sees, None, None, len(ends), len(ends), device=device)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: TokenTree | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """A transformers attention function: query (1, heads, tokens, size), key and value with as many heads or fewer."""
    odd = odd_attention(others) + ["dropout"] * (dropout > 0)
    if tree is None or odd:
        what = f"has {', '.join(odd)}" if odd else "did not get the tree"
        raise PolicyError(f"{type(module).__name__} {what}, so it cannot train on trees; use packing=rows")
    tree.layers += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    # Heads that share a key head lie along their own dimension, so that keys are never repeated in memory.
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings leave them in float32
    grouped = query[0].unflatten(0, (key.shape[1], groups))
    shared = (x[0].unsqueeze(1).expand(-1, groups, -1, -1) for x in (key, value))
    out = _TreeAttention.apply(grouped, *shared, tree.tiles(query.dtype), scale)
    return out.flatten(0, 1).transpose(0, 1).unsqueeze(0), None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _TreeAttention(torch.autograd.Function):
    """Query, key, value (key heads, group, tokens, size) -> the same shape."""

    @staticmethod
    def forward(ctx, query, key, value, tiles, scale):  # type: ignore[no-untyped-def]
        heads, groups, tokens, size = query.shape
        out = query.new_zeros(tokens, heads, groups, size, dtype=torch.float32).permute(1, 2, 0, 3)
        lse = query.new_full((heads, groups, tokens), -torch.inf, dtype=torch.float32)
        for queries, keys, causal, mask in _calls(tiles):
            part, part_lse = _flash(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, attn_mask=mask, scale=scale
            )
            joined = torch.logaddexp(lse[:, :, queries], part_lse)
            out[:, :, queries] *= (lse[:, :, queries] - joined).exp_().unsqueeze(-1)
            out[:, :, queries] += part * (part_lse - joined).exp_().unsqueeze(-1)
            lse[:, :, queries] = joined
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        # Given output and log-sum-exp of the whole attention, the kernel's gradient for some keys is their exact share.
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=torch.float32) for x in (query, key, value)]
        for queries, keys, causal, mask in _calls(ctx.tiles):
            q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            parts = _flash_backward(
                grad[:, :, queries], q, k, v, out[:, :, queries], lse[:, :, queries], 0.0, causal,
                attn_mask=mask, scale=ctx.scale,
            )  # fmt: skip
            for total, part, at in zip(grads, parts, (queries, keys, keys), strict=True):
                total[:, :, at] += part
        return (*(total.to(query.dtype) for total in grads), None, None)


def _calls(tiles: list[Tile]) -> Iterator[tuple[slice, slice, bool, torch.Tensor | None]]:
    """Slices of queries and keys, whether they are one causal square, and the mask, of each call of the kernel."""
    for tile in tiles:
        keys = slice(tile.start, tile.stop)
        if tile.mask is not None:
            yield slice(tile.start, tile.end), keys, False, tile.mask[None, None]
            continue
        yield keys, keys, True, None
        if tile.stop < tile.end:
            yield slice(tile.stop, tile.end), keys, False, None


AttentionInterface.register(_NAME, _attend)
