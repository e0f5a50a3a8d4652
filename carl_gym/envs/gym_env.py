"""The Gymnasium shell: one running episode over a pure `SearchTask`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Dict, Discrete, Space

from carl_gym.envs import rendering
from carl_gym.envs.protocol import TOOLS, escape
from carl_gym.envs.spaces import ActionSpace, MessagesSpace, TextSpace
from carl_gym.envs.state import EnvState, Extra, Question
from carl_gym.envs.task import SearchTask
from carl_gym.errors import ConfigError, StateError

ObservationForm = Literal["text", "messages", "dict"]
Order = Literal["random", "sequential"]

LAST_ACTIONS = ("none", *TOOLS, "invalid")
"""What the number under `tool` in a `dict` observation means."""

Info = dict[str, Any]
Step = tuple[Any, float, bool, bool, Info]


class SearchEnv(gym.Env[Any, str]):
    """
    Answer a question by searching a collection of passages and opening the ones that matter.

    ## Description
    The agent is asked a question whose answer usually has to be put together from several passages. It writes
    free text; the environment acts on the first complete action in it.

    ## Action Space
    Any `str` (`ActionSpace`; `sample()` gives well-formed actions). The card names the tools among these:

    - `<search>query</search>`: find passages
    - `<access>title</access>`: open a passage by its title, as search results show it, or by its id
    - `<read></read>`: show the next page of the passage that was opened last
    - `<answer>text</answer>`: answer and end the episode

    The same as a tool call in JSON, inside `<tool_call>…</tool_call>` or as the whole text, means the same:
    `{"name": "search", "arguments": {"query": "…"}}`; `access` takes `title`, `answer` takes `answer`, `read` takes
    nothing. `env.unwrapped.tools` is the list of OpenAI function schemas.

    Text around the action and in `<think>…</think>` is ignored. Text without a complete action, with an empty one or
    with one of more than 512 characters is an *invalid action*: it costs a turn, and the card's penalty, and is
    answered with a hint. So is a repeated query or anything but an answer on the last turn where the card says so.
    What is not a `str` raises `ActionError`.

    ## Observation Space
    Only what is *new*. After `reset` the question; after a search one line `Doc 1(Title: T) snippet` per hit; after
    an access the title and the first page of the passage, after a read its next page. Results and hints stand between
    `<information>` and `</information>`. After an answer there is nothing to read. Text from questions and passages
    is escaped: it can forge neither a tag nor a chat-template token. `observation=` chooses the form:

    - `text` (default): a `str` (`TextSpace`), empty after an answer
    - `messages`: a tuple of chat messages `{"role": …, "content": …}` (`MessagesSpace`), empty after an answer
    - `dict`: a `Dict` of `text`, `question` (as asked, escaped), `turns_left`, `tool` (the last action as an index
      into `LAST_ACTIONS`) and `hits` (how many passages it brought)

    ## Starting State
    A question drawn uniformly with the environment's random generator (`reset(seed=…)`), or, with
    `order="sequential"`, the next one of the data, from the first one again after the last and after `reset(seed=…)`;
    or the one that `reset(options={"question_id": id})` names. `reset(options={"state": state})` continues a stored
    episode: `state` is an `EnvState` or its JSON text, and may come from another environment or process with the same
    card and data.

    ## Rewards
    0 until the episode ends, then the card's reward. `f1_format`, the default, is the F1 of the answer (official
    HotpotQA normalisation; 0 without an answer) plus 0.1 times the share of well-formed actions. A card may subtract
    a penalty for every invalid action.

    ## Episode End
    Terminated after an answer, right or wrong. Truncated when the turn budget is used up. The budget is part of the
    state, so that a restored episode has exactly the turns that were left; wrapping the environment in `TimeLimit`
    would break this.

    ## Information
    `info` holds the keys of `carl_gym.envs.task.Info`, JSON types only: the parsed action (of kind "none" at the
    start) with a code for every kind of invalid action, EM, F1, format, turns, the share of gold titles found and
    opened, and `source`: what data was loaded.

    ## Arguments
    `gymnasium.make` takes every value of the card (`turns`, `top_k`, `snippet_length`, `page_length`, `tools`,
    `reward`, `index`, …), the arguments of the data set (`carl_gym.make_task`), and

    - `observation`: `text`, `messages` or `dict`
    - `order`: `random` or `sequential`
    - `render_mode`: `ansi` (`render()` returns the episode so far as text) or `human` (printed as it goes, in colours)

    ```python
    import gymnasium as gym

    env = gym.make("carl_gym:carl/HotpotQA-v0", data_dir="data/hotpotqa", top_k=10, observation="messages")
    env = gym.make("carl_gym:carl/MiniWiki-v0", world=7, split="test", questions=200, hops=(2, 3, 4))
    ```

    ## Version History
    - v0: initial version
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012  (gymnasium's own)

    def __init__(
        self,
        task: SearchTask,
        *,
        observation: ObservationForm = "text",
        order: Order = "random",
        render_mode: str | None = None,
    ) -> None:
        check_choice("observation", observation, get_args(ObservationForm))
        check_choice("order", order, get_args(Order))
        if render_mode is not None:
            check_choice("render_mode", render_mode, self.metadata["render_modes"])
        self.task = task
        self.observation_form = observation
        self.order = order
        self.render_mode = render_mode
        self.action_space = ActionSpace(task.card.tools)
        self.observation_space = observation_space(task, observation)
        self._question_ids = tuple(task.questions)
        self._next_question = 0
        self._state: EnvState | None = None

    @property
    def source(self) -> str:
        """What data was loaded, such as `mini set (72 questions, 320 passages)`."""
        return self.task.source

    @property
    def tools(self) -> list[dict[str, object]]:
        """The card's tools as OpenAI function schemas."""
        return self.task.tools

    @property
    def state(self) -> EnvState:
        """The state now: an immutable value to keep, store or restore from. Raises StateError before `reset`."""
        if self._state is None:
            raise StateError("the environment has no state yet; call reset() first")
        return self._state

    def get_state(self) -> EnvState:
        """Same as `state`; through wrappers: `env.get_wrapper_attr("get_state")()`."""
        return self.state

    def set_state(self, state: EnvState | str) -> None:
        """Continue from `state` (an EnvState, or its JSON text). Raises StateError if it does not fit."""
        self._state = self._read(state)

    def annotate(self, key: str, value: Extra) -> None:
        """Keep `value` under `key` in the state's extras: what a wrapper has to remember so that it survives
        snapshots.

        Raises:
            StateError: before `reset`, or a value that JSON cannot keep as it is.
        """
        self._state = self.state.with_extra(key, value)

    def cut_off(self) -> None:
        """Told by a wrapper that it has ended the episode which step has just continued, as `TokenBudget` does."""

    def fork(self, n: int) -> list[SearchEnv]:
        """`n` new environments at this state; they share questions, passages and index, and nothing that changes."""
        if n < 1:
            raise ConfigError(f"fork({n}): the number of environments must be at least 1")
        self.state  # noqa: B018  (raises before reset)
        return [self._copy() for _ in range(n)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Start an episode, or continue a stored one.

        Args:
            seed: seeds the generator that draws questions; in sequential order, starts over.
            options: `{"question_id": id}`, `{"state": state}`, or nothing for the next question.

        Raises:
            ConfigError: an unknown option or question id.
            StateError: a state that does not belong to this environment.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._next_question = 0
        options = options or {}
        if unknown := set(options) - {"question_id", "state"}:
            raise ConfigError(f"reset: unknown option {unknown.pop()!r}; options are 'question_id' and 'state'")
        if len(options) == 2:
            raise ConfigError("reset: give 'question_id' or 'state', not both: a state knows its question")
        state = self._read(options["state"]) if "state" in options else self._begin(options.get("question_id"))
        self._state = state
        if self.render_mode == "human":
            rendering.show(self.task, state)
        return observe(self.task, state, self.observation_form), inform(self.task, state)

    def step(self, action: str) -> Step:
        """Take an action.

        Raises:
            StateError: before `reset`, or after the end of the episode.
            ActionError: `action` is not a str.
        """
        before, task = self._state, self.task
        if before is None:
            before = self.state  # raises
        state = task.transition(before, action)
        reward = task.reward(before, action, state)
        self._state = state  # when nothing more can fail
        status = state.status
        if self.render_mode == "human":
            rendering.show(task, state, start=len(state.turns))
        return (
            task.observation(state) if self.observation_form == "text" else observe(task, state, self.observation_form),
            reward,
            status == "answered",
            status == "out_of_turns",
            cast(Info, task.info(state)),
        )

    def render(self) -> str | None:
        """With `render_mode="ansi"`, the episode so far as plain text. `human` prints in reset and step instead."""
        if self.render_mode == "ansi":
            return rendering.transcript(self.task, self.state)
        if self.render_mode is None:
            gym.logger.warn('render() needs a render_mode: gymnasium.make(id, render_mode="ansi")')
        return None

    def _begin(self, question_id: object = None) -> EnvState:
        """The first state of the named question, else of the next one in the environment's order."""
        if self.order == "random":
            # Drawn in either case: naming a question does not change which ones are drawn after it.
            drawn = draw(self._question_ids, self.np_random)
        else:
            drawn = self._question_ids[self._next_question]
            if question_id is None:
                self._next_question = (self._next_question + 1) % len(self._question_ids)
        return self.task.initial(find_question(self.task, drawn if question_id is None else question_id))

    def _read(self, state: object) -> EnvState:
        """A stored state, checked."""
        return read_state(self.task, state)

    def _copy(self) -> SearchEnv:
        env = copy.copy(self)
        env.action_space = ActionSpace(self.task.card.tools)
        env.observation_space = observation_space(self.task, self.observation_form)
        env._np_random = copy.deepcopy(self._np_random)
        return env


# --- what the vector environment shares -------------------------------------------------------------------------------


def observation_space(task: SearchTask, form: ObservationForm) -> Space[Any]:
    """The space of observations in this form."""
    if form == "text":
        return TextSpace()
    if form == "messages":
        return MessagesSpace()
    return Dict(
        {
            "text": TextSpace(),
            "question": TextSpace(),
            "turns_left": Discrete(task.card.turns + 1),
            "tool": Discrete(len(LAST_ACTIONS)),
            "hits": Discrete(task.card.top_k + 1),
        }
    )


def observe(task: SearchTask, state: EnvState, form: ObservationForm) -> Any:
    """What is new in `state`, in this form."""
    if form == "text":
        return task.observation(state)
    if form == "messages":
        return task.messages(state)
    last = state.turns[-1] if state.turns else None
    return {
        "text": task.observation(state),
        "question": escape(task.questions[state.question_id].text),
        "turns_left": np.int64(task.card.turns - len(state.turns)),
        "tool": np.int64(LAST_ACTIONS.index(last.action.kind) if last else 0),
        "hits": np.int64(len(last.passage_ids) if last else 0),
    }


def inform(task: SearchTask, state: EnvState) -> Info:
    """`task.info`, with a parsed action of kind "none" at the start: stock vector environments cannot put None and
    dicts together."""
    info = cast(Info, task.info(state))
    if info["parsed_action"] is None:
        info["parsed_action"] = {"kind": LAST_ACTIONS[0], "argument": "", "code": "ok"}
    return info


def read_state(task: SearchTask, state: object) -> EnvState:
    """A state of this task from an EnvState or its JSON text. Raises StateError if it is none, or does not fit."""
    if isinstance(state, str):
        state = EnvState.from_json(state)
    elif not isinstance(state, EnvState):
        raise StateError(f"a state is an EnvState or its JSON text, not {type(state).__name__}")
    try:
        return task.validate(state)
    except TypeError as error:
        raise StateError(f"not a carl_gym state: {error}; pass a state exactly as an environment gave it") from error


def find_question(task: SearchTask, question_id: object) -> Question:
    """The task's question of this id. Raises ConfigError where there is none."""
    if not isinstance(question_id, str) or question_id not in task.questions:
        close = difflib.get_close_matches(str(question_id), task.questions, n=1)
        raise ConfigError(
            f"reset: {task.source} has no question {question_id!r}"
            + (f" (did you mean {close[0]!r}?)" if close else "; ids are the keys of env.unwrapped.task.questions")
        )
    return task.questions[question_id]


def draw(question_ids: tuple[str, ...], generator: np.random.Generator) -> str:
    """A question's id, drawn uniformly."""
    return question_ids[int(generator.integers(len(question_ids)))]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError, naming the argument, unless `value` is one of the choices."""
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        raise ConfigError(
            f"{name} = {value!r}{f' (did you mean {close[0]!r}?)' if close else ''}; one of {', '.join(choices)}"
        )
