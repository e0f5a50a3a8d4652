"""Every agent card in agents/ is valid and makes a transcript; keys that contradict each other are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from carl_gym.agents.card import AgentCard, resolve
from carl_gym.agents.chat_transcript import ChatTranscript, make_transcript
from carl_gym.agents.transcript import InlineTranscript
from carl_gym.cards import list_cards, load_card, make_card
from carl_gym.errors import CardError

ROOT = Path(__file__).parents[1]


def tokenizer_of(model: str) -> PreTrainedTokenizerFast:
    """The tiny agent's own; for models on the hub a small one with their template and control tokens."""
    families = {"Qwen/Qwen2.5": "qwen2.5", "Qwen/Qwen3": "qwen3", "meta-llama/Llama-3.2": "llama3.2"}
    if family := next((families[start] for start in families if model.startswith(start)), None):
        return FAMILIES[family]()
    return AutoTokenizer.from_pretrained(ROOT / "agents" / model)


@pytest.mark.parametrize("name", sorted(list_cards("agents")))
def test_every_card_makes_a_transcript(name: str) -> None:
    card, _ = resolve(name)
    assert card.id == name and card.description.endswith(".")
    transcript = make_transcript(card, tokenizer_of(card.model), 1 << 17, name=name)
    assert (transcript.max_tokens, transcript.context) == (card.max_tokens, card.context)
    assert isinstance(transcript, {"inline": InlineTranscript, "chat": ChatTranscript}[card.transcript])


def test_the_example_of_the_documentation_runs() -> None:
    page = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example[1], "docs/agents.md", "exec"), names)
    assert names["tokenizer"].decode(names["prompt"]) == "Question: Who directed Silver Harbor?\n"
    table = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    rest = ["id", "description", "model"]
    assert sorted([*table, *rest]) == sorted(AgentCard.__slots__), "every key has its line"


def test_the_cards_that_there_are() -> None:
    models = {name: load_card("agents", name, AgentCard).model for name in list_cards("agents")}
    assert models == {
        "tiny": "tiny",
        "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
        "qwen3-4b": "Qwen/Qwen3-4B",
        "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    }


def test_a_hub_id_or_a_folder_without_a_card_goes_inline(tmp_path: Path) -> None:
    for name in ("some/model", str(tmp_path)):
        card, source = resolve(name)
        assert (card.transcript, card.prompt, card.backend, card.dtype) == ("inline", "", "transformers", "float32")
        assert source == name


def card(**keys: Any) -> AgentCard:
    return make_card(AgentCard, {"id": "mine", "description": "", "model": "m"} | keys, "mine.toml")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"transcript": "chatty"}, r"mine\.toml: transcript = 'chatty' .* one of 'inline', 'chat'"),
        ({"tool_role": "ipython", "transcript": "chat"}, r"tool_role = 'ipython' .* one of 'user', 'tool'"),
        ({"tool_format": "xml", "transcript": "chat"}, r"tool_format = 'xml' .* one of 'tags', 'json'"),
        ({"thinking": "yes"}, r"thinking = 'yes' .* true or false"),
        ({"backend": "tgi"}, r"backend = 'tgi' .* 'transformers', 'vllm', 'vllm-server', 'openai'"),
        ({"dtype": "float16"}, r"dtype = 'float16' .* 'float32', 'bfloat16', 'auto'"),
        ({"urls": "http://localhost"}, r"urls = 'http://localhost' .* a list"),
        ({"system": "Be brief."}, r'mine: system is for chats; set transcript = "chat" or leave system out'),
        ({"tool_role": "tool"}, r"mine: tool_role is for chats"),
        ({"tool_format": "json"}, r"mine: tool_format is for chats"),
        (
            {"urls": ["http://localhost:8000"]},
            r"mine: urls are for the backends vllm-server and openai, not for transf",
        ),
        ({"backend": "vllm-server"}, r"mine: backend vllm-server needs urls, such as"),
        ({"backend": "openai", "urls": ["localhost:8000"]}, r"mine: urls has 'localhost:8000'; expected .* http://"),
        ({"backend": "openai", "lora": "me/adapter"}, r"mine: lora cannot be put on a hosted model"),
    ],
)
def test_a_key_that_cannot_be_is_named(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(CardError, match=words):
        card(**keys)


def test_keys_of_a_backend() -> None:
    made = card(backend="vllm-server", urls=["http://a:8000", "https://b"], lora="me/adapter", dtype="auto")
    assert (made.urls, made.lora) == (("http://a:8000", "https://b"), "me/adapter")
    assert card(backend="openai").urls == ()
