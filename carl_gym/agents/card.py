"""Agent cards: which model an agent is, how texts become its tokens, and what runs it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from carl_gym.cards import beside, bounded, find_card, list_cards, load_card, make_card
from carl_gym.errors import CardError

CARD_FILE = "agent.toml"

SYSTEM = (
    "Answer the question with the help of the tools. Search until you know the answer, then give it, and nothing else, "
    "as short as it can be.\n{tools}"
)
"""The system prompt of a chat, unless its card has another one."""


@dataclass(frozen=True, slots=True)
class AgentCard:
    """An agent (agents/*.toml).

    Attributes:
        id: name of the agent.
        description: one sentence for people.
        model: folder beside the card, or hub id of the model.
        prompt: text before the first action, in a chat what the first user message says; `{observation}` stands for
            the question. Empty: inline the tokenizer's chat template with `INSTRUCTION`, in a chat the question alone.
        observation: text between two actions; `{observation}` stands for what the environment returned. In a chat it
            is what the message says, without the blanks around it.
        max_tokens: longest action, in tokens.
        context: longest prefix plus action, in tokens; 0 means all that the model has.
        transcript: `inline` for one running assistant text, `chat` for a message per turn in the tokenizer's chat
            template.
        system: system prompt of a chat, "" for none; `{tools}` stands for how the tools are used.
        tool_role: the role under which observations come back in a chat.
        tool_format: `tags` for actions in tags, which the system prompt describes; `json` for tool calls in JSON, which
            the chat template describes.
        thinking: whether the agent thinks in `<think>` before it acts; a chat template gets it as `enable_thinking`.
        backend: what runs the model.
        urls: addresses of the servers of `vllm-server` and `openai`.
        openai: what the backend `openai` is told besides, see `chat_client.OpenAISettings`.
        lora: folder beside the card, or hub id, of a PEFT adapter that is put on the model; "" for none.
        dtype: of the weights; `auto` is what the model was stored in.

    Raises:
        CardError: keys that contradict each other.
    """

    id: str
    description: str
    model: str
    prompt: str = ""
    observation: str = "\n\n{observation}\n\n"
    max_tokens: int = bounded(1, 1_000_000, 512)
    context: int = bounded(0, 100_000_000, 0)
    transcript: Literal["inline", "chat"] = "inline"
    system: str = SYSTEM
    tool_role: Literal["user", "tool"] = "user"
    tool_format: Literal["tags", "json"] = "tags"
    thinking: bool = True
    backend: Literal["transformers", "vllm", "vllm-server", "openai"] = "transformers"
    urls: tuple[str, ...] = ()
    openai: dict[str, object] = field(default_factory=dict)
    lora: str = ""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"

    def __post_init__(self) -> None:
        defaults = {key.name: key.default for key in fields(self)}
        if self.transcript == "inline":
            for key in ("system", "tool_role", "tool_format"):
                if getattr(self, key) != defaults[key]:
                    raise CardError(f'{self.id}: {key} is for chats; set transcript = "chat" or leave {key} out')
        served = self.backend in ("vllm-server", "openai")
        if self.urls and not served:
            raise CardError(f"{self.id}: urls are for the backends vllm-server and openai, not for {self.backend}")
        if self.backend == "vllm-server" and not self.urls:
            raise CardError(f'{self.id}: backend vllm-server needs urls, such as ["http://localhost:8000"]')
        if wrong := [url for url in self.urls if not url.startswith(("http://", "https://"))]:
            raise CardError(f"{self.id}: urls has {wrong[0]!r}; expected addresses that start with http:// or https://")
        if self.openai and self.backend != "openai":
            raise CardError(f"{self.id}: openai is for the backend openai, not for {self.backend}")
        if taken := sorted({"model", "base_url", "tool_mode", "max_tokens", "instruction"} & set(self.openai)):
            raise CardError(
                f"{self.id}: openai.{taken[0]} follows from the card's model, urls, tool_format, max_tokens and system"
            )
        if self.lora and self.backend == "openai":
            raise CardError(f"{self.id}: lora cannot be put on a hosted model; name the adapted model in `model`")


def resolve(name: str) -> tuple[AgentCard, str]:
    """The card, with its adapter where that is, and where its model is.

    Raises:
        CardError: no such card, a malformed one, or one that names a model or adapter outside of its folder; or a model
            folder whose card is of a hosted model: its maker would choose where questions and keys are sent.
    """
    folder = Path(name)
    if name.endswith(".toml") or name in list_cards("agents"):  # a folder of that name is ./name
        path = find_card("agents", name)
    elif folder.is_dir() and not (folder / CARD_FILE).is_file():
        return make_card(AgentCard, {"id": folder.name, "description": "", "model": name}, name), name
    elif folder.is_dir():
        path = folder / CARD_FILE
    else:
        return make_card(AgentCard, {"id": name, "description": "", "model": name}, name), name
    card = load_card("agents", path, AgentCard)
    if path.name == CARD_FILE and card.backend == "openai":
        raise CardError(
            f"{path}: backend is openai, and the card of a model folder is about the model in it; put the card of a "
            "hosted model into a file of another name"
        )
    model, lora = beside(path, "model", card.model), beside(path, "lora", card.lora) if card.lora else None
    return replace(card, lora=str(lora or card.lora)), str(model or card.model)
