"""The baseline that our speed is measured against does the same work: same actions, same loss, same gradient."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from model_toys import byte_fallback_tokenizer, chain_model, plain_logprobs, spell, tag_tokenizer

from benchmarks.naive import GeneratePolicy, NaiveLearner, NaiveTrainer, leaf_rows
from carl_gym.agents.agent import Agent, load_agent
from carl_gym.agents.policy import SampleRequest
from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.envs.registration import make_task
from carl_gym.errors import PolicyError
from carl_gym.rollouts import collect
from carl_gym.training.config import TrainConfig
from carl_gym.training.learner import Learner
from carl_gym.training.segments import rows, segments

ENDS = ("</search>", "</access>", "</answer>")
SETTINGS = {"carl": {"initial": 2, "forks": 5}, "carl-lite": {"forks": 6}, "grpo": {"rollouts": 4}}


def naive_policy(agent: Agent, **changes: int) -> GeneratePolicy:
    return GeneratePolicy(agent.model, agent.tokenizer, ENDS, **changes)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_a_plain_forward_pass(tiny_agent: Agent, temperature: float):
    task = make_task("carl/MiniWiki-v0", questions=5)
    prompts = [tiny_agent.transcript.prompt(task.observation(task.initial(q))) for q in task.questions.values()]
    assert len({len(prompt) for prompt in prompts}) > 1  # so there is padding
    requests = [SampleRequest(prompt, seed=3, temperature=temperature, max_tokens=12) for prompt in prompts]
    for request, done in zip(requests, naive_policy(tiny_agent, max_batch=3).sample(requests), strict=True):
        expected = plain_logprobs(tiny_agent.model, request.prefix, done.token_ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(done.logprobs), expected.float(), atol=1e-5, rtol=0)


def test_greedy_actions_are_our_policy_s(tiny_agent: Agent):
    task = make_task("carl/MiniWiki-v0", questions=6)
    prompts = [tiny_agent.transcript.prompt(task.observation(task.initial(q))) for q in task.questions.values()]
    requests = [SampleRequest(prompt, seed=0, temperature=0.0, max_tokens=24) for prompt in prompts]
    naive, ours = naive_policy(tiny_agent).sample(requests), tiny_agent.policy.sample(requests)
    assert [(a.token_ids, a.text, a.finish_reason) for a in naive] == [
        (a.token_ids, a.text, a.finish_reason) for a in ours
    ]
    assert {a.finish_reason for a in naive} & {"stop", "length"}


def test_an_action_ends_after_its_closing_tag():
    tokenizer = tag_tokenizer()
    ids = tokenizer.encode("x<search>a b</search>", add_special_tokens=False)
    policy = GeneratePolicy(chain_model(len(tokenizer), spell([*ids, ids[0]])), tokenizer, ENDS)
    (done,) = policy.sample([SampleRequest(ids[:1], seed=0, max_tokens=40)])
    assert (done.text, done.finish_reason, done.token_ids) == ("<search>a b</search>", "stop", tuple(ids[1:]))


def test_tags_of_several_tokens_are_refused(tiny_agent: Agent):
    with pytest.raises(PolicyError, match="no token for"):
        GeneratePolicy(tiny_agent.model, byte_fallback_tokenizer(), ENDS)


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_gradient_and_step_are_our_learner_s(tiny_agent: Agent, name: str):
    task = make_task("carl/MiniWiki-v0", questions=4)
    algorithm = get_algorithm(name, **SETTINGS[name])
    trees = collect(
        task, naive_policy(tiny_agent), tiny_agent.transcript, list(task.questions.values()), algorithm.explorer,
        seed=1, step=1,
    )  # fmt: skip
    credit, selected = algorithm.credit(trees), algorithm.selection(trees)
    parts = list(zip(trees, credit, token_weights(trees, selected, algorithm.loss_reduction), strict=True))
    settings = {"learning_rate": 1e-3, "max_grad_norm": 1e9, "batch_tokens": 1500}
    ours = Learner(copy.deepcopy(tiny_agent.model), **settings)
    naive = NaiveLearner(copy.deepcopy(tiny_agent.model), **settings)

    full = [row for part in parts for row in leaf_rows(*part)]
    assert len(full) == sum(len(tree.leaves()) for tree in trees)
    assert sum(float(row.weights.sum()) for row in full) == pytest.approx(1)
    low, high = algorithm.clip_low, algorithm.clip_high
    metrics = ours.update([row for part in parts for row in rows(segments(*part))], low, high)
    loss = naive.update(full, low, high)

    assert metrics is not None and metrics.grad_norm > 0
    assert loss == pytest.approx(metrics.loss, abs=1e-6)
    pairs = list(zip(ours.model.parameters(), naive.model.parameters(), strict=True))
    difference = torch.stack([(one.grad - two.grad).norm() for one, two in pairs]).norm()
    assert difference <= 1e-5 * metrics.grad_norm
    for one, two in pairs:
        sure = one.grad.abs() > 1e-6  # AdamW's first step divides the gradient by its size + 1e-8
        assert torch.allclose(one[sure], two[sure], atol=1e-6)


def test_nothing_selected_is_no_step(tiny_agent_folder: Path):
    agent = load_agent(str(tiny_agent_folder), device="cpu")
    learner = NaiveLearner(agent.model, learning_rate=1.0)
    before = [parameter.clone() for parameter in agent.model.parameters()]
    assert learner.update([], 0.2, 0.2) == 0
    assert all(torch.equal(one, two) for one, two in zip(before, agent.model.parameters(), strict=True))


def test_a_step_takes_the_trainer_s_questions_and_trains(tiny_agent_folder: Path, tmp_path: Path):
    config = TrainConfig(
        agent=str(tiny_agent_folder), forks=2, questions_per_step=3, train_questions=8, eval_questions=0, device="cpu",
        output_dir=tmp_path / "unused",
    )  # fmt: skip
    trainer = NaiveTrainer(config)
    before = [parameter.clone() for parameter in trainer.learner.model.parameters()]
    metrics = trainer.step(1)
    assert metrics["rollout/actions_generated"] >= 9
    assert metrics["time/sample"] + metrics["time/environment"] <= metrics["time/rollout"]
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.learner.model.parameters(), strict=True))
    assert not config.output_dir.exists()
