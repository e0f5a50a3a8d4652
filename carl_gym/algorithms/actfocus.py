"""ActFocus: GRPO whose loss weighs the tokens of an action more than those of the thought before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from carl_gym.algorithms.algorithm import Algorithm, register_algorithm
from carl_gym.algorithms.credit import FloatArray, group_normalised
from carl_gym.algorithms.selection import Reduction, all_actions
from carl_gym.algorithms.settings import require_group, require_shares, require_weights
from carl_gym.errors import StateError
from carl_gym.rollouts.explorers import RootExplorer
from carl_gym.rollouts.tree import RolloutTree

EPSILON = 1e-8

_OPENING, _CLOSING = "<think>", "</think>"


@register_algorithm("actfocus")
def actfocus(
    rollouts: int = 16,
    reasoning_weight: float = 0.1,
    surprise_weight: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    loss_reduction: Reduction = "token",
) -> Algorithm:
    """Token reweighting, on GRPO (He et al., "Resolving Action Bottleneck", arXiv 2605.14558).

    Rollout: G = `rollouts` trajectories from the root.

    Credit: every action of trajectory i gets  A_i = (R_i - mean(R)) / (std(R) + 1e-6),  over the question's group.

    Update, over the tokens of all actions of all trajectories of the batch, with alpha = `reasoning_weight` and
    beta = `surprise_weight`:

        J   = 1/(sum_j w_j) sum_j w_j min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A)
        w_j = alpha                                  tokens up to the end of the thought
        w_j = 1 + beta sigmoid((s_j - mean) / std)   the others; mean and std over them
        s_j = -log pi(token) at sampling

    alpha, beta and the clip are those of the paper's experiments (Appendix, "Training and Evaluation Settings"). No
    code was released. Differs from the paper: its s_j is the free energy -logsumexp(logits) of a frozen reference
    model, of which there is none here; this s_j is its variant "policy NLL" (Appendix, "Signal Variants"), which
    moves with the policy. Mean and std of s, and the sum of w, are over the question's tokens, not over the batch's.
    No entropy bonus, no filter of groups.

    Which tokens are a thought has to be written into `tree.scores` before the update (`count_reasoning`).

    Raises:
        ConfigError: fewer than 2 rollouts, or another setting out of its range.
    """
    require_group(rollouts)
    require_shares(reasoning_weight=reasoning_weight)
    require_weights(surprise_weight=surprise_weight)
    return Algorithm(
        name="actfocus",
        explorer=RootExplorer(rollouts),
        credit=group_normalised,
        selection=all_actions,
        clip_low=clip_low,
        clip_high=clip_high,
        loss_reduction=loss_reduction,
        emphasis=partial(action_emphasis, reasoning_weight=reasoning_weight, surprise_weight=surprise_weight),
        requires=("thoughts",),
    )


def action_emphasis(tree: RolloutTree, *, reasoning_weight: float, surprise_weight: float) -> list[FloatArray]:
    """ActFocus' token weights (arXiv 2605.14558, "Token Credit Assignment"), with a mean of 1 over the tree's tokens.

    All 0 where reasoning alone was sampled and has no weight.

    Raises:
        StateError: an action has a thought, and `tree.scores["reasoning_tokens"]` does not say how long it is.
    """
    lengths = _reasoning_lengths(tree)
    surprises = [-np.array(node.action.logprobs if node.action else (), dtype=np.float64) for node in tree.nodes]
    acting = np.concatenate(
        [np.zeros(0), *(surprise[length:] for surprise, length in zip(surprises, lengths, strict=True))]
    )
    mean, std = (acting.mean(), math.sqrt(acting.var() + EPSILON)) if len(acting) else (0.0, 1.0)
    factors = []
    for surprise, length in zip(surprises, lengths, strict=True):
        factor = np.full(len(surprise), float(reasoning_weight))
        factor[length:] = 1 + surprise_weight / (1 + np.exp((mean - surprise[length:]) / std))
        factors.append(factor)
    total, tokens = sum(float(factor.sum()) for factor in factors), sum(map(len, factors))
    return [factor * (tokens / total) if total > 0 else factor for factor in factors]


def _reasoning_lengths(tree: RolloutTree) -> list[int]:
    counted = tree.scores.get("reasoning_tokens")
    if counted is not None:
        return [int(count) for count in counted]
    for node in tree.nodes:
        if node.action and (_OPENING in node.action.text or _CLOSING in node.action.text):
            raise StateError(
                f"an action on question {tree.question.id!r} has a thought, and which of its tokens that is nobody "
                "said; fill tree.scores['reasoning_tokens'] with algorithms.actfocus.count_reasoning before the update"
            )
    return [0] * len(tree.nodes)


def count_reasoning(
    trees: Sequence[RolloutTree], decode: Callable[[Sequence[int]], str], *, opened: bool = False
) -> None:
    """Write into every tree how many of each action's first tokens are its thought, as `scores["reasoning_tokens"]`.

    A thought ends with the last `</think>` of the action; one that is never closed takes the whole action. Text
    between the thought and the tool belongs to the action.

    Args:
        trees: finished.
        decode: of the agent's tokenizer: token ids -> text, control tokens included.
        opened: whether every prefix ends inside a thought that the chat template opened.
    """
    for tree in trees:
        actions = [node.action.token_ids if node.action else () for node in tree.nodes]
        tree.scores["reasoning_tokens"] = np.array([_count(tokens, decode, opened) for tokens in actions], dtype=float)


def _count(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], opened: bool) -> int:
    text = (_OPENING if opened else "") + decode(tokens) if tokens else ""
    closings = text.count(_CLOSING)
    if text.rfind(_OPENING) > text.rfind(_CLOSING):
        return len(tokens)
    low, high = 0, len(tokens)  # the fewest tokens that hold every closing tag
    while low < high:
        middle = (low + high) // 2
        if decode(tokens[:middle]).count(_CLOSING) < closings:
            low = middle + 1
        else:
            high = middle
    return low
