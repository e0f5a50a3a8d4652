"""Rollout trees as JSON: numbers that can be worked out by hand, and token texts of real tokenizers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_toys import byte_fallback_tokenizer, tag_tokenizer
from rollout_toys import Sketch, after

from carl_gym.agents.policy import Completion
from carl_gym.envs.pages import load_tokenizer
from carl_gym.tracking.tree_record import NodeRecord, token_texts, tree_record
from carl_gym.training.credited import CreditedTree

TOKENIZERS = {"tags": tag_tokenizer(), "bytes": byte_fallback_tokenizer(), "tiny": load_tokenizer("tiny")}
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts, texts)
def test_token_texts_join_to_the_text(name: str, before: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(f"{before}|{text}", add_special_tokens=False)
    ids = list(getattr(ids, "ids", ids))

    def decode(some):
        return tokenizer.decode(list(some), skip_special_tokens=False)

    for cut in (0, len(ids) // 2):
        pieces = token_texts(decode, ids[cut:], ids[:cut])
        assert len(pieces) == len(ids) - cut
        if cut == 0:
            assert "".join(pieces) == decode(ids)
        else:
            assert decode(ids).endswith("".join(pieces)) or "\N{REPLACEMENT CHARACTER}" in decode(ids[:cut])


def test_a_character_comes_with_its_last_token() -> None:
    ids = tag_tokenizer().encode("é日<think>", add_special_tokens=False)
    assert token_texts(tag_tokenizer().decode, ids) == ["", "é", "", "", "日", "<think>"]


def test_bytes_that_are_no_text_are_kept_as_what_decoding_makes_of_them() -> None:
    ids = tag_tokenizer().encode("日", add_special_tokens=False)[:1] * 30
    assert len("".join(token_texts(tag_tokenizer().decode, ids))) == 30


def forked() -> CreditedTree:
    """root -> 1 (h = 0.5) -> 2 (reward 1) and root -> 3 (h = 1.5, reward 0.2); CARL's credit."""
    sketch = Sketch()
    root = sketch.root()
    first = sketch.edge(root, 0.5, tokens=2)
    sketch.edge(first, 0.25, 1.0, end=True)
    sketch.edge(root, 1.5, 0.2, end=True, trajectory=1)
    return CreditedTree(sketch.tree, np.array([0, 0.4, 0, -0.4]), np.array([False, True, False, True]))


def column(nodes: list[NodeRecord], name: str) -> list[object]:
    return [node[name] for node in nodes]  # type: ignore[literal-required]


def test_a_record_holds_the_numbers_of_its_tree() -> None:
    record = tree_record(forked(), decode=lambda ids: " ".join(map(str, ids)), step=20)
    nodes = record["nodes"]
    assert (record["step"], record["question_id"], record["answers"]) == (20, "q0", ["yes"])
    expected = {
        "parent": [None, 0, 1, 0],
        "lane": [0, 0, 0, 1],
        "kind": ["", "search", "search", "search"],
        "argument": ["", "a1", "a2", "a3"],
        "observation": ["1 2 3", "9", "", ""],
        "length": [3, 6, 7, 4],
        "h": [None, 0.5, 0.25, 1.5],
        "H": [1.0, 0.25, None, None],
        "V": [0.6, 1.0, None, None],
        "R": [None, None, 1.0, 0.2],
        "A": [None, 0.4, 0.0, -0.4],
        "trained": [None, True, False, True],
        "logprobs": [[], [-0.5, -0.5], [-0.25], [-1.5]],
        "end": ["", "", "running", "running"],
    }
    assert {name: column(nodes, name) for name in expected} == expected
    assert json.loads(json.dumps(record)) == record


def test_without_a_decoder_an_action_is_one_piece() -> None:
    nodes = tree_record(forked().tree)["nodes"]
    assert column(nodes, "tokens") == [[], ["go"], ["go"], ["go"]]
    assert column(nodes, "logprobs") == [[], [-1.0], [-0.25], [-1.5]]
    assert column(nodes, "A") == column(nodes, "trained") == [None] * 4
    assert set(column(nodes, "observation")) == {""}


def test_unknown_log_probs_are_left_out() -> None:
    sketch = Sketch()
    root = sketch.root()
    state = after(sketch.tree.nodes[root].state, "x")
    sketch.tree.add_child(root, Completion((1,), (math.nan,), "x", "stop"), state, (), 0.0, True, True, 0)
    nodes = tree_record(sketch.tree)["nodes"]
    assert nodes[1]["logprobs"] == [None] and nodes[1]["h"] is None and nodes[0]["H"] is None
    assert nodes[1]["end"] == "out_of_context"
    json.dumps(nodes, allow_nan=False)
