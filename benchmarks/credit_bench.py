"""Every algorithm's advantages and gradient against the exact ones, on a world that can be enumerated.

    OMP_NUM_THREADS=1 python benchmarks/credit_bench.py [--algorithms carl grpo 'carl(root=merged)'] [--quick]

`carl/CriticalTree-v0` is rolled out by tabular softmax policies through the real collector; credit, selection, token
weights and emphasis are the algorithms' own. Algorithms with equal explorers get the same trees. All batches have about
the same number of *generated* actions. V, Q, A, criticality (CARL's Eq. 5) and the policy gradient come from
enumeration.

What algorithms need beside trees is given exactly: `state_value` is V of the policy (plus `--value-noise`);
`answer_logprob` is that of a reader who has followed the trail: the gold answer has one token per critical turn, a turn
that was taken right tells its token, and every other one is a guess among the options. So it is
-(1 - right / critical) ln(options) per token, and it rises exactly where a critical turn is taken right: no learned
model gives such a clean signal.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import tyro

from carl_gym.agents.tabular import (
    Code,
    Exact,
    FiniteMDP,
    FloatArray,
    IntArray,
    SymbolTranscript,
    TabularPolicy,
    backward,
    enumerate_mdp,
    prefix_code,
    softmax,
    solve,
)
from carl_gym.algorithms import (
    Algorithm,
    algorithm_names,
    all_actions,
    forked_states,
    get_algorithm,
    token_weights,
    tree_difference,
)
from carl_gym.algorithms.controls import with_shuffled_advantages
from carl_gym.algorithms.credit import difference, leaf_weighted_values, values
from carl_gym.envs.critical_tree import CriticalTask, CriticalTreeSettings
from carl_gym.envs.state import EnvState
from carl_gym.errors import CarlGymError, ConfigError
from carl_gym.evaluation.estimates import CellSums, cosine_of_mean, mean_and_error, mean_cosine, ratio_and_error
from carl_gym.rollouts import RolloutTree, RootExplorer, collect
from carl_gym.rollouts.explorers import Explorer
from carl_gym.rollouts.tree import derive_seed

BoolArray = npt.NDArray[np.bool_]

VARIANTS = (
    "carl(fork_by=exact-entropy)", "carl(advantage=leave-one-out)", "carl(root=merged)",
    "carl(root=merged,loss_reduction=token)", "carl(root=merged,update=all,loss_reduction=token)",
    "carl-lite(fork_by=exact-entropy)", "carl-lite(advantage=leave-one-out)",
)  # fmt: skip
"""Settings of registered algorithms that have no name of their own."""

QUICK = {"batches": 4, "batch_actions": 250, "turns": 4, "critical": (2,), "settings": ("middling",)}
"""What --quick changes."""


PILOTS = 6
"""Trees per question that are grown beforehand, to know how many make a batch."""

LARGEST_ERROR = 0.5
"""A cosine with a larger standard error is not shown: noise hides the direction of the expected gradient."""


@dataclass(frozen=True)
class PolicyKind:
    """How a policy is drawn: logits = skill * Q* + noise, a normal number of this size by kind of turn."""

    skill: float
    routine_noise: float = 1.0
    repeated: bool = False


SETTINGS = {
    "weak": PolicyKind(0.0),
    "middling": PolicyKind(3.0),
    "strong": PolicyKind(5.0),
    "habits": PolicyKind(3.0, routine_noise=4.0),
    "repeated": PolicyKind(3.0, repeated=True),
}
"""By name; `habits` has sharp preferences on routine turns, so that entropy finds the critical ones better."""


@dataclass(frozen=True)
class Options:
    """Bias, variance and gradient of every algorithm's credit, against exact values."""

    algorithms: tuple[str, ...] = ()
    """Registered names, with settings in brackets if any, such as 'carl(root=merged)'; by default all, and VARIANTS."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Policies and worlds: weak, middling, strong, habits (sure of itself on routine turns), repeated."""
    batches: int = 64
    """Independent batches per algorithm and setting."""
    batch_actions: int = 1024
    """Generated actions of a batch, roughly."""
    turns: int = 8
    """Turns of an episode."""
    options: int = 3
    """Actions per state."""
    critical: tuple[int, ...] = (3, 6)
    """The critical turns, from 1."""
    stake: float = 0.9
    """Share of the outcome that a missed critical turn loses."""
    slip_cost: float = 0.05
    """Share of the outcome that a slip on a routine turn loses."""
    early_answer: bool = False
    """One more action ends the episode, so that lengths differ (and random fork sites depend on what was sampled)."""
    threshold: float = 0.4
    """A state is truly critical where C(s) is above this share of the largest C."""
    longest_action: int = 3
    """Most tokens of an action; with 1 all actions are equally long."""
    value_noise: float = 0.0
    """Standard deviation of the error of the critic's V, a fixed number per state."""
    trees: int = 4
    """Questions, each a world of its own."""
    seed: int = 0
    """Of worlds, policies and rollouts."""
    quick: bool = False
    """A small world and few batches: to see that everything runs."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A world with a policy, and the truth about them."""

    name: str
    task: CriticalTask
    mdp: FiniteMDP
    policy: TabularPolicy
    transcript: SymbolTranscript
    exact: Exact
    pi: FloatArray
    critical: BoolArray
    critic: FloatArray


def main(options: Options) -> None:
    """Print everything, setting by setting."""
    if options.quick:
        options = replace(options, **QUICK)  # type: ignore[arg-type]
    if unknown := [name for name in options.settings if name not in SETTINGS]:
        raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(SETTINGS)}")
    for name, least in {"batches": 2, "batch_actions": 1, "seed": 0, "value_noise": 0.0, "threshold": 0.0}.items():
        if not getattr(options, name) >= least:
            raise ConfigError(f"{name} = {getattr(options, name)}; expected {least} or more")
    began = time.process_time()
    benches = [make_bench(name, options) for name in options.settings]
    print(
        f"World: {options.turns} turns, {options.options} options, critical turns {list(options.critical)}, stake "
        f"{options.stake:g}, slips cost {options.slip_cost:g}; {options.trees} questions; {options.batches} batches of "
        f"about {options.batch_actions} generated actions; seed {options.seed}.\n"
    )
    print(describe_settings(benches))
    algorithms, skipped = chosen(options.algorithms)
    for bench in benches:
        results: list[Result] = []
        explored: list[Explored] = []
        for group in by_explorer([*algorithms, *references(bench)]):
            measured, of_explorer, failed = measure(bench, group, options)
            results += measured
            explored.append(of_explorer)
            skipped |= failed
        order = {name: place for place, name in enumerate(dict.fromkeys(a.name for a in algorithms))}
        results.sort(key=lambda result: order.get(result.name, len(order)))
        print(
            f"\n## {bench.name}\n\n{advantage_table(results)}\n\n{gradient_table(results)}\n\n{value_table(explored)}"
        )
        print(flush=True)
    for name, reason in skipped.items():
        print(f"- {name} left out: {reason}")
    print(f"\n{NOTES.strip()}\n\n{(time.process_time() - began) / 60:.1f} CPU-minutes.")


NOTES = """
Advantages, over the trained actions whose state and action came up in at least two batches: A is exact, A' the
algorithm's (times the mean emphasis of its tokens). rmse^2 = bias^2 + sd^2, where bias is the root mean square over
(state, action) of E[A'] - A (its square estimated from pairs of batches, so that it may come out as 0) and sd the rest.
"scaled": the same for c A' with the factor c that makes rmse smallest, as shares of rms A: 100 % is as good as saying
0. Group-normalised advantages are in units of the returns' standard deviation and not of reward: compare them by the
scaled columns.

Gradient: of the loss at ratio 1, by the logits. cos E: cosine between the expected gradient and the true one, the
sampling noise of the first one's length removed (so it may exceed 1), +- jackknife standard error over batches. cos 1:
mean cosine of one batch's gradient, +- standard error over batches. Both errors are of batches on this one world and
policy; another seed draws others, and differs by more. A mean over actions divides by an action's number of tokens, and
so even the exact A misses the true direction where actions differ in length. Critical: the share of generated actions,
and of the tokens' training weight, at states with C(s) above the threshold.

Values: V' - V at roots (mean per tree) and at all forked states (two or more children), +- standard error over trees.
slope k: sum A' A / sum A^2 over the actions of states with k children, for the tree difference; 1 - 1/k where V' is
unbiased. Sites that are chosen independently of the sampled actions promise that (RandomForking). StateForking's sites
depend on states and not on the action sampled there: its plain values are unbiased, its leaf-weighted ones need not be.
"""


# -- worlds and policies -------------------------------------------------------------------------------


def make_bench(name: str, options: Options) -> Bench:
    kind = SETTINGS[name]
    task = CriticalTask(
        CriticalTreeSettings(
            turns=options.turns, options=options.options, critical=options.critical, stake=options.stake,
            slip_cost=options.slip_cost, early_answer=options.early_answer, repeated=kind.repeated, trees=options.trees,
            seed=options.seed,
        )
    )  # fmt: skip
    mdp = enumerate_mdp(task)
    rng = np.random.default_rng([options.seed, *name.encode()])
    noise = np.array([1.0 if task.info(state)["critical"] else kind.routine_noise for state in mdp.states])
    logits = kind.skill * backward(mdp) + noise[:, None] * rng.normal(size=mdp.rewards.shape)
    return bench_of(name, task, mdp, logits, options, rng)


def bench_of(
    name: str, task: CriticalTask, mdp: FiniteMDP, logits: FloatArray, options: Options, rng: np.random.Generator
) -> Bench:
    """Of any policy on any world; `rng` draws the errors of the critic."""
    exact = solve(mdp, logits)
    code: Code = prefix_code(len(mdp.actions), options.longest_action)
    return Bench(
        name=name,
        task=task,
        mdp=mdp,
        policy=TabularPolicy(mdp, logits, code),
        transcript=SymbolTranscript(code),
        exact=exact,
        pi=softmax(logits),
        critical=exact.criticality > options.threshold * exact.criticality.max(),
        critic=exact.v + options.value_noise * rng.normal(size=exact.v.shape),
    )


def describe_settings(benches: Sequence[Bench]) -> str:
    rows = [
        (
            bench.name,
            len(bench.mdp.states),
            f"{bench.exact.value:.3f}",
            f"{bench.exact.criticality.max():.3f}",
            percent((bench.exact.visits * bench.critical).sum() / bench.exact.visits.sum()),
            percent((bench.exact.visits * (bench.exact.criticality < 0.05)).sum() / bench.exact.visits.sum()),
            f"{rank_correlation(entropy_per_token(bench), bench.exact.criticality, bench.exact.visits):.2f}",
        )
        for bench in benches
    ]
    head = "setting", "states", "J", "largest C", "visits at critical states", "visits at C < 0.05", "rank corr. H, C"
    return table(head, rows)


def entropy_per_token(bench: Bench) -> FloatArray:
    """(S,) the expectation of h(a|s), the length-normalised entropy of an action (CARL's Eq. 6)."""
    logprobs, _ = bench.policy.tokens.logprobs(bench.policy.logits)
    return -(bench.pi * logprobs.sum(axis=2) / bench.policy.tokens.lengths).sum(axis=1)


def rank_correlation(x: FloatArray, y: FloatArray, weights: FloatArray) -> float:
    """Spearman's, states weighted by how often they are visited."""
    a, b = (np.unique(v, return_inverse=True)[1] for v in (x, y))
    ranks = []
    for place in (a, b):
        mass = np.bincount(place, weights)
        ranks.append((mass.cumsum() - mass / 2)[place])
    a, b = (rank - np.average(rank, weights=weights) for rank in ranks)
    return float((weights * a * b).sum() / math.sqrt((weights * a * a).sum() * (weights * b * b).sum()))


# -- algorithms ----------------------------------------------------------------------------------------


def chosen(names: Sequence[str]) -> tuple[list[Algorithm], dict[str, str]]:
    """The algorithms that can be built, and why others cannot."""
    found, skipped = [], {}
    for name in names or (*algorithm_names(), *VARIANTS):
        try:
            found.append(parse_algorithm(name))
        except ConfigError as error:
            if names:
                raise
            skipped[name] = str(error)
    return found, skipped


def parse_algorithm(text: str) -> Algorithm:
    """`name` or `name(setting=value,...)`. Raises ConfigError on another form, or an unknown name or setting."""
    match = re.fullmatch(r"([\w.-]+)(?:\((.+)\))?", text)
    if not match:
        raise ConfigError(f"{text!r} is no algorithm; write name or name(setting=value,...)")
    settings: dict[str, object] = {}
    for pair in (match[2] or "").split(",") if match[2] else ():
        key, _, value = pair.partition("=")
        settings[key.strip()] = number(value.strip())
    return replace(get_algorithm(match[1], **settings), name=text)


def number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True, slots=True)
class StateForking:
    """One rollout; then every state is forked once whose exact entropy is above a threshold.

    The entropy is the first token's, in nats: it depends on the state alone, not on what was sampled from it.
    """

    threshold: float = 0.6
    needs_entropies: ClassVar[bool] = True

    def roots(self) -> tuple[int, ...]:
        """One root with one rollout."""
        return (1,)

    def next(self, tree: RolloutTree) -> list[int]:
        """All uncertain states with one child so far."""
        single = (node for node in tree.recorded() if len(node.children) == 1)
        actions = ((node.id, tree.nodes[node.children[0]].action) for node in single)
        return [id for id, action in actions if action is not None and action.entropies[0] > self.threshold]


def references(bench: Bench) -> list[Algorithm]:
    """What a perfect critic would do, on rollouts and on CARL's trees; and GRPO with advantages that know nothing."""

    def exact(trees: Sequence[RolloutTree]) -> list[FloatArray]:
        found = []
        for tree in trees:
            edges = Edges.of(bench, tree)
            advantage = np.zeros(len(tree.nodes))
            advantage[edges.nodes] = bench.exact.advantage[edges.states, edges.actions]
            found.append(advantage)
        return found

    def at_critical(trees: Sequence[RolloutTree]) -> list[BoolArray]:
        found = []
        for tree in trees:
            edges = Edges.of(bench, tree)
            mask = np.zeros(len(tree.nodes), dtype=np.bool_)
            mask[edges.nodes] = bench.critical[edges.states]
            found.append(mask)
        return found

    rollouts, carl = RootExplorer(16), get_algorithm("carl")
    return [
        Algorithm("(exact A, rollouts)", rollouts, exact, all_actions, loss_reduction="token"),
        Algorithm("(exact A, rollouts, critical states)", rollouts, exact, at_critical, loss_reduction="token"),
        Algorithm("(exact A, rollouts, mean over actions)", rollouts, exact, all_actions),
        Algorithm("(exact A, CARL's trees)", carl.explorer, exact, forked_states, loss_reduction="token"),
        Algorithm("(exact A, CARL's trees, all actions)", carl.explorer, exact, all_actions, loss_reduction="token"),
        Algorithm("(forks by a state's entropy)", StateForking(), tree_difference, forked_states),
        with_shuffled_advantages(get_algorithm("grpo")),
    ]


def by_explorer(algorithms: Sequence[Algorithm]) -> list[list[Algorithm]]:
    groups: dict[str, list[Algorithm]] = {}
    for algorithm in algorithms:
        groups.setdefault(f"{type(algorithm.explorer).__module__} {algorithm.explorer!r}", []).append(algorithm)
    return list(groups.values())


# -- measuring -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Edges:
    """The actions of a tree: node ids, indices of the states that they were taken in and of the actions, tokens."""

    nodes: IntArray
    states: IntArray
    actions: IntArray

    @classmethod
    def of(cls, bench: Bench, tree: RolloutTree) -> Edges:
        numbers = {tokens: number for number, tokens in enumerate(bench.policy.code)}
        rows = [
            (node.id, bench.policy.state(tree.nodes[node.parent].observation_tokens), numbers[node.action.token_ids])
            for node in tree.nodes
            if node.parent is not None and node.action is not None
        ]
        return cls(*np.array(rows, dtype=np.int64).T)


@dataclass(frozen=True, eq=False)
class Batch:
    """Trees of one training step, with their edges."""

    trees: list[RolloutTree]
    edges: list[Edges]

    @property
    def actions(self) -> int:
        return sum(tree.actions_generated for tree in self.trees)


@dataclass(frozen=True)
class Result:
    """One algorithm's row.

    Attributes:
        name: of the algorithm.
        actions_per_tree: generated.
        trees_per_batch: as many as make about equal numbers of generated actions.
        actions_per_batch: generated.
        trained: share of the generated actions.
        raw: bias, sd, rmse, rms A.
        factor: the best one for its advantages.
        scaled: as `raw`, with that factor.
        generated_critical: share of the generated actions at critical states.
        weight_critical: share of the training weight there.
        cosine: between E[gradient] and the true one, with its standard error.
        one_batch: mean cosine of one batch's gradient, with its standard error.
    """

    name: str
    actions_per_tree: float
    trees_per_batch: int
    actions_per_batch: float
    trained: float
    raw: tuple[float, float, float, float]
    factor: float
    scaled: tuple[float, float, float, float]
    generated_critical: float
    weight_critical: float
    cosine: tuple[float, float]
    one_batch: tuple[float, float]


@dataclass(frozen=True)
class Explored:
    """What an explorer's trees say about values: `errors` by (where, rule), `slopes` by number of children."""

    explorer: str
    value: float
    errors: dict[tuple[str, str], tuple[float, float]]
    slopes: dict[int, tuple[float, float]]


def measure(
    bench: Bench, algorithms: Sequence[Algorithm], options: Options
) -> tuple[list[Result], Explored, dict[str, str]]:
    """All algorithms of one explorer on the same trees; and those that cannot run, with the reason."""
    explorer = algorithms[0].explorer
    pilot = collected(bench, explorer, options, -1, len(bench.task.questions) * PILOTS)
    count = max(1, round(options.batch_actions * len(pilot.trees) / pilot.actions))
    running = {algorithm.name: Running(bench, algorithm) for algorithm in algorithms}
    of_values = ValueSums(bench)
    failed: dict[str, str] = {}
    generated = actions = trees = 0
    for step in range(options.batches):
        batch = collected(bench, explorer, options, step, count)
        of_values.add(batch)
        actions += batch.actions
        trees += len(batch.trees)
        generated += sum(int(bench.critical[edges.states].sum()) for edges in batch.edges)
        for name, one in list(running.items()):
            try:
                one.add(batch)
            except CarlGymError as error:
                failed[name] = str(error)
                del running[name]
    size = actions / trees, count, actions / options.batches
    results = [one.result(size, actions, generated / actions) for one in running.values()]
    return results, of_values.explored(explorer), failed


def collected(bench: Bench, explorer: Explorer, options: Options, step: int, count: int) -> Batch:
    """One batch of `count` trees, going on where the questions of the batch before ended, with scores."""
    asked = list(bench.task.questions.values())
    questions = [asked[(max(step, 0) * count + number) % len(asked)] for number in range(count)]
    seed = derive_seed(options.seed, bench.name)  # settings do not share their luck; explorers of one setting do
    trees = collect(bench.task, bench.policy, bench.transcript, questions, explorer, seed=seed, step=step)
    for tree in trees:
        tree.scores["state_value"] = scores(tree, [bench.critic[s] for s in state_ids(bench, tree)])
        tree.scores["answer_logprob"] = scores(
            tree, [answer_logprob(bench.task, node.state) for node in tree.nodes if not node.terminal]
        )
    return Batch(trees, [Edges.of(bench, tree) for tree in trees])


def state_ids(bench: Bench, tree: RolloutTree) -> Iterator[int]:
    return (bench.policy.state(node.observation_tokens) for node in tree.nodes if not node.terminal)


def scores(tree: RolloutTree, of_decision_points: Sequence[float]) -> FloatArray:
    """By node id; nan at terminal nodes."""
    found = np.full(len(tree.nodes), np.nan)
    found[[node.id for node in tree.nodes if not node.terminal]] = of_decision_points
    return found


def answer_logprob(task: CriticalTask, state: EnvState) -> float:
    """Per token of the gold answer; see the top of the file."""
    critical = len(task.settings.critical)
    return -(1 - task.found(state) / critical) * math.log(task.settings.options) if critical else 0.0


class Running:
    """One algorithm under way."""

    def __init__(self, bench: Bench, algorithm: Algorithm) -> None:
        self.bench = bench
        self.algorithm = algorithm
        self.sums = CellSums(bench.mdp.rewards.size)
        self.gradients: list[npt.NDArray[np.float32]] = []
        self.trained = 0
        self.weight = self.weight_critical = 0.0

    def add(self, batch: Batch) -> None:
        """Errors as the algorithm's own."""
        bench, algorithm = self.bench, self.algorithm
        advantages = algorithm.credit(batch.trees)
        selected = algorithm.selection(batch.trees)
        weights = token_weights(batch.trees, selected, algorithm.loss_reduction)
        lengths = bench.policy.tokens.lengths
        parts = []
        for tree, edges, advantage, weight, mask in zip(
            batch.trees, batch.edges, advantages, weights, selected, strict=True
        ):
            kept = mask[edges.nodes]
            nodes, states, actions = edges.nodes[kept], edges.states[kept], edges.actions[kept]
            factors = (np.arange(lengths.max()) < lengths[actions, None]).astype(np.float64)
            if algorithm.emphasis is not None:
                emphasis = algorithm.emphasis(tree)
                for row, node, length in zip(factors, nodes.tolist(), lengths[actions].tolist(), strict=True):
                    row[:length] = emphasis[node]
            parts.append((states, actions, advantage[nodes], weight[nodes], factors))
        states, actions, advantage, weight, factors = (np.concatenate(part) for part in zip(*parts, strict=True))
        if not np.isfinite(advantage).all():
            raise CarlGymError("an advantage is not finite")
        self.sums.add(states * len(bench.mdp.actions) + actions, advantage * factors.sum(axis=1) / lengths[actions])
        self.trained += len(states)
        of_action = weight * lengths[actions]
        self.weight += of_action.sum()
        self.weight_critical += of_action[bench.critical[states]].sum()
        scored = bench.policy.tokens.gradients(
            bench.pi[states], actions, weight[:, None] * advantage[:, None] * factors
        )
        gradient = np.zeros_like(bench.pi)
        for column in range(gradient.shape[1]):
            gradient[:, column] = np.bincount(states, scored[:, column], minlength=len(gradient))
        self.gradients.append(gradient.astype(np.float32).ravel())

    def result(self, size: tuple[float, int, float], actions: int, generated_critical: float) -> Result:
        exact = self.bench.exact.advantage.ravel()
        factor = self.sums.best_factor(exact)
        products = np.array(self.gradients, dtype=np.float64) @ self.bench.exact.gradient.ravel()
        stacked = np.array(self.gradients)
        gram = (stacked @ stacked.T).astype(np.float64)
        length = float(np.linalg.norm(self.bench.exact.gradient))
        return Result(
            self.algorithm.name,
            *size,
            trained=self.trained / actions,
            raw=self.sums.errors(exact),
            factor=factor,
            scaled=self.sums.errors(exact, factor),
            generated_critical=generated_critical,
            weight_critical=self.weight_critical / self.weight if self.weight else math.nan,
            cosine=cosine_of_mean(gram, products, length),
            one_batch=mean_cosine(gram, products, length),
        )


class ValueSums:
    """How far the values of an explorer's trees are from the truth."""

    RULES = {"plain": values, "leaf-weighted": leaf_weighted_values}  # noqa: RUF012

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.roots: dict[str, list[float]] = {rule: [] for rule in self.RULES}
        self.forked: dict[str, list[tuple[float, float]]] = {rule: [] for rule in self.RULES}
        self.slopes: dict[int, list[tuple[float, float]]] = {2: [], 3: [], 4: []}

    def add(self, batch: Batch) -> None:
        """Root and forked states of every tree, and the slopes of the batch."""
        v = self.bench.exact.v
        slopes = {k: [0.0, 0.0] for k in self.slopes}
        for tree, edges in zip(batch.trees, batch.edges, strict=True):
            states = np.fromiter(state_ids(self.bench, tree), dtype=np.int64)
            truth = scores(tree, v[states].tolist())
            forked = [node.id for node in tree.recorded() if len(node.children) >= 2]
            for rule, estimate in self.RULES.items():
                error = estimate(tree) - truth
                self.roots[rule].append(float(np.mean([error[node.id] for node in tree.roots()])))
                self.forked[rule].append((float(error[forked].sum()), float(len(forked))))
            advantage = difference(tree, values(tree))[edges.nodes]
            exact = self.bench.exact.advantage[edges.states, edges.actions]
            children = np.array([tree.n(tree.nodes[node].parent or 0) for node in edges.nodes.tolist()])
            for k, sums in slopes.items():
                sums[0] += float((advantage * exact)[children == k].sum())
                sums[1] += float((exact**2)[children == k].sum())
        for k, (product, square) in slopes.items():
            self.slopes[k].append((product, square))

    def explored(self, explorer: Explorer) -> Explored:
        return Explored(
            explorer=shown(explorer),
            value=self.bench.exact.value,
            errors={("root", rule): mean_and_error(errors) for rule, errors in self.roots.items()}
            | {("forked", rule): ratio_and_error(np.array(sums)) for rule, sums in self.forked.items()},
            slopes={k: ratio_and_error(np.array(pairs)) for k, pairs in self.slopes.items()},
        )


def shown(explorer: Explorer) -> str:
    """Class and the settings that differ from the class's own."""
    if not dataclasses.is_dataclass(explorer):
        return type(explorer).__name__
    values = [(one, getattr(explorer, one.name)) for one in dataclasses.fields(explorer)]
    return f"{type(explorer).__name__}({', '.join(f'{one.name}={v}' for one, v in values if v != one.default)})"


# -- tables --------------------------------------------------------------------------------------------


def advantage_table(results: Sequence[Result]) -> str:
    rows = []
    for r in results:
        bias, sd, rmse, size = r.raw
        scaled = [percent(value / size) if size else "" for value in r.scaled[:3]]
        rows.append(
            (r.name, percent(r.trained), *(f"{x:.3f}" for x in (size, bias, sd, rmse)), f"{r.factor:.3g}", *scaled)
        )
    head = (
        "algorithm", "trained", "rms A", "bias", "sd", "rmse", "c", "bias, scaled", "sd, scaled", "rmse, scaled",
    )  # fmt: skip
    return table(head, rows)


def gradient_table(results: Sequence[Result]) -> str:
    rows = [
        (
            r.name,
            f"{r.actions_per_tree:.1f}",
            r.trees_per_batch,
            f"{r.actions_per_batch:.0f}",
            percent(r.generated_critical),
            percent(r.weight_critical),
            plus_minus(*r.cosine) if r.cosine[1] < LARGEST_ERROR else "",
            plus_minus(*r.one_batch),
        )
        for r in results
    ]
    head = (
        "algorithm", "actions per tree", "trees per batch", "actions per batch", "critical, generated",
        "critical, trained", "cos E", "cos 1",
    )  # fmt: skip
    return table(head, rows)


def value_table(explored: Sequence[Explored]) -> str:
    keys = list(itertools.product(("root", "forked"), ValueSums.RULES))
    rows = [
        (
            one.explorer,
            f"{one.value:.3f}",
            *(plus_minus(*one.errors[key], digits=3, sign=True) for key in keys),
            *(plus_minus(*slope) for slope in one.slopes.values()),
        )
        for one in explored
    ]
    head = "explorer", "true V", *(f"{where}, {rule}" for where, rule in keys), *(f"slope {k}" for k in (2, 3, 4))
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f} %"


def plus_minus(value: float, error: float, *, digits: int = 2, sign: bool = False) -> str:
    if math.isnan(value):
        return ""
    return f"{value:{'+' if sign else ''}.{digits}f}" + ("" if math.isnan(error) else f" +- {error:.{digits}f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
