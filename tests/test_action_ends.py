"""Where the transformers policy ends an action: closing tags in any tokenization, end of sequence, length."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from model_toys import byte_fallback_tokenizer, chain_model, spell, tag_tokenizer
from transformers import PreTrainedTokenizerFast

from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.agents.transformers_policy import TransformersPolicy
from carl_gym.envs.protocol import STOP_STRINGS

TAGS = tag_tokenizer()
BYTES = byte_fallback_tokenizer()


def complete(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, max_tokens: int = 30, eos: list[int] | None = None
) -> Completion:
    """What the policy makes of a model that goes on from `ids[0]` with the rest of them."""
    model = chain_model(len(tokenizer), spell(ids))
    if eos:
        model.generation_config.eos_token_id = eos
    policy = TransformersPolicy(model, tokenizer, STOP_STRINGS)
    return policy.sample([SampleRequest([ids[0]], 0, max_tokens=max_tokens)])[0]


def test_a_closing_tag_that_is_one_token_ends_the_action() -> None:
    ids = TAGS.encode("Q<search>xyz</search>w")
    completion = complete(TAGS, ids)
    assert completion.text == "<search>xyz</search>"
    assert completion.token_ids == tuple(ids[1:-1])
    assert completion.finish_reason == "stop"
    assert completion.logprobs == pytest.approx([0.0] * 5, abs=1e-5)


@pytest.mark.parametrize("tag", ["</search>", "</answer>"])
def test_a_closing_tag_of_many_tokens_ends_the_action(tag: str) -> None:
    ids = BYTES.encode(f"Q{tag}Z")
    assert len(ids) == len(tag) + 2, "a token for each byte"
    completion = complete(BYTES, ids)
    assert (completion.text, completion.finish_reason) == (tag, "stop")
    assert completion.token_ids == tuple(ids[1:-1])


def test_a_closing_tag_inside_a_longer_token_ends_the_action() -> None:
    """Large vocabularies have tokens such as `>.`; the action keeps the token that was sampled."""
    ids = [*BYTES.encode("Q</search"), BYTES.convert_tokens_to_ids(">."), *BYTES.encode("w")]
    completion = complete(BYTES, ids)
    assert (completion.text, completion.finish_reason) == ("</search>.", "stop")


@pytest.mark.parametrize("tokenizer", [TAGS, BYTES], ids=["tags", "bytes"])
def test_other_tags_do_not_end_the_action(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("Q</think>")
    following = spell(ids) | {ids[-1]: {ids[-1]: 1.0}}
    policy = TransformersPolicy(chain_model(len(tokenizer), following), tokenizer, STOP_STRINGS)
    (completion,) = policy.sample([SampleRequest([ids[0]], 0, max_tokens=20)])
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == len(completion.logprobs) == 20


@pytest.mark.parametrize("tokenizer", [TAGS, BYTES], ids=["tags", "bytes"])
def test_the_end_of_sequence_ends_the_action_and_is_not_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer.encode("Qxyz"), tokenizer.eos_token_id]
    completion = complete(tokenizer, ids)
    assert (completion.text, completion.finish_reason) == ("xyz", "eos")
    assert completion.token_ids == tuple(ids[1:])
    assert len(completion.logprobs) == 4


def test_every_end_of_sequence_of_the_generation_config_counts() -> None:
    """Chat models have several: the end of a turn and the end of a text."""
    ids = TAGS.encode("Qxyzw")
    for eos in ([ids[2], ids[4]], [ids[4], ids[2]]):
        assert complete(TAGS, ids, eos=eos).text == "x"
    assert complete(TAGS, [*ids[:2], TAGS.eos_token_id], eos=[ids[2]]).finish_reason == "eos"


def test_an_action_of_nothing_is_empty_text() -> None:
    completion = complete(TAGS, [*TAGS.encode("Q"), TAGS.eos_token_id])
    assert (completion.text, completion.finish_reason) == ("", "eos")


def test_an_action_is_cut_at_its_longest_length() -> None:
    ids = TAGS.encode("Qé")
    completion = complete(TAGS, ids, max_tokens=1)
    assert completion.finish_reason == "length"
    assert completion.token_ids == tuple(ids[1:2])
    assert completion.text == "\ufffd"  # half a character


def test_requests_end_each_on_their_own() -> None:
    """In one batch: a stop, an end of sequence, and three different lengths."""
    a, b, c, d = TAGS.encode("abcd")
    stop = TAGS.convert_tokens_to_ids("</answer>")
    following = {a: {stop: 1.0}, b: {TAGS.eos_token_id: 1.0}, c: {d: 1.0}, d: {c: 1.0}}
    policy = TransformersPolicy(chain_model(len(TAGS), following), TAGS, STOP_STRINGS)
    prefixes, lengths = ([c], [a], [c, c], [b], [d]), (5, 9, 1, 9, 17)
    completions = policy.sample([SampleRequest(p, 0, max_tokens=n) for p, n in zip(prefixes, lengths, strict=True)])
    assert [done.finish_reason for done in completions] == ["length", "stop", "length", "eos", "length"]
    assert [done.text for done in completions] == ["dcdcd", "</answer>", "d", "", "cdcdcdcdcdcdcdcdc"]


def test_ids_without_a_token_can_be_sampled() -> None:
    """A model's vocabulary is often larger than its tokenizer's."""
    beyond = len(TAGS) + 1
    model = chain_model(len(TAGS) + 4, {5: {beyond: 1.0}, beyond: {beyond: 1.0}})
    (completion,) = TransformersPolicy(model, TAGS, STOP_STRINGS).sample([SampleRequest([5], 0, max_tokens=3)])
    assert completion.token_ids == (beyond,) * 3
