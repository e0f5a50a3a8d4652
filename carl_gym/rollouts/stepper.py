"""One tree's growth: which actions it wants next, and what becomes of their results.

Schedules stand behind it. They sample what steppers want and step the environment, in whatever order suits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from carl_gym.agents.policy import Completion, SampleRequest, Transcript
from carl_gym.envs.state import EnvState
from carl_gym.errors import ConfigError
from carl_gym.rollouts.environment import Step
from carl_gym.rollouts.explorers import Explorer
from carl_gym.rollouts.tree import Node, RolloutTree

MIN_ACTION_TOKENS = 8
"""With less room than this in the context no action is asked for: the trajectory is truncated."""


@dataclass(frozen=True, slots=True)
class Want:
    """An action that a tree waits for: the next one of `trajectory`, at the state of `node`."""

    node: int
    trajectory: int


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
        self._rounds = 0
        self._starts: list[tuple[int, int]] = []  # of each trajectory: its round, and the depth that it starts at
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
            self._rounds += 1
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
            entropies=getattr(self._explorer, "needs_entropies", False),
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

    def in_order(self) -> RolloutTree:
        """The complete tree, its nodes numbered as if the trajectories of a round had advanced side by side: whatever
        the order was in which results arrived."""

        def place(node: Node) -> tuple[int, int, int]:
            if node.parent is None:
                return -1, 0, node.trajectory
            number, depth = self._starts[node.trajectory]
            return number, node.depth - depth, node.trajectory

        nodes = sorted(self.tree.nodes, key=place)
        if all(node.id == number for number, node in enumerate(nodes)):
            return self.tree
        ordered = RolloutTree(self.tree.question, self.tree.policy_version, self.tree.seed)
        ids: dict[int, int] = {}
        for node in nodes:
            if node.parent is None or node.action is None:
                ids[node.id] = ordered.add_root(node.state, node.observation_tokens, trajectory=node.trajectory)
                continue
            ids[node.id] = ordered.add_child(
                ids[node.parent],
                node.action,
                node.state,
                node.observation_tokens,
                node.reward,
                node.terminal,
                node.truncated,
                node.trajectory,
            )
        return ordered

    def _start(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self._ready.append(Want(node, trajectory=self._started))
            self._starts.append((self._rounds, self.tree.nodes[node].depth))
            self._started += 1

    def _has_room(self, prefix_length: int) -> bool:
        minimum = min(MIN_ACTION_TOKENS, self._transcript.max_tokens)
        return self._transcript.context - prefix_length >= minimum
