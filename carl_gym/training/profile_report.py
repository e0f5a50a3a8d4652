"""What a profile leaves behind: a table of phases to read, and a trace to open in Perfetto.

The trace is in Chrome's Trace Event Format: complete events ("ph": "X"), which a viewer nests by their times, so the
times of a parent must enclose its children's to the last digit. Whole microseconds, rounded down at both ends, do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from carl_gym.training.profiler import Phase, Profiler, Total

TABLE_FILE = "profile.md"
TRACE_FILE = "trace.json"

REST = {
    "rollout": "tree bookkeeping",
    "sample": "output head, drawing tokens, caches",
    "environment": "transitions",
    "update": "rows, loss, gradient norm",
    "evaluation": "tree bookkeeping, scores",
    "sync": "handing over weights",
}
"""What a phase does outside the phases that are measured inside it."""
INDENT = "· "
STEP: Phase = ("step",)


def write_profile(profiler: Profiler, folder: Path, title: str) -> list[Path]:
    """Write the table and the trace of what was measured so far; the paths of both.

    Args:
        profiler: an active one.
        folder: of the run.
        title: what was run, for people.
    """
    seconds = (time.perf_counter_ns() - profiler.started) / 1e9
    table, trace = folder / TABLE_FILE, folder / TRACE_FILE
    table.write_text(report(profiler, seconds, title), encoding="utf-8")
    with trace.open("w", encoding="utf-8") as file:
        json.dump(trace_events(profiler, title), file, separators=(",", ":"))
    return [table, trace]


def report(profiler: Profiler, seconds: float, title: str) -> str:
    """The profile as Markdown.

    Args:
        profiler: what was measured.
        seconds: the whole, of which shares are given.
        title: the heading.
    """
    steps = profiler.totals.get((*STEP, "rollout"), Total()).calls
    lines = [
        f"# {title}",
        "",
        f"{seconds:.2f} s of wall-clock time, {steps} training steps. A row is part of the nearest row above it with "
        "fewer dots; the rows without dots add up to all of the time, and the rows below a row to that row.",
        "",
        *_table(_hoisted(profiler.totals), seconds, steps),
    ]
    if profiler.beside:
        lines += ["", "In other threads, at the same time (not part of the shares above):", ""]
        lines += _table(profiler.beside, seconds, steps, whole=False)
    shown = ", ".join(map(str, sorted(profiler.slices))) if len(profiler.slices) <= 20 else _spread(profiler)
    lines += ["", f"`{TRACE_FILE}` opens at https://ui.perfetto.dev. It shows steps {shown}."]
    if profiler.left_out:
        lines[-1] += f" {profiler.left_out:,} short spans of its longest steps are left out; the table counts them."
    return "\n".join(lines) + "\n"


def trace_events(profiler: Profiler, title: str) -> dict[str, object]:
    """The single spans as an object of the Trace Event Format; times count from the start of the profile."""
    pid = os.getpid()
    names = [("process_name", 0, title)]
    names += [("thread_name", thread.number, thread.name) for thread in profiler.threads]
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": pid, "tid": pid + number, "ts": 0, "dur": 0, "name": kind, "args": {"name": name}}
        for kind, number, name in names
    ]
    events += [
        {
            "ph": "X",
            "pid": pid,
            "tid": pid + part.thread,
            "ts": (start := (part.started - profiler.started) // 1000),
            "dur": (part.ended - profiler.started) // 1000 - start,
            "name": f"step {part.details['number']}" if part.name == STEP[0] else part.name,
            "cat": "carl_gym",
            "args": part.details,
        }
        # A parent before its children, also where they begin in the same microsecond.
        for part in sorted(
            (part for step in profiler.slices.values() for part in step), key=lambda part: (part.started, -part.ended)
        )
    ]
    return {"traceEvents": events}


def _hoisted(totals: Mapping[Phase, Total]) -> dict[Phase, Total]:
    """The phases of steps as the outermost ones."""
    return {(phase[1:] if phase[:1] == STEP else phase): total for phase, total in totals.items() if phase != STEP}


def _table(totals: Mapping[Phase, Total], seconds: float, steps: int, whole: bool = True) -> Iterator[str]:
    """Markdown lines: every phase, followed by those inside it and what these leave of it."""
    yield "| phase | calls | seconds | share % | ms per step |"
    yield "|---|---:|---:|---:|---:|"

    def row(depth: int, name: str, calls: str, spent: float) -> str:
        per_step = f"{1000 * spent / steps:,.1f}" if steps else "-"
        return f"| {INDENT * depth}{name} | {calls} | {spent:.2f} | {100 * spent / seconds:.1f} | {per_step} |"

    def inside(parent: Phase, spent: float, rest: str) -> Iterator[str]:
        children = [phase for phase in totals if phase[:-1] == parent]
        for phase in children:
            taken = totals[phase].nanoseconds / 1e9
            yield row(len(parent), phase[-1], f"{totals[phase].calls:,}", taken)
            yield from inside(phase, taken, REST.get(phase[-1], f"rest of {phase[-1]}"))
        if children and rest:
            left = spent - sum(totals[phase].nanoseconds for phase in children) / 1e9
            yield row(len(parent), rest, "", left)

    yield from inside((), seconds, "everything else" if whole else "")


def _spread(profiler: Profiler) -> str:
    numbers = sorted(profiler.slices)
    return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]} ({len(numbers)} of {profiler.steps})"
