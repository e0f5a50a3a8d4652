"""The arithmetic of plans against numbers worked out by hand, and against what torch keeps and counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from carl_gym.agents.card import resolve
from carl_gym.agents.logprob_model import CHUNK
from carl_gym.cards import list_cards
from carl_gym.errors import ConfigError
from carl_gym.training.config import TrainConfig
from carl_gym.training.plan import (
    LOGITS,
    SHAPES,
    Hardware,
    ModelShape,
    Workload,
    activation_bytes,
    block_bytes,
    decode_seconds,
    duration,
    gathered_bytes,
    kv_bytes,
    learner_memory,
    plan,
    prefill_tokens,
    server_memory,
    step_work,
    update_flops,
    update_tokens,
    wiki18,
)
from scripts.plan_run import main

SHAPE = ModelShape(
    parameters=1_000_000_000, layers=10, hidden=1000, kv_heads=4, vocabulary=50_000, heads=8, head_dim=125,
    intermediate=4000,
)  # fmt: skip
WORK = Workload(
    questions=2, initial=2, forks=4, turns=4, prompt_tokens=100, action_tokens=10, observation_tokens=30, context=800,
    batch_tokens=1000, steps=36, search_seconds=0.5,
)  # fmt: skip
HARDWARE = Hardware(
    gpus=2, server_gpus=2, memory=10, tflops=10, bandwidth=100, utilisation=0.5, decode_utilisation=0.5,
    server_memory=0.5, disk=2,
)  # fmt: skip


def values(figures) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures}


# -- memory ----------------------------------------------------------------------------------------


def test_bytes_of_a_block_a_token_and_what_is_gathered():
    assert block_bytes(SHAPE) == 26 * 1000 + 4 * 1000 + 4 * 500 + 8 * 4000 == 64_000
    assert kv_bytes(SHAPE) == 2 * 10 * 4 * 125 * 2 == 20_000
    assert activation_bytes(SHAPE, 1000, checkpointing=False) == 640_000_000
    assert activation_bytes(SHAPE, 1000, checkpointing=True) == 1000 * (10 * 4 * 1000 + 64_000) == 104_000_000
    # Embedding and head have 50 million parameters each, a block 90 million.
    assert gathered_bytes(SHAPE) == 8 * 100_000_000 + 10 * 90_000_000
    assert gathered_bytes(dataclasses.replace(SHAPE, tied=True)) == 8 * 50_000_000 + 10 * 95_000_000


def test_peaks_of_the_learner():
    found = values(learner_memory(SHAPE, WORK, HARDWARE))
    assert found["weights, gradients, AdamW"] == 16
    assert found["DDP: buckets"] == 4
    assert found["log-probs"] == pytest.approx(24 * (1 << 24) / 1e9)
    # 2 copies + 0.64 activations + 0.403 log-probs are less than the 4 of AdamW's temporaries.
    assert found["DDP, not checkpointed: peak"] == found["DDP, checkpointed: peak"] == 24
    # Sharded over two: 8 of states, and more for a pass, with the 1.7 that are unsharded, than the 2 of temporaries.
    assert found["FSDP2, checkpointed: peak"] == pytest.approx(8 + 1.7 + 0.104 + 0.402653184)
    assert found["FSDP2, not checkpointed: peak"] == pytest.approx(8 + 1.7 + 0.64 + 0.402653184)
    alone = values(learner_memory(SHAPE, WORK, dataclasses.replace(HARDWARE, gpus=1)))
    assert alone["DDP: buckets"] == 0 and alone["DDP, checkpointed: peak"] == 20


def test_a_row_of_full_context_makes_a_larger_micro_batch():
    found = values(learner_memory(SHAPE, dataclasses.replace(WORK, context=3000), HARDWARE))
    assert found["tokens of a micro-batch"] == 3000
    assert found["activations"] == pytest.approx(3 * 0.64)


@pytest.mark.parametrize(("memory", "verdict"), [(24.1, "fits into 24.1 GB"), (23.9, "DOES NOT FIT into 23.9 GB")])
def test_a_peak_says_whether_it_fits(memory, verdict):
    figures = learner_memory(SHAPE, WORK, dataclasses.replace(HARDWARE, memory=memory))
    assert next(f.source for f in figures if f.name == "DDP, checkpointed: peak").startswith(verdict)


def test_a_server_holds_the_weights_and_keys_and_values_in_the_rest():
    found = values(server_memory(SHAPE, WORK, HARDWARE))
    assert found["weights"] == 2
    assert found["cache"] == 3  # half of 10, less the weights
    assert found["rollouts of full context that fit"] == pytest.approx(150_000 / 800)
    assert found["rollouts that fit"] == pytest.approx(150_000 / (100 + 2 * 40))
    assert (found["rollouts at once, at first"], found["rollouts at once, forks"]) == (2, 1)
    split = values(server_memory(SHAPE, WORK, dataclasses.replace(HARDWARE, tensor_parallel=2)))
    assert (split["weights"], split["cache"], split["rollouts at once, at first"]) == (1, 4, 4)
    with pytest.raises(ConfigError, match=r"has 2.0 GB, and the model's weights need 2.0 GB; raise tensor_parallel"):
        server_memory(SHAPE, WORK, dataclasses.replace(HARDWARE, memory=4))


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bytes_of_a_block_are_those_that_autograd_keeps(kind, checkpointing):
    tokens = 256
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2}
    two, four = (
        kept_bytes(kind(vocab_size=97, num_hidden_layers=layers, **sizes), tokens, checkpointing) for layers in (2, 4)
    )
    shape = ModelShape(1, 1, hidden=128, kv_heads=2, vocabulary=97, heads=8, head_dim=16, intermediate=384)
    expected = 4 * 128 if checkpointing else block_bytes(shape)
    assert (four - two) / 2 / tokens == pytest.approx(expected, rel=0.02)


def kept_bytes(config: PretrainedConfig, tokens: int, checkpointing: bool) -> int:
    """What a forward pass under bfloat16 autocast keeps for the way back, without the weights and their copies."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# -- work and time ---------------------------------------------------------------------------------


def test_actions_are_those_of_the_papers_estimate():
    papers = Workload()
    assert papers.actions == 5 * 8 + 2.5 * 16 == 80  # the paper measured 81.8
    assert Workload(initial=1).actions == 45  # 39.8
    grpo = papers.turns * papers.forks
    assert papers.actions / grpo == 8 / 16 + 0.5
    assert Workload(initial=1).actions / grpo == 1 / 16 + 0.5


def test_tokens_of_a_step():
    # Two questions with 4 x 2 + 2 x 4 = 16 actions each.
    assert (WORK.actions, WORK.full_length, WORK.mean_length) == (16, 260, 180)
    assert prefill_tokens(WORK) == 2 * 100 + 32 * 30
    assert update_tokens(WORK) == 2 * 100 + 32 * 40
    found = values(step_work(WORK))
    assert found["actions generated"] == 32
    assert found["tokens generated"] == 320
    assert (found["actions trained, at most"], found["tokens trained, at most"]) == (16, 160)
    assert found["the same as full rows"] == 2 * 6 * 260


def test_decoding_is_as_slow_as_reading_or_computing_whichever_is_slower():
    # 2 GB of weights and 5 x 180 tokens of 20 kB, at 50 GB/s.
    assert decode_seconds(SHAPE, WORK, HARDWARE, 5) == pytest.approx((2 + 0.018) / 50)
    # 200 x 2 GFLOP at 5 TFLOP/s: 80 ms, longer than reading 2.72 GB.
    assert decode_seconds(SHAPE, WORK, HARDWARE, 200) == pytest.approx(0.08)
    # A cache of 833 rollouts: a thousand take two turns.
    assert decode_seconds(SHAPE, WORK, HARDWARE, 1000) == pytest.approx(2 * 833 * 2e9 / 5e12)


def test_seconds_of_a_step_and_hours_of_a_run():
    assert update_flops(SHAPE, WORK) == 4 * (2e9 + 4 * 10 * 1000 * 180)
    found = values(duration(SHAPE, WORK, HARDWARE))
    assert found["first rollouts"] == pytest.approx(4 * 10 * (2 + 2 * 0.0036) / 50)
    assert found["forks"] == pytest.approx(4 * 2 * 10 * (2 + 0.0036) / 50)
    assert found["prefill"] == pytest.approx(1160 * 2e9 / 1e13)
    assert found["search"] == (4 + 4 * 2) * 0.5
    assert found["update"] == pytest.approx(1480 * update_flops(SHAPE, WORK) / 1e13)
    assert found["weights to the servers"] == 4 / 2 + 4 / 2
    parts = ("first rollouts", "forks", "prefill", "search", "update", "weights to the servers")
    assert found["a step"] == pytest.approx(sum(found[part] for part in parts))
    assert found["36 steps"] == pytest.approx(36 * found["a step"] / 3600)
    assert found["GPU hours"] == pytest.approx(4 * found["36 steps"])


def test_forks_at_once_take_fewer_rounds():
    found = values(duration(SHAPE, dataclasses.replace(WORK, forks_per_round=3), HARDWARE))
    assert found["search"] == (4 + 2 * 2) * 0.5
    assert found["forks"] == pytest.approx(2 * 2 * 10 * (2 + 3 * 0.0036) / 50)


def test_sizes_of_wiki_18():
    found = values(wiki18())
    assert found["E5 Flat on disk, and in memory"] == pytest.approx(64.559, abs=1e-3)
    assert found["E5 SQfp16, E5 SQ8"] == "32.3, 16.1"


# -- inputs ----------------------------------------------------------------------------------------


def test_every_figure_says_where_it_is_from():
    figures = plan(SHAPE, WORK, HARDWARE, "given")
    assert all(figure.source for figure in figures)
    inputs = {figure.name: figure for figure in figures if figure.section == "Inputs"}
    assert (inputs["questions"].value, inputs["questions"].source) == (2, "given")
    assert inputs["tensor_parallel"].source == "vLLM's default"
    usual = {f.name: f for f in plan(SHAPE, Workload(context=8000), Hardware(gpu="a100"), "given")}
    assert (usual["memory"].value, usual["memory"].source) == (80, "NVIDIA's data sheet")
    assert (usual["gpu"].source, usual["utilisation"].source) == ("given", "assumed")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workload(questions=0), "questions must be a number above 0, not 0"),
        (lambda: Workload(turns=0.5), "turns must be a number of at least 1, not 0.5"),
        (lambda: Workload(turns=100, context=1000), "has 45,500 tokens, more than a context of 1,000; lower turns"),
        (lambda: Hardware(memory=-1.0), "memory must be a number above 0"),
        (lambda: Hardware(utilisation=40), "utilisation is a share and must be at most 1, not 40"),
        (lambda: Hardware(server_gpus=3, tensor_parallel=2), "3 server_gpus cannot be split into servers of 2"),
        (lambda: plan(SHAPE, Workload(), HARDWARE, ""), "longest prefix plus action is not known .* pass --context"),
    ],
)
def test_inputs_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_defaults_are_those_of_training():
    config = TrainConfig(algorithm="carl")
    explorer = config.make_algorithm().explorer
    work = Workload()
    assert (work.initial, work.forks, work.forks_per_round) == (8, 16, explorer.forks_per_round)
    assert (work.batch_tokens, LOGITS) == (config.batch_tokens, CHUNK)


def test_every_hub_card_has_a_shape_with_the_parameters_of_its_model():
    assert {resolve(name)[1] for name in list_cards("agents") if name != "tiny"} == set(SHAPES)
    for model, shape in SHAPES.items():
        kind = LlamaConfig if "lama" in model else Qwen3Config if "Qwen3" in model else Qwen2Config
        config = kind(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, tie_word_embeddings=shape.tied,
        )  # fmt: skip
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config)
        assert sum(weight.numel() for weight in made.parameters()) == shape.parameters


# -- the script ------------------------------------------------------------------------------------


def test_the_script_prints_a_table_and_the_same_as_json(capsys):
    main(["--questions", "64", "--gpu", "h200"])
    table = capsys.readouterr().out
    main(["--questions", "64", "--gpu", "h200", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert [figure["value"] for figure in figures if figure["name"] == "actions generated"] == [5120]
    for figure in figures:
        assert figure["section"] in table and figure["name"] in table
    assert "5,120" in table and "16,384" in table  # the context of the card


def test_the_script_takes_a_folder_or_numbers_and_says_what_is_missing(capsys):
    main(["--agent", "tiny", "--turns", "2", "--json"])
    found = {f["name"]: f["value"] for f in json.loads(capsys.readouterr().out)}
    assert found["parameters"] == 727_936 and found["context"] == 1536
    numbers = ["parameters=1000000000", "layers=10", "hidden=1000", "kv_heads=4", "vocabulary=50000"]
    main(["--shape", *numbers, "--context", "4000", "--json"])
    found = {f["name"]: f["value"] for f in json.loads(capsys.readouterr().out)}
    assert found["keys and values of a token"] == 2 * 10 * 4 * 128 * 2 / 1000
    for words, message in (
        (["--shape", *numbers], "pass --context"),
        (["--shape", *numbers[:4]], "missing key 'vocabulary'"),
        (["--agent", str(Path(__file__).parent)], "no config.json of a known shape here"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err
