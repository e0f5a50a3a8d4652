"""What a run will need in memory, tokens and hours: `python scripts/plan_run.py --help`, and docs/scaling.md."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro
from rich.console import Console
from rich.table import Table

from carl_gym.agents.card import resolve
from carl_gym.cards import make_card, parse_assignments
from carl_gym.console import run_command
from carl_gym.errors import ConfigError
from carl_gym.training.plan import SHAPES, Figure, Hardware, ModelShape, Workload, plan

WIDTH = 160
"""Of the table where there is no terminal."""
SYMBOLS = (
    "P parameters, T turns, N0 initial, N forks, L layers, h hidden; q, k, i: widths of queries, keys and MLP. "
    "The paper: arXiv 2512.04949"
)


@dataclass(frozen=True)
class Options:
    """Work out memory, tokens and hours of a run of CARL before it is started. Nothing is downloaded for the cards in
    agents/, and no weights for any model."""

    agent: str = "qwen2.5-3b"
    """Agent card, model folder or hub id."""
    shape: tuple[str, ...] = ()
    """Instead of an agent, the numbers of its config.json as key=value: parameters, layers, hidden, kv_heads and
    vocabulary, and if they are known heads, head_dim, intermediate and tied."""
    work: tyro.conf.OmitArgPrefixes[Workload] = field(default_factory=Workload)
    """What a step does."""
    hardware: tyro.conf.OmitArgPrefixes[Hardware] = field(default_factory=Hardware)
    """What it runs on."""
    json: bool = False
    """Print JSON."""


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(lambda: show(tyro.cli(Options, args=arguments)))


def show(options: Options) -> None:
    """Print the plan."""
    work = options.work
    if options.shape:
        shape, source = make_card(ModelShape, parse_assignments(options.shape), "--shape"), "given"
    else:
        card, model = resolve(options.agent)
        shape, source = shape_of(model), f"config.json of {model}"
        work = dataclasses.replace(work, context=work.context or card.context or None)
    figures = plan(shape, work, options.hardware, source)
    if options.json:
        json.dump([figure._asdict() for figure in figures], sys.stdout, indent=1)
        print()
        return
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(figures))


def shape_of(model: str) -> ModelShape:
    """The shape of a known model, or from the config.json of a folder or hub id."""
    if model in SHAPES:
        return SHAPES[model]
    import torch  # slow to import, and not needed for known models
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        return ModelShape(
            parameters=parameters,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            kv_heads=config.num_key_value_heads,
            vocabulary=config.vocab_size,
            heads=config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate=config.intermediate_size,
            tied=config.tie_word_embeddings,
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{model!r} has no config.json of a known shape here ({error}); pass its numbers, such as --shape "
            "parameters=3000000000 layers=36 hidden=2048 kv_heads=2 vocabulary=151936"
        ) from error


def table(figures: Sequence[Figure]) -> Table:
    """A row per figure, with a line between sections."""
    found = Table(title="Plan: estimates, none of them measured", caption=SYMBOLS)
    for name, justify in (("", "left"), ("", "right"), ("", "left"), ("from", "left")):
        found.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    last = ""
    for figure in figures:
        if figure.section != last:
            found.add_section()
            found.add_row(f"[bold]{figure.section}[/]")
            last = figure.section
        found.add_row(figure.name, shown(figure.value), figure.unit, figure.source)
    return found


def shown(value: float | str) -> str:
    """A number as people read it."""
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:,.1f}"


if __name__ == "__main__":
    main()
