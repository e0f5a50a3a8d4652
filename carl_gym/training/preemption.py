"""SIGTERM, as schedulers send it before they take a machine away: save what there is, then go.

While a run lasts, the first SIGTERM is noted. Rollouts under way are dropped at once; elsewhere the step is finished
first. More of them within a minute mean the same: a launcher passes on what its processes may have got themselves. A
later one ends the process as it would without us.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEATS = 60.0
"""Seconds within which another SIGTERM is taken for the same."""
EXIT_CODE = 128 + signal.SIGTERM
"""Of a process that was told to end and has saved: 143, as of one that SIGTERM has killed."""


class Preempted(SystemExit):
    """The run was told to end; what was done is saved. Ends a process with `EXIT_CODE` where nobody catches it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Preemption:
    """What this process was told."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._droppable = False

    @property
    def requested(self) -> bool:
        """Whether this process was told to end."""
        return self._since is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note SIGTERM while it lasts, in the main thread (no other can); the handler before is put back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """What is done within may be broken off. Raises Preempted when it was told to end, now or before."""
        self._droppable = True
        try:
            self._leave()
            yield
        finally:
            self._droppable = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > REPEATS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._leave()

    def _leave(self) -> None:
        if self.requested and self._droppable:
            self._droppable = False  # once
            raise Preempted
