"""A rollout tree as JSON: what a viewer needs of it, long after its weights, corpus and process are gone.

`tree_record` makes one, `write_records` and `read_records` keep those of a moment of training in a file. A record holds
texts and numbers only; token ids, seeds and environment states stay behind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from carl_gym.algorithms.credit import values
from carl_gym.errors import DataError
from carl_gym.files import write_text
from carl_gym.rollouts.tree import Node, RolloutTree
from carl_gym.tracking.tree_figure import lanes

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, such as `tokenizer.decode`."""

FORMAT = 1
"""Raised whenever the meaning of a record changes."""
CONTEXT = 4
"""Tokens before a token that can change how it is decoded, such as whether a space stands before it."""
LONGEST_CHARACTER = 8
"""Tokens after which bytes that give no character are taken as they are."""


class NodeRecord(TypedDict):
    """A state, and the action that led into it.

    Attributes:
        parent: position of the state before; None at a root. Parents come first.
        lane: row that the trajectory is drawn in, from 0.
        trajectory: number of the trajectory that created the node.
        kind, argument, code: the action as the environment understood it; "" at a root.
        tokens, logprobs: text of every token of the action, and its log-prob (None where it is not known).
        observation: what the model read after the action; the prompt at a root.
        length: tokens of the model's prefix at this state.
        reward: immediate reward of the action.
        h: entropy of the action, in nats per token; None where log-probs are not known, and at roots.
        H: mean of h over the actions sampled here; None where there are none.
        V: return still to come, the mean over children; None where there are none.
        R: return of the trajectory that ends here; None elsewhere.
        A: advantage of the action; None at roots and without credit.
        trained: whether the action is in the update set; None likewise.
        end: "" while it goes on, "answered", "out_of_turns", "out_of_context", or "unfinished".
    """

    parent: int | None
    lane: int
    trajectory: int
    kind: str
    argument: str
    code: str
    tokens: list[str]
    logprobs: list[float | None]
    observation: str
    length: int
    reward: float
    h: float | None
    H: float | None
    V: float | None
    R: float | None
    A: float | None
    trained: bool | None
    end: str


class TreeRecord(TypedDict):
    """A tree of one question at one moment of training.

    Attributes:
        format: `FORMAT` of the writer.
        question_id, question, answers: what was asked, and the gold answers.
        step: training steps before it was rolled out; None outside of training.
        policy_version: of the weights that sampled.
        nodes: parents first.
    """

    format: int
    question_id: str
    question: str
    answers: list[str]
    step: int | None
    policy_version: int
    nodes: list[NodeRecord]


class Credited(Protocol):
    """A tree with what an algorithm made of it, by node id, as `carl_gym.training.credited.CreditedTree`."""

    @property
    def tree(self) -> RolloutTree:
        """The rollouts."""
        ...

    @property
    def advantages(self) -> np.ndarray:
        """A of the edge into each node, shape (nodes,)."""
        ...

    @property
    def selected(self) -> np.ndarray:
        """Whether the edge into each node trains, shape (nodes,)."""
        ...


def tree_record(tree: RolloutTree | Credited, *, decode: Decode | None = None, step: int | None = None) -> TreeRecord:
    """What is kept of a tree.

    Args:
        tree: rollouts, with the advantages and the selection of an algorithm if they have been credited.
        decode: gives token ids their texts. Without it an action is one piece with the log-prob of the whole, and
            observations stay empty, since a tree holds no other text.
        step: of training.
    """
    advantages = selected = None
    if not isinstance(tree, RolloutTree):
        advantages, selected, tree = tree.advantages, tree.selected, tree.tree
    rows, value = lanes(tree), values(tree)
    nodes: list[NodeRecord] = []
    for node in tree.nodes:
        has_edge, inner, before = node.parent is not None, bool(node.children), _tokens_before(tree, node)
        tokens, logprobs = _pieces(node, decode, before)
        kind, argument, code = node.state.turns[-1].action if has_edge and node.state.turns else ("", "", "")
        nodes.append(
            NodeRecord(
                parent=node.parent,
                lane=rows[node.trajectory],
                trajectory=node.trajectory,
                kind=kind,
                argument=argument,
                code=code,
                tokens=tokens,
                logprobs=logprobs,
                observation=decode(node.observation_tokens) if decode and node.observation_tokens else "",
                length=tree.prefix_length(node.id),
                reward=float(node.reward),
                h=_number(tree.h(node.id)) if has_edge else None,
                H=_number(tree.H(node.id)) if inner else None,
                V=_number(value[node.id]) if inner else None,
                R=None if inner else _number(tree.trajectory_return(node.id)),
                A=None if advantages is None or not has_edge else _number(advantages[node.id]),
                trained=None if selected is None or not has_edge else bool(selected[node.id]),
                end="" if inner else _end(node),
            )
        )
    question = tree.question
    return TreeRecord(
        format=FORMAT,
        question_id=question.id,
        question=question.text,
        answers=list(question.answers),
        step=step,
        policy_version=tree.policy_version,
        nodes=nodes,
    )


def token_texts(decode: Decode, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text of each token, such that all of them joined are the text of all.

    A character whose bytes lie in several tokens comes with the last of them; the others have "".

    Args:
        decode: of the tokenizer.
        ids: the tokens.
        before: some of the tokens before them; whether a token is decoded with a space can depend on these.
    """
    whole, texts = [*before, *ids], []
    start, read = 0, len(before)  # decoded so far: what lies before `read`, compared from `start` on
    for end in range(read + 1, len(whole) + 1):
        old, new = decode(whole[start:read]), decode(whole[start:end])
        if new.endswith("\N{REPLACEMENT CHARACTER}") and end - read < LONGEST_CHARACTER and end < len(whole):
            texts.append("")
            continue
        texts.append(new[len(old) :])
        start, read = read, end
    return texts


def write_records(path: Path, records: Sequence[TreeRecord]) -> None:
    """Write records as a JSON file, whole or not at all; a lone surrogate becomes a question mark."""
    text = json.dumps(records, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.encode(errors="replace").decode() + "\n")


def read_records(path: Path) -> list[TreeRecord]:
    """Read what `write_records` wrote, by whomever.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        for record in records:
            _check(record)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: no rollout trees of this version of carl_gym ({error!r}); delete the file, or make the page with "
            "the version that trained"
        ) from error
    return list(records)


def _check(record: Any) -> None:
    """Raises ValueError, KeyError or TypeError on what is no record."""
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}, not {FORMAT}")
    texts = (record["question_id"], record["question"], *record["answers"])
    _require(all(isinstance(text, str) for text in texts), "a question that is no text")
    _require(isinstance(record["policy_version"], int), "a policy version that is no integer")
    _require(record["step"] is None or isinstance(record["step"], int), "a step that is no integer")
    _require(bool(record["nodes"]), "a tree without nodes")
    for number, node in enumerate(record["nodes"]):
        _require(set(node) == set(NodeRecord.__annotations__), f"node {number} has other keys")
        texts = (*node["tokens"], *(node[name] for name in ("kind", "argument", "code", "observation", "end")))
        _require(all(isinstance(text, str) for text in texts), f"a text of node {number} is none")
        numbers = [node[name] for name in ("lane", "trajectory", "length", "reward")]
        numbers += [v for v in (*node["logprobs"], *(node[name] for name in "hHVRA")) if v is not None]
        _require(all(isinstance(v, int | float) and math.isfinite(v) for v in numbers), f"a number of node {number}")
        _require(len(node["tokens"]) == len(node["logprobs"]), f"node {number} lacks tokens or log-probs")
        _require(isinstance(node["trained"], bool | None), f"node {number} is neither trained nor dropped")
        parent = node["parent"]
        _require(parent is None or (isinstance(parent, int) and 0 <= parent < number), f"parent of node {number}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _tokens_before(tree: RolloutTree, node: Node) -> Sequence[int]:
    """What the action into a node follows, at its end."""
    return () if node.parent is None else tree.nodes[node.parent].observation_tokens[-CONTEXT:]


def _pieces(node: Node, decode: Decode | None, before: Sequence[int]) -> tuple[list[str], list[float | None]]:
    if node.action is None:
        return [], []
    if decode is None:
        return [node.action.text], [_number(sum(node.action.logprobs), 3)]
    return token_texts(decode, node.action.token_ids, before), [_number(p, 3) for p in node.action.logprobs]


def _number(value: float, digits: int = 4) -> float | None:
    """Rounded, with one zero; None for NaN, for which JSON has nothing."""
    return round(float(value), digits) + 0.0 if math.isfinite(value) else None


def _end(node: Node) -> str:
    if node.truncated:
        return "out_of_context"
    return node.state.status if node.terminal else "unfinished"
