"""The learner: rows in, one optimiser step out. Plain torch, blind to the algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from carl_gym.agents.logprob_model import LogprobModel
from carl_gym.errors import CarlGymError
from carl_gym.training.loss import ppo_clip
from carl_gym.training.segments import Row


@dataclass(frozen=True, slots=True)
class UpdateMetrics:
    """What one optimiser step was like.

    Attributes:
        loss: PPO-clip loss.
        clip_fraction: weighted share of trained tokens whose gradient the clip stopped.
        gap: largest |log-prob of the learner - log-prob of the sampler| of a trained token, in nats; before the first
            step on a batch it is pure numerical noise.
        entropy: mean entropy of the token distributions at the trained positions, in nats.
        grad_norm: global norm before clipping.
        tokens: tokens that went through the model, padding included.
    """

    loss: float
    clip_fraction: float
    gap: float
    entropy: float
    grad_norm: float
    tokens: int


class Learner:
    """AdamW on a causal LM, with gradient accumulation over micro-batches of bounded size.

    Args:
        model: trained in place.
        learning_rate: constant.
        temperature: what the sampler divided logits by; the ratio needs the same distribution.
        max_grad_norm: gradients are scaled down to this global norm.
        batch_tokens: most tokens (rows times longest row) of a micro-batch.
        weight_decay: AdamW's.
        autocast: compute dtype; weights and optimiser stay float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        learning_rate: float,
        temperature: float = 1.0,
        max_grad_norm: float = 1.0,
        batch_tokens: int = 8192,
        weight_decay: float = 0.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = LogprobModel(model)
        self.temperature = temperature
        self.max_grad_norm = max_grad_norm
        self.batch_tokens = batch_tokens
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay
        )

    def update(self, rows: Sequence[Row], clip_low: float, clip_high: float) -> UpdateMetrics | None:
        """One optimiser step on the minibatch; None, and no step, when nothing is to be trained.

        Raises:
            CarlGymError: loss or gradient is not finite; the weights are left as they were.
        """
        if not rows:
            return None
        device = self.model.model.device
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = clipped = gap = entropy = 0.0
        tokens = trained = 0
        for batch in micro_batches(rows, self.batch_tokens):
            ids, row_index, columns, sampled, advantages, weights = (t.to(device) for t in _collate(batch))
            with torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                logprobs, entropies = self.model(ids, row_index, columns, self.temperature)
            terms = ppo_clip(logprobs, sampled, advantages, weights, clip_low, clip_high)
            terms.loss.backward()
            loss += float(terms.loss.detach())
            clipped += float(terms.clipped)
            gap = max(gap, float(terms.gap))
            entropy += float(entropies.sum())
            tokens += ids.numel()
            trained += len(columns)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise CarlGymError(
                f"the loss ({loss}) or the gradient norm ({norm}) is not finite; no step was taken. Lower the learning "
                "rate, or resume from the last checkpoint"
            )
        self.optimizer.step()
        weight = sum(float(row.weights.sum()) for row in rows)
        return UpdateMetrics(loss, clipped / weight, gap, entropy / trained, norm, tokens)


def micro_batches(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """Rows of similar length together, each batch within the token budget (a longer single row stands alone)."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.tokens), reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _collate(rows: Sequence[Row]) -> tuple[torch.Tensor, ...]:
    """ids (rows, longest), right-padded, then row and column of each trained token and its aligned values."""
    ids = torch.zeros(len(rows), max(len(row.tokens) for row in rows), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.from_numpy(row.tokens)
    arrays = (
        np.repeat(np.arange(len(rows)), [len(row.positions) for row in rows]),
        *(np.concatenate([getattr(row, name) for row in rows]) for name in Row.__slots__[1:]),
    )
    return (ids, *(torch.from_numpy(array) for array in arrays))
