"""Noisy expert traces on MiniWiki: what the tiny agent imitates before it is trained by reinforcement.

The expert knows the decomposition of its question and works through it by search and access, saying what it
looks for in a short thought. It errs as an imperfect agent does: it opens a namesake's page, reads the wrong
fact off a page, gives up early, searches clumsily. Errors stand in the traces, with their consequences.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from carl_gym.envs.miniwiki import World
from carl_gym.envs.state import EnvState, Question
from carl_gym.envs.task import SearchTask


@dataclass(frozen=True, slots=True)
class Noise:
    """Chances of each error, per decision.

    Attributes:
        wrong_page: open another hit than the right one.
        unnoticed: go on with a wrong page instead of going back.
        misread: take the object of another relation of the page.
        early: answer with what was just found although hops remain.
        bare_query: search the name alone, without the kind that tells namesakes apart.
        direct: open a page by its name without a search.
    """

    wrong_page: float = 0.2
    unnoticed: float = 0.5
    misread: float = 0.15
    early: float = 0.05
    bare_query: float = 0.3
    direct: float = 0.1


@dataclass(frozen=True, slots=True)
class Trace:
    """One episode: observation texts (the question first) and the action after each."""

    observations: tuple[str, ...]
    actions: tuple[str, ...]
    reward: float


def imitate(task: SearchTask, world: World, question: Question, noise: Noise, rng: random.Random) -> Trace:
    """Let the noisy expert play one episode of a MiniWiki task."""
    state = task.initial(question)
    observations, actions = [task.observation(state)], []
    expert = _Expert(task, world, question, noise, rng)
    reward = 0.0
    while not task.terminal(state):
        action = expert.act(state)
        following = task.transition(state, action)
        reward += task.reward(state, action, following)
        state = following
        actions.append(action)
        observations.append(task.observation(state))
    return Trace(tuple(observations[:-1]), tuple(actions), reward)


class _Expert:
    """The expert's memory during one episode: which page it wants, for which relation, and what it says next."""

    def __init__(self, task: SearchTask, world: World, question: Question, noise: Noise, rng: random.Random) -> None:
        self.task, self.pages, self.noise, self.rng = task, world.pages, noise, rng
        self.relations = [hop.relation for hop in question.decomposition]
        self.hop = 0
        self.target = question.decomposition[0].title
        name = self.pages[self.target].name
        self.thought = f"First, the {self.relations[0]} of {name}."

    def act(self, state: EnvState) -> str:
        if not state.turns:
            return self._search_or_open()
        last = state.turns[-1]
        shown = [self.task.corpus[i] for i in last.passage_ids]
        if last.action.kind == "search":
            return self._choose([passage.title for passage in shown])
        return self._read(shown[0].title if shown else "")

    def _search_or_open(self) -> str:
        page = self.pages[self.target]
        if self.rng.random() < self.noise.direct:
            return _say(self.thought, "access", page.name)
        bare = self.rng.random() < self.noise.bare_query
        return _say(self.thought, "search", page.name if bare else f"{page.name} {page.subkind}")

    def _choose(self, titles: list[str]) -> str:
        page = self.pages[self.target]
        others = [title for title in titles if title != self.target]
        if others and (self.target not in titles or self.rng.random() < self.noise.wrong_page):
            return _say(f"The {page.subkind} fits.", "access", self.rng.choice(others))
        return _say(f"The {page.subkind} fits.", "access", self.target)

    def _read(self, title: str) -> str:
        relation = self.relations[self.hop]
        page = self.pages.get(title)
        facts = page.facts if page else {}
        if title != self.target and (relation not in facts or self.rng.random() > self.noise.unnoticed):
            wanted = self.pages[self.target]
            return _say(f"Wrong page; I need the {wanted.subkind}.", "search", f"{wanted.name} {wanted.subkind}")
        others = [fact for r, fact in facts.items() if r != relation]
        misread = bool(others) and self.rng.random() < self.noise.misread
        name, target = self.rng.choice(others) if misread else facts[relation]
        self.hop += 1
        early = self.rng.random() < self.noise.early
        following = self.relations[self.hop] if self.hop < len(self.relations) and not early else None
        if following is None or target is None or following not in self.pages[target].facts:
            return _say(f"The {relation} is {name}.", "answer", name)
        self.target = target
        self.thought = f"The {relation} is {name}; next, the {following}."
        return self._search_or_open()


def _say(thought: str, tool: str, argument: str) -> str:
    # A space before each name: a small byte-level BPE then meets every name as one and the same token.
    return f"<think> {thought}</think><{tool}> {argument}</{tool}>"
