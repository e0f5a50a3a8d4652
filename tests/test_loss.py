"""PPO clip against a reference written from Eq. 7 of the paper, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.training.loss import LossTerms, ppo_clip

Token = tuple[float, float, float, float]
"""Log-prob, log-prob at sampling, advantage, weight."""


def reference(tokens: list[Token], low: float, high: float) -> tuple[float, list[float], float]:
    """Loss, its derivative by each log-prob, and the weight of the tokens that the clip stopped."""
    loss, gradient, clipped_weight = 0.0, [], 0.0
    for logprob, sampled, advantage, weight in tokens:
        ratio = math.exp(logprob - sampled)
        clipped = min(max(ratio, 1 - low), 1 + high)
        loss -= weight * min(ratio * advantage, clipped * advantage)
        stopped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
        gradient.append(0.0 if stopped else -weight * ratio * advantage)
        clipped_weight += weight * stopped
    return loss, gradient, clipped_weight


def computed(tokens: list[Token], low: float, high: float) -> tuple[LossTerms, list[float]]:
    logprobs, *others = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    logprobs.requires_grad_()
    terms = ppo_clip(logprobs, *others, low, high)
    terms.loss.backward()
    return terms, logprobs.grad.tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -1.2 * 2.0, 0.0),  # grown enough: the clip stops it
        (0.5, 2.0, -0.5 * 2.0, -0.5 * 2.0),  # shrunk although good: never clipped
        (0.5, -2.0, 0.8 * 2.0, 0.0),  # shrunk enough
        (1.5, -2.0, 1.5 * 2.0, 1.5 * 2.0),  # grown although bad: never clipped
        (1.1, 2.0, -1.1 * 2.0, -1.1 * 2.0),  # within the clip
        (0.9, -2.0, 0.9 * 2.0, 0.9 * 2.0),
        (1.0, 2.0, -2.0, -2.0),  # on policy it is the policy gradient
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_known_answers(ratio, advantage, loss, slope):
    terms, gradient = computed([(math.log(ratio) - 3, -3.0, advantage, 1.0)], 0.2, 0.2)
    assert terms.loss.item() == pytest.approx(loss)
    assert gradient == pytest.approx([slope])
    assert float(terms.clipped) == (1.0 if slope == 0 and advantage else 0.0)
    assert float(terms.gap) == pytest.approx(abs(math.log(ratio)), abs=1e-12)


def test_the_two_sides_clip_independently():
    outside = [(math.log(1.25), 0.0, 1.0, 0.5), (math.log(0.85), 0.0, -1.0, 0.5)]
    terms, gradient = computed(outside, 0.1, 0.3)
    assert gradient == pytest.approx([-0.5 * 1.25, 0.0])
    assert float(terms.clipped) == 0.5
    terms, gradient = computed(outside, 0.3, 0.1)
    assert gradient == pytest.approx([0.0, 0.5 * 0.85])
    assert terms.loss.item() == pytest.approx(-0.5 * 1.1 + 0.5 * 0.85)


numbers = st.floats(-3, 3, allow_subnormal=False)
token = st.tuples(numbers, numbers, numbers.filter(lambda a: a == 0 or abs(a) > 1e-6), st.floats(0, 1))


@given(st.lists(token, min_size=1, max_size=30), st.floats(0.01, 0.9), st.floats(0.01, 3))
def test_loss_and_gradient_equal_the_reference(tokens, low, high):
    terms, gradient = computed(tokens, low, high)
    loss, slopes, stopped = reference(tokens, low, high)
    assert terms.loss.item() == pytest.approx(loss, abs=1e-9)
    edges = [abs(math.exp(t[0] - t[1]) - bound) < 1e-9 for t in tokens for bound in (1 - low, 1 + high)]
    if not any(edges):  # on the edge itself there are two subgradients
        assert gradient == pytest.approx(slopes, abs=1e-9)
        assert float(terms.clipped) == pytest.approx(stopped, abs=1e-6)
    assert float(terms.gap) == pytest.approx(max(abs(t[0] - t[1]) for t in tokens))


@given(st.lists(token, min_size=2, max_size=20), st.integers(1, 19))
def test_a_minibatch_may_be_cut_anywhere_since_losses_add_up(tokens, cut):
    cut = min(cut, len(tokens) - 1)
    whole, _ = computed(tokens, 0.2, 0.2)
    parts = [computed(part, 0.2, 0.2)[0] for part in (tokens[:cut], tokens[cut:])]
    assert whole.loss.item() == pytest.approx(sum(part.loss.item() for part in parts), abs=1e-9)
    assert float(whole.clipped) == pytest.approx(sum(float(part.clipped) for part in parts), abs=1e-9)
