"""TRL: train on our rollout trees inside `GRPOTrainer`, with the credit and the loss of any algorithm without a critic.

    question ids (TRL's data loader) -> trees -> credit -> rows -> TRL's micro-batches -> PPO clip, weighted by token

TRL keeps what it is good at: its configuration, optimiser, schedules, logging, checkpoints, and the processes that
`accelerate launch` starts. Of its algorithm nothing is left: `_generate_and_score_completions` gives rows of trees with
an advantage and a weight for every trained token, and `_compute_loss` is the loss of `carl_gym.training.loss`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from carl_gym.adapters.trl import dataset
from carl_gym.agents.agent import Agent
from carl_gym.agents.logprob_model import LogprobModel
from carl_gym.algorithms import Algorithm, get_algorithm
from carl_gym.envs.task import SearchTask
from carl_gym.errors import CarlGymError, ConfigError
from carl_gym.rollouts.collector import collect
from carl_gym.rollouts.tree import RolloutTree
from carl_gym.training.config import TrainConfig
from carl_gym.training.credited import credit_trees, trained_rows
from carl_gym.training.loss import ppo_clip
from carl_gym.training.metrics import rollout_metrics
from carl_gym.training.ranks import Ranks
from carl_gym.training.scores import TreeScores
from carl_gym.training.segments import Row

if TYPE_CHECKING:
    from datasets import Dataset

_FIXED = {
    "the algorithm has its own loss": (
        "loss_type", "epsilon", "epsilon_high", "delta", "beta", "importance_sampling_level", "scale_rewards",
        "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "off_policy_mask_threshold",
        "mask_truncated_completions", "router_aux_loss_coef", "sync_ref_model",
    ),
    "the environment pays and ends episodes": ("reward_weights", "max_tool_calling_iterations"),
    "the agent samples, as its card says": (
        "max_completion_length", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
        "cache_implementation", "chat_template_kwargs", "use_vllm", "use_transformers_continuous_batching",
    ),
    "trees are no completions": ("log_completions", "num_generations_eval"),
    "question_id must stay in the data": ("remove_unused_columns",),
    "half precision is bf16": ("fp16",),
}  # fmt: skip
"""Fields of GRPOConfig that would be ignored or go wrong, by what stands against them."""


class CarlTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` on rollout trees.

    A generation batch of TRL is a list of prompts, each repeated `num_generations` times, and is answered with as many
    rows. Here it names the questions of one optimiser step, `generation_batch_size / num_generations` of them, and has
    room for `generation_batch_size` rows. A question has one tree, rolled out by one of the processes; credit,
    selection and the weights of the loss see all trees of the step. Then the rows are dealt to the processes, every row
    to exactly one. Trees have fewer rows than trajectories, as a row ends where nothing below it trains: with
    `num_generations` equal to the trajectories of a question there is always room, and where there is none training
    stops with an error. Processes whose number of rows cannot be split into `steps_per_generation` equal parts get
    filler rows without weight (`rollout/filler_rows` counts them).

    Of an optimiser step, loss and gradient are those of `carl_gym.training.learner.Learner` on the same trees. When no
    action of a step has an advantage, the weights stay as they are.

    Args:
        agent: what acts and is trained; its model is trained in place.
        task: the environment.
        algorithm: an algorithm, or the name of one (`carl_gym.algorithms.get_algorithm`).
        args: TRL's configuration. `steps_per_generation` must be `gradient_accumulation_steps` (TRL's default): a round
            of rollouts is one optimiser step, taken `num_iterations` times. Settings that would be ignored must have
            their defaults.
        train_dataset: rows with `question_id`; every question of the task by default (`carl_gym.adapters.trl.dataset`).
        kwargs: `callbacks` and `optimizers`, as for `GRPOTrainer`.

    Attributes:
        trees: the rollout trees of the last round, of all processes, in the order of its questions.

    Raises:
        ConfigError: the algorithm needs a critic, or something that agent or task lack; the agent has no weights here;
            a setting of `args` that would be ignored or cannot be kept; a data set that does not fit.
    """

    def __init__(
        self,
        agent: Agent,
        task: SearchTask,
        algorithm: Algorithm | str,
        *,
        args: GRPOConfig,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        algorithm = get_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
        train_dataset = dataset(task) if train_dataset is None else train_dataset
        _check_algorithm(algorithm, agent)
        _check_args(args)
        _check_dataset(train_dataset, task, args.generation_batch_size // args.num_generations)
        settings = TrainConfig(env=task.label, temperature=args.temperature)
        questions = [task.questions[name] for name in train_dataset["question_id"]]
        self._scores = TreeScores(algorithm, settings, task, questions, agent)
        super().__init__(
            agent.model,
            reward_funcs=_reward,
            args=args,
            train_dataset=train_dataset,
            processing_class=agent.tokenizer,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "CarlTrainer samples from the model that it trains, and FSDP and DeepSpeed shard it; launch with plain "
                "data parallelism (accelerate launch --multi_gpu or --cpu)"
            )
        if self.accelerator.num_processes > 1 and not agent.shares_weights:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes would all hand their weights to the engine of backend "
                f"{agent.card.backend}; use one process, or an agent with backend transformers"
            )
        _answer_logprobs(agent.model)
        self.agent, self.task, self.algorithm = agent, task, algorithm
        self.trees: list[RolloutTree] = []
        self._weight = 0.0  # of all trained tokens of the round; 0: there is nothing to train on

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """A micro-batch, as TRL takes it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._weight:
            # Gradients of 0 would let the optimiser's momentum and weight decay go on; without any it does nothing.
            model.zero_grad(set_to_none=True)
        return loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Roll out, credit, and give this process its rows.

        Args:
            inputs: this process's part of a generation batch.

        Returns:
            Tensors of shape (rows, tokens), right-padded, value t about token t: `input_ids`, `old_per_token_logps`
            (at sampling), `advantages` and `token_weights` (above 0 at the trained tokens). TRL shuffles the rows and
            splits them into its micro-batches.
        """
        if not self.model.training:
            raise ConfigError("CarlTrainer has no evaluation loop; call carl_gym.evaluation.evaluate with the agent")
        asked = gather_object([row["question_id"] for row in inputs])
        names = asked[:: self.num_generations]
        if asked != [name for name in names for _ in range(self.num_generations)]:
            raise CarlGymError(
                f"the data loader gave {asked}, not every question {self.num_generations} times in a row; use the one "
                "that GRPOTrainer makes, without wrapping it"
            )
        self.trees = self._collect(names)
        credited = credit_trees(self.algorithm, self.trees)
        found = trained_rows(self.algorithm, credited)
        processes, steps = self.accelerator.num_processes, self.args.steps_per_generation
        if len(found) > self.args.generation_batch_size:
            raise CarlGymError(
                f"{len(names)} trees have {len(found)} rows, and a generation batch has room for "
                f"{self.args.generation_batch_size}; raise num_generations, and the batch with it, to "
                f"{math.ceil(len(found) / len(names))} per question ({max(tree.trajectories for tree in self.trees)}, "
                "the trajectories of a tree, are always enough)"
            )
        count = rows_per_process(len(found), processes, steps)
        self._weight = sum(float(row.weights.sum()) for row in found)
        metrics = rollout_metrics(self.task, credited, sum(self.algorithm.explorer.roots()))
        metrics |= {"reward": metrics["rollout/reward"], "rollout/rows": float(len(found))}
        metrics |= {"rollout/filler_rows": float(count * processes - len(found))}
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        # Longest first, in turns: no process waits long for another.
        found = sorted(found, key=lambda row: len(row.tokens), reverse=True)
        batch = row_tensors(found[self.accelerator.process_index :: processes], count, self._tokenizer.pad_token_id)
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def _collect(self, names: Sequence[str]) -> list[RolloutTree]:
        """The trees of all questions, each rolled out by one process; every process gets all of them."""
        ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device)
        self.agent.sync()  # the weights have changed since
        trees: list[RolloutTree] = []
        if questions := [self.task.questions[name] for name in ranks.mine(names)]:
            trees = collect(
                self.task,
                self.agent.policy,
                self.agent.transcript,
                questions,
                self.algorithm.explorer,
                seed=self.args.seed,
                step=self.state.global_step + 1,
                temperature=self.args.temperature,
            )
            self._scores.measure(trees)
        return ranks.gather(trees)

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The PPO-clip loss of a micro-batch: its part of the weighted sum over all trained tokens of the step."""
        where, columns = (inputs["token_weights"] > 0).nonzero(as_tuple=True)
        longest = int(columns.max()) + 1 if len(columns) else 2  # a row ends with its last trained token
        ids = inputs["input_ids"][:, :longest]
        with self.accelerator.autocast():
            logprobs, entropies = model(input_ids=ids, rows=where, columns=columns, temperature=self.temperature)
        if not len(columns):
            # In this process, that is; the others' gradients wait for ours.
            self._record(logprobs.new_zeros(4))
            return logprobs.sum()
        terms = ppo_clip(
            logprobs,
            inputs["old_per_token_logps"][where, columns],
            inputs["advantages"][where, columns],
            inputs["token_weights"][where, columns],
            self.algorithm.clip_low,
            self.algorithm.clip_high,
        )
        if not torch.isfinite(terms.loss):
            raise CarlGymError(
                f"the loss ({float(terms.loss.detach())}) is not finite; no step was taken. Lower the learning rate, "
                "or resume from the last checkpoint"
            )
        self._record(torch.stack([terms.clipped, terms.gap, entropies.sum(), entropies.new_tensor(len(entropies))]))
        # Gradients are averaged over processes, and the weights already sum over all of them.
        return terms.loss * self.accelerator.num_processes

    def _record(self, measured: torch.Tensor) -> None:
        """Metrics of a micro-batch, under TRL's names: what was clipped, largest gap, entropy and number of tokens."""
        clipped, gap, entropy, tokens = self.accelerator.gather(measured[None]).unbind(1)
        if not self._weight:
            return
        metrics = self._metrics["train"]
        # TRL logs means over micro-batches, and this is a sum over them.
        share = float(clipped.sum()) / self._weight
        metrics["clip_ratio/region_mean"].append(share * self.args.steps_per_generation)
        metrics["sampling/sampling_logp_difference/max"].append(float(gap.max()))
        if float(tokens.sum()):
            metrics["entropy"].append(float(entropy.sum() / tokens.sum()))


def rows_per_process(count: int, processes: int, steps: int) -> int:
    """How many rows, fillers included, a process gets: equally many on all, in `steps` equal parts, at least 1 each."""
    return steps * max(1, math.ceil(count / (processes * steps)))


def row_tensors(rows: Sequence[Row], count: int, pad: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors (`count`, longest row): the rows, then filler rows of padding without weight."""
    length = max([2, *(len(row.tokens) for row in rows)])
    ids = np.full((count, length), pad, dtype=np.int64)
    values = np.zeros((3, count, length), dtype=np.float32)
    for index, row in enumerate(rows):
        ids[index, : len(row.tokens)] = row.tokens
        values[:, index, row.positions] = row.logprobs, row.advantages, row.weights
    logprobs, advantages, weights = values
    return {
        "input_ids": torch.from_numpy(ids),
        "old_per_token_logps": torch.from_numpy(logprobs),
        "advantages": torch.from_numpy(advantages),
        "token_weights": torch.from_numpy(weights),
    }


def _answer_logprobs(model: Any) -> None:
    """Let `model(input_ids=…, rows=…, columns=…)` answer as `LogprobModel` does; other calls are as they were.

    Data parallelism sees what happens in `forward` alone. TRL's fused head would do too, but in float32 its log-probs
    are a few times further from the exact ones than those of sampler and learner.
    """
    head, plain = LogprobModel(model), model.forward

    @functools.wraps(plain)
    def forward(
        *args: Any,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if rows is None or columns is None:
            return plain(*args, **kwargs)
        return head(kwargs["input_ids"], rows, columns, temperature)

    model.forward = forward


def _reward(*args: Any, **kwargs: Any) -> list[float]:
    """TRL wants a reward function; rewards are the environment's, and this is never called."""
    raise CarlGymError("CarlTrainer takes its rewards from the trees; do not call its reward_funcs")


def _check_algorithm(algorithm: Algorithm, agent: Agent) -> None:
    if algorithm.critic is not None:
        raise ConfigError(
            f"algorithm {algorithm.name!r} trains a critic beside the policy, and GRPOTrainer has one model and one "
            "optimiser; choose an algorithm without one (docs/algorithms.md), or train with scripts/train_carl.py"
        )
    if agent.model is None or agent.tokenizer is None:
        raise ConfigError(
            f"agent {agent.card.id!r} is hosted (backend {agent.card.backend}) and has no weights here to train; use "
            "a model folder or hub id"
        )


def _check_args(args: GRPOConfig) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(type(args))}
    for why, names in _FIXED.items():
        for name in names:
            if (value := getattr(args, name)) != defaults[name]:
                raise ConfigError(
                    f"GRPOConfig({name}={value!r}) does not go with CarlTrainer: {why}; leave it at {defaults[name]!r}"
                )
    if args.steps_per_generation != args.gradient_accumulation_steps:
        raise ConfigError(
            f"steps_per_generation is {args.steps_per_generation} and gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}; they must be equal, as the loss is normalised over the trees of one "
            "optimiser step. For more steps on the same trees, raise num_iterations"
        )


def _check_dataset(rows: Dataset, task: SearchTask, least: int) -> None:
    if "question_id" not in rows.column_names:
        raise ConfigError(
            f"the data set has the columns {rows.column_names} and no question_id; start from "
            "carl_gym.adapters.trl.dataset(task)"
        )
    names = list(rows["question_id"])
    if unknown := [name for name in names if name not in task.questions]:
        raise ConfigError(f"the data set has the question_id {unknown[0]!r}, which {task.source} lacks; leave it out")
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the data set has {len(names)} rows and {len(set(names))} different question_ids; give every question "
            "once, as TRL repeats them itself"
        )
    if len(names) < least:
        raise ConfigError(
            f"the data set has {len(names)} questions and an optimiser step takes {least} (generation_batch_size / "
            "num_generations); TRL would leave out what does not fill a step. Lower the batch, or give more questions"
        )
