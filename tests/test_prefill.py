"""What is computed of prefixes: everything that is missing, and nothing twice but short shared beginnings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.agents import prefill
from carl_gym.agents.agent import Agent
from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.agents.prefill import BLOCK
from carl_gym.agents.transformers_policy import TransformersPolicy
from carl_gym.algorithms import get_algorithm
from carl_gym.envs.registration import make_task
from carl_gym.rollouts import EntropyForking, RootExplorer, collect

# Stretches around a block's length, so that prefixes share less than a block, just one, and more.
stretches = st.sampled_from([(0,) * 3, (1,) * 7, (0,) * (BLOCK - 1), (1,) * BLOCK, (2,) * (BLOCK + 1), (3,)])
prefixes = st.lists(st.lists(stretches, max_size=5).map(lambda parts: tuple(itertools.chain(*parts))), max_size=12)


def unique_tokens(sequences: Sequence[tuple[int, ...]]) -> int:
    """Tokens of all sequences, a beginning that several share counted once."""
    ordered = sorted(set(sequences))
    return sum(len(b) - prefill.common(a, b) for a, b in itertools.pairwise([(), *ordered]))


@given(prefixes, st.lists(stretches, max_size=2).map(lambda parts: tuple(itertools.chain(*parts))))
def test_a_plan_completes_every_prefix_in_order_and_computes_next_to_nothing_twice(
    asked: list[tuple[int, ...]], cached: tuple[int, ...]
) -> None:
    starts = [prefill.common(prefix, cached) for prefix in asked]
    filled = list(starts)
    runs = prefill.plan(asked, starts)
    for run in sorted(runs, key=lambda run: run.wave):
        for member in (run.prefix, *run.others):
            assert filled[member] == run.start, "what is to the left is there"
            assert asked[member][: run.stop] == asked[run.prefix][: run.stop]
            filled[member] = run.stop
    assert filled == [len(prefix) for prefix in asked]
    computed = sum(run.stop - run.start for run in runs)
    missing = unique_tokens([*asked, cached]) - len(cached)
    assert missing <= computed <= missing + (BLOCK - 1) * len(asked)


def test_runs_of_one_wave_need_nothing_of_each_other() -> None:
    system, question = (7,) * 40, (8,) * 30
    runs = prefill.plan([(*system, 1), (*system, *question, 2), (*system, *question, 3)], [0, 0, 0])
    assert [(run.prefix, run.start, run.stop, run.wave, run.others) for run in runs] == [
        (0, 0, 40, 0, (1, 2)),
        (0, 40, 41, 1, ()),
        (1, 40, 70, 1, (2,)),
        (1, 70, 71, 2, ()),
        (2, 70, 71, 2, ()),
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.floats(0, 200))
def test_cuts_into_blocks_are_the_cheapest_there_are(lengths: list[int], per_block: float) -> None:
    lengths.sort()

    def cost(ends: Sequence[int]) -> float:
        blocks = itertools.pairwise([0, *ends])
        return sum((end - start) * lengths[end - 1] + per_block for start, end in blocks)

    count = len(lengths)
    every = ([*inner, count] for size in range(count) for inner in itertools.combinations(range(1, count), size))
    assert cost(prefill.cut(lengths, per_block)) == pytest.approx(min(map(cost, every)))


def recorded(policy: TransformersPolicy, sample: Callable[[], object]) -> list[SampleRequest]:
    """Every request that `policy` was asked for."""
    requests: list[SampleRequest] = []
    answer = policy.sample

    def record(asked: Sequence[SampleRequest]) -> list[Completion]:
        requests.extend(asked)
        return answer(asked)

    policy.sample = record  # type: ignore[method-assign, assignment]
    sample()
    del policy.sample
    return requests


@pytest.mark.parametrize(
    "explorer",
    [EntropyForking(1, 16), EntropyForking(8, 16), RootExplorer(16), get_algorithm("carl-lite").explorer],
    ids=["N0 = 1", "N0 = 8", "GRPO", "carl-lite"],
)
def test_prompt_tokens_are_computed_once(tiny_agent: Agent, explorer: EntropyForking | RootExplorer) -> None:
    """At most the unique tokens of all prefixes, plus a block per request; in fact far less: actions are cached."""
    policy, task = tiny_agent.policy, make_task("carl/MiniWiki-v0", questions=4)
    assert isinstance(policy, TransformersPolicy)
    questions = list(task.questions.values())
    requests = recorded(
        policy, lambda: collect(task, policy, tiny_agent.transcript, questions, explorer, seed=0, step=0)
    )
    unique, counters = unique_tokens([tuple(request.prefix) for request in requests]), policy.counters
    assert counters.prompt_tokens == sum(len(request.prefix) for request in requests)
    assert counters.computed_tokens <= unique + len(requests)
    assert counters.computed_tokens + counters.decoded_tokens <= unique + (BLOCK + 24) * len(requests)


@pytest.mark.parametrize("max_batch", [96, 5])
def test_a_beginning_that_new_requests_share_is_computed_once(tiny_agent: Agent, max_batch: int) -> None:
    """Different questions under one long system prompt, none of it cached, in one call."""
    assert tiny_agent.model is not None and tiny_agent.tokenizer is not None
    policy = TransformersPolicy(tiny_agent.model, tiny_agent.tokenizer, (), eos=set(), max_batch=max_batch)
    rng = random.Random(0)
    system = [rng.randrange(50) for _ in range(300)]
    asked = [SampleRequest([*system, *(rng.randrange(50) for _ in range(20 + i))], i, max_tokens=3) for i in range(12)]
    together = policy.sample(asked)
    unique = unique_tokens([tuple(request.prefix) for request in asked])
    assert policy.counters.computed_tokens <= unique + len(asked)
    for request, completion in zip(asked, together, strict=True):
        policy.sync()
        assert policy.sample([request])[0].token_ids == completion.token_ids
