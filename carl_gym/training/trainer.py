"""The training loop: questions -> trees -> credit -> rows -> optimiser steps -> weights back to the sampler.

The trainer is blind to the algorithm: it runs whatever explorer, credit and selection it is given. Every random
number is derived from (seed, step, question, trajectory, depth), so a run that was stopped at any point and resumed
from its last checkpoint does exactly what it would have done (in ticks; asynchronously up to rounding).

Several processes (`ranks.py`) grow the trees of different questions. Each is given all finished trees, so that credit,
selection and weights are those of the whole step whatever the algorithm; then it trains the rows of its own trees.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

import numpy as np
import torch

from carl_gym.agents.agent import Agent, load_agent
from carl_gym.agents.canary import TOLERANCES, Canary
from carl_gym.agents.card import resolve
from carl_gym.envs.state import Question
from carl_gym.errors import CarlGymError, ConfigError
from carl_gym.evaluation import Episode, play, summarise
from carl_gym.tracking.training_figure import StepDistributions
from carl_gym.training.adapter import Adapter
from carl_gym.training.checkpoints import Progress, checkpoints, load_checkpoint
from carl_gym.training.config import TrainConfig, check_output_dir
from carl_gym.training.credited import CreditedTree, credit_trees, trained_rows
from carl_gym.training.distributions import step_distributions
from carl_gym.training.instruments import instrumented
from carl_gym.training.kept_trees import KeptTrees
from carl_gym.training.learner import Learner, NotFinite, UpdateMetrics
from carl_gym.training.manifest import without_damaged
from carl_gym.training.metrics import rollout_metrics, trained_tokens, update_metrics
from carl_gym.training.metrics_file import DISTRIBUTIONS_FILE, METRICS_FILE, append_row, kept_metrics
from carl_gym.training.preemption import Preempted, Preemption
from carl_gym.training.profile_report import write_profile
from carl_gym.training.profiler import Profiler
from carl_gym.training.questions import load_data
from carl_gym.training.ranks import index_and_count, launched
from carl_gym.training.recording import finish_run, open_run, record_evaluation
from carl_gym.training.sampler import Sampler
from carl_gym.training.saver import Saver
from carl_gym.training.scores import TreeScores
from carl_gym.training.segments import Row
from carl_gym.training.watchdog import Watchdog

BAD_BATCH = "bad-batch-{}.pt"
"""Rows of the last optimiser step that was not finite, by process."""
BEST_BY = "eval/sampled_em"
"""What decides which agent is the best so far."""


class Trainer:
    """One training run. Construct it, then iterate over `run()` to the end.

    Args:
        config: what to do.
        profile: measure where the time goes, and leave a table and a trace of it in the output directory. The results
            are the same.

    Raises:
        CarlGymError: the configuration, agent, data or output directory cannot be used; nothing was written then.
    """

    def __init__(self, config: TrainConfig, *, profile: bool = False) -> None:
        self.config = config
        index, count = index_and_count()
        self.watchdog = Watchdog(f"process {index} of {count}", config.hang_seconds)
        with self.watchdog.watching():
            with self.watchdog.phase("connecting to the other processes"):
                self.ranks = launched(config.device)
            with self.watchdog.phase("start"):
                self._start(profile)

    def _start(self, profile: bool) -> None:
        config = self.config
        if self.ranks.is_main:
            check_output_dir(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.algorithm = config.make_algorithm()
        if self.ranks.count > 1 and "critic" in self.algorithm.requires:
            raise ConfigError(f"algorithm {self.algorithm.name!r} has a critic, which learns in one process only")
        if config.lora_rank and "critic" in self.algorithm.requires:
            raise ConfigError(f"algorithm {self.algorithm.name!r} has a critic, which lora_rank has no form for")
        self.task, self.questions, self.eval_task, self.eval_questions = load_data(config)
        resumes = config.resume and self.ranks.is_main
        saved = self.ranks.agree(without_damaged(checkpoints(config.output_dir)) if resumes else [])
        # An adapter goes on from the weights that it was put on, and not from those with itself added.
        self.agent = self._load_agent(str(saved[-1]) if saved and not config.lora_rank else config.agent)
        if self.agent.model is None:
            raise ConfigError(
                f"agent {config.agent!r} is hosted (backend {self.agent.card.backend}) and has no weights here to "
                "train; evaluate it with scripts/evaluate.py, or train a model folder or hub id"
            )
        self.preemption = Preemption()
        self.sampler = Sampler(
            config, self.task, self.agent, self.algorithm.explorer, self.questions, self.ranks, self.preemption
        )
        if config.canary_tolerance is not None and self.agent.shares_weights:
            raise ConfigError(
                "canary_tolerance is for vLLM; with backend transformers sampler and learner are one model"
            )
        if self.ranks.sharded and not self.agent.shares_weights and "gold answers" in self.algorithm.requires:
            raise ConfigError(
                f"algorithm {self.algorithm.name!r} scores gold answers with whole weights, which no process has under "
                "FSDP or DeepSpeed with vLLM; use --backend transformers, or a launcher configured without (ddp.yaml)"
            )
        # The transformers policy needs whole weights to sample from, and others than those that learn while it does.
        self._copied = self.agent.shares_weights and (self.ranks.sharded or config.one_step_off)
        model = copy.deepcopy(self.agent.model) if self._copied else self.agent.model
        self.adapter: Adapter | None = None
        if config.lora_rank:
            alpha = config.lora_alpha or 2.0 * config.lora_rank
            self.adapter = Adapter(model, config.lora_rank, alpha, saved[-1] if saved else None)
        self._own_weights = not (self.ranks.sharded or self._copied or self.adapter)  # the agent's are those that learn
        self.learner = Learner(
            model,
            learning_rate=config.learning_rate,
            temperature=config.temperature,
            max_grad_norm=config.max_grad_norm,
            packing=config.packing,
            batch_tokens=config.batch_tokens,
            autocast=torch.bfloat16 if config.bf16 else None,
            gradient_checkpointing=config.gradient_checkpointing,
            importance_cap=config.importance_cap if config.one_step_off else None,
            ranks=self.ranks,
        )
        on_gpu = self.learner.model.device.type == "cuda"
        self.profiler = Profiler(profile and self.ranks.is_main, synchronize=torch.cuda.synchronize if on_gpu else None)
        self.scores = TreeScores(self.algorithm, config, self.task, self.questions, self.agent)
        if saved and self.adapter and (self._copied or not self.agent.shares_weights):
            self._hand_over()  # the policy was loaded without it
        self.progress = (
            load_checkpoint(saved[-1], self.agent, self.learner, self.scores.critic) if saved else Progress()
        )
        self.saver = Saver(
            config.output_dir,
            self.ranks,
            self.agent,
            self.learner,
            own_weights=self._own_weights,
            critic=self.scores.critic,
            adapter=self.adapter,
            keep=config.keep,
            background=config.background_saves,
        )
        self._saved = self.progress.step
        self._bad = self._not_finite = 0  # optimiser steps that were not finite: in a row, and in all
        self.canary = None if self.agent.shares_weights else self._canary()
        self.tracker = None
        if self.ranks.is_main:
            self.tracker = open_run(
                config, self.agent.card, self.task, self.questions, self.eval_task, self.eval_questions
            )
        self.history: list[dict[str, float]] = self.ranks.agree(
            kept_metrics(config.output_dir, self.progress.step) if self.ranks.is_main else []
        )
        if self.tracker is not None:
            self.tracker.log_rows(self.history)  # where the store lacks any
        self.last_tree: CreditedTree | None = None
        self.distributions: StepDistributions | None = None
        self.trees = KeptTrees(
            config, self.algorithm, self.eval_task, self.eval_questions, self.agent, self.scores, self.ranks,
            self.tracker,
        )  # fmt: skip
        if self.history:
            self.trees.catch_up(self.progress.step)

    def _load_agent(self, name: str) -> Agent:
        """This process' agent. Of several that use the same servers the main one hands them the weights."""
        config, ranks = self.config, self.ranks
        backend = config.backend or resolve(name)[0].backend
        if backend == "vllm" and ranks.count > 1:
            raise ConfigError(
                f"{ranks.count} processes would each start a vLLM engine on the first GPU; start servers "
                "(scripts/serve_agent.py) and use --backend vllm-server, or --backend transformers"
            )
        self._shares_servers = backend == "vllm-server" and ranks.count > 1
        shared = self._shares_servers and config.weights_dir is None
        self._handed = config.output_dir.with_name(f"{config.output_dir.name}.weights") if shared else None
        self._drop_handed()  # what a run that was killed has left
        load = functools.partial(
            load_agent,
            name,
            device=config.device or (str(ranks.device) if ranks.device else None),
            backend=config.backend,
            urls=config.urls,
            tools=self.task.card.tools,
            weights_dir=config.weights_dir or self._handed,
        )
        if not self._shares_servers:
            return load()
        first = load() if ranks.is_main else None
        label = ranks.agree(first.label if first else "")
        return first or load(follow=label)

    def _drop_handed(self) -> None:
        """Remove the files of weights for servers, which nobody but this run reads."""
        if self._handed and self.ranks.is_main:
            shutil.rmtree(self._handed, ignore_errors=True)

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end of the budget; yields the metrics of every step after logging them.

        Step 0 is the evaluation before training. Leaves metrics, figures, checkpoints and a summary behind.
        """
        with self.tracker or nullcontext(), self._profiled(), self.preemption.watched(), self.watchdog.watching():
            if not self.history:
                with self.profiler.step(0):
                    logged = self._log({"step": 0, **self._evaluate()})
                yield logged
            try:
                while not self._done(self.progress):
                    with self.profiler.step(self.progress.step + 1):
                        logged = self._step()
                    yield logged
            finally:
                self.sampler.drop()
                if self.ranks.count == 1:  # else another process may never get here
                    self.saver.settle()
            self.saver.settle()
            self._drop_handed()
            if self.tracker is not None:
                with self._phase("figures and artifacts"):
                    page, summary = self.trees.page(self.last_tree), self.summary()
                    finish_run(
                        self.tracker, self.config, history=self.history, last=self.last_tree, page=page, summary=summary
                    )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Part of a step, for profile and watchdog."""
        with self.watchdog.phase(name), self.profiler.span(name):
            yield

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Measure while it lasts, where that is asked for; the profile is written even when the run breaks off."""
        self.profiler.start()
        try:
            with instrumented(self.profiler, self.agent, (self.task, self.eval_task), self.learner):
                yield
        finally:
            if self.profiler.steps and self.tracker is not None:
                title = f"Where the time of {self.algorithm.name} went, up to step {self.progress.step}"
                for path in write_profile(self.profiler, self.config.output_dir, title):
                    self.tracker.log_artifact(path)

    def _step(self) -> dict[str, float]:
        """A training step, with evaluation and checkpoint where they are due."""
        before = self.progress
        self.saver.settle(wait=False)
        try:
            metrics = self._train_step(self.progress.step + 1)
        except Preempted:  # in the middle of rollouts: the weights are those of the step before
            self._save()
            self.saver.settle()
            raise
        if self._evaluation_is_due(before, self.progress):
            metrics |= self._evaluate()
            self._keep_best(metrics)
        logged = self._log(metrics)
        with self.watchdog.phase("waiting for the others"):
            (ends,) = self.ranks.largest(self.preemption.requested)
        if self._checkpoint_is_due(self.progress) or ends:
            with self._phase("checkpoint"):
                self._save()
        if ends and not self._done(self.progress):
            self.saver.settle()
            raise Preempted
        return logged

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        """The agent that scored best so far, as a folder of its own, where that is asked for."""
        scores = [row[BEST_BY] for row in self.history if BEST_BY in row]
        if self.config.keep_best and BEST_BY in metrics and metrics[BEST_BY] > max(scores, default=-math.inf):
            with self._phase("checkpoint"):
                self.saver.save_best({name: metrics[name] for name in ("step", BEST_BY)})

    def _save(self) -> None:
        """A checkpoint; nothing before the first step."""
        if self.progress.step in (0, self._saved):
            return
        self._saved = self.progress.step
        self.saver.save(self.progress, self.tracker.run_id if self.tracker else "")

    def _evaluation_is_due(self, before: Progress, after: Progress) -> bool:
        """Between two steps."""
        every = self.config.eval_actions
        if every is None:
            return after.step % self.config.eval_every == 0 or self._done(after)
        return after.actions_generated // every > before.actions_generated // every or self._done(after)

    def _checkpoint_is_due(self, after: Progress) -> bool:
        return after.step % self.config.save_every == 0 or self._done(after)

    def _done(self, after: Progress) -> bool:
        budget = self.config.max_actions
        return after.step >= self.config.steps or (budget is not None and after.actions_generated >= budget)

    def _train_step(self, step: int) -> dict[str, float]:
        started, cpu = time.perf_counter(), time.process_time()
        alone = self.ranks.count == 1  # else the others would wait for this process
        with self._phase("rollout"), self.preemption.droppable() if alone else nullcontext():
            trees, timings = self.sampler.trees(step, self.progress)
        collected = time.perf_counter()
        with self._phase("credit and selection"):
            self.scores.measure(trees)
            trees = self.ranks.gather(trees)
            credited = credit_trees(self.algorithm, trees)
        generated = self.progress.actions_generated + sum(tree.actions_generated for tree in trees)
        after = replace(self.progress, step=step, actions_generated=generated)
        # Evaluations and checkpoints find the policy at rest: a resumed run has no rollouts under way either.
        rests = self._evaluation_is_due(self.progress, after) or self._checkpoint_is_due(after)
        ahead = self.config.one_step_off and not rests
        if ahead:
            self.sampler.begin(step + 1, after)
        cuts = [len(credited) * i // self.config.minibatches for i in range(self.config.minibatches + 1)]
        with self._phase("update"), nullcontext() if ahead else self.agent.resting():
            updates = [self._update(credited, start, end) for start, end in itertools.pairwise(cuts)]
            learned = self.scores.learn(trees, cuts)
        updated = time.perf_counter()
        if ahead:
            with self._phase("rollout"):
                self.sampler.wait()
        waited = time.perf_counter()
        with self._phase("sync"):
            gap = self._sync()
        ended = time.perf_counter()
        roots = sum(self.algorithm.explorer.roots())
        if not any(c.selected.any() for c in credited):
            warnings.warn(
                f"{self.algorithm.name} selected no action of a step for training: nothing was learned in it",
                stacklevel=2,
            )
        self.distributions = step_distributions(step, credited, roots)
        self.last_tree = max(credited, key=lambda c: (np.ptp(c.advantages) > 0, c.tree.question.id))
        self.progress = replace(
            after,
            actions_trained=self.progress.actions_trained + sum(int(c.selected.sum()) for c in credited),
            seconds=self.progress.seconds + ended - started,
            tokens_trained=self.progress.tokens_trained + sum(map(trained_tokens, credited)),
            cpu_seconds=self.progress.cpu_seconds + time.process_time() - cpu,
        )
        return {
            **asdict(self.progress),
            **rollout_metrics(self.task, credited, roots),
            **update_metrics(updates),
            "update/not_finite": float(self._not_finite),
            **learned,
            "time/sample": timings.sample,
            "time/environment": timings.environment,
            "time/rollout": collected - started + waited - updated,
            "time/update": updated - collected,
            "time/sync": ended - waited,
            **gap,
        }

    def _sync(self) -> dict[str, float]:
        """Hand the new weights to the policy, and make sure that they arrived."""
        self._hand_over()
        if self.canary is None:
            return {}
        return {"update/canary_gap": self.canary.check(self.agent.policy, self.learner.model)}

    def _hand_over(self) -> None:
        if self.agent.shares_weights:
            # Every process samples from weights of its own: the very ones that it trains, or a copy.
            self.agent.sync(self.learner.weights(everywhere=True) if self._copied else None)
            return
        if self._shares_servers:
            self.ranks.wait()  # of rollouts one step ahead some may still be under way, with the weights from before
        weights = None if self._own_weights else self.learner.weights()
        if self._shares_servers:
            if self.ranks.is_main:
                self.agent.sync(weights)
            label = self.ranks.agree(self.agent.label)
            if not self.ranks.is_main:
                self.agent.follow(label)
        else:
            self.agent.sync(weights)

    def _canary(self) -> Canary:
        """Checked once at the start: the policy may have other weights, or another dtype, than it should."""
        first = (self.task.observation(self.task.initial(question)) for question in self.questions[:4])
        # Shards are put together in bfloat16 where the update computes in it, for the canary as well.
        rounding = TOLERANCES["bfloat16"] if self.ranks.sharded and self.config.bf16 else 0.0
        canary = Canary(
            [token for text in first for token in self.agent.transcript.prompt(text)],
            tolerance=self.config.canary_tolerance or max(TOLERANCES[self.agent.card.dtype], rounding),
            context=self.agent.transcript.context,
            temperature=self.config.temperature,
        )
        canary.check(self.agent.policy, self.learner.model)
        return canary

    def _update(self, credited: Sequence[CreditedTree], start: int, end: int) -> UpdateMetrics | None:
        """One optimiser step on the trees of a minibatch, normalised over them; this process' part of it."""
        grown_here = slice((self.ranks.index - start) % self.ranks.count, None, self.ranks.count)
        batch = trained_rows(self.algorithm, credited[start:end], grown_here)
        self.sampler.check_fresh(batch)
        try:
            metrics = self.learner.update(batch, self.algorithm.clip_low, self.algorithm.clip_high)
        except NotFinite as error:
            self._skip(batch, error)
            return None
        self._bad = 0
        return metrics

    def _skip(self, batch: Sequence[Row], error: NotFinite) -> None:
        """Go on without the step, but not for ever. What it would have been made of is kept to be looked at."""
        self._bad += 1
        self._not_finite += 1
        path = self.config.output_dir / BAD_BATCH.format(self.ranks.index)
        torch.save([{name: torch.tensor(getattr(row, name)) for name in Row.__slots__} for row in batch], path)
        if self._bad >= self.config.bad_updates:
            raise CarlGymError(
                f"{self._bad} optimiser steps in a row were not possible, the last one because {error}. The rows of "
                f"that one are in {path} (torch.load)"
            ) from error
        warnings.warn(f"step {self.progress.step + 1}: {error}. Going on; its rows are in {path}", stacklevel=2)

    def _evaluate(self) -> dict[str, float]:
        """Held-out scores, sampled at the training temperature and greedy."""
        found: dict[str, float] = {}
        played: dict[str, list[Episode]] = {}
        shown = None if self._done(self.progress) else self.config.curve_questions
        questions = self.eval_questions[:shown]
        for name, temperature in (("sampled", self.config.temperature), ("greedy", 0.0)):
            if self.eval_questions:
                with self._phase("evaluation"):
                    episodes = self._play(questions, temperature)
                found |= summarise(episodes).metrics(f"eval/{name}")
                played[name] = episodes
        if played and self.tracker is not None:
            record_evaluation(self.tracker, self.config.output_dir, self.progress.step, played)
        with self._phase("kept trees"):
            self.trees.keep(self.progress.step)
        if self.agent.shares_weights:
            # The next step must not meet what evaluation left in the cache: a resumed run does not have it. (With an
            # engine of its own no run is repeated bit for bit, and a sync costs more.)
            self.agent.sync()
        return found

    def _play(self, questions: Sequence[Question], temperature: float) -> list[Episode]:
        agent, seed = self.agent, self.config.seed
        own = self.ranks.mine(questions)
        parts = play(self.eval_task, agent.policy, agent.transcript, own, temperature=temperature, seed=seed)
        return self.ranks.gather(list(itertools.chain.from_iterable(parts)))

    def _log(self, metrics: dict[str, float]) -> dict[str, float]:
        step = int(metrics["step"])
        metrics = asdict(self.progress) | metrics
        self.history.append(metrics)
        if self.tracker is None:
            return metrics
        with self._phase("logging"):
            # MLflow first: after a kill, a step that only MLflow has is done again; step 0 of the file would not be.
            self.tracker.log_step(step, {name: value for name, value in metrics.items() if name != "step"})
            if self.distributions is not None:  # after a training step
                append_row(self.config.output_dir / DISTRIBUTIONS_FILE, dict(self.distributions))
            append_row(self.config.output_dir / METRICS_FILE, metrics)
        return metrics

    def summary(self) -> dict[str, object]:
        """What the run was and what came of it."""
        evaluations = [row for row in self.history if any(name.startswith("eval/") for name in row)]
        return {
            "algorithm": self.algorithm.name,
            "env": self.task.label,
            "source": self.task.source,
            "eval_source": self.eval_task.source,
            "seed": self.config.seed,
            "eval_questions": len(self.eval_questions),
            **asdict(self.progress),
            "before": evaluations[0] if evaluations else None,
            "after": evaluations[-1] if evaluations else None,
            "config": self.config.as_dict(),
        }
