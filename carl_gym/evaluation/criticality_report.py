"""A criticality study as tables: one set of rows, for a terminal (rich) and for a file (Markdown)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from carl_gym.console import shown
from carl_gym.evaluation.criticality_summary import HIGH, NEAR_ZERO, Summary
from carl_gym.harmless import in_markdown

NAMES = {
    "one_sample": "h of one action",
    "mean_of_k": "mean h of K actions",
    "exact_one_sample": "exact entropy, one action",
    "exact_mean_of_k": "exact entropy, K actions",
    "mean_of_same_k": "mean h of the same K as C",
}
"""What the predictors of a summary are called."""
FEWEST = 5
"""States on a side below which a difference between sides is not shown."""


class Grid(NamedTuple):
    """A table: a title, the names of the columns, and the rows; the first column is text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(summary: Summary) -> Iterator[Grid]:
    """What a summary says, table by table."""
    yield Grid(
        f"Criticality of {summary['states']} states of {summary['questions']} questions, K = {summary['resamples']}",
        ("", "of the return", "of the score"),
        tuple(_distribution_rows(summary)),
    )
    for among in ("all", "open"):
        found = {name: summary["entropy"][name][among] for name in summary["entropy"]}
        one = next(iter(found.values()))
        high, above = (one[part]["upper"] for part in _PARTS)
        yield Grid(
            f"Entropy against criticality, {among} states: {one['states']}, of which {above} have C >= {NEAR_ZERO:g} "
            f"and {high} C > {HIGH:g}",
            ("", "Spearman", f"delta, C > {HIGH:g}", "p", f"delta, C >= {NEAR_ZERO:g}", "p"),
            tuple((NAMES[name], *_association_cells(values)) for name, values in found.items()),
        )
    for trait, title in (("by_action", "action taken"), ("by_depth", "depth"), ("by_fate", "fate")):
        yield Grid(f"By {title}", (title, *_GROUP), tuple(_group_rows(summary[trait])))


def tables(summary: Summary) -> list[Table]:
    """For a terminal."""
    found = []
    for grid in grids(summary):
        table = Table(title=shown(grid.title), title_justify="left")
        for number, column in enumerate(grid.columns):
            table.add_column(shown(column), justify="right" if number else "left")
        for row in grid.rows:
            table.add_row(*map(shown, row))
        found.append(table)
    return found


def markdown(summary: Summary, setting: Mapping[str, object]) -> str:
    """As a page.

    Args:
        summary: what was found.
        setting: what was measured, listed at the top.
    """
    items = (f"- {name}: {in_markdown(str(value))}" for name, value in setting.items())
    parts = ["# Criticality", "\n".join(items), LEGEND]
    for grid in grids(summary):
        lines = [grid.columns, ("---", *("---:" for _ in grid.columns[1:])), *grid.rows]
        parts += [f"## {grid.title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "C(s) is the standard deviation (ddof = 0) of the return over K actions drawn at s, each followed by greedy "
    "decoding. Near zero and high are shares of states. K returns of a state are often equal although other actions "
    "there would change the outcome: where a tenth of them does, K = 8 misses it in 43 % of cases. So the share near "
    "zero is on average too high, the more so the smaller K, and the mean of C too low; the root mean variance has no "
    "such bias. A state is lost (won) when all K scores are 0 (1), else open. "
    "Delta is Cliff's: positive where the more critical states, C > 0.4 or C >= 0.05, have the higher entropy than the "
    "rest. Brackets are 95 % bootstrap intervals over questions; p is of the Brunner-Munzel test, which takes states "
    "as independent. H is the mean h of K actions that were drawn for it alone; the K actions that C is made of "
    "flatter it, since an improbable one raises both."
)

_PARTS = ("high", "not_near_zero")
_GROUP = ("states", "mean C", "near zero %", "high %", "mean return", "H", "Spearman of H and C")


def _distribution_rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    columns = summary["criticality"], summary["score_criticality"]
    yield "mean", *(f"{column['mean']:.3f}" for column in columns)
    yield f"near zero (< {NEAR_ZERO:g}) %", *(f"{100 * column['near_zero']:.1f}" for column in columns)
    yield f"high (> {HIGH:g}) %", *(f"{100 * column['high']:.1f}" for column in columns)
    yield "root mean variance (ddof = 1)", f"{summary['root_mean_variance']:.3f}", "-"
    if (half := summary.get("near_zero_of_half")) is not None:
        yield f"near zero by {summary['resamples'] // 2} of the K, %", f"{100 * half:.1f}", "-"
    yield "rank correlation of two halves of the K", _number(summary["halves"]), "-"
    yield "so about the most for a predictor of C", _number(summary.get("ceiling")), "-"
    for fate, count in summary["fates"].items():
        yield f"{fate} %", "-", f"{100 * count / summary['states']:.1f}"


def _association_cells(values: Mapping[str, Any]) -> Iterator[str]:
    yield _with_interval(values["spearman"], values["spearman_interval"])
    for part in _PARTS:
        found = values[part]
        if min(found["upper"], found["lower"]) < FEWEST:
            yield from ("-", "-")
            continue
        yield _with_interval(found["cliffs_delta"], found["cliffs_delta_interval"])
        p = found["brunner_munzel_p"]
        yield "-" if p is None else f"{p:.4f}" if p >= 1e-4 else f"{p:.0e}"


def _group_rows(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, found in groups.items():
        shares = (f"{100 * found[share]:.1f}" for share in ("near_zero", "high"))
        means = (f"{found['mean_return']:.3f}", f"{found['mean_h']:.3f}", _number(found["spearman"]))
        yield name, str(found["states"]), f"{found['criticality']:.3f}", *shares, *means


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return _number(value) + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")
