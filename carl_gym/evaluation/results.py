"""From kept episodes to what summary.json says about an agent in an environment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from carl_gym.evaluation.environments import Environment
from carl_gym.evaluation.episodes import Episode
from carl_gym.evaluation.store import Record
from carl_gym.evaluation.summary import Evaluation, break_down, summarise

Prices = tuple[float, float]
"""Of a million prompt tokens and of a million generated ones."""


def agent_result(
    agent: str, environment: Environment, records: Sequence[Record], prices: Prices | None = None
) -> dict[str, Any]:
    """Scores of an agent in an environment: JSON values, None for what the data cannot tell.

    `cost_per_question` is that of all episodes of a question; `by` breaks the scores down (see `break_down`).

    Args:
        agent: its name.
        environment: where it played.
        records: all its episodes there.
        prices: of its tokens; None leaves the cost open.
    """
    episodes = in_order(environment, records)
    found = summarise(episodes)
    return {
        "agent": agent,
        **_known(found),
        "cost_per_question": None if prices is None else _cost(found, prices),
        "seconds": round(sum(record.seconds for record in records), 3),
        "by": {
            trait: {value: _known(group) for value, group in groups.items()}
            for trait, groups in break_down(episodes, environment.task.questions).items()
        },
    }


def evaluation_of(result: Mapping[str, Any]) -> Evaluation:
    """The scores that `agent_result` wrote down."""
    names = (field.name for field in dataclasses.fields(Evaluation))
    values: dict[str, Any] = {name: math.nan if result[name] is None else result[name] for name in names}
    return Evaluation(**values)


def in_order(environment: Environment, records: Sequence[Record]) -> list[Episode]:
    """The episodes in the order of the questions, so that sums do not depend on where a run was interrupted."""
    place = {question.id: number for number, question in enumerate(environment.questions)}
    return sorted((record.episode for record in records), key=lambda e: (place[e.question_id], e.sample))


def _known(found: Evaluation) -> dict[str, Any]:
    values = dataclasses.asdict(found)
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _cost(found: Evaluation, prices: Prices) -> float | None:
    tokens = found.prompt_tokens, found.generated_tokens
    cost = found.samples * sum(number * price for number, price in zip(tokens, prices, strict=True)) / 1e6
    return None if math.isnan(cost) else cost
