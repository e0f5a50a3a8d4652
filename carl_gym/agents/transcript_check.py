"""The proof, at start-up, that a transcript can be trained on: a sample episode, token by token.

The episode is put together as the collector does it, from the prompt, sampled actions and observations, each of which
is encoded on its own. So the prefix of a turn begins with the one before it and the action mask is known; what can be
wrong is what stands *around* the actions. Before every action the running text is therefore compared with what the
template makes of the whole conversation when it is asked anew. They may differ in one thing: templates such as Qwen3's
leave out the thinking of earlier turns, or write blanks around it in their own way. The running text keeps what was
sampled; anything else would be trained on prefixes that no action was sampled from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn, Protocol

from transformers import PreTrainedTokenizerBase

from carl_gym.agents.transcript import control_tokens, encode
from carl_gym.envs.protocol import tool_call
from carl_gym.errors import PolicyError

_QUESTION = "Who wrote “Emma”, and when?"
_RESULTS = (
    "<information>\nDoc 1(Title: Emma (novel)) 'Emma' is a novel by Jane Austen.\n</information>",
    '<information>\nJane Austen wrote "Emma" in 1815 & 1816: 1 < 2.\n</information>',
)
_ACTIONS = ("<search>Emma novel</search>", tool_call("access", title="Emma (novel)"))
_THOUGHT = "\nI look it up.\n</think>\n\n"
_THINKING = re.compile(r"\s*(?:<think>.*?</think>\s*)?", re.DOTALL)

_SHOWN = 60
"""Characters of a difference that an error shows."""


class Renderer(Protocol):
    """A transcript as the check needs it: see `InlineTranscript` and `ChatTranscript`."""

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends a turn, if turns have an end."""
        ...

    @property
    def opening(self) -> str:
        """What stands between the beginning of the agent's turn and its action."""
        ...

    @property
    def thinking(self) -> bool:
        """Whether the agent thinks before it acts."""
        ...

    def prompt(self, question: str, /) -> tuple[int, ...]:
        """Tokens before the first action."""
        ...

    def observation(self, text: str, action: Sequence[int], /) -> tuple[int, ...]:
        """Tokens between an action and the next."""
        ...

    def render(self, question: str, turns: Iterable[tuple[str, str]], /) -> str:
        """The text of an episode, written in one go."""
        ...


def check_transcript(transcript: Renderer, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, ...]:
    """Prove a transcript on a sample episode of two turns: one action is cut at a stop string, one ends its turn.

    Args:
        transcript: what to check.
        tokenizer: its tokenizer.
        name: of the agent, for errors.

    Returns:
        What the template would write differently and need not: the thinking of earlier turns.

    Raises:
        PolicyError: what stands around the actions is not what the template writes, or changes from turn to turn;
            tokens that do not spell the text; an observation that can forge a control token. The error shows the
            first difference and what to set.
    """
    try:
        _check_contents(transcript, tokenizer)
        return _check_episode(transcript, tokenizer)
    except PolicyError as error:
        raise PolicyError(f"agent {name!r}: {error}") from error


def _check_contents(transcript: Renderer, tokenizer: PreTrainedTokenizerBase) -> None:
    """No text of the environment can put a control token into the prefix."""
    control = control_tokens(tokenizer)
    ids = set(tokenizer.convert_tokens_to_ids(list(control)))
    hostile = " ".join(control)
    for render in (transcript.prompt, lambda text: transcript.observation(text, ())):
        forged = Counter(i for i in render(hostile) if i in ids) - Counter(i for i in render("x") if i in ids)
        if forged:
            token = tokenizer.convert_ids_to_tokens(next(iter(forged)))
            raise PolicyError(
                f"a text that spells {token!r} becomes that control token: the tokenizer drops the character of no "
                "width that breaks it up; use another tokenizer"
            )


def _check_episode(transcript: Renderer, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for sample in (_QUESTION, *_RESULTS, *_ACTIONS):
        if (read := text(encode(tokenizer, sample))) != sample:
            raise PolicyError(f"the tokenizer reads {sample!r} and gives back {read!r}; use one that loses nothing")
    opening = transcript.opening
    thinks = transcript.thinking or (bool(opening) and "</think>" not in opening)
    thought = (_THOUGHT if opening else f"<think>{_THOUGHT}") if thinks else ""
    pieces = [_Piece("", text(transcript.prompt(_QUESTION)).removesuffix(opening))]
    turns: list[tuple[str, str]] = []
    notes = _compare(pieces, opening, transcript.render(_QUESTION, turns))
    for act, result, ends in zip(_ACTIONS, _RESULTS, (False, True), strict=True):
        action = [*encode(tokenizer, thought + act)]
        if ends and transcript.end_of_turn is not None:
            action.append(transcript.end_of_turn)
        spoken = text(action).removeprefix(thought) + text(transcript.observation(result, action))
        pieces.append(_Piece(opening + thought, spoken.removesuffix(opening)))
        turns.append((thought + act, result))
        notes += _compare(pieces, opening, transcript.render(_QUESTION, turns))
    return tuple(dict.fromkeys(notes))


class _Piece(NamedTuple):
    """A piece of the running text: thinking, which the template may leave out, and what it must write."""

    thinking: str
    spoken: str


def _compare(pieces: Sequence[_Piece], opening: str, rendered: str) -> list[str]:
    """What differs in the thinking. Raises PolicyError if the running text and `rendered` differ in anything else."""
    notes = []
    position = 0
    for n, (thinking, spoken) in enumerate([*pieces, _Piece("", opening)]):
        if thinking and (found := _THINKING.match(rendered, position)):
            if found[0] != thinking:
                notes.append(f"turn {n}: the running text keeps {thinking!r} where the template writes {found[0]!r}")
            position = found.end()
        theirs = rendered[position : position + len(spoken)]
        if theirs != spoken:
            _refuse(n, spoken, rendered[position:])
        position += len(spoken)
    if rendered[position:]:
        _refuse(len(pieces), "", rendered[position:])
    return notes


def _refuse(turn: int, ours: str, theirs: str) -> NoReturn:
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    start = max(0, same - _SHOWN // 3)
    raise PolicyError(
        "the running text is not what the chat template makes of the whole conversation. First difference, in turn "
        f"{turn}: {ours[start:][:_SHOWN]!r} in the running text, {theirs[start:][:_SHOWN]!r} in the template's. Such a "
        "template writes a turn differently once others follow, and cannot be trained on turn by turn; set "
        'tool_role = "user" if it is "tool", else transcript = "inline"'
    )
