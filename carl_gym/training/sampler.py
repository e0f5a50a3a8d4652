"""The trees of a training step: rolled out when they are wanted, or one step ahead, while the learner updates."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from carl_gym.agents.agent import Agent
from carl_gym.envs.state import Question
from carl_gym.errors import ConfigError, PolicyError
from carl_gym.rollouts.collector import Timings, check_schedule, collect, count_repeats
from carl_gym.rollouts.environment import EnvTask
from carl_gym.rollouts.explorers import Explorer
from carl_gym.rollouts.tree import RolloutTree
from carl_gym.training.checkpoints import Progress
from carl_gym.training.config import TrainConfig
from carl_gym.training.preemption import Preemption
from carl_gym.training.questions import questions_within, take_questions
from carl_gym.training.ranks import Ranks
from carl_gym.training.segments import Row

_LOOK = 0.2
"""Seconds between looks at whether the process was told to end."""


class Sampler:
    """Rolls out this process' share of the questions of a step.

    Args:
        config: of the run.
        task: what is acted in.
        agent: what acts.
        explorer: what is rolled out.
        questions: those that the run trains on.
        ranks: the processes that share a step's questions out.
        preemption: whether the process was told to end.

    Raises:
        ConfigError: the agent's policy cannot be run by the schedule, or not beside the learner.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: EnvTask,
        agent: Agent,
        explorer: Explorer,
        questions: Sequence[Question],
        ranks: Ranks,
        preemption: Preemption,
    ) -> None:
        check_schedule(config.schedule, agent.policy)
        if config.one_step_off and agent.lends_memory and not agent.shares_weights:
            raise ConfigError(
                "one_step_off rolls out while the learner updates, and the engine of backend vllm gives its memory to "
                "the learner then; use --backend vllm-server"
            )
        self._config, self._task, self._agent, self._explorer = config, task, agent, explorer
        self._questions, self._ranks, self._preemption = questions, ranks, preemption
        self._pool = ThreadPoolExecutor(1, "rollouts ahead")
        self._ahead: Future[tuple[list[RolloutTree], Timings]] | None = None
        self._dropped = threading.Event()

    def trees(self, step: int, progress: Progress) -> tuple[list[RolloutTree], Timings]:
        """The trees of a step, and what their rollouts took; of rollouts that `begin` began, or of new ones.

        Args:
            step: from 1.
            progress: where the run stands before it.
        """
        ahead, self._ahead = self._ahead, None
        return ahead.result() if ahead else self._collect(step, progress)

    def begin(self, step: int, progress: Progress) -> None:
        """Start on a later step beside whatever else is done, with the weights that the policy has now."""
        self._ahead = self._pool.submit(self._collect, step, progress)

    def wait(self) -> None:
        """Until the policy rests. Raises what its rollouts raised; drops them where the process was told to end."""
        while self._ahead is not None and not wait([self._ahead], _LOOK).done:
            if self._preemption.requested:
                self.drop()
        if self._ahead is not None:
            self._ahead.result()

    def drop(self) -> None:
        """Break off what was begun, at the next action."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._dropped.set()
            wait([ahead])
            self._dropped.clear()

    def check_fresh(self, rows: Sequence[Row]) -> None:
        """Raises PolicyError when rows are staler than is corrected for."""
        version = self._agent.policy.version
        oldest = min((row.policy_version for row in rows), default=version)
        if not 0 <= version - oldest <= self._config.one_step_off:
            raise PolicyError(
                f"version {oldest} of the weights sampled what is to be trained by version {version}; at most "
                f"{int(self._config.one_step_off)} behind is allowed (one_step_off={self._config.one_step_off})"
            )

    def _collect(self, step: int, progress: Progress) -> tuple[list[RolloutTree], Timings]:
        config, ranks, timings = self._config, self._ranks, Timings()
        questions = take_questions(self._questions, step - 1, config.questions_per_step, config.seed)
        questions = questions[: questions_within(progress, config)]
        trees = collect(
            self._task,
            self._agent.policy,
            self._agent.transcript,
            ranks.mine(questions),
            self._explorer,
            seed=config.seed,
            step=step,
            temperature=config.temperature,
            timings=timings,
            schedule=config.schedule,
            repeats=ranks.mine(count_repeats(questions)),
            dropped=self._dropped,
        )
        return trees, timings
