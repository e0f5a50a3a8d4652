"""Small worlds whose answers can be worked out by hand, for the tests of rollouts and algorithms."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.envs.state import EnvState, ParsedAction, Question, Turn
from carl_gym.rollouts import RolloutTree

STOP = "stop"


def questions(count: int) -> list[Question]:
    return [Question(id=f"q{number}", text=f"question {number}?", answers=("yes",)) for number in range(count)]


def path(state: EnvState) -> tuple[str, ...]:
    return tuple(turn.action.argument for turn in state.turns)


def after(state: EnvState, action: str) -> EnvState:
    return EnvState(state.question_id, (*state.turns, Turn(ParsedAction("search", action))))


def action(*logprobs: float, text: str = "go") -> Completion:
    """An action of as many tokens as log-probs."""
    return Completion(tuple(range(100, 100 + len(logprobs))), logprobs, text, "stop")


@dataclass(frozen=True)
class PathTask:
    """A state is the path of actions so far; it ends at `horizon` actions or at the action "stop"."""

    horizon: int
    payoff: Callable[[tuple[str, ...]], float] = lambda path: 0.0
    """Immediate reward for arriving at a path."""
    batches: list[int] = field(default_factory=list)
    """Sizes of the `transition_batch` calls."""

    def initial(self, question: Question) -> EnvState:
        return EnvState(question.id)

    def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str]) -> list[EnvState]:
        assert not any(self.terminal(state) for state in states)
        self.batches.append(len(states))
        return [after(state, text) for state, text in zip(states, actions, strict=True)]

    def observation(self, state: EnvState) -> str:
        return f"<{len(state.turns)}>"

    def reward(self, state: EnvState, action: str, next_state: EnvState) -> float:
        assert path(next_state) == (*path(state), action)
        return self.payoff(path(next_state))

    def terminal(self, state: EnvState) -> bool:
        return len(state.turns) == self.horizon or path(state)[-1:] == (STOP,)


@dataclass(frozen=True)
class ByteTranscript:
    """Text as its UTF-8 bytes."""

    max_tokens: int = 16
    context: int = 10_000

    def prompt(self, question_text: str) -> tuple[int, ...]:
        return tuple(question_text.encode())

    def observation(self, text: str, action: Sequence[int] = ()) -> tuple[int, ...]:
        return tuple(text.encode())


@dataclass
class ToyPolicy:
    """Acts by a function of (request, random generator); keeps every batch that it was asked for."""

    act: Callable[[SampleRequest, random.Random], Completion]
    version: int = 0
    batches: list[list[SampleRequest]] = field(default_factory=list)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        self.batches.append(list(requests))
        return [self.act(request, random.Random(request.seed)) for request in requests]

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        raise AssertionError("collecting never scores")

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        self.version += 1


def random_policy(*, stop: float = 0.2, ties: bool = False, sure: float = 0.0) -> ToyPolicy:
    """Random actions of random lengths, with random log-probs.

    Args:
        stop: probability of the action "stop".
        ties: draw log-probs and lengths so that many states have exactly equal entropies, some of them 0.
        sure: probability that all log-probs of an action are 0.
    """

    def act(request: SampleRequest, rng: random.Random) -> Completion:
        length = min(rng.choice((1, 2, 4) if ties else (1, 2, 3, 5, 8)), request.max_tokens)
        scale = 0.0 if rng.random() < sure else 1.0
        logprobs = tuple(
            -scale * (rng.choice((0.0, 0.25, 0.5, 1.0)) if ties else rng.expovariate(1.0)) for _ in range(length)
        )
        text = STOP if rng.random() < stop else rng.choice("abc")
        return Completion(tuple(rng.randrange(1000) for _ in range(length)), logprobs, text, "stop")

    return ToyPolicy(act)


@dataclass
class Sketch:
    """Builds a tree by hand: `sketch.edge(parent, h, reward)`."""

    tree: RolloutTree = field(default_factory=lambda: RolloutTree(questions(1)[0], policy_version=0, seed=7))

    def root(self, trajectory: int = 0) -> int:
        return self.tree.add_root(EnvState("q0"), (1, 2, 3), trajectory=trajectory)

    def edge(
        self,
        parent: int,
        h: float = 1.0,
        reward: float = 0.0,
        *,
        tokens: int = 1,
        end: bool = False,
        trajectory: int = 0,
    ) -> int:
        """An action of `tokens` tokens with entropy h; returns the new node."""
        state = after(self.tree.nodes[parent].state, f"a{len(self.tree.nodes)}")
        observation = () if end else (9,)
        return self.tree.add_child(parent, action(*[-h] * tokens), state, observation, reward, end, False, trajectory)
