"""SIGTERM, as schedulers send it before they take a machine away: save what there is, then go.

While a run lasts, the first SIGTERM is noted. Where everything under way can be dropped (rollouts, evaluation), it ends
that at once; elsewhere the step is finished first. A second one ends the process as it would without us.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""Of a process that was told to end and has saved: 143, as of one that SIGTERM has killed."""


class Preempted(SystemExit):
    """The run was told to end; what was done is saved. Ends a process with `EXIT_CODE` where nobody catches it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Preemption:
    """Whether this process was told to end.

    Attributes:
        requested: it was.
    """

    def __init__(self) -> None:
        self.requested = False
        self._droppable = False

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
        signal.signal(number, signal.SIG_DFL)
        self.requested = True
        self._leave()

    def _leave(self) -> None:
        if self.requested and self._droppable:
            self._droppable = False  # once
            raise Preempted
