"""How likely an agent finds the gold answer in every state of finished trees: what IGPO's reward is made of.

    tree.scores["answer_logprob"][node] = max over ways to write the answer of 1/|y| sum_j log pi(y_j | state, y_<j)

y are the tokens of the answer itself. The tags (or the JSON) around it are how the agent is asked: what stands before
the answer is given, what comes after is not looked at. All states go through the model together, and what they begin
with goes through it once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from carl_gym.agents.agent import Agent
from carl_gym.agents.logprob_model import LogprobModel, evaluation_mode
from carl_gym.agents.tree_attention import tree_attention
from carl_gym.algorithms.credit import FloatArray
from carl_gym.envs.protocol import function_schemas, parse
from carl_gym.envs.state import ParsedAction, Question
from carl_gym.errors import ConfigError
from carl_gym.rollouts.tree import RolloutTree
from carl_gym.training.config import Packing
from carl_gym.training.packing import packs, padded
from carl_gym.training.segments import Row

ENOUGH = "Now there's enough information to answer\n</think>\n"
"""How a thought that the chat template opened is closed before the answer (the words are those of IGPO's code)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A way to write a gold answer as an action, up to the end of the answer itself.

    Attributes:
        tokens: ids.
        start: the first token of the answer; those before it are given.
    """

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class AnswerEncoder:
    """Gold answers as actions of an agent, each encoded on its own by its tokenizer.

    Attributes:
        tokenizer: of the agent.
        heads: what may come before the answer.
        tail: what comes after it.
        write: the answer as it is written between them.
    """

    tokenizer: PreTrainedTokenizerBase
    heads: tuple[str, ...] = ("<answer>", "<answer> ")
    tail: str = "</answer>"
    write: Callable[[str], str] = str

    def __call__(self, question: Question) -> list[Answer]:
        """Every way to write every gold answer of a question; those that no action can hold are left out.

        Raises:
            ConfigError: there is none.
        """
        found = []
        for answer in question.answers:
            text = " ".join(answer.split())
            for head in self.heads:
                action = head + self.write(text) + self.tail
                if parse(action) == ParsedAction("answer", text):
                    found.append(self._encode(action, len(head), len(action) - len(self.tail)))
        if not found:
            raise ConfigError(
                f"question {question.id!r} has no gold answer that an action can hold (its answers: "
                f"{list(question.answers)!r}); leave the question out, or choose an algorithm that needs none"
            )
        return found

    def _encode(self, action: str, start: int, stop: int) -> Answer:
        """The tokens of `action[:stop]`, and which of them are of `action[start:stop]`: all that overlap it."""
        encoded = self.tokenizer(action, add_special_tokens=False, return_offsets_mapping=True)
        of_answer = [i for i, (low, high) in enumerate(encoded["offset_mapping"]) if low < stop and high > start]
        return Answer(tuple(encoded["input_ids"][: of_answer[-1] + 1]), of_answer[0])


def answer_encoder(agent: Agent) -> AnswerEncoder:
    """How an agent writes answers: in tags, with and without a blank before the answer, or as a tool call in JSON.

    Raises:
        ConfigError: it cannot be told.
    """
    card, tokenizer = agent.card, agent.tokenizer
    where = f"agent {card.id!r}: how likely it finds a gold answer cannot be measured:"
    if tokenizer is None:
        raise ConfigError(f"{where} its model is hosted; train a model that runs here")
    if not tokenizer.is_fast:
        raise ConfigError(f"{where} its tokenizer does not tell where tokens stand in the text; use a fast tokenizer")
    opening = str(getattr(agent.transcript, "opening", ""))
    before = ENOUGH if opening.rfind("<think>") > opening.rfind("</think>") else ""
    if card.tool_format == "tags":
        return AnswerEncoder(tokenizer, (f"{before}<answer>", f"{before}<answer> "))
    if "<tool_call>" not in str(tokenizer.get_chat_template(tools=function_schemas())):
        raise ConfigError(
            f'{where} its chat template does not write tool calls inside <tool_call>; set tool_format = "tags"'
        )
    head = before + '<tool_call>\n{"name": "answer", "arguments": {"answer": "'
    return AnswerEncoder(tokenizer, (head,), '"}}\n</tool_call>', _json_text)


def _json_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def answer_logprobs(
    model: PreTrainedModel,
    encode: Callable[[Question], list[Answer]],
    trees: Sequence[RolloutTree],
    *,
    context: int,
    batch_tokens: int,
    packing: Packing = "tree",
    temperature: float = 1.0,
) -> None:
    """Write `scores["answer_logprob"]` into finished trees: by node id, NaN at terminal nodes.

    A state whose prefix leaves no room for the longest way to write the answer gets the score of the state before:
    what could not be measured counts as no gain.

    Args:
        model: with the weights that sampled; runs without gradient and dropout, under the caller's autocast if any.
        encode: the ways to write a question's gold answers (`answer_encoder`).
        trees: complete.
        context: longest prefix plus answer, in tokens.
        batch_tokens: most tokens that go through the model at once.
        packing: as `Learner`'s.
        temperature: logits are divided by it, as the sampler did.

    Raises:
        ConfigError: a question has no gold answer that an action can hold, or no room for it after its prompt.
        PolicyError: trees do not suit the model.
    """
    answers = [encode(tree.question) for tree in trees]
    asked: list[tuple[int, int]] = []  # tree and node of every row
    rows: list[Row] = []
    for number, (tree, ways) in enumerate(zip(trees, answers, strict=True)):
        longest = max(len(answer.tokens) for answer in ways)
        for node in tree.nodes:
            room = context - tree.prefix_length(node.id)
            if node.parent is None:
                require_room(tree.question, ways, tree.prefix_length(node.id), context)
            if node.terminal or room < longest:
                continue
            prefix = tree.prefix(node.id)
            for answer in ways:
                rows.append(_row(prefix, answer, len(asked)))
                asked.append((number, node.id))
    means = _means(model, rows, batch_tokens, packing, temperature)
    for tree in trees:
        tree.scores["answer_logprob"] = np.full(len(tree.nodes), -np.inf)
    for (number, node_id), mean in zip(asked, means, strict=True):
        scores = trees[number].scores["answer_logprob"]
        scores[node_id] = max(scores[node_id], mean)
    for tree in trees:
        _complete(tree)


def require_room(question: Question, ways: Sequence[Answer], prompt: int, context: int) -> None:
    """Raises ConfigError where a prompt of `prompt` tokens leaves no room for the longest way to write the answer."""
    longest, room = max(len(answer.tokens) for answer in ways), context - prompt
    if room < longest:
        raise ConfigError(
            f"the gold answer of question {question.id!r} has {longest} tokens, and its prompt leaves room for {room} "
            f"in a context of {context}; use a longer context or drop the question"
        )


def _complete(tree: RolloutTree) -> None:
    """Nothing can be answered at an end; where there was no room, nothing was gained."""
    scores = tree.scores["answer_logprob"]
    for node in tree.nodes:  # parents come first
        if node.terminal:
            scores[node.id] = np.nan
        elif node.parent is not None and np.isneginf(scores[node.id]):
            scores[node.id] = scores[node.parent]


def _row(prefix: tuple[int, ...], answer: Answer, number: int) -> Row:
    """The row of an answer; `advantages`, which travel along unread, say the number of the row for each token."""
    tokens = np.array([*prefix, *answer.tokens], dtype=np.int64)
    positions = np.arange(len(prefix) + answer.start, len(tokens))
    unused = np.zeros(len(positions), dtype=np.float32)
    return Row(tokens, positions, unused, np.full(len(positions), number, dtype=np.int64), unused)


def _means(
    model: PreTrainedModel, rows: Sequence[Row], batch_tokens: int, packing: Packing, temperature: float
) -> FloatArray:
    """Mean log-prob of each row's asked tokens."""
    total, counts = np.zeros(len(rows)), np.zeros(len(rows))
    scorer, as_tree = LogprobModel(model), packing == "tree"
    batches = packs(rows, batch_tokens) if as_tree else padded(rows, batch_tokens)
    with torch.no_grad(), evaluation_mode(model), tree_attention(model) if as_tree else nullcontext():
        for batch in batches:
            ids, index, columns, targets, *_ = batch.tensors(model.device)
            logprobs, _ = scorer(ids, index, columns, temperature, targets=targets, tree=batch.tree)
            np.add.at(total, batch.advantages, logprobs.cpu().numpy().astype(np.float64))
            np.add.at(counts, batch.advantages, 1)
    return total / counts
