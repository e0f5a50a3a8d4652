"""LoRA: what learns, what others see of it, and that a run goes on with it as if nothing had happened."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import config, last_checkpoint, metrics, same_training, weights, without_times
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from carl_gym.agents.agent import load_agent
from carl_gym.errors import ConfigError, DataError
from carl_gym.training.adapter import Adapter, plain_weights
from carl_gym.training.trainer import Trainer

peft = pytest.importorskip("peft", reason="peft is not installed")


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


def llama(folder: Path) -> PreTrainedModel:
    model = load_agent(str(folder), device="cpu").model
    assert model is not None
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_to_others_it_is_a_plain_model_with_the_adapter_added(kind, tiny_agent_folder):
    plain = gpt2() if kind == "gpt2" else llama(tiny_agent_folder)
    adapted, ids = copy.deepcopy(plain), torch.arange(20)[None]
    Adapter(adapted, rank=3, alpha=5.0)
    assert torch.equal(adapted(ids).logits, plain(ids).logits)  # it changes nothing yet
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.1)
    found = plain_weights(adapted, {name: value.detach() for name, value in adapted.named_parameters()})
    assert found.keys() == dict(plain.named_parameters()).keys()
    before = plain(ids).logits
    plain.load_state_dict(found, strict=False)
    assert torch.allclose(adapted(ids).logits, plain(ids).logits, atol=1e-4)
    assert not torch.allclose(before, plain(ids).logits, atol=1e-2)
    sizes = {tuple(parameter.shape) for parameter in trained}
    assert all(3 in shape for shape in sizes), "matrices of rank 3 are all that learns"


@pytest.fixture(scope="module")
def run(tiny_agent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    list(Trainer(config(tiny_agent_folder, folder, lora_rank=4, learning_rate=3e-3)).run())
    return folder


def test_a_checkpoint_is_a_plain_agent_and_holds_the_adapter_for_peft(run, tiny_agent_folder):
    final, base = last_checkpoint(run), weights(tiny_agent_folder)
    found = weights(final)
    assert found.keys() == base.keys()
    changed = {name for name in base if not torch.equal(found[name], base[name])}
    assert changed == {name for name in base if "_proj" in name}  # neither embeddings nor norms
    merged = peft.PeftModel.from_pretrained(llama(tiny_agent_folder), final / "adapter").merge_and_unload()
    for name, value in merged.named_parameters():
        assert torch.allclose(value, found[name], atol=1e-6), name


def test_what_is_sampled_and_what_learns_agree(run):
    assert all(row["update/logprob_gap"] < 1e-3 for row in metrics(run)[1:])


@pytest.mark.parametrize("off", [False, True])
def test_a_resumed_run_does_what_it_would_have_done(off, run, tiny_agent_folder, tmp_path):
    options = {"lora_rank": 4, "learning_rate": 3e-3, "one_step_off": off}
    whole = run
    if off:
        whole = tmp_path / "whole"
        list(Trainer(config(tiny_agent_folder, whole, **options)).run())
    for metric in Trainer(config(tiny_agent_folder, tmp_path / "run", **options)).run():
        if metric["step"] == 3:  # the checkpoint is that of step 2
            break
    list(Trainer(config(tiny_agent_folder, tmp_path / "run", resume=True, **options)).run())
    assert same_training(tmp_path / "run", whole)
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(whole))


def test_an_adapter_on_other_weights_or_a_spoiled_one_is_refused(run, tiny_agent_folder, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    base = Path(shutil.copytree(tiny_agent_folder, tmp_path / "base"))
    model = llama(base)
    for _ in Trainer(config(base, tmp_path / "mine", lora_rank=4, save_every=1, steps=2)).run():
        pass
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save_pretrained(base)
    shutil.rmtree(last_checkpoint(tmp_path / "mine"))
    with pytest.raises(DataError, match=r"was trained on other weights .* give it the agent that it began with"):
        Trainer(config(base, tmp_path / "mine", lora_rank=4, save_every=1, steps=2, resume=True))
    path = last_checkpoint(folder) / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    (last_checkpoint(folder) / "files.json").unlink()  # else the damage is noticed, and an older one taken
    with (
        pytest.warns(UserWarning, match="without checksums"),
        pytest.raises(DataError, match="not the adapter of this run"),
    ):
        Trainer(config(tiny_agent_folder, folder, lora_rank=4, learning_rate=3e-3, resume=True))


def test_what_cannot_work_is_said_before_anything_is_written(tiny_agent_folder, tmp_path, monkeypatch):
    def refused(match: str, **options: object) -> None:
        with pytest.raises(ConfigError, match=match):
            Trainer(config(tiny_agent_folder, tmp_path / "run", **options))
        assert not (tmp_path / "run").exists()

    refused("'ppo' has a critic, which lora_rank has no form for", algorithm="ppo", forks=None, lora_rank=4)
    refused("lora_alpha 8.0 is that of an adapter; give its lora_rank", lora_alpha=8.0)
    refused("lora_rank must be at least 1", lora_rank=0)
    refused("lora_alpha must be a number above 0", lora_rank=4, lora_alpha=0.0)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("lora_rank needs the package peft: pip install", lora_rank=4)


def test_the_adapter_of_a_checkpoint_has_weights_as_safetensors_alone(run):
    kinds = {path.suffix for path in (last_checkpoint(run) / "adapter").iterdir()}
    assert kinds <= {".json", ".safetensors", ".md"}
    assert load_file(last_checkpoint(run) / "adapter" / "adapter_model.safetensors")
