"""The Policy contract on a transformers model, on CPU or GPU: batched sampling with a prefix-sharing KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from carl_gym.agents.kv_cache import PrefixCache
from carl_gym.agents.logprob_model import LogprobModel, evaluation_mode
from carl_gym.agents.policy import Completion, FinishReason, SampleRequest, check_requests, eos_ids
from carl_gym.errors import PolicyError

_GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seeds: np.ndarray, index: int) -> np.ndarray:
    """The `index`-th uniform number in [0, 1) of each seed's stream (SplitMix64, Steele et al. 2014).

    Counter-based: a request's numbers depend on its seed alone, never on the batch it is in.

    Args:
        seeds: (n,) uint64.
        index: position in the streams.
    """
    x = seeds + np.uint64(_GOLDEN * (index + 1) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


class _SlotCache(Cache):
    """Keys and values of a batch, one row per slot, each row at its own length.

    `kv`, the used rows of `buffer`, has shape (layers, 2, rows, length, heads, head_dim). The caller sets where the
    next `update` writes and how many positions it returns; what a row must not see is masked by the caller.
    """

    def __init__(self, buffer: torch.Tensor, rows: int) -> None:
        super().__init__(layers=[])
        self.buffer = buffer
        self.kv = buffer[:, :, :rows]
        self.rows = torch.arange(rows, device=buffer.device).unsqueeze(1)
        self.positions = self.rows
        self.visible = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.kv[layer_idx]
        keys[self.rows, self.positions] = key_states.transpose(1, 2)
        values[self.rows, self.positions] = value_states.transpose(1, 2)
        return keys[:, : self.visible].transpose(1, 2), values[:, : self.visible].transpose(1, 2)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows, in this order (repeats allowed, if the buffer has so many rows)."""
        self.kv = self.buffer[:, :, : len(rows)]
        self.kv[:, :, :, : self.visible] = self.buffer[:, :, rows, : self.visible]
        self.rows = torch.arange(len(rows), device=self.kv.device).unsqueeze(1)


@dataclass(slots=True)
class _Slot:
    """A request being served."""

    request: SampleRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason = "length"
    cached: int = 0


class TransformersPolicy:
    """Samples actions from a causal language model.

    Args:
        model: any transformers causal LM with full attention; it is used in place, never copied.
        tokenizer: its tokenizer.
        stop: an action ends when its text contains one of these.
        eos: ids that end an action; those of the model's generation config and its tokenizer by default.
        max_batch: most requests that are decoded together.
        cache_bytes: bound of the prefix cache.

    Raises:
        PolicyError: a model with sliding-window, linear or other attention that does not see the whole prefix, or
            one that changes its logits after the output head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        *,
        eos: set[int] | None = None,
        max_batch: int = 96,
        cache_bytes: int = 1 << 29,
    ) -> None:
        layer_types = set(getattr(model.config, "layer_types", None) or [])
        if layer_types - {"full_attention"} or (not layer_types and getattr(model.config, "sliding_window", None)):
            raise PolicyError(
                f"{type(model).__name__} has layers that do not attend to the whole prefix "
                f"({', '.join(sorted(layer_types)) or 'a sliding window'}); use one with full attention in every layer"
            )
        for setting in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, setting, None) not in (None, 1, 1.0):
                raise PolicyError(
                    f"{type(model).__name__} changes its logits after the output head (config.{setting}), which "
                    "LogprobModel does not; use a model without it"
                )
        self.model, self.tokenizer, self.stop = model, tokenizer, tuple(stop)
        self.version = 0
        self.max_batch = max_batch
        self.context = int(model.config.max_position_embeddings)
        self._cache = PrefixCache(cache_bytes)
        self._memory = torch.empty(0)
        self._scorer = LogprobModel(model)
        self._eos = eos_ids(model.generation_config, tokenizer) if eos is None else eos
        # Only a token with a stop string's last character can complete one; this look-up spares decoding.
        last = {s[-1] for s in self.stop}
        pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._may_stop = {i for i, piece in enumerate(pieces) if last & set(piece)}

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample one completion per request, in order.

        Raises:
            PolicyError: an empty or too long prefix, a temperature below 0, or a log-prob that is not finite.
        """
        check_requests(requests, self.context)
        slots = [_Slot(request) for request in requests]
        # Rows of similar length share a batch, which keeps padding small; results go back in request order.
        order = sorted(range(len(slots)), key=lambda i: len(slots[i].request.prefix))
        with evaluation_mode(self.model):
            for start in range(0, len(order), self.max_batch):
                self._serve([slots[i] for i in order[start : start + self.max_batch]])
        self._cache.shrink()
        return [self._completion(slot) for slot in slots]

    @torch.inference_mode()
    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs (temperature 1) of each continuation's tokens after its prefix, by a full forward pass.

        Raises:
            PolicyError: an empty prefix, or a sequence longer than the model's context.
        """
        scores = []
        with evaluation_mode(self.model):
            for prefix, continuation in zip(prefixes, continuations, strict=True):
                if not prefix or len(prefix) + len(continuation) > self.context:
                    raise PolicyError(
                        f"cannot score {len(continuation)} tokens after a prefix of {len(prefix)}: the prefix needs at "
                        f"least one token and the model's context is {self.context}"
                    )
                ids = torch.tensor([[*prefix, *continuation]], device=self.model.device)
                columns = torch.arange(len(prefix), ids.shape[1], device=ids.device)
                scores.append(self._scorer(ids, torch.zeros_like(columns), columns)[0].cpu().numpy())
        return scores

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        """Take over new weights (None: the model was changed in place) and empty the prefix cache."""
        if weights is not None:
            own = dict(self.model.named_parameters())
            if own.keys() != weights.keys():
                odd = sorted(own.keys() ^ weights.keys())
                raise PolicyError(f"these weights are not the model's: {odd[0]!r} and {len(odd) - 1} others differ")
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(torch.as_tensor(weights[name]))
        self.version += 1
        self._cache.clear()
        self._memory = torch.empty(0)  # weights that were not finite may have left such values in it

    def _serve(self, slots: list[_Slot]) -> None:
        """Prefill and decode one batch to the end."""
        cache, lengths, logits = self._prefill(slots)
        device = self.model.device
        seeds = np.array([slot.request.seed % 2**64 for slot in slots], dtype=np.uint64)
        temperatures = torch.tensor([slot.request.temperature for slot in slots], device=device).unsqueeze(1)
        rows: list[_Slot | None] = list(slots)  # the slot that each row of the cache decodes; None once it is complete
        alive = len(rows)
        for step in range(max(slot.request.max_tokens for slot in slots)):
            tokens, logprobs = _draw(logits, temperatures, uniforms(seeds, step))
            for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs, strict=True)):
                slot = rows[row]
                if slot is not None and self._append(slot, token, logprob):
                    self._store(slot, cache, row)
                    rows[row] = None
                    alive -= 1
            if not alive:
                return
            if alive <= 0.75 * len(rows):  # dropping rows copies the cache, so not for every single one
                left = torch.tensor([row for row, slot in enumerate(rows) if slot is not None], device=device)
                cache.keep(left)
                rows = [slot for slot in rows if slot is not None]
                seeds = seeds[left.cpu().numpy()]
                tokens, temperatures, lengths = tokens[left], temperatures[left], lengths[left]
            logits = self._forward(cache, tokens.unsqueeze(1), lengths.unsqueeze(1))[:, 0]
            lengths = lengths + 1

    def _prefill(self, slots: list[_Slot]) -> tuple[_SlotCache, torch.Tensor, torch.Tensor]:
        """Keys and values of every slot's prefix, its length, and the logits after it.

        Slots with one and the same prefix (siblings) are computed once. The last prefix token is never taken from the
        cache, so a fork and a fresh turn go the same way.
        """
        config, device = self.model.config, self.model.device
        unique: dict[tuple[int, ...], int] = {}
        index = [unique.setdefault(tuple(slot.request.prefix), len(unique)) for slot in slots]
        prefixes = list(unique)
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
        room = int(lengths.max()) + max(slot.request.max_tokens for slot in slots) + 1
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = _SlotCache(
            self._buffer((config.num_hidden_layers, 2, len(slots), room, heads, head_dim)), len(prefixes)
        )
        starts = []
        for row, prefix in enumerate(prefixes):
            cached, pieces = self._cache.find(prefix[:-1])
            if pieces:
                cache.kv[:, :, row, :cached] = torch.cat(pieces, dim=2)
            starts.append(cached)
        width = max(len(prefix) - start for prefix, start in zip(prefixes, starts, strict=True))
        ids = torch.zeros(len(prefixes), width, dtype=torch.long)
        positions = torch.full((len(prefixes), width), room - 1)  # padding writes to the last slot, which nobody reads
        for row, (prefix, start) in enumerate(zip(prefixes, starts, strict=True)):
            ids[row, : len(prefix) - start] = torch.tensor(prefix[start:])
            positions[row, : len(prefix) - start] = torch.arange(start, len(prefix))
        last = lengths - torch.tensor(starts, device=device) - 1
        logits = self._forward(cache, ids.to(device), positions.to(device), last)
        for slot, row in zip(slots, index, strict=True):
            slot.cached = starts[row]
        if len(prefixes) < len(slots):
            rows = torch.tensor(index, device=device)
            cache.keep(rows)
            lengths, logits = lengths[rows], logits[rows]
        return cache, lengths, logits

    def _buffer(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for a batch's keys and values, reused from batch to batch: fresh pages cost more than the arithmetic.

        What an earlier batch left in it is finite, so a masked position weighs exactly 0.
        """
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = torch.zeros(size, dtype=self.model.dtype, device=self.model.device)
        return self._memory[:size].view(shape)

    def _forward(
        self, cache: _SlotCache, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (rows, columns, vocabulary) at `positions` (rows, columns); of column `last` of each row if given."""
        room = cache.kv.shape[3]
        cache.positions = positions
        real = positions.masked_fill(positions == room - 1, 0)
        cache.visible = int(real.max()) + 1
        sees = torch.arange(cache.visible, device=ids.device) <= real.unsqueeze(-1)
        mask = torch.zeros(sees.shape, dtype=self.model.dtype, device=ids.device).masked_fill(~sees, float("-inf"))
        hidden = self.model.base_model(
            input_ids=ids, position_ids=real, attention_mask=mask.unsqueeze(1), past_key_values=cache, use_cache=True
        ).last_hidden_state
        if last is not None:
            hidden = hidden[torch.arange(len(last), device=ids.device), last]
        return self.model.get_output_embeddings()(hidden)

    def _append(self, slot: _Slot, token: int, logprob: float) -> bool:
        """Add a sampled token; True when the action is complete."""
        if not np.isfinite(logprob):
            raise PolicyError(f"log-prob {logprob} of token {token}: the model's weights or logits are not finite")
        slot.tokens.append(token)
        slot.logprobs.append(logprob)
        if token in self._eos:
            slot.finish = "eos"
            return True
        if token in self._may_stop:
            text = self.tokenizer.decode(slot.tokens)
            if any(stop in text for stop in self.stop):
                slot.finish = "stop"
                return True
        return len(slot.tokens) >= slot.request.max_tokens

    def _store(self, slot: _Slot, cache: _SlotCache, row: int) -> None:
        """Remember the keys and values of prefix and action, all but the last token's, which were never computed."""
        sequence = [*slot.request.prefix, *slot.tokens[:-1]]
        self._cache.insert(sequence, cache.kv[:, :, row, slot.cached : len(sequence)], slot.cached)

    def _completion(self, slot: _Slot) -> Completion:
        shown = slot.tokens[:-1] if slot.finish == "eos" else slot.tokens
        return Completion(tuple(slot.tokens), tuple(slot.logprobs), self.tokenizer.decode(shown), slot.finish)


def _draw(logits: torch.Tensor, temperatures: torch.Tensor, u: np.ndarray) -> tuple[torch.Tensor, list[float]]:
    """One token per row by inversion of the distribution function, and its log-prob; greedy where temperature is 0."""
    greedy = temperatures == 0
    logprobs = torch.log_softmax(logits.float() / temperatures.masked_fill(greedy, 1.0), dim=-1)
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    threshold = torch.from_numpy(u).to(cdf.device).unsqueeze(1) * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    if bool(greedy.any()):
        drawn = torch.where(greedy, logprobs.argmax(-1, keepdim=True), drawn)
    return drawn.squeeze(1), logprobs.gather(1, drawn).squeeze(1).tolist()
