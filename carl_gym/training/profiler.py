"""Spans of time, nested as they happened: exact totals of every phase, and a bounded number of single spans.

    with profiler.step(3), profiler.span("rollout"):
        with profiler.span("sample", requests=12):
            ...

What is measured is said elsewhere: the trainer opens the spans of its own phases, `instruments` those inside them, and
`profile_report` writes the table and the trace.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType

MAX_SLICES = 100_000
"""Most spans of a trace, about 12 MB of JSON. When there are more, every second step is dropped from it, again and
again: what stays is spread evenly over the run."""
STEP_SHARE = 8
"""One step may take this part of them, so that a single long step does not crowd out all others."""
COARSE = 2
"""Spans down to this depth (a step, its phases) are in the trace of their step in any case."""
SHORTEST = 20_000
"""Nanoseconds; deeper spans that are shorter are in the totals alone."""

Phase = tuple[str, ...]
"""A phase: the names of the spans around it, outermost first, and its own."""
_NO_SPAN = nullcontext()


@dataclass(slots=True)
class Total:
    """All spans of one phase.

    Attributes:
        calls: how many.
        nanoseconds: of wall-clock time, with all that is inside.
    """

    calls: int = 0
    nanoseconds: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """One span, as a trace shows it.

    Attributes:
        name: of its phase.
        started, ended: nanoseconds of `time.perf_counter_ns`.
        thread: position in `Profiler.threads`.
        details: numbers such as batch sizes.
    """

    name: str
    started: int
    ended: int
    thread: int
    details: dict[str, int]


@dataclass(slots=True)
class Thread:
    """A thread with the spans that are open in it."""

    name: str
    number: int
    open: list[str] = field(default_factory=list)


class Profiler:
    """Measures spans, or does nothing at all.

    The thread that calls `start` owns the profile: its phases follow one another and add up to the whole. What other
    threads do at the same time is kept apart. On a GPU, where calls return before their work is done, every span of
    the owner waits for that work at its start and end; this takes away what would have overlapped.

    Args:
        active: False makes every method a no-op.
        synchronize: waits for the work of a GPU; None where there is none.
        limit: most single spans that are kept.

    Attributes:
        totals: by phase, in the order in which phases were first entered, of the owner.
        beside: the same, of other threads.
        slices: single spans, in the order of their ends, by step.
        left_out: spans that were too many for their step.
        steps: how many there were.
        threads: those that had spans, the owner first.
    """

    def __init__(
        self, active: bool = True, *, synchronize: Callable[[], None] | None = None, limit: int = MAX_SLICES
    ) -> None:
        self.active = active
        self.totals: dict[Phase, Total] = {}
        self.beside: dict[Phase, Total] = {}
        self.slices: dict[int, list[Slice]] = {}
        self.left_out = 0
        self.steps = 0
        self.threads: list[Thread] = []
        self.started = time.perf_counter_ns()
        self._synchronize = synchronize
        self._limit = limit
        self._kept = 0
        self._stride = 1
        self._step = self._first = 0
        self._by_id: dict[int, Thread] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Time counts from here, and the calling thread owns the profile."""
        if self.active:
            self.started = time.perf_counter_ns()
            self.here()

    def here(self) -> Thread:
        """The calling thread."""
        thread = self._by_id.get(threading.get_ident())
        if thread is None:
            with self._lock:
                thread = Thread(threading.current_thread().name, len(self.threads))
                self.threads.append(thread)
                self._by_id[threading.get_ident()] = thread
        return thread

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The span of a training step; what follows it still counts among its slices."""
        if not self.active:
            yield
            return
        self._step = number
        if not self.steps:
            self._first = number
        self.steps += 1
        with self.span("step", number=number):
            yield

    def span(self, name: str, **details: int) -> AbstractContextManager[object]:
        """A span, once it is entered; the `details` go to the trace."""
        return Span(self, name, details) if self.active else _NO_SPAN

    def inside(self, name: str) -> bool:
        """Whether a span of this name is open in the calling thread."""
        return name in self.here().open

    def add(self, name: str, started: int, ended: int) -> None:
        """A span without any inside that was measured elsewhere, while the owner waited for it in its innermost span.

        Args:
            name: of the phase.
            started, ended: nanoseconds of `time.perf_counter_ns`.
        """
        owner = self.threads[0]
        phase = (*owner.open, name)
        self.totals.setdefault(phase, Total())
        self.record(phase, owner, started, ended, {})

    def enter(self, thread: Thread, name: str) -> Phase:
        """Open a span; what it is a part of is known from here on."""
        thread.open.append(name)
        phase = tuple(thread.open)
        (self.beside if thread.number else self.totals).setdefault(phase, Total())
        return phase

    def now(self, thread: Thread) -> int:
        """Nanoseconds, once the GPU has done what it was given."""
        if self._synchronize is not None and not thread.number:
            self._synchronize()
        return time.perf_counter_ns()

    def record(self, phase: Phase, thread: Thread, started: int, ended: int, details: dict[str, int]) -> None:
        """Count a span that is over, and keep it if the trace has room for it."""
        with self._lock:
            total = (self.beside if thread.number else self.totals)[phase]
            total.calls += 1
            total.nanoseconds += ended - started
            if (self._step - self._first) % self._stride:
                return
            kept = self.slices.setdefault(self._step, [])
            if len(phase) > COARSE:
                if ended - started < SHORTEST:
                    return
                if len(kept) >= self._limit // STEP_SHARE:
                    self.left_out += 1
                    return
            kept.append(Slice(phase[-1], started, ended, thread.number, details))
            self._kept += 1
            while self._kept > self._limit and len(self.slices) > 1:
                self._thin()

    def _thin(self) -> None:
        self._stride *= 2
        for number in [number for number in self.slices if (number - self._first) % self._stride]:
            self._kept -= len(self.slices.pop(number))


class Span:
    """One span of a profiler; more details may be added while it is open."""

    __slots__ = ("_name", "_phase", "_profiler", "_started", "_thread", "details")

    def __init__(self, profiler: Profiler, name: str, details: dict[str, int]) -> None:
        self.details = details
        self._profiler, self._name = profiler, name

    def __enter__(self) -> Span:
        self._thread = self._profiler.here()
        self._phase = self._profiler.enter(self._thread, self._name)
        self._started = self._profiler.now(self._thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = self._profiler.now(self._thread)
        self._thread.open.pop()
        self._profiler.record(self._phase, self._thread, self._started, ended, self.details)
