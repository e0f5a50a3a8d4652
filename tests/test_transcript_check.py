"""What the check at start-up accepts and what it refuses, and that the collector's episodes are what it proved."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML, FAMILIES, chat_tokenizer
from model_toys import byte_fallback_tokenizer, tag_tokenizer
from tokenizers import decoders, normalizers
from transformers import AddedToken, PreTrainedTokenizerFast

from carl_gym.agents.card import AgentCard
from carl_gym.agents.chat_transcript import ChatTranscript, make_transcript
from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.agents.transcript import InlineTranscript
from carl_gym.agents.transcript_check import check_transcript
from carl_gym.envs.registration import make_task
from carl_gym.errors import PolicyError
from carl_gym.rollouts import EntropyForking, collect


def make(tokenizer: PreTrainedTokenizerFast, **keys: Any) -> ChatTranscript | InlineTranscript:
    card = AgentCard("test", "for tests", ".", **{"transcript": "chat"} | keys)
    return make_transcript(card, tokenizer, 4096, name="mine")


def notes(tokenizer: PreTrainedTokenizerFast, **keys: Any) -> tuple[str, ...]:
    """What the check accepts as different."""
    return check_transcript(make(tokenizer, **keys), tokenizer, "mine")


# Accepted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_form_that_its_template_has(family: str) -> None:
    """All but Qwen3, which takes thinking out of earlier turns, write the whole conversation as it ran."""
    tokenizer = FAMILIES[family]()
    forms = itertools.product(("user", "tool"), ("tags", "json"), (True, False), ({}, {"system": ""}))
    for tool_role, tool_format, thinking, system in forms:
        if family == "chatml" and tool_format == "json":
            continue
        found = notes(tokenizer, tool_role=tool_role, tool_format=tool_format, thinking=thinking, **system)
        # Qwen3 keeps thoughts since the last user message: with the role `tool`, all of them.
        drops = family == "qwen3" and tool_role == "user"
        assert len(found) == (2 if drops else 0), (found, tool_role, tool_format, thinking)


def test_what_qwen3_would_leave_out_is_said() -> None:
    first, second = notes(FAMILIES["qwen3"]())
    assert first == (
        "turn 1: the running text keeps '<think>\\nI look it up.\\n</think>\\n\\n' where the template writes ''"
    )
    assert second.startswith("turn 2: ")
    (first, _) = notes(FAMILIES["qwen3"](), thinking=False)
    assert "'<think>\\n\\n</think>\\n\\n' where the template writes ''" in first


R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|A|>{{ m.content.split('</think>')[-1] }}"
    "<|E|>{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)
"""In the manner of DeepSeek-R1's distilled models: the prompt opens the thought, which is gone in the next turn."""


def test_a_thought_that_the_prompt_opens() -> None:
    tokenizer = chat_tokenizer(R1, ("<|B|>", "<|U|>", "<|A|>", "<|E|>"), bos="<|B|>", eos="<|E|>")
    chat = make(tokenizer, system="", thinking=False)
    assert tokenizer.decode(chat.prompt("Who?")) == "<|B|><|U|>Who?<|A|><think>\n"
    assert tokenizer.decode(chat.observation("x", ())) == "<|E|><|U|>x<|A|><think>\n"
    first, _ = check_transcript(chat, tokenizer, "mine")
    assert "keeps '<think>\\n\\nI look it up.\\n</think>\\n\\n' where the template writes '\\n\\n'" in first


REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_thinking_that_a_template_takes_apart_from_the_content() -> None:
    """Newer templates do not look for `<think>` in contents but want `reasoning_content`."""
    assert notes(chat_tokenizer(REASONING)) == ()


@pytest.mark.parametrize("tokenizer", [tag_tokenizer(), byte_fallback_tokenizer()], ids=["tags", "bytes"])
def test_an_inline_transcript_of_any_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert notes(tokenizer, transcript="inline", prompt="Question: {observation}\n") == ()


def test_an_inline_transcript_where_the_tokenizer_puts_a_space_before_every_text() -> None:
    """As Llama 2's does; the agent sees the space, and nothing depends on it."""
    tokenizer = byte_fallback_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inline = make(tokenizer, transcript="inline", prompt="Q: {observation}\n", observation="\n{observation}\n")
    assert tokenizer.convert_ids_to_tokens(inline.observation("x", ())) == ["▁", "<0x0A>", "<0x78>", "<0x0A>"]
    assert check_transcript(inline, tokenizer, "mine") == ()


# Refused


def message(role: str, content: str = "{{ m.content }}") -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def loop(body: str, over: str = "messages") -> str:
    begin = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return f"{{% for m in {over} %}}{body}{{% endfor %}}{begin}"


ALTERNATING = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PLAIN = message("{{ m.role }}")


@pytest.mark.parametrize(
    ("template", "keys", "words"),
    [
        (
            ALTERNATING + loop(PLAIN),
            {"tool_role": "tool"},
            r'the roles system, user, assistant, tool: Only user and .* supported!; set tool_role = "user"',
        ),
        (
            loop("{% if m.role != 'tool' %}" + PLAIN + "{% endif %}"),
            {"tool_role": "tool"},
            r"does not write all of what a message of the role 'tool' says; set tool_role = \"user\"",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            + loop(PLAIN),
            {},
            r'roles system, user: System role not supported; leave .* \(system = ""\) and say in `prompt`',
        ),
        (
            loop("{% if m.role != 'system' %}" + PLAIN + "{% endif %}"),
            {},
            r'does not write the system prompt; leave .* \(system = ""\)',
        ),
        (loop(PLAIN), {"tool_format": "json"}, r'describes no tools; set tool_format = "tags"'),
        (
            "{% if tools %}{{ tools | tojson }}{% endif %}"
            + loop(
                "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
                + message("assistant", "<tool_call><function={{ f.name }}>{{ f.arguments.query }}</tool_call>")
                + "{% else %}" + PLAIN + "{% endif %}"
            ),
            {"tool_format": "json"},
            r"form that the environment does not read, such as '<tool_call><function=search>.*tool_format = \"tags\"",
        ),
        (loop(message("{{ m.role }}", "{{ m.content | striptags }}")), {}, r"not write all .* the role 'user' says"),
        (loop(message("{{ m.role }}", "{{ m.content[:20] }}")), {}, r"not write all .* the role 'user' says"),
        (loop(message("{{ m.role }}", "{{ m.content | upper }}")), {}, r"not write all .* the role 'user' says"),
        (loop(PLAIN, "messages[-2:]"), {"system": ""}, r"in turn 0: '.*Who wrote.* in the running text"),
        (
            loop(PLAIN + "{% if loop.first and not loop.last %}(This chat goes on.)\n{% endif %}"),
            {"system": ""},
            r"First difference, in turn 0: .*in the running text, '.*This chat goes on",
        ),
        (
            loop("{% if loop.last %}[{{ messages | length }}]{% endif %}" + PLAIN),
            {"system": ""},
            r"First difference, in turn 0: '\[1\]<\|im_start\|>",
        ),
        (
            loop("{% if m.role != 'assistant' or loop.index > messages | length - 2 %}" + PLAIN + "{% endif %}"),
            {},
            r"First difference, in turn 0: '.*assistant.* in the running text, '.*user.*Emma",
        ),
        (
            loop(message("{{ m.role }}", "{{ ' ' if m.role == 'assistant' }}{{ m.content }}")),
            {"thinking": False},
            r"First difference, in turn 1: '<search>Emma.*' in the running text, ' <search>Emma",
        ),
        (
            loop(PLAIN, "messages | sort(attribute='role', reverse=true)"),
            {"system": ""},
            r"does not write what the agent said",
        ),
        (
            loop("{% if not loop.first and m.role == 'user' and messages | length > 4 %}[again]{% endif %}" + PLAIN),
            {"system": ""},
            r"First difference, in turn 1: .*\[again\]",
        ),
        (
            loop(PLAIN) + "{% if messages | length > 4 %}I go on: {% endif %}",
            {"system": ""},
            r"First difference, in turn 3: '' in the running text, 'I go on",
        ),
        (
            loop("{% if m.role == 'assistant' %}ASSISTANT{% else %}" + PLAIN + "{% endif %}"),
            {},
            r'does not write what the agent said; set transcript = "inline"',
        ),
        (
            loop("{{ m.role }}: {{ m.content }}\n\n"),
            {},
            r"goes on after a turn with '\\n\\nuser: ', which does not begin with a token",
        ),
        (
            "{% for m in messages %}{{ 'a' + 1 }}{% endfor %}",
            {},
            r"the chat template fails on messages of the roles user: .*; set transcript",
        ),
    ],
    ids=[
        "raises on role tool", "ignores role tool", "raises on system", "ignores system", "no tools", "calls in XML",
        "strips tags", "shortens", "changes the case", "drops earlier turns", "says more in the first turn later",
        "counts messages", "drops earlier answers", "blank before past answers", "re-orders", "changes the second turn",
        "begins later answers", "ignores the agent", "no end of turn", "breaks",
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_trained_on_is_refused(template: str, keys: Mapping[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=rf"(?s)agent 'mine': .*{words}"):
        make(chat_tokenizer(template), **keys)


def test_a_difference_in_the_thinking_alone_does_not_hide_others() -> None:
    """A template that drops thinking and the blank line before the next turn with it."""
    body = "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    end = "{{ '' if m.role == 'assistant' and not loop.last and loop.index < messages | length - 1 else '\n' }}"
    with pytest.raises(PolicyError, match=r"First difference, in turn 1"):
        make(chat_tokenizer(loop("<|im_start|>{{ m.role }}\n" + body + "<|im_end|>" + end)))


def test_templates_of_many_models_work_or_are_refused_with_a_remedy() -> None:
    """TRL carries copies of the templates of some forty models; some of them are made for pictures or channels."""
    spec = importlib.util.find_spec("trl")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders for path in sorted(Path(folder).glob("chat_templates/*.jinja"))]
    if not paths:
        pytest.skip("TRL is not installed, or carries no templates")
    worked = set()
    for path in paths:
        template = path.read_text(encoding="utf-8")
        marks = set(re.findall(r"<[^<>\s'\"{}]+>", template)) - {"<tools>", "</tools>"}
        tokenizer = chat_tokenizer(template, ("</s>", "<bos>"), sorted(marks), eos="</s>", bos="<bos>")
        for role, form, system in itertools.product(("user", "tool"), ("tags", "json"), ({}, {"system": ""})):
            try:
                make(tokenizer, tool_role=role, tool_format=form, **system)
                worked.add(path.stem)
            except PolicyError as error:
                assert re.search(r"(?i)set (tool|transcript)|leave the system prompt", str(error)), path.name
    assert worked >= {"qwen2_5", "qwen3", "llama3_2", "deepseek_r1_distill", "gemma"}


def test_without_a_chat_template_nothing_says_how_a_chat_looks() -> None:
    for transcript in ("chat", "inline"):
        with pytest.raises(PolicyError, match=r"agent 'mine': its tokenizer has no chat template .*agent\.toml"):
            make(tag_tokenizer(), transcript=transcript)


def test_a_template_of_another_tokenizer_is_refused() -> None:
    tokenizer = tag_tokenizer()
    tokenizer.chat_template = CHATML
    with pytest.raises(PolicyError, match=r"'<\|im_end\|>.*may not belong together"):
        make(tokenizer)


def test_a_tokenizer_that_loses_characters_is_refused() -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(PolicyError, match=r"agent 'mine': the tokenizer reads 'Who.* and gives back 'who"):
        make(tokenizer)


def test_a_tokenizer_that_lets_texts_forge_control_tokens_is_refused() -> None:
    """Where characters of no width are dropped before control tokens are looked for, nothing can break one up."""
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.add_tokens([AddedToken("[INST]", normalized=True)])
    with pytest.raises(PolicyError, match=r"agent 'mine': a text that spells '\[INST\]' becomes that control token"):
        make(tokenizer)


# What it proves holds in trees


class Player:
    """A policy that draws one of a few actions, as token ids: cut at a stop string, ended, cut in the middle."""

    version = 0

    def __init__(self, chat: ChatTranscript) -> None:
        def ids(text: str) -> tuple[int, ...]:
            return tuple(chat.tokenizer.encode(text, add_special_tokens=False))

        search = "<think>\nHm.\n</think>\n\n<search>film</search>"
        self.actions = [
            Completion(ids(search), (-1.0,) * len(ids(search)), search, "stop"),
            Completion((*ids(search), chat.end_of_turn), (-1.0,) * (len(ids(search)) + 1), search, "eos"),
            Completion(ids("<search>fi"), (-1.0,) * len(ids("<search>fi")), "<search>fi", "length"),
        ]

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        return [random.Random(request.seed).choice(self.actions) for request in requests]

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        raise NotImplementedError

    def sync(self, weights: Mapping[str, object] | None = None) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("family", FAMILIES)
def test_in_trees_prefixes_grow_and_turns_alternate(family: str) -> None:
    """A prefix is the one before it, the very tokens that were sampled, and the observation; every turn ends once."""
    tokenizer = FAMILIES[family]()
    card = AgentCard("test", "for tests", ".", transcript="chat", tool_role="tool")
    chat = make_transcript(card, tokenizer, 1 << 20, name="mine")
    assert isinstance(chat, ChatTranscript)
    task = make_task("carl/MiniWiki-v0", questions=3)
    trees = collect(task, Player(chat), chat, list(task.questions.values()), EntropyForking(2, 4), seed=0, step=0)
    seen = set()
    for tree in trees:
        for node in tree.nodes:
            if node.parent is None:
                ends = tree.prefix(node.id).count(chat.end_of_turn)
                continue
            before, now, action = tree.prefix(node.parent), tree.prefix(node.id), node.action.token_ids
            assert now[: len(before) + len(action)] == (*before, *action)
            if node.terminal:
                continue
            seen.add(node.action.finish_reason)
            rest = now[len(before) + len(action) :]
            assert rest == chat.observation(task.observation(node.state), action)
            assert now.count(chat.end_of_turn) == ends + 2 * node.depth, "one for every action and every observation"
            assert tokenizer.decode(rest).count("<information>") == 1
    assert seen == {"stop", "eos", "length"}
