"""verl: rows as the tensors that its actor trains on, and back. Needs torch, not verl.

    batch = verl_batch(rows, pad_token_id)
    data = DataProto.from_dict(tensors=batch, meta_info={"temperature": 1.0, "global_token_num": [...]})
    actor.update_policy(data)   # or update_actor of the worker group

| verl (shape) | row |
|---|---|
| `prompts` (B, P), left-padded | `tokens` before the first trained one |
| `responses` (B, R), right-padded | `tokens` from the first trained one on |
| `input_ids`, `attention_mask`, `position_ids` (B, P + R) | both; position ids count the tokens that are no padding |
| `response_mask` (B, R) | 1 at `positions` |
| `old_log_probs`, `rollout_log_probs` (B, R) | `logprobs`, at sampling |
| `advantages` (B, R) | `advantages` |
| `rollout_is_weights` (B, R) | `weights` times B |
| `token_weights` (B, R) | `weights`; verl ignores it |
| `policy_version` (B,) | `policy_version`; verl ignores it |

`old_log_probs` up to `advantages` are 0 where `response_mask` is. Names and meaning are those of verl's
`DataParallelPPOActor.update_policy`, `workers/utils/losses.py: ppo_loss`, `core_algos.py: agg_loss` and
`agent_loop.py`, as of January 2026 (commit b178a3c).

**Loss weights.** No `loss_agg_mode` of verl takes a weight per token, but its `vanilla` loss multiplies every token's
loss by `rollout_is_weights` before it is aggregated. With

    loss_agg_mode: seq-mean-token-sum      policy_loss.loss_mode: vanilla      clip_ratio_c: 1e9
    clip_ratio_low, clip_ratio_high: the algorithm's                           entropy_coeff: 0, use_kl_loss: false
    ppo_mini_batch_size times rollout.n: B     micro-batches of equal size, or use_dynamic_bsz

verl's loss is sum(weight x PPO clip), the loss of `carl_gym.training.loss`, and rows of every algorithm and every
`loss_reduction` train as in carl-gym. (`clip_ratio_c` is the bound of dual clipping, which that loss does not have.)
Without the factor, no mode gives "action"; "token" and "constant" are `token-mean` and `seq-mean-token-sum` up to a
constant, and "trajectory" is `seq-mean-token-mean` where nothing forks, as long as no action has an advantage of 0:
such actions have no rows.

**What has no place in these tensors.** Rewards and values: rows carry advantages, so skip verl's `compute_advantage`,
which would overwrite them. The tree: what rows share is repeated. Where a batch is one mini-batch and `ppo_epochs` is
1, `DataParallelPPOActor` takes its own log-probs for `old_log_probs`, and all ratios are 1. A number of rows that its
ranks do not divide is yours to arrange: `pad_dataproto_to_divisor` repeats rows, which would then train twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from carl_gym.errors import ConfigError
from carl_gym.training.segments import Row

_ALIGNED = ("response_mask", "old_log_probs", "advantages", "token_weights")
_READ = ("prompts", "responses", "attention_mask", "policy_version", *_ALIGNED)


def verl_batch(
    rows: Sequence[Row], pad_token_id: int, *, prompt_length: int | None = None, response_length: int | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a DataProto that trains on `rows` in one optimiser step; the module's text has the fields.

    Args:
        rows: of one step, their weights summing to 1 with those of the actions that have no row.
        pad_token_id: what `prompts` and `responses` are filled up with.
        prompt_length: P; the longest prompt by default.
        response_length: R; the longest response by default.

    Returns:
        int64 ids, masks and positions, and float32 values.

    Raises:
        ConfigError: no rows, or one that is longer than the given lengths (nothing is ever cut off).
    """
    if not rows:
        raise ConfigError("there are no rows to train on (no trained action has an advantage); skip this step")
    prompts = [row.tokens[: row.positions[0]] for row in rows]
    responses = [row.tokens[row.positions[0] :] for row in rows]
    before = _length("prompt", prompts, prompt_length)
    after = _length("response", responses, response_length)
    ids = np.full((len(rows), before + after), pad_token_id, dtype=np.int64)
    attention = np.zeros_like(ids)
    mask = np.zeros((len(rows), after), dtype=np.int64)
    values = np.zeros((3, len(rows), after), dtype=np.float32)
    for index, (row, prompt, response) in enumerate(zip(rows, prompts, responses, strict=True)):
        start, stop = before - len(prompt), before + len(response)
        ids[index, start:stop] = row.tokens
        attention[index, start:stop] = 1
        columns = row.positions - len(prompt)
        mask[index, columns] = 1
        values[:, index, columns] = row.logprobs, row.advantages, row.weights
    tensors = {
        "prompts": ids[:, :before],
        "responses": ids[:, before:],
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": np.maximum(attention.cumsum(1) - 1, 0),
        "response_mask": mask,
        "old_log_probs": values[0],
        "rollout_log_probs": values[0],
        "advantages": values[1],
        "rollout_is_weights": values[2] * len(rows),
        "token_weights": values[2],
        "policy_version": np.array([row.policy_version for row in rows]),
    }
    return {name: torch.tensor(array) for name, array in tensors.items()}


def rows_of_verl_batch(batch: Mapping[str, torch.Tensor]) -> list[Row]:
    """The rows that `verl_batch` was given, exactly; in any order of the batch's rows, and with any padding.

    Args:
        batch: at least `prompts`, `responses`, `attention_mask`, `policy_version`, `response_mask`, `old_log_probs`,
            `advantages` and `token_weights`.

    Raises:
        ConfigError: a tensor is missing or has another shape, or a row has nothing to train or trains on padding.
    """
    if missing := [name for name in _READ if name not in batch]:
        raise ConfigError(f"the batch has no {missing[0]!r}; rows need {', '.join(_READ)}")
    prompts, responses, attention, versions, *aligned = (batch[name].cpu().numpy() for name in _READ)
    shape, both = responses.shape, np.concatenate([prompts, responses], axis=1)
    for name, array, expected in (
        ("attention_mask", attention, both.shape),
        ("policy_version", versions, (len(both),)),
        *((name, array, shape) for name, array in zip(_ALIGNED, aligned, strict=True)),
    ):
        if array.shape != expected:
            raise ConfigError(
                f"{name} has the shape {array.shape} and not {expected}, as prompts and responses ask for"
            )
    mask, logprobs, advantages, weights = aligned
    before = prompts.shape[1]
    found = []
    for index in range(len(both)):
        real, trained = attention[index] > 0, mask[index] > 0
        if not trained.any() or not real[before:][trained].all():
            raise ConfigError(
                f"row {index} of the batch has nothing to train, or trains on padding; its response_mask must mark "
                "some of the tokens that attention_mask marks"
            )
        found.append(
            Row(
                tokens=both[index][real].astype(np.int64),
                positions=(real.cumsum() - 1)[before:][trained],
                logprobs=logprobs[index][trained].astype(np.float32),
                advantages=advantages[index][trained].astype(np.float32),
                weights=weights[index][trained].astype(np.float32),
                policy_version=int(versions[index]),
            )
        )
    return found


def _length(name: str, parts: Sequence[np.ndarray], given: int | None) -> int:
    longest = max(len(part) for part in parts)
    if given is not None and longest > given:
        raise ConfigError(
            f"a {name} has {longest} tokens, more than {name}_length={given}; raise it, or have the agent stop earlier "
            "(context in its card)"
        )
    return longest if given is None else given
