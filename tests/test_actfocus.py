"""ActFocus: which tokens are a thought, and what the others weigh; worked out in the comments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_toys import after, questions

from carl_gym.agents.agent import Agent
from carl_gym.agents.policy import Completion
from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.algorithms.actfocus import actfocus, count_reasoning
from carl_gym.envs.registration import make_task
from carl_gym.envs.state import EnvState
from carl_gym.errors import ConfigError, StateError
from carl_gym.rollouts import RolloutTree, collect
from carl_gym.training.segments import rows, segments

VOCABULARY = ["<think>", "so", "</think>", "<answer>", "x", "</answer>", "</th", "ink>", " "]


def decode(tokens: Sequence[int]) -> str:
    return "".join(VOCABULARY[token] for token in tokens)


def tree_of(*actions: tuple[Sequence[int], Sequence[float]]) -> RolloutTree:
    """One root, an action of given tokens and log-probs per rollout; the first of them pays 1, the others nothing."""
    tree = RolloutTree(questions(1)[0], policy_version=0)
    root = tree.add_root(EnvState("q0"), (100,))
    for number, (tokens, logprobs) in enumerate(actions):
        action = Completion(tuple(tokens), tuple(logprobs), decode(tokens), "stop")
        state = after(EnvState("q0"), str(number))
        tree.add_child(root, action, state, (), float(number == 0), True, False, number)
    return tree


def test_thoughts_weigh_little_and_surprising_action_tokens_most():
    # <think> so </think> | <answer> x </answer> of surprises 1, 1, 4, and x alone of 2: mean 2, variance 1.5.
    # sigmoid(-.8164966) = .3065082, sigmoid(1.6329932) = .8365797, sigmoid(0) = .5. With alpha .1 and beta .5 the
    # weights are .1 three times, 1.1532541 twice, 1.4182899, and 1.25.
    tree = tree_of(([0, 1, 2, 3, 4, 5], [-9, -9, -9, -1, -1, -4]), ([4], [-2]))
    count_reasoning([tree], decode)
    assert tree.scores["reasoning_tokens"].tolist() == [0, 3, 0]
    root, first, second = actfocus().emphasis(tree)
    total = 0.3 + 2 * 1.1532541 + 1.4182899 + 1.25
    assert len(root) == 0
    assert first == pytest.approx(np.array([0.1, 0.1, 0.1, 1.1532541, 1.1532541, 1.4182899]) * 7 / total, abs=1e-6)
    assert second == pytest.approx([1.25 * 7 / total], abs=1e-6)


def test_the_loss_is_the_weighted_mean_of_the_paper():
    # J at ratio 1 is sum w A / sum w: GRPO on returns 1, 0 gives A = +-.7071058, and w = 1, .5 (reasoning) per token.
    # Rollout 0: 2 action tokens; rollout 1: a thought of 2 and 1 action token. (2 A - 2 A)/4 = 0; its parts are +-.
    tree = tree_of(([4, 5], [-1, -1]), ([1, 2, 4], [-1, -1, -1]))
    count_reasoning([tree], decode)
    algorithm = actfocus(reasoning_weight=0.5, surprise_weight=0.0)
    mask = algorithm.selection([tree])
    (weight,) = token_weights([tree], mask, algorithm.loss_reduction)
    parts = rows(segments(tree, algorithm.credit([tree])[0], weight, algorithm.emphasis(tree)))
    objectives = [float((row.weights * row.advantages).sum()) for row in parts]
    assert sorted(objectives) == pytest.approx([-2 * 0.7071058 / 4, 2 * 0.7071058 / 4], abs=1e-6)
    thinking = parts[np.argmin(objectives)]
    assert (thinking.weights * thinking.advantages) == pytest.approx(np.array([0.5, 0.5, 1]) * -0.7071058 / 4, abs=1e-6)


@pytest.mark.parametrize(
    ("tokens", "opened", "count"),
    [
        ([3, 4, 5], False, 0),  # no thought
        ([0, 1, 2, 8, 3, 4, 5], False, 3),  # a blank after the thought belongs to the action
        ([0, 1, 6, 7, 3, 4, 5], False, 4),  # the tag in two tokens
        ([0, 1, 2, 0, 1, 2, 3], False, 6),  # two thoughts
        ([0, 1, 1], False, 3),  # never closed
        ([0, 1, 2, 0, 1], False, 5),  # the second is never closed
        ([1, 2, 3, 4, 5], True, 2),  # the chat template opened it
        ([1, 1, 4], True, 3),  # and nobody closed it
        ([1, 2, 3], False, 2),  # a closing tag without an opening one
    ],
)
def test_how_long_a_thought_is(tokens, opened, count):
    tree = tree_of((tokens, [-1.0] * len(tokens)))
    count_reasoning([tree], decode, opened=opened)
    assert tree.scores["reasoning_tokens"].tolist() == [0, count]


def test_actions_without_thoughts_need_no_count():
    tree = tree_of(([3, 4, 5], [-1, -1, -1]), ([4], [-1]))
    for factors in actfocus().emphasis(tree)[1:]:
        assert factors == pytest.approx(1)  # all equally surprising


def test_a_thought_that_nobody_counted_is_an_error_that_names_the_question():
    for tokens in ([0, 1, 2, 4], [1, 2, 4]):
        with pytest.raises(StateError, match=r"'q0'.*count_reasoning"):
            actfocus().emphasis(tree_of((tokens, [-1.0] * len(tokens))))


def test_reasoning_alone_without_weight_trains_nothing():
    tree = tree_of(([0, 1], [-1, -1]))
    count_reasoning([tree], decode)
    assert [factor.tolist() for factor in actfocus(reasoning_weight=0.0).emphasis(tree)] == [[], [0, 0]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([1, 4]), max_size=4), st.lists(st.floats(-8, 0), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 1),
    st.floats(0, 3),
)
def test_the_mean_weight_is_one_and_uniform_settings_change_nothing(parts, alpha, beta):
    actions = [
        ([*([0, *thought, 2] if thought else []), *[4] * len(logprobs)], [*[-1.0] * _length(thought), *logprobs])
        for thought, logprobs in parts
    ]
    tree = tree_of(*actions)
    count_reasoning([tree], decode)
    weights = np.concatenate(actfocus(reasoning_weight=alpha, surprise_weight=beta).emphasis(tree))
    assert weights.mean() == pytest.approx(1) and (weights >= 0).all()
    assert np.concatenate(actfocus(reasoning_weight=1.0, surprise_weight=0.0).emphasis(tree)) == pytest.approx(1)


def _length(thought: list[int]) -> int:
    return len(thought) + 2 if thought else 0


def test_thoughts_of_a_real_agent_end_where_its_text_says(tiny_agent: Agent):
    task = make_task("carl/MiniWiki-v0", questions=3)
    algorithm = get_algorithm("actfocus", rollouts=3)
    trees = collect(
        task,
        tiny_agent.policy,
        tiny_agent.transcript,
        list(task.questions.values()),
        algorithm.explorer,
        seed=1,
        step=1,
    )
    count_reasoning(trees, tiny_agent.tokenizer.decode)
    counts = []
    for tree in trees:
        for node, count in zip(tree.nodes, tree.scores["reasoning_tokens"].astype(int), strict=True):
            if node.action:
                thought = tiny_agent.tokenizer.decode(node.action.token_ids[:count])
                assert thought == "" or thought.endswith("</think>") or thought.count("<think>") > 0
                assert "</think>" not in tiny_agent.tokenizer.decode(node.action.token_ids[count:])
                counts.append(count)
        assert sum(map(sum, algorithm.emphasis(tree))) == pytest.approx(sum(map(len, algorithm.emphasis(tree))))
    assert max(counts) > 0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rollouts": 1}, "rollouts must be at least 2"),
        ({"reasoning_weight": 1.5}, "reasoning_weight"),
        ({"reasoning_weight": -0.1}, "reasoning_weight"),
        ({"reasoning_weight": "small"}, "reasoning_weight"),
        ({"surprise_weight": -1.0}, "surprise_weight"),
        ({"surprise_weight": math.inf}, "surprise_weight"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong, named):
    with pytest.raises(ConfigError, match=named):
        actfocus(**wrong)
