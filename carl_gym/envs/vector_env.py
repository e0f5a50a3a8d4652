"""Many episodes of one task side by side, stepped together: one retrieval call per step for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Dict
from gymnasium.utils import seeding
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from carl_gym.envs import rendering
from carl_gym.envs.gym_env import (
    Info,
    ObservationForm,
    Order,
    SearchEnv,
    check_choice,
    draw,
    find_question,
    inform,
    observation_space,
    observe,
    read_state,
)
from carl_gym.envs.spaces import ActionSpace
from carl_gym.envs.state import EnvState, Question
from carl_gym.envs.task import SearchTask
from carl_gym.errors import ActionError, ConfigError, StateError

Bools = npt.NDArray[np.bool_]
Steps = tuple[Any, npt.NDArray[np.float64], Bools, Bools, Info]

_OPTIONS = ("question_id", "question_ids", "state", "states")


class SearchVectorEnv(VectorEnv[Any, Any, Any]):
    """
    `num_envs` episodes of a task; what `gymnasium.make_vec(id, num_envs=N)` gives.

    Sub-environment i behaves like the i-th `SearchEnv` of a `gymnasium.vector.SyncVectorEnv`, with the same
    observations, rewards, infos and random questions; but all searches of a step go to the retriever in one call.

    Observations are a tuple with one entry each (`text`, `messages`), or a dict of batches (`dict`). Infos are
    Gymnasium's dict of arrays, with a mask under `_key` for every `key`.

    Episodes that are over stay as they are (`AutoresetMode.DISABLED`), so that their last observations and infos can
    be read, until `reset(options={"reset_mask": terminations | truncations})` begins new ones in their places; acting
    in one raises StateError. With `autoreset="same_step"` they are replaced within the step, and their last
    observations and infos are in `infos["final_obs"]` and `infos["final_info"]`.

    Args:
        task: questions, corpus, retriever and card.
        num_envs: how many episodes.
        observation: as for `SearchEnv`.
        order: as for `SearchEnv`; in sequential order the sub-environments share one sequence: each reset takes
            the next question, whichever sub-environment it is for, so that together they go through all of them.
        render_mode: None, or `ansi`: `render()` returns one text per sub-environment.
        autoreset: `disabled`, or `same_step`.

    Raises:
        ConfigError: a value that is not allowed.
    """

    def __init__(
        self,
        task: SearchTask,
        num_envs: int = 1,
        *,
        observation: ObservationForm = "text",
        order: Order = "random",
        render_mode: str | None = None,
        autoreset: str = "disabled",
    ) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs = {num_envs}; at least 1 is needed")
        if render_mode not in (None, "ansi"):
            raise ConfigError(f"render_mode = {render_mode!r}; a vector environment has 'ansi' only")
        check_choice("autoreset", autoreset, ("disabled", "same_step"))
        first = SearchEnv(task, observation=observation, order=order)  # checks the other values
        self.task = task
        self.num_envs = num_envs
        self.observation_form = observation
        self.order = order
        self.render_mode = render_mode
        self.autoreset = AutoresetMode.DISABLED if autoreset == "disabled" else AutoresetMode.SAME_STEP
        self.metadata = {"render_modes": ["ansi"], "autoreset_mode": self.autoreset}
        self.single_action_space = ActionSpace(task.card.tools)
        self.single_observation_space = observation_space(task, observation)
        self.action_space = batch_space(first.action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._question_ids = tuple(task.questions)
        self._next_question = 0
        self._states: list[EnvState | None] = [None] * num_envs
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._seeds = [-1] * num_envs

    @property
    def tools(self) -> list[dict[str, object]]:
        """The card's tools as OpenAI function schemas."""
        return self.task.tools

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each sub-environment."""
        return tuple(self._generator(i) for i in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each sub-environment's generator."""
        return tuple(self._seeds[i] for i, _ in enumerate(self.np_random))

    def get_state(self, indices: Sequence[int] | None = None) -> list[EnvState]:
        """The states of these sub-environments, in this order; of all by default. Raises StateError before `reset`, and
        ConfigError on an index out of range.
        """
        return [self._state(i) for i in self._places("get_state", indices)]

    def set_state(self, states: Sequence[EnvState | str], indices: Sequence[int] | None = None) -> None:
        """Continue in these sub-environments (all by default) from these states (or their JSON texts).

        Raises:
            StateError: a state does not fit; then nothing is changed.
            ConfigError: not one state per index, or an index twice or out of range.
        """
        places = self._places("set_state", indices)
        if len(places) != len(states) or len(set(places)) != len(places):
            raise ConfigError(f"set_state: {len(states)} states for indices {list(places)}; give one for each")
        for i, state in zip(places, [read_state(self.task, state) for state in states], strict=True):
            self._states[i] = state

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Begin new episodes, or continue stored ones, in all sub-environments or in some.

        Args:
            seed: None, one number (sub-environment i gets `seed + i`), or one number or None for each.
            options: `reset_mask`: array of bool, which sub-environments to reset (all by default); the others stay,
                their observations are given once more, and infos leave them out. At most one of: `question_ids` or
                `states`, with an entry for every sub-environment (None: the next question); `question_id` or `state`,
                the same for all.

        Raises:
            ConfigError: an option, seed or mask that makes no sense, or an unknown question.
            StateError: a state that does not fit; or a sub-environment that is left out has had no reset yet. After
                any error nothing has changed.
        """
        options = dict(options or {})
        chosen = self._chosen(options.pop("reset_mask", None))
        seeds = self._split(seed)
        given = self._given(options, chosen)
        if seed is not None:
            self._next_question = 0
        for i in chosen:
            if seeds[i] is not None:
                self._generators[i], self._seeds[i] = seeding.np_random(seeds[i])
            self._begin(i, given.get(i))
        states = self.get_state()
        return self._observe(states), batch_infos(
            {i: inform(self.task, states[i]) for i in chosen}, self.num_envs, alike=True
        )

    def step(self, actions: Sequence[str]) -> Steps:
        """Take one action in every sub-environment.

        Raises:
            StateError: a sub-environment has had no reset, or its episode is over.
            ActionError: not one str for each sub-environment.
            RetrievalError: the search failed. After any error all episodes are as they were before.
        """
        if isinstance(actions, str) or not isinstance(actions, Sized) or len(actions) != self.num_envs:
            many = isinstance(actions, Sized) and not isinstance(actions, str)
            what = f"{len(actions)}" if many else f"one {type(actions).__name__}"
            raise ActionError(f"{what} as actions; expected a sequence of {self.num_envs} str, one per sub-environment")
        before = self.get_state()
        if over := [i for i, state in enumerate(before) if state.status != "running"]:
            raise StateError(
                f"the episodes of sub-environments {over} are over; begin new ones with "
                'reset(options={"reset_mask": terminations | truncations}) before acting'
            )
        task = self.task
        after = task.transition_batch(before, actions)
        rewards = np.array([task.reward(*pair) for pair in zip(before, actions, after, strict=True)], dtype=np.float64)
        self._states = list(after)
        terminations = np.array([state.status == "answered" for state in after], dtype=np.bool_)
        truncations = np.array([state.status == "out_of_turns" for state in after], dtype=np.bool_)
        infos = {i: inform(task, state) for i, state in enumerate(after)}
        observations = [observe(task, state, self.observation_form) for state in after]
        replaced: list[int] = []
        if self.autoreset is AutoresetMode.SAME_STEP:
            replaced = np.flatnonzero(terminations | truncations).tolist()
            for i in replaced:
                final = {"final_obs": observations[i], "final_info": infos[i]}
                state = self._begin(i)
                observations[i], infos[i] = observe(task, state, self.observation_form), final | inform(task, state)
        batch = batch_infos(infos, self.num_envs, alike=not replaced)
        return self._batch(observations), rewards, terminations, truncations, batch

    def render(self) -> tuple[str, ...] | None:
        """With `render_mode="ansi"`, the episodes so far as plain text, one for each sub-environment."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render_mode: gymnasium.make_vec(id, num_envs=N, render_mode="ansi")')
            return None
        return tuple(rendering.transcript(self.task, state) for state in self.get_state())

    # --- parts of reset -----------------------------------------------------------------------------------------------

    def _begin(self, i: int, given: EnvState | Question | None = None) -> EnvState:
        """Put a given state, the first one of a given question, or that of the next question into place i."""
        if isinstance(given, EnvState):
            state = given
        else:
            if self.order == "random":
                # Drawn in either case: naming a question does not change which ones are drawn after it.
                question = self.task.questions[draw(self._question_ids, self._generator(i))]
            elif given is None:
                question = self.task.questions[self._question_ids[self._next_question]]
                self._next_question = (self._next_question + 1) % len(self._question_ids)
            state = self.task.initial(given or question)
        self._states[i] = state
        return state

    def _chosen(self, mask: object) -> list[int]:
        """The places that a mask selects; all by default. The rest must have had a reset."""
        if mask is None:
            return list(range(self.num_envs))
        if not (isinstance(mask, np.ndarray) and mask.dtype == np.bool_ and mask.shape == (self.num_envs,)):
            what = f"{mask.dtype}{list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise ConfigError(f"reset_mask is {what}; expected a numpy array bool[{self.num_envs}]")
        if not mask.any():
            raise ConfigError("reset_mask selects no sub-environment; do not call reset then")
        self.get_state(np.flatnonzero(~mask).tolist())
        return np.flatnonzero(mask).tolist()

    def _places(self, method: str, indices: Sequence[int] | None) -> Sequence[int]:
        """The sub-environments that indices name; all by default."""
        if indices is None:
            return range(self.num_envs)
        listed = isinstance(indices, Iterable)
        if not (listed and all(isinstance(i, _WHOLE) and 0 <= i < self.num_envs for i in indices)):
            raise ConfigError(f"{method}: indices {indices!r}; expected a list of places from 0 to {self.num_envs - 1}")
        return list(map(int, indices))

    def _split(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, _WHOLE) else seed
        fits = isinstance(seeds, Sequence | np.ndarray) and len(seeds) == self.num_envs
        if not (fits and all(one is None or (isinstance(one, _WHOLE) and one >= 0) for one in seeds)):
            expected = f"a whole number from 0, or one (or None) for each of {self.num_envs} sub-environments"
            raise ConfigError(f"seed = {seed!r}; expected {expected}")
        return [None if one is None else int(one) for one in seeds]

    def _given(self, options: dict[str, Any], chosen: Sequence[int]) -> dict[int, EnvState | Question]:
        """What the options say about each chosen place: a state or a question, checked; nothing where None is said."""
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise ConfigError(
                f"reset: unknown option {unknown[0]!r}; options are 'reset_mask', {', '.join(map(repr, _OPTIONS))}"
            )
        if len(options) > 1:
            raise ConfigError(f"reset: give one of {', '.join(map(repr, options))}: a state knows its question")
        for name, values in options.items():
            if name in ("question_id", "state"):
                values = [values] * self.num_envs
            elif isinstance(values, str) or len(values) != self.num_envs:
                raise ConfigError(
                    f"reset: {name!r} needs a list with an entry for each of {self.num_envs} sub-environments"
                )
            read = read_state if name.startswith("state") else find_question
            return {i: read(self.task, values[i]) for i in chosen if values[i] is not None}
        return {}

    def _state(self, i: int) -> EnvState:
        state = self._states[i]
        if state is None:
            raise StateError(f"sub-environment {i} has no state yet; call reset() without a mask first")
        return state

    def _generator(self, i: int) -> np.random.Generator:
        generator = self._generators[i]
        if generator is None:
            generator, self._seeds[i] = seeding.np_random()
            self._generators[i] = generator
        return generator

    def _observe(self, states: Sequence[EnvState]) -> Any:
        return self._batch([observe(self.task, state, self.observation_form) for state in states])

    def _batch(self, observations: list[Any]) -> Any:
        if not isinstance(self.single_observation_space, Dict):
            return tuple(observations)
        empty = create_empty_array(self.single_observation_space, self.num_envs)
        return concatenate(self.single_observation_space, observations, cast(dict[str, Any], empty))


def batch_infos(infos: Mapping[int, Info], n: int, *, alike: bool = False) -> Info:
    """Infos of some of `n` sub-environments, given by place in ascending order, as Gymnasium's dict of arrays.

    For every key an array with the values in their places and, under `_key`, which places have one. The same as calling
    `VectorEnv._add_info` for each, in a fraction of its time: arrays are filled a column at a time. As there, the first
    value decides whether a column holds numbers or objects; None among numbers is NaN. `alike` saves a look at all
    keys: the caller knows that the infos have the same ones in the same order.
    """
    batch: Info = {}
    rows = list(infos.values())
    keys = list(rows[0]) if rows else []
    # Every place has every key: the usual case.
    full = len(rows) == n and (alike or all(list(row) == keys for row in rows))
    columns = zip(*map(dict.values, rows), strict=True) if full else None
    if columns is None:
        keys = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    masks = np.full((len(keys), n), full)
    for key, mask in zip(keys, masks, strict=True):
        places = range(n) if columns else [i for i, info in infos.items() if key in info]
        values = next(columns) if columns else [infos[i][key] for i in places]
        kind = type(values[0])
        if kind is dict and key != "final_obs":
            batch[key] = batch_infos(dict(zip(places, values, strict=True)), n, alike=alike and full)
        elif full and (kind is str or kind in _NUMBERS):
            batch[key] = np.array(values, dtype=object if kind is str else kind)
        elif kind in _NUMBERS:
            batch[key] = np.zeros(n, dtype=kind)
            batch[key][places] = values
        else:
            batch[key] = np.full(n, None, dtype=object)
            for place, value in zip(places, values, strict=True):  # one by one: numpy would take a tuple for a row
                batch[key][place] = value
        if not full:
            mask[places] = True
        batch[f"_{key}"] = mask
    return batch


_NUMBERS = (int, float, bool)
_WHOLE = (int, np.integer)


def make_async(id: str, num_envs: int, **kwargs: Any) -> AsyncVectorEnv:
    """Gymnasium's own AsyncVectorEnv over `gymnasium.make(id, **kwargs)`, a process for each, set up as text needs it.

    Text has no fixed size, so observations must not go through shared memory, and finished episodes stay until they
    are reset, as in `SearchVectorEnv`. Worth it where the work outside of retrieval is large; else
    `gymnasium.make_vec(id)` is faster.

    Args:
        id: a registered environment.
        num_envs: how many processes.
        kwargs: as for `gymnasium.make`.
    """
    env = gym.make_vec(
        id,
        num_envs,
        vectorization_mode="async",
        vector_kwargs={"shared_memory": False, "autoreset_mode": AutoresetMode.DISABLED},
        **kwargs,
    )
    return cast(AsyncVectorEnv, env)
