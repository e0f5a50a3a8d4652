"""Log-probs of chosen tokens, computed inside one `nn.Module.forward` so that wrappers (FSDP, DDP) see all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


class LogprobModel(nn.Module):
    """A causal language model that answers one question: how likely were these tokens?

    The head runs on the asked positions alone; a full (tokens, vocabulary) matrix never exists.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of `input_ids[rows, columns]`, each given the tokens to its left.

        Args:
            input_ids: (batch, length), right-padded; padding needs no mask because attention is causal.
            rows: (n,) row of each asked token.
            columns: (n,) column of each asked token, at least 1.
            temperature: logits are divided by it, as the sampler did.

        Returns:
            Log-probs (n,), in float32, and the entropy in nats (n,, no gradient) of the distributions they are from.
        """
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[rows, columns - 1]).float() / temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, input_ids[rows, columns].unsqueeze(1)).squeeze(1), entropy


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; the mode is put back even after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
