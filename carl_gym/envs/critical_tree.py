"""A finite search-like environment in which everything can be computed: few critical turns among many routine ones.

    turns x options -> a tree of paths (or a small graph of keys) -> one outcome reward at the end

It has no passages and nothing to read up on: which options are right is a hash of the seed and of the state. What it
has is the shape that CARL claims for search (arXiv 2512.04949): most actions hardly matter, a few decide. Transitions
are deterministic, so values, criticality and the policy gradient follow exactly by enumeration (`agents.tabular`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from carl_gym.envs.pages import Memo
from carl_gym.envs.protocol import parse
from carl_gym.envs.spaces import TextSpace
from carl_gym.envs.state import EnvState, ParsedAction, Question, Turn
from carl_gym.errors import ActionError, ConfigError, StateError

OPTIONS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath")
"""What an option is called; a state offers the first so many."""

STOP = "<answer>done</answer>"
"""The action that ends an episode early, where there is one."""

INVALID = -1
"""In a path: an action that was no option."""

MEMO = 1 << 16
"""How many states' and paths' consequences are kept."""

Path = tuple[int, ...]
Info = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CriticalTreeSettings:
    """The shape of the world.

    Attributes:
        turns: turns of an episode.
        options: actions to choose from in every state.
        critical: the critical turns, counted from 1; all others are routine.
        stake: share of the outcome that is lost with each critical turn that was missed.
        slips: share of the options of a routine turn, but for one that is always good, that are slips.
        slip_cost: share of the outcome that is lost with each slip.
        early_answer: one more action, `<answer>done</answer>`, ends the episode; critical turns that were still to
            come count as missed. Without it all episodes have the same length.
        repeated: a state is (turn, critical turns missed, slips) instead of the path of actions, so that different
            paths lead to the same state.
        trees: number of questions, each a world of its own.
        seed: of which options are right.

    Raises:
        ConfigError: a value out of its range.
    """

    turns: int = 8
    options: int = 3
    critical: tuple[int, ...] = (3, 6)
    stake: float = 0.9
    slips: float = 0.3
    slip_cost: float = 0.05
    early_answer: bool = False
    repeated: bool = False
    trees: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("turns", 1, 64), ("options", 2, len(OPTIONS)), ("trees", 1, 1_000_000)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"CriticalTree: {name} = {value!r}; expected a whole number from {low} to {high}")
        for name in ("stake", "slips", "slip_cost"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"CriticalTree: {name} = {value!r}; expected a share, from 0 to 1")
            object.__setattr__(self, name, float(value))
        for name in ("early_answer", "repeated"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"CriticalTree: {name} = {getattr(self, name)!r}; expected True or False")
        if type(self.seed) is not int:
            raise ConfigError(f"CriticalTree: seed = {self.seed!r}; expected a whole number")
        known = isinstance(self.critical, (tuple, list)) and all(
            type(turn) is int and 1 <= turn <= self.turns for turn in self.critical
        )
        if not known or len(set(self.critical)) != len(self.critical):
            raise ConfigError(
                f"CriticalTree: critical = {self.critical!r}; expected different turns from 1 to {self.turns}, such as "
                f"({self.turns},)"
            )
        object.__setattr__(self, "critical", tuple(sorted(self.critical)))

    @property
    def hash(self) -> str:
        """Equal for worlds that are the same."""
        return blake2b(json.dumps(dataclasses.asdict(self)).encode(), digest_size=12).hexdigest()


class Progress(NamedTuple):
    """What a path has cost so far: critical turns missed, and slips."""

    missed: int = 0
    slips: int = 0


class CriticalTask:
    """The pure task: an `EnvTask` for the collector, and what enumeration needs.

    Attributes:
        settings: the shape of the world.
        questions: by id, one per tree.
        actions: the texts of all actions, the same in every state: a search per option, then `STOP` if there is one.
        tools: what the agent may write.
    """

    def __init__(self, settings: CriticalTreeSettings | None = None) -> None:
        self.settings = settings = settings or CriticalTreeSettings()
        self.questions = {
            f"tree{number}": Question(f"tree{number}", f"Follow the trail of tree {number}.", ("done",))
            for number in range(settings.trees)
        }
        options = tuple(f"<search>{name}</search>" for name in OPTIONS[: settings.options])
        self.actions = (*options, STOP) if settings.early_answer else options
        self.tools = ("search", "answer") if settings.early_answer else ("search",)
        self._hash = settings.hash
        self._critical = frozenset(settings.critical)
        self._verdicts: Memo[tuple[str, Path], tuple[int, tuple[bool, ...]]] = Memo(MEMO)
        self._costs: Memo[tuple[str, Path], Progress] = Memo(MEMO)

    def initial(self, question: Question) -> EnvState:
        """The state before the first turn."""
        return EnvState(question.id, card=self._hash)

    def transition(self, state: EnvState, action: str) -> EnvState:
        """The state after `action`, whatever text it is.

        Raises:
            StateError: the episode is over, or the state is of another world.
            ActionError: the action is not a str.
        """
        self._check_origin(state)
        if state.terminal:
            raise StateError(f"the episode is over (status {state.status!r}); start a new one before acting")
        if not isinstance(action, str):
            raise ActionError(f"an action is a str such as {self.actions[0]!r}, not {type(action).__name__}")
        parsed = parse(action, self.tools)
        if parsed.kind == "search" and parsed.argument not in OPTIONS[: self.settings.options]:
            parsed = ParsedAction("invalid", "", "bad_argument")
        return self._after(state, parsed)

    def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str]) -> list[EnvState]:
        """The states after one action each. Errors as for `transition`."""
        return [self.transition(state, action) for state, action in zip(states, actions, strict=True)]

    def terminal(self, state: EnvState) -> bool:
        """Whether the episode is over."""
        return state.terminal

    def observation(self, state: EnvState) -> str:
        """Everything that the state is: the same text exactly where the state is the same; "" at the end."""
        if state.terminal:
            return ""
        settings, turn = self.settings, len(state.turns) + 1
        if settings.repeated:
            missed, slips = self.progress(state)
            so_far = f"{missed} missed, {slips} slips"
        else:
            names = [turn.action.argument or "(invalid)" for turn in state.turns]
            so_far = f"after {' > '.join(names)}" if names else "nothing followed yet"
        return (
            f"{self.questions[state.question_id].text} Turn {turn} of {settings.turns}, {so_far}. "
            f"Options: {', '.join(OPTIONS[: settings.options])}."
        )

    def reward(self, state: EnvState, action: str, next_state: EnvState) -> float:
        """The outcome (1 - stake)^missed (1 - slip_cost)^slips on the transition that ends an episode, else 0."""
        if not next_state.terminal or state.terminal:
            return 0.0
        missed, slips = self.progress(next_state)
        return float((1 - self.settings.stake) ** missed * (1 - self.settings.slip_cost) ** slips)

    def progress(self, state: EnvState) -> Progress:
        """What the path has cost; after an early answer, the critical turns that never came are missed."""
        path = _path(state)
        answered = bool(state.turns) and state.turns[-1].action.kind == "answer"
        missed, slips = self._cost(state.question_id, path)
        still = sum(turn > len(path) for turn in self._critical) if answered else 0
        return Progress(missed + still, slips)

    def found(self, state: EnvState) -> int:
        """Critical turns that were taken right so far."""
        passed = sum(turn <= len(_path(state)) for turn in self._critical)
        return passed - self._cost(state.question_id, _path(state)).missed

    def info(self, state: EnvState) -> Info:
        """Measurements for people and logs, never shown to an agent: JSON types only."""
        missed, slips = self.progress(state)
        turns = len(state.turns)
        return {
            "question_id": state.question_id,
            "status": state.status,
            "turns": turns,
            "turns_left": self.settings.turns - turns,
            "missed": missed,
            "slips": slips,
            "invalid_actions": sum(turn.action.kind == "invalid" for turn in state.turns),
            "critical": not state.terminal and turns + 1 in self._critical,
        }

    def validate(self, state: EnvState) -> EnvState:
        """`state`, if this task could have made it. Raises StateError."""
        self._check_origin(state)
        if state.question_id not in self.questions:
            raise StateError(f"the state's question {state.question_id!r} is none of this world's")
        replayed = self.initial(self.questions[state.question_id])
        for turn in state.turns:
            if replayed.terminal or turn.passage_ids or turn.page or not self._possible(turn.action):
                raise StateError(f"turn {len(replayed.turns) + 1} of the state, {turn}, cannot be of this world")
            replayed = self._after(replayed, turn.action)
        if state.status != replayed.status:
            raise StateError(f"the state's status {state.status!r} contradicts its {len(state.turns)} turns")
        return state

    def _possible(self, action: ParsedAction) -> bool:
        kind, argument, code = action
        if kind == "invalid":
            return code != "ok" and not argument
        return (
            code == "ok" and kind in self.tools and (kind == "answer" or argument in OPTIONS[: self.settings.options])
        )

    def _after(self, state: EnvState, action: ParsedAction) -> EnvState:
        turns = (*state.turns, Turn(action))
        over = action.kind == "answer" or len(turns) == self.settings.turns
        return EnvState(state.question_id, turns, "answered" if over else "running", self._hash, extras=state.extras)

    def _check_origin(self, state: EnvState) -> None:
        if state.card != self._hash:
            raise StateError("the state was made with other settings; restore it in an environment with the same ones")

    def _verdict(self, question_id: str, key: Path) -> tuple[int, tuple[bool, ...]]:
        """The option of a state that is right or at least good, and whether each option is a slip there."""
        known = self._verdicts.get((question_id, key))
        if known is not None:
            return known
        count = self.settings.options
        text = f"{self.settings.seed} {question_id} {key}"
        draws = [
            int.from_bytes(blake2b(f"{text} {n}".encode(), digest_size=8).digest(), "big") / 2**64
            for n in range(count + 1)
        ]
        good = int(count * draws[count])
        slips = tuple(draw < self.settings.slips and n != good for n, draw in enumerate(draws[:count]))
        return self._verdicts.keep((question_id, key), (good, slips), 1)

    def _cost(self, question_id: str, path: Path) -> Progress:
        """What following `path` costs."""
        if not path:
            return Progress()
        known = self._costs.get((question_id, path))
        if known is not None:
            return known
        turn, choice = len(path), path[-1]
        missed, slips = self._cost(question_id, path[:-1])
        good, slip = self._verdict(question_id, (turn, missed, slips) if self.settings.repeated else path[:-1])
        if turn in self._critical:
            missed += choice != good
        else:
            slips += choice == INVALID or slip[choice]
        return self._costs.keep((question_id, path), Progress(missed, slips), 1)


class OptionSpace(TextSpace):
    """Every string can be taken; samples are the actions of the world."""

    def __init__(self, actions: Sequence[str], seed: int | np.random.Generator | None = None) -> None:
        self.actions = tuple(actions)
        super().__init__(seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """One of the actions. Neither a mask nor probabilities are supported."""
        if mask is not None or probability is not None:
            raise ValueError("a space of text samples without mask and probability; pass None")
        return self.actions[int(self.np_random.integers(len(self.actions)))]

    def __repr__(self) -> str:
        return f"OptionSpace({len(self.actions)} actions)"

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and vars(other)["actions"] == self.actions


class CriticalTreeEnv(gym.Env[str, str]):
    """
    Follow a trail on which a few turns decide nearly everything.

    ## Description
    Every turn offers the same few options. On a *critical* turn one option is right, and any other loses most of the
    outcome; on a *routine* turn it hardly matters what is chosen, some options are slips that cost a little. Which
    options are right differs from state to state and can only be learned by trying. The world is finite and its
    transitions are deterministic: `carl_gym.agents.tabular` computes values, advantages, criticality and the policy
    gradient of a tabular policy exactly, and `benchmarks/credit_bench.py` measures algorithms against them.

    ## Action Space
    Any `str` (`OptionSpace`; `sample()` gives actions of the world): `<search>option</search>`, and with
    `early_answer=True` also `<answer>done</answer>`, or any other answer. Text around the action and in
    `<think>…</think>` is ignored. Any other text is an invalid action: it uses up the turn and counts as missed on a
    critical turn, as a slip elsewhere.
    What is not a `str` raises `ActionError`.

    ## Observation Space
    A `str` (`TextSpace`) that names the state completely: the tree, the turn, and the path so far, or with
    `repeated=True` the numbers of turns missed and of slips. Empty at the end.

    ## Starting State
    The first turn of a tree drawn uniformly with the environment's random generator (`reset(seed=…)`), or of the one
    that `reset(options={"question_id": "tree0"})` names. `reset(options={"state": state})` continues a stored episode:
    `state` is an `EnvState` or its JSON text, and may come from another environment or process with the same settings.

    ## Rewards
    0 until the episode ends, then `(1 - stake)^missed * (1 - slip_cost)^slips`, between 0 and 1. The best policy
    reaches 1 on every tree.

    ## Episode End
    Terminated after the last turn, or after an early answer. Never truncated: the number of turns is part of the state.

    ## Information
    `info` holds JSON types only: `question_id`, `status`, `turns`, `turns_left`, `missed`, `slips`, `invalid_actions`,
    and `critical`: whether the turn to come is a critical one.

    ## Arguments
    `gymnasium.make` takes every value of `carl_gym.envs.critical_tree.CriticalTreeSettings`, and

    - `render_mode`: `ansi` (`render()` returns the episode so far as text)

    ```python
    import gymnasium as gym

    env = gym.make("carl_gym:carl/CriticalTree-v0", turns=12, critical=(4, 8, 12), stake=0.5, repeated=True)
    ```

    ## Version History
    - v0: initial version
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012  (gymnasium's own)

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(
                f"render_mode = {render_mode!r}; one of {', '.join(self.metadata['render_modes'])}, or None"
            )
        known = [field.name for field in dataclasses.fields(CriticalTreeSettings)]
        if unknown := sorted(set(settings) - set(known)):
            raise ConfigError(f"CriticalTree: unknown argument {unknown[0]!r}; arguments: {', '.join(known)}")
        self.task = CriticalTask(CriticalTreeSettings(**settings))
        self.render_mode = render_mode
        self.action_space = OptionSpace(self.task.actions)
        self.observation_space = TextSpace()
        self._question_ids = tuple(self.task.questions)
        self._state: EnvState | None = None

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

    def fork(self, n: int) -> list[CriticalTreeEnv]:
        """`n` new environments at this state; they share the world, and nothing that changes."""
        if type(n) is not int or n < 1:
            raise ConfigError(f"fork({n!r}): the number of environments must be a whole number of at least 1")
        self.state  # noqa: B018  (raises before reset)
        return [self._copy() for _ in range(n)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        """Start an episode, or continue a stored one.

        Args:
            seed: seeds the generator that draws trees.
            options: `{"question_id": id}`, `{"state": state}`, or nothing.

        Raises:
            ConfigError: an unknown option or question id.
            StateError: a state that does not belong to this environment.
        """
        super().reset(seed=seed)
        options = options or {}
        if set(options) - {"question_id", "state"} or len(options) == 2:
            raise ConfigError(f"reset: options {sorted(options)}; expected 'question_id' or 'state', or none")
        drawn = self._question_ids[int(self.np_random.integers(len(self._question_ids)))]
        question_id = options.get("question_id", drawn)
        if question_id not in self._question_ids:
            raise ConfigError(f"reset: no question {question_id!r}; they are tree0 to {self._question_ids[-1]}")
        fresh = self.task.initial(self.task.questions[question_id])
        self._state = state = self._read(options["state"]) if "state" in options else fresh
        return self.task.observation(state), self.task.info(state)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Take an action.

        Raises:
            StateError: before `reset`, or after the end of the episode.
            ActionError: `action` is not a str.
        """
        before = self.state
        self._state = state = self.task.transition(before, action)
        reward = self.task.reward(before, action, state)
        return self.task.observation(state), reward, state.terminal, False, self.task.info(state)

    def render(self) -> str | None:
        """With `render_mode="ansi"`, the episode so far as plain text."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render_mode: gymnasium.make(id, render_mode="ansi")')
            return None
        state = self.state
        lines = [self.task.questions[state.question_id].text]
        for number, (kind, argument, code) in enumerate((turn.action for turn in state.turns), start=1):
            mark = "*" if number in self.task.settings.critical else " "
            lines.append(
                f"{number:2}{mark} {f'invalid action ({code})' if kind == 'invalid' else f'{kind} {argument}'}"
            )
        missed, slips = self.task.progress(state)
        return "\n".join([*lines, f"{missed} missed, {slips} slips{'; over' if state.terminal else ''}"])

    def _read(self, state: object) -> EnvState:
        if isinstance(state, str):
            state = EnvState.from_json(state)
        if not isinstance(state, EnvState):
            raise StateError(f"a state is an EnvState or its JSON text, not {type(state).__name__}")
        return self.task.validate(state)

    def _copy(self) -> CriticalTreeEnv:
        env = copy.copy(self)
        env.action_space = OptionSpace(self.task.actions)
        env.observation_space = TextSpace()
        env._np_random = copy.deepcopy(self._np_random)
        return env


def _path(state: EnvState) -> Path:
    """The options that were followed; an early answer follows none."""
    return tuple(
        OPTIONS.index(turn.action.argument) if turn.action.kind == "search" else INVALID
        for turn in state.turns
        if turn.action.kind != "answer"
    )
