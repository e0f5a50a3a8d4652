"""Criticality as a picture: how it is distributed, whether entropy goes with it, and which actions it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from carl_gym.envs.state import ActionKind
from carl_gym.errors import CarlGymError
from carl_gym.evaluation.criticality import Fate, MeasuredState
from carl_gym.evaluation.criticality_summary import HIGH, NEAR_ZERO, Summary
from carl_gym.tracking.style import BLUE, GREY, INK, PALE, SKY, VERMILLION, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FATES: dict[Fate, tuple[str, str]] = {
    "lost": (PALE, "lost: all K scores 0"),
    "won": (SKY, "won: all K scores 1"),
    "open": (VERMILLION, "open"),
}
"""Colour and meaning of each fate."""
KINDS = get_args(ActionKind)
"""Of actions, in the order in which they are drawn."""


def draw_criticality(states: Sequence[MeasuredState], summary: Summary, path: Path, title: str = "") -> None:
    """Draw a study as PNG and SVG: histogram of C(s) by fate; entropy of low and high states; C(s) by action and depth.

    Args:
        states: what was measured, at least one.
        summary: what `summarise_criticality` says about them.
        path: where to; the suffix is replaced.
        title: of the whole.

    Raises:
        CarlGymError: no states.
    """
    if not states:
        raise CarlGymError("a criticality figure needs at least one measured state")
    with figure(path, 9.6, 2.8) as canvas:
        canvas.set_layout_engine("constrained")
        if title:
            canvas.suptitle(title, fontsize=8.5, fontweight="bold")
        distribution, entropies, actions, depths = canvas.subplots(1, 4, width_ratios=(1.4, 1.2, 0.8, 1.1))
        _histogram(distribution, states, summary)
        _entropies(entropies, states, summary)
        kinds = {state.action for state in states}
        _criticalities(
            actions,
            {kind: [s.criticality for s in states if s.action == kind] for kind in KINDS if kind in kinds},
            "action taken",
        )
        _criticalities(
            depths,
            {
                str(depth): [s.criticality for s in states if s.depth == depth]
                for depth in sorted({state.depth for state in states})
            },
            "actions before",
        )


def _histogram(axes: Axes, states: Sequence[MeasuredState], summary: Summary) -> None:
    found = summary["criticality"]
    edges = np.array(found["histogram"]["edges"])
    shown = [fate for fate in FATES if any(state.fate == fate for state in states)]
    axes.hist(
        [np.array([state.criticality for state in states if state.fate == fate]) + 1e-9 for fate in shown],
        bins=list(edges),
        weights=[np.full(sum(state.fate == fate for state in states), 1 / len(states)) for fate in shown],
        stacked=True,
        color=[FATES[fate][0] for fate in shown],
        label=[FATES[fate][1] for fate in shown],
    )
    axes.axvline(HIGH, color=GREY, lw=0.7, ls=(0, (3, 2)))
    axes.set(xlabel="criticality C(s)", ylabel="share of states", xlim=(0, edges[-1]))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_title(
        f"{len(states)} states: {found['near_zero']:.0%} below {NEAR_ZERO:g}, {found['high']:.0%} above {HIGH:g}",
        fontsize=7,
    )
    axes.legend(loc="upper right", fontsize=6.5, framealpha=1.0, frameon=True, edgecolor="none")


def _entropies(axes: Axes, states: Sequence[MeasuredState], summary: Summary) -> None:
    """Boxes of the mean h of K actions and of a single one, for low and high states."""
    high = np.array([state.criticality > HIGH for state in states])
    h = {
        "one_sample": np.array([state.h for state in states]),
        "mean_of_k": np.array([state.mean_h for state in states]),
    }
    labels = {"one_sample": "one action", "mean_of_k": "mean of K"}
    ticks = []
    for place, (name, values) in enumerate(h.items()):
        for shift, upper, colour in ((-0.2, False, GREY), (0.2, True, VERMILLION)):
            if len(part := values[high == upper]):
                _box(axes, part, place + shift, 0.34, colour)
        ticks.append(f"{labels[name]}\n{_finding(summary['entropy'][name]['all']['high'])}")
    axes.set_xticks(range(len(h)), ticks)
    axes.tick_params(axis="x", labelsize=6.5)
    axes.set(ylabel="entropy, nats per token", xlim=(-0.5, len(h) - 0.5))
    axes.set_ylim(bottom=0)
    for colour, label in ((GREY, f"C ≤ {HIGH:g} ({(~high).sum()})"), (VERMILLION, f"C > {HIGH:g} ({high.sum()})")):
        axes.plot([], [], "s", color=colour, alpha=0.6, label=label)
    axes.legend(loc="upper right", fontsize=6.5)


def _finding(found: Mapping[str, float | None]) -> str:
    delta, p = found["cliffs_delta"], found["brunner_munzel_p"]
    text = "" if delta is None else f"δ = {delta:.2f}"
    return text if p is None else f"{text}\np = {p:.3f}" if p >= 1e-3 else f"{text}\np < 0.001"


def _criticalities(axes: Axes, groups: Mapping[str, Sequence[float]], label: str) -> None:
    """Boxes of C by group; a cross is the mean."""
    for place, values in enumerate(groups.values()):
        _box(axes, np.array(values), place, 0.6, BLUE)
        axes.plot(place, float(np.mean(values)), "x", color=INK, markersize=4, mew=0.9, zorder=4)
    axes.set_xticks(range(len(groups)), list(groups))
    if max(map(len, groups)) > 2:
        axes.tick_params(axis="x", rotation=45)
    axes.set(xlabel=label, ylabel="criticality C(s)", xlim=(-0.6, len(groups) - 0.4))
    axes.set_ylim(bottom=-0.01)


def _box(axes: Axes, values: np.ndarray, place: float, width: float, colour: str) -> None:
    drawn = axes.boxplot(
        [values],
        positions=[place],
        widths=width,
        patch_artist=True,
        manage_ticks=False,
        medianprops={"color": INK, "linewidth": 1.2},
        whiskerprops={"color": GREY, "linewidth": 0.7},
        capprops={"color": GREY, "linewidth": 0.7},
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": GREY},
    )
    for box in drawn["boxes"]:
        box.set(facecolor=colour, alpha=0.6, linewidth=0.6)
