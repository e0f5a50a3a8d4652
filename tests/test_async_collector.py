"""Asynchronously grown trees are those of the ticks, nothing waits that need not, and no failure hangs."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rollout_toys import STOP, ByteTranscript, PathTask, ToyPolicy, action, questions, random_policy

from carl_gym.agents.policy import Completion, Exchange, SampleRequest, StreamingPolicy, sample_by_stream
from carl_gym.envs.state import EnvState
from carl_gym.errors import ConfigError, PolicyError, RetrievalError
from carl_gym.rollouts import EntropyForking, Explorer, RandomForking, RolloutTree, RootExplorer, Timings, collect
from carl_gym.rollouts.overlap import GRACE
from carl_gym.training.config import TrainConfig, check_output_dir, claim_output_dir

EXPLORERS = [
    RootExplorer(4),
    EntropyForking(2, 5),
    EntropyForking(3, 6, 2, "merged"),
    EntropyForking(1, 8, 4),
    RandomForking(2, 5, 3),
]
pytestmark = pytest.mark.timeout(60)


@dataclass
class StreamingToy(ToyPolicy):
    """Works on everything at once; what finishes when is drawn at random."""

    patience: float = 0.5
    """Probability that an action goes on for another step."""
    order: random.Random = field(default_factory=lambda: random.Random(0))
    most: int = 0
    """Most requests that were under way at once."""

    def stream(self, exchange: Exchange) -> None:
        under_way: dict[int, SampleRequest] = {}
        finished: list[tuple[int, Completion]] = []
        while True:
            under_way |= dict(exchange(finished, not under_way))
            if not under_way:
                return
            self.most = max(self.most, len(under_way))
            done = [number for number in under_way if self.order.random() > self.patience]
            self.order.shuffle(done)
            asked = [under_way.pop(number) for number in done]
            finished = list(zip(done, self.sample(asked), strict=True)) if asked else []


def streaming(seed: int = 0, stop: float = 0.2, ties: bool = False) -> StreamingToy:
    return StreamingToy(random_policy(stop=stop, ties=ties).act, order=random.Random(seed))


def path_task() -> PathTask:
    return PathTask(6, lambda path: len(path) + 0.5 * (path[-1] == STOP))


def grow(
    explorer: Explorer,
    policy: StreamingPolicy,
    count: int = 6,
    *,
    task: PathTask | None = None,
    transcript: ByteTranscript | None = None,
    timings: Timings | None = None,
) -> list[RolloutTree]:
    return collect(
        task or path_task(), policy, transcript or ByteTranscript(), questions(count), explorer,
        seed=0, step=0, schedule="async", timings=timings,
    )  # fmt: skip


def no_thread_is_left() -> bool:
    return not any(thread.name == "environment" for thread in threading.enumerate())


@dataclass(frozen=True)
class SlowTask(PathTask):
    """A retriever's time, drawn at random, for every batch of transitions."""

    def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str]) -> list[EnvState]:
        time.sleep(random.random() * 2e-3)
        return super().transition_batch(states, actions)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("explorer", EXPLORERS)
def test_trees_are_those_of_the_ticks_node_for_node(explorer: Explorer, ties: bool) -> None:
    task = SlowTask(6, path_task().payoff)
    policy = random_policy(ties=ties)
    expected = collect(path_task(), policy, ByteTranscript(), questions(12), explorer, seed=0, step=0)
    for seed in range(3):
        assert grow(explorer, streaming(seed, ties=ties), 12, task=task) == expected
    assert no_thread_is_left()


@pytest.mark.parametrize("context", [20, 33, 50])
def test_a_full_context_truncates_as_in_ticks(context: int) -> None:
    transcript = ByteTranscript(max_tokens=16, context=context)
    explorer = EntropyForking(2, 5)
    policy = random_policy(stop=0.0)
    expected = collect(path_task(), policy, transcript, questions(6), explorer, seed=0, step=0)
    assert any(leaf.truncated for tree in expected for leaf in tree.leaves())
    assert grow(explorer, streaming(stop=0.0), transcript=transcript) == expected


@dataclass
class OneQuestionFirst(ToyPolicy):
    """Leaves the first question's only request alone until it has answered `others` requests of the rest."""

    others: int = 0

    def stream(self, exchange: Exchange) -> None:
        held: list[tuple[int, SampleRequest]] = []
        finished: list[tuple[int, Completion]] = []
        answered = 0
        while True:
            joining = exchange(finished, not held)
            if not (joining or held):
                return
            first = [(n, r) for n, r in joining if r.state is not None and r.state.question_id == "q0"]
            rest = [pair for pair in joining if pair not in first]
            held += first
            answered += len(rest)
            finished = [(n, self.sample([request])[0]) for n, request in rest]
            if held and answered == self.others:
                finished += [(n, self.sample([request])[0]) for n, request in held]
                held = []


def test_a_tree_does_not_wait_for_another_ones_action() -> None:
    """Where an action of one tree takes as long as all others need to their end, ticks would never come there."""
    explorer = EntropyForking(1, 4)
    expected = collect(path_task(), random_policy(), ByteTranscript(), questions(3), explorer, seed=0, step=0)
    others = sum(tree.actions_generated for tree in expected[1:])
    assert grow(explorer, OneQuestionFirst(random_policy().act, others=others), 3) == expected


def test_what_has_finished_meanwhile_is_one_batch_of_transitions() -> None:
    entered, handed_over = threading.Event(), threading.Event()

    @dataclass(frozen=True)
    class Gate(PathTask):
        def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str]) -> list[EnvState]:
            entered.set()
            assert handed_over.wait(10)
            return super().transition_batch(states, actions)

    class OneThenTheRest(ToyPolicy):
        def stream(self, exchange: Exchange) -> None:
            asked = exchange([], True)
            answers = list(zip((n for n, _ in asked), self.sample([r for _, r in asked]), strict=True))
            assert exchange(answers[:1], False) == []
            assert entered.wait(10), "the first transition starts while nine actions are under way"
            assert exchange(answers[1:], False) == []
            handed_over.set()
            assert exchange([], True) == []

    task = Gate(1)
    trees = grow(RootExplorer(1), OneThenTheRest(random_policy().act), 10, task=task)
    assert task.batches == [1, 9]
    assert [tree.actions_generated for tree in trees] == [1] * 10


def test_many_trees_share_the_policy_and_the_retriever() -> None:
    task, policy = SlowTask(6), streaming()
    trees = grow(EntropyForking(1, 6), policy, 40, task=task)
    assert policy.most > 20
    assert sum(task.batches) == sum(tree.actions_generated for tree in trees)
    assert len(task.batches) < sum(task.batches) / 4


def boom(error: BaseException) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error

    return fail


@dataclass(frozen=True)
class FailingTask(PathTask):
    error: BaseException = field(default_factory=lambda: RetrievalError("the index is gone"))
    good: int = 3

    def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str]) -> list[EnvState]:
        if len(self.batches) >= self.good:
            raise self.error
        return super().transition_batch(states, actions)


class FailingExplorer(RootExplorer):
    def next(self, tree: RolloutTree) -> list[int]:
        raise PolicyError("no log-probs")


class FailingTranscript(ByteTranscript):
    def observation(self, text: str, action: Sequence[int] = ()) -> tuple[int, ...]:
        raise ValueError("a template that fails")


@pytest.mark.parametrize("good", [0, 1, 3])
@pytest.mark.parametrize("error", [RetrievalError("the index is gone"), KeyboardInterrupt(), MemoryError()])
def test_what_the_environment_raises_comes_out(error: BaseException, good: int) -> None:
    policy = streaming()
    with pytest.raises(type(error)) as raised:
        grow(RootExplorer(4), policy, task=FailingTask(6, error=error, good=good))
    assert raised.value is error
    assert no_thread_is_left()
    assert grow(RootExplorer(2), policy), "the policy can be used on"


def test_what_explorer_and_transcript_raise_comes_out() -> None:
    with pytest.raises(PolicyError, match="no log-probs"):
        grow(FailingExplorer(2), streaming())
    with pytest.raises(ValueError, match="a template that fails"):
        grow(RootExplorer(2), streaming(), transcript=FailingTranscript())
    assert no_thread_is_left()


@pytest.mark.parametrize("error", [PolicyError("the engine died"), KeyboardInterrupt()])
def test_what_the_policy_raises_comes_out(error: BaseException) -> None:
    policy, calls = streaming(), 0

    def act(request: SampleRequest, rng: random.Random) -> Completion:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise error
        return action(-1.0, text="a")

    policy.act = act
    with pytest.raises(type(error)) as raised:
        grow(RootExplorer(8), policy)
    assert raised.value is error
    assert no_thread_is_left()


def test_an_action_without_tokens_is_an_error() -> None:
    with pytest.raises(PolicyError, match=r"question 'q\d' got 0 tokens"):
        grow(RootExplorer(1), StreamingToy(lambda request, rng: Completion((), (), "", "eos")))


def test_an_interrupt_does_not_wait_for_a_search_that_hangs() -> None:
    released = threading.Event()

    @dataclass(frozen=True)
    class Hanging(PathTask):
        def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str]) -> list[EnvState]:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            released.wait(50)
            return super().transition_batch(states, actions)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # test runners may ignore the signal
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            grow(RootExplorer(2), streaming(), task=Hanging(6))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < GRACE + 10
    released.set()
    while not no_thread_is_left():
        time.sleep(0.01)


ENCODES = """
import os, signal, sys, threading, time
import torch
from test_async_collector import GRACE, PathTask, RootExplorer, grow, streaming

queries = torch.rand(500, 500)

class Encodes(PathTask):
    def transition_batch(self, states, actions):
        for seconds in (0.2, 0.7):  # somebody presses Ctrl-C, and once more
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
        end = time.monotonic() + GRACE + 2
        while time.monotonic() < end:
            queries @ queries
        return super().transition_batch(states, actions)

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    grow(RootExplorer(2), streaming(), task=Encodes(6))
except KeyboardInterrupt:
    sys.exit(143)
"""


def test_a_program_that_exits_while_queries_are_encoded_has_the_exit_code_it_asked_for() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", ENCODES], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 143


class Misbehaving(ToyPolicy):
    """Answers as `then`, given the requests of the first exchange, says."""

    then: Callable[[Misbehaving, Exchange, list[int], list[Completion]], object]

    def stream(self, exchange: Exchange) -> None:
        asked = exchange([], True)
        self.then(exchange, [number for number, _ in asked], self.sample([request for _, request in asked]))


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda _, exchange, n, done: exchange(list(zip(n, done, strict=True))[1:], True), "has not answered 1 of"),
        (lambda _, exchange, n, done: exchange([(n[0], done[0])] * 2, False), "answered request 0, which it was not"),
        (lambda _, exchange, n, done: exchange([(99, done[0])], False), "answered request 99, which it was not asked"),
        (lambda _, exchange, n, done: None, r"ended its stream while 6 actions were wanted"),
    ],
)
def test_a_policy_that_loses_or_invents_requests_is_found_out(then: object, message: str) -> None:
    policy = type("Wrong", (Misbehaving,), {"then": then})(random_policy().act)
    with pytest.raises(PolicyError, match=message):
        grow(RootExplorer(1), policy)
    assert no_thread_is_left()


def test_a_failure_that_the_policy_swallows_still_comes_out() -> None:
    class Swallowing(StreamingToy):
        def stream(self, exchange: Exchange) -> None:
            with contextlib.suppress(RetrievalError):
                super().stream(exchange)

    with pytest.raises(RetrievalError, match="the index is gone"):
        grow(RootExplorer(2), Swallowing(random_policy().act), task=FailingTask(6))


def test_policies_that_cannot_stream_are_refused_before_anything_is_sampled() -> None:
    policy = random_policy()
    with pytest.raises(ConfigError, match=r"ToyPolicy does not .*use schedule ticks, or another backend"):
        grow(RootExplorer(2), policy)
    assert policy.batches == []
    with pytest.raises(ConfigError, match="schedule must be one of ticks, async, not 'sync'"):
        collect(path_task(), policy, ByteTranscript(), [], RootExplorer(1), seed=0, step=0, schedule="sync")


def test_a_prompt_without_room_is_an_error_before_anything_is_sampled() -> None:
    policy = streaming()
    with pytest.raises(ConfigError, match="prompt of question 'q0' has 3 tokens"):
        grow(RootExplorer(2), policy, transcript=ByteTranscript(context=10))
    assert policy.batches == [] and no_thread_is_left()


def test_no_questions_give_no_trees() -> None:
    policy = streaming()
    assert grow(RootExplorer(2), policy, 0) == [] and policy.batches == []


def test_timings_tell_the_policys_time_from_its_waiting() -> None:
    @dataclass(frozen=True)
    class Pause(PathTask):
        def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str]) -> list[EnvState]:
            time.sleep(0.02)
            return super().transition_batch(states, actions)

    timings = Timings()
    started = time.perf_counter()
    grow(RootExplorer(1), StreamingToy(random_policy(stop=0.0).act, patience=0.0), 1, task=Pause(5), timings=timings)
    whole = time.perf_counter() - started
    assert timings.environment >= 5 * 0.02, "one action at a time: the policy waits for every transition"
    assert 0 < timings.sample <= whole - 5 * 0.02
    before = timings.environment
    grow(RootExplorer(1), streaming(), 1, task=Pause(5), timings=timings)
    assert timings.environment > before


def test_sampling_by_a_stream_keeps_the_order_of_the_requests() -> None:
    requests = [SampleRequest((1, 2), seed=seed) for seed in range(50)]
    assert sample_by_stream(streaming(), requests) == random_policy().sample(requests)
    assert sample_by_stream(streaming(), []) == []


def test_the_schedule_is_part_of_a_run(tmp_path: Path) -> None:
    """What it computes is not the same to the last bit, so a run is not resumed with the other one."""
    run = TrainConfig(output_dir=tmp_path / "run", schedule="async")
    claim_output_dir(run)
    check_output_dir(replace(run, resume=True))
    with pytest.raises(ConfigError, match="schedule: async -> ticks"):
        check_output_dir(replace(run, resume=True, schedule="ticks"))
    assert TrainConfig().schedule == "ticks"
