"""The vector environment against N single environments and against Gymnasium's own, step by step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

import carl_gym
from carl_gym.envs.gym_env import SearchEnv
from carl_gym.envs.registration import make_vector_env
from carl_gym.envs.state import Question
from carl_gym.envs.task import SearchTask
from carl_gym.envs.vector_env import SearchVectorEnv, batch_infos, make_async
from carl_gym.errors import ActionError, ConfigError, RetrievalError, StateError
from carl_gym.retrieval.retriever import SearchResults

FORMS = ("text", "messages", "dict")
TOOLS = ("search", "access", "read", "answer")
ACTIONS = (
    "<search>Ada Lovelace</search>",
    "<search>zebra</search>",
    "<access>Ada Lovelace</access>",
    "<access>nothing</access>",
    "<read></read>",
    '{"name": "search", "arguments": {"query": "Charles Babbage"}}',
    "<think>hm",
    "no action at all",
    "<answer>Ada Lovelace</answer>",
)


@pytest.fixture(scope="module")
def task() -> SearchTask:
    """MiniWiki with small pages, all tools and a few turns; one question names no supporting titles."""
    task = carl_gym.make_task("carl/MiniWiki-v0", questions=12, turns=4, page_length=80, tools=TOOLS)
    questions = [*task.questions.values(), Question("plain", "Who is Ada Lovelace?", ("Ada Lovelace",))]
    return SearchTask(questions, task.corpus, task.retriever, task.card, task.source)


def equal(one: object, other: object) -> bool:
    """Gymnasium's comparison of nested data; NaN equals NaN."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f") if one.dtype != object else all(
            equal(*pair) for pair in zip(one.tolist(), other.tolist(), strict=True)
        )  # fmt: skip
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return data_equivalence(one, other)


def stock(task: SearchTask, n: int, form: str, mode: AutoresetMode = AutoresetMode.DISABLED) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: SearchEnv(task, observation=form)] * n, autoreset_mode=mode)


def states_of(env: SyncVectorEnv) -> list[Any]:
    return [single.unwrapped.get_state() for single in env.envs]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_it_equals_stock_vector_environments_and_single_ones_step_by_step(
    task: SearchTask, form: str, data: st.DataObject
) -> None:
    """Random actions, random masks, random restores: observations, rewards, flags, infos and states are the same."""
    n = data.draw(st.integers(1, 5), "num_envs")
    ours, theirs = SearchVectorEnv(task, n, observation=form), stock(task, n, form)
    singles = [SearchEnv(task, observation=form) for _ in range(n)]
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    seed = data.draw(st.one_of(st.integers(0, 99), st.lists(st.integers(0, 99), min_size=n, max_size=n)), "seed")
    assert equal(ours.reset(seed=seed), theirs.reset(seed=seed))
    for i, single in enumerate(singles):
        single.reset(seed=seed + i if isinstance(seed, int) else seed[i])
    assert ours.np_random_seed == theirs.np_random_seed
    over = np.zeros(n, dtype=np.bool_)
    for _ in range(data.draw(st.integers(1, 10), "steps")):
        mask = over | np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n), "mask"))
        if over.any() or (mask.any() and data.draw(st.booleans(), "reset early")):
            options: dict[str, Any] = {"reset_mask": mask}
            if data.draw(st.booleans(), "named"):
                options["question_id"] = data.draw(st.sampled_from(sorted(task.questions)), "question")
            got = ours.reset(options=options)
            assert "reset_mask" in options  # the caller's dict is left alone
            assert equal(got, theirs.reset(options=dict(options)))
            options.pop("reset_mask")
            for i in np.flatnonzero(mask):
                singles[i].reset(options=dict(options))
        actions = data.draw(st.lists(st.sampled_from(ACTIONS), min_size=n, max_size=n), "actions")
        got = ours.step(actions)
        assert equal(got, theirs.step(tuple(actions)))
        steps = [single.step(action) for single, action in zip(singles, actions, strict=True)]
        assert got[1].tolist() == [step[1] for step in steps]
        assert got[2].tolist() == [step[2] for step in steps] and got[3].tolist() == [step[3] for step in steps]
        if form != "dict":
            assert got[0] == tuple(step[0] for step in steps)
        assert ours.get_state() == states_of(theirs) == [single.get_state() for single in singles]
        over = got[2] | got[3]


@pytest.mark.parametrize("form", FORMS)
def test_episodes_replaced_in_the_same_step_equal_the_stock_ones(task: SearchTask, form: str) -> None:
    ours = SearchVectorEnv(task, 3, observation=form, autoreset="same_step")
    theirs = stock(task, 3, form, AutoresetMode.SAME_STEP)
    assert ours.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert equal(ours.reset(seed=1), theirs.reset(seed=1))
    rng, finals = np.random.default_rng(0), 0
    for _ in range(40):
        actions = rng.choice(ACTIONS, size=3).tolist()
        got = ours.step(actions)
        assert equal(got, theirs.step(tuple(actions)))
        finals += "final_info" in got[4]
    assert finals > 5


def test_infos_are_those_that_gymnasium_would_have_put_together() -> None:
    infos: list[dict[str, Any]] = [
        {"a": 1, "b": "x", "c": None, "d": {"e": 0.5}, "f": 1.0, "final_obs": ({"role": "user"},)},
        {"a": 2, "b": "y", "c": 0.5, "d": {"e": None, "g": [1]}, "f": None},
        {"a": 3, "h": True},
    ]
    reference = VectorEnv()
    reference.num_envs = 4
    expected: dict[str, Any] = {}
    for i, info in zip((0, 1, 3), infos, strict=True):
        expected = reference._add_info(expected, info, i)
    batch = batch_infos(dict(zip((0, 1, 3), infos, strict=True)), 4)
    assert equal(batch, expected)
    assert np.isnan(batch["f"][1]) and batch["_f"].tolist() == [True, True, False, False]


class Counting:
    """A retriever that counts its calls, and fails when told to."""

    def __init__(self, task: SearchTask) -> None:
        self.retriever = task.retriever
        self.calls = 0
        self.broken = False

    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        self.calls += 1
        if self.broken:
            raise RetrievalError("down")
        return self.retriever.search(queries, k)


@pytest.fixture
def counted(task: SearchTask) -> SearchTask:
    questions = list(task.questions.values())
    return SearchTask(questions, task.corpus, Counting(task), task.card, task.source)  # type: ignore[arg-type]


def test_a_step_is_one_retrieval_call(counted: SearchTask) -> None:
    env = SearchVectorEnv(counted, 6)
    env.reset(seed=0)
    env.step(["<search>film</search>"] * 5 + ["<access>x</access>"])
    assert counted.retriever.calls == 1  # type: ignore[attr-defined]


def test_after_a_failed_search_all_episodes_are_where_they_were(counted: SearchTask) -> None:
    env = SearchVectorEnv(counted, 2)
    env.reset(seed=0)
    before = env.get_state()
    counted.retriever.broken = True  # type: ignore[attr-defined]
    with pytest.raises(RetrievalError, match="down"):
        env.step(["<answer>x</answer>", "<search>a</search>"])
    assert env.get_state() == before
    counted.retriever.broken = False  # type: ignore[attr-defined]
    env.step(["<answer>x</answer>", "<search>a</search>"])


def test_terminal_infos_are_kept_and_acting_after_the_end_is_refused(task: SearchTask) -> None:
    env = SearchVectorEnv(task, 3)
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    _, infos = env.reset(seed=0)
    answers = [task.questions[id].answers[0] for id in infos["question_id"]]
    _, rewards, terminations, truncations, infos = env.step(
        [f"<answer>{answers[0]}</answer>", "hm", f"<answer>{answers[2]}</answer>"]
    )
    assert terminations.tolist() == [True, False, True] and not truncations.any()
    assert infos["em"].tolist() == [1.0, 0.0, 1.0] and rewards.tolist() == pytest.approx([1.1, 0.0, 1.1])
    with pytest.raises(StateError, match=r"sub-environments \[0, 2\] are over.*reset_mask"):
        env.step(["hm"] * 3)
    states = env.get_state()
    observations, infos = env.reset(options={"reset_mask": terminations})
    assert env.get_state([1]) == states[1:2] and infos["_turns"].tolist() == [True, False, True]
    assert observations[1] == task.observation(states[1])  # given once more
    env.step(["hm"] * 3)


def test_states_are_read_and_put_back_for_all_or_for_some(task: SearchTask) -> None:
    env = SearchVectorEnv(task, 3)
    env.reset(seed=0)
    env.step(["<search>film</search>", "hm", "<answer>x</answer>"])
    states = env.get_state()
    other = SearchVectorEnv(task, 3)
    other.set_state([state.to_json() for state in states])
    assert other.get_state() == states
    other.set_state([states[2], states[1]], indices=[0, 2])
    assert other.get_state() == [states[2], states[1], states[1]]
    with pytest.raises(StateError, match=r"\[0\] are over"):
        other.step(["hm"] * 3)
    observations, infos = other.reset(options={"states": [states[0], None, states[1]]})
    assert other.get_state([0, 2]) == states[:2] and other.get_state([1])[0].turns == ()
    assert observations[0] == task.observation(states[0])
    assert infos["turns"].tolist() == [1, 0, 1]
    assert infos["parsed_action"]["kind"].tolist() == ["search", "none", "invalid"]


def test_question_ids_name_the_questions(task: SearchTask) -> None:
    env, ids = SearchVectorEnv(task, 3), list(task.questions)
    _, infos = env.reset(options={"question_ids": [ids[3], ids[3], ids[1]]})
    assert infos["question_id"].tolist() == [ids[3], ids[3], ids[1]]
    _, infos = env.reset(options={"question_ids": [ids[5], None, ids[0]], "reset_mask": np.array([True, False, False])})
    assert [state.question_id for state in env.get_state()] == [ids[5], ids[3], ids[1]]


def test_in_sequential_order_the_sub_environments_go_through_all_questions_together(task: SearchTask) -> None:
    env, ids = SearchVectorEnv(task, 2, order="sequential"), list(task.questions)

    def questions() -> list[str]:
        return [state.question_id for state in env.get_state()]

    env.reset(seed=0)
    assert questions() == ids[:2]
    env.reset(options={"reset_mask": np.array([False, True])})
    assert questions() == [ids[0], ids[2]]
    env.reset()
    assert questions() == ids[3:5]
    env.reset(options={"question_id": ids[0]})
    env.reset()
    assert questions() == ids[5:7]
    env.reset(seed=0)
    assert questions() == ids[:2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"question": 1}, ConfigError, "unknown option 'question'"),
        ({"question_ids": ["q"]}, ConfigError, "'question_ids' needs a list with an entry for each of 2"),
        ({"question_ids": "ab"}, ConfigError, "'question_ids' needs a list"),
        ({"question_ids": [None, "odd"]}, ConfigError, "has no question 'odd'"),
        ({"states": [None, "{}"]}, StateError, "not a carl_gym state"),
        ({"question_id": "a", "state": "b"}, ConfigError, "one of 'question_id', 'state'"),
        ({"reset_mask": [True, False]}, ConfigError, r"reset_mask is list; expected a numpy array bool\[2\]"),
        ({"reset_mask": np.array([1, 0])}, ConfigError, r"int64\[2\]"),
        ({"reset_mask": np.array([True])}, ConfigError, r"bool\[1\]"),
        ({"reset_mask": np.array([False, False])}, ConfigError, "selects no sub-environment"),
    ],
)
def test_resets_that_make_no_sense_change_nothing(
    task: SearchTask, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    env = SearchVectorEnv(task, 2)
    env.reset(seed=0)
    before, generators = env.get_state(), [generator.bit_generator.state for generator in env.np_random]
    with pytest.raises(error, match=message):
        env.reset(seed=4, options=options)
    assert env.get_state() == before
    assert [generator.bit_generator.state for generator in env.np_random] == generators


def test_numpys_whole_numbers_are_seeds_and_indices(task: SearchTask) -> None:
    env, other = SearchVectorEnv(task, 2), SearchVectorEnv(task, 2)
    for seed, same in ((np.int64(5), 5), (np.array([3, 4]), [3, 4]), ([np.int32(1), None], [1, None])):
        env.reset(seed=seed)  # type: ignore[arg-type]
        other.reset(seed=same)  # type: ignore[arg-type]
        assert env.get_state()[0] == other.get_state()[0] and env.np_random_seed[0] == other.np_random_seed[0]
    env.set_state(other.get_state(np.array([1, 0])), np.array([1, 0]))  # type: ignore[arg-type]
    assert env.get_state() == other.get_state()


def test_misuse_is_refused(task: SearchTask) -> None:
    env = SearchVectorEnv(task, 2)
    with pytest.raises(StateError, match="sub-environment 0 has no state yet"):
        env.step(["a", "b"])
    with pytest.raises(StateError, match="sub-environment 1 has no state yet"):
        env.reset(options={"reset_mask": np.array([True, False])})
    for seed in ([1], "12", [0, "1"], [0, -1], -3, 1.5, object()):
        with pytest.raises(ConfigError, match="seed = "):
            env.reset(seed=seed)  # type: ignore[arg-type]
    env.reset(seed=0)
    for actions, message in (
        ("ab", "one str as actions"),
        (None, "one NoneType as actions"),
        (["a"], "1 as actions"),
        (["a", 3], "not int"),
        (["a", None], "not NoneType"),
    ):
        with pytest.raises(ActionError, match=message):
            env.step(actions)  # type: ignore[arg-type]
    state = env.get_state()[0]
    for states, indices in (
        ([state], None),
        ([state, state], [0, 0]),
        ([state], [2]),
        ([state], [-1]),
        ([state], ["0"]),
    ):
        with pytest.raises(ConfigError, match="set_state"):
            env.set_state(states, indices)  # type: ignore[arg-type]
    for indices in ([2], [-1], [0.0], "0", 0):
        with pytest.raises(ConfigError, match="get_state"):
            env.get_state(indices)  # type: ignore[arg-type]
    for arguments in ({"num_envs": 0}, {"autoreset": "next_step"}, {"render_mode": "human"}, {"order": "odd"}):
        with pytest.raises(ConfigError):
            SearchVectorEnv(task, **{"num_envs": 2, **arguments})  # type: ignore[arg-type]


def test_rendering_gives_a_text_for_each(task: SearchTask) -> None:
    env = SearchVectorEnv(task, 2, render_mode="ansi")
    env.reset(seed=0)
    env.step(["<search>film</search>", "hm"])
    one, two = env.render()
    assert "1. search film" in one and "1. invalid action (no_action)" in two


def test_make_vec_gives_this_environment_and_the_stock_ones_work() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make_vec("carl/MiniWiki-v0", num_envs=2, questions=12, observation="messages")
        assert isinstance(env.unwrapped, SearchVectorEnv) and env.num_envs == 2
        assert isinstance(make_vector_env("carl/MiniWiki-v0", 3, questions=12), SearchVectorEnv)
        sync = gym.make_vec(
            "carl/MiniWiki-v0",
            num_envs=2,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
            questions=12,
            observation="messages",
        )
        assert equal(env.reset(seed=3), sync.reset(seed=3))
        actions = ("<search>film</search>", "<answer>x</answer>")
        assert equal(env.step(actions), sync.step(actions))


def test_stock_environments_that_replace_episodes_in_the_next_step_work_too(task: SearchTask) -> None:
    """Gymnasium's default mode puts infos of resets and of steps into one batch."""
    env = stock(task, 2, "text", AutoresetMode.NEXT_STEP)
    env.reset(seed=0)
    env.step(("<answer>x</answer>", "hm"))
    for _ in range(2):
        infos = env.step(("hm", "<answer>x</answer>"))[-1]
    assert infos["parsed_action"]["kind"].tolist() == ["invalid", "none"]


def test_processes_of_an_async_environment_do_the_same() -> None:
    kwargs = {"questions": 12}
    env = make_async("carl/MiniWiki-v0", 2, **kwargs)
    try:
        ours = gym.make_vec("carl/MiniWiki-v0", num_envs=2, **kwargs)
        assert equal(env.reset(seed=3), ours.reset(seed=3))
        for actions in (("<search>film</search>", "hm"), ("<access>x</access>", "<answer>東京 \ud800</answer>")):
            assert equal(env.step(actions), ours.step(actions))
        mask = np.array([False, True])
        assert equal(env.reset(options={"reset_mask": mask}), ours.reset(options={"reset_mask": mask}))
        state = ours.get_state()[0]
        observations, _ = env.reset(options={"state": state})
        assert observations == (ours.task.observation(state),) * 2
        assert env.call("get_state") == (state, state)
    finally:
        env.close()
