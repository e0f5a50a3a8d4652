"""Policies that follow a script instead of a model: baselines for evaluation, and agents for tests.

They act on the request's environment state, so they need the task at construction; their token ids are the
UTF-8 bytes of the action. `ByteTranscript` is the matching transcript.
"""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.envs.scoring import normalize_answer
from carl_gym.envs.state import MAX_ARGUMENT_CHARS, EnvState, Question
from carl_gym.envs.task import SearchTask
from carl_gym.errors import PolicyError
from carl_gym.retrieval.corpus import Passage


class ByteTranscript:
    """Text as UTF-8 bytes: the transcript of policies that do not read tokens.

    Args:
        max_tokens: longest action, in bytes.
        context: longest prefix and action, in bytes.
    """

    def __init__(self, max_tokens: int = 4096, context: int = 1 << 24) -> None:
        self.max_tokens = max_tokens
        self.context = context

    def prompt(self, question_text: str) -> tuple[int, ...]:
        """The bytes of the question."""
        return tuple(question_text.encode())

    def observation(self, text: str, action: Sequence[int] = ()) -> tuple[int, ...]:
        """The bytes of an observation, whatever the action was."""
        return tuple(text.encode())


class ScriptedPolicy(ABC):
    """A policy that draws one of finitely many equally likely actions. Subclasses say which.

    The log-probability of the draw is on the first token; the other tokens follow with certainty.
    """

    def __init__(self, task: SearchTask) -> None:
        self.task = task
        self.version = 0

    @abstractmethod
    def actions(self, state: EnvState) -> list[str]:
        """The possible actions in a state, at least one and all different."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """One action per request; at temperature 0 the first of the possible ones."""
        return [self._sample(request) for request in requests]

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Scripted policies see states and not tokens: raises PolicyError."""
        raise PolicyError("a scripted policy acts on states and cannot score tokens; use a language model")

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        """Count the call; there are no weights."""
        self.version += 1

    def _sample(self, request: SampleRequest) -> Completion:
        if request.state is None:
            raise PolicyError("a scripted policy acts on states; pass SampleRequest(state=...)")
        actions = self.actions(request.state)
        greedy = request.temperature == 0
        action = actions[0] if greedy else random.Random(request.seed).choice(actions)
        tokens = action.encode()[: request.max_tokens]
        spread, certain = math.log(len(actions)), (0.0,) * (len(tokens) - 1)  # the first token makes the choice
        logprobs, entropies = (-spread, *certain), (spread, *certain) if request.entropies else ()
        complete = len(tokens) == len(action.encode())
        text = tokens.decode(errors="ignore")
        return Completion(tuple(tokens), logprobs, text, "stop" if complete else "length", entropies)

    def _question(self, state: EnvState) -> Question:
        return self.task.questions[state.question_id]

    def _seen(self, state: EnvState) -> list[Passage]:
        """The passages that came up so far, first seen first."""
        ids = dict.fromkeys(id for turn in state.turns for id in turn.passage_ids)
        return [self.task.corpus[id] for id in ids]


class OraclePolicy(ScriptedPolicy):
    """Knows the supporting titles and the answer: searches and opens each title, then answers.

    An upper bound for what search and access can reach within the budget. Where the budget is too short for
    a search per title, the first titles are opened directly.
    """

    def actions(self, state: EnvState) -> list[str]:
        """The next step of the plan."""
        question = self._question(state)
        titles, budget = question.supporting_titles, self.task.card.turns
        searches = max(0, min(len(titles), budget - 1 - len(titles)))
        plan = []
        for position, title in enumerate(titles):
            if position >= len(titles) - searches:
                plan.append(f"<search>{title}</search>")
            plan.append(f"<access>{title}</access>")
        plan.append(f"<answer>{question.answers[0]}</answer>")
        return [plan[min(len(state.turns), len(plan) - 1)]]


class HeuristicPolicy(ScriptedPolicy):
    """Retrieve, then answer, without gold labels.

    Searches the question, opens the best hit, searches again with the question and the opened title, opens the
    best new hit, and answers with the name or number of the opened passages that has most question words around
    it. Questions that ask for a yes or a no get "yes".
    """

    def actions(self, state: EnvState) -> list[str]:
        """The next step of the script."""
        question = self._question(state).text
        corpus = self.task.corpus
        opened = [
            corpus[turn.passage_ids[0]] for turn in state.turns if turn.action.kind == "access" and turn.passage_ids
        ]
        match len(state.turns):
            case 0:
                return [_tool("search", question)]
            case 2 if opened:
                return [_tool("search", f"{question} {opened[-1].title}")]
            case 1 | 3:
                hits = (corpus[id] for id in state.turns[-1].passage_ids)
                if new := next((hit for hit in hits if hit not in opened), None):
                    return [_tool("access", new.title)]
        return [_tool("answer", _extract(question, opened or self._seen(state)))]


class RandomValidPolicy(ScriptedPolicy):
    """Well-formed random actions with the card's tools: searches with question words and seen titles, opens and answers
    seen titles, and turns pages."""

    def actions(self, state: EnvState) -> list[str]:
        """Every search, access and answer that the question's words and the seen titles make, and a read."""
        question = self._question(state).text
        titles = [passage.title for passage in self._seen(state)]
        words = [*question.split(), *titles]
        pairs = [("search", question), *(("search", word) for word in words), *(("access", title) for title in titles)]
        pairs += [("answer", title) for title in titles] or [("answer", "yes")]
        pairs += [("read", "")]
        tools = self.task.card.tools
        return list(dict.fromkeys(_tool(tool, argument) for tool, argument in pairs if tool in tools))


SCRIPTED: dict[str, type[ScriptedPolicy]] = {
    "oracle": OraclePolicy,
    "heuristic": HeuristicPolicy,
    "random": RandomValidPolicy,
}
"""By the name that command lines know them under."""

_NAME = re.compile(r"\d[\d,.]*\d|\d|[A-Z][\w'\u2019-]*(?:\s+(?:(?:of|the|and|de)\s+)?[A-Z][\w'\u2019-]*)*")
_CLOSED_QUESTION = re.compile(r"\s*(is|are|was|were|do|does|did|has|have|had|can|could)\b", re.IGNORECASE)


def _tool(tool: str, argument: str) -> str:
    return f"<{tool}>{argument[:MAX_ARGUMENT_CHARS]}</{tool}>"


def _extract(question: str, passages: Sequence[Passage]) -> str:
    """The name or number in the passages' sentences that shares most words with the question, itself not in it."""
    if _CLOSED_QUESTION.match(question):
        return "yes"
    asked = set(normalize_answer(question).split())
    best, best_overlap = "unknown", -1
    for passage in passages:
        for sentence in re.split(r"(?<=[.!?])\s+", passage.text):
            overlap = len(asked & set(normalize_answer(sentence).split()))
            names = [name for name in _NAME.findall(sentence) if not asked & set(normalize_answer(name).split())]
            names = [name for name in names if normalize_answer(name) and name not in passage.title]
            if names and overlap > best_overlap:
                best, best_overlap = names[0], overlap
    return best
