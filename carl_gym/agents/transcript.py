"""How texts of the environment become tokens. Actions stay the tokens that were sampled: nothing is ever re-encoded.

`InlineTranscript` is one running assistant text, as in Search-R1: prompt, action, observation, action, ...
`chat_transcript.ChatTranscript` has a message per turn. In both every piece is encoded on its own, so the prefix of a
turn is a prefix of the next turn's by construction; `transcript_check` looks at the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from carl_gym.envs.protocol import TAGS
from carl_gym.errors import PolicyError

PLACEHOLDER = "{observation}"


@dataclass(frozen=True)
class InlineTranscript:
    """Renders texts of the environment for one tokenizer.

    Attributes:
        tokenizer: turns text into ids, without adding any of its own.
        prompt_template: text before the first action, with `{observation}` for the question.
        observation_template: text between two actions, with `{observation}`.
        max_tokens: longest action, in tokens.
        context: longest prefix plus action that the policy takes, in tokens.
        end_of_turn: None; the text goes on after every action, also after one that ended in eos.
        opening, thinking: "" and False, see `ChatTranscript`; here thoughts are text like any other.

    Raises:
        PolicyError: a template without the placeholder; the agent would never see what it should act on.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_template: str
    observation_template: str
    max_tokens: int
    context: int
    _control: tuple[str, ...] = field(init=False, repr=False)
    end_of_turn: ClassVar[None] = None
    opening: ClassVar[str] = ""
    thinking: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, template in (("prompt", self.prompt_template), ("observation", self.observation_template)):
            check_template(name, template)
        object.__setattr__(self, "_control", control_tokens(self.tokenizer))

    def prompt(self, observation: str) -> tuple[int, ...]:
        """Token ids of everything before the first action."""
        return encode(self.tokenizer, self._fill(self.prompt_template, observation))

    def observation(self, observation: str, action: Sequence[int] = ()) -> tuple[int, ...]:
        """Token ids between one action and the next, the same after every action."""
        return encode(self.tokenizer, self._fill(self.observation_template, observation))

    def render(self, question: str, turns: Iterable[tuple[str, str]]) -> str:
        """The text of an episode, written in one go: `turns` are actions with the observations that they brought."""
        return self._fill(self.prompt_template, question) + "".join(
            action + self._fill(self.observation_template, observation) for action, observation in turns
        )

    def _fill(self, template: str, text: str) -> str:
        return template.replace(PLACEHOLDER, break_up(text, self._control))


def check_template(name: str, template: str) -> None:
    """Raises PolicyError if a text of a card has no place for what the environment says."""
    if PLACEHOLDER not in template:
        raise PolicyError(f"the {name} template {template!r} has no {PLACEHOLDER}: say where the text goes")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of `text` and of nothing else."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What a tokenizer reads as one token wherever it stands, longest first; tags and blanks are not control tokens."""
    added = {str(token) for token in tokenizer.get_added_vocab()} - set(TAGS)
    return longest_first(token for token in added if len(token) > 1 and not token.isspace())


def longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    """The different texts among `texts`, a longer one before a shorter one that it may contain."""
    return tuple(sorted(set(texts), key=lambda text: (-len(text), text)))


def break_up(text: str, control: Iterable[str]) -> str:
    """`text` with a character of no width inside every control token, which then reads as plain text.

    The environment escapes tags and `<|...|>`; models have control tokens of other shapes ("[INST]", "</s>") as well.
    """
    for token in control:
        while token in text:  # a token that overlaps itself can survive the first time
            text = text.replace(token, token[0] + "\u200b" + token[1:])
    return text
