"""A curriculum moves on when answers are right, and its states know their stage."""

from __future__ import annotations

import json
import random

import pytest

import carl_gym
from carl_gym.envs.curriculum import MINIWIKI_STAGES, Curriculum, make_curriculum
from carl_gym.envs.wrappers import TokenBudget
from carl_gym.errors import ConfigError, StateError

STAGES = [{"world": 0, "hops": (2,)}, {"world": 1, "hops": (2, 3)}, {"world": 2, "hops": (4,)}]


@pytest.fixture(scope="module")
def tasks() -> list[carl_gym.envs.task.SearchTask]:
    return [carl_gym.make_task("carl/MiniWiki-v0", questions=15, **stage) for stage in STAGES]


def episode(env: Curriculum, right: bool, *before: str) -> int:
    """Play one; return the stage that it was of."""
    _, info = env.reset()
    for action in before:
        env.step(action)
    answer = env.task.questions[info["question_id"]].answers[0] if right else "x"
    return env.step(f"<answer>{answer}</answer>")[-1]["stage"]


def test_it_moves_on_when_enough_of_the_last_episodes_were_right(tasks: list) -> None:
    env = Curriculum(tasks, threshold=0.75, window=4)
    outcomes = [True, False, False, True, True, True] + [True] * 4 + [True] * 8
    stages = [episode(env, right) for right in outcomes]
    # The last four of the first six are 3/4 right; four more right ones finish stage 1; stage 2 is the last.
    assert stages == [0] * 6 + [1] * 4 + [2] * 8
    assert env.stage == 2 and env.source.startswith("MiniWiki world 2")


def test_a_state_restores_into_its_stage(tasks: list) -> None:
    env = Curriculum(tasks, threshold=1, window=1)
    env.reset(seed=0)
    first = env.get_state()
    assert first.extra("stage") == 0
    episode(env, True)
    assert env.stage == 1
    _, info = env.reset(seed=1)
    second = env.get_state()
    assert info["stage"] == 1 and second.corpus != first.corpus
    for state, stage in ((first, 0), (second.to_json(), 1), (first.to_json(), 0)):
        observation, info = env.reset(options={"state": state})
        assert info["stage"] == stage and env.task is tasks[stage] and env.stage == 1
        assert observation == tasks[stage].observation(env.state)
        assert env.step("<search>film</search>")[-1]["stage"] == stage
    fork = env.fork(1)[0]
    assert fork.state == env.state and fork.step("<answer>x</answer>") == env.step("<answer>x</answer>")
    assert env.reset()[1]["stage"] == 1  # new episodes are of the current stage


def test_interrupted_and_uninterrupted_runs_advance_alike(tasks: list) -> None:
    rng = random.Random(0)
    through, stored = (Curriculum(tasks, threshold=0.7, window=3) for _ in range(2))
    stages = []
    for n in range(40):
        seed = {"seed": 0} if n == 0 else {}
        assert through.reset(**seed) == stored.reset(**seed)
        question = through.task.questions[through.state.question_id]
        last = question.answers[0] if rng.random() < 0.6 else "x"
        for action in ("<search>film</search>", "hm", f"<answer>{last}</answer>"):
            if rng.random() < 0.5:
                stored.reset(options={"state": stored.get_state().to_json()})
            step = through.step(action)
            assert stored.step(action) == step
        stages.append(step[-1]["stage"])
    assert stages == sorted(stages) and stages[-1] == 2 and through.progress == stored.progress


def test_episodes_that_a_token_budget_ends_count_as_wrong(tasks: list) -> None:
    core = Curriculum(tasks, threshold=0.5, window=2)
    env = TokenBudget(core, 400, len)
    for right in (True, False):
        _, info = env.reset()
        if right:
            env.step(f"<answer>{core.task.questions[info['question_id']].answers[0]}</answer>")
        else:
            truncated = False
            while not truncated:
                assert core.progress == {"stage": 0, "recent": [1.0]}
                _, _, _, truncated, info = env.step("<search>film</search>")
            assert info["turns_left"] > 0 and core.get_state().status == "running"
    assert core.progress == {"stage": 1, "recent": []}  # half of the last two were right


def test_a_fork_counts_for_itself(tasks: list) -> None:
    env = Curriculum(tasks, threshold=1, window=1)
    env.reset(seed=0)
    fork = env.fork(1)[0]
    answer = env.task.questions[env.state.question_id].answers[0]
    fork.step(f"<answer>{answer}</answer>")
    assert (fork.stage, env.stage) == (1, 0)


def test_progress_is_kept_with_a_checkpoint(tasks: list) -> None:
    env, other = (Curriculum(tasks, threshold=1, window=3) for _ in range(2))
    for _ in range(5):
        episode(env, True)
    kept = json.loads(json.dumps(env.progress))
    assert kept == {"stage": 1, "recent": [1.0, 1.0]}
    other.set_progress(kept)
    assert episode(other, True) == 1 and other.stage == 2
    for wrong in ({}, {"stage": 3, "recent": []}, {"stage": -1, "recent": []}, {"stage": 0}):
        with pytest.raises(ConfigError, match="progress"):
            other.set_progress(wrong)


def test_episodes_of_earlier_stages_do_not_count(tasks: list) -> None:
    env = Curriculum(tasks, threshold=1, window=2)
    env.reset(seed=0)
    early = env.get_state()
    episode(env, True), episode(env, True)
    assert env.stage == 1
    for _ in range(3):
        env.reset(options={"state": early})
        env.step(f"<answer>{tasks[0].questions[early.question_id].answers[0]}</answer>")
    assert env.progress == {"stage": 1, "recent": []}


def test_sequential_order_begins_each_stage_with_its_first_question(tasks: list) -> None:
    env = Curriculum(tasks, threshold=1, window=2, order="sequential")
    ids = [list(task.questions) for task in tasks]
    seen = []
    for right in (True, True, False, False):
        episode(env, right)
        seen.append(env.state.question_id)
    assert seen == [*ids[0][:2], *ids[1][:2]]


def test_miniwikis_own_stages_get_harder() -> None:
    env = make_curriculum(questions=60, window=1, threshold=1)
    assert len(env.stages) == len(MINIWIKI_STAGES) and len({task.corpus.fingerprint for task in env.stages}) == 4
    hops = [max(len(q.decomposition) for q in task.questions.values()) for task in env.stages]
    assert hops[0] == 2 and hops[-1] == 4
    assert all(episode(env, True) == stage for stage in (0, 1, 2, 3, 3))


def test_misuse_is_refused(tasks: list) -> None:
    for arguments in ({"threshold": 0.0}, {"threshold": 1.1}, {"window": 0}):
        with pytest.raises(ConfigError, match="threshold"):
            Curriculum(tasks, **arguments)
    with pytest.raises(ConfigError, match="at least one stage"):
        Curriculum([])
    other = carl_gym.make_task("carl/MiniWiki-v0", questions=10, tools=("search", "answer"))
    with pytest.raises(ConfigError, match="stage 1 has other action"):
        Curriculum([tasks[0], other])
    env = Curriculum(tasks)
    env.reset(seed=0)
    before = env.state
    plain = tasks[0].initial(next(iter(tasks[0].questions.values())))
    for state in (plain, before.with_extra("stage", 3), before.with_extra("stage", 1), "{}", 3):
        with pytest.raises(StateError):
            env.reset(options={"state": state})
    with pytest.raises(ConfigError, match="has no question 'odd'"):
        env.reset(options={"question_id": "odd"})
    assert env.state is before and env.task is tasks[0]
