"""Learning curves: held-out exact match against what was spent, one line per algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from carl_gym.errors import CarlGymError
from carl_gym.tracking.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILLION, figure

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = (0, (4, 2))


def learning_curve(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw exact match over actions generated, as PNG and SVG: solid when sampled, dashed when greedy.

    Args:
        runs: by the name for the legend, the rows of a run's metrics JSONL. Rows with "eval/sampled_em" (a share,
            0 to 1) are drawn at their "actions_generated" (total since the start of training), with a band where
            "eval/sampled_em_low" and "eval/sampled_em_high" bound a 95 % interval, and with "eval/greedy_em" where
            present.
        path: where to; the suffix is replaced.

    Raises:
        CarlGymError: more runs than colours, or a run without an evaluation.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, PercentFormatter

    if not 1 <= len(runs) <= len(COLOURS):
        raise CarlGymError(f"a learning curve shows 1 to {len(COLOURS)} runs, got {len(runs)}: draw several")
    with figure(path, 5.2, 3.3) as canvas:
        canvas.set_layout_engine("constrained")
        axes = canvas.add_subplot()
        for (name, rows), colour, marker in zip(runs.items(), COLOURS, MARKERS, strict=False):
            evaluations = [row for row in rows if "eval/sampled_em" in row]
            if not evaluations:
                raise CarlGymError(f"run {name!r} has no row with 'eval/sampled_em': evaluate it at least once")

            def column(key: str, rows: Sequence[Mapping[str, float]] = evaluations) -> list[list[float]]:
                points = [[row["actions_generated"], row[key]] for row in rows if key in row]
                return [list(values) for values in zip(*points, strict=True)] or [[], []]

            sampled, greedy = column("eval/sampled_em"), column("eval/greedy_em")  # unclipped: whole markers at 0
            axes.plot(*sampled, color=colour, marker=marker, markersize=3.5, lw=1.6, clip_on=False, label=name)
            axes.plot(*greedy, color=colour, marker=marker, markersize=2.5, lw=1.0, ls=DASHES, clip_on=False)
            x, low = column("eval/sampled_em_low")
            if x:
                axes.fill_between(x, low, column("eval/sampled_em_high")[1], color=colour, alpha=0.15, lw=0)
        axes.set(xlabel="actions generated", ylabel="exact match on held-out questions", ylim=(0, 1))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y")
        styles = [
            Line2D([], [], color=INK, lw=1.6, label="sampled (T = 1), 95 % interval"),
            Line2D([], [], color=GREY, lw=1.0, ls=DASHES, label="greedy"),
        ]
        algorithms = axes.get_legend_handles_labels()[0]
        axes.legend(handles=[*algorithms, *styles], loc="best", fontsize=7)
