"""The PPO-clip loss over trained tokens. It knows neither trees nor algorithms: weights carry the normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PPOTerms:
    """The loss and what to watch about it, each a scalar summed over the given tokens by weight.

    Attributes:
        loss: -sum w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A); has a gradient.
        clipped: sum of w over tokens where the clip stopped the gradient.
        gap: largest |log-prob now - log-prob at sampling|, in nats.
    """

    loss: torch.Tensor
    clipped: torch.Tensor
    gap: torch.Tensor


def ppo_clip(
    logprobs: torch.Tensor,
    sampled: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> PPOTerms:
    """Clipped surrogate (Schulman et al., arXiv 1707.06347, Eq. 7) with a probability ratio per token.

    Args:
        logprobs: (n,) of the trained tokens under the weights that learn.
        sampled: (n,) under the weights that sampled.
        advantages: (n,).
        weights: (n,), summing to 1 over the minibatch.
        clip_low: ratios below 1 - clip_low gain nothing.
        clip_high: ratios above 1 + clip_high gain nothing.
    """
    difference = logprobs - sampled
    ratio = difference.exp()
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return PPOTerms(
        loss=-(weights * torch.minimum(free, bounded)).sum(),
        clipped=(weights * (bounded < free)).sum().detach(),
        gap=difference.detach().abs().max(),
    )
