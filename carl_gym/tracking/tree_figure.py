"""A rollout tree as a picture: what was tried on one question, where it was forked, and what trained.

Time runs from left to right and every trajectory has its own lane; a fork leaves its lane downwards at the state
that it starts from. Node colour is H(s), the entropy that decides where to fork.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from carl_gym.rollouts.tree import Node, RolloutTree
from carl_gym.tracking.style import BLUE, GREY, INK, PALE, VERMILLION, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMN, LANE, MARGIN = 1.45, 0.34, 0.55
"""Inches per action, per trajectory, and around the tree."""
LABEL_CHARS = 29
"""Longest action text that fits into a column."""


def draw_tree(tree: RolloutTree, advantages: np.ndarray | None, selected: np.ndarray | None, path: Path) -> None:
    """Draw one tree, as PNG and SVG.

    Args:
        tree: complete, or still growing.
        advantages: A of the edge into each node, by node id, shape (nodes,). None: edges get no sign.
        selected: whether the edge into each node trains, by node id, shape (nodes,). None: all are drawn alike.
        path: where to; the suffix is replaced.
    """
    rows = lanes(tree)
    columns = max(node.depth for node in tree.nodes)
    width, height = COLUMN * (columns + 1) + MARGIN, LANE * (len(rows) + 1) + 3 * MARGIN
    with figure(path, width, height) as canvas:
        axes = canvas.add_subplot()
        axes.set_axis_off()
        axes.set(xlim=(-0.25, columns + 0.65), ylim=(len(rows) - 0.3, -0.9))
        for node in tree.nodes:
            if node.parent is not None:
                _draw_edge(axes, tree, node, rows, advantages, selected)
        _draw_nodes(axes, tree, rows)
        _draw_legend(axes, advantages, selected)
        gold = " or ".join(tree.question.answers)
        trained = "" if selected is None else f", {int(np.sum(selected))} trained"
        counts = f"{tree.trajectories} trajectories, {tree.actions_generated} actions generated{trained}"
        title = [*textwrap.wrap(tree.question.text, int(width * 14)), f"gold answer: {gold}   |   {counts}"]
        axes.set_title("\n".join(title), loc="left", fontsize=8)


def lanes(tree: RolloutTree) -> dict[int, int]:
    """The row of each trajectory, from the top, such that no two edges cross.

    A trajectory is followed by its forks, those from its late states first: what starts further left passes below.
    """
    forks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for node in tree.nodes:
        if node.parent is not None and (source := tree.nodes[node.parent]).trajectory != node.trajectory:
            forks[source.trajectory].append((-source.depth, node.trajectory))
    rows: dict[int, int] = {}
    waiting = [root.trajectory for root in reversed(tree.roots())]
    while waiting:
        trajectory = waiting.pop()
        rows[trajectory] = len(rows)
        waiting.extend(fork for _, fork in sorted(forks[trajectory], reverse=True))
    return rows


def label(node: Node) -> str:
    """The action into a node as "kind: argument", cut to fit into a column."""
    action = node.state.turns[-1].action
    text = f"{action.kind}: {action.argument}" if action.valid else f"invalid: {action.code}"
    return text if len(text) <= LABEL_CHARS else text[: LABEL_CHARS - 1].rstrip() + "…"


def _draw_edge(
    axes: Axes,
    tree: RolloutTree,
    node: Node,
    rows: dict[int, int],
    advantages: np.ndarray | None,
    selected: np.ndarray | None,
) -> None:
    assert node.parent is not None
    source, y = tree.nodes[node.parent], rows[node.trajectory]
    trained = selected is None or bool(selected[node.id])
    advantage = 0.0 if advantages is None else float(advantages[node.id])
    colour, width = (INK, 1.2) if trained else (PALE, 0.8)
    if trained and advantage != 0:
        colour, width = (BLUE if advantage > 0 else VERMILLION), 1.4 + 2.6 * min(1.0, abs(advantage))
    if source.trajectory != node.trajectory:
        axes.plot([source.depth] * 2, [rows[source.trajectory], y], color=GREY, lw=0.7, zorder=1)
        axes.plot(source.depth, y, marker=".", markersize=2.5, color=GREY, zorder=1)
    axes.plot([source.depth, node.depth], [y, y], color=colour, lw=width, solid_capstyle="butt", zorder=2)
    text = INK if trained else GREY
    axes.text(source.depth + 0.09, y - 0.12, label(node), fontsize=5.6, color=text, va="bottom", zorder=4)
    if trained and advantages is not None:
        axes.text(node.depth - 0.09, y + 0.14, f"{advantage:+.2f}", fontsize=4.8, color=colour, va="top", ha="right")


def _draw_nodes(axes: Axes, tree: RolloutTree, rows: dict[int, int]) -> None:
    decisions = list(tree.recorded())
    dots = axes.scatter(
        [node.depth for node in decisions],
        [rows[node.trajectory] for node in decisions],
        c=[tree.H(node.id) for node in decisions],
        cmap="viridis",
        s=34,
        edgecolors="white",
        linewidths=0.6,
        zorder=3,
    )
    bar = axes.figure.colorbar(dots, ax=axes, location="right", shrink=0.4, aspect=18, pad=0.005)
    bar.set_label("H(s), nats per token", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    bar.outline.set_visible(False)
    for leaf in tree.leaves():
        y, score = rows[leaf.trajectory], tree.trajectory_return(leaf.id)
        axes.plot(leaf.depth, y, marker="x" if leaf.truncated else "s", color=INK, markersize=4, zorder=3)
        axes.text(leaf.depth + 0.06, y, f"R = {score:.2f}", fontsize=6, va="center", fontweight="bold")


def _draw_legend(axes: Axes, advantages: np.ndarray | None, selected: np.ndarray | None) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=INK, lw=1.2, label="trained, A = 0" if advantages is not None else "action")]
    if advantages is not None:
        entries.insert(0, Line2D([], [], color=BLUE, lw=3, label="trained, A > 0"))
        entries.insert(1, Line2D([], [], color=VERMILLION, lw=3, label="trained, A < 0"))
    if selected is not None:
        entries.append(Line2D([], [], color=PALE, lw=0.8, label="not trained"))
    entries.append(Line2D([], [], color=INK, marker="s", ls="", markersize=4, label="end, with return R"))
    axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(0, 0), ncols=len(entries), fontsize=7)
