"""The scheduler batches; the trees are those that each question would get alone."""

from __future__ import annotations

import itertools

import pytest
from rollout_toys import STOP, ByteTranscript, PathTask, ToyPolicy, action, path, questions, random_policy

from carl_gym.agents.policy import Completion, Transcript
from carl_gym.errors import ConfigError, PolicyError
from carl_gym.rollouts import (
    EntropyForking,
    Explorer,
    RandomForking,
    RolloutTree,
    RootExplorer,
    Timings,
    collect,
)
from carl_gym.rollouts.collector import MIN_ACTION_TOKENS

EXPLORERS = [RootExplorer(4), EntropyForking(2, 5), EntropyForking(3, 6, 2, "merged"), RandomForking(2, 5)]


def run(
    explorer: Explorer,
    count: int = 6,
    *,
    policy: ToyPolicy | None = None,
    task: PathTask | None = None,
    transcript: Transcript | None = None,
    seed: int = 0,
    step: int = 0,
) -> list[RolloutTree]:
    return collect(
        task or PathTask(6, lambda path: len(path) + 0.5 * (path[-1] == STOP)),
        policy or random_policy(),
        transcript or ByteTranscript(),
        questions(count),
        explorer,
        seed=seed,
        step=step,
    )


@pytest.mark.parametrize("explorer", EXPLORERS)
def test_each_tick_is_one_sample_call_and_one_transition_call(explorer):
    policy, task = random_policy(), PathTask(6)
    trees = run(explorer, count=10, policy=policy, task=task)
    assert task.batches == [len(batch) for batch in policy.batches]
    assert sum(task.batches) == sum(tree.actions_generated for tree in trees)
    # All trees advance in every tick: together they take no more ticks than the slowest takes alone.
    ticks_alone = []
    for number in range(10):
        alone = random_policy()
        collect(PathTask(6), alone, ByteTranscript(), [questions(10)[number]], explorer, seed=0, step=0)
        ticks_alone.append(len(alone.batches))
    assert len(policy.batches) == max(ticks_alone)


@pytest.mark.parametrize("explorer", EXPLORERS)
def test_a_tree_does_not_depend_on_the_rest_of_the_batch(explorer):
    together = run(explorer, count=6)
    task = PathTask(6, lambda path: len(path) + 0.5 * (path[-1] == STOP))
    for question, tree in zip(questions(6), together, strict=True):
        (alone,) = collect(task, random_policy(), ByteTranscript(), [question], explorer, seed=0, step=0)
        assert alone == tree


def test_seed_step_and_repetition_of_a_question_change_the_tree():
    twice = [questions(1)[0]] * 2
    first, second = collect(PathTask(6), random_policy(), ByteTranscript(), twice, RootExplorer(2), seed=0, step=0)
    (other_step,) = run(RootExplorer(2), 1, step=1)
    (other_seed,) = run(RootExplorer(2), 1, seed=1)
    trees = [first, second, other_step, other_seed]
    actions = [[node.action for node in tree.nodes] for tree in trees]
    assert all(a != b for a, b in itertools.combinations(actions, 2))


@pytest.mark.parametrize("explorer", EXPLORERS)
def test_every_request_has_its_own_seed(explorer):
    policy = random_policy()
    trees = run(explorer, count=20, policy=policy)
    seeds = [request.seed for batch in policy.batches for request in batch]
    assert len(set(seeds)) == len(seeds) == sum(tree.actions_generated for tree in trees)


@pytest.mark.parametrize("explorer", EXPLORERS)
def test_requests_carry_the_stored_state_and_the_tokens_as_they_were_sampled(explorer):
    policy = random_policy()
    trees = run(explorer, policy=policy)
    asked = {(request.state, tuple(request.prefix)) for batch in policy.batches for request in batch}
    recorded = {(node.state, tree.prefix(node.id)) for tree in trees for node in tree.recorded()}
    assert asked == recorded


@pytest.mark.parametrize("explorer", EXPLORERS)
def test_actions_generated_are_lengths_less_fork_depths(explorer):
    for tree in run(explorer, count=20):
        total = 0
        for leaf in tree.leaves():
            first = next(node for node in tree.path(leaf.id) if node.trajectory == leaf.trajectory and node.depth > 0)
            fork_depth = first.depth - 1
            total += leaf.depth - fork_depth
        assert tree.actions_generated == total


def test_states_rewards_and_observations_are_the_tasks():
    for tree in run(EntropyForking(2, 5)):
        for node in tree.nodes:
            if node.action is None:
                assert bytes(node.observation_tokens) == b"<0>"
                continue
            before = tree.nodes[node.parent]
            assert path(node.state) == (*path(before.state), node.action.text)
            assert node.reward == node.depth + 0.5 * (node.action.text == STOP)
            assert node.terminal == (node.action.text == STOP or node.depth == 6)
            assert bytes(node.observation_tokens) == (b"" if node.terminal else f"<{node.depth}>".encode())
            assert not node.truncated


def test_a_complete_tree_has_a_leaf_per_trajectory():
    for root in ("separate", "merged"):
        for tree in run(EntropyForking(3, 7, root=root)):
            assert len(tree.leaves()) == tree.trajectories == 10
            assert all(leaf.terminal for leaf in tree.leaves())
            assert len(tree.roots()) == (3 if root == "separate" else 1)


def test_a_full_context_truncates_and_keeps_the_states_before_it():
    # The prompt is 3 bytes, an action 10 tokens, an observation 3: prefixes of 3, 16, 29, 42, ...
    policy = ToyPolicy(lambda request, rng: action(*[-1.0] * min(10, request.max_tokens)))
    task = PathTask(20, lambda path: 0.25)
    transcript = ByteTranscript(max_tokens=16, context=42 + MIN_ACTION_TOKENS)
    (tree,) = run(RootExplorer(1), 1, policy=policy, task=task, transcript=transcript)
    # At 42 the minimum is still there, so a shorter action follows; then the context is full.
    assert [request.max_tokens for batch in policy.batches for request in batch] == [16, 16, 16, 8]
    (leaf,) = tree.leaves()
    assert leaf.terminal and leaf.truncated and leaf.depth == 4
    assert leaf.observation_tokens == () and tree.prefix_length(leaf.id) == 42 + MIN_ACTION_TOKENS
    assert not leaf.state.terminal and tree.trajectory_return(leaf.id) == 1.0
    assert [node.depth for node in tree.recorded()] == [0, 1, 2, 3]

    shorter = ByteTranscript(max_tokens=16, context=42 + MIN_ACTION_TOKENS - 1)
    (tree,) = run(RootExplorer(1), 1, policy=policy, task=task, transcript=shorter)
    assert [(leaf.depth, leaf.truncated) for leaf in tree.leaves()] == [(3, True)]


def test_a_truncated_trajectory_can_be_forked():
    policy = ToyPolicy(lambda request, rng: action(*[-1.0] * min(10, request.max_tokens)))
    transcript = ByteTranscript(max_tokens=16, context=50)
    (tree,) = run(EntropyForking(1, 3), 1, policy=policy, task=PathTask(20), transcript=transcript)
    assert [leaf.truncated for leaf in tree.leaves()] == [True] * 4
    assert tree.n(0) == 2  # H/n tied at 1 until each recorded state had its fork, lowest depth first


@pytest.mark.parametrize("context", [20, 33, 64, 100])
def test_no_prefix_and_action_outgrow_the_context(context):
    policy = random_policy(stop=0.0)
    trees = run(EntropyForking(2, 5), 10, policy=policy, transcript=ByteTranscript(max_tokens=8, context=context))
    for request in itertools.chain.from_iterable(policy.batches):
        assert 8 >= request.max_tokens >= min(8, MIN_ACTION_TOKENS)
        assert len(request.prefix) + request.max_tokens <= context
    assert all(tree.prefix_length(node.id) <= context for tree in trees for node in tree.nodes)


def test_a_prompt_without_room_for_an_action_is_an_error_before_anything_is_sampled():
    policy = random_policy()
    with pytest.raises(ConfigError, match=r"prompt of question 'q0' has 3 tokens.*context of 10"):
        run(RootExplorer(2), policy=policy, transcript=ByteTranscript(context=10))
    assert policy.batches == []


def test_greedy_rollouts_pass_temperature_zero():
    policy = random_policy()
    (tree,) = collect(
        PathTask(4), policy, ByteTranscript(), questions(1), RootExplorer(1), seed=0, step=0, temperature=0.0
    )
    assert {request.temperature for batch in policy.batches for request in batch} == {0.0}
    assert len(tree.leaves()) == 1


def test_trees_carry_the_policy_version():
    policy = random_policy()
    policy.sync()
    assert [tree.policy_version for tree in run(RootExplorer(1), 2, policy=policy)] == [1, 1]


def test_an_action_without_tokens_is_an_error():
    policy = ToyPolicy(lambda request, rng: Completion((), (), "", "eos"))
    with pytest.raises(PolicyError, match="question 'q0' got 0 tokens"):
        run(RootExplorer(1), policy=policy)


def test_no_questions_give_no_trees():
    policy = random_policy()
    assert run(RootExplorer(2), 0, policy=policy) == [] and policy.batches == []


def test_timings_add_up_over_calls():
    timings = Timings()
    spent = []
    for step in range(2):
        collect(
            PathTask(4),
            random_policy(),
            ByteTranscript(),
            questions(2),
            RootExplorer(2),
            seed=0,
            step=step,
            timings=timings,
        )
        spent.append((timings.sample, timings.environment))
    assert 0 < spent[0][0] < spent[1][0] and 0 < spent[0][1] < spent[1][1]
