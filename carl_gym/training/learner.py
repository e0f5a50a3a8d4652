"""The learner: rows in, one optimiser step out. Plain torch, blind to the algorithm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from carl_gym.agents.logprob_model import LogprobModel
from carl_gym.agents.tree_attention import tree_attention
from carl_gym.errors import CarlGymError
from carl_gym.training.adapter import plain_weights
from carl_gym.training.config import Packing
from carl_gym.training.loss import ppo_clip, truncated_importance
from carl_gym.training.packing import Batch, packs, padded, unique_tokens
from carl_gym.training.parallel import Spread
from carl_gym.training.ranks import ALONE, Ranks
from carl_gym.training.segments import Row
from carl_gym.training.zero3 import Zero3

_ZERO = np.zeros(1, np.float32)
IDLE = Row(np.zeros(2, np.int64), np.ones(1, np.int64), _ZERO, _ZERO, _ZERO)
"""Goes through the model and weighs nothing, where a process has no rows left and the others need it beside them."""


class NotFinite(CarlGymError):
    """A step that cannot be taken: loss or gradient is infinite or no number."""


@dataclass(frozen=True, slots=True)
class UpdateMetrics:
    """What one optimiser step was like.

    Attributes:
        loss: PPO-clip loss, or that of truncated importance weights.
        clip_fraction: weighted share of trained tokens whose gradient the clip stopped, or whose weight is the cap.
        gap: largest |log-prob of the learner - log-prob of the sampler| of a trained token, in nats; before the first
            step on a batch that is not stale it is pure numerical noise.
        entropy: mean entropy of the token distributions at the trained positions, in nats.
        grad_norm: global norm before clipping.
        tokens: tokens that went through the model, padding included.
        needed: tokens that had to: the different beginnings of what comes before a trained token.
    """

    loss: float
    clip_fraction: float
    gap: float
    entropy: float
    grad_norm: float
    tokens: int
    needed: int


class Learner:
    """AdamW on what learns of a causal LM, with gradient accumulation over micro-batches of bounded size.

    Several processes take one step together, each with rows of its own: the step is that of all rows.

    Args:
        model: trained in place.
        learning_rate: constant.
        temperature: what the sampler divided logits by; the ratio needs the same distribution.
        max_grad_norm: gradients are scaled down to this global norm.
        packing: "tree" takes what several rows begin with through the model once; "rows" takes each row by itself,
            padded, for models whose attention has no form for trees.
        batch_tokens: most tokens of a micro-batch (of rows: number times longest).
        weight_decay: AdamW's.
        autocast: compute dtype; weights and optimiser stay float32.
        gradient_checkpointing: compute activations again on the way back instead of keeping them.
        importance_cap: for rows that older weights may have sampled: `truncated_importance` with this cap in place of
            the algorithm's clip.
        ranks: the processes that learn together.

    Raises:
        PolicyError: trees do not suit the model.
        ConfigError: shards do not suit it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        learning_rate: float,
        temperature: float = 1.0,
        max_grad_norm: float = 1.0,
        packing: Packing = "tree",
        batch_tokens: int = 8192,
        weight_decay: float = 0.0,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        importance_cap: float | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if packing == "tree":
            with tree_attention(model):  # refused here, before anything is sampled
                pass
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = LogprobModel(model)
        self.temperature = temperature
        self.packing = packing
        self.batch_tokens = batch_tokens
        self.autocast = autocast
        self.importance_cap = importance_cap
        self.ranks = ranks
        adamw = partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
        self._spread = (Zero3 if ranks.zero3 else Spread)(self.model, ranks, adamw, max_grad_norm, autocast)
        self.optimizer = self._spread.optimizer

    def update(self, rows: Sequence[Row], clip_low: float, clip_high: float) -> UpdateMetrics | None:
        """One optimiser step on the minibatch; None, and no step, when nothing is to be trained.

        With several processes each gives its own rows, whose weights sum to 1 over all of them; the step and what is
        returned are the same in all.

        Raises:
            NotFinite: loss or gradient is not finite; weights and optimiser are left as they were.
        """
        model, ranks = self.model.model, self.ranks
        as_tree = self.packing == "tree"
        batches = self._batches(rows)
        passes = int(ranks.largest(len(batches))[0])
        if not passes:
            return None
        heads = [1] * passes
        if self._spread.in_lockstep:
            own = [self.model.head_calls(len(batch.targets)) for batch in batches]
            heads = list(map(int, ranks.largest(*own, *heads[len(own) :])))
        model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = clipped = gap = entropy = 0.0
        tokens = trained = 0
        with tree_attention(model) if as_tree else nullcontext():
            for number in range(passes):
                busy = number < len(batches)
                batch = batches[number] if busy else self._batches([IDLE])[0]
                ids, index, columns, targets, sampled, advantages, weights = batch.tensors(self.model.device)
                with self._spread.apart(last=number == passes - 1):
                    with self._autocast():
                        logprobs, entropies = self._spread(
                            ids,
                            index,
                            columns,
                            self.temperature,
                            targets=targets,
                            tree=batch.tree,
                            head_calls=heads[number],
                        )
                    if self.importance_cap is None:
                        terms = ppo_clip(logprobs, sampled, advantages, weights, clip_low, clip_high)
                    else:
                        terms = truncated_importance(logprobs, sampled, advantages, weights, self.importance_cap)
                    (terms.loss * ranks.count).backward()  # gradients are averaged over processes
                if busy:
                    loss += float(terms.loss.detach())
                    clipped += float(terms.clipped)
                    gap = max(gap, float(terms.gap))
                    entropy += float(entropies.sum())
                    tokens += ids.numel()
                    trained += len(logprobs)
        weight, needed = sum(float(row.weights.sum()) for row in rows), unique_tokens(rows)
        loss, clipped, entropy, weight, *counts = ranks.total(loss, clipped, entropy, weight, trained, tokens, needed)
        (gap,) = ranks.largest(gap)
        norm = self._spread.step(allowed=math.isfinite(loss))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NotFinite(
                f"the loss ({loss}) or the gradient norm ({norm}) is not finite; no step was taken. Lower the learning "
                "rate, or resume from the last checkpoint"
            )
        trained, tokens, needed = map(int, counts)
        return UpdateMetrics(loss, clipped / weight, gap, entropy / trained, norm, tokens, needed)

    def weights(self, *, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """The model's parameters by name, an adapter's added to them. Every process has to ask for them; the first one
        gets them, or all do.
        """
        found = self._spread.weights(keep=everywhere or self.ranks.is_main)
        return plain_weights(self.model.model, found) if found else found

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """The parameters that learn, by name. Every process has to ask for them; the first one gets them."""
        return self._spread.weights(keep=self.ranks.is_main, trained=True)

    def state(self) -> dict[str, Any]:
        """What the optimiser remembers, for `load_state`. Every process has to ask for it; the first one gets it."""
        return self._spread.state()

    @property
    def writes_shards(self) -> bool:
        """Whether `write_shards` is to be used in place of `state`, which would put everything together."""
        return self._spread.writes_shards

    def write_shards(self, folder: Path, group: ProcessGroup | None = None) -> Future[Any]:
        """The same, each process its own part, into a folder that all see; see `Spread.write_shards`."""
        return self._spread.write_shards(folder, group)

    def read_shards(self, folder: Path) -> None:
        """Go on with what was written so, by any number of processes."""
        self._spread.read_shards(folder)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what another learner remembers, however many processes it had."""
        self._spread.load_state(state)

    def _batches(self, rows: Sequence[Row]) -> list[Batch]:
        if not rows:
            return []
        return packs(rows, self.batch_tokens) if self.packing == "tree" else padded(rows, self.batch_tokens)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        # In DeepSpeed's shards its cache would keep a copy of every layer that was put together.
        return torch.autocast(self.model.device.type, self.autocast, cache_enabled=not self._spread.in_lockstep)
