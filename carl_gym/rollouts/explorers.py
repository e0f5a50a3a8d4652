"""Explorers decide what a tree rolls out next: how many trajectories start at the root, and which states fork.

An explorer is a value and its methods are pure functions of the tree, asked only while no trajectory of that
tree is under way. The collector asks, samples, and asks again.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, Protocol, get_args

from carl_gym.errors import ConfigError, PolicyError
from carl_gym.rollouts.tree import Node, RolloutTree

RootRecord = Literal["separate", "merged"]
EntropyMeasure = Literal["mean", "sum", "exact"]


class Explorer(Protocol):
    """What to roll out next."""

    def roots(self) -> Sequence[int]:
        """One entry per root record: how many initial trajectories start there."""
        ...

    def next(self, tree: RolloutTree) -> list[int]:
        """Ids of the nodes to extend by one new trajectory each (a node may repeat); empty: the tree is complete."""
        ...


@dataclass(frozen=True, slots=True)
class RootExplorer:
    """Independent rollouts from one root: GRPO's group; evaluation with `rollouts=1`.

    Raises:
        ConfigError: `rollouts` < 1.
    """

    rollouts: int = 16

    def __post_init__(self) -> None:
        _require_count("rollouts", self.rollouts, at_least=1)

    def roots(self) -> tuple[int, ...]:
        """One root record with every rollout."""
        return (self.rollouts,)

    def next(self, tree: RolloutTree) -> list[int]:
        """Nothing is ever forked."""
        return []


@dataclass(frozen=True, slots=True)
class _Forking:
    """Initial trajectories from the root, then forks: what forking explorers have in common.

    Attributes:
        initial: N0, at least 1.
        forks: N, at least 0. A complete tree has N0 + N leaves.
        forks_per_round: 1 is the paper's order. k > 1 forks k states at once, chosen by a tree that does not yet know
            of the others: more parallel, slightly stale.
        root: "separate" gives each initial rollout its own root record (n = 1), the literal algorithm; "merged"
            has one root record with N0 children (n = N0).

    Raises:
        ConfigError: a value out of its range.
    """

    initial: int = 8
    forks: int = 16
    forks_per_round: int = 1
    root: RootRecord = "separate"

    def __post_init__(self) -> None:
        _require_count("initial", self.initial, at_least=1)
        _require_count("forks", self.forks, at_least=0)
        _require_count("forks_per_round", self.forks_per_round, at_least=1)
        if self.root not in get_args(RootRecord):
            raise ConfigError(f"root must be one of {', '.join(get_args(RootRecord))}, not {self.root!r}")

    def roots(self) -> tuple[int, ...]:
        """Phase 1."""
        return (self.initial,) if self.root == "merged" else (1,) * self.initial

    def _numbers(self, tree: RolloutTree) -> range:
        """Trajectory numbers of the forks of this round; empty when all are done."""
        started = tree.trajectories
        return range(started, min(started + self.forks_per_round, self.initial + self.forks))


@dataclass(frozen=True, slots=True)
class EntropyForking(_Forking):
    """Uncertainty-guided progressive forking (CARL, arXiv 2512.04949, Algorithm 1).

    Phase 1 rolls out `initial` (N0) trajectories from the root. Phase 2 forks `forks` (N) times: the recorded
    non-terminal state with the largest H / n (the lowest "action density" n / H) is rolled out once more, to
    the end. Ties go to the lowest (trajectory number, depth). When every H is 0 there is nothing to learn by
    forking, and the tree is complete early.

    Attributes and errors: `initial`, `forks`, `forks_per_round`, `root`, as `_Forking` describes them, and
        measure: what H is the mean of, over the actions sampled from a state: "mean" is the paper's h, the negative
            log-prob per token of the action; "sum" that of the whole action; "exact" the mean entropy of the
            distributions that its tokens were drawn from.
    """

    measure: EntropyMeasure = "mean"

    def __post_init__(self) -> None:
        _Forking.__post_init__(self)
        if self.measure not in get_args(EntropyMeasure):
            raise ConfigError(f"measure must be one of {', '.join(get_args(EntropyMeasure))}, not {self.measure!r}")

    @property
    def needs_entropies(self) -> bool:
        """Whether actions have to come with exact entropies."""
        return self.measure == "exact"

    def next(self, tree: RolloutTree) -> list[int]:
        """Phase 2: the states of largest H / n. Raises PolicyError where log-probs or entropies are not known."""
        entropy = {node.id: self._entropy(tree, node) for node in tree.recorded()}

        def by_density(node: Node) -> tuple[float, int, int]:
            return -entropy[node.id] / len(node.children), node.trajectory, node.depth

        if any(map(math.isnan, entropy.values())):
            raise PolicyError("forking by entropy needs log-probs, and this policy gives none; use another explorer")
        uncertain = (node for node in tree.recorded() if entropy[node.id] > 0)
        return [node.id for node in heapq.nsmallest(len(self._numbers(tree)), uncertain, key=by_density)]

    def _entropy(self, tree: RolloutTree, state: Node) -> float:
        """H of a recorded state."""
        if self.measure == "mean":
            return tree.H(state.id)
        actions = [action for child in state.children if (action := tree.nodes[child].action)]
        if self.measure == "sum":
            return fmean(-sum(action.logprobs) for action in actions)
        if not all(action.entropies for action in actions):
            raise PolicyError("forking by exact entropy needs a policy that gives entropies; use backend transformers")
        return fmean(fmean(action.entropies) for action in actions)


@dataclass(frozen=True, slots=True)
class RandomForking(_Forking):
    """The ablation of `EntropyForking`: forks a uniformly drawn recorded non-terminal state.

    The draws come from the tree's seed and the number of the fork, so they are independent of the sampled actions:
    over trajectories of equal length the tree's value estimates are unbiased. (Where lengths vary, how many states
    were recorded still depends on the actions.) It never completes early.

    Attributes and errors are those of `EntropyForking`.
    """

    def next(self, tree: RolloutTree) -> list[int]:
        """Phase 2: independent uniform draws, with replacement."""
        recorded = sorted(tree.recorded(), key=lambda node: (node.trajectory, node.depth))
        return [random.Random(tree.seed_for("fork", number)).choice(recorded).id for number in self._numbers(tree)]


def _require_count(name: str, value: int, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        symbol = {"initial": " (N0)", "forks": " (N)"}.get(name, "")
        raise ConfigError(f"{name}{symbol} must be an integer >= {at_least}, not {value!r}")
