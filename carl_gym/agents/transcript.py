"""How observations become tokens. Actions stay the tokens that were sampled: nothing is ever re-encoded.

`inline` is one running assistant text, as in Search-R1: prompt, action, observation, action, ... Every piece is
encoded on its own, so the prefix of a turn is a prefix of the next turn's by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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

    Raises:
        PolicyError: a template without the placeholder; the agent would never see what it should act on.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_template: str
    observation_template: str
    max_tokens: int
    context: int
    _control: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, template in (("prompt", self.prompt_template), ("observation", self.observation_template)):
            if PLACEHOLDER not in template:
                raise PolicyError(f"the {name} template {template!r} has no {PLACEHOLDER}: say where the text goes")
        added = {str(token) for token in self.tokenizer.get_added_vocab()} - set(TAGS)
        control = {token for token in added if len(token) > 1 and not token.isspace()}
        object.__setattr__(self, "_control", tuple(sorted(control, key=len, reverse=True)))

    def prompt(self, observation: str) -> tuple[int, ...]:
        """Token ids of everything before the first action."""
        return self._encode(self.prompt_template, observation)

    def observation(self, observation: str) -> tuple[int, ...]:
        """Token ids between one action and the next."""
        return self._encode(self.observation_template, observation)

    def _encode(self, template: str, text: str) -> tuple[int, ...]:
        # The environment escapes tags and `<|…|>`; models also have control tokens of other shapes ("[INST]", "</s>").
        for token in self._control:
            while token in text:  # a token that overlaps itself can survive the first time
                text = text.replace(token, token[0] + "\u200b" + token[1:])
        rendered = template.replace(PLACEHOLDER, text)
        return tuple(self.tokenizer.encode(rendered, add_special_tokens=False))
