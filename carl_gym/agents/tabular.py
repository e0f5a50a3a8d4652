"""A tabular softmax policy on a finite environment, and everything about it that enumeration gives exactly.

    task --enumerate_mdp--> FiniteMDP --+ logits--> solve: V, Q, A, criticality, visits, policy gradient
                                        +---------> TabularPolicy: samples through the real collector

For measuring estimates against what they estimate (`benchmarks/credit_bench.py`), and for tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
import numpy.typing as npt

from carl_gym.agents.draws import uniforms
from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.envs.state import EnvState, Question
from carl_gym.errors import ConfigError, PolicyError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Code = tuple[tuple[int, ...], ...]
"""The tokens of every action; none begins with another one's."""

END = -1
"""In `FiniteMDP.after`: the episode is over."""

MAX_STATES = 500_000
"""Larger worlds are refused: their tables would not be computed in seconds."""


class FiniteTask(Protocol):
    """An `EnvTask` with the same finitely many actions in every state, whose observation tells the whole state."""

    @property
    def questions(self) -> Mapping[str, Question]:
        """By id."""
        ...

    @property
    def actions(self) -> tuple[str, ...]:
        """Texts of all actions."""
        ...

    def initial(self, question: Question, /) -> EnvState:
        """See `EnvTask`."""
        ...

    def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str], /) -> list[EnvState]:
        """See `EnvTask`."""
        ...

    def observation(self, state: EnvState, /) -> str:
        """See `EnvTask`; equal exactly where states are the same."""
        ...

    def reward(self, state: EnvState, action: str, next_state: EnvState, /) -> float:
        """See `EnvTask`."""
        ...

    def terminal(self, state: EnvState, /) -> bool:
        """See `EnvTask`."""
        ...


@dataclass(frozen=True, eq=False)
class FiniteMDP:
    """All states that can be reached, layer by layer: those of a turn follow those of the turn before.

    Attributes:
        actions: texts of the A actions.
        starts: (questions,) the first state of each question.
        after: (S, A) the next state, or `END`.
        rewards: (S, A) of the transition.
        layers: where each turn's states are.
        states: one state of the environment for each; where paths meet, the first one found.
        index: state by the token of its observation (`symbol`).
    """

    actions: tuple[str, ...]
    starts: IntArray
    after: IntArray
    rewards: FloatArray
    layers: tuple[slice, ...]
    states: tuple[EnvState, ...]
    index: dict[int, int]


def symbol(text: str) -> int:
    """A text as one token: a number made of its hash, larger than any token of an action."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 2 | 1 << 62


def enumerate_mdp(task: FiniteTask) -> FiniteMDP:
    """Every state, by the same functions that the collector calls.

    Raises:
        ConfigError: more than `MAX_STATES` states, one state in two turns, or one first state of two questions.
    """
    count = len(task.actions)
    layer = [task.initial(question) for question in task.questions.values()]
    index = {symbol(task.observation(state)): number for number, state in enumerate(layer)}
    if len(index) < len(layer):
        raise ConfigError("two questions begin with the same observation; name the question in the state")
    starts, states, layers = np.arange(len(layer)), list(layer), []
    after: list[list[int]] = []
    rewards: list[list[float]] = []
    while layer:
        begin = len(states) - len(layer)
        layers.append(slice(begin, len(states)))
        found: list[EnvState] = []
        for state in layer:
            reached = task.transition_batch([state] * count, task.actions)
            row = []
            for next_state in reached:
                if task.terminal(next_state):
                    row.append(END)
                    continue
                token = symbol(task.observation(next_state))
                number = index.setdefault(token, len(states) + len(found))
                if number == len(states) + len(found):
                    found.append(next_state)
                if number < len(states):
                    raise ConfigError(
                        f"{task.observation(next_state)!r} comes in two turns; name the turn in the state"
                    )
                row.append(number)
            after.append(row)
            rewards.append(
                [task.reward(state, text, next_state) for text, next_state in zip(task.actions, reached, strict=True)]
            )
        states += found
        if len(states) > MAX_STATES:
            raise ConfigError(f"the world has more than {MAX_STATES} states; take fewer turns, options or questions")
        layer = found
    return FiniteMDP(
        task.actions, starts, np.array(after), np.array(rewards), tuple(layers), tuple(states), index
    )  # fmt: skip


# -- exact ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exact:
    """What is true of a policy.

    Attributes:
        v: (S,) V(s), the expected return still to come.
        q: (S, A) Q(s, a).
        advantage: (S, A) Q - V.
        visits: (S,) expected number of visits in an episode, the question drawn uniformly.
        criticality: (S,) C(s) of CARL's Eq. 5.
        value: J, the mean of V over the questions' first states.
        gradient: (S, A) dJ / dlogits: visits(s) pi(a|s) A(s, a).
    """

    v: FloatArray
    q: FloatArray
    advantage: FloatArray
    visits: FloatArray
    criticality: FloatArray
    value: float
    gradient: FloatArray


def softmax(logits: FloatArray) -> FloatArray:
    """pi(a|s) by rows."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def solve(mdp: FiniteMDP, logits: FloatArray) -> Exact:
    """Everything about the policy softmax(logits); its first largest logit is what greedy decoding takes.

    Criticality (arXiv 2512.04949, Eq. 5): C(s) = std over a' ~ pi(.|s) of the return of a' and then greedy decoding.

    Args:
        mdp: of S states and A actions.
        logits: (S, A).
    """
    pi = softmax(logits)
    q = backward(mdp, pi)
    greedy = backward(mdp, np.eye(len(mdp.actions))[logits.argmax(axis=1)])
    v = (pi * q).sum(axis=1)
    mean = (pi * greedy).sum(axis=1, keepdims=True)
    visits = np.zeros(len(v))
    visits[mdp.starts] = 1 / len(mdp.starts)
    for layer in mdp.layers:
        flow, reached = visits[layer, None] * pi[layer], mdp.after[layer]
        np.add.at(visits, reached[reached != END], flow[reached != END])
    advantage = q - v[:, None]
    return Exact(
        v=v,
        q=q,
        advantage=advantage,
        visits=visits,
        criticality=np.sqrt((pi * (greedy - mean) ** 2).sum(axis=1)),
        value=float(v[mdp.starts].mean()),
        gradient=visits[:, None] * pi * advantage,
    )


def backward(mdp: FiniteMDP, pi: FloatArray | None = None) -> FloatArray:
    """(S, A): Q of a policy with these probabilities, or Q* without any."""
    q = np.zeros(mdp.rewards.shape)
    v = np.zeros(len(q) + 1)  # the last one stands for the end: END indexes it
    for layer in reversed(mdp.layers):
        q[layer] = mdp.rewards[layer] + v[mdp.after[layer]]
        v[layer] = q[layer].max(axis=1) if pi is None else (pi[layer] * q[layer]).sum(axis=1)
    return q


# -- tokens --------------------------------------------------------------------------------------------


def prefix_code(actions: int, longest: int = 3) -> Code:
    """Tokens of so many actions, of one to `longest` tokens: 0, 10, 110, 111, 112, ...; with longest = 1: 0, 1, 2, ...

    Actions of different lengths are what makes the entropy per token differ from that of the action. Of three actions
    the last one ends in a token that is certain, as a closing tag is.

    Raises:
        ConfigError: no actions, or no tokens.
    """
    if actions < 1 or longest < 1:
        raise ConfigError(f"a code needs actions and tokens, not {actions} actions of up to {longest} tokens")
    short = min(longest, actions) - 1
    codes = [(*(1,) * number, 0) for number in range(short)]
    return (*codes, *((*(1,) * short, number) for number in range(actions - short)))


class TokenTable:
    """Token distributions that a distribution over coded actions implies: p(token | tokens before it).

    Let P_j(a) be the probability of the actions that share the first j tokens of action a. Then token j (from 0) of a
    has the probability P_{j+1}(a) / P_j(a).

    Args:
        code: of A actions, of at most L tokens.
    """

    def __init__(self, code: Code) -> None:
        self.code = code
        self.lengths = np.array([len(tokens) for tokens in code])
        longest = int(self.lengths.max())
        self.shares = np.array(
            [[[other[:j] == tokens[:j] for other in code] for j in range(longest + 1)] for tokens in code]
        )
        """(A, L + 1, A) whether another action shares the first j tokens."""

    def logprobs(self, logits: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Log-prob and entropy of every token of every action, (S, A, L) each; 0 behind an action's end."""
        log_pi = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)  # finite where pi underflows
        with np.errstate(divide="ignore"):
            log_p = np.logaddexp.reduce(log_pi[:, None, None, :] + np.log(self.shares), axis=-1)  # (S, A, L + 1)
        logprobs = log_p[:, :, 1:] - log_p[:, :, :-1]
        # At a prefix: expectation, over the actions that share it, of minus the log-prob of their next token.
        among = np.exp(np.where(self.shares[None], log_pi[:, None, None, :] - log_p[..., None], -np.inf))[:, :, :-1]
        entropies = -(among * logprobs.transpose(0, 2, 1)[:, None]).sum(axis=-1)
        there = np.arange(logprobs.shape[2]) < self.lengths[:, None]
        return np.where(there, logprobs, 0.0), np.where(there, entropies, 0.0)

    def gradients(self, pi: FloatArray, actions: IntArray, weights: FloatArray) -> FloatArray:
        """Gradient by the logits of sum_j weights_j log p(token j), for n sampled actions.

            d log P_j(a) / dlogits = pi restricted to the actions that share j tokens / P_j(a) - pi

        Equal weights give weight * (one-hot(a) - pi), the score of the action.

        Args:
            pi: (n, A) probabilities in the states that they were sampled in.
            actions: (n,) which action.
            weights: (n, L) of the tokens, 0 behind an action's end.

        Returns:
            (n, A).
        """
        within = pi[:, None, :] * self.shares[actions]
        ratios = within / within.sum(axis=2, keepdims=True)
        return np.einsum("nj,nja->na", weights, ratios[:, 1:] - ratios[:, :-1])


class SymbolTranscript:
    """Every text of the environment is one token, its `symbol`.

    Args:
        code: of the actions.
    """

    def __init__(self, code: Code) -> None:
        self.max_tokens = max(map(len, code))
        self.context = 1 << 24

    def prompt(self, question_text: str) -> tuple[int, ...]:
        """One token."""
        return (symbol(question_text),)

    def observation(self, text: str, action: Sequence[int] = ()) -> tuple[int, ...]:
        """One token, whatever the action was."""
        return (symbol(text),)


# -- the policy ----------------------------------------------------------------------------------------


class TabularPolicy:
    """pi(a|s) = softmax(logits[s])[a], with actions written in one or several tokens.

    The state is read off the last token of the prefix, as `SymbolTranscript` writes it.

    Args:
        mdp: of S states and A actions.
        logits: (S, A).
        code: the tokens of the actions; one token each by default.

    Raises:
        PolicyError: logits of another shape, or not finite; a code that is none.
    """

    def __init__(self, mdp: FiniteMDP, logits: FloatArray, code: Code | None = None) -> None:
        self.mdp = mdp
        self.code = code if code is not None else prefix_code(len(mdp.actions), 1)
        ambiguous = any(a != b and a == b[: len(a)] for a in self.code for b in self.code)
        if len(set(self.code)) != len(mdp.actions) or ambiguous or () in self.code:
            raise PolicyError(
                f"{self.code} is no code of {len(mdp.actions)} actions: none may begin with another one's"
            )
        self.tokens = TokenTable(self.code)
        self.version = 0
        self.logits = _checked(mdp, logits)
        self._tables: dict[float, tuple[FloatArray, FloatArray, FloatArray]] = {}
        self._completions: dict[tuple[float, bool, int, int], Completion] = {}

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """One action per request, by inversion of the distribution function; at temperature 0 the likeliest one.

        Raises:
            PolicyError: a prefix that does not end in an observation of the world, or no room for an action's tokens.
        """
        if not requests:
            return []
        states = [self._state(request.prefix) for request in requests]
        if any(request.max_tokens < self.tokens.lengths.max() for request in requests):
            raise PolicyError(f"max_tokens must be at least {self.tokens.lengths.max()}, the longest action's tokens")
        u = uniforms(np.array([request.seed for request in requests], dtype=np.uint64), 0)
        temperatures = [request.temperature for request in requests]
        actions = np.empty(len(requests), dtype=np.int64)
        for temperature in set(temperatures):
            rows = np.array([number for number, value in enumerate(temperatures) if value == temperature])
            cdf = self._table(temperature)[0][np.array(states)[rows]]
            actions[rows] = (cdf[:, :-1] <= u[rows, None]).sum(axis=1)
        return [
            self._completion(temperature, request.entropies, state, action)
            for request, temperature, state, action in zip(
                requests, temperatures, states, actions.tolist(), strict=True
            )
        ]

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs of the tokens of one action after each prefix. Raises PolicyError on what is no action's tokens."""
        logprobs = self._table(1.0)[1]
        scores = []
        for prefix, continuation in zip(prefixes, continuations, strict=True):
            if tuple(continuation) not in self.code:
                raise PolicyError(f"tokens {tuple(continuation)} are no action; expected one of {self.code}")
            action = self.code.index(tuple(continuation))
            scores.append(logprobs[self._state(prefix), action, : len(continuation)])
        return scores

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        """Take over `weights["logits"]`, (S, A); None: they were changed in place.

        Raises:
            PolicyError: no logits, or of another shape, or not finite.
        """
        if weights is not None and "logits" not in weights:
            raise PolicyError(f"the weights of a tabular policy are its 'logits', not {sorted(weights)}")
        self.logits = _checked(self.mdp, self.logits if weights is None else weights["logits"])
        self._tables.clear()
        self._completions.clear()
        self.version += 1

    def state(self, observation_tokens: Sequence[int]) -> int:
        """Index of the state that an observation shows. Raises PolicyError if it is none of the world's."""
        return self._state(observation_tokens)

    def _state(self, prefix: Sequence[int]) -> int:
        state = self.mdp.index.get(prefix[-1]) if prefix else None
        if state is None:
            raise PolicyError("a tabular policy got a prefix that does not end in a state of its world; collect with a "
                              "SymbolTranscript on the task that was enumerated")  # fmt: skip
        return state

    def _table(self, temperature: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Distribution function (S, A), log-probs and entropies (S, A, L) at a temperature."""
        if temperature not in self._tables:
            if not 0 <= temperature < math.inf:
                raise PolicyError(f"a sample request's temperature is {temperature}; it must be 0 (greedy) or more")
            logits = self.logits / (temperature or 1.0)
            pi = softmax(logits) if temperature else np.eye(logits.shape[1])[logits.argmax(axis=1)]
            self._tables[temperature] = (pi.cumsum(axis=1), *self.tokens.logprobs(logits))
        return self._tables[temperature]

    def _completion(self, temperature: float, entropies: bool, state: int, action: int) -> Completion:
        key = temperature, entropies, state, action
        if key not in self._completions:
            tokens = self.code[action]
            _, logprobs, exact = self._table(temperature)
            self._completions[key] = Completion(
                tokens,
                tuple(logprobs[state, action, : len(tokens)].tolist()),
                self.mdp.actions[action],
                "stop",
                tuple(exact[state, action, : len(tokens)].tolist()) if entropies else (),
            )
        return self._completions[key]


def _checked(mdp: FiniteMDP, logits: object) -> FloatArray:
    table = np.asarray(logits, dtype=np.float64)
    if table.shape != mdp.rewards.shape or not np.isfinite(table).all():
        raise PolicyError(f"logits must be finite and of shape {mdp.rewards.shape}, not {table.shape}")
    return table
