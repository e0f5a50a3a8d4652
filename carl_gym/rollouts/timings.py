"""Where the time of rollouts goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Timings:
    """Wall-clock seconds that `collect` spent, added up over its calls.

    In ticks the two follow one another; asynchronously they overlap. In both, what is left of the whole when `sample`
    is taken away is time in which the policy had nothing to do.

    Attributes:
        sample: with actions under way in the policy.
        environment: in the task: transitions with their retrieval, rewards, observations.
    """

    sample: float = 0.0
    environment: float = 0.0
