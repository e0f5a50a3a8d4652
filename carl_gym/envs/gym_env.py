"""The Gymnasium shell: one running episode over a pure `SearchTask`."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import gymnasium as gym

from carl_gym.envs.spaces import ActionSpace, TextSpace
from carl_gym.envs.state import EnvState, Question
from carl_gym.envs.task import SearchTask
from carl_gym.errors import ConfigError, StateError


class SearchEnv(gym.Env[str, str]):
    """
    Answer a question by searching a collection of passages and opening the ones that matter.

    ## Description
    The agent is asked a question whose answer usually has to be put together from several passages. It writes
    free text; the environment acts on the first complete action in it.

    ## Action Space
    Any `str` (`ActionSpace`; `sample()` gives well-formed actions). Three actions exist:

    - `<search>query</search>`: find passages
    - `<access>title</access>`: open a passage by its title, as search results show it
    - `<answer>text</answer>`: answer and end the episode

    Text outside of the tags and in `<think>…</think>` is ignored. Text without a complete action, with an empty one
    or with one of more than 512 characters is an *invalid action*: it costs a turn and is answered with a hint.
    What is not a `str` raises `ActionError`.

    ## Observation Space
    A `str`: only what is *new*. After `reset` the question; after a search one line `Doc 1(Title: T) snippet` per
    hit; after an access the title and the text of the passage. Results and hints stand between `<information>` and
    `</information>`. After an answer the observation is empty. Text from questions and passages is escaped: it can
    forge neither a tag nor a chat-template token.

    ## Starting State
    A question drawn uniformly with the environment's random generator (`reset(seed=…)`), or the one that
    `reset(options={"question_id": id})` names. `reset(options={"state": state})` continues a stored episode: `state`
    is an `EnvState` or its JSON text, and may come from another environment or process with the same card and data.

    ## Rewards
    0 until the episode ends, then the card's reward. `f1_format`, the default, is the F1 of the answer (official
    HotpotQA normalisation; 0 without an answer) plus 0.1 times the share of well-formed actions.

    ## Episode End
    Terminated after an answer, right or wrong. Truncated when the turn budget is used up. The budget is part of the
    state, so that a restored episode has exactly the turns that were left; wrapping the environment in `TimeLimit`
    would break this.

    ## Information
    `info` holds the keys of `carl_gym.envs.task.Info`, JSON types only: the parsed action with a code for every
    kind of invalid action, EM, F1, format, turns, the share of gold titles found and opened, and `source`: what data
    was loaded.

    ## Arguments
    `gymnasium.make` takes every value of the card (`turns`, `top_k`, `snippet_chars`, `passage_chars`, `reward`,
    `index`) and the arguments of the data set (`carl_gym.envs.data`):

    ```python
    import gymnasium as gym

    env = gym.make("carl_gym:carl/HotpotQA-v0", data_dir="data/hotpotqa", top_k=10)
    env = gym.make("carl_gym:carl/MiniWiki-v0", world=7, split="test", questions=200, hops=(2, 3, 4))
    ```

    ## Version History
    - v0: initial version
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium's own attribute)

    def __init__(self, task: SearchTask) -> None:
        self.task = task
        self.action_space = ActionSpace()
        self.observation_space = TextSpace()
        self._question_ids = tuple(task.questions)
        self._state: EnvState | None = None

    @property
    def source(self) -> str:
        """What data was loaded, such as `mini set (72 questions, 320 passages)`."""
        return self.task.source

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
        if isinstance(state, str):
            state = EnvState.from_json(state)
        elif not isinstance(state, EnvState):
            raise StateError(f"a state is an EnvState or its JSON text, not {type(state).__name__}")
        try:
            self._state = self.task.validate(state)
        except TypeError as error:
            raise StateError(
                f"not a carl_gym state: {error}; pass a state exactly as an environment gave it"
            ) from error

    def fork(self, n: int) -> list[SearchEnv]:
        """`n` new environments at this state; they share questions, passages and index, and nothing that changes."""
        if n < 1:
            raise ConfigError(f"fork({n}): the number of environments must be at least 1")
        forks = [SearchEnv(self.task) for _ in range(n)]
        for env in forks:
            env._state = self.state
            env._np_random, env._np_random_seed = copy.deepcopy(self._np_random), self._np_random_seed
        return forks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode, or continue a stored one.

        Args:
            seed: seeds the generator that draws questions.
            options: `{"question_id": id}`, `{"state": state}`, or nothing for a random question.

        Raises:
            ConfigError: an unknown option or question id.
            StateError: a state that does not belong to this environment.
        """
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"question_id", "state"}:
            raise ConfigError(f"reset: unknown option {unknown.pop()!r}; options are 'question_id' and 'state'")
        if len(options) == 2:
            raise ConfigError("reset: give 'question_id' or 'state', not both: a state knows its question")
        if "state" in options:
            self.set_state(options["state"])
        else:
            # Drawn in either case: naming a question does not change which ones are drawn after it.
            drawn = self._question_ids[int(self.np_random.integers(len(self._question_ids)))]
            self._state = self.task.initial(self._question(options.get("question_id", drawn)))
        return self.task.observation(self.state), dict(self.task.info(self.state))

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take an action.

        Raises:
            StateError: before `reset`, or after the end of the episode.
            ActionError: `action` is not a str.
        """
        task, before = self.task, self.state
        state = self._state = task.transition(before, action)
        truncated = state.status == "out_of_turns"
        return (
            task.observation(state),
            task.reward(before, action, state),
            state.terminal and not truncated,
            truncated,
            dict(task.info(state)),
        )

    def _question(self, question_id: object) -> Question:
        if not isinstance(question_id, str) or question_id not in self.task.questions:
            close = difflib.get_close_matches(str(question_id), self._question_ids, n=1)
            raise ConfigError(
                f"reset: {self.source} has no question {question_id!r}"
                + (f" (did you mean {close[0]!r}?)" if close else "; ids are the keys of env.unwrapped.task.questions")
            )
        return self.task.questions[question_id]
