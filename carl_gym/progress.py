"""What a command shows while it works: a display at the foot of a terminal, or a line now and then elsewhere.

Whatever is printed while a display is there (lines, warnings, logs of libraries, tracebacks of threads) comes above it,
whole. Notebooks and files are no terminals, and get lines.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from carl_gym.console import show_line

REFRESH = 2.0
"""Times per second that a display is drawn anew."""
SECONDS = 10.0
"""Between two lines where there is no display."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Report(Protocol):
    """Takes how far a job is."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """So many of `total` (0: not known) are done of the job called `what`.

        The first call of a job says what was there before: that does not count into the rate.
        """


@contextmanager
def live_display(console: Console, draw: Callable[[], RenderableType]) -> Iterator[None]:
    """Show what `draw` gives at the foot of a terminal while it lasts; elsewhere nothing.

    Args:
        console: where.
        draw: called twice a second, from another thread.
    """
    if not console.is_interactive:
        yield
        return
    live = Live(
        console=console,
        get_renderable=draw,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with _printed_above(console), live, _drawn_anew(live):
        yield


def progress(console: Console, unit: str, *, quiet: bool = False) -> AbstractContextManager[Report]:
    """What long jobs report to: bars on a terminal, else a line every ten seconds; nothing when `quiet`.

    Args:
        console: where.
        unit: what is counted, for the rate.
        quiet: show nothing.
    """
    if quiet:
        return nullcontext(lambda what, done, total: None)
    return _bars(console, unit) if console.is_interactive else nullcontext(_Lines(console, unit))


def duration(seconds: float) -> str:
    """Such as 2 h 5 min, 3 min 20 s, or 7 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def _bars(console: Console, unit: str) -> Iterator[Report]:
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    jobs: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in jobs:
            jobs[what] = bars.add_task(what, total=total, completed=done)
        bars.update(jobs[what], completed=done, total=total)

    with _printed_above(console), bars, _drawn_anew(bars):
        yield report


@contextmanager
def _drawn_anew(shown: Live | Progress) -> Iterator[None]:
    """Draw it now and then while it lasts.

    Rich's own thread for that is not waited for. At the end of the program it can be the last one to hold the model,
    and Python aborts a process (SIGABRT) one of whose threads is still taking tensors down when it exits.
    """
    over = threading.Event()

    def draw() -> None:
        while not over.wait(1 / REFRESH):
            shown.refresh()

    thread = threading.Thread(target=draw, name="display", daemon=True)
    try:
        thread.start()
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_digits(speed)} {self.unit}/s")


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class _Lines:
    """Reports as lines, the first and the last one of every job among them."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit = console, unit
        self._jobs: dict[str, tuple[float, int]] = {}
        self._printed = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in self._jobs:
            self._jobs[what] = now, done
            self._printed = 0.0
        if now - self._printed < SECONDS and (done < total or not total):
            return
        self._printed = now
        start, first = self._jobs[what]
        rate = (done - first) / (now - start) if now > start else 0.0
        rest = (
            f", {_digits(rate)} {self._unit}/s, {duration((total - done) / rate)} left" if rate and done < total else ""
        )
        of = f" of {total:,} ({done / total:.1%})" if total else ""
        show_line(self._console, f"{what}: {done:,}{of}{rest}")


# --- what others print meanwhile --------------------------------------------------------------------------------------


@contextmanager
def _printed_above(console: Console) -> Iterator[None]:
    """While it lasts, lines for standard output and error, and those of log handlers, go through the console."""
    streams = {stream: _Above(console, stream) for stream in (sys.stdout, sys.stderr)}
    handlers = [(handler, handler.stream) for handler in _log_handlers() if handler.stream in streams]
    with redirect_stdout(streams[sys.stdout]), redirect_stderr(streams[sys.stderr]):
        for handler, stream in handlers:
            handler.setStream(streams[stream])
        try:
            yield
        finally:
            for handler, stream in handlers:
                handler.setStream(stream)
            for above in streams.values():
                above.end()


class _Above(io.TextIOBase):
    """A stream whose lines appear above the display of a console; after `end`, the stream itself.

    Attributes:
        rich_proxied_file: the stream; rich's name for where a console goes on writing.
    """

    def __init__(self, console: Console, stream: TextIO) -> None:
        self.rich_proxied_file = stream
        self._console = console
        self._line = ""
        self._over = False
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        if self._over:
            return self.rich_proxied_file.write(text)
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
        for line in lines:  # not under the lock: the console has one of its own
            self._show(line)
        return len(text)

    def end(self) -> None:
        """Show the line that was begun last, and be the stream from now on: some log handler may keep this one."""
        with self._lock:
            rest, self._line, self._over = self._line, "", True
        if rest:
            self._show(rest)

    def flush(self) -> None:
        self.rich_proxied_file.flush()

    def fileno(self) -> int:
        return self.rich_proxied_file.fileno()

    def isatty(self) -> bool:
        return self.rich_proxied_file.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read only
        return self.rich_proxied_file.encoding

    def _show(self, line: str) -> None:
        """What a terminal would leave standing of a line that was overwritten in part, without its colours."""
        show_line(self._console, _COLOURS.sub("", line.rstrip("\r").rpartition("\r")[2]))


def _log_handlers() -> Iterator[logging.StreamHandler[Any]]:
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):  # what stands for a logger that is not there has none
            # (Some look up sys.stderr for every line, and need no help.)
            if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler):
                yield handler
