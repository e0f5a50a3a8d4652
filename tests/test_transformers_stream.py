"""The transformers policy as a stream: requests join others that are under way."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from model_toys import plain_logprobs, random_model, tag_tokenizer
from transformers import FalconConfig, FalconForCausalLM

from carl_gym.agents.policy import Completion, SampleRequest, StreamingPolicy
from carl_gym.agents.transformers_policy import CACHE_SLACK, TransformersPolicy
from carl_gym.envs.protocol import STOP_STRINGS
from carl_gym.errors import PolicyError

TAGS = tag_tokenizer()
VOCABULARY = len(TAGS) + 4


def make_policy(kind: str = "llama-grouped", *, max_batch: int = 96, cache_bytes: int = 1 << 29) -> TransformersPolicy:
    model = random_model(kind, VOCABULARY)
    return TransformersPolicy(model, TAGS, STOP_STRINGS, max_batch=max_batch, cache_bytes=cache_bytes)


def requests(count: int, seed: int = 0) -> list[SampleRequest]:
    rng = random.Random(seed)
    shared = [rng.randrange(len(TAGS)) for _ in range(60)]
    return [
        SampleRequest(
            [*shared[: rng.choice([1, 20, 60])], *(rng.randrange(len(TAGS)) for _ in range(rng.randint(0, 40)))],
            rng.getrandbits(64),
            rng.choice([0.0, 1.0, 1.5]),
            rng.randint(1, 12),
        )
        for _ in range(count)
    ]


class Feed:
    """Asks for some requests more at every exchange, as an environment does that others run beside."""

    def __init__(self, asked: Sequence[SampleRequest], seed: int) -> None:
        self.waiting = list(enumerate(asked))
        self.rng = random.Random(seed)
        self.answers: dict[int, Completion] = {}
        self.under_way = 0
        self.most = 0

    def __call__(self, finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
        assert not self.answers.keys() & dict(finished).keys(), "nothing is handed over twice"
        self.answers |= dict(finished)
        self.under_way -= len(finished)
        assert idle == (self.under_way == 0)
        count = self.rng.randint(1 if idle else 0, 4)
        joining, self.waiting = self.waiting[:count], self.waiting[count:]
        self.under_way += len(joining)
        self.most = max(self.most, self.under_way)
        return joining


def test_a_model_whose_keys_are_not_what_its_config_says_is_refused() -> None:
    config = FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    policy = TransformersPolicy(FalconForCausalLM(config), TAGS, STOP_STRINGS)
    with pytest.raises(PolicyError, match="keeps 1 heads of 8 for a token, and its config says 4 of 8"):
        policy.sample(requests(3))


@pytest.mark.parametrize("kind", ["llama-grouped", "qwen2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"max_batch": 3, "cache_bytes": 20_000}], ids=["roomy", "tight"])
def test_a_request_gets_the_same_answer_whenever_it_joins(kind: str, options: dict[str, int]) -> None:
    asked = requests(50)
    expected = make_policy(kind).sample(asked)
    for seed in range(3):
        policy, feed = make_policy(kind, **options), Feed(asked, seed)
        policy.stream(feed)
        assert feed.most > 3, "requests did overlap"
        for number, completion in enumerate(expected):
            answer = feed.answers[number]
            assert (answer.token_ids, answer.finish_reason) == (completion.token_ids, completion.finish_reason)
            np.testing.assert_allclose(answer.logprobs, completion.logprobs, atol=1e-4)


def test_a_long_stream_keeps_the_prefix_cache_within_its_bound() -> None:
    policy, sizes = make_policy(cache_bytes=20_000), []

    class Watched(Feed):
        def __call__(self, finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
            sizes.append(policy._cache.bytes)
            return super().__call__(finished, idle)

    policy.stream(Watched(requests(50), 0))
    assert 20_000 < max(sizes) <= CACHE_SLACK * 20_000
    assert policy._cache.bytes <= 20_000


def test_a_sleeping_policy_holds_no_memory_and_samples_as_before_when_asked_again() -> None:
    policy, asked = make_policy(), requests(20)
    answers = policy.sample(asked)
    assert policy._cache.bytes > 0 and policy._batch._kv.kv.nbytes > 0
    policy.sleep()
    assert policy._cache.bytes == policy._batch._kv.kv.nbytes == 0
    policy.wake()
    assert policy.sample(asked) == answers


def test_it_is_a_streaming_policy() -> None:
    assert isinstance(make_policy(), StreamingPolicy)


def test_a_stream_that_is_asked_for_nothing_ends() -> None:
    calls = []

    def nothing(finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
        calls.append((finished, idle))
        return []

    make_policy().stream(nothing)
    assert calls == [([], True)]


def test_what_an_exchange_raises_comes_out_and_the_policy_can_be_used_again() -> None:
    policy, asked, calls = make_policy(), requests(8), 0
    expected = make_policy().sample(asked)

    def fails(finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyError("environment")
        return list(enumerate(asked)) if calls == 1 else []

    with pytest.raises(KeyError, match="environment"):
        policy.stream(fails)
    assert [done.token_ids for done in policy.sample(asked)] == [done.token_ids for done in expected]


def test_a_request_that_cannot_be_served_ends_the_stream() -> None:
    policy, asked = make_policy(), [*requests(3), SampleRequest([], 0)]
    feed = Feed(asked, 0)
    with pytest.raises(PolicyError, match="at least one token"):
        policy.stream(feed)
    assert len(policy.sample(asked[:3])) == 3


def test_an_exchange_may_use_the_model() -> None:
    """Between its steps the policy leaves nothing changed in the model that it shares with the learner."""
    policy, asked = make_policy(), requests(6)
    feed, before = Feed(asked, 0), policy.model.config._attn_implementation
    policy.model.train()

    def scores(finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
        assert policy.model.training
        assert policy.model.config._attn_implementation == before
        for number, done in finished:
            (score,) = policy.score([asked[number].prefix], [done.token_ids])
            assert len(score) == len(done.token_ids)
        return feed(finished, idle)

    policy.stream(scores)
    assert len(feed.answers) == len(asked)


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2"])
def test_a_model_that_keeps_its_own_attention_is_sampled_as_well(kind: str) -> None:
    """One pass per row of prefixes and per block of rows instead of one for all."""
    model = random_model(kind, VOCABULARY)
    model.set_attn_implementation("eager")
    policy, feed = TransformersPolicy(model, TAGS, STOP_STRINGS), Feed(requests(30), 1)
    policy.stream(feed)
    assert model.config._attn_implementation == "eager"
    for request, completion in zip(requests(30), (feed.answers[i] for i in range(30)), strict=True):
        truth = plain_logprobs(model, request.prefix, completion.token_ids, request.temperature or 1.0)
        np.testing.assert_allclose(completion.logprobs, truth, atol=1e-4, rtol=0)
