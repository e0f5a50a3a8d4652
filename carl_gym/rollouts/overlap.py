"""Generation and environment side by side: no action waits for another one's search, nor for the slowest of its tick.

The policy streams in the caller's thread. Between its steps it only swaps finished actions for new requests. All else
(transitions with their retrieval, the trees, the explorers, the next requests) happens in a second thread, which takes
whatever has finished meanwhile as one batch. While that thread runs, it alone touches the trees.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Iterable, Sequence

from carl_gym.agents.policy import Completion, SampleRequest, StreamingPolicy
from carl_gym.errors import CarlGymError, PolicyError
from carl_gym.rollouts.environment import EnvTask, environment_steps
from carl_gym.rollouts.stepper import TreeStepper, Want
from carl_gym.rollouts.timings import Timings

GRACE = 1.0
"""Seconds that a batch of transitions gets to end in after a failure. One that hangs longer is left behind, in a thread
that keeps no program alive for long; what it brings is thrown away."""
EXIT_GRACE = 10.0
"""Seconds that the program waits for it when it exits: Python aborts (SIGABRT) what exits while a thread of it is
in torch, as one that encodes queries is."""


class RolloutsDropped(CarlGymError):
    """Rollouts that nobody wants any more were broken off."""


class Overlap:
    """Grows trees to the end, once, by `run`.

    Args:
        task: the environment, called from one thread at a time, which is not the caller's.
        steppers: of the trees; new ones.
        temperature: of sampling.
        timings: what the time was spent on is added here.
        dropped: set by another thread to break off.
    """

    def __init__(
        self,
        task: EnvTask,
        steppers: Sequence[TreeStepper],
        temperature: float,
        timings: Timings,
        dropped: threading.Event,
    ) -> None:
        self._task, self._temperature, self._timings, self._dropped = task, temperature, timings, dropped
        # Of the environment's thread.
        self._wanted: dict[int, tuple[TreeStepper, Want]] = {}
        self._numbers = 0
        # Of the policy's thread.
        self._under_way: set[int] = set()
        self._idle = 0.0
        # Of both, under the lock of `_changed`.
        self._changed = threading.Condition()
        self._requests = self._requests_of(steppers)
        self._actions: list[tuple[int, Completion]] = []
        self._open = len(self._requests)  # actions that are wanted and not yet in their trees
        self._failure: BaseException | None = None
        self._over = False
        self._ended = threading.Event()  # set at the end of the environment's thread

    def run(self, policy: StreamingPolicy) -> None:
        """Sample, step and fork until every tree is complete.

        Raises:
            PolicyError: the policy lost or made up a request; and whatever the policy, the task or an explorer raises.
            RolloutsDropped: `dropped` was set.
        """
        worker = threading.Thread(target=self._environment, name="environment", daemon=True)
        started = time.perf_counter()
        worker.start()
        try:
            policy.stream(self._exchange)
        finally:
            self._timings.sample += time.perf_counter() - started - self._idle
            with self._changed:
                self._over = True
                self._changed.notify_all()
            self._wait_for(worker)
        if self._failure is not None:
            raise self._failure
        if self._open:
            raise PolicyError(f"the policy ended its stream while {self._open} actions were wanted from it")

    def _wait_for(self, worker: threading.Thread) -> None:
        # Not by `join`: after one that was interrupted Python 3.11 takes the thread for ended.
        try:
            self._ended.wait(GRACE)
        finally:
            if self._ended.is_set():
                worker.join()
            else:
                atexit.register(self._ended.wait, EXIT_GRACE)

    # -- in the policy's thread --------------------------------------------------------------------

    def _exchange(self, finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
        """See `policy.Exchange`."""
        if self._dropped.is_set():
            raise RolloutsDropped
        for number, _ in finished:
            if number not in self._under_way:
                raise PolicyError(f"the policy answered request {number}, which it was not asked or answered before")
            self._under_way.remove(number)
        if idle and self._under_way:
            raise PolicyError(f"the policy is idle, and has not answered {len(self._under_way)} of its requests")
        with self._changed:
            if finished:
                self._actions += finished
                self._changed.notify_all()
            if idle:
                waiting = time.perf_counter()
                self._changed.wait_for(lambda: self._requests or not self._open or self._failure is not None)
                self._idle += time.perf_counter() - waiting
            if self._failure is not None:
                raise self._failure
            joining, self._requests = self._requests, []
        self._under_way.update(number for number, _ in joining)
        return joining

    # -- in the environment's thread ---------------------------------------------------------------

    def _environment(self) -> None:
        try:
            while finished := self._next_batch():
                requests = self._take(finished)
                with self._changed:
                    self._requests += requests
                    self._open += len(requests) - len(finished)
                    self._changed.notify_all()
        except BaseException as failure:  # it is raised again in the policy's thread
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
        finally:
            self._ended.set()

    def _next_batch(self) -> list[tuple[int, Completion]]:
        """All actions that have finished, once there is one; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._actions or self._over)
            finished, self._actions = self._actions, []
            return [] if self._over else finished

    def _take(self, finished: Sequence[tuple[int, Completion]]) -> list[tuple[int, SampleRequest]]:
        """Put actions into their trees with what the environment answers; returns what the trees want next."""
        wanted = [self._wanted.pop(number) for number, _ in finished]
        states = [stepper.tree.nodes[want.node].state for stepper, want in wanted]
        actions = [action for _, action in finished]
        started = time.perf_counter()
        steps = environment_steps(self._task, states, actions)
        self._timings.environment += time.perf_counter() - started
        for (stepper, want), action, step in zip(wanted, actions, steps, strict=True):
            stepper.take(want, action, step)
        return self._requests_of(dict.fromkeys(stepper for stepper, _ in wanted))

    def _requests_of(self, steppers: Iterable[TreeStepper]) -> list[tuple[int, SampleRequest]]:
        requests = []
        for stepper in steppers:
            for want in stepper.wants():
                self._wanted[self._numbers] = stepper, want
                requests.append((self._numbers, stepper.request(want, self._temperature)))
                self._numbers += 1
        return requests
