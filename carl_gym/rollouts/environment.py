"""The environment as rollouts see it: a pure task, stepped in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Protocol

from carl_gym.agents.policy import Completion
from carl_gym.envs.state import EnvState, Question


class EnvTask(Protocol):
    """A pure environment: states are values, nothing is remembered between calls."""

    def initial(self, question: Question, /) -> EnvState:
        """The state that an episode on the question starts in."""
        ...

    def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str], /) -> list[EnvState]:
        """The states after the actions, in order."""
        ...

    def observation(self, state: EnvState, /) -> str:
        """The new text only: the question at the start, then what the last action brought."""
        ...

    def reward(self, state: EnvState, action: str, next_state: EnvState, /) -> float:
        """Immediate reward of a transition."""
        ...

    def terminal(self, state: EnvState, /) -> bool:
        """Whether the episode is over."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """What the environment answered to an action; `observation` is empty once `terminal`."""

    state: EnvState
    reward: float
    terminal: bool
    observation: str


def environment_steps(task: EnvTask, states: Sequence[EnvState], actions: Sequence[Completion]) -> list[Step]:
    """What the environment answers; an action for which the context had no room is none, and its state stays."""
    taken = [action.finish_reason != "context" for action in actions]
    texts = [action.text for action in compress(actions, taken)]
    after = iter(task.transition_batch(list(compress(states, taken)), texts))
    return [
        _step(task, state, action.text, next(after)) if real else Step(state, 0.0, False, "")
        for state, action, real in zip(states, actions, taken, strict=True)
    ]


def _step(task: EnvTask, state: EnvState, action: str, after: EnvState) -> Step:
    terminal = task.terminal(after)
    return Step(after, task.reward(state, action, after), terminal, "" if terminal else task.observation(after))
