"""What an algorithm needs to know beside trees: checked before a run starts, measured before every credit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean

from carl_gym.agents.agent import Agent
from carl_gym.algorithms import Algorithm
from carl_gym.algorithms.actfocus import count_reasoning
from carl_gym.envs.state import Question
from carl_gym.errors import ConfigError
from carl_gym.rollouts.environment import EnvTask
from carl_gym.rollouts.tree import RolloutTree
from carl_gym.training.answer_scores import AnswerEncoder, answer_encoder, answer_logprobs, require_room
from carl_gym.training.config import TrainConfig
from carl_gym.training.critic import Critic


class TreeScores:
    """Fills `RolloutTree.scores` with what `Algorithm.requires` names.

    Attributes:
        critic: the one that learns beside the policy, where one is required.

    Raises:
        ConfigError: the environment, the questions or the agent lack something that the algorithm requires.
    """

    def __init__(
        self, algorithm: Algorithm, config: TrainConfig, task: EnvTask, questions: Sequence[Question], agent: Agent
    ) -> None:
        self._algorithm = algorithm
        needs = f"algorithm {algorithm.name!r} needs"
        without = [question.id for question in questions if not question.answers]
        if "gold answers" in algorithm.requires and without:
            raise ConfigError(
                f"{needs} the gold answer of every training question, and {len(without)} have none (the first: "
                f"{without[0]!r}); leave them out, or choose another algorithm"
            )
        if "repeated states" in algorithm.requires and not getattr(task, "repeats_states", True):
            raise ConfigError(
                f"{needs} states that several rollouts of a question come through, and in {config.env} no two "
                "sequences of actions lead to the same state; choose another algorithm or environment"
            )
        if "entropies" in algorithm.requires and not getattr(agent.policy, "gives_entropies", False):
            raise ConfigError(
                f"{needs} the exact entropies of the sampled tokens, which {type(agent.policy).__name__} does not "
                "give; use backend transformers, or choose another algorithm"
            )
        if "thoughts" in algorithm.requires and agent.tokenizer is None:
            raise ConfigError(f"{needs} the agent's tokenizer, and {agent.card.id!r} is hosted; use a model of yours")
        self._agent, self._config = agent, config
        self._answers: AnswerEncoder | None = None
        if "gold answers" in algorithm.requires:
            self._answers = answer_encoder(agent)
            for question in questions:  # refused here, before anything is sampled
                prompt = agent.transcript.prompt(task.observation(task.initial(question)))
                require_room(question, self._answers(question), len(prompt), agent.transcript.context)
        self.critic: Critic | None = None
        if algorithm.critic is not None and agent.model is not None:
            self.critic = Critic(
                agent.model,
                learning_rate=algorithm.critic.learning_rate,
                max_grad_norm=config.max_grad_norm,
                packing=config.packing,
                batch_tokens=config.batch_tokens,
            )

    def measure(self, trees: Sequence[RolloutTree]) -> None:
        """Write the scores of finished trees into them."""
        if self.critic is not None:
            self.critic.score(trees)
        agent, config = self._agent, self._config
        if self._answers is not None and agent.model is not None:
            answer_logprobs(
                agent.model,
                self._answers,
                trees,
                context=agent.transcript.context,
                batch_tokens=config.batch_tokens,
                packing=config.packing,
                temperature=config.temperature,
            )
        if "thoughts" in self._algorithm.requires and agent.tokenizer is not None:
            opening = str(getattr(agent.transcript, "opening", ""))
            opened = opening.rfind("<think>") > opening.rfind("</think>")
            count_reasoning(trees, agent.tokenizer.decode, opened=opened)

    def learn(self, trees: Sequence[RolloutTree], cuts: Sequence[int]) -> dict[str, float]:
        """Let the critic take as many optimiser steps as the policy, on the same minibatches.

        Args:
            trees: measured.
            cuts: bounds of the minibatches, from 0 to the number of trees.

        Returns:
            the critic's metrics, means over minibatches; none without a critic.
        """
        if self.critic is None or self._algorithm.critic is None:
            return {}
        targets = self._algorithm.critic.targets(trees)  # of all, before the critic changes
        found = [self.critic.update(trees[start:end], targets[start:end]) for start, end in itertools.pairwise(cuts)]
        learned = [metrics for metrics in found if metrics]
        return {name: fmean(metrics[name] for metrics in learned) for name in learned[0]} if learned else {}
