"""A search environment with finitely many actions and a vector to look at, for learners that are no language models.

    text environment -> View (what an agent could have noticed) -> macro actions, features, a key for tables

The macro actions are built from what the episode has shown: search for the question or for the name in focus, open a
hit, follow or answer a name from the opened page. Nothing here reads gold labels or text that the environment did not
show. A `View` is a fold over the state's turns, so the wrapper survives snapshots: restore the state, and the view
is the one that was.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from carl_gym.envs.protocol import parse, tool_call
from carl_gym.envs.state import MAX_ARGUMENT_CHARS, EnvState, Turn
from carl_gym.envs.task import SearchTask
from carl_gym.errors import ActionError

_NAME = re.compile(r"[A-Z][\w'\u2019-]*(?:\s+[A-Z][\w'\u2019-]*)*")
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an the of in on at by to is are was were be it its his her and or with for from that this there as has have "
        "who which what where when name tell me person one",
    )
)
_LEADING = re.compile(rf"^(?:(?:{'|'.join(sorted(_COMMON))})\b\s*)+", re.IGNORECASE)
_KIND = re.compile(rf"(?:(?!(?:{'|'.join(sorted(_COMMON))})\b)\b[a-z]+\s+){{1,2}}$")
_STEM = 4
"""Words with this many first letters in common count as related: director, directed."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A name, and the words that stand around it.

    Attributes:
        name: as written.
        query: what to search for: the name with the words before it that say what it is, as in "war film Iron Road".
        cues: stems of the other words of its sentence.
        overlap: how many stems of the question, not yet accounted for, are among the cues.
    """

    name: str
    query: str
    cues: frozenset[str]
    overlap: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that the last search found and that is not opened yet.

    Attributes:
        id: names the passage.
        fit: how well its title fits the name in focus: 0 not at all, 1 by name, 2 by name and by what it is.
    """

    id: str
    fit: int


@dataclass(frozen=True, slots=True)
class View:
    """What the episode has shown so far, as a learner sees it.

    Attributes:
        question: the question's text.
        focus: the name that the agent is after.
        wanted: stems of the question that no name followed so far accounts for.
        depth: how many noun phrases the question has, less one: about as many facts have to be found.
        query: the last search; "" before the first.
        hits: what it found, best fit first, and no opened passage.
        opened: ids of the passages opened so far.
        mentions: names on the opened page, most overlap first; empty unless a page is open.
        followed: how many names were followed.
    """

    question: str
    focus: Mention
    wanted: frozenset[str]
    depth: int
    query: str = ""
    hits: tuple[Hit, ...] = ()
    opened: frozenset[str] = frozenset()
    mentions: tuple[Mention, ...] = ()
    followed: int = 0


def first_view(question: str) -> View:
    """The view of a question that nothing has been done about: its last name is in focus."""
    names = mentions(question, frozenset())
    focus = names[-1] if names else Mention(question, _query(question), frozenset())
    wanted = stems(question) - stems(focus.name)
    return View(question, focus, wanted, max(0, question.lower().split().count("the") - 1))


def next_view(view: View, turn: Turn, titles: Sequence[str], shown: str) -> View:
    """The view after a turn.

    Args:
        view: the view before it.
        turn: the turn.
        titles: titles of the passages it brought up.
        shown: what the environment showed in answer.
    """
    kind, argument = turn.action.kind, turn.action.argument
    if kind == "search":
        followed = next((mention for mention in view.mentions if mention.query == argument), None)
        focus = followed or view.focus
        found = [Hit(id, _fit(title, focus)) for id, title in zip(turn.passage_ids, titles, strict=True)]
        return dataclasses.replace(
            view,
            focus=focus,
            wanted=view.wanted - followed.cues if followed else view.wanted,
            query=argument,
            hits=tuple(sorted((hit for hit in found if hit.id not in view.opened), key=lambda hit: -hit.fit)),
            mentions=(),
            followed=view.followed + (followed is not None),
        )
    if kind == "access" and turn.passage_ids:
        text = shown.removesuffix("\n</information>").partition(f"(Title: {titles[0]}) ")[2] or shown
        return dataclasses.replace(
            view,
            hits=tuple(hit for hit in view.hits if hit.id != turn.passage_ids[0]),
            opened=view.opened | {turn.passage_ids[0]},
            mentions=mentions(text, view.wanted, titles[0]),
        )
    return view


def mentions(text: str, wanted: frozenset[str], title: str = "") -> tuple[Mention, ...]:
    """The names in `text` that are not in its title, those first whose sentence has most of the `wanted` stems."""
    found: dict[str, Mention] = {}
    for sentence in _SENTENCE.split(text):
        for match in _NAME.finditer(sentence):
            # A sentence begins with a capital letter, whether its first word belongs to a name or not.
            name = _LEADING.sub("", match[0])
            if name in title or not stems(name):
                continue
            cues = stems(sentence) - stems(name)
            kind = _KIND.search(sentence[: match.end() - len(name)])
            mention = Mention(name, _query(f"{kind[0]}{name}" if kind else name), cues, len(cues & wanted))
            if name not in found or found[name].overlap < mention.overlap:
                found[name] = mention
    return tuple(sorted(found.values(), key=lambda mention: -mention.overlap))


def macro_actions(view: View, hits: int = 3, mentions: int = 3) -> list[str]:
    """The texts of all macro actions, in the order that `DiscreteActions` gives; "" for an empty slot."""
    names = view.mentions[:mentions]
    empty = [""] * (mentions - len(names))
    return [
        tool_call("search", query=_query(view.question)),
        tool_call("search", query=view.focus.query),
        *(tool_call("access", title=hit.id) for hit in view.hits[:hits]),
        *[""] * (hits - len(view.hits[:hits])),
        *(tool_call("search", query=mention.query) for mention in names),
        *empty,
        *(tool_call("answer", answer=mention.name) for mention in names),
        *empty,
    ]


def stems(text: str) -> frozenset[str]:
    """First letters of the words that carry meaning, in lower case."""
    return frozenset(word[:_STEM] for word in _WORD.findall(text.lower()) if word not in _COMMON)


def _query(text: str) -> str:
    """`text` as the environment keeps it when it is an argument."""
    return " ".join(text.split())[:MAX_ARGUMENT_CHARS].rstrip()


def _fit(title: str, focus: Mention) -> int:
    extra = stems(title) - stems(focus.name)
    if not stems(focus.name) <= stems(title):
        return 0
    return 2 if extra <= focus.cues else 1


class DiscreteActions(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """A search environment as a classical one: `Discrete` actions, `Box` observations.

    Action `i` means, with H = `hits` and M = `mentions` slots:

    | i | action |
    |---|---|
    | 0 | search for the question |
    | 1 | search for the name in focus: the question's last name, or the one followed last |
    | 2 … 1+H | open hit 1 … H |
    | 2+H … 1+H+M | follow name 1 … M of the opened page: search for it and put it in focus |
    | 2+H+M … 1+H+2M | answer with name 1 … M |

    A slot that is empty is an invalid action and costs a turn; `info["action_mask"]` (int8, 1 where an action exists)
    goes straight into `action_space.sample(mask)`. The observation is `features(view)`; `key()` is a coarser, hashable
    one for tables. Both are functions of the environment's state.

    Args:
        env: a search environment, wrapped or not.
        hits: slots for hits; hits beyond them cannot be opened.
        mentions: slots for names on a page.
    """

    def __init__(self, env: gym.Env[Any, Any], hits: int = 3, mentions: int = 3) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, hits=hits, mentions=mentions)
        super().__init__(env)
        self.hits, self.mentions = hits, mentions
        self.task: SearchTask = env.get_wrapper_attr("task")
        self.actions = 2 + hits + 2 * mentions
        self.action_space = gym.spaces.Discrete(self.actions)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (6 + 2 * hits + 2 * mentions,), np.float32)
        self._view = first_view("")
        self._seen: EnvState | None = None

    @property
    def view(self) -> View:
        """What the episode has shown so far, whether it came there by steps, a reset or `set_state`. Raises StateError
        before `reset`.
        """
        state, seen = self._state(), self._seen
        if seen is None or (state.question_id, state.turns) != (seen.question_id, seen.turns):
            self._view, self._seen = view_of(self.task, state), state
        return self._view

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As the environment's; a stored state brings its view along."""
        _, info = self.env.reset(seed=seed, options=options)
        return self.features(), {**info, "action_mask": self.mask()}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take macro action `action`; everything but the observation comes from the environment."""
        if not self.action_space.contains(action):
            raise ActionError(f"action {action!r}; expected a whole number from 0 to {self.actions - 1}")
        before = self.view
        _, reward, terminated, truncated, info = self.env.step(self.text(int(action)))
        self._seen = self._state()
        self._view = _advance(self.task, before, self._seen)
        return self.features(), float(reward), terminated, truncated, {**info, "action_mask": self.mask()}

    def text(self, action: int) -> str:
        """What macro action `action` is in the environment's own protocol; "" for an empty slot."""
        return macro_actions(self.view, self.hits, self.mentions)[action]

    def mask(self) -> np.ndarray:
        """int8, 1 for every action that does something new: its slot is not empty, its search not the last one, and no
        rule of the card refuses it. All 0 where nothing is left but an answer, and there is none to give.
        """
        view, card = self.view, self.task.card
        mask = np.zeros(self.actions, np.int8)
        mask[0] = view.query != _query(view.question)
        mask[1] = view.query != view.focus.query
        if "access" in card.tools:
            mask[2 : 2 + min(self.hits, len(view.hits))] = 1
        for start in (2 + self.hits, 2 + self.hits + self.mentions):
            mask[start : start + min(self.mentions, len(view.mentions))] = 1
        if self.task.has_rules:
            texts = macro_actions(view, self.hits, self.mentions)
            for i in np.flatnonzero(mask):
                mask[i] = not self.task.refusal(self._state(), parse(texts[i], card.tools))
        return mask

    def features(self) -> np.ndarray:
        """The view as float32 values between 0 and 1: six of the episode, two per hit, two per name."""
        view = self.view
        values = [
            1 - len(self._state().turns) / self.task.card.turns,
            float(bool(view.query)),
            float(bool(view.mentions)),
            min(view.followed, 4) / 4,
            min(view.depth, 4) / 4,
            min(len(view.wanted), 8) / 8,
        ]
        hits = [(1.0, hit.fit / 2) for hit in view.hits[: self.hits]]
        names = [(1.0, min(mention.overlap, 4) / 4) for mention in view.mentions[: self.mentions]]
        hits += [(0.0, 0.0)] * (self.hits - len(hits))
        names += [(0.0, 0.0)] * (self.mentions - len(names))
        return np.array([*values, *(value for slot in (*hits, *names) for value in slot)], np.float32)

    def key(self) -> tuple[int, ...]:
        """A few small whole numbers that tell apart the situations in which a table should act differently.

        Where the episode stands (nothing found, hits shown, page open), the fit of the first hit, the overlap of the
        first name and whether the second has as much, names followed, and facts to be found.
        """
        view = self.view
        overlaps = [mention.overlap for mention in view.mentions[:2]]
        return (
            2 if view.mentions else 1 if view.query else 0,
            view.hits[0].fit if view.hits else 0,
            min(overlaps[0], 2) if overlaps else 0,
            int(len(overlaps) == 2 and overlaps[0] == overlaps[1]),
            min(view.followed, 4),
            min(view.depth, 4),
        )

    def _state(self) -> EnvState:
        return self.env.get_wrapper_attr("get_state")()


def view_of(task: SearchTask, state: EnvState) -> View:
    """The view that a state's turns add up to."""
    view = first_view(task.questions[state.question_id].text)
    for turns in range(1, len(state.turns) + 1):
        view = _advance(task, view, dataclasses.replace(state, turns=state.turns[:turns]))
    return view


def _advance(task: SearchTask, view: View, state: EnvState) -> View:
    turn = state.turns[-1]
    titles = [task.corpus[id].title for id in turn.passage_ids]
    return next_view(view, turn, titles, task.observation(state))
