"""Make the tiny agent: `python scripts/warm_start.py` writes agents/tiny/ anew (about half an hour on 2 cores)."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track

from carl_gym.agents.agent import Agent
from carl_gym.agents.card import AgentCard
from carl_gym.agents.transcript import InlineTranscript
from carl_gym.agents.transformers_policy import TransformersPolicy
from carl_gym.cards import load_card
from carl_gym.envs.protocol import STOP_STRINGS
from carl_gym.envs.registration import make_task
from carl_gym.evaluation import evaluate
from carl_gym.training.warm_start import (
    WarmStartConfig,
    build_model,
    build_tokenizer,
    encode,
    general_prose,
    make_traces,
    train,
)


@dataclass(frozen=True)
class Options:
    """Train the tiny agent's tokenizer and model by imitation of noisy expert traces."""

    output: Path = Path("agents/tiny")
    """Folder to write tokenizer and weights to."""
    threads: int = 2
    """CPU threads of torch."""
    questions: int = 500
    """Held-out questions to evaluate on at the end."""
    settings: WarmStartConfig = field(default_factory=WarmStartConfig)
    """Sizes, optimisation and noise."""


def main(options: Options) -> None:
    console = Console()
    torch.set_num_threads(options.threads)
    config = options.settings
    traces = list(
        chain.from_iterable(track(make_traces(config), "expert traces", total=config.worlds, console=console))
    )
    console.print(f"{len(traces)} traces, expert's mean reward {sum(t.reward for t in traces) / len(traces):.3f}")
    texts = chain.from_iterable((*trace.observations, *trace.actions) for trace in traces[:20_000])
    tokenizer = build_tokenizer(texts, general_prose(), config.merges)
    card = load_card("agents", "tiny", AgentCard)
    transcript = InlineTranscript(tokenizer, card.prompt, card.observation, card.max_tokens, card.context)
    examples = encode(traces, transcript, config.observation_weight)
    model = build_model(config, tokenizer)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{len(tokenizer)} tokens, {size:,} parameters, {sum(len(e.ids) for e in examples):,} tokens of traces"
    )
    train(
        model,
        examples,
        config,
        lambda step, steps, loss, rate: console.print(f"step {step}/{steps}  loss {loss:.4f}  {rate:,.0f} tokens/s"),
    )
    agent = Agent(card, TransformersPolicy(model, tokenizer, STOP_STRINGS), transcript, model, tokenizer)
    agent.save(options.output)
    task = make_task("carl/MiniWiki-v0", split="test", questions=options.questions)
    for temperature in (1.0, 0.0):
        scores = evaluate(task, agent.policy, agent.transcript, list(task.questions.values()), temperature=temperature)
        console.print(
            f"held-out, temperature {temperature:g}: EM {scores.em:.3f} [{scores.em_low:.3f}, {scores.em_high:.3f}], "
            f"F1 {scores.f1:.3f}, invalid actions {scores.invalid:.2%}, {scores.turns:.1f} turns"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
