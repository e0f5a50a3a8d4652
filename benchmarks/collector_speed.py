"""Rollouts in ticks and asynchronously, and forks one at a time or several, as Markdown tables.

    OMP_NUM_THREADS=1 python benchmarks/collector_speed.py [--backends simulated transformers vllm] [--threads 1]

The same trees on MiniWiki are grown by one schedule and by the other, alternately, in one process, from empty caches,
after a warm-up on other questions. Slow searches take `--delay` seconds more per batch, as those of a retrieval server
do. The engine is idle while nothing is under way in it and a tree is not complete. Ratios are medians over the seeds,
with the smallest and the largest; CPU seconds are those of this process, and say more than the clock where other
programs run beside it.

The simulated engine stands for one that computes elsewhere: a step takes `--step` seconds whatever its batch, as on a
GPU that is not full, and an action takes a step per four characters. Its actions are random valid ones. It shows what
the schedules make of waiting alone; environment and bookkeeping are real.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import Literal

import torch
import transformers
import tyro

from carl_gym.agents.agent import load_agent
from carl_gym.agents.policy import Completion, Exchange, Policy, SampleRequest, StreamingPolicy, Transcript
from carl_gym.agents.scripted import ByteTranscript, RandomValidPolicy
from carl_gym.algorithms import Algorithm, get_algorithm
from carl_gym.envs.registration import make_task
from carl_gym.envs.state import Question
from carl_gym.envs.task import SearchTask
from carl_gym.retrieval import Retriever, SearchResults
from carl_gym.rollouts import RolloutTree, Schedule, Timings, collect


@dataclass(frozen=True)
class Options:
    """Measure what overlapping generation and environment brings, and what forking several states at once costs."""

    agent: str = "tiny"
    """Agent card, model folder or hub id."""
    backends: tuple[Literal["simulated", "transformers", "vllm", "vllm-server"], ...] = ("simulated", "transformers")
    """What samples; one that cannot stream is left out of the first table."""
    urls: tuple[str, ...] = ()
    """Addresses of the servers of the backend vllm-server; they get the agent's weights before every measurement."""
    algorithms: tuple[str, ...] = ("carl-lite", "carl", "grpo")
    """Whose trees the first table is about."""
    questions: int = 32
    """Questions, and so trees, of a measurement."""
    seeds: int = 3
    """Measurements of everything, each with other questions."""
    delay: float = 0.02
    """Seconds that a slow search takes more, per batch."""
    step: float = 0.01
    """Seconds of a step of the simulated engine."""
    forks_per_round: tuple[int, ...] = (1, 2, 4, 8)
    """Forks at once, for the second table (carl-lite); the first is what the others are compared with."""
    threads: int = 1
    """CPU threads of torch; vLLM takes OMP_NUM_THREADS when it is imported, so set that to the same."""
    device: str = "cpu"
    """Of the learner's model, which the transformers backend samples from."""


@dataclass(frozen=True)
class Run:
    """One measurement: the trees that were grown, seconds by the clock, and CPU seconds of this process."""

    trees: list[RolloutTree]
    seconds: float
    cpu: float
    timings: Timings

    @property
    def actions(self) -> int:
        return sum(tree.actions_generated for tree in self.trees)

    @property
    def idle(self) -> float:
        """Share of the time in which nothing was under way in the engine."""
        return 1 - self.timings.sample / self.seconds


@dataclass(frozen=True)
class Sampler:
    """What a backend is here; `reset` leaves it with empty caches."""

    policy: Policy
    transcript: Transcript
    reset: Callable[[], None]


class SimulatedEngine(RandomValidPolicy):
    """Random actions, one step of constant length per four characters of the longest under way."""

    def __init__(self, task: SearchTask, step: float) -> None:
        super().__init__(task)
        self._step = step

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        actions = super().sample(requests)
        time.sleep(self._step * max(map(steps, actions)))
        return actions

    def stream(self, exchange: Exchange) -> None:
        """See `StreamingPolicy`."""
        left: dict[int, int] = {}
        actions: dict[int, Completion] = {}
        finished: list[tuple[int, Completion]] = []
        while True:
            for number, request in exchange(finished, not left):
                actions[number] = self._sample(request)
                left[number] = steps(actions[number])
            if not left:
                return
            time.sleep(self._step)
            left = {number: count - 1 for number, count in left.items()}
            finished = [(number, actions.pop(number)) for number, count in left.items() if not count]
            left = {number: count for number, count in left.items() if count}


def steps(action: Completion) -> int:
    return -(-len(action.text) // 4)


class Slow(Retriever):
    """Another retriever, after a pause."""

    def __init__(self, inner: Retriever, pause: float) -> None:
        super().__init__(inner.corpus)
        self._inner, self._pause = inner, pause

    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        time.sleep(self._pause)
        return self._inner.search(queries, k)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    task = make_task("carl/MiniWiki-v0", questions=options.questions * (options.seeds + 1))
    slow = make_task("carl/MiniWiki-v0", questions=options.questions * (options.seeds + 1))
    slow.retriever = Slow(slow.retriever, options.delay)
    tasks = {"fast": task, f"+ {1000 * options.delay:g} ms": slow}
    for backend in options.backends:
        print(f"\n### {backend}, {options.questions} trees, {options.threads} thread(s)\n")
        if backend == "simulated":
            sampler = Sampler(SimulatedEngine(task, options.step), ByteTranscript(), lambda: None)
        else:
            urls = options.urls if backend == "vllm-server" else ()
            agent = load_agent(options.agent, device=options.device, backend=backend, urls=urls)
            sampler = Sampler(agent.policy, agent.transcript, agent.sync)
        schedules: list[Schedule] = ["ticks", "async"] if isinstance(sampler.policy, StreamingPolicy) else ["ticks"]
        warm_up(sampler, tasks, schedules, options)
        if "async" in schedules:
            schedule_table(sampler, tasks, options)
        else:
            print(f"{type(sampler.policy).__name__} cannot stream: it runs in ticks only.")
        forks_table(sampler, tasks, schedules, options)


def grow(sampler: Sampler, task: SearchTask, algorithm: Algorithm, schedule: Schedule, seed: int, count: int) -> Run:
    """Trees of the seed's own questions, from an empty prefix cache."""
    sampler.reset()
    asked: list[Question] = list(task.questions.values())[seed * count : (seed + 1) * count]
    timings = Timings()
    started, cpu = time.perf_counter(), time.process_time()
    trees = collect(
        task, sampler.policy, sampler.transcript, asked, algorithm.explorer,
        seed=seed, step=0, timings=timings, schedule=schedule,
    )  # fmt: skip
    return Run(trees, time.perf_counter() - started, time.process_time() - cpu, timings)


def warm_up(sampler: Sampler, tasks: dict[str, SearchTask], schedules: Sequence[Schedule], options: Options) -> None:
    for task in tasks.values():
        for schedule in schedules:
            grow(sampler, task, get_algorithm("carl-lite"), schedule, options.seeds, options.questions)


def schedule_table(sampler: Sampler, tasks: dict[str, SearchTask], options: Options) -> None:
    """Ticks against async, for every algorithm and both speeds of search."""
    print(
        "| algorithm | search | ticks, s | async, s | ticks / async | CPU, ticks / async | environment, share of ticks "
        "| engine idle, ticks | engine idle, async | same actions |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.algorithms:
        for search, task in tasks.items():
            pairs = []
            for seed in range(options.seeds):
                order: list[Schedule] = ["ticks", "async"] if seed % 2 else ["async", "ticks"]
                runs = {s: grow(sampler, task, get_algorithm(name), s, seed, options.questions) for s in order}
                pairs.append((runs["ticks"], runs["async"]))
            ticks, overlapped = zip(*pairs, strict=True)
            cells = [
                mean(ticks, lambda run: run.seconds, "{:.2f}"),
                mean(overlapped, lambda run: run.seconds, "{:.2f}"),
                spread([t.seconds / a.seconds for t, a in pairs]),
                spread([t.cpu / a.cpu for t, a in pairs]),
                mean(ticks, lambda run: 100 * run.timings.environment / run.seconds, "{:.0f} %"),
                mean(ticks, lambda run: 100 * run.idle, "{:.1f} %"),
                mean(overlapped, lambda run: 100 * run.idle, "{:.1f} %"),
                f"{100 * fmean(agreement(t, a) for t, a in pairs):.1f} %",
            ]
            print(f"| {name} | {search} | {' | '.join(cells)} |", flush=True)


def forks_table(
    sampler: Sampler, tasks: dict[str, SearchTask], schedules: Sequence[Schedule], options: Options
) -> None:
    """What several forks at once save in time, and what they change in the trees."""
    first = options.forks_per_round[0]
    heads = [f"{what}, {schedule}" for what in ("actions/s", "actions per CPU-s") for schedule in schedules]
    print(f"\nForks at once (carl-lite, N0 = 1, N = 16). Speeds are multiples of those with {first} at once; the rest")
    print(f"are means over {options.seeds} seeds, +- their standard deviation.\n")
    print(
        f"| forks at once | search | {' | '.join(heads)} "
        "| rank of H at forked states | states forked | A != 0 | EM of rollouts | actions per tree |"
    )
    print(f"|---:|---|{'---:|' * (len(heads) + 5)}")
    for search, task in tasks.items():
        runs: dict[tuple[Schedule, int, int], Run] = {}
        for count in options.forks_per_round:
            algorithm = get_algorithm("carl-lite", forks_per_round=count)
            trees: list[list[RolloutTree]] = []
            for seed in range(options.seeds):
                for schedule in schedules:
                    run = grow(sampler, task, algorithm, schedule, seed, options.questions)
                    runs[schedule, count, seed] = run
                trees.append(run.trees)
            pairs = [[(runs[s, count, n], runs[s, first, n]) for n in range(options.seeds)] for s in schedules]
            cells = [
                *(spread([rate(run) / rate(base) for run, base in of]) for of in pairs),
                *(spread([base.cpu / base.actions * run.actions / run.cpu for run, base in of]) for of in pairs),
                deviation([fmean(map(fork_rank, grown)) for grown in trees], "{:.3f}"),
                deviation([fmean(map(forked_states, grown)) for grown in trees], "{:.1f}"),
                deviation([100 * with_advantage(algorithm, grown) for grown in trees], "{:.1f} %"),
                deviation([100 * exact_match(task, grown) for grown in trees], "{:.1f} %"),
                deviation([fmean(tree.actions_generated for tree in grown) for grown in trees], "{:.1f}"),
            ]
            print(f"| {count} | {search} | {' | '.join(cells)} |", flush=True)
    print(
        "\nRank of H: where the forked state's H, as the complete tree knows it, stands among all its recorded states "
        "(0 the largest, 1 the smallest), mean over forks. A != 0: share of the actions generated."
    )


def rate(run: Run) -> float:
    """Actions per second."""
    return run.actions / run.seconds


def agreement(left: Run, right: Run) -> float:
    """Share of the actions of one run that the other run has at the same place of the same tree."""
    found = total = 0
    for a, b in zip(left.trees, right.trees, strict=True):
        known = {(node.trajectory, node.depth): node.action.token_ids for node in b.nodes if node.action}
        actions = [node for node in a.nodes if node.action]
        total += len(actions)
        found += sum(
            known.get((node.trajectory, node.depth)) == node.action.token_ids for node in actions if node.action
        )
    return found / total


def fork_sites(tree: RolloutTree) -> list[int]:
    """The state that each fork started at: the parent of its first node."""
    first = {node.trajectory: node for node in reversed(tree.nodes) if node.parent is not None}
    initial = {node.trajectory for node in tree.roots()}
    return [node.parent for number, node in first.items() if number not in initial and node.parent is not None]


def fork_rank(tree: RolloutTree) -> float:
    """Mean position of the forked states among all recorded ones by H, from 0 (the largest) to 1."""
    order = sorted((node.id for node in tree.recorded()), key=lambda id: -tree.H(id))
    place = {id: position / max(1, len(order) - 1) for position, id in enumerate(order)}
    sites = fork_sites(tree)
    return fmean(place[site] for site in sites) if sites else 0.0


def forked_states(tree: RolloutTree) -> int:
    """How many different states were forked."""
    return len(set(fork_sites(tree)))


def with_advantage(algorithm: Algorithm, trees: Sequence[RolloutTree]) -> float:
    """Share of the generated actions whose advantage is not 0."""
    advantages = algorithm.credit(trees)
    return sum(int((a != 0).sum()) for a in advantages) / sum(tree.actions_generated for tree in trees)


def exact_match(task: SearchTask, trees: Sequence[RolloutTree]) -> float:
    """Mean over all rollouts, forks included."""
    return fmean(task.info(leaf.state)["em"] for tree in trees for leaf in tree.leaves())


def mean(runs: Sequence[Run], value: Callable[[Run], float], form: str) -> str:
    return form.format(fmean(map(value, runs)))


def spread(values: Sequence[float]) -> str:
    """Median, smallest and largest."""
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def deviation(values: Sequence[float], form: str) -> str:
    return f"{form.format(fmean(values))} +- {form.format(pstdev(values)).removesuffix(' %')}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
