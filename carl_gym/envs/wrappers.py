"""Wrappers that survive snapshots: whatever they must remember is in the state, or follows from it.

`env.reset(options={"state": state})` through any of them continues exactly where the state was taken, in this process
or another one. Each is recorded in `env.spec`, as Gymnasium's own are.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from carl_gym.envs.gym_env import Info, SearchEnv, Step
from carl_gym.envs.pages import load_tokenizer
from carl_gym.envs.rewards import Outcome, find_reward
from carl_gym.envs.state import EnvState
from carl_gym.errors import ConfigError, StateError


class _SearchWrapper(gym.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """A wrapper that knows that there is a SearchEnv inside, and looks at its state."""

    def __init__(self, env: gym.Env[Any, str], **arguments: Any) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **arguments)  # tokenizers are large
        gym.Wrapper.__init__(self, env)
        if not isinstance(env.unwrapped, SearchEnv):
            raise ConfigError(f"{type(self).__name__} wraps search environments, not {type(env.unwrapped).__name__}")
        self.core: SearchEnv = env.unwrapped


class RecordTranscript(_SearchWrapper):
    """Appends a line of JSON to a file for every reset and every step.

    Every line has `env` (which environment wrote it), `episode` (its number there, from 0), `turn` (actions so far) and
    `event`:

    - `reset`: `question_id`, `observation`
    - `restore`: the same, and `state`: the stored episode, which `EnvState.from_json(json.dumps(state))` reads
    - `step`: `action` as written, `parsed_action`, `observation`, `reward`, `terminated`, `truncated`

    A state that was put in by `set_state`, not `reset`, gives a `restore` line before the next step. A line is written
    whole and at once: environments of several processes may share a file.

    Args:
        env: what to record.
        path: the file; its folder is made, lines are added at its end.
        name: what to write under `env`; a random name by default.
    """

    def __init__(self, env: gym.Env[Any, str], path: str | Path, name: str | None = None) -> None:
        super().__init__(env, path=str(path), name=name)
        self.path = Path(path)
        self.name = name or uuid.uuid4().hex[:8]
        self._file: int | None = None
        self._episode = -1
        self._seen: EnvState | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Reset, and write a line about it."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._begin(self.core.state, observation, restored="state" in (options or {}))
        return observation, info

    def step(self, action: str) -> Step:
        """Step, and write a line about it."""
        before = self.core.state
        if self._seen is None or (before.question_id, before.turns) != (self._seen.question_id, self._seen.turns):
            self._begin(before, self.core.task.observation(before), restored=True)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._seen = state = self.core.state
        values = {"action": action, "parsed_action": info["parsed_action"], "observation": observation}
        ending = {"reward": reward, "terminated": terminated, "truncated": truncated}
        self._write("step", state, values | ending)
        return observation, float(reward), terminated, truncated, info

    def close(self) -> None:
        """Close the file, too."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self.env.close()

    def _begin(self, state: EnvState, observation: object, *, restored: bool) -> None:
        self._episode += 1
        self._seen = state
        values: dict[str, object] = {"question_id": state.question_id, "observation": observation}
        if restored:
            values["state"] = json.loads(state.to_json())
        self._write("restore" if restored else "reset", state, values)

    def _write(self, event: str, state: EnvState, values: dict[str, object]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        record = {"env": self.name, "episode": self._episode, "turn": len(state.turns), "event": event} | values
        # ASCII: an agent's text may hold lone surrogates, which UTF-8 cannot.
        line = json.dumps(record, default=_plain).encode("ascii") + b"\n"
        # One write to a file in append mode: the lines of several writers stay apart.
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path}: a line could not be written whole; is the disk full?")


class RewardShaping(_SearchWrapper):
    """Adds potential-based shaping to the reward: `gamma * potential(next) - potential(now)`.

    The potential of an ended episode counts as 0, so the shaping of an episode adds up to minus the potential of its
    first state and the best policies stay the best (Ng, Harada and Russell, 1999, "Policy invariance under reward
    transformations"). It follows from the states alone. `info["shaping"]` is what was added.

    Args:
        env: what to wrap.
        potential: a function of the `rewards.Outcome` so far, or what a card may write under `reward`: a name such as
            `title_recall`, or an import path.
        gamma: discount, in [0, 1].

    Raises:
        ConfigError: gamma out of range.
        CardError: no such reward.
    """

    def __init__(self, env: gym.Env[Any, str], potential: str | Callable[[Outcome], float], gamma: float = 1.0) -> None:
        super().__init__(env, potential=potential, gamma=gamma)
        if not 0 <= gamma <= 1:
            raise ConfigError(f"RewardShaping: gamma = {gamma}; expected a number in [0, 1]")
        name = "RewardShaping"
        self.potential = find_reward(potential, name) if isinstance(potential, str) else potential
        self.gamma = gamma

    def step(self, action: str) -> Step:
        """Step; the shaping is in the reward."""
        before = self._potential(self.core.state)
        observation, reward, terminated, truncated, info = self.env.step(action)
        after = 0.0 if terminated or truncated else self._potential(self.core.state)
        shaping = self.gamma * after - before
        return observation, float(reward) + shaping, terminated, truncated, info | {"shaping": shaping}

    def _potential(self, state: EnvState) -> float:
        return float(self.potential(self.core.task.score(state)))


class TokenBudget(_SearchWrapper):
    """Ends an episode when its actions and observations have used up a number of tokens.

    The action that uses it up still counts; the episode is truncated with the reward that running out of turns would
    have given, and further actions raise StateError. What was used is kept in the state's extras. A state that was
    made without the wrapper is counted as its observations and its actions as tags (the thoughts are not in it).

    `info["tokens_used"]` and `info["tokens_left"]` say how it stands.

    Args:
        env: what to wrap.
        limit: tokens per episode, at least 1; the question counts.
        count: the tokenizer's name (see `pages.load_tokenizer`), an object whose `encode(text)` gives tokens (or an
            object with `ids`), or a function from a text to its number of tokens.

    Raises:
        ConfigError: the limit is no positive number, `count` none of these, or RewardShaping inside: it must see the
            truncation.
        CardError: no such tokenizer.
    """

    KEY, TURNS = "tokens_used", "tokens_counted_turns"

    def __init__(self, env: gym.Env[Any, str], limit: int, count: str | Callable[[str], int] | Any) -> None:
        super().__init__(env, limit=limit, count=count)
        inner: gym.Env[Any, Any] = env
        while isinstance(inner, gym.Wrapper):
            if isinstance(inner, RewardShaping):
                raise ConfigError("TokenBudget: put RewardShaping around it, not inside: it must see the truncation")
            inner = inner.env
        if limit < 1:
            raise ConfigError(f"TokenBudget: limit = {limit}; expected at least 1")
        self.limit = limit
        self.count = _counter(count)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Reset; a restored state brings what it had used."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, info | self._usage(self._used())

    def step(self, action: str) -> Step:
        """Step, unless the budget is spent. Raises StateError when it is."""
        before, task = self.core.state, self.core.task
        used = self._used()
        if used >= self.limit and not before.terminal:
            raise StateError(
                f"the episode is over: {used} of {self.limit} tokens are used; start a new one before acting"
            )
        observation, reward, terminated, truncated, info = self.env.step(action)
        state = self.core.state
        used += self.count(action) + self.count(task.observation(state))
        self._note(used)
        if used >= self.limit and not (terminated or truncated):
            truncated = True
            self.core.cut_off()
            ended = dataclasses.replace(state, status="out_of_turns")
            reward = float(reward) + task.reward(before, action, ended) - task.reward(before, action, state)
        return observation, float(reward), terminated, truncated, info | self._usage(used)

    def _used(self) -> int:
        """Tokens used so far, by the state; turns that it was not told about are counted and noted."""
        state = self.core.state
        used, counted = int(state.extra(self.KEY, 0) or 0), int(state.extra(self.TURNS, -1) or 0)
        if counted != len(state.turns):
            for action, observation in self.core.task.transcript(state)[counted + 1 :]:
                written = f"<{action.kind}>{action.argument}</{action.kind}>" if action and action.valid else ""
                used += self.count(written) + self.count(observation)
            self._note(used)
        return used

    def _note(self, used: int) -> None:
        self.core.annotate(self.KEY, used)
        self.core.annotate(self.TURNS, len(self.core.state.turns))

    def _usage(self, used: int) -> Info:
        return {"tokens_used": used, "tokens_left": max(0, self.limit - used)}


def _counter(count: Any) -> Callable[[str], int]:
    if isinstance(count, str):
        count = load_tokenizer(count)
    if hasattr(count, "encode"):

        def tokens(text: str) -> int:
            # A lone surrogate is no character; tokenizers refuse it, and an agent's text may hold one.
            encoded = count.encode(text.encode("utf-8", errors="replace").decode("utf-8"))
            return len(getattr(encoded, "ids", encoded))

        return tokens
    if not callable(count):
        raise ConfigError(
            f"TokenBudget: count is a {type(count).__name__}; expected a tokenizer, its name, or a function"
        )
    return count


def _plain(value: object) -> object:
    """NumPy's numbers, which a `dict` observation holds, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be recorded")
