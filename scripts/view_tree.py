"""Make the page of a training run's rollout trees: `python scripts/view_tree.py --help`, and docs/viewer.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from carl_gym.console import run_command, show_line
from carl_gym.errors import ConfigError
from carl_gym.tracking.viewer import PAGE_FILE, run_page


@dataclass(frozen=True)
class Options:
    """Make one HTML file of the rollout trees that a training run kept, also of a run that was stopped or goes on.
    It needs no server and no network: open it in a browser."""

    run: tyro.conf.Positional[Path]
    """Output directory of the run."""
    question: str | None = None
    """Id of the only question to show."""
    output: Path | None = None
    """File to write; trees.html in the run's directory by default."""


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(lambda: write(tyro.cli(Options, args=arguments)))


def write(options: Options) -> None:
    page, output = run_page(options.run, options.question), options.output or options.run / PAGE_FILE
    try:
        page.save(output)
    except (OSError, ValueError) as error:  # a folder, in the second case
        raise ConfigError(f"{output} cannot be written ({error}); pass another --output") from error
    show_line(Console(), f"rollout trees ({output.stat().st_size / 1e6:.1f} MB): {output}")


if __name__ == "__main__":
    main()
