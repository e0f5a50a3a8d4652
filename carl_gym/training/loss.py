"""The losses over trained tokens. They know neither trees nor algorithms: weights carry the normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss and what to watch about it, each a scalar summed over the given tokens by weight.

    Attributes:
        loss: has a gradient.
        clipped: sum of w over tokens where the clip stopped the gradient, or the cap held the ratio.
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
) -> LossTerms:
    """Clipped surrogate (Schulman et al., arXiv 1707.06347, Eq. 7) with a probability ratio rho per token.

    loss = -sum w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

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
    return LossTerms(
        loss=-(weights * torch.minimum(free, bounded)).sum(),
        clipped=(weights * (bounded < free)).sum().detach(),
        gap=difference.detach().abs().max(),
    )


def truncated_importance(
    logprobs: torch.Tensor, sampled: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, cap: float
) -> LossTerms:
    """Policy gradient with truncated importance weights, for tokens that older weights have sampled.

    gradient = -sum w min(rho, cap) A grad log pi, where rho = pi / pi at sampling (the weights of IMPALA, Espeholt et
    al., arXiv 1802.01561, Sec. 4.1, per token as in CISPO, MiniMax-M1, arXiv 2506.13585, Eq. 4). Where nothing is stale
    rho is 1, and value and gradient are those of `ppo_clip`. A clip would stop the gradient of tokens that became more
    probable since; a truncated weight lets them learn, with bounded variance.

    Args:
        logprobs: (n,) of the trained tokens under the weights that learn.
        sampled: (n,) under the weights that sampled.
        advantages: (n,).
        weights: (n,), summing to 1 over the minibatch.
        cap: the largest importance weight.
    """
    difference = logprobs - sampled
    ratio = difference.detach().exp()
    factor = weights * ratio.clamp(max=cap) * advantages
    return LossTerms(
        loss=-(factor * (1 + logprobs - logprobs.detach())).sum(),
        clipped=(weights * (ratio > cap)).sum(),
        gap=difference.detach().abs().max(),
    )
