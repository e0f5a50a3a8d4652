"""A state is a value: an episode that is restored anywhere goes on as if it had never stopped."""

import json
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from carl_gym.agents.policy import SampleRequest
from carl_gym.agents.scripted import RandomValidPolicy
from carl_gym.envs.gym_env import SearchEnv
from carl_gym.envs.state import EnvState

EPISODES = 200
MALFORMED = ["hello", "<search>never closed", "<answer> </answer>", "<think><search>a</search>", "\ud800 <", "x" * 5000]

Step = tuple[str, float, bool, bool, dict[str, Any]]


class Episode:
    """Actions, and the states and steps that they led to; `states[i]` is the state before action i."""

    def __init__(self, env: gym.Env, seed: int) -> None:
        core: SearchEnv = env.unwrapped
        policy, rng = RandomValidPolicy(core.task), random.Random(seed)
        env.reset(seed=seed)
        self.actions: list[str] = []
        self.states: list[EnvState] = [core.state]
        self.steps: list[Step] = []
        while not core.state.terminal:
            request = SampleRequest((), seed=rng.getrandbits(32), max_tokens=4096, state=core.state)
            action = rng.choice(MALFORMED) if rng.random() < 0.15 else policy.sample([request])[0].text
            self.actions.append(action)
            self.steps.append(env.step(action))
            self.states.append(core.state)


def make(env_id: str) -> gym.Env:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="using the mini set")
        return gym.make(env_id)


@pytest.fixture(scope="module", params=["carl/HotpotQA-v0", "carl/MiniWiki-v0"])
def recorded(request: pytest.FixtureRequest) -> tuple[str, list[Episode]]:
    env = make(request.param)
    return request.param, [Episode(env, seed) for seed in range(EPISODES)]


def test_random_episodes_cover_every_kind_of_turn_and_ending(recorded: tuple[str, list[Episode]]) -> None:
    _, episodes = recorded
    kinds = {turn.action.kind for episode in episodes for turn in episode.states[-1].turns}
    assert kinds == {"search", "access", "answer", "invalid"}
    assert {episode.states[-1].status for episode in episodes} == {"answered", "out_of_turns"}


def test_every_prefix_continues_in_a_new_environment_and_through_the_wrappers(
    recorded: tuple[str, list[Episode]],
) -> None:
    """A new shell per state, on data that was loaded anew; and one made by gym.make, restored again and again."""
    env_id, episodes = recorded
    made = make(env_id)
    assert made is not made.unwrapped
    for episode in episodes:
        for i in range(len(episode.actions)):
            for env in (SearchEnv(made.unwrapped.task), made):
                observation, info = env.reset(options={"state": episode.states[i]})
                if i > 0:
                    assert (observation, info) == (episode.steps[i - 1][0], episode.steps[i - 1][4])
                assert [env.step(action) for action in episode.actions[i:]] == episode.steps[i:]
                assert env.unwrapped.state == episode.states[-1]
            assert made.get_wrapper_attr("state") == episode.states[-1]


def test_every_terminal_state_is_restored_as_over(recorded: tuple[str, list[Episode]]) -> None:
    env_id, episodes = recorded
    env = make(env_id)
    for episode in episodes:
        assert env.reset(options={"state": episode.states[-1]}) == (episode.steps[-1][0], episode.steps[-1][4])
        assert env.unwrapped.task.terminal(env.unwrapped.state)


CHILD = """
import json, pickle, sys, warnings
warnings.filterwarnings("ignore", message="using the mini set")
import gymnasium as gym
import carl_gym

env_id, jobs, results = sys.argv[1:]
env = gym.make(env_id)
with open(jobs, "rb") as file:
    jobs = pickle.load(file)
found = []
for pickled, text, actions in jobs:
    for state in (pickle.loads(pickled), text):
        reset = env.reset(options={"state": state})
        found.append((reset, [env.step(action) for action in actions], env.unwrapped.state.to_json()))
with open(results, "wb") as file:
    pickle.dump(found, file)
"""


def test_every_prefix_continues_in_a_new_process_from_pickle_and_from_json(
    recorded: tuple[str, list[Episode]], tmp_path: Path
) -> None:
    """One new process takes every state of every episode, as bytes and as text: no object travels."""
    env_id, episodes = recorded
    prefixes = [(episode, i) for episode in episodes for i in range(len(episode.actions))]
    jobs = [(pickle.dumps(e.states[i]), e.states[i].to_json(), e.actions[i:]) for e, i in prefixes]
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    arguments = [env_id, str(tmp_path / "jobs"), str(tmp_path / "results")]
    subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, cwd=Path(__file__).parent.parent)
    results = iter(pickle.loads((tmp_path / "results").read_bytes()))
    for episode, i in prefixes:
        for _ in ("pickle", "json"):
            (observation, info), steps, final = next(results)
            if i > 0:
                assert (observation, info) == (episode.steps[i - 1][0], episode.steps[i - 1][4])
            assert steps == episode.steps[i:]
            assert EnvState.from_json(final) == episode.states[-1]
    assert next(results, None) is None


def test_forks_and_plain_states_continue_alike(recorded: tuple[str, list[Episode]]) -> None:
    env_id, episodes = recorded
    env = make(env_id).unwrapped
    for episode in episodes[:50]:
        middle = len(episode.actions) // 2
        env.reset(options={"state": episode.states[middle]})
        for fork in env.fork(2):
            assert [fork.step(action) for action in episode.actions[middle:]] == episode.steps[middle:]
        assert env.state == episode.states[middle]


def test_states_are_small_plain_data(recorded: tuple[str, list[Episode]]) -> None:
    """A few kB at most, and no text of a passage in them."""
    _, episodes = recorded
    for episode in episodes:
        text = episode.states[-1].to_json()
        assert len(text) < 8_000
        assert EnvState.from_json(text) == episode.states[-1] == pickle.loads(pickle.dumps(episode.states[-1]))
        assert set(json.loads(text)) == {"question_id", "turns", "status", "card", "corpus", "schema"}
