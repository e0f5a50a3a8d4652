"""Writes a run's checkpoints: the main process the agent and the trainer's state, every process its shards of the
optimiser; before the next step, or beside it from a copy in memory.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from carl_gym.agents.agent import Agent
from carl_gym.training.adapter import Adapter
from carl_gym.training.checkpoints import (
    SHARDS,
    STATE_FILE,
    UNWRITABLE,
    Progress,
    cannot_write,
    checkpoints,
    fresh_folder,
    put_in_place,
    save_best,
    trainer_state,
)
from carl_gym.training.critic import Critic
from carl_gym.training.learner import Learner
from carl_gym.training.ranks import Ranks

Weights = Mapping[str, torch.Tensor]


class Saver:
    """What is kept of a run. All of its processes call the same methods; the main one writes nearly everything.

    Args:
        output_dir: of the run; all processes see it.
        ranks: the processes of the run.
        agent: with the model, its tokenizer and card.
        learner: with the weights that learn, and the optimiser.
        own_weights: whether the agent's model has those weights, whole and under its own names.
        critic: where one learns.
        adapter: where it alone learns.
        keep: how many checkpoints stay, the newest ones.
        background: write beside training.
    """

    def __init__(
        self,
        output_dir: Path,
        ranks: Ranks,
        agent: Agent,
        learner: Learner,
        *,
        own_weights: bool = True,
        critic: Critic | None = None,
        adapter: Adapter | None = None,
        keep: int = 2,
        background: bool = False,
    ) -> None:
        self._output_dir, self._ranks, self._agent, self._learner = output_dir, ranks, agent, learner
        self._own_weights, self._critic, self._adapter = own_weights, critic, adapter
        self._keep, self._background = keep, background
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        # Shards are written with talk between the processes, beside that of training.
        self._group = torch.distributed.new_group(backend="gloo") if learner.writes_shards and background else None
        self._pending: tuple[Path, Path, list[Future[Any]]] | None = None

    def save(self, progress: Progress, run_id: str) -> None:
        """A checkpoint of where the run stands.

        Raises:
            DataError: it, or the one before, cannot be written; nothing of it is left then.
        """
        self.settle()
        ranks, learner = self._ranks, self._learner
        weights = None if self._own_weights and not self._background else learner.weights()
        learned = learner.trained_weights() if self._adapter else {}
        optimizer = {} if learner.writes_shards else learner.state()
        state = trainer_state(progress, self._agent, optimizer, run_id, self._critic)
        if self._background:  # the next step changes what is written
            weights, learned, state = copy.deepcopy((weights, learned, state))
        final = self._output_dir / "checkpoints" / f"step-{progress.step:06d}"
        partial = ranks.agree(fresh_folder(final) if ranks.is_main else final)
        jobs: list[Future[Any]] = []
        if ranks.is_main:
            jobs.append(self._pool.submit(self._write, partial, weights, learned, state))
        if learner.writes_shards:
            jobs.append(learner.write_shards(partial / SHARDS, self._group))
        self._pending = partial, final, jobs
        if not self._background:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Put what was written in its place, once all processes are done with it.

        Args:
            wait: until they are; otherwise only if they are.

        Raises:
            DataError: it cannot be written; nothing of it is left then.
        """
        if self._pending is None:
            return
        partial, final, jobs = self._pending
        if not wait and self._ranks.largest(any(not job.done() for job in jobs))[0]:
            return
        self._pending = None
        try:
            for job in jobs:
                job.result()
            self._ranks.wait()
            if self._ranks.is_main:
                put_in_place(partial, final)
        except UNWRITABLE as error:
            raise cannot_write(partial, final, error) from error
        if self._ranks.is_main:
            for old in checkpoints(self._output_dir)[: -self._keep]:
                shutil.rmtree(old)
        self._ranks.wait()

    def save_best(self, score: Mapping[str, float]) -> None:
        """The agent by itself, as the best so far."""
        weights = None if self._own_weights else self._learner.weights()
        if self._ranks.is_main:
            save_best(self._output_dir, self._agent, score, weights)

    def _write(self, folder: Path, weights: Weights | None, learned: Weights, state: Mapping[str, Any]) -> None:
        self._agent.save(folder, weights)
        if self._adapter is not None:
            self._adapter.save(learned, folder)
        torch.save(state, folder / STATE_FILE)
