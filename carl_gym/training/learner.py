"""The learner: rows in, one optimiser step out. Plain torch, blind to the algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from carl_gym.agents.logprob_model import LogprobModel
from carl_gym.agents.tree_attention import tree_attention
from carl_gym.errors import CarlGymError
from carl_gym.training.config import Packing
from carl_gym.training.loss import ppo_clip
from carl_gym.training.packing import packs, padded, unique_tokens
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
    """AdamW on a causal LM, with gradient accumulation over micro-batches of bounded size.

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

    Raises:
        PolicyError: trees do not suit the model.
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
    ) -> None:
        if packing == "tree":
            with tree_attention(model):  # refused here, before anything is sampled
                pass
        self.model = LogprobModel(model)
        self.temperature = temperature
        self.max_grad_norm = max_grad_norm
        self.packing = packing
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
        model = self.model.model
        model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = clipped = gap = entropy = 0.0
        tokens = trained = 0
        as_tree = self.packing == "tree"
        batches = packs(rows, self.batch_tokens) if as_tree else padded(rows, self.batch_tokens)
        with tree_attention(model) if as_tree else nullcontext():
            for batch in batches:
                ids, index, columns, targets, sampled, advantages, weights = batch.tensors(model.device)
                with self._autocast():
                    logprobs, entropies = self.model(
                        ids, index, columns, self.temperature, targets=targets, tree=batch.tree
                    )
                terms = ppo_clip(logprobs, sampled, advantages, weights, clip_low, clip_high)
                terms.loss.backward()
                loss += float(terms.loss.detach())
                clipped += float(terms.clipped)
                gap = max(gap, float(terms.gap))
                entropy += float(entropies.sum())
                tokens += ids.numel()
                trained += len(logprobs)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise CarlGymError(
                f"the loss ({loss}) or the gradient norm ({norm}) is not finite; no step was taken. Lower the learning "
                "rate, or resume from the last checkpoint"
            )
        self.optimizer.step()
        weight = sum(float(row.weights.sum()) for row in rows)
        return UpdateMetrics(loss, clipped / weight, gap, entropy / trained, norm, tokens, needed=unique_tokens(rows))

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.model.device.type, self.autocast)
