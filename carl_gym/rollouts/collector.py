"""The collector: questions in, complete rollout trees out, with generation and retrieval batched over all trees.

Each tree is grown by a pure stepper that says which actions it wants and takes their results. `collect` is the
scheduler behind them: in every tick it gathers one action per active trajectory of every tree, samples them in one
`Policy.sample` call, and takes the environment steps in one `transition_batch` call. Trees fork in their
explorer's order while the forks of different trees share ticks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Protocol

from carl_gym.agents.policy import Completion, Policy, SampleRequest, Transcript
from carl_gym.envs.state import EnvState, Question
from carl_gym.errors import ConfigError
from carl_gym.rollouts.explorers import Explorer
from carl_gym.rollouts.tree import RolloutTree, derive_seed

MIN_ACTION_TOKENS = 8
"""With less room than this in the context no action is asked for: the trajectory is truncated."""


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


@dataclass(slots=True)
class Timings:
    """Wall-clock seconds that `collect` spent, added up over its calls.

    Attributes:
        sample: in `Policy.sample`.
        environment: in the task: transitions with their retrieval, rewards, observations.
    """

    sample: float = 0.0
    environment: float = 0.0


@dataclass(frozen=True, slots=True)
class Want:
    """An action that a tree waits for: the next one of `trajectory`, at the state of `node`."""

    node: int
    trajectory: int


@dataclass(frozen=True, slots=True)
class Step:
    """What the environment answered to an action; `observation` is empty once `terminal`."""

    state: EnvState
    reward: float
    terminal: bool
    observation: str


class TreeStepper:
    """Grows one tree by an explorer. It decides and records; it samples nothing and steps no environment.

    Every action is identified by (trajectory number, depth), and so is its seed: results depend neither on what else
    is in a batch nor on the order in which results arrive.

    Raises:
        ConfigError: the prompt leaves no room for an action.
    """

    def __init__(
        self, tree: RolloutTree, explorer: Explorer, transcript: Transcript, initial: EnvState, question_text: str
    ) -> None:
        self.tree = tree
        self._explorer = explorer
        self._transcript = transcript
        self._ready: list[Want] = []
        self._awaited = 0
        self._started = 0
        self._complete = False
        prompt = transcript.prompt(question_text)
        if not self._has_room(len(prompt)):
            raise ConfigError(
                f"the prompt of question {tree.question.id!r} has {len(prompt)} tokens, which leaves no room for an "
                f"action in a context of {transcript.context}; use a longer context or drop the question"
            )
        for rollouts in explorer.roots():
            root = tree.add_root(initial, prompt, trajectory=self._started)
            self._start([root] * rollouts)

    def wants(self) -> list[Want]:
        """The actions to sample now, each handed out once. Empty while all are awaited, and once complete."""
        if not self._ready and not self._awaited and not self._complete:
            self._start(self._explorer.next(self.tree))
            self._complete = not self._ready
        ready, self._ready = self._ready, []
        self._awaited += len(ready)
        return ready

    def request(self, want: Want, temperature: float) -> SampleRequest:
        """What to ask the policy for."""
        node = self.tree.nodes[want.node]
        prefix = self.tree.prefix(want.node)
        return SampleRequest(
            prefix=prefix,
            seed=self.tree.seed_for("action", want.trajectory, node.depth),
            temperature=temperature,
            max_tokens=min(self._transcript.max_tokens, self._transcript.context - len(prefix)),
            state=node.state,
        )

    def take(self, want: Want, action: Completion, step: Step) -> None:
        """Record the result of a want; the trajectory goes on unless the episode ended or the context is full."""
        full = action.finish_reason == "context"
        ended = step.terminal or full
        observation = () if ended else self._transcript.observation(step.observation, action.token_ids)
        length = self.tree.prefix_length(want.node) + len(action.token_ids) + len(observation)
        truncated = full or (not ended and not self._has_room(length))
        child = self.tree.add_child(
            parent=want.node,
            completion=action,
            state=step.state,
            observation_tokens=() if truncated else observation,
            reward=step.reward,
            terminal=step.terminal or truncated,
            truncated=truncated,
            trajectory=want.trajectory,
        )
        self._awaited -= 1
        if not self.tree.nodes[child].terminal:
            self._ready.append(Want(child, want.trajectory))

    def _start(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self._ready.append(Want(node, trajectory=self._started))
            self._started += 1

    def _has_room(self, prefix_length: int) -> bool:
        minimum = min(MIN_ACTION_TOKENS, self._transcript.max_tokens)
        return self._transcript.context - prefix_length >= minimum


def collect(
    task: EnvTask,
    policy: Policy,
    transcript: Transcript,
    questions: Sequence[Question],
    explorer: Explorer,
    *,
    seed: int,
    step: int,
    temperature: float = 1.0,
    timings: Timings | None = None,
) -> list[RolloutTree]:
    """Roll out one complete tree per question, in order.

    A tree depends on (seed, step, question, weights) alone, not on the other questions. A question that comes
    twice in one call gets two different trees. Evaluation is `RootExplorer(1)`; temperature 0 is greedy.

    Raises:
        ConfigError: a prompt leaves no room for an action (nothing was sampled yet).
        PolicyError: the policy returned an action without tokens or log-probs.
    """
    timings = timings if timings is not None else Timings()
    steppers = []
    seen: Counter[str] = Counter()
    for question in questions:
        tree_seed = derive_seed(seed, step, question.id, seen[question.id])
        seen[question.id] += 1
        tree = RolloutTree(question, policy.version, tree_seed)
        state = task.initial(question)
        steppers.append(TreeStepper(tree, explorer, transcript, state, task.observation(state)))

    while wants := [(stepper, want) for stepper in steppers for want in stepper.wants()]:
        requests = [stepper.request(want, temperature) for stepper, want in wants]
        started = time.perf_counter()
        actions = policy.sample(requests)
        sampled = time.perf_counter()
        steps = _environment_steps(
            task,
            [stepper.tree.nodes[want.node].state for stepper, want in wants],
            actions,
        )
        timings.sample += sampled - started
        timings.environment += time.perf_counter() - sampled
        for (stepper, want), action, outcome in zip(wants, actions, steps, strict=True):
            stepper.take(want, action, outcome)
    return [stepper.tree for stepper in steppers]


def _environment_steps(task: EnvTask, states: Sequence[EnvState], actions: Sequence[Completion]) -> list[Step]:
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
