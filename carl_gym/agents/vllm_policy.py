"""The Policy contract on a vLLM engine in this process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from carl_gym.agents import vllm_engine
from carl_gym.agents.policy import (
    Completion,
    Exchange,
    FinishReason,
    SampleRequest,
    check_requests,
    sample_by_stream,
)
from carl_gym.errors import PolicyError


class VllmPolicy:
    """Samples with vLLM: paged attention, continuous batching, and a prefix cache that forks share.

    The engine holds weights of its own: after every optimiser step they must be handed over with `sync(weights)`, and
    `canary.Canary` checks that they arrived. On a GPU that the learner shares, `sleep` and `wake` free the engine's
    memory in between; on CPUs they do nothing.

    Args:
        model: folder or hub id to start from.
        tokenizer: the model's.
        stop: an action ends when its text contains one of these.
        eos: ids that end an action.
        dtype: of the engine's weights: float32, bfloat16 or auto.
        context: longest prefix and action together, in tokens.
        max_batch: most requests that are decoded together.
        memory: share of the GPU's memory for weights and cache.
        cpu_cache_bytes: size of the cache on a CPU.

    Raises:
        PolicyError: vLLM is not installed or cannot serve the model, or another engine runs in this process.
    """

    _running: ClassVar[weakref.ref[VllmPolicy] | None] = None

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        eos: set[int],
        *,
        dtype: str,
        context: int,
        max_batch: int = 256,
        memory: float = 0.4,
        cpu_cache_bytes: int = 1 << 30,
    ) -> None:
        self.tokenizer, self.stop, self.context = tokenizer, tuple(stop), context
        self.version = 0
        self._eos = eos
        self._handed_over = 0
        self._weights = "default"  # vLLM's label of what an engine starts with
        self._can_sleep = torch.cuda.is_available()
        if VllmPolicy.running() is not None:
            raise PolicyError(
                "a vLLM engine runs in this process, and the end of one breaks others: call close() of its policy first"
            )
        self.engine = vllm_engine.start_engine(
            model, dtype=dtype, context=context, max_batch=max_batch, memory=memory, cpu_cache_bytes=cpu_cache_bytes,
            sleep=self._can_sleep,
        )  # fmt: skip
        VllmPolicy._running = weakref.ref(self)

    @staticmethod
    def running() -> VllmPolicy | None:
        """The policy whose engine runs in this process."""
        return VllmPolicy._running() if VllmPolicy._running is not None else None

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample one completion per request, in order.

        Raises:
            PolicyError: an empty or too long prefix, a temperature below 0, a log-prob that is not finite, or samples
                of other weights than those of the last `sync`.
        """
        check_requests(requests, self.context)
        return sample_by_stream(self, requests)

    def stream(self, exchange: Exchange) -> None:
        """Sample what `exchange` asks for; it is called once a step of the engine. Errors as `sample`."""
        asked: dict[int, SampleRequest] = {}

        def swap(sampled: list[tuple[int, vllm_engine.Sampled]], idle: bool) -> list[tuple[int, SampleRequest]]:
            joining = exchange([(number, self._completion(one, asked.pop(number))) for number, one in sampled], idle)
            check_requests([request for _, request in joining], self.context)
            asked.update(joining)
            return joining

        vllm_engine.stream(self.engine, swap, self.stop, self._eos)

    def _completion(self, sampled: vllm_engine.Sampled, request: SampleRequest) -> Completion:
        if sampled.weight_version != self._weights:
            raise PolicyError(
                f"vLLM sampled with weights {sampled.weight_version!r}; the last that were handed over are "
                f"{self._weights!r}"
            )
        return completion(sampled, request, self.tokenizer, self.stop, self._eos)

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs (temperature 1) of each continuation's tokens after its prefix.

        Raises:
            PolicyError: an empty prefix, or a sequence that does not leave one token of the context free.
        """
        sequences = joined(prefixes, continuations, self.context)
        found = vllm_engine.prompt_logprobs(self.engine, sequences)
        return [np.array(row[len(prefix) - 1 :]) for prefix, row in zip(prefixes, found, strict=True)]

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        """Take over new weights in memory, by the names of the transformers model, and empty the prefix cache.

        Raises:
            PolicyError: no weights (the engine has a copy of its own and cannot see changes elsewhere), or others than
                its model has.
        """
        if weights is None:
            raise PolicyError("vLLM has its own copy of the weights: pass sync(weights) the learner's named parameters")
        tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
        self._handed_over += 1
        self._weights = f"update {self._handed_over}"
        vllm_engine.load_weights(self.engine, tensors, self._weights)
        self.version += 1

    def close(self) -> None:
        """Give the engine's memory back; nothing can be sampled afterwards."""
        VllmPolicy._running = None
        del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def counters(self) -> dict[str, int]:
        """vLLM's own counts since the start: `prompt_tokens`, and `cached_tokens` of them."""
        return vllm_engine.counters(self.engine)

    def sleep(self) -> None:
        """Free the GPU's memory until `wake`: the weights go to main memory, the cache is forgotten."""
        if self._can_sleep:
            self.engine.sleep(level=1)

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._can_sleep:
            self.engine.wake_up()


def completion(
    sampled: vllm_engine.Sampled,
    request: SampleRequest,
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[str],
    eos: set[int],
) -> Completion:
    """The contract's form of what vLLM sampled; text and finish reason are worked out as the transformers policy does.

    Raises:
        PolicyError: no token, a log-prob that is not finite, or an action that ends without a reason.
    """
    tokens = sampled.token_ids
    if not tokens or not np.isfinite(sampled.logprobs).all():
        raise PolicyError(
            f"vLLM answered tokens {tokens[:8]} with log-probs {sampled.logprobs[:8]}: there must be one or more, and "
            "all finite; the model's weights may not be"
        )
    ended = tokens[-1] in eos
    text = tokenizer.decode(tokens[:-1] if ended else tokens)
    finish: FinishReason = "eos" if ended else "stop" if any(s in text for s in stop) else "length"
    if finish == "length" and len(tokens) < request.max_tokens:
        raise PolicyError(
            f"vLLM ended an action after {len(tokens)} of {request.max_tokens} tokens, {text!r}, without a stop string "
            "or end-of-sequence token in it; do tokenizer and model belong together?"
        )
    return Completion(tokens, sampled.logprobs, text, finish)


def joined(prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    """Each prefix with its continuation, for vLLM to score. Raises PolicyError when one is too short or too long."""
    for prefix, continuation in zip(prefixes, continuations, strict=True):
        if not prefix or len(prefix) + len(continuation) >= context:
            raise PolicyError(
                f"cannot score {len(continuation)} tokens after a prefix of {len(prefix)}: the prefix needs at least "
                f"one token, and together they must be shorter than the context of {context}"
            )
    return [[*prefix, *continuation] for prefix, continuation in zip(prefixes, continuations, strict=True)]
