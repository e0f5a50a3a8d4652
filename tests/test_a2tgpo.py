"""A2TGPO: gains of turns and what becomes of them, on a group worked out by hand."""

import math

import numpy as np
import pytest
from rollout_toys import Sketch

from carl_gym.algorithms import get_algorithm
from carl_gym.algorithms.a2tgpo import information_gain, turn_group_gains
from carl_gym.algorithms.credit import turn_normalised
from carl_gym.errors import ConfigError, StateError
from carl_gym.rollouts import RolloutTree, RootExplorer

LOGPROBS = [(-3.0, -1.0), (-2.0, -2.0), (-4.0,)]
"""Of the gold answer, after each turn but the last of three rollouts; -4 after the prompt."""


def group(outcomes: tuple[float, float, float] = (1.0, 0.0, 0.5)) -> RolloutTree:
    """0 -> 1 -> 2 -> 3: 1 (a), 0 -> 4 -> 5 -> 6: 0 (b), 0 -> 7 -> 8: 0.5 (c); the gold answer's log-probs as above."""
    sketch = Sketch()
    root = sketch.root()
    scores = [-4.0]
    for number, (logprobs, reward) in enumerate(zip(LOGPROBS, outcomes, strict=True)):
        state = root
        for logprob in logprobs:
            state = sketch.edge(state, trajectory=number)
            scores.append(logprob)
        sketch.edge(state, reward=reward, end=True, trajectory=number)
        scores.append(math.nan)
    sketch.tree.scores["answer_logprob"] = np.array(scores)
    return sketch.tree


def test_information_gain_is_what_a_turn_added_to_the_answers_log_prob_or_probability():
    nan = math.nan
    gains = information_gain(group(), "logprob")
    assert gains == pytest.approx(np.array([nan, 1, 2, nan, 2, 0, nan, 0, nan]), nan_ok=True)
    gains = information_gain(group(), "probability")
    assert gains[1] == pytest.approx(math.exp(-3) - math.exp(-4))
    assert gains[2] == pytest.approx(math.exp(-1) - math.exp(-3))


def test_turns_are_compared_with_the_same_turn_of_other_rollouts():
    # First turns 1, 2, 0: mean 1, population std sqrt(2/3): 0, 1.22474, -1.22474. Second turns 2, 0: 1, -1.
    tree = group()
    normalised = turn_normalised(tree, information_gain(tree, "logprob"))
    assert normalised == pytest.approx([0, 0, 1, 0, 1.22474, -1, 0, -1.22474, 0], abs=1e-4)


def test_advantage_is_the_outcome_plus_the_rescaled_gains_to_come():
    # Outcomes 1, 0, 0.5: mean 0.5, population std sqrt(1/6): 1.22474, -1.22474, 0.
    # w = 0.3, gamma = 0.5. Second turns: 0.3 * 1 = 0.3 and -0.3.
    # First turns: a 0.3 (0 + 0.5 * 1)/sqrt(2) = 0.10607; b 0.3 (1.22474 - 0.5)/sqrt(2) = 0.15374;
    # c has one gain: 0.3 * -1.22474 = -0.36742. Answers have the outcome alone.
    (advantage,) = turn_group_gains([group()], gain="logprob", gain_weight=0.3, gamma=0.5)
    a, b, c = 1.22474, -1.22474, 0.0
    expected = [0, a + 0.10607, a + 0.3, a, b + 0.15374, b - 0.3, b, c - 0.36742, c]
    assert advantage == pytest.approx(expected, abs=1e-4)


def test_equal_outcomes_and_gains_leave_no_advantage():
    tree = group(outcomes=(0.3, 0.3, 0.3))
    tree.scores["answer_logprob"] = np.where(np.isnan(tree.scores["answer_logprob"]), math.nan, -0.7)
    (advantage,) = turn_group_gains([tree], gain="logprob", gain_weight=0.3, gamma=1.0)
    assert not advantage.any()


def test_a_turn_that_only_one_rollout_got_to_has_no_normalised_gain():
    sketch = Sketch()
    root = sketch.root()
    sketch.edge(root, reward=1.0, end=True)
    alone = sketch.edge(root, trajectory=1)
    sketch.edge(alone, end=True, trajectory=1)
    sketch.tree.scores["answer_logprob"] = np.array([-2.0, math.nan, -1.0, math.nan])
    assert not turn_normalised(sketch.tree, information_gain(sketch.tree, "logprob")).any()


@pytest.mark.parametrize("scores", [{}, {"answer_logprob": np.full(9, math.nan)}])
def test_trees_without_scores_are_refused(scores):
    tree = group()
    tree.scores = scores
    with pytest.raises(StateError, match=r"how likely its gold answer is .* fill tree.scores\['answer_logprob'\]"):
        turn_group_gains([tree], gain="logprob", gain_weight=0.3, gamma=1.0)


def test_a2tgpo_is_a_group_method_that_requires_gold_answers():
    algorithm = get_algorithm("a2tgpo")
    assert algorithm.explorer == RootExplorer(16)
    assert algorithm.requires == ("gold answers",)
    (advantage,) = algorithm.credit([group()])
    # w = 0.3, gamma = 1: a's first turn has 1.22474 + 0.3 (0 + 1)/sqrt(2).
    assert advantage[1] == pytest.approx(1.22474 + 0.21213, abs=1e-4)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rollouts": 1}, "rollouts must be at least 2"),
        ({"gain": "entropy"}, "gain must be one of probability, logprob, not 'entropy'"),
        ({"gain_weight": -1}, "gain_weight must be a number >= 0, not -1"),
        ({"gain_weight": math.inf}, "gain_weight must be a number >= 0, not inf"),
        ({"gamma": 1.5}, "gamma must be a number from 0 to 1, not 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        get_algorithm("a2tgpo", **overrides)
