"""What a profile looks at inside the trainer's phases: methods of policy, task and learner, from outside.

While it lasts, such a method is shadowed on its object by one that opens a span around it. So nothing of the profile
stands in rollouts, agents or the learner, a run without it pays nothing there, and every object keeps its type.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from carl_gym.agents.agent import Agent
from carl_gym.agents.policy import Completion, Exchange, SampleRequest, StreamingPolicy
from carl_gym.envs.task import SearchTask
from carl_gym.training.learner import Learner
from carl_gym.training.profiler import Profiler

Method = Callable[..., Any]
SAMPLE = "sample"


@contextmanager
def instrumented(profiler: Profiler, agent: Agent, tasks: Iterable[SearchTask], learner: Learner) -> Iterator[None]:
    """While this lasts, an active `profiler` sees what agent, tasks and learner do."""
    with ExitStack() as shadows:

        def watch(owner: object, method: str, around: Callable[[Profiler, Method], Method]) -> None:
            shadows.enter_context(_shadowed(owner, method, around(profiler, getattr(owner, method))))

        if profiler.active:
            watch(agent.policy, "sample", _sampling)
            if isinstance(agent.policy, StreamingPolicy):
                watch(agent.policy, "stream", _streaming)
            if agent.shares_weights and agent.model is not None:
                watch(agent.model.base_model, "forward", _pass_of_the_sampler)
            different = {id(task): task for task in tasks}.values()
            for task in different:
                watch(task, "transition_batch", _spans("environment", lambda call: {"actions": len(call[0])}))
                watch(task, "observation", _spans("observation"))
                watch(task, "reward", _spans("reward"))
            for retriever in {id(task.retriever): task.retriever for task in different}.values():
                watch(retriever, "search", _spans("retrieval", lambda call: {"queries": len(call[0])}))
            update = _Update(profiler)
            watch(learner, "update", update.begins)
            watch(learner.model, "forward", update.forward_and_backward)
            watch(learner.optimizer, "step", _spans("optimiser"))
        yield


@contextmanager
def _shadowed(owner: object, method: str, replacement: Method) -> Iterator[None]:
    """The object has another method for a while."""
    before = vars(owner).get(method)  # what else shadows it
    setattr(owner, method, replacement)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)


def _spans(
    name: str, details: Callable[[Sequence[Any]], dict[str, int]] = lambda call: {}
) -> Callable[[Profiler, Method], Method]:
    """A span around each call that is not made by another of the same name; details come from its arguments."""

    def around(profiler: Profiler, method: Method) -> Method:
        @functools.wraps(method)
        def measured(*call: Any, **named: Any) -> Any:
            if profiler.inside(name):
                return method(*call, **named)
            with profiler.span(name, **(details(call) if call else {})):
                return method(*call, **named)

        return measured

    return around


def _sampling(profiler: Profiler, sample: Method) -> Method:
    @functools.wraps(sample)
    def measured(requests: Sequence[SampleRequest]) -> list[Completion]:
        prefixes = sum(len(request.prefix) for request in requests)
        with profiler.span(SAMPLE, actions=len(requests), prefix_tokens=prefixes):
            return list(sample(requests))

    return measured


def _streaming(profiler: Profiler, stream: Method) -> Method:
    """Exchanges with the rollout get spans of their own; in an idle one the policy waits for the environment."""

    @functools.wraps(stream)
    def measured(exchange: Exchange) -> None:
        if profiler.inside(SAMPLE):
            stream(exchange)
            return

        def exchanged(finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
            with profiler.span("waiting for the environment" if idle else "exchange", finished=len(finished)):
                return exchange(finished, idle)

        with profiler.span(SAMPLE):
            stream(exchanged)

    return measured


def _pass_of_the_sampler(profiler: Profiler, forward: Method) -> Method:
    """A forward pass while sampling: over one token per row it decodes, over more it computes prefixes."""

    @functools.wraps(forward)
    def measured(*call: Any, **named: Any) -> Any:
        if not profiler.inside(SAMPLE):
            return forward(*call, **named)
        rows, columns = next(_tensors(call, named)).shape[:2]
        with profiler.span("decode" if columns == 1 else "prefill", tokens=rows * columns):
            return forward(*call, **named)

    return measured


class _Update:
    """The parts of an optimiser step: packing up to the first forward pass, then forward and backward passes."""

    def __init__(self, profiler: Profiler) -> None:
        self._profiler = profiler
        self._packing_since: int | None = None

    def begins(self, _: Profiler, update: Method) -> Method:
        @functools.wraps(update)
        def measured(*call: Any, **named: Any) -> Any:
            self._packing_since = time.perf_counter_ns()
            try:
                return update(*call, **named)
            finally:
                self._packing_since = None  # there may have been nothing to train

        return measured

    def forward_and_backward(self, profiler: Profiler, forward: Method) -> Method:
        @functools.wraps(forward)
        def measured(*call: Any, **named: Any) -> Any:
            if self._packing_since is not None:
                profiler.add("packing", self._packing_since, time.perf_counter_ns())
                self._packing_since = None
            with profiler.span("forward", tokens=next((ids.numel() for ids in _tensors(call, named)), 0)):
                result = forward(*call, **named)
            for tensor in _tensors(result, {}):
                if tensor.requires_grad:
                    tensor.register_hook(self._backward)
                    break
            return result

        return measured

    def _backward(self, _: torch.Tensor) -> None:
        """From the moment that the gradient is back at the result of the forward pass, until it is through."""
        started = time.perf_counter_ns()

        def ends() -> None:
            self._profiler.add("backward", started, self._profiler.now(self._profiler.threads[0]))

        # Runs once the whole backward pass is done; data-parallel wrappers of torch rely on it too.
        torch.autograd.Variable._execution_engine.queue_callback(ends)


def _tensors(call: Iterable[Any], named: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    return (value for value in (*call, *named.values()) if isinstance(value, torch.Tensor))
