"""Where to fork: the winner's curse of choosing a state by one sampled action, as Markdown tables.

    OMP_NUM_THREADS=1 python benchmarks/fork_choice.py [--agent tiny] [--questions 32] [--output runs/fork-choice.json]

CARL (arXiv 2512.04949, Algorithm 1) forks the state with the largest H / n, where H is at first the negative log-prob
per token of a single sampled action. The largest of many noisy numbers is mostly one whose noise is large. So other
ways to choose are tried on the same questions of a MiniWiki training world, from the same initial trajectories:

    one NLL             CARL's H
    pilot m             m more actions are sampled at every state that could be forked, and thrown away; H is the mean
                        over these and the actions of the tree
    pilot m, leaders    the same, but only at a state that would be forked next: until the one that leads has a pilot
    exact entropy       H is the mean exact entropy of the distributions that an action's tokens were drawn from
    token sum           H is the negative log-prob of the whole action
    random              uniformly drawn

Equal cost: a question's budget is what "one NLL" generates with N forks, and a pilot's actions count as generated.
Others fork while they can pay the pilots that the next choice needs and end up closer to the budget with one more fork
than without; with N0 = 8 a pilot everywhere can cost more than all forks. `--equal forks` gives everyone N forks
instead, whatever they cost.

Of every forked state, and every state of the initial trajectories, the criticality (Eq. 5) is measured afterwards with
K fresh actions, each played out greedily (`carl_gym.evaluation.criticality`). Equal states are measured once. Numbers
are means over a question's forks, then over questions; intervals are 95 %, bootstrapped over questions.

    criticality     mean C of the states that were forked
    - one NLL       paired difference to CARL's choice
    rank            share of the initial trajectories' states of the tree that are less critical (equal ones count half)
    settled         share of forks at states where all K returns were equal
    H chosen        H at the moment of the choice, in the rule's own measure
    H fresh         mean of the same measure over the K fresh actions there: H chosen regresses to it
    A != 0          share of the trained actions whose advantage (Eq. 11) is not 0
    per 100         trained actions with A != 0, per 100 generated ones

and of forks at states with one action so far, by the two trajectories that then start there:

    old - new       return of the trajectory whose action led to the choice, minus that of the fork. Where the choice
                    does not depend on the action this is 0 on average; half of it is what the state's value is off
    var V           variance of a value that is the mean of two returns: mean of (old - new)^2 / 4
    from action     how much of var V Eq. 5's variance over actions explains; the rest are later actions. (Rough: Eq. 5
                    goes on greedily.)
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args

import numpy as np
import torch
import transformers
import tyro

from carl_gym.agents.agent import load_agent
from carl_gym.agents.policy import Completion, Policy, SampleRequest, Transcript
from carl_gym.algorithms.credit import tree_difference
from carl_gym.algorithms.selection import forked_states
from carl_gym.envs.registration import make_task
from carl_gym.envs.state import Question
from carl_gym.evaluation.criticality import MeasuredState, VisitedState, measure
from carl_gym.evaluation.statistics import bootstrap_interval
from carl_gym.rollouts import EntropyForking, RandomForking, RolloutTree, collect
from carl_gym.rollouts.environment import EnvTask
from carl_gym.rollouts.explorers import EntropyMeasure, Explorer
from carl_gym.rollouts.tree import Node, action_entropy

MANY = 100_000
"""More forks than any budget pays for."""
ZERO = 1e-9
"""Advantages up to this size are rounding."""
BATCH = 64
"""Questions whose trees grow together."""

MEASURES: tuple[EntropyMeasure, ...] = get_args(EntropyMeasure)

Prefix = tuple[int, ...]
State = tuple[str, Prefix]
"""What tells states apart: the question's id and the prefix."""
Interval = tuple[float, float, float]
"""Mean, and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Options:
    """Compare ways to choose the states that are forked."""

    agent: str = "tiny"
    """Agent card, model folder or hub id; a checkpoint of a run is one."""
    world: int = 0
    """MiniWiki training world."""
    questions: int = 32
    """Questions, and so trees of each kind."""
    initial: tuple[int, ...] = (1, 8)
    """N0: initial trajectories."""
    forks: int = 16
    """N: forks of CARL's tree, which sets the budget."""
    equal: Literal["actions", "forks"] = "actions"
    """What all ways to choose have the same number of."""
    resamples: int = 8
    """K of Eq. 5."""
    seed: int = 0
    """Of all random numbers."""
    threads: int = 1
    """CPU threads of torch."""
    device: str = "cpu"
    """cpu or cuda."""
    output: Path | None = None
    """JSON file for all numbers and every fork."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to choose.

    Attributes:
        measure: what H is the mean of, as `EntropyForking.measure`.
        pilot: actions that are sampled at a state to judge it, beside those of the tree.
        leaders: only states that would be forked next get a pilot.
        random: no H at all.
    """

    measure: EntropyMeasure = "mean"
    pilot: int = 0
    leaders: bool = False
    random: bool = False


CARL = "one NLL"
RULES: dict[str, Rule] = {
    CARL: Rule(),
    "pilot 2": Rule(pilot=2),
    "pilot 4": Rule(pilot=4),
    "pilot 2, leaders": Rule(pilot=2, leaders=True),
    "pilot 4, leaders": Rule(pilot=4, leaders=True),
    "exact entropy": Rule("exact"),
    "token sum": Rule("sum"),
    "random": Rule(random=True),
}


# Choosing


class Pilots:
    """Actions that were sampled at states to judge them, and thrown away.

    Equal roots of a tree share theirs. The random numbers are the tree's own.
    """

    def __init__(self, policy: Policy, transcript: Transcript, count: int) -> None:
        self.policy, self.transcript, self.count = policy, transcript, count
        self._found: dict[tuple[int, Prefix], list[float]] = {}

    def h(self, tree: RolloutTree, state: Node) -> list[float]:
        """Negative log-probs per token of the state's pilot actions; [] without a pilot."""
        return self._found.get((tree.seed, tree.prefix(state.id)), [])

    def missing(self, tree: RolloutTree) -> list[Node]:
        """Recorded states without a pilot, one of each kind of equal roots."""
        without = {tree.prefix(node.id): node for node in tree.recorded() if not self.h(tree, node)}
        return list(without.values())

    def spent(self, tree: RolloutTree) -> int:
        """Actions generated for the tree's pilots."""
        return sum(len(found) for (seed, _), found in self._found.items() if seed == tree.seed)

    def sample(self, tree: RolloutTree, states: Sequence[Node]) -> None:
        """Give these states a pilot."""
        requests = []
        for state in states:
            prefix = tree.prefix(state.id)
            room = min(self.transcript.max_tokens, self.transcript.context - len(prefix))
            for number in range(self.count):
                seed = tree.seed_for("pilot", state.trajectory, state.depth, number)
                requests.append(SampleRequest(prefix, seed, 1.0, room, state.state))
        for request, action in zip(requests, self.policy.sample(requests), strict=True):
            self._found.setdefault((tree.seed, tuple(request.prefix)), []).append(action_entropy(action))


@dataclass(frozen=True)
class PilotForking:
    """Forks the state of largest H / n, where H is the mean over the tree's actions there and a pilot's.

    `leaders`: a state gets its pilot when it would be forked; H then changes, and another one may lead. Ties go as in
    `EntropyForking`.
    """

    initial: int
    forks: int
    pilots: Pilots
    leaders: bool

    def roots(self) -> tuple[int, ...]:
        return (1,) * self.initial

    def next(self, tree: RolloutTree) -> list[int]:
        if tree.trajectories >= self.initial + self.forks:
            return []
        if not self.leaders:
            self.pilots.sample(tree, self.pilots.missing(tree))
        while best := self.leader(tree):
            if self.pilots.h(tree, best):
                return [best.id]
            self.pilots.sample(tree, [best])
        return []

    def leader(self, tree: RolloutTree) -> Node | None:
        """The state of largest H / n; None where every H is 0."""
        density = {node.id: self._H(tree, node) / len(node.children) for node in tree.recorded()}
        certain = (node for node in tree.recorded() if density[node.id] > 0)
        return min(certain, key=lambda node: (-density[node.id], node.trajectory, node.depth), default=None)

    def price(self, tree: RolloutTree) -> int:
        """Pilot actions that the next choice needs; at least so many where only leaders get one."""
        if not self.leaders:
            return self.pilots.count * len(self.pilots.missing(tree))
        best = self.leader(tree)
        return self.pilots.count if best and not self.pilots.h(tree, best) else 0

    def _H(self, tree: RolloutTree, state: Node) -> float:
        return fmean([*(tree.h(child) for child in state.children), *self.pilots.h(tree, state)])


@dataclass(frozen=True)
class Affordable:
    """Another explorer, for as long as a question's budget lasts.

    It forks while there is enough for the pilots of the next choice, and the fork after them is expected to end closer
    to the budget than no fork.

    Attributes:
        explorer: with separate roots and one fork per round.
        initial: its N0.
        budgets: generated actions, by question id.
    """

    explorer: Explorer
    initial: int
    budgets: Mapping[str, float]

    @property
    def needs_entropies(self) -> bool:
        return bool(getattr(self.explorer, "needs_entropies", False))

    def roots(self) -> Sequence[int]:
        return self.explorer.roots()

    def next(self, tree: RolloutTree) -> list[int]:
        spent, price = tree.actions_generated, 0
        if isinstance(self.explorer, PilotForking):
            spent, price = spent + self.explorer.pilots.spent(tree), self.explorer.price(tree)
        if spent + price + self._fork(tree) / 2 > self.budgets[tree.question.id]:
            return []
        return self.explorer.next(tree)

    def _fork(self, tree: RolloutTree) -> float:
        """Expected actions of a fork: the mean of those before; half an initial trajectory for the first."""
        first = sum(node.parent is not None and node.trajectory < self.initial for node in tree.nodes)
        forks = tree.trajectories - self.initial
        return (tree.actions_generated - first) / forks if forks else first / self.initial / 2


def make_explorer(rule: Rule, initial: int, forks: int, pilots: Pilots) -> Explorer:
    if rule.random:
        return RandomForking(initial, forks)
    if rule.pilot:
        return PilotForking(initial, forks, pilots, rule.leaders)
    return EntropyForking(initial, forks, measure=rule.measure)


# What was chosen


@dataclass(frozen=True, slots=True)
class Fork:
    """A choice that was made.

    Attributes:
        question: id.
        prefix: of the forked state.
        depth: of it.
        before: actions that it had.
        h: its H at the moment of the choice, in the rule's measure.
        returns: where `before` is 1, those of the trajectory that took the first action and of the fork.
    """

    question: str
    prefix: Prefix
    depth: int
    before: int
    h: float
    returns: tuple[float, float] | None

    @property
    def state(self) -> State:
        """Where it forked."""
        return self.question, self.prefix


def h_of(action: Completion, measure: EntropyMeasure) -> float:
    """What one action says of its state's entropy; `exact` is NaN where it is not known."""
    if measure == "sum":
        return -sum(action.logprobs)
    if measure == "exact":
        return fmean(action.entropies) if action.entropies else math.nan
    return action_entropy(action)


def forks_of(tree: RolloutTree, initial: int, rule: Rule, pilots: Pilots) -> list[Fork]:
    """The forks of a tree that made one per round, in order."""
    firsts: dict[int, Node] = {}
    for node in tree.nodes:
        if node.parent is not None:
            firsts.setdefault(node.trajectory, node)
    ends = {leaf.trajectory: tree.trajectory_return(leaf.id) for leaf in tree.leaves()}
    forks = []
    for number in range(initial, tree.trajectories):
        parent = firsts[number].parent
        assert parent is not None
        source = tree.nodes[parent]
        earlier = [tree.nodes[child] for child in source.children if tree.nodes[child].trajectory < number]
        known = [h_of(node.action, rule.measure) for node in earlier if node.action] + pilots.h(tree, source)
        pair = (ends[earlier[0].trajectory], ends[number]) if len(earlier) == 1 else None
        forks.append(Fork(tree.question.id, tree.prefix(parent), source.depth, len(earlier), fmean(known), pair))
    return forks


@dataclass(frozen=True)
class Grown:
    """The trees of one rule and N0, in the order of the questions.

    Attributes:
        pilots: actions spent on pilots, by question id.
        forks: by question id.
    """

    name: str
    initial: int
    trees: list[RolloutTree]
    pilots: dict[str, int]
    forks: dict[str, list[Fork]]

    @property
    def spent(self) -> dict[str, int]:
        """Actions generated, by question id."""
        return {tree.question.id: tree.actions_generated + self.pilots[tree.question.id] for tree in self.trees}


def grow(
    task: EnvTask,
    policy: Policy,
    transcript: Transcript,
    questions: Sequence[Question],
    name: str,
    initial: int,
    forks: int,
    budgets: Mapping[str, float] | None,
    seed: int,
) -> Grown:
    """Trees of different questions. Without budgets each has `forks` forks, unless every H is 0."""
    rule = RULES[name]
    pilots = Pilots(policy, transcript, rule.pilot)
    explorer = make_explorer(rule, initial, forks if budgets is None else MANY, pilots)
    if budgets is not None:
        explorer = Affordable(explorer, initial, budgets)
    trees = collect(task, policy, transcript, questions, explorer, seed=seed, step=0)
    return Grown(
        name,
        initial,
        trees,
        {tree.question.id: pilots.spent(tree) for tree in trees},
        {tree.question.id: forks_of(tree, initial, rule, pilots) for tree in trees},
    )


# What it was worth


@dataclass(frozen=True, slots=True)
class Worth:
    """A state, measured.

    Attributes:
        criticality: C(s) of K resamples (ddof = 0).
        variance: the unbiased estimate of C(s)^2.
        settled: all returns are equal.
        fresh: mean h of the K actions, by measure.
    """

    criticality: float
    variance: float
    settled: bool
    fresh: dict[EntropyMeasure, float]


class _Listener:
    """A policy that remembers the actions whose entropies were asked for, by prefix."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.version = policy.version
        self.sampled: dict[Prefix, list[Completion]] = {}

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        actions = self._policy.sample(requests)
        for request, action in zip(requests, actions, strict=True):
            if request.entropies:
                self.sampled.setdefault(tuple(request.prefix), []).append(action)
        return actions

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return self._policy.score(prefixes, continuations)

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        self._policy.sync(weights)


def initial_states(tree: RolloutTree, initial: int) -> set[State]:
    """The states of the initial trajectories; equal roots are one."""
    return {(tree.question.id, tree.prefix(node.id)) for node in tree.recorded() if node.trajectory < initial}


def states_of(grown: Sequence[Grown]) -> dict[State, VisitedState]:
    """Every forked state and every state of the initial trajectories, each once."""
    found: dict[State, VisitedState] = {}
    for one in grown:
        for tree in one.trees:
            wanted = initial_states(tree, one.initial) | {fork.state for fork in one.forks[tree.question.id]}
            for node in tree.recorded():
                prefix = tree.prefix(node.id)
                state = tree.question.id, prefix
                if state in wanted and state not in found:
                    found[state] = VisitedState(
                        tree.question, len(found), node.depth, "", tree.h(node.children[0]), None,
                        tree.trajectory_return(node.id), node.state, prefix,
                    )  # fmt: skip
    return found


def weigh(
    task: EnvTask,
    policy: Policy,
    transcript: Transcript,
    states: Mapping[State, VisitedState],
    *,
    resamples: int,
    seed: int,
) -> dict[State, Worth]:
    """Measure states."""
    listener = _Listener(policy)
    measured: list[MeasuredState] = []
    for part in measure(
        task, listener, transcript, list(states.values()), lambda state: 0.0,
        resamples=resamples, seed=seed, entropies=True,
    ):  # fmt: skip
        measured += part
    worth = {}
    for state, found in zip(states, measured, strict=True):
        actions = listener.sampled[state[1]]
        fresh = {name: fmean(h_of(action, name) for action in actions) for name in MEASURES}
        worth[state] = Worth(found.criticality, found.variance, found.criticality == 0.0, fresh)
    return worth


@dataclass(frozen=True)
class Result:
    """One rule with one N0. Means over a question's forks, then over questions; NaN where there was no fork."""

    rule: str
    initial: int
    forks: float
    actions: float
    pilot_actions: float
    criticality: Interval
    over_carl: Interval
    rank: float
    settled: float
    h_chosen: float
    h_fresh: float
    nonzero: Interval
    nonzero_per_100: float
    old_minus_new: Interval
    pairs: int
    value_variance: float
    from_action: float


@dataclass
class Tally:
    """The numbers of one rule and N0, by question id, over all batches of questions."""

    forks: dict[str, list[Fork]] = field(default_factory=dict)
    ranks: dict[str, list[float]] = field(default_factory=dict)
    actions: dict[str, int] = field(default_factory=dict)
    pilots: dict[str, int] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    nonzero: dict[str, int] = field(default_factory=dict)

    def add(self, grown: Grown, worth: Mapping[State, Worth]) -> None:
        """Add the trees of other questions."""
        self.forks |= grown.forks
        self.actions |= grown.spent
        self.pilots |= grown.pilots
        advantages, trained = tree_difference(grown.trees), forked_states(grown.trees)
        for tree, advantage, mask in zip(grown.trees, advantages, trained, strict=True):
            id = tree.question.id
            self.trained[id] = int(mask.sum())
            self.nonzero[id] = int((np.abs(advantage[mask]) > ZERO).sum())
            others = [worth[state].criticality for state in initial_states(tree, grown.initial)]
            self.ranks[id] = [midrank(worth[fork.state].criticality, others) for fork in grown.forks[id]]


def midrank(value: float, others: Sequence[float]) -> float:
    """Share of the others that are smaller, equal ones counted half."""
    return fmean((other < value) + 0.5 * (other == value) for other in others)


def per_question(tally: Tally, number: Callable[[Fork], float | None]) -> dict[str, float]:
    """Mean over each question's forks; questions without one that has this number are left out."""
    found = {id: [n for fork in forks if (n := number(fork)) is not None] for id, forks in tally.forks.items()}
    return {id: fmean(numbers) for id, numbers in found.items() if numbers}


def interval(values: Iterable[float]) -> Interval:
    scores = np.array(list(values), dtype=float)
    if not len(scores):
        return math.nan, math.nan, math.nan
    return float(scores.mean()), *bootstrap_interval(scores)


def summarise(rule: str, initial: int, tally: Tally, carl: Tally, worth: Mapping[State, Worth]) -> Result:
    measured = RULES[rule].measure
    critical = per_question(tally, lambda fork: worth[fork.state].criticality)
    reference = per_question(carl, lambda fork: worth[fork.state].criticality)
    pairs = [fork for forks in tally.forks.values() for fork in forks if fork.returns]
    tilt = per_question(tally, lambda fork: fork.returns[0] - fork.returns[1] if fork.returns else None)
    variance = per_question(tally, lambda f: (f.returns[0] - f.returns[1]) ** 2 / 4 if f.returns else None)
    of_actions = per_question(tally, lambda f: worth[f.state].variance / 2 if f.returns else None)
    value_variance = _mean(variance.values())
    spent = sum(tally.actions.values())
    return Result(
        rule=rule,
        initial=initial,
        forks=_mean(map(len, tally.forks.values())),
        actions=_mean(tally.actions.values()),
        pilot_actions=_mean(tally.pilots.values()),
        criticality=interval(critical.values()),
        over_carl=interval(critical[id] - reference[id] for id in critical.keys() & reference.keys()),
        rank=_mean(fmean(ranks) for ranks in tally.ranks.values() if ranks),
        settled=_mean(per_question(tally, lambda fork: float(worth[fork.state].settled)).values()),
        h_chosen=_mean(per_question(tally, lambda fork: fork.h).values()),
        h_fresh=_mean(per_question(tally, lambda fork: worth[fork.state].fresh[measured]).values()),
        nonzero=interval(tally.nonzero[id] / count for id, count in tally.trained.items() if count),
        nonzero_per_100=100 * sum(tally.nonzero.values()) / spent if spent else math.nan,
        old_minus_new=interval(tilt.values()),
        pairs=len(pairs),
        value_variance=value_variance,
        from_action=_mean(of_actions.values()) / value_variance if value_variance else math.nan,
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return fmean(listed) if listed else math.nan


# The study


@dataclass(frozen=True)
class Study:
    """All that was found.

    Attributes:
        results: a row of the tables each.
        tallies: by (N0, rule).
        worth: of every measured state.
        initial_states: mean criticality of the states of the initial trajectories, by N0: where forks are drawn from.
    """

    results: list[Result]
    tallies: dict[tuple[int, str], Tally]
    worth: dict[State, Worth]
    initial_states: dict[int, float]


def study(
    task: EnvTask,
    policy: Policy,
    transcript: Transcript,
    questions: Sequence[Question],
    options: Options,
    say: Callable[[str], None] = lambda line: None,
) -> Study:
    """Grow the trees of all rules, batch by batch of questions, and measure what they forked."""
    cells = [(initial, name) for initial in options.initial for name in RULES]
    tallies = {cell: Tally() for cell in cells}
    worth: dict[State, Worth] = {}
    means: dict[int, list[float]] = {initial: [] for initial in options.initial}
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        grown: dict[tuple[int, str], Grown] = {}
        for initial, name in cells:
            budgets = None if name == CARL or options.equal == "forks" else grown[initial, CARL].spent
            grown[initial, name] = grow(
                task, policy, transcript, batch, name, initial, options.forks, budgets, options.seed
            )
        states = states_of(list(grown.values()))
        say(f"{start + len(batch)} of {len(questions)} questions: {len(states)} states to measure")
        worth |= weigh(task, policy, transcript, states, resamples=options.resamples, seed=options.seed)
        for cell, one in grown.items():
            tallies[cell].add(one, worth)
        for initial in options.initial:
            for tree in grown[initial, CARL].trees:
                means[initial].append(fmean(worth[state].criticality for state in initial_states(tree, initial)))
    results = [
        summarise(name, initial, tallies[initial, name], tallies[initial, CARL], worth) for initial, name in cells
    ]
    return Study(results, tallies, worth, {initial: fmean(values) for initial, values in means.items()})


def tables(found: Study) -> str:
    """The results as Markdown."""
    head = ("N0", "chosen by", "forks", "actions", "of pilots", "criticality", "- one NLL", "rank", "settled",
            "H chosen", "H fresh", "fresh / chosen")  # fmt: skip
    lines = [_row(head), "|---:|---|" + "---:|" * (len(head) - 2)]
    for one in found.results:
        over = "" if one.rule == CARL else _interval(one.over_carl)
        ratio = one.h_fresh / one.h_chosen if one.h_chosen else math.nan
        lines.append(
            _row((one.initial, one.rule, f"{one.forks:.1f}", f"{one.actions:.1f}", f"{one.pilot_actions:.1f}",
                  _interval(one.criticality), over, _number(one.rank, 2), _number(one.settled, 2),
                  _number(one.h_chosen, 3), _number(one.h_fresh, 3), _number(ratio, 2)))
        )  # fmt: skip
    others = ("N0", "chosen by", "A != 0", "per 100", "pairs", "old - new", "var V", "from action")
    lines += ["", _row(others), "|---:|---|" + "---:|" * (len(others) - 2)]
    for one in found.results:
        lines.append(
            _row((one.initial, one.rule, _interval(one.nonzero, 2), _number(one.nonzero_per_100, 1), one.pairs,
                  _interval(one.old_minus_new), _number(one.value_variance, 4), _number(one.from_action, 2)))
        )  # fmt: skip
    share = fmean(worth.settled for worth in found.worth.values())
    means = ", ".join(f"{mean:.3f} (N0 = {initial})" for initial, mean in found.initial_states.items())
    count = len(found.worth)
    lines += [
        "",
        f"States of the initial trajectories: mean criticality {means}. Measured: {count:,} states, {share:.0%} of "
        "them settled.",
    ]
    return "\n".join(lines)


def as_json(found: Study, options: Options) -> dict[str, object]:
    """Options, results, and every fork with what its state was worth."""
    forks = [
        {
            "initial": initial, "rule": name, "question": fork.question, "depth": fork.depth, "before": fork.before,
            "h": fork.h, "fresh_h": worth.fresh[RULES[name].measure], "criticality": worth.criticality,
            "variance": worth.variance, "returns": fork.returns,
        }
        for (initial, name), tally in found.tallies.items()
        for listed in tally.forks.values()
        for fork in listed
        for worth in [found.worth[fork.state]]
    ]  # fmt: skip
    settings = asdict(options) | {"output": None}
    rows = [{name: _finite(value) for name, value in asdict(result).items()} for result in found.results]
    return {"options": settings, "results": rows, "initial_states": found.initial_states, "forks": forks}


def _finite(value: object) -> object:
    """JSON has no NaN: None instead."""
    if isinstance(value, tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _interval(values: Interval, digits: int = 3) -> str:
    mean, low, high = values
    return "" if math.isnan(mean) else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.process_time()
    agent = load_agent(options.agent, device=options.device, backend="transformers", trainable=False)
    task = make_task("carl/MiniWiki-v0", world=options.world, questions=options.questions)
    questions = list(task.questions.values())
    found = study(task, agent.policy, agent.transcript, questions, options)
    print(
        f"Agent {options.agent}, MiniWiki world {options.world}, {len(questions)} questions, N = {options.forks}, "
        f"K = {options.resamples}, equal {options.equal}; {(time.process_time() - started) / 60:.1f} CPU minutes.\n"
    )
    print(tables(found))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(as_json(found, options), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
