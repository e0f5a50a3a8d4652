"""What holds for every registered environment: on data that the package brings, and on real data if there is some."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from carl_gym.envs.data import MINI
from carl_gym.envs.gym_env import SearchEnv
from carl_gym.envs.protocol import tool_call
from carl_gym.envs.registration import env_card
from carl_gym.envs.state import SCHEMA_VERSION, EnvState
from carl_gym.envs.task import SearchTask
from carl_gym.errors import StateError

IDS = [f"carl/{name}-v0" for name in (
    "HotpotQA", "2WikiMultihopQA", "MuSiQue", "Bamboogle", "NQ", "TriviaQA", "PopQA", "MiniWiki", "SearchQA",
)]  # fmt: skip
LONG = "carl/SearchQA-v0"


@pytest.fixture(scope="module", params=["brought", "real"])
def kwargs(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    """Arguments by id: the package's own data, or the real data of CARL_GYM_DATA."""
    files = {"questions": str(MINI / "questions.jsonl"), "corpus": str(MINI / "corpus.jsonl")}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="using the mini set")
        if request.param == "brought":
            patch.delenv("CARL_GYM_DATA", raising=False)
        else:
            root: Path = request.getfixturevalue("data_root")
            files = {
                "questions": str(root / "nq" / "questions.jsonl.gz"),
                "corpus": str(root / "nq" / "corpus.jsonl.gz"),
            }
        yield {LONG: files, "carl/MiniWiki-v0": {"questions": 40}}


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, int], gym.Env[Any, Any]]:
    """Environments that a test has made: every reset starts anew, so the next test can have them."""
    return {}


@pytest.fixture(params=IDS)
def env(
    request: pytest.FixtureRequest, kwargs: dict[str, dict[str, Any]], made: dict[tuple[str, int], gym.Env[Any, Any]]
) -> gym.Env[Any, Any]:
    key = (request.param, id(kwargs))
    if key not in made:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="using the mini set")
            made[key] = gym.make(request.param, **kwargs.get(request.param, {}))
    return made[key]


def anew(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Made once more, data and index included."""
    assert env.spec is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="using the mini set")
        return gym.make(env.spec)


def changed(env: gym.Env[Any, Any], **values: Any) -> SearchEnv:
    """The same data under another card."""
    task: SearchTask = env.unwrapped.task
    card = env_card(task.card, values)
    return SearchEnv(SearchTask(list(task.questions.values()), task.corpus, task.retriever, card, task.source))


def actions(core: SearchEnv, rng: random.Random) -> list[str]:
    """Every tool and something invalid, in tags and in JSON, on titles that exist; the answer comes last."""
    title = core.task.corpus[rng.choice(core.task.corpus.ids)].title
    word = next(iter(core.task.questions.values())).text
    steps = [
        f"<search>{word[:200]}</search>",
        f"<access>{title}</access>",
        "<read></read>",
        "no action at all",
        tool_call("search", query=title),
        tool_call("access", title="No such title, surely"),
        tool_call("read"),
    ]
    rng.shuffle(steps)
    return [*steps, "<answer>Ada</answer>"]


def test_these_are_all_the_ids() -> None:
    assert sorted(id for id in gym.registry if id.startswith("carl/")) == sorted([*IDS, "carl/CriticalTree-v0"])


def test_gymnasiums_checker_is_content(env: gym.Env[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="using the mini set")  # the checker makes a second one
        check_env(env.unwrapped, skip_render_check=True)


def test_the_source_and_the_label_tell_real_data_from_the_mini_set(env: gym.Env[Any, Any]) -> None:
    task, id = env.unwrapped.task, env.spec.id
    _, info = env.reset(seed=0)
    assert info["source"] == task.source == env.unwrapped.source
    assert task.is_mini == task.source.startswith("mini set (")
    assert task.label == (f"mini set in place of {id}" if task.is_mini else id)
    assert f"{len(task.questions)} questions" in task.source or id == "carl/MiniWiki-v0"


def test_an_episode_goes_on_from_every_state_in_a_new_environment(env: gym.Env[Any, Any]) -> None:
    rng = random.Random(5)
    for seed in range(3):
        steps = actions(env.unwrapped, rng)
        observation, info = env.reset(seed=seed)
        seen: list[tuple[EnvState, Any, Any]] = [(env.unwrapped.get_state(), observation, info)]
        results = []
        for action in steps:
            results.append(env.step(action))
            seen.append((env.unwrapped.get_state(), results[-1][0], results[-1][4]))
        kinds = {turn.action.kind for turn in seen[-1][0].turns}
        assert kinds >= {"search", "access", "answer", "invalid"} and seen[-1][0].status == "answered"
        assert ("read" in kinds) == ("read" in env.unwrapped.task.card.tools)
        other = anew(env) if seed == 0 else env
        for n, (state, observation, info) in enumerate(seen):
            for given in (state, state.to_json()):
                assert other.reset(options={"state": given}) == (observation, info)
                assert [other.step(action) for action in steps[n:]] == results[n:]


def test_states_stay_small_over_32_turns(env: gym.Env[Any, Any]) -> None:
    """Searches alone, each with a question of the data as its query: the most that an episode brings up."""
    env = changed(env, turns=32, top_k=5)
    env.reset(seed=1)
    asked = [question.text for question in env.unwrapped.task.questions.values()]
    for query in random.Random(0).choices(asked, k=32):
        env.step(tool_call("search", query=query[:512]))
    state = env.unwrapped.get_state()
    assert len(state.turns) == 32 and sum(len(turn.passage_ids) for turn in state.turns) >= 5 * 25
    assert len(state.to_json().encode()) < 8_000


def test_states_of_another_version_card_or_corpus_are_refused(env: gym.Env[Any, Any]) -> None:
    env.reset(seed=0)
    env.step("<search>river</search>")
    state = env.unwrapped.get_state()
    with pytest.raises(StateError, match="another card"):
        changed(env, turns=7).reset(options={"state": state})
    for change, what in ({"schema": SCHEMA_VERSION + 1}, "schema version"), ({"corpus": "0" * 32}, "corpus"):
        with pytest.raises(StateError, match=f"another {what}"):
            env.reset(options={"state": dataclasses.replace(state, **change)})
    text = json.loads(state.to_json()) | {"schema": 1}
    with pytest.raises(StateError):
        env.reset(options={"state": json.dumps(text)})
    assert env.reset(options={"state": state})[0].startswith("<information>")


def test_states_of_other_environments_are_refused(kwargs: dict[str, dict[str, Any]]) -> None:
    """Whether or not they share a corpus, as all do that the mini set stands in for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="using the mini set")
        envs = [gym.make(id, **kwargs.get(id, {})).unwrapped for id in ("carl/NQ-v0", "carl/PopQA-v0", LONG)]
    for env in envs:
        env.reset(seed=0)
        for other in envs:
            if other is not env:
                with pytest.raises(StateError, match=r"another (card|corpus)"):
                    other.reset(options={"state": env.get_state()})


def test_make_vec_gives_one_that_equals_single_environments(env: gym.Env[Any, Any]) -> None:
    from carl_gym.envs.vector_env import SearchVectorEnv

    given = {key: value for key, value in env.spec.kwargs.items() if key != "card"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="using the mini set")
        vector = gym.make_vec(env.spec.id, num_envs=3, **given)
    assert isinstance(vector.unwrapped, SearchVectorEnv)
    observations, _ = vector.reset(seed=11)
    singles = [SearchEnv(env.unwrapped.task) for _ in range(3)]
    assert tuple(observations) == tuple(single.reset(seed=11 + n)[0] for n, single in enumerate(singles))
    rng = random.Random(2)
    sequences = [actions(env.unwrapped, rng) for _ in singles]
    for step in zip(*sequences, strict=True):
        observations, rewards, terminations, truncations, infos = vector.step(step)
        expected = [single.step(action) for single, action in zip(singles, step, strict=True)]
        assert tuple(observations) == tuple(result[0] for result in expected)
        assert np.allclose(rewards, [result[1] for result in expected])
        assert list(zip(terminations, truncations, strict=True)) == [result[2:4] for result in expected]
        assert list(infos["turns"]) == [result[4]["turns"] for result in expected]
