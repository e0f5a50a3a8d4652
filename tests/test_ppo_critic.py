"""PPO over turns: advantages worked out in the comments, and the critic against a plain pass per state."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import KINDS, random_model
from rollout_toys import ByteTranscript, PathTask, Sketch, questions, random_policy
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from carl_gym.agents.agent import load_agent
from carl_gym.algorithms import get_algorithm, values
from carl_gym.algorithms.ppo import gae, lambda_returns, ppo, whitened, whitened_gae
from carl_gym.envs.registration import make_task
from carl_gym.errors import CarlGymError, ConfigError, PolicyError, StateError
from carl_gym.rollouts import Explorer, RandomForking, RolloutTree, RootExplorer, collect
from carl_gym.training.critic import Critic, decision_points, explained_variance
from carl_gym.training.packing import unique_tokens

VOCABULARY = 1000
NAN = float("nan")


def chain(*state_values: float, rewards: tuple[float, ...] = (0.0, 0.0, 1.0)) -> RolloutTree:
    """0 -> 1 -> 2 -> 3, with these rewards, and a critic that says V of states 0, 1, 2."""
    sketch = Sketch()
    node = sketch.root()
    for reward in rewards[:-1]:
        node = sketch.edge(node, reward=reward)
    sketch.edge(node, reward=rewards[-1], end=True)
    sketch.tree.scores["state_value"] = np.array([*state_values, NAN])
    return sketch.tree


def rolled_out(seed: int = 0, explorer: Explorer | None = None, count: int = 2) -> list[RolloutTree]:
    """Trees of random actions with random rewards, and random values of their states."""
    task = PathTask(4, lambda path: len(set(path)) / 3 - 0.1 * len(path))
    given = explorer or RootExplorer(3)
    trees = collect(task, random_policy(), ByteTranscript(), questions(count), given, seed=seed, step=0)
    rng = np.random.default_rng(seed)
    for tree in trees:
        tree.scores["state_value"] = np.where(
            [bool(n.children) for n in tree.nodes], rng.normal(size=len(tree.nodes)), NAN
        )
    return trees


# -- advantages and targets ------------------------------------------------------------------------


def test_generalised_advantages_of_a_chain():
    # delta: 0 + 0.4 - 0.5 = -0.1, 0 + 0.8 - 0.4 = 0.4, 1 + 0 - 0.8 = 0.2.
    # A = 0.2; 0.4 + 0.5 * 0.2 = 0.5; -0.1 + 0.5 * 0.5 = 0.15.
    assert gae(chain(0.5, 0.4, 0.8), gamma=1, lam=0.5) == pytest.approx([0, 0.15, 0.5, 0.2])


def test_discounting_counts_turns_not_tokens():
    # delta: 0.36 - 0.5 = -0.14, 0.72 - 0.4 = 0.32, 0.2. A = 0.2; 0.32 + 0.45 * 0.2 = 0.41; -0.14 + 0.45 * 0.41.
    assert gae(chain(0.5, 0.4, 0.8), gamma=0.9, lam=0.5) == pytest.approx([0, 0.0445, 0.41, 0.2])


def test_targets_are_value_plus_advantage_at_the_state_where_the_action_was_taken():
    # V + A of the first test: 0.5 + 0.15, 0.4 + 0.5, 0.8 + 0.2; nothing at the end.
    (target,) = lambda_returns([chain(0.5, 0.4, 0.8)], gamma=1, lam=0.5)
    assert target == pytest.approx([0.65, 0.9, 1.0, 0])


def test_the_target_of_a_shared_root_is_the_mean_over_its_actions():
    # V(0) = 0.2; actions pay 1 and 0 and end: A = 0.8, -0.2; targets 1 and 0, mean 0.5.
    sketch = Sketch()
    root = sketch.root()
    sketch.edge(root, reward=1.0, end=True)
    sketch.edge(root, reward=0.0, end=True, trajectory=1)
    sketch.tree.scores["state_value"] = np.array([0.2, NAN, NAN])
    assert gae(sketch.tree, gamma=1, lam=1) == pytest.approx([0, 0.8, -0.2])
    assert lambda_returns([sketch.tree], gamma=1, lam=1)[0] == pytest.approx([0.5, 0, 0])


def test_an_advantage_is_whitened_by_mean_and_deviation_of_all_actions_of_all_trees():
    # A = (0.15, 0.5, 0.2) and (-0.05): mean 0.2, squares 0.0025 + 0.09 + 0 + 0.0625 = 0.155, variance 0.155/3.
    short = Sketch()
    short.edge(short.root(), reward=0.0, end=True)
    short.tree.scores["state_value"] = np.array([0.05, NAN])
    one, two = whitened_gae([chain(0.5, 0.4, 0.8), short.tree], gamma=1, lam=0.5)
    scale = (0.155 / 3) ** -0.5
    assert one == pytest.approx([0, -0.05 * scale, 0.3 * scale, 0], abs=1e-5)
    assert two == pytest.approx([0, -0.25 * scale], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_whitened_advantages_have_mean_0_and_variance_1_and_keep_their_order(seed):
    trees = rolled_out(seed)
    edges = np.concatenate([[node.parent is not None for node in tree.nodes] for tree in trees])
    before = np.concatenate([gae(tree, gamma=1, lam=0.9) for tree in trees])
    after = np.concatenate(whitened_gae(trees, gamma=1, lam=0.9))
    assert after[edges].mean() == pytest.approx(0, abs=1e-9)
    assert after[edges].var(ddof=1) == pytest.approx(1, abs=1e-4)
    assert np.array_equal(np.argsort(before[edges]), np.argsort(after[edges]))
    assert not after[~edges].any()


def test_equal_advantages_and_a_single_one_are_whitened_to_exactly_0():
    trees = [chain(0, 0, 0), chain(0, 0, 0)]
    assert not np.concatenate(whitened(trees, [np.array([0, 0.1, 0.1, 0.1])] * 2)).any()
    single = Sketch()
    single.edge(single.root(), end=True)
    assert not whitened([single.tree], [np.array([0, 0.7])])[0].any()
    assert whitened([], []) == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([RootExplorer(3), RandomForking(2, 4)]))
def test_without_discounts_advantages_are_returns_to_go_minus_values(seed, explorer):
    for tree in rolled_out(seed, explorer):
        to_go = values(tree)
        value = np.nan_to_num(tree.scores["state_value"])
        expected = [
            0.0 if node.parent is None else node.reward + to_go[node.id] - value[node.parent] for node in tree.nodes
        ]
        assert gae(tree, gamma=1, lam=1) == pytest.approx(expected)
        assert lambda_returns([tree], gamma=1, lam=1)[0] == pytest.approx(to_go)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_with_lambda_0_advantages_are_one_step_errors(seed, gamma):
    for tree in rolled_out(seed):
        value = np.nan_to_num(tree.scores["state_value"])
        expected = [
            0.0 if node.parent is None else node.reward + gamma * value[node.id] - value[node.parent]
            for node in tree.nodes
        ]
        assert gae(tree, gamma=gamma, lam=0) == pytest.approx(expected)


def test_a_critic_that_is_right_leaves_no_advantage():
    # A deterministic chain that pays 1 at the end: V = 1 everywhere.
    assert gae(chain(1, 1, 1), gamma=1, lam=0.7) == pytest.approx([0, 0, 0, 0])


def test_states_without_a_value_are_an_error():
    tree = chain(0.5, NAN, 0.8)
    with pytest.raises(StateError, match="not valued all states of question 'q0'"):
        gae(tree, gamma=1, lam=1)
    tree.scores.clear()
    with pytest.raises(StateError, match=r"Critic\.score"):
        lambda_returns([tree], gamma=1, lam=1)


# -- settings --------------------------------------------------------------------------------------


def test_ppo_asks_for_a_critic_and_says_how_it_learns():
    algorithm = get_algorithm("ppo", rollouts=5, gamma=0.9, lam=0.5, critic_learning_rate=0.01)
    assert algorithm.requires == ("critic",)
    assert algorithm.explorer == RootExplorer(5)
    assert algorithm.critic is not None and algorithm.critic.learning_rate == 0.01
    tree = chain(0.5, 0.4, 0.8)
    assert algorithm.critic.targets([tree])[0] == pytest.approx([0.5445, 0.81, 1.0, 0])
    assert algorithm.credit([tree])[0] == pytest.approx(whitened_gae([tree], gamma=0.9, lam=0.5)[0])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"gamma": 1.01}, "gamma must be a number from 0 to 1, not 1.01"),
        ({"gamma": NAN}, "gamma must be"),
        ({"lam": -0.1}, "lam must be a number from 0 to 1, not -0.1"),
        ({"lam": "high"}, "lam must be"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate must be a number above 0"),
        ({"critic_learning_rate": float("inf")}, "critic_learning_rate must be"),
        ({"rollouts": 0}, "rollouts must be an integer >= 1"),
        ({"clip_low": 0}, "clip_low"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        ppo(**given)


# -- what goes through the critic ------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([RootExplorer(3), RandomForking(2, 6)]))
def test_every_state_is_asked_for_once_after_its_own_prefix_and_nothing_beyond_goes_through(seed, explorer):
    trees = rolled_out(seed, explorer)
    states, rows = decision_points(trees)
    assert states == [(i, node.id) for i, tree in enumerate(trees) for node in tree.recorded()]
    asked = [
        (states[number], tuple(row.tokens[:position].tolist()))
        for row in rows
        for number, position in zip(row.advantages, row.positions, strict=True)
    ]
    assert sorted(asked) == [((i, node), trees[i].prefix(node)) for i, node in states]
    prefixes = [trees[i].prefix(node) for i, node in states]
    assert unique_tokens(rows) == len({prefix[:end] for prefix in prefixes for end in range(1, len(prefix) + 1)})


def model_of(kind: str, seed: int = 0) -> PreTrainedModel:
    """GPT-2's default is dropout, of which no two passes are the same."""
    model = random_model(kind, VOCABULARY, seed=seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = 0.0
    return model


def awake(critic: Critic) -> Critic:
    """With a head that is not zero, so that the transformer matters."""
    torch.manual_seed(1)
    torch.nn.init.normal_(critic.model.head.weight, std=0.1)
    torch.nn.init.normal_(critic.model.head.bias)
    return critic


def plainly(
    critic: Critic, trees: list[RolloutTree], targets: list[np.ndarray]
) -> tuple[list[float], float, list[torch.Tensor]]:
    """V of every state, the loss and its gradient: a forward pass in float64 for each state."""
    model = copy.deepcopy(critic.model).double()
    states = [(tree, node.id, target) for tree, target in zip(trees, targets, strict=True) for node in tree.recorded()]
    found, total = [], 0.0
    for tree, node, target in states:
        hidden = model.transformer(input_ids=torch.tensor([tree.prefix(node)])).last_hidden_state[0, -1]
        value = model.head(hidden)[0]
        loss = 0.5 * (value - target[node]) ** 2 / len(states)
        loss.backward()
        found.append(value.item())
        total += loss.item()
    return found, total, [parameter.grad for parameter in model.parameters()]


def goals(trees: list[RolloutTree], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=len(tree.nodes)) for tree in trees]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"batch_tokens": 60}, {"packing": "rows", "batch_tokens": 100}], ids=str)
def test_values_loss_and_gradients_are_those_of_a_pass_per_state(kind, options):
    trees = rolled_out(5, RandomForking(2, 4))
    targets = goals(trees)
    critic = awake(Critic(model_of(kind), max_grad_norm=1e9, **options))
    plain, loss, gradient = plainly(critic, trees, targets)
    critic.score(trees)
    scored = np.concatenate([tree.scores["state_value"] for tree in trees])
    assert scored[~np.isnan(scored)] == pytest.approx(plain, rel=1e-4, abs=1e-5)
    metrics = critic.update(trees, targets)
    assert metrics["critic/loss"] == pytest.approx(loss, rel=1e-4)
    ours = torch.cat([parameter.grad.double().flatten() for parameter in critic.model.parameters()])
    exact = torch.cat([part.flatten() for part in gradient])
    assert float((ours - exact).norm() / exact.norm()) < 1e-4


# -- the critic ------------------------------------------------------------------------------------


def parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_new_critic_says_0_at_every_state_and_nothing_at_the_ends():
    trees = rolled_out()
    Critic(model_of("llama")).score(trees)
    for tree in trees:
        for node in tree.nodes:
            value = tree.scores["state_value"][node.id]
            assert value == 0 if node.children else np.isnan(value)


def test_the_policy_keeps_its_weights_its_gradients_and_its_attention():
    policy, trees = model_of("qwen2"), rolled_out()
    before, attention = parameters(policy), policy.config._attn_implementation
    critic = Critic(policy, learning_rate=0.1)
    start = parameters(critic.model)
    for _ in range(2):  # the first step moves the head alone: while it is 0, nothing reaches the transformer
        critic.update(trees, goals(trees))
    assert same(parameters(policy), before)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert policy.config._attn_implementation == attention
    assert not any(torch.equal(a, b) for a, b in zip(parameters(critic.model), start, strict=True) if a.ndim > 1)


def test_a_bfloat16_policy_has_a_float32_critic():
    critic = Critic(model_of("llama").to(torch.bfloat16))
    assert all(parameter.dtype == torch.float32 for parameter in critic.model.parameters())


def test_it_learns_the_values_of_states():
    trees = rolled_out(1)
    targets = [values(tree) for tree in trees]
    critic = Critic(model_of("llama"), learning_rate=3e-3)
    history = [critic.update(trees, targets) for _ in range(60)]
    states, _ = decision_points(trees)
    wanted = np.array([targets[i][node] for i, node in states])
    assert history[0]["critic/loss"] == pytest.approx(0.5 * np.mean(wanted**2))  # V = 0
    assert history[0]["critic/explained_variance"] == pytest.approx(0)
    assert history[-1]["critic/loss"] < 0.02 * history[0]["critic/loss"]
    assert history[-1]["critic/explained_variance"] > 0.95


def test_explained_variance_by_hand():
    # Targets 0, 2: variance 1. Errors 0, 1: variance 0.25. A constant error explains all, equal targets nothing.
    assert explained_variance(np.array([0.0, 1.0]), np.array([0.0, 2.0])) == pytest.approx(0.75)
    assert explained_variance(np.array([5.0, 7.0]), np.array([0.0, 2.0])) == pytest.approx(1)
    assert explained_variance(np.array([5.0, 7.0]), np.array([2.0, 2.0])) == 0


def test_gradients_are_scaled_down_to_the_largest_norm():
    trees = rolled_out()
    critic = awake(Critic(model_of("llama"), max_grad_norm=1e-3))
    critic.update(trees, goals(trees))
    norm = torch.cat([parameter.grad.flatten() for parameter in critic.model.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_nothing_to_learn_from_is_no_step():
    critic = awake(Critic(model_of("llama")))
    before = parameters(critic.model)
    assert critic.update([], []) == {}
    critic.score([])
    assert same(before, parameters(critic.model))


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_and_leaves_weights_and_optimiser_alone(value):
    trees = rolled_out()
    targets = goals(trees)
    spoiled = [target.copy() for target in targets]
    spoiled[-1][0] = value
    critic, clean = (awake(Critic(model_of("llama"))) for _ in range(2))
    before = parameters(critic.model)
    with pytest.raises(CarlGymError, match="not finite; no step was taken"):
        critic.update(trees, spoiled)
    assert same(before, parameters(critic.model))
    for one in (critic, clean):
        one.update(trees, targets)
    assert same(parameters(critic.model), parameters(clean.model))


def test_broken_weights_are_an_error():
    trees = rolled_out()
    critic = awake(Critic(model_of("llama")))
    with torch.no_grad():
        critic.model.head.bias.fill_(NAN)
    with pytest.raises(CarlGymError, match="values are not finite"):
        critic.score(trees)
    with pytest.raises(CarlGymError, match="no step was taken"):
        critic.update(trees, goals(trees))


def test_a_restored_critic_goes_on_bit_for_bit(tmp_path: Path):
    trees = rolled_out()
    critic = Critic(model_of("llama"))
    for seed in range(3):
        critic.update(trees, goals(trees, seed))
    torch.save(critic.state_dict(), tmp_path / "critic.pt")
    other = Critic(model_of("llama", seed=9))
    other.load_state_dict(torch.load(tmp_path / "critic.pt", weights_only=True))
    for one in (critic, other):
        one.update(trees, goals(trees, 7))
    assert same(parameters(critic.model), parameters(other.model))
    with pytest.raises(ValueError, match="not the state of a critic"):
        other.load_state_dict({"model": 1, "optimizer": {}})


def test_a_model_that_trees_do_not_suit_is_refused_and_can_be_valued_in_rows():
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, use_sliding_window=True, sliding_window=8, max_window_layers=1,
        )
    )  # fmt: skip
    with pytest.raises(PolicyError, match="packing=rows"):
        Critic(model)
    trees = rolled_out()
    critic = awake(Critic(model, packing="rows"))
    critic.score(trees)
    assert critic.update(trees, goals(trees))["critic/loss"] > 0


def test_a_training_step_with_a_language_model_on_miniwiki(tiny_agent_folder: Path):
    """Score, credit, targets and updates, as the trainer does them, on what a real agent sampled."""
    agent = load_agent(str(tiny_agent_folder), device="cpu")
    task = make_task("carl/MiniWiki-v0", questions=4)
    algorithm = get_algorithm("ppo", rollouts=4)
    assert algorithm.critic is not None
    trees = collect(
        task, agent.policy, agent.transcript, list(task.questions.values()), algorithm.explorer, seed=1, step=1
    )
    critic = Critic(agent.model, learning_rate=algorithm.critic.learning_rate)
    critic.score(trees)
    first = np.concatenate(algorithm.credit(trees))
    targets = algorithm.critic.targets(trees)
    assert np.ptp(np.concatenate(targets)) > 0  # rewards differ
    history = [critic.update(trees, targets) for _ in range(6)]
    assert history[-1]["critic/loss"] < 0.9 * history[0]["critic/loss"]
    critic.score(trees)
    second = np.concatenate(algorithm.credit(trees))
    assert np.isfinite(second).all() and not np.allclose(first, second)
