"""The critic: V of every state that an action was taken in, for the algorithms that ask for one.

It stands beside the learner, shares nothing with it, and is used twice in a training step:

    trees --score--> tree.scores["state_value"] --credit, targets--> --update--> one step of its own optimiser
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from carl_gym.agents.logprob_model import evaluation_mode
from carl_gym.agents.tree_attention import TokenTree, run_tree, tree_attention
from carl_gym.algorithms.credit import FloatArray
from carl_gym.errors import CarlGymError
from carl_gym.rollouts.tree import RolloutTree
from carl_gym.training.config import Packing
from carl_gym.training.packing import Batch, packs, padded
from carl_gym.training.segments import Row

SCORE = "state_value"
"""Name in `RolloutTree.scores`."""


class ValueModel(nn.Module):
    """A transformer without its language-model head, and a linear one that starts at V = 0.

    Args:
        model: whose transformer to start from; it is copied, in float32, and left as it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.transformer: PreTrainedModel = copy.deepcopy(model.base_model).float()
        self.head = nn.Linear(self.transformer.config.hidden_size, 1, device=model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, tree: TokenTree | None = None
    ) -> torch.Tensor:
        """V (n,) after the token `input_ids[rows, columns - 1]`; arguments as `LogprobModel.forward` describes them."""
        if tree is None:
            hidden = self.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
        else:
            hidden = run_tree(self.transformer, input_ids, tree)
        values: torch.Tensor = self.head(hidden[rows, columns - 1]).squeeze(-1)
        return values


class Critic:
    """A value network of its own, which learns by regression.

    V(s) is read off the last token of the state's prefix, where the policy decides on its action: one value per turn,
    as of the code released with VAGEN (mll-lab-nu/VAGEN, `no_concat_gae`: the first token of the response).

    Args:
        model: the policy, whose transformer it starts from; it is copied and left as it is.
        learning_rate: AdamW's, constant.
        max_grad_norm: gradients are scaled down to this global norm.
        packing: "tree" takes what several states begin with through the model once; "rows" takes each branch by
            itself, padded, for models whose attention has no form for trees.
        batch_tokens: most tokens of a micro-batch.

    Raises:
        PolicyError: trees do not suit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        learning_rate: float = 1e-3,
        max_grad_norm: float = 1.0,
        packing: Packing = "tree",
        batch_tokens: int = 8192,
    ) -> None:
        self.model = ValueModel(model)
        self.max_grad_norm = max_grad_norm
        self.packing = packing
        self.batch_tokens = batch_tokens
        with self._attention():  # refused here, before anything is sampled
            pass
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def score(self, trees: Sequence[RolloutTree]) -> None:
        """Write V of every node that has children to `tree.scores["state_value"]`; NaN at all others.

        Raises:
            CarlGymError: a value is not finite.
        """
        states, rows = decision_points(trees)
        found = np.zeros(len(states))
        with evaluation_mode(self.model), torch.no_grad(), self._attention():
            for batch in self._batches(rows):
                found[batch.advantages] = self._values(batch).double().cpu().numpy()
        if not np.isfinite(found).all():
            raise CarlGymError(
                "the critic's values are not finite; lower its learning rate, or resume from the last checkpoint"
            )
        for tree in trees:
            tree.scores[SCORE] = np.full(len(tree.nodes), np.nan)
        for (index, node), value in zip(states, found, strict=True):
            trees[index].scores[SCORE][node] = value

    def update(self, trees: Sequence[RolloutTree], targets: Sequence[FloatArray]) -> dict[str, float]:
        """One AdamW step on 1/2 (V - target)^2, mean over the states of all trees.

        Args:
            trees: complete.
            targets: per tree, by node id; read at nodes that have children.

        Returns:
            "critic/loss", and "critic/explained_variance": 1 - Var(target - V) / Var(target) over the states, before
            the step (0 where targets do not vary). Empty, and no step, when there are no states.

        Raises:
            CarlGymError: loss or gradient is not finite; the weights are left as they were.
        """
        states, rows = decision_points(trees)
        if not states:
            return {}
        wanted = np.array([targets[index][node] for index, node in states])
        found = np.zeros(len(states))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._attention():
            for batch in self._batches(rows):
                values = self._values(batch)
                goal = torch.from_numpy(wanted[batch.advantages]).to(values)
                loss = 0.5 * (values - goal).square().sum() / len(states)
                loss.backward()
                found[batch.advantages] = values.detach().double().cpu().numpy()
        total = 0.5 * float(np.mean((found - wanted) ** 2))
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if not math.isfinite(total) or not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise CarlGymError(
                f"the critic's loss ({total}) or gradient norm ({norm}) is not finite; no step was taken. Lower its "
                "learning rate, or resume from the last checkpoint"
            )
        self.optimizer.step()
        return {"critic/loss": total, "critic/explained_variance": explained_variance(found, wanted)}

    def state_dict(self) -> dict[str, object]:
        """Everything that a checkpoint needs."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what `state_dict` gave. Raises KeyError, RuntimeError or ValueError on that of another model."""
        model, optimizer = state["model"], state["optimizer"]
        if not isinstance(model, dict) or not isinstance(optimizer, dict):
            raise ValueError("not the state of a critic")
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def _attention(self) -> AbstractContextManager[None]:
        return tree_attention(self.model.transformer) if self.packing == "tree" else nullcontext()

    def _batches(self, rows: Sequence[Row]) -> list[Batch]:
        return (packs if self.packing == "tree" else padded)(rows, self.batch_tokens)

    def _values(self, batch: Batch) -> torch.Tensor:
        device = self.model.head.weight.device
        ids, rows, columns = (torch.from_numpy(x).to(device) for x in (batch.tokens, batch.rows, batch.columns))
        values: torch.Tensor = self.model(ids, rows, columns, batch.tree)
        return values


def decision_points(trees: Sequence[RolloutTree]) -> tuple[list[tuple[int, int]], list[Row]]:
    """All states that an action was taken in, and the fewest sequences in which each is asked for once.

    A row runs from a root to a state with no other below it. Rows are made to predict the token after each of their
    `positions - 1`, so here a token that stands for any action ends them, and their `advantages`, which a batch hands
    through as they are, hold the numbers of the states.

    Returns:
        Of each state by its number: index of its tree, and its node id. The rows.
    """
    states = [(index, node.id) for index, tree in enumerate(trees) for node in tree.recorded()]
    number = {state: at for at, state in enumerate(states)}
    taken: set[tuple[int, int]] = set()
    rows = []
    for index, last in reversed(states):  # so that what lies below a state comes before it
        if (index, last) in taken:
            continue
        tree = trees[index]
        fresh = [node.id for node in tree.path(last) if (index, node.id) not in taken]
        taken.update((index, node) for node in fresh)
        nothing = np.zeros(len(fresh), dtype=np.float32)
        rows.append(
            Row(
                tokens=np.array([*tree.prefix(last), 0], dtype=np.int64),
                positions=np.array([tree.prefix_length(node) for node in fresh], dtype=np.int64),
                logprobs=nothing,
                advantages=np.array([number[index, node] for node in fresh], dtype=np.int64),
                weights=nothing,
            )
        )
    return states, rows


def explained_variance(values: FloatArray, targets: FloatArray) -> float:
    """1 - Var(targets - values) / Var(targets); 0 where the targets do not vary."""
    spread = float(targets.var())
    return 1 - float((targets - values).var()) / spread if spread > 0 else 0.0
