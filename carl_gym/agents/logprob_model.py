"""Log-probs of chosen tokens, computed inside one `nn.Module.forward` so that wrappers (FSDP, DDP) see all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from carl_gym.agents.tree_attention import TokenTree, run_tree

CHUNK = 1 << 24
"""Most logits at a time: with a large vocabulary the head runs chunk by chunk, and once more on the way back."""


class LogprobModel(nn.Module):
    """A causal language model that answers one question: how likely were these tokens?

    The head runs on the asked positions alone, once where several tokens are asked for at one position; a full
    (tokens, vocabulary) matrix never exists.

    Attributes:
        device: where it computes, and so where its inputs belong; its parameters may rest elsewhere between uses.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.device = model.device

    def forward(
        self,
        input_ids: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        temperature: float = 1.0,
        *,
        targets: torch.Tensor | None = None,
        tree: TokenTree | None = None,
        head_calls: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of tokens, each given what it comes after: `input_ids[rows, columns]`, unless `targets` says which.

        Args:
            input_ids: (batch, length), right-padded; padding needs no mask because attention is causal.
            rows: (n,) row of each asked token.
            columns: (n,) one more than the column of the token before each asked one, at least 1.
            temperature: logits are divided by it, as the sampler did.
            targets: (n,) the asked tokens. In a tree the next token in memory need not be the next of the sequence.
            tree: how the tokens of the only row hang together; needs `tree_attention` around it.
            head_calls: how often the head runs at least, for processes that have to call it equally often.

        Returns:
            Log-probs (n,), in float32, and the entropy in nats (n,, no gradient) of the distributions they are from.
        """
        if tree is None:
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        else:
            hidden = run_tree(self.model, input_ids, tree)
        if targets is None:
            targets = input_ids[rows, columns]
        sources, which = (rows * input_ids.shape[1] + columns - 1).unique(return_inverse=True)
        chosen, order = hidden.flatten(0, 1)[sources], which.argsort()
        step = self._most_positions()
        starts = [*range(0, len(sources), step)]
        starts += [len(sources)] * (head_calls - len(starts))  # parts even where nothing is asked
        cuts = torch.searchsorted(which[order], torch.tensor([*starts, len(sources)], device=which.device)).tolist()
        found = []
        for start, low, high in zip(starts, cuts[:-1], cuts[1:], strict=True):
            asked = order[low:high]
            part = (chosen[start : start + step], which[asked] - start, targets[asked], temperature)
            again = len(starts) > 1 and chosen.requires_grad
            found.append(checkpoint(self._head, *part, use_reentrant=False) if again else self._head(*part))
        back = order.argsort()
        logprobs, entropy = (torch.cat(parts)[back] for parts in zip(*found, strict=True))
        return logprobs, entropy

    def head_calls(self, tokens: int) -> int:
        """How often the head runs at most, for that many asked tokens."""
        return max(1, math.ceil(tokens / self._most_positions()))

    def _most_positions(self) -> int:
        """Of one call of the head."""
        return max(1, CHUNK // self.model.config.vocab_size)

    def _head(
        self, hidden: torch.Tensor, which: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of `targets` (n,) after `hidden[which]`, and that position's entropy."""
        logits = self.model.get_output_embeddings()(hidden).float() / temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs[which, targets], entropy[which]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; the mode is put back even after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
