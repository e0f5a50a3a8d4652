"""The expert of the warm start: perfect without noise, and with noise wrong in the ways that its noise names."""

from __future__ import annotations

import random

import pytest

from carl_gym.envs.miniwiki import World, generate
from carl_gym.envs.protocol import parse
from carl_gym.envs.registration import make_task
from carl_gym.envs.task import SearchTask
from carl_gym.training.expert import Noise, Trace, imitate

NONE = Noise(wrong_page=0, unnoticed=0, misread=0, early=0, bare_query=0, direct=0)


def world_and_task(seed: int, split: str, count: int) -> tuple[World, SearchTask]:
    settings = {"split": split, "questions": count, "hops": (2, 3, 4)}
    return generate(seed, **settings), make_task("carl/MiniWiki-v0", world=seed, **settings)


@pytest.fixture(scope="module")
def some() -> tuple[World, SearchTask]:
    return world_and_task(-1, "train", 200)


def play(some: tuple[World, SearchTask], noise: Noise, seed: int = 0) -> list[Trace]:
    world, task = some
    rng = random.Random(seed)
    return [imitate(task, world, question, noise, rng) for question in task.questions.values()]


def answers(trace: Trace) -> list[str]:
    parsed = [parse(action) for action in trace.actions]
    return [action.argument for action in parsed if action.kind == "answer"]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("seed", [0, 7])
def test_without_noise_it_answers_all_questions_by_one_search_and_one_access_per_hop(seed, split):
    world, task = world_and_task(seed, split, 200)
    for question in task.questions.values():
        trace = imitate(task, world, question, NONE, random.Random(0))
        hops = len(question.decomposition)
        assert [parse(action).kind for action in trace.actions] == ["search", "access"] * hops + ["answer"]
        assert answers(trace) == [question.answers[0]]
        assert trace.reward == pytest.approx(1.1)
        assert len(trace.actions) <= task.card.turns


def test_every_action_is_valid_whatever_the_noise(some):
    noisy = Noise(wrong_page=0.5, unnoticed=0.5, misread=0.5, early=0.3, bare_query=0.5, direct=0.5)
    for trace in [*play(some, Noise()), *play(some, noisy)]:
        assert all(parse(action).valid for action in trace.actions)
        assert all(action.startswith("<think> ") for action in trace.actions)


def test_a_trace_is_what_the_task_shows(some):
    _, task = some
    for trace, question in zip(play(some, Noise()), task.questions.values(), strict=True):
        state, reward = task.initial(question), 0.0
        for observation, action in zip(trace.observations, trace.actions, strict=True):
            assert observation == task.observation(state)
            after = task.transition(state, action)
            reward += task.reward(state, action, after)
            state = after
        assert task.terminal(state)
        assert trace.reward == reward


def test_the_default_noise_leaves_errors_in_the_traces_and_most_of_them_right(some):
    rewards = [trace.reward for trace in play(some, Noise())]
    right = sum(reward > 1 for reward in rewards) / len(rewards)
    assert 0.3 < right < 0.95


@pytest.mark.parametrize("name", ["wrong_page", "misread", "early"])
def test_each_error_alone_costs_reward_or_turns(some, name):
    noise = Noise(**{**{field: 0.0 for field in Noise.__slots__}, name: 1.0, "unnoticed": 1.0})
    clean, wrong = play(some, NONE), play(some, noise)
    assert sum(trace.reward for trace in wrong) < 0.8 * sum(trace.reward for trace in clean)


def test_giving_up_early_answers_with_the_first_hop(some):
    _, task = some
    for trace, question in zip(
        play(some, Noise(0, 0, 0, early=1, bare_query=0, direct=0)), task.questions.values(), strict=True
    ):
        assert answers(trace) == [question.decomposition[0].answer]


def test_a_wrong_page_that_is_noticed_is_followed_by_another_search(some):
    for trace in play(some, Noise(wrong_page=0.5, unnoticed=0, misread=0, early=0, bare_query=0, direct=0)):
        actions = [parse(action) for action in trace.actions]
        for action, following in zip(trace.actions, actions[1:], strict=False):
            if action.startswith("<think> Wrong page"):
                assert following.kind == "access"
        if answers(trace):
            assert trace.reward > 1


def test_direct_opens_pages_without_a_search(some):
    kinds = [parse(action).kind for trace in play(some, Noise(0, 0, 0, 0, 0, direct=1)) for action in trace.actions[:1]]
    assert set(kinds) == {"access"}


def test_bare_queries_search_the_name_alone(some):
    world, task = some
    traces = play(some, Noise(0, 0, 0, 0, bare_query=1, direct=0))
    for trace, question in zip(traces, task.questions.values(), strict=True):
        assert parse(trace.actions[0]).argument == world.pages[question.decomposition[0].title].name


def test_the_same_random_numbers_give_the_same_trace(some):
    assert play(some, Noise(), seed=4) == play(some, Noise(), seed=4) != play(some, Noise(), seed=5)
