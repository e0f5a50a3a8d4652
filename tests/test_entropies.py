"""Exact token entropies from the sampler: the truth of a plain forward pass, at no change of what is sampled."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from model_toys import KINDS, chain_model, random_model, tag_tokenizer
from rollout_toys import ByteTranscript, PathTask, ToyPolicy, action, questions
from transformers import PreTrainedModel

from carl_gym.agents import vllm_engine
from carl_gym.agents.agent import load_agent
from carl_gym.agents.draws import Temperatures, draw
from carl_gym.agents.openai_policy import openai_agent
from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.agents.scripted import RandomValidPolicy
from carl_gym.agents.transformers_policy import TransformersPolicy
from carl_gym.envs.protocol import STOP_STRINGS, function_schemas
from carl_gym.envs.registration import make_task
from carl_gym.envs.task import SearchTask
from carl_gym.errors import PolicyError
from carl_gym.rollouts import RootExplorer, Schedule, collect

TAGS = tag_tokenizer()
VOCABULARY = len(TAGS) + 4


@dataclass(frozen=True, slots=True)
class CuriousExplorer(RootExplorer):
    """Rollouts from the root, by something that reads entropies."""

    needs_entropies: ClassVar[bool] = True


@torch.no_grad()
def plain_entropies(
    model: PreTrainedModel, prefix: Sequence[int], tokens: Sequence[int], temperature: float
) -> npt.NDArray[np.float64]:
    """Of the distribution of each of `tokens` after `prefix`: one forward pass, no cache, in double precision."""
    logits = model(input_ids=torch.tensor([[*prefix, *tokens]]), use_cache=False).logits[0].double()
    logprobs = torch.log_softmax(logits[len(prefix) - 1 : -1] / (temperature or 1.0), dim=-1)
    found: npt.NDArray[np.float64] = -(logprobs.exp() * logprobs).sum(-1).numpy()
    return found


def varied_requests(count: int, *, seed: int = 0, siblings: bool = True) -> list[SampleRequest]:
    """Of many lengths and temperatures, some of one prefix; all ask for entropies."""
    rng = random.Random(seed)
    found: list[SampleRequest] = []
    for _ in range(count):
        prefix = [rng.randrange(len(TAGS)) for _ in range(rng.randint(1, 50))]
        if siblings and found and rng.random() < 0.4:
            prefix = list(rng.choice(found).prefix)
        temperature = rng.choice([1.0, 1.0, 0.7, 1.6, 0.0])
        found.append(SampleRequest(prefix, rng.getrandbits(64), temperature, rng.randint(1, 12), entropies=True))
    return found


def silent(requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    return [replace(request, entropies=False) for request in requests]


def rollouts(policy_folder: str, schedule: Schedule) -> list[tuple[SampleRequest, Completion]]:
    """Every action of two small trees of an agent on MiniWiki, with the prefix that it came after."""
    agent = load_agent(policy_folder, device="cpu")
    task = make_task("carl/MiniWiki-v0", questions=2)
    trees = collect(
        task, agent.policy, agent.transcript, list(task.questions.values()), CuriousExplorer(3), seed=1, step=0,
        schedule=schedule,
    )  # fmt: skip
    return [
        (SampleRequest(tree.prefix(node.parent), 0), node.action)
        for tree in trees
        for node in tree.nodes
        if node.parent is not None and node.action is not None
    ]


# The truth


@pytest.mark.parametrize("kind", KINDS)
def test_entropies_are_those_of_a_plain_forward_pass(kind: str) -> None:
    policy = TransformersPolicy(random_model(kind, VOCABULARY), TAGS, STOP_STRINGS, max_batch=8)
    requests = varied_requests(30)
    for request, completion in zip(requests, policy.sample(requests), strict=True):
        truth = plain_entropies(policy.model, request.prefix, completion.token_ids, request.temperature)
        np.testing.assert_allclose(completion.entropies, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", ["ticks", "async"])
def test_entropies_of_an_agents_rollouts_are_those_of_a_plain_forward_pass(
    tiny_agent_folder: object, schedule: Schedule
) -> None:
    model = load_agent(str(tiny_agent_folder), device="cpu").model
    assert model is not None
    edges = rollouts(str(tiny_agent_folder), schedule)
    assert len(edges) >= 6
    for request, completion in edges:
        truth = plain_entropies(model, request.prefix, completion.token_ids, 1.0)
        np.testing.assert_allclose(completion.entropies, truth, atol=1e-5, rtol=0)


def test_a_hand_made_chain_has_the_entropies_that_its_probabilities_say() -> None:
    # After token 1 come 2 and 3 with 1/4 and 3/4: H = 1/4 log 4 + 3/4 log 4/3 = .562335 nats; after 2 and 3 comes 1
    # for sure: H = 0. At temperature 1/2 the odds are squared, 1 to 9: H = .1 log 10 + .9 log 10/9 = .325083.
    # Greedy reports the untempered distribution.
    model = chain_model(VOCABULARY, {1: {2: 0.25, 3: 0.75}, 2: {1: 1.0}, 3: {1: 1.0}})
    policy = TransformersPolicy(model, TAGS, STOP_STRINGS, eos=set())
    requests = [SampleRequest([1], 5, temperature, 4, entropies=True) for temperature in (1.0, 0.5, 0.0)]
    for completion, expected in zip(policy.sample(requests), (0.562335, 0.325083, 0.562335), strict=True):
        np.testing.assert_allclose(completion.entropies, [expected, 0, expected, 0], atol=1e-5)


def test_an_impossible_token_adds_nothing() -> None:
    # Two tokens of probability 1/2 and the rest at a logit of minus infinity: H = log 2, and not NaN.
    logits = torch.full((1, 5), -math.inf)
    logits[0, 1:3] = 0.0
    _, _, (entropy,) = draw(logits, Temperatures([1.0], logits.device), np.array([0.3]), entropies=True)
    assert entropy == pytest.approx(math.log(2), abs=1e-6)


def test_the_expected_negative_log_prob_is_the_entropy() -> None:
    """E[-log p(a)] = H for one token: over draws of one prefix their mean is H, within its standard error."""
    policy = TransformersPolicy(random_model("llama-grouped", VOCABULARY), TAGS, STOP_STRINGS)
    requests = [SampleRequest([3, 1, 4, 1, 5], seed, max_tokens=1, entropies=True) for seed in range(4000)]
    completions = policy.sample(requests)
    (entropy,) = {completion.entropies for completion in completions}
    nll = np.array([-completion.logprobs[0] for completion in completions])
    assert entropy[0] > 0.5, "a distribution with something to measure"
    assert abs(nll.mean() - entropy[0]) < 4 * nll.std(ddof=1) / math.sqrt(len(nll))


# No change of what is sampled


@pytest.mark.parametrize("max_batch", [96, 5])
def test_what_is_sampled_is_bit_identical_with_and_without(max_batch: int) -> None:
    requests = varied_requests(40, seed=1)
    found = [
        TransformersPolicy(random_model("qwen2", VOCABULARY), TAGS, STOP_STRINGS, max_batch=max_batch).sample(asked)
        for asked in (requests, silent(requests))
    ]
    for with_entropies, without in zip(*found, strict=True):
        assert len(with_entropies.entropies) == len(with_entropies.token_ids)
        assert without.entropies == ()
        assert replace(with_entropies, entropies=()) == without


def test_only_those_get_entropies_that_asked_for_them() -> None:
    policy = TransformersPolicy(random_model("llama", VOCABULARY), TAGS, STOP_STRINGS)
    requests = varied_requests(20, seed=2)
    mixed = [replace(request, entropies=number % 3 == 0) for number, request in enumerate(requests)]
    whole = policy.sample(requests)
    for request, completion, reference in zip(mixed, policy.sample(mixed), whole, strict=True):
        assert len(completion.entropies) == (len(completion.token_ids) if request.entropies else 0)
        if request.entropies:
            np.testing.assert_allclose(completion.entropies, reference.entropies, atol=1e-5)


# Who asks


@pytest.mark.parametrize(("explorer", "asked"), [(RootExplorer(2), False), (CuriousExplorer(2), True)])
def test_a_tree_asks_for_entropies_when_its_explorer_needs_them(explorer: RootExplorer, asked: bool) -> None:
    policy = ToyPolicy(lambda request, rng: action(-1.0))
    collect(PathTask(2), policy, ByteTranscript(), questions(1), explorer, seed=0, step=0)
    assert {request.entropies for batch in policy.batches for request in batch} == {asked}


# Who cannot give them


def test_vllm_refuses_to_give_exact_entropies() -> None:
    request = SampleRequest([1, 2], 0, entropies=True)
    with pytest.raises(PolicyError, match=r"vLLM cannot give exact entropies.*transformers"):
        vllm_engine.sampling_parameters(request, STOP_STRINGS, [0])
    with pytest.raises(PolicyError, match="cannot give exact entropies"):
        vllm_engine.generate_payload(request, STOP_STRINGS, [0])
    assert vllm_engine.sampling_parameters(replace(request, entropies=False), STOP_STRINGS, [0])["max_tokens"] == 64


def test_a_hosted_model_refuses_to_give_exact_entropies() -> None:
    policy, transcript = openai_agent("m", function_schemas(("search", "answer")), base_url="http://127.0.0.1:9/v1")
    with policy, pytest.raises(PolicyError, match="cannot give exact entropies"):
        policy.sample([SampleRequest(transcript.prompt("Who?"), 0, entropies=True)])


def test_a_scripted_policy_has_the_entropy_of_its_choice_at_the_first_token(small_task: SearchTask) -> None:
    policy = RandomValidPolicy(small_task)
    state = small_task.initial(small_task.questions["q0"])
    (completion,) = policy.sample([SampleRequest([1], 0, state=state, entropies=True)])
    assert completion.entropies[0] == pytest.approx(math.log(len(policy.actions(state))))
    assert set(completion.entropies[1:]) == {0.0}
    assert policy.sample([SampleRequest([1], 0, state=state)])[0].entropies == ()
