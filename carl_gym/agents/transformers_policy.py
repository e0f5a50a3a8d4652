"""The Policy contract on a transformers model, on CPU or GPU: batched sampling with a prefix-sharing KV cache."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from carl_gym.agents.decode_batch import Counters, DecodeBatch, Slot
from carl_gym.agents.kv_cache import PrefixCache
from carl_gym.agents.logprob_model import LogprobModel, evaluation_mode
from carl_gym.agents.policy import Completion, Exchange, SampleRequest, check_requests, eos_ids, sample_by_stream
from carl_gym.agents.tree_attention import limited_layers
from carl_gym.errors import PolicyError

CACHE_SLACK = 1.25
"""A stream lets the prefix cache grow to this multiple of its bound before it drops the excess: dropping a little at
each step would look through the whole cache every time."""


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

    gives_entropies = True
    """`Completion.entropies` are filled in where they are asked for."""

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
        if limits := limited_layers(model):
            raise PolicyError(
                f"{type(model).__name__} has layers that do not attend to the whole prefix ({limits}); use one with "
                "full attention in every layer"
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
        self._batch = DecodeBatch(model, self._cache)
        self._complete: list[Slot] = []
        self._scorer = LogprobModel(model)
        self._eos = eos_ids(model.generation_config, tokenizer) if eos is None else eos
        # Only a token with a stop string's last character can complete one; this look-up spares decoding.
        last = {s[-1] for s in self.stop}
        pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._may_stop = {i for i, piece in enumerate(pieces) if last & set(piece)}

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample one completion per request, in order.

        Raises:
            PolicyError: an empty or too long prefix, a temperature below 0, or a log-prob that is not finite.
        """
        check_requests(requests, self.context)
        # Rows of similar length are decoded together; the rest joins as they finish.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prefix))
        with self._evaluation_mode():  # once: nobody else sees the model in between, as in a stream
            answers = dict(zip(order, sample_by_stream(self, [requests[i] for i in order]), strict=True))
        return [answers[i] for i in range(len(requests))]

    def stream(self, exchange: Exchange) -> None:
        """Sample what `exchange` asks for, until it is idle and asked for nothing (`policy.StreamingPolicy`).

        Requests join in the order in which they were asked for, once enough others are complete that their prefixes
        go through the model together.

        Raises:
            PolicyError: as `sample`.
        """
        waiting: deque[Slot] = deque()
        try:
            while True:
                idle = not waiting and not self._batch.size
                # Outside of everything that this policy does to its model and to torch.
                new = exchange(self._finished(), idle)
                check_requests([request for _, request in new], self.context)
                waiting.extend(Slot(number, request) for number, request in new)
                if idle and not waiting:
                    return
                with torch.inference_mode(), self._evaluation_mode():
                    self._admit(waiting)
                    self._step()
                if self._cache.bytes > CACHE_SLACK * self._cache.max_bytes:
                    self._cache.shrink()
        except BaseException:
            self._batch.clear()
            self._complete.clear()
            raise
        finally:
            self._cache.shrink()

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
        self._batch.clear()  # weights that were not finite may have left such values in it

    def sleep(self) -> None:
        """Lend the memory to the learner, while the weights change and caches are of no use."""
        self._cache.clear()
        self._batch.release()

    def wake(self) -> None:
        """Nothing to get back: memory comes with the next requests."""

    @property
    def counters(self) -> Counters:
        """What went through the model since the policy was made."""
        return self._batch.counters

    def _evaluation_mode(self) -> AbstractContextManager[None]:
        return evaluation_mode(self.model) if self.model.training else nullcontext()

    def _admit(self, waiting: deque[Slot]) -> None:
        """Requests join once they make a quarter of what is under way: a prefill for each would cost more."""
        size = self._batch.size
        count = min(len(waiting), self.max_batch - size)
        if count and 4 * count >= size:
            self._batch.admit([waiting.popleft() for _ in range(count)])

    def _step(self) -> None:
        """One token more for everything under way."""
        tokens, logprobs, entropies = self._batch.step()
        done = []
        for row, slot in enumerate(self._batch.slots):
            if slot is None:
                continue
            if slot.request.entropies:
                slot.entropies.append(entropies[row])
            if self._append(slot, tokens[row], logprobs[row]):
                done.append(row)
                self._complete.append(slot)
        if done:
            self._batch.drop(done)

    def _append(self, slot: Slot, token: int, logprob: float) -> bool:
        """Add a sampled token; True when the action is complete."""
        if not math.isfinite(logprob):
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

    def _finished(self) -> list[tuple[int, Completion]]:
        """Hand over what is complete."""
        complete, self._complete = self._complete, []
        return [(slot.number, self._completion(slot)) for slot in complete]

    def _completion(self, slot: Slot) -> Completion:
        shown = slot.tokens[:-1] if slot.finish == "eos" else slot.tokens
        text = self.tokenizer.decode(shown)
        return Completion(tuple(slot.tokens), tuple(slot.logprobs), text, slot.finish, tuple(slot.entropies))
