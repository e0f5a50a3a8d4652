"""The plain way to train a search agent, to measure ours against: what one writes with `generate` and a mask.

    actions   transformers' `generate` for every turn: the whole prefix again, padded on the left, no cache kept
    update    one full row per leaf, logits of every position over the whole vocabulary

Algorithm, questions, trees, optimiser and the token budget of a micro-batch are those of the trainer, and so are loss
and gradient (tests/test_naive_baseline.py): the two differ in what they compute, not in what they learn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from carl_gym.agents.agent import load_agent
from carl_gym.agents.logprob_model import evaluation_mode
from carl_gym.agents.policy import Completion, FinishReason, SampleRequest, check_requests, eos_ids
from carl_gym.algorithms import Algorithm, token_weights
from carl_gym.errors import PolicyError
from carl_gym.rollouts import RolloutTree, collect
from carl_gym.rollouts.collector import Timings
from carl_gym.training.config import TrainConfig
from carl_gym.training.loss import ppo_clip
from carl_gym.training.questions import load_data, take_questions


class GeneratePolicy:
    """The Policy contract on `model.generate`. An action ends at a closing tag, as an end-of-sequence token.

    Args:
        model: used in place.
        tokenizer: has one token for each of the `stop` strings.
        stop: strings that end an action.
        max_batch: most requests that are generated together.

    Raises:
        PolicyError: a stop string is not one token; `generate` would have to decode after every token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], *, max_batch: int = 96
    ) -> None:
        pieces = {string: tokenizer.encode(string, add_special_tokens=False) for string in stop}
        if long := [string for string, ids in pieces.items() if len(ids) != 1]:
            raise PolicyError(
                f"the tokenizer has no token for {long[0]!r}; the naive baseline needs one per stop string"
            )
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.version = 0
        self.context = int(model.config.max_position_embeddings)
        self._eos = eos_ids(model.generation_config, tokenizer)
        self._ends = self._eos | {ids[0] for ids in pieces.values()}

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample one completion per request, in order; all of a batch share one temperature, and one random stream."""
        check_requests(requests, self.context)
        found: list[Completion] = []
        with evaluation_mode(self.model):
            for start in range(0, len(requests), self.max_batch):
                found += self._generate(requests[start : start + self.max_batch])
        return found

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Not needed by a training step: raises PolicyError."""
        raise PolicyError("the naive baseline samples only; score with TransformersPolicy")

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        """The model is the learner's own, and there is no cache."""
        self.version += 1

    def _generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        (temperature,) = {request.temperature for request in requests}
        width = max(len(request.prefix) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prefix) :] = torch.tensor(request.prefix)
            mask[row, width - len(request.prefix) :] = 1
        torch.manual_seed(requests[0].seed)
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        out = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=max(request.max_tokens for request in requests),
            eos_token_id=sorted(self._ends),
            pad_token_id=min(self._ends),
            return_dict_in_generate=True,
            output_logits=True,
            **(drawing or {"do_sample": False}),
        )
        tokens = out.sequences[:, width:]
        logits = torch.stack(out.logits, dim=1).float() / (temperature or 1.0)
        logprobs = torch.log_softmax(logits, dim=-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
        rows = zip(requests, tokens.tolist(), logprobs.tolist(), strict=True)
        return [self._completion(*row) for row in rows]

    def _completion(self, request: SampleRequest, tokens: list[int], logprobs: list[float]) -> Completion:
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens) - 1) + 1
        end = min(end, request.max_tokens)
        taken, last = tokens[:end], tokens[end - 1]
        finish: FinishReason = "eos" if last in self._eos else "stop" if last in self._ends else "length"
        text = self.tokenizer.decode(taken[:-1] if finish == "eos" else taken)
        return Completion(tuple(taken), tuple(logprobs[:end]), text, finish)


@dataclass(frozen=True, slots=True)
class LeafRow:
    """A trajectory from root to leaf, with numbers for every one of its tokens.

    Attributes:
        tokens: (n,) ids, the last action included.
        logprobs: (n,) at sampling; 0 for what was not sampled.
        advantages: (n,).
        weights: (n,) in the loss; 0 for tokens that do not train, or train in an earlier row.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor


def leaf_rows(tree: RolloutTree, advantages: np.ndarray, weights: np.ndarray) -> list[LeafRow]:
    """One row per leaf; an action that several leaves share is trained in the first of their rows."""
    done: set[int] = set()
    found = []
    for leaf in tree.leaves():
        columns: list[tuple[int, float, float, float]] = []
        for node in tree.path(leaf.id):
            if node.action is not None:
                advantage, weight = float(advantages[node.id]), 0.0 if node.id in done else float(weights[node.id])
                pairs = zip(node.action.token_ids, node.action.logprobs, strict=True)
                columns += [(token, logprob, advantage, weight) for token, logprob in pairs]
                done.add(node.id)
            columns += [(token, 0.0, 0.0, 0.0) for token in node.observation_tokens]
        found.append(LeafRow(*(torch.tensor(column) for column in zip(*columns, strict=True))))
    return found


class NaiveLearner:
    """AdamW on full rows, in micro-batches as the rows come, padded on the right; settings as the trainer has them."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        learning_rate: float,
        temperature: float = 1.0,
        max_grad_norm: float = 1.0,
        batch_tokens: int = 8192,
    ) -> None:
        self.model, self.temperature = model, temperature
        self.max_grad_norm, self.batch_tokens = max_grad_norm, batch_tokens
        self.tokens = 0
        """That went through the model so far, padding included."""
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def update(self, rows: Sequence[LeafRow], clip_low: float, clip_high: float) -> float:
        """One optimiser step; returns the loss. Without a selected action there is no step."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        if not any(row.weights.any() for row in rows):
            return total
        for batch in self._micro_batches(rows):
            loss = self._loss(batch, clip_low, clip_high)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return total

    def _loss(self, rows: Sequence[LeafRow], clip_low: float, clip_high: float) -> torch.Tensor:
        def padded(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(self.model.device)

        tokens = padded([row.tokens for row in rows])
        mask = padded([torch.ones_like(row.tokens) for row in rows])
        self.tokens += tokens.numel()
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logprobs = torch.log_softmax(logits / self.temperature, dim=-1)
        chosen = logprobs.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
        sampled, advantages, weights = (
            padded([getattr(row, name) for row in rows])[:, 1:] for name in ("logprobs", "advantages", "weights")
        )
        return ppo_clip(chosen, sampled, advantages, weights, clip_low, clip_high).loss

    def _micro_batches(self, rows: Sequence[LeafRow]) -> list[list[LeafRow]]:
        batches: list[list[LeafRow]] = []
        for row in rows:
            longest = max(len(r.tokens) for r in [*(batches[-1] if batches else ()), row])
            if batches and (len(batches[-1]) + 1) * longest <= self.batch_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches


class NaiveTrainer:
    """The trainer's step by these means: the same questions in the same order, the same number of optimiser steps."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.algorithm: Algorithm = config.make_algorithm()
        self.task, self.questions, _, _ = load_data(config)
        agent = load_agent(config.agent, device=config.device, tools=self.task.card.tools)
        assert agent.model is not None and agent.tokenizer is not None
        self.transcript = agent.transcript
        ends = [f"</{tool}>" for tool in self.task.card.tools]
        self.policy = GeneratePolicy(agent.model, agent.tokenizer, ends)
        self.learner = NaiveLearner(
            agent.model,
            learning_rate=config.learning_rate,
            temperature=config.temperature,
            max_grad_norm=config.max_grad_norm,
            batch_tokens=config.batch_tokens,
        )

    def step(self, number: int) -> dict[str, float]:
        """Step 1, 2, ...; metrics by the trainer's names, times in seconds."""
        config, timings, started = self.config, Timings(), time.perf_counter()
        tokens_before = self.learner.tokens
        questions = take_questions(self.questions, number - 1, config.questions_per_step, config.seed)
        trees = collect(
            self.task, self.policy, self.transcript, questions, self.algorithm.explorer,
            seed=config.seed, step=number, temperature=config.temperature, timings=timings,
        )  # fmt: skip
        collected = time.perf_counter()
        credit, selected = self.algorithm.credit(trees), self.algorithm.selection(trees)
        cuts = [len(trees) * i // config.minibatches for i in range(config.minibatches + 1)]
        for part in (slice(*cut) for cut in itertools.pairwise(cuts)):
            weights = token_weights(trees[part], selected[part], self.algorithm.loss_reduction)
            rows = [r for t, a, w in zip(trees[part], credit[part], weights, strict=True) for r in leaf_rows(t, a, w)]
            self.learner.update(rows, self.algorithm.clip_low, self.algorithm.clip_high)
        self.policy.sync()
        return {
            "rollout/actions_generated": float(sum(tree.actions_generated for tree in trees)),
            "rollout/tokens": float(
                sum(len(node.action.token_ids) for tree in trees for node in tree.nodes if node.action)
            ),
            "update/tokens": float(self.learner.tokens - tokens_before),
            "time/sample": timings.sample,
            "time/environment": timings.environment,
            "time/rollout": collected - started,
            "time/update": time.perf_counter() - collected,
        }
