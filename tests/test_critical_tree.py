"""The exact test bench: the environment, and what enumeration says about a tabular policy on it."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from carl_gym.agents.policy import SampleRequest
from carl_gym.agents.tabular import (
    SymbolTranscript,
    TabularPolicy,
    TokenTable,
    backward,
    enumerate_mdp,
    prefix_code,
    softmax,
    solve,
    symbol,
)
from carl_gym.envs.critical_tree import OPTIONS, STOP, CriticalTask, CriticalTreeEnv, CriticalTreeSettings
from carl_gym.envs.state import EnvState, ParsedAction, Turn
from carl_gym.errors import ActionError, ConfigError, PolicyError, StateError
from carl_gym.rollouts import EntropyForking, RootExplorer, collect

SMALL = CriticalTreeSettings(turns=4, options=3, critical=(2, 4), stake=0.8, slips=0.5, slip_cost=0.1, trees=2)
SHAPES = (
    SMALL,
    replace(SMALL, repeated=True),
    replace(SMALL, early_answer=True),
    replace(SMALL, repeated=True, early_answer=True),
)


def search(option: int) -> str:
    return f"<search>{OPTIONS[option]}</search>"


def logits_for(task: CriticalTask, seed: int = 0) -> np.ndarray:
    mdp = enumerate_mdp(task)
    return np.random.default_rng(seed).normal(size=mdp.rewards.shape)


# -- the environment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"repeated": True, "early_answer": True, "turns": 5, "critical": (2,)}])
def test_gymnasiums_checker_passes_without_warnings(kwargs):
    env = gym.make("carl/CriticalTree-v0", render_mode="ansi", **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


def test_episodes_can_be_stepped_rendered_and_vectorised():
    env = gym.make("carl/CriticalTree-v0", turns=3, critical=(2,), render_mode="ansi", disable_env_checker=False)
    observation, info = env.reset(seed=1, options={"question_id": "tree2"})
    assert "tree 2" in observation and "Turn 1 of 3" in observation and not info["critical"]
    env.step(search(0))
    _, reward, terminated, truncated, info = env.step("no action at all")
    assert (reward, terminated, truncated, info["missed"], info["invalid_actions"]) == (0.0, False, False, 1, 1)
    observation, reward, terminated, _, _ = env.step(search(1))
    assert terminated and observation == "" and 0 < reward <= 0.1
    assert " 2* invalid action (no_action)" in env.render() and env.render().endswith("over")
    with pytest.raises(StateError, match="over"):
        env.step(search(0))
    vector = gym.make_vec("carl/CriticalTree-v0", num_envs=3, vectorization_mode="sync", turns=2, critical=(1,))
    vector.reset(seed=0)
    assert vector.step((search(0),) * 3)[1].shape == (3,)


def test_the_outcome_counts_missed_turns_and_slips():
    task = CriticalTask(SMALL)
    question = task.questions["tree0"]
    outcomes = set()
    for path in itertools.product(range(3), repeat=4):
        state = task.initial(question)
        for choice in path:
            before, state = state, task.transition(state, search(choice))
        missed, slips = task.progress(state)
        assert task.reward(before, search(choice), state) == pytest.approx(0.2**missed * 0.9**slips)
        assert task.found(state) == 2 - missed
        outcomes.add((missed, slips))
    # One option of three is right on both critical turns; routine turns are 1 and 3, each with an option that is none.
    assert {missed for missed, _ in outcomes} == {0, 1, 2} and {slips for _, slips in outcomes} == {0, 1, 2}


def test_every_critical_state_has_one_right_option_and_the_optimum_is_1():
    for settings in SHAPES:
        task = CriticalTask(settings)
        mdp = enumerate_mdp(task)
        best = backward(mdp)
        assert np.allclose(best[mdp.starts].max(axis=1), 1)
        for number, state in enumerate(mdp.states):
            if task.info(state)["critical"]:
                follow = best[number, :3]
                assert np.sum(np.isclose(follow, follow.max())) == 1
                assert np.allclose(np.sort(follow)[:2], 0.2 * follow.max())


def test_an_early_answer_misses_the_critical_turns_to_come():
    env = CriticalTreeEnv(turns=4, critical=(2, 4), stake=0.8, early_answer=True)
    env.reset(seed=0)
    env.step(search(0))
    _, reward, terminated, _, info = env.step(STOP)
    assert terminated and info["missed"] == 2 and reward == pytest.approx(0.2**2 * 0.95 ** info["slips"])
    assert CriticalTreeEnv(turns=4, critical=(2,)).action_space.actions == tuple(map(search, range(3)))
    plain = CriticalTreeEnv(turns=4, critical=(2,))
    plain.reset(seed=0)
    assert not plain.step(STOP)[2]  # no such tool: an invalid action


def test_an_invalid_action_misses_a_critical_turn_and_slips_on_a_routine_one():
    env = CriticalTreeEnv(turns=2, critical=(2,), stake=0.5, slips=0.0, slip_cost=0.25)
    env.reset(seed=0)
    env.step("<search>no such option</search>")
    _, reward, _, _, info = env.step("")
    assert (info["missed"], info["slips"], reward) == (1, 1, 0.5 * 0.75)
    with pytest.raises(ActionError):
        CriticalTask(SMALL).transition(CriticalTask(SMALL).initial(CriticalTask(SMALL).questions["tree0"]), 3)  # type: ignore[arg-type]


def test_a_state_restores_in_another_environment_and_forks_go_their_own_ways():
    env, other = CriticalTreeEnv(repeated=True), CriticalTreeEnv(repeated=True)
    env.reset(seed=3)
    for choice in (0, 2, 1):
        env.step(search(choice))
    stored = env.get_state().to_json()
    shown, _ = other.reset(options={"state": stored})
    assert shown == env.task.observation(env.state) and other.state == env.state
    left, right = other.fork(2)
    for choice in (1, 1, 1, 1):
        assert left.step(search(choice)) == env.step(search(choice))
    assert right.state == other.state != left.state
    right.set_state(env.state)
    assert right.state == env.state
    assert pickle.loads(pickle.dumps(env)).state == env.state


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"card": "another"},
        lambda record: record | {"question_id": "tree9"},
        lambda record: record | {"status": "answered"},
        lambda record: record | {"turns": [["search", "no such option"]]},
        lambda record: record | {"turns": [["access", "amber"]]},
        lambda record: record | {"turns": [["search", "amber", "ok", ["p1"]]]},
        lambda record: record | {"turns": [["search", "amber"]] * 9},
    ],
)
def test_a_state_of_another_world_is_refused(change):
    env = CriticalTreeEnv()
    env.reset(seed=0)
    env.step(search(0))
    with pytest.raises(StateError):
        env.set_state(json.dumps(change(json.loads(env.state.to_json()))))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"turns": 0}, {"options": 1}, {"options": 9}, {"critical": (0,)}, {"critical": (9,)}, {"critical": (2, 2)},
        {"stake": 1.5}, {"slips": -0.1}, {"slip_cost": True}, {"trees": 0}, {"seed": "x"}, {"repeated": 1},
        {"no_such": 1}, {"render_mode": "human"}, {"critical": 3}, {"critical": None}, {"critical": (3.0,)},
        {"critical": (True,)}, {"critical": ([3],)},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(kwargs):
    with pytest.raises(ConfigError):
        CriticalTreeEnv(**kwargs)


def test_settings_of_the_same_world_have_the_same_hash():
    """So that a state can move between environments that differ in spelling only."""
    spelled = CriticalTreeSettings(critical=[6, 3], stake=1, slip_cost=0)
    assert spelled == CriticalTreeSettings(critical=(3, 6), stake=1.0, slip_cost=0.0)
    assert spelled.hash == CriticalTreeSettings(critical=(3, 6), stake=1.0, slip_cost=0.0).hash
    assert spelled.hash != CriticalTreeSettings().hash


def test_any_answer_ends_the_episode_early():
    env = CriticalTreeEnv(turns=4, critical=(2,), stake=0.8, early_answer=True)
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("<answer>whatever</answer>")
    assert terminated and (info["status"], info["missed"]) == ("answered", 1) and reward == pytest.approx(0.2)


def test_wrong_use_says_what_to_do():
    env = CriticalTreeEnv()
    with pytest.raises(StateError, match="reset"):
        env.step(search(0))
    for options in (
        {"question_id": "tree99"}, {"question_id": ["tree0"]}, {"no_such": 1}, {"question_id": "tree0", "state": "x"}
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            env.reset(options=options)
    for n in (0, 1.5, "2"):
        with pytest.raises(ConfigError, match="at least 1"):
            env.fork(n)
    with pytest.raises(StateError, match="JSON text"):
        env.set_state(7)


def test_seeds_make_different_trees():
    first, second = (enumerate_mdp(CriticalTask(replace(SMALL, seed=seed))).rewards for seed in (0, 1))
    again = enumerate_mdp(CriticalTask(SMALL)).rewards
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert not np.array_equal(first[len(first) // 2 :], first[: len(first) // 2])


# -- enumeration ---------------------------------------------------------------------------------------


def test_the_number_of_states():
    # Paths: 1 + 3 + 9 + 27 per tree. Repeated: turn 1 (0, 0); turn 2 (0, 0..1 slips); turn 3 missed 0..1 x slips 0..1;
    # turn 4 missed 0..1 x slips 0..2: at most 1 + 2 + 4 + 6 = 13, fewer where no option of a state is a slip.
    assert len(enumerate_mdp(CriticalTask(SMALL)).states) == 2 * 40
    assert 2 * 7 < len(enumerate_mdp(CriticalTask(replace(SMALL, repeated=True))).states) <= 2 * 13


def test_equal_observations_have_equal_futures():
    """In the repeated world two paths with one observation must pay the same for whatever follows."""
    task = CriticalTask(replace(SMALL, repeated=True))
    question = task.questions["tree1"]
    futures: dict[str, set[tuple[float, ...]]] = {}
    paths = 0
    for path in itertools.product(range(3), repeat=2):
        state = task.initial(question)
        for choice in path:
            state = task.transition(state, search(choice))
        paid = []
        for rest in itertools.product(range(3), repeat=2):
            last = end = state
            for choice in rest:
                last, end = end, task.transition(end, search(choice))
            paid.append(task.reward(last, search(rest[-1]), end))
        futures.setdefault(task.observation(state), set()).add(tuple(paid))
        paths += 1
    assert len(futures) < paths
    assert all(len(known) == 1 for known in futures.values())


def test_values_criticality_and_gradient_worked_by_hand():
    """Two turns, two options, the first one critical, stake 0.9, no slips: the right option pays 1, the other one 0.1.

    Logits (ln 3, 0) for (right, wrong) at the start: pi = (3/4, 1/4), so V = 0.75 + 0.025 = 0.775, A = (0.225, -0.675).
    Any second action pays the same, so C(start)^2 = 3/4 * 0.225^2 + 1/4 * 0.675^2 = 3/16 * 0.9^2 = 0.151875 and all
    other states have C = 0. dJ/dlogits(start) = pi A = (0.16875, -0.16875).
    """
    task = CriticalTask(CriticalTreeSettings(turns=2, options=2, critical=(1,), stake=0.9, slips=0.0, trees=1))
    mdp = enumerate_mdp(task)
    best = backward(mdp)
    assert np.sort(best[0]).tolist() == pytest.approx([0.1, 1.0])
    right = best[0].argmax()
    logits = np.zeros((3, 2))
    logits[0, right] = math.log(3)
    logits[1:] = [[0.3, -1.0], [2.0, 0.5]]
    exact = solve(mdp, logits)
    assert exact.value == exact.v[0] == pytest.approx(0.775)
    assert exact.advantage[0, right] == pytest.approx(0.225) and exact.advantage[0, 1 - right] == pytest.approx(-0.675)
    assert np.allclose(exact.advantage[1:], 0) and np.allclose(exact.gradient[1:], 0)
    assert exact.criticality == pytest.approx([math.sqrt(0.151875), 0, 0])
    assert exact.gradient[0, right] == pytest.approx(0.16875) and exact.gradient[0].sum() == pytest.approx(0)
    assert exact.visits[0] == 1 and sorted(exact.visits[1:]) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("settings", SHAPES)
def test_the_exact_value_is_that_of_all_episodes_of_the_environment(settings):
    """Every episode is stepped through the Gymnasium shell, with the probability that the policy gives it."""
    env = CriticalTreeEnv(**{name: getattr(settings, name) for name in settings.__dataclass_fields__})
    logits = logits_for(env.task)
    mdp, pi = enumerate_mdp(env.task), softmax(logits)
    expected = 0.0

    def follow(observation: str, chance: float) -> None:
        nonlocal expected
        here = env.get_state()
        for number, action in enumerate(env.task.actions):
            env.set_state(here)
            following, reward, terminated, _, _ = env.step(action)
            probability = chance * pi[mdp.index[symbol(observation)], number]
            expected += probability * reward
            if not terminated:
                follow(following, probability)

    for question_id in env.task.questions:
        follow(env.reset(options={"question_id": question_id})[0], 1 / len(env.task.questions))
    assert solve(mdp, logits).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("settings", SHAPES)
def test_the_gradient_is_the_derivative_of_the_value(settings):
    task = CriticalTask(replace(settings, turns=3, critical=(2,)))
    mdp, logits = enumerate_mdp(task), logits_for(task, seed=1)
    exact = solve(mdp, logits)
    for index in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-5
        slope = (solve(mdp, logits + step).value - solve(mdp, logits - step).value) / 2e-5
        assert math.isclose(slope, exact.gradient[index], abs_tol=1e-8)


def test_criticality_is_the_spread_of_greedy_returns():
    """Eq. 5, action by action: take it, then the likeliest action to the end."""
    task = CriticalTask(SMALL)
    mdp, logits = enumerate_mdp(task), logits_for(task, seed=2)
    exact, pi = solve(mdp, logits), softmax(logits)
    for number in (0, 1, 5, 20, 79):
        returns = []
        for action in task.actions:
            state, total = mdp.states[number], 0.0
            while not task.terminal(state):
                following = task.transition(state, action)
                total += task.reward(state, action, following)
                state = following
                if not task.terminal(state):
                    action = task.actions[logits[mdp.index[symbol(task.observation(state))]].argmax()]
            returns.append(total)
        variance = np.dot(pi[number], (np.array(returns) - np.dot(pi[number], returns)) ** 2)
        assert exact.criticality[number] == pytest.approx(math.sqrt(variance))


def test_a_world_too_large_or_with_a_loop_is_refused(monkeypatch):
    monkeypatch.setattr("carl_gym.agents.tabular.MAX_STATES", 30)
    with pytest.raises(ConfigError, match="more than 30 states"):
        enumerate_mdp(CriticalTask(SMALL))

    class Looping(CriticalTask):
        def observation(self, state: EnvState) -> str:
            return "" if state.terminal else state.question_id

    with pytest.raises(ConfigError, match="two turns"):
        enumerate_mdp(Looping(SMALL))

    class Alike(CriticalTask):
        def observation(self, state: EnvState) -> str:
            return super().observation(state).replace("tree 1", "tree 0")

    with pytest.raises(ConfigError, match="two questions"):
        enumerate_mdp(Alike(SMALL))


# -- tokens --------------------------------------------------------------------------------------------


def test_prefix_codes():
    assert prefix_code(3, 1) == ((0,), (1,), (2,))
    assert prefix_code(3) == ((0,), (1, 0), (1, 1, 0))
    assert prefix_code(4, 2) == ((0,), (1, 0), (1, 1), (1, 2))
    assert prefix_code(5) == ((0,), (1, 0), (1, 1, 0), (1, 1, 1), (1, 1, 2))
    assert prefix_code(1) == ((0,),)
    with pytest.raises(ConfigError):
        prefix_code(0)


def test_token_log_probs_and_entropies_worked_by_hand():
    """pi = (1/2, 1/4, 1/4) on 0, 10, 110: the first two tokens are fair coins (log-prob -ln 2, entropy ln 2), the last
    one of 110 is certain."""
    table = TokenTable(prefix_code(3))
    logprobs, entropies = table.logprobs(np.log([[0.5, 0.25, 0.25]]))
    ln2 = math.log(2)
    assert np.allclose(logprobs, [[[-ln2, 0, 0], [-ln2, -ln2, 0], [-ln2, -ln2, 0]]])
    assert np.allclose(entropies, -logprobs)


def test_token_log_probs_stay_finite_where_probabilities_underflow():
    """exp(-900) is 0 as a float. After the token 1, the actions 10 and 110 are equally likely however unlikely 1 is."""
    logprobs, entropies = TokenTable(prefix_code(3)).logprobs(np.array([[900.0, 0.0, 0.0]]))
    ln2 = math.log(2)
    assert np.allclose(logprobs, [[[0, 0, 0], [-900 + ln2, -ln2, 0], [-900 + ln2, -ln2, 0]]])
    assert np.allclose(entropies, [[[0, 0, 0], [0, ln2, 0], [0, ln2, 0]]])


def test_token_log_probs_add_up_and_entropies_are_their_expectation():
    table = TokenTable(prefix_code(5))
    logits = np.random.default_rng(0).normal(size=(7, 5)) * 3
    logprobs, entropies = table.logprobs(logits)
    pi = softmax(logits)
    assert np.allclose(logprobs.sum(axis=2), np.log(pi))
    # The chain rule: H(action) = E[sum of the entropies of the tokens that are drawn].
    assert np.allclose((pi * entropies.sum(axis=2)).sum(axis=1), -(pi * np.log(pi)).sum(axis=1))
    first = np.stack([pi[:, 0], pi[:, 1:].sum(axis=1)], axis=1)  # 0 or 1
    assert np.allclose(entropies[:, :, 0], -(first * np.log(first)).sum(axis=1, keepdims=True))


def test_weighted_token_gradients_are_derivatives():
    code = prefix_code(4)
    table = TokenTable(code)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 4))
    for action in range(4):
        weights = np.where(np.arange(3) < len(code[action]), rng.normal(size=3), 0.0)[None]
        found = table.gradients(softmax(logits), np.array([action]), weights)
        for index in range(4):
            step = np.zeros((1, 4))
            step[0, index] = 1e-6
            up, down = (np.dot(weights[0], table.logprobs(logits + sign * step)[0][0, action]) for sign in (1, -1))
            assert found[0, index] == pytest.approx((up - down) / 2e-6, abs=1e-8)
        even = table.gradients(softmax(logits), np.array([action]), np.where(weights != 0, 2.0, 0.0))
        assert np.allclose(even, 2 * (np.eye(4)[action] - softmax(logits)))


# -- the policy ----------------------------------------------------------------------------------------


def make_policy(settings: CriticalTreeSettings = SMALL, longest: int = 3) -> tuple[CriticalTask, TabularPolicy]:
    task = CriticalTask(settings)
    mdp = enumerate_mdp(task)
    return task, TabularPolicy(mdp, logits_for(task), prefix_code(len(mdp.actions), longest))


def test_samples_have_the_policys_frequencies_and_its_own_scores():
    task, policy = make_policy()
    (prefix,) = {SymbolTranscript(policy.code).prompt(task.observation(task.initial(task.questions["tree1"])))}
    requests = [SampleRequest(prefix, seed=seed, entropies=seed % 2 == 0) for seed in range(20_000)]
    completions = policy.sample(requests)
    pi = softmax(policy.logits)[policy.state(prefix)]
    for number, (code, text) in enumerate(zip(policy.code, task.actions, strict=True)):
        drawn = [one for one in completions if one.token_ids == code]
        error = math.sqrt(pi[number] * (1 - pi[number]) / len(requests))
        assert abs(len(drawn) / len(requests) - pi[number]) < 4.5 * error
        assert drawn[0].text == text and np.allclose(policy.score([prefix], [code])[0], drawn[0].logprobs)
    assert all(len(one.entropies) == len(one.token_ids) for one in completions[::2])
    assert not any(one.entropies for one in completions[1::2])
    assert policy.sample(requests[:50]) == completions[:50] == [policy.sample([r])[0] for r in requests[:50]]


def test_temperature_flattens_and_0_is_greedy():
    task, policy = make_policy()
    prefix = SymbolTranscript(policy.code).prompt(task.observation(task.initial(task.questions["tree0"])))
    row = policy.logits[policy.state(prefix)]
    greedy, *hot = policy.sample(
        [SampleRequest(prefix, 1, temperature=0.0), *(SampleRequest(prefix, n, temperature=2.0) for n in range(5000))]
    )
    assert greedy.token_ids == policy.code[row.argmax()]
    assert sum(greedy.logprobs) == pytest.approx(math.log(softmax(row[None])[0].max()))
    share = sum(one.token_ids == greedy.token_ids for one in hot) / len(hot)
    expected = softmax(row[None] / 2)[0].max()
    assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / len(hot))


def test_sync_takes_new_logits():
    task, policy = make_policy()
    prefix = SymbolTranscript(policy.code).prompt(task.observation(task.initial(task.questions["tree0"])))
    policy.sample([SampleRequest(prefix, 0)])
    sure = np.zeros_like(policy.logits)
    sure[:, 2] = 50.0
    policy.sync({"logits": sure})
    assert policy.version == 1 and policy.sample([SampleRequest(prefix, 0)])[0].token_ids == policy.code[2]
    policy.logits[:, 1] = 200.0
    policy.sync()
    assert policy.version == 2 and policy.sample([SampleRequest(prefix, 0)])[0].token_ids == policy.code[1]


def test_what_a_tabular_policy_refuses():
    task, policy = make_policy()
    prefix = SymbolTranscript(policy.code).prompt(task.observation(task.initial(task.questions["tree0"])))
    for request in (
        SampleRequest((1, 2, 3), 0),
        SampleRequest((), 0),
        SampleRequest(prefix, 0, max_tokens=1),
        SampleRequest(prefix, 0, temperature=-1.0),
    ):
        with pytest.raises(PolicyError):
            policy.sample([request])
    with pytest.raises(PolicyError, match="no action"):
        policy.score([prefix], [(7,)])
    for weights in ({"other": 1}, {"logits": np.zeros((2, 2))}, {"logits": np.full_like(policy.logits, np.nan)}):
        with pytest.raises(PolicyError):
            policy.sync(weights)
    for code in (((0,), (0, 1), (2,)), ((0,), (1,)), ((0,), (1,), ())):
        with pytest.raises(PolicyError, match="no code"):
            TabularPolicy(policy.mdp, policy.logits, code)


@pytest.mark.parametrize("settings", SHAPES)
def test_the_collectors_trees_are_of_this_world(settings):
    """Nodes show states of the enumeration, rewards are its own, entropies come where an explorer asks."""
    task, policy = make_policy(settings)
    transcript = SymbolTranscript(policy.code)
    explorer = EntropyForking(2, 6, measure="exact")
    for tree in collect(task, policy, transcript, list(task.questions.values()), explorer, seed=0, step=0):
        for node in tree.nodes:
            if not node.terminal:
                assert policy.mdp.states[policy.state(node.observation_tokens)].question_id == tree.question.id
            if node.action is not None and node.parent is not None:
                assert len(node.action.entropies) == len(node.action.token_ids)
                source = policy.state(tree.nodes[node.parent].observation_tokens)
                assert policy.mdp.rewards[source, policy.code.index(node.action.token_ids)] == node.reward
        assert len({len(leaf.state.turns) for leaf in tree.leaves()}) > settings.early_answer


def test_the_mean_return_of_rollouts_is_the_exact_value():
    task, policy = make_policy(replace(SMALL, early_answer=True))
    asked = list(task.questions.values()) * 20
    trees = collect(task, policy, SymbolTranscript(policy.code), asked, RootExplorer(100), seed=5, step=0)
    returns = [tree.trajectory_return(leaf.id) for tree in trees for leaf in tree.leaves()]
    error = np.std(returns) / math.sqrt(len(returns))
    assert abs(np.mean(returns) - solve(policy.mdp, policy.logits).value) < 4.5 * error < 0.03


def test_a_wrong_turn_in_a_state_is_refused_even_with_the_right_hash():
    task = CriticalTask(SMALL)
    state = replace(task.initial(task.questions["tree0"]), turns=(Turn(ParsedAction("search", "heath")),))
    with pytest.raises(StateError, match="cannot be"):
        task.validate(state)
