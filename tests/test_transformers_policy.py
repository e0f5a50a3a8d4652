"""Sampling with a prefix cache must be what it would be without: one request, one full forward pass per token."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from model_toys import KINDS, chain_model, chi_square, plain_logprobs, random_model, tag_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.agents.transformers_policy import TransformersPolicy
from carl_gym.envs.protocol import STOP_STRINGS
from carl_gym.errors import PolicyError

TAGS = tag_tokenizer()
VOCABULARY = len(TAGS) + 4  # models round their vocabulary up: some ids have no token
SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SMALL_CACHE = 20_000  # bytes: a few dozen tokens of the models here


def make_policy(kind: str = "llama-grouped", **options: int) -> TransformersPolicy:
    return TransformersPolicy(random_model(kind, VOCABULARY), TAGS, STOP_STRINGS, **options)


def tokens(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(len(TAGS)) for _ in range(rng.randint(low, high))]


def grow(policy: TransformersPolicy, seed: int, *, rounds: int = 6, width: int = 10) -> list[list[SampleRequest]]:
    """Sample as rollout trees do: new roots, siblings, later turns, and forks at any token of what there is.

    Cuts anywhere inside old prefixes and actions, with or without new tokens behind, meet the cache at every kind
    of boundary: inside a segment, at its end, one token before or after it, and past everything that is cached.
    """
    rng = random.Random(seed)
    paths: list[list[int]] = []
    calls = []
    for _ in range(rounds):
        requests: list[SampleRequest] = []
        for _ in range(width):
            match rng.choice(["root", "sibling", "turn", "fork"]) if paths else "root":
                case "root":
                    prefix = tokens(rng, 1, rng.choice([1, 60]))
                case "sibling" if requests:
                    prefix = list(rng.choice(requests).prefix)
                case "turn":
                    prefix = rng.choice(paths) + tokens(rng, 1, 30)
                case _:
                    path = rng.choice(paths)
                    prefix = path[: rng.randint(1, len(path))] + tokens(rng, 0, 2)
            temperature, length = rng.choice([1.0, 0.7, 1.6, 0.0]), rng.randint(1, 14)
            requests.append(SampleRequest(prefix, rng.getrandbits(64), temperature, length))
        calls.append(requests)
        for request, completion in zip(requests, policy.sample(requests), strict=True):
            paths.append([*request.prefix, *completion.token_ids])
    return calls


def assert_true_logprobs(model: PreTrainedModel, request: SampleRequest, completion: Completion) -> None:
    """The reported log-probs are those of a plain forward pass of everything at once."""
    truth = plain_logprobs(model, request.prefix, completion.token_ids, request.temperature or 1.0)
    np.testing.assert_allclose(completion.logprobs, truth, atol=1e-4, rtol=0)


# Log-probs


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_of_these_tests_attend_to_all_of_their_prefix(kind: str) -> None:
    """Otherwise a cache that lost a prefix's first tokens, or mixed two prefixes, would go unnoticed."""
    model, rng = random_model(kind, VOCABULARY), random.Random(0)
    prefix, action = tokens(rng, 120, 120), tokens(rng, 12, 12)
    truth = plain_logprobs(model, prefix, action)
    for place in (0, 1, 60, 119):
        other = [*prefix]
        other[place] = (other[place] + 1) % len(TAGS)
        assert (plain_logprobs(model, other, action) - truth).abs().max() > 0.01
    assert (plain_logprobs(model, prefix[1:], action) - truth).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"cache_bytes": SMALL_CACHE, "max_batch": 3}], ids=["roomy", "tight"])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_a_full_forward_pass(kind: str, options: dict[str, int]) -> None:
    policy = make_policy(kind, **options)
    sample, checked = policy.sample, 0

    def sample_and_check(requests: Sequence[SampleRequest]) -> list[Completion]:
        nonlocal checked
        completions = sample(requests)
        for request, completion in zip(requests, completions, strict=True):
            assert_true_logprobs(policy.model, request, completion)
            checked += len(completion.token_ids)
        return completions

    policy.sample = sample_and_check  # type: ignore[method-assign]
    grow(policy, seed=1)
    assert checked > 200


def test_long_prefixes_up_to_the_whole_context() -> None:
    policy, rng = make_policy(), random.Random(2)
    path = tokens(rng, 490, 490)
    long = [SampleRequest(path[:cut], cut, max_tokens=512 - cut) for cut in (490, 495, 1, 300)]
    for requests in (long, [SampleRequest([*path, *tokens(rng, 21, 21)], 7, max_tokens=1), *long]):
        for request, completion in zip(requests, policy.sample(requests), strict=True):
            assert_true_logprobs(policy.model, request, completion)


def test_half_precision_weights_work() -> None:
    model = random_model("llama-grouped", VOCABULARY).to(torch.bfloat16)
    policy = TransformersPolicy(model, TAGS, STOP_STRINGS)
    for requests in grow(policy, seed=3, rounds=2):
        for request, completion in zip(requests, policy.sample(requests), strict=True):
            truth = plain_logprobs(model, request.prefix, completion.token_ids, request.temperature or 1.0)
            np.testing.assert_allclose(completion.logprobs, truth, atol=0.5)  # eight bits; a lost prefix costs nats
    assert all(isinstance(logprob, float) for logprob in completion.logprobs)


def test_score_agrees_with_sample_at_temperature_one() -> None:
    policy = make_policy()
    requests = [SampleRequest(r.prefix, r.seed, max_tokens=12) for call in grow(policy, seed=4) for r in call]
    completions = policy.sample(requests)
    scores = policy.score([r.prefix for r in requests], [c.token_ids for c in completions])
    for completion, score in zip(completions, scores, strict=True):
        np.testing.assert_allclose(score, completion.logprobs, atol=1e-4)
    assert policy.score([], []) == []
    assert policy.score([[1, 2]], [[]])[0].shape == (0,)


def test_dropout_is_off_while_sampling_and_scoring_and_the_mode_is_put_back() -> None:
    model = random_model("llama", VOCABULARY)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy, request = TransformersPolicy(model, TAGS, STOP_STRINGS), SampleRequest(list(range(40)), 5, max_tokens=8)
    model.train()
    (completion,) = policy.sample([request])
    (score,) = policy.score([request.prefix], [completion.token_ids])
    assert model.training
    model.eval()
    assert_true_logprobs(model, request, completion)
    np.testing.assert_allclose(score, completion.logprobs, atol=1e-4)
    policy.sample([request])
    assert not model.training


# What a completion may depend on


@pytest.mark.parametrize("kind", ["llama-grouped", "qwen2"])
def test_completions_do_not_depend_on_batch_order_or_cache(kind: str) -> None:
    policy = make_policy(kind)
    calls = grow(policy, seed=5)
    requests = [request for call in calls for request in call]
    alone = {id(r): make_policy(kind).sample([r])[0] for r in requests}
    shuffled = random.Random(0).sample(requests, len(requests))
    for options in ({}, {"cache_bytes": 0}, {"cache_bytes": SMALL_CACHE}, {"max_batch": 1}, {"max_batch": 7}):
        other = make_policy(kind, **options)
        for batch in (requests, shuffled, requests[::-1][:5], *calls):
            for request, completion in zip(batch, other.sample(batch), strict=True):
                expected = alone[id(request)]
                assert (completion.token_ids, completion.text) == (expected.token_ids, expected.text)
                assert completion.finish_reason == expected.finish_reason
                np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-4)


def test_the_seed_decides() -> None:
    policy, prefix = make_policy(), list(range(30))
    requests = [SampleRequest(prefix, seed, temperature=3.0, max_tokens=12) for seed in range(40)]
    first, again = policy.sample(requests), policy.sample(requests)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert len({c.token_ids for c in first}) > 35
    twins = policy.sample([SampleRequest(prefix, 3, 3.0, 12), SampleRequest([*prefix[:-1], 99], 3, 3.0, 12)])
    assert twins[0].token_ids == first[3].token_ids != twins[1].token_ids


def test_seeds_of_any_size_count() -> None:
    """Derived seeds are 64-bit numbers; their high bits matter as much as their low ones."""
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    drawn = make_policy().sample([SampleRequest([1, 2], seed, 3.0, 10) for seed in seeds])
    assert len({c.token_ids for c in drawn}) == len(seeds)


# The distribution


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_first_token_follows_softmax_of_logits_over_temperature(temperature: float) -> None:
    policy, prefix, n = make_policy(), [5, 6, 7, 8], 8000
    drawn = policy.sample([SampleRequest(prefix, seed, temperature, 1) for seed in range(n)])
    counts = Counter(c.token_ids for c in drawn)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prefix])).logits[0, -1].double()
    truth = {(i,): p for i, p in enumerate(torch.softmax(logits / temperature, dim=-1).tolist())}
    assert chi_square(counts, truth) < 4
    wrong = {(i,): p for i, p in enumerate(torch.softmax(logits / (temperature * 1.25), dim=-1).tolist())}
    assert chi_square(counts, wrong) > 4, "the test would notice a wrong temperature"


def test_successive_tokens_are_independent_and_report_their_known_probabilities() -> None:
    """A chain that draws every token from one and the same known distribution."""
    distribution = {10: 0.5, 11: 0.25, 12: 0.15, 13: 0.07, 14: 0.03}
    model = chain_model(VOCABULARY, dict.fromkeys(distribution, distribution))
    temperature = 0.8
    weights = {token: p ** (1 / temperature) for token, p in distribution.items()}
    tempered = {token: w / sum(weights.values()) for token, w in weights.items()}
    policy = TransformersPolicy(model, TAGS, STOP_STRINGS)
    drawn = policy.sample([SampleRequest([10], seed, temperature, 3) for seed in range(4000)])
    for completion in drawn:
        expected = [math.log(tempered[token]) for token in completion.token_ids]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        pairs = Counter((c.token_ids[i], c.token_ids[j]) for c in drawn)
        assert chi_square(pairs, {(a, b): tempered[a] * tempered[b] for a in tempered for b in tempered}) < 4


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_transformers_generates(kind: str) -> None:
    policy, rng, n = make_policy(kind), random.Random(6), 16
    requests = [SampleRequest(tokens(rng, 1, 50), i, temperature=0, max_tokens=n) for i in range(8)]
    for request, completion in zip(requests, policy.sample(requests), strict=True):
        ids = torch.tensor([request.prefix])
        generated = policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n)
        expected = tuple(generated[0, len(request.prefix) :].tolist())
        assert completion.token_ids == expected[: len(completion.token_ids)]
        assert len(completion.token_ids) == n or completion.finish_reason != "length"
        assert_true_logprobs(policy.model, request, completion)  # of the untempered distribution


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    policy, prefix = make_policy(), [1, 2, 3]
    mixed = [SampleRequest(prefix, 0, 0.0, 9), SampleRequest(prefix, 0, 2.0, 9), SampleRequest(prefix, 0, 0.5, 9)]
    together = policy.sample(mixed)
    assert [policy.sample([request])[0].token_ids for request in mixed] == [c.token_ids for c in together]
    assert len({c.token_ids for c in together}) == 3


# Weights


def scale(model: PreTrainedModel, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def test_after_a_change_in_place_sync_makes_everything_follow_the_new_weights() -> None:
    policy = make_policy()
    calls = grow(policy, seed=7, rounds=3)
    scale(policy.model, 1.3)
    policy.sync()
    assert policy.version == 1
    for requests in calls:
        for request, completion in zip(requests, policy.sample(requests), strict=True):
            assert_true_logprobs(policy.model, request, completion)


def test_sync_takes_over_weights() -> None:
    policy, other = make_policy(), random_model("llama-grouped", VOCABULARY, seed=9)
    calls = grow(policy, seed=8, rounds=3)
    policy.sync(other.state_dict())
    for requests in calls:
        for request, completion in zip(requests, policy.sample(requests), strict=True):
            assert_true_logprobs(other, request, completion)


def test_weights_that_are_not_finite_are_an_error_and_can_be_recovered_from() -> None:
    policy, request = make_policy(), SampleRequest([1, 2, 3], 0, max_tokens=4)
    (expected,) = policy.sample([request])
    good = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    for bad in (math.nan, math.inf):
        scale(policy.model, bad)
        policy.sync()
        policy.model.train()
        with pytest.raises(PolicyError, match="not finite"):
            policy.sample([request])
        assert policy.model.training, "the mode is put back after an error too"
        policy.sync(good)
        assert policy.sample([request])[0].token_ids == expected.token_ids


# Requests that cannot be served


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (SampleRequest([1] * 500, 0, max_tokens=13), "513|context of 512"),
        (SampleRequest([1] * 600, 0, max_tokens=1), "context of 512"),
        (SampleRequest([], 0), "at least one token"),
        (SampleRequest([1], 0, max_tokens=0), "max_tokens"),
        (SampleRequest([1], 0, temperature=-1.0), "temperature"),
        (SampleRequest([1], 0, temperature=math.nan), "temperature"),
    ],
    ids=["too long by one", "too long", "empty", "no tokens", "negative temperature", "no temperature"],
)
def test_a_request_that_cannot_be_served_is_named(request_: SampleRequest, words: str) -> None:
    policy = make_policy()
    with pytest.raises(PolicyError, match=words):
        policy.sample([SampleRequest([1, 2], 0, max_tokens=2), request_])
    assert len(policy.sample([SampleRequest([1, 2], 0, max_tokens=2)])) == 1


@pytest.mark.parametrize("config", [
    MistralConfig(sliding_window=64, **SIZES),
    Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1, **SIZES),
    Gemma3TextConfig(**SIZES),
], ids=lambda config: config.model_type)  # fmt: skip
def test_a_model_that_forgets_is_refused(config: PreTrainedConfig) -> None:
    """The cache's masks show the whole prefix: with a sliding window the log-probs would be quietly wrong."""
    with pytest.raises(PolicyError, match="full attention"):
        TransformersPolicy(AutoModelForCausalLM.from_config(config), TAGS, STOP_STRINGS)


def test_scoring_needs_a_prefix_and_room() -> None:
    """The first token of all has no log-prob: nothing stands to its left."""
    policy = make_policy()
    for prefix, continuation in (([], [1, 2]), ([1] * 500, [1] * 13)):
        with pytest.raises(PolicyError, match="prefix"):
            policy.score([prefix], [continuation])


def test_no_requests_no_completions() -> None:
    assert make_policy().sample([]) == []


# The cache saves work


def count_computed(policy: TransformersPolicy, sample: Callable[[], object]) -> int:
    """Tokens that pass through the model."""
    seen = 0

    def hook(_: object, arguments: tuple[torch.Tensor, ...], options: dict[str, torch.Tensor]) -> None:
        nonlocal seen
        seen += (arguments[0] if arguments else options["input_ids"]).numel()

    handle = policy.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    sample()
    handle.remove()
    return seen


def test_what_was_computed_once_is_not_computed_again() -> None:
    """A later turn costs the new observation, a fork next to nothing, and siblings share one prefix."""
    policy, rng = make_policy(), random.Random(10)
    prompt, observation = tokens(rng, 200, 200), tokens(rng, 30, 30)
    first: list[Completion] = []
    siblings = [SampleRequest(prompt, seed, max_tokens=4) for seed in range(8)]
    assert count_computed(policy, lambda: first.extend(policy.sample(siblings))) <= 200 + 8 * 3
    turn = [*prompt, *first[0].token_ids, *observation]
    assert count_computed(policy, lambda: policy.sample([SampleRequest(turn, 0, max_tokens=1)])) <= 30 + 1
    assert count_computed(policy, lambda: policy.sample([SampleRequest(turn[:150], 0, max_tokens=1)])) <= 1
    policy.sync()
    assert count_computed(policy, lambda: policy.sample([SampleRequest(turn[:150], 0, max_tokens=1)])) == 150


def test_the_cache_keeps_no_more_than_it_may() -> None:
    """With room for nothing, a prefix that was just served is computed anew."""
    policy, request = make_policy(cache_bytes=0), SampleRequest(list(range(100)), 0, max_tokens=1)
    for _ in range(2):
        assert count_computed(policy, lambda: policy.sample([request])) == 100
