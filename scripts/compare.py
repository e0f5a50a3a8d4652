"""Compare two results of scripts/evaluate.py: `python scripts/compare.py --help`, and docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from carl_gym.console import run_command, show_line, shown
from carl_gym.errors import ConfigError
from carl_gym.evaluation.comparison import Comparison, Side, compare, condition_differences, pair_up, read_sides
from carl_gym.files import write_json
from carl_gym.harmless import visible

SCORES = {"em": "EM", "f1": "F1", "cover_em": "cover EM", "judge": "judge"}


@dataclass(frozen=True)
class Options:
    """Compare two results question by question: differences B - A, 95 % bootstrap intervals over questions, and
    two-sided p-values of a paired permutation test. One result compares two of its agents."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """A and B: summary.json of two evaluations, or their folders, with episodes.jsonl beside them."""
    agents: tuple[str, str] | None = None
    """The agent of A and the agent of B; by default every agent that both have."""
    force: bool = False
    """Compare although questions, corpus, retriever or sampling differ, on the questions that both have."""
    output: Path | None = None
    """JSON file to write the comparisons to."""

    def __post_init__(self) -> None:
        if len(self.results) not in (1, 2) or (len(self.results) == 1 and self.agents is None):
            raise ConfigError("name two results, or one and two of its agents: compare.py A.json --agents a b")
        if len(set(self.results)) == 1 and self.agents and len(set(self.agents)) == 1:
            raise ConfigError(f"--agents {' '.join(self.agents)}: an agent differs in nothing from itself")


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(lambda: show(tyro.cli(Options, args=arguments)))


def show(options: Options) -> None:
    """Whatever forbids a comparison comes out before any is made."""
    sides = [read_sides(path) for path in options.results]
    pairs = pair_up(sides[0], sides[-1], options.agents or ())
    reasons: dict[str, list[str]] = {}
    for a, b in pairs:
        if differing := condition_differences(a, b):
            reasons.setdefault(", ".join(differing), []).append(f"{names(a, b)} in {a.env}")
    if reasons and not options.force:
        listed = "; ".join(f"{differing} ({', '.join(where)})" for differing, where in reasons.items())
        raise ConfigError(
            f"these scores do not compare: {listed}. Evaluate both in the same setting, or pass --force to compare "
            "them all the same on the questions that both have"
        )
    found = [(a, b, compare(a, b)) for a, b in pairs]
    console = Console()
    for letter, path in zip("AB", (options.results[0], options.results[-1]), strict=True):
        show_line(console, f"{letter}: {path}")
    for a, b, scores in found:
        console.print(table(a, b, scores))
    if options.output:
        rows = [{"env": a.env, "agents": [a.agent, b.agent], **asdict(c)} for a, b, scores in found for c in scores]
        files = [str(path) for path in options.results]
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.output, {"results": files, "forced": reasons, "comparisons": rows})
        except OSError as error:
            raise ConfigError(f"--output {options.output} cannot be written ({error}); pass another path") from error


def table(a: Side, b: Side, scores: Sequence[Comparison]) -> Table:
    """A row per score; under a forced comparison, what differs."""
    differing = condition_differences(a, b)
    warning = f"forced: scores that differ in {', '.join(differing)} do not compare" if differing else ""
    result = Table(
        title=shown(f"{names(a, b)} in {a.env}: {scores[0].questions} questions in common"),
        caption=Text(visible(warning), style="bold yellow"),
    )
    result.add_column("%", no_wrap=True)
    for name in ("A", "B", "B - A", "95 % interval", "p", "better", "worse", "same"):
        result.add_column(name, justify="right", no_wrap=True)
    for c in scores:
        counts = (c.wins, c.losses, c.questions - c.wins - c.losses)
        shares = (f"{100 * c.a:.1f}", f"{100 * c.b:.1f}", f"{100 * c.difference:+.1f}")
        interval = f"[{100 * c.low:+.1f}, {100 * c.high:+.1f}]"
        p = f"{c.p:.4f}" if c.p >= 1e-4 else f"{c.p:.1e}"
        result.add_row(*map(Text, (SCORES[c.score], *shares, interval, p, *map(str, counts))))
    return result


def names(a: Side, b: Side) -> str:
    return a.agent if a.agent == b.agent else f"{a.agent} (A) and {b.agent} (B)"


if __name__ == "__main__":
    main()
