"""Episodes for people: a transcript made from the state, as plain text or in colours on a terminal.

Everything that documents, questions and agents wrote passes through `visible` first: a passage with terminal control
sequences can neither move the cursor nor recolour, hide or reorder what stands around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from carl_gym.envs.state import EnvState, ParsedAction
from carl_gym.envs.task import SearchTask
from carl_gym.harmless import visible

if TYPE_CHECKING:
    from rich.console import Console

Kind = Literal["question", "action", "invalid", "result", "end"]

STYLES: dict[Kind, str] = {
    "question": "bold",
    "action": "cyan",
    "invalid": "red",
    "result": "dim",
    "end": "bold green",
}
"""How `show` writes each kind of line (rich's styles)."""


def transcript(task: SearchTask, state: EnvState) -> str:
    """The episode up to `state` as plain text: question, actions with what they brought, and scores at its end."""
    return "\n".join(text for _, text in lines(task, state))


def lines(task: SearchTask, state: EnvState, start: int = 0) -> Iterator[tuple[Kind, str]]:
    """The parts of the transcript from turn `start` on (0: from the question), harmless to print."""
    for n, (action, observation) in enumerate(task.transcript(state)):
        if n < start:
            continue
        if action is None:
            yield "question", f"Question: {visible(observation)}"
            continue
        yield from _turn(n, action, observation)
    if task.terminal(state):
        yield "end", _end(task, state)


def show(task: SearchTask, state: EnvState, start: int = 0, console: Console | None = None) -> None:
    """Print the transcript from turn `start` on, coloured where the terminal can show colours."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    for kind, text in lines(task, state, start):
        # A Text and no str: rich would read square brackets in passages as its markup.
        console.print(Text(text, STYLES[kind]), soft_wrap=True)


def _turn(n: int, action: ParsedAction, observation: str) -> Iterator[tuple[Kind, str]]:
    if action.valid:
        yield "action", f"{n}. {action.kind} {visible(action.argument)}".rstrip()
    else:
        yield "invalid", f"{n}. invalid action ({action.code})"
    if observation:
        text = observation.removeprefix("<information>\n").removesuffix("\n</information>")
        yield "result", "\n".join(f"   {visible(line)}" for line in text.split("\n"))


def _end(task: SearchTask, state: EnvState) -> str:
    question, score = task.questions[state.question_id], task.score(state)
    gold = " / ".join(map(visible, question.answers))
    what = "answered" if state.status == "answered" else "out of turns"
    return f"End: {what}; EM {score.em:g}, F1 {score.f1:.2f}, format {score.format:.2f}; gold: {gold}"
