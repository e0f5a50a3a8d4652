"""Several real processes train as one would, whatever each of them has to do."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import launch
from rank_worker import train
from safetensors.torch import load_file
from training_runs import arguments, config, last_checkpoint, metrics, weights

from carl_gym import make_task
from carl_gym.agents.agent import load_agent
from carl_gym.algorithms import get_algorithm, token_weights
from carl_gym.errors import ConfigError
from carl_gym.rollouts.collector import collect
from carl_gym.training.checkpoints import UNWRITABLE
from carl_gym.training.learner import Learner
from carl_gym.training.questions import take_questions
from carl_gym.training.ranks import ALONE, Ranks, launched
from carl_gym.training.segments import Row, rows, segments
from carl_gym.training.trainer import Trainer

TESTS = Path(__file__).parent
TRAIN = TESTS.parent / "scripts" / "train_carl.py"
STEPS = 5


@pytest.fixture(scope="module")
def trees_of_rows(tiny_agent_folder: Path) -> list[list[list[Row]]]:
    """For every step the rows of six trees of CARL's, with the weights that they have together."""
    agent = load_agent(str(tiny_agent_folder), device="cpu")
    task, algorithm = make_task("carl/MiniWiki-v0", questions=6), get_algorithm("carl", initial=2, forks=5)
    found = []
    for step in range(STEPS):
        questions = list(task.questions.values())
        trees = collect(task, agent.policy, agent.transcript, questions, algorithm.explorer, seed=3, step=step)
        parts = zip(
            trees, algorithm.credit(trees), token_weights(trees, algorithm.selection(trees), "action"), strict=True
        )
        found.append([rows(segments(*part)) for part in parts])
    return found


@pytest.fixture(scope="module")
def alone(
    tiny_agent_folder: Path, trees_of_rows: list[list[list[Row]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one process makes of them."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "rows.pickle").write_bytes(pickle.dumps(trees_of_rows))
    train(ALONE, tiny_agent_folder, folder / "rows.pickle", folder / "alone")
    train(ALONE, tiny_agent_folder, folder / "rows.pickle", folder / "alone-lora", lora=True)
    return folder / "alone"


def uneven(trees: list[list[Row]], step: int, processes: int) -> list[list[Row]]:
    """Shares of a step: the first process has most of it, and the last one nothing in every other step."""
    shares: list[list[Row]] = [[] for _ in range(processes)]
    for number, tree in enumerate(trees):
        owner = max(0, number - len(trees) + processes)
        shares[owner if step % 2 or owner < processes - 1 else 0] += tree
    return shares


@pytest.mark.parametrize(("processes", "layout"), [(2, "ddp"), (4, "ddp"), (3, "zero3")])
def test_processes_learn_what_one_would(processes, layout, tiny_agent_folder, trees_of_rows, alone, tmp_path):
    """With the launcher's settings for DDP also FSDP2, which differ by what the worker asks for."""
    settings = "ddp.yaml"
    if layout == "zero3":
        pytest.importorskip("deepspeed")
        settings = str(split_by_deepspeed(tmp_path))
    shares = [uneven(trees, step, processes) for step, trees in enumerate(trees_of_rows)]
    assert [not step[-1] for step in shares] == [True, False, True, False, True]
    (tmp_path / "shares.pickle").write_bytes(pickle.dumps(shares))
    worker = TESTS / "rank_worker.py"
    launch(processes, worker, tiny_agent_folder, tmp_path / "shares.pickle", tmp_path, settings=settings)
    start = {n: p.detach() for n, p in load_agent(str(tiny_agent_folder), device="cpu").model.named_parameters()}
    expected = load_file(alone.with_suffix(".safetensors"))
    moved = distance(start, expected)
    for kind in ("ddp", "fsdp", "offload") if layout == "ddp" else ("zero3", "zero3-chunks", "zero3-offload"):
        found = load_file(tmp_path / f"{kind}-{processes}.safetensors")
        assert found.keys() == expected.keys()
        assert distance(found, expected) <= 1e-5, kind
        assert distance(found, expected) <= 1e-2 * moved, kind  # AdamW makes steps of a gradient that is rounding
        metrics = pickle.loads((tmp_path / f"{kind}-{processes}.pickle").read_bytes())
        for one, other in zip(metrics, pickle.loads(alone.with_suffix(".pickle").read_bytes()), strict=True):
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
            assert one.loss == pytest.approx(other.loss, abs=1e-5)
            assert one.entropy == pytest.approx(other.entropy, rel=1e-4)
            assert one.gap == pytest.approx(other.gap, rel=1e-2, abs=1e-4)
            assert one.clip_fraction == pytest.approx(other.clip_fraction, abs=1e-2)
    adapted = load_file(alone.with_name("alone-lora.safetensors"))
    for kind in ("ddp-lora", "fsdp-lora") if layout == "ddp" else ("zero3-lora",):
        found = load_file(tmp_path / f"{kind}-{processes}.safetensors")
        assert found.keys() == start.keys()
        assert distance(found, adapted) <= 1e-2 * distance(start, adapted), kind
    rough = pickle.loads((tmp_path / f"bf16-{processes}.pickle").read_bytes())
    for one, other in zip(rough, metrics, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=0.2)
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(tmp_path / f"bf16-{processes}.safetensors").values()
    )


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero3"])
def test_a_run_of_two_processes_is_that_of_one_which_goes_on_with_it(layout, tiny_agent_folder, tmp_path):
    """Everything but rounding: trees, metrics, evaluations, weights; and its checkpoint serves any number."""
    if layout == "zero3":
        pytest.importorskip("deepspeed")
    one, two = tmp_path / "one", tmp_path / "two"
    # Five of four questions a step: the processes have three and two of them, one of them twice. One to evaluate, so
    # that the second process has none. Few steps and small ones: rounding is to tip no draw.
    options = {"questions_per_step": 5, "learning_rate": 1e-6, "steps": 2, "save_every": 1, "keep_best": True}
    options |= {"train_questions": 4, "eval_questions": 1}
    options |= {"background_saves": True} if layout == "fsdp2" else {}
    alone = Trainer(config(tiny_agent_folder, one, **options))
    taken = [[q.id for q in take_questions(alone.questions, step, 5, seed=0)] for step in range(2)]
    assert any(ids.index(ids[-1]) % 2 for ids in taken), "the two trees of a question grow in different processes"
    list(alone.run())
    launch(2, TRAIN, *arguments(tiny_agent_folder, two, **options), settings=f"{layout}.yaml")
    own = {"seconds", "cpu_seconds", "update/tokens", "update/needed"}  # of processes, not of the run
    for mine, theirs in zip(metrics(one), metrics(two), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - own:
            assert name.startswith("time/") or theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-4), name
    start, whole = weights(tiny_agent_folder), weights(last_checkpoint(two))
    assert distance(whole, weights(last_checkpoint(one))) <= 1e-2 * distance(whole, start)
    shutil.rmtree(last_checkpoint(two))
    list(Trainer(config(tiny_agent_folder, two, resume=True, **options)).run())
    assert last_checkpoint(two).name == last_checkpoint(one).name
    assert distance(weights(last_checkpoint(two)), whole) <= 1e-2 * distance(whole, start)


def split_by_deepspeed(folder: Path) -> Path:
    """Settings with which it splits small tensors as well, and puts them together in small steps."""
    small = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 3000, "sub_group_size": 10_000}
    zero = {"stage": 3, "stage3_max_reuse_distance": 3000, "reduce_bucket_size": 20_000, **small}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    given = yaml.safe_load((TESTS.parent / "scripts" / "configs" / "zero3.yaml").read_text())
    given["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": False}
    del given["mixed_precision"]  # accelerate wants it in the file or nowhere
    (folder / "zero3.yaml").write_text(yaml.safe_dump(given))
    return folder / "zero3.yaml"


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert one.keys() == other.keys()
    away, size = (
        torch.stack([value.norm() for value in values]).norm()
        for values in ([one[name] - other[name] for name in one], list(other.values()))
    )
    return float(away / size)


def test_optimiser_states_by_number_are_read(tiny_agent_folder, trees_of_rows):
    """As checkpoints had them before they had names."""
    rows = [row for tree in trees_of_rows[0] for row in tree]
    one, other = (Learner(load_agent(str(tiny_agent_folder), device="cpu").model, learning_rate=1e-3) for _ in range(2))
    one.update(rows, 0.2, 0.2)
    other.load_state(one.optimizer.state_dict())
    for mine, theirs in zip(one.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_shards_that_cannot_be_written_are_known_as_such(tiny_agent_folder, trees_of_rows, tmp_path):
    learner = Learner(load_agent(str(tiny_agent_folder), device="cpu").model, learning_rate=1e-3)
    learner.update([row for tree in trees_of_rows[0] for row in tree], 0.2, 0.2)
    (tmp_path / "file").write_text("no folder")
    assert isinstance(learner.write_shards(tmp_path / "file" / "optimizer").exception(), UNWRITABLE)
    assert learner.write_shards(tmp_path / "optimizer").exception() is None


def test_a_process_without_a_launcher_is_alone():
    assert launched() is ALONE
    assert (ALONE.mine([1, 2]), ALONE.gather([1, 2]), ALONE.agree("x"), ALONE.total(1.0, 2.0)) == (
        [1, 2],
        [1, 2],
        "x",
        [1.0, 2.0],
    )


def test_a_launcher_that_asks_for_what_would_not_be_done_is_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ConfigError, match=r"configured for Megatron-LM.*fsdp2\.yaml"):
        launched()
    monkeypatch.delenv("ACCELERATE_USE_MEGATRON_LM")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ConfigError, match="fsdp_offload_params is for the shards of several processes"):
        launched()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed is for the shards of several processes"):
        launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"missing \(.*pip install .*\[deepspeed\]"):
        patch.setitem(sys.modules, "deepspeed", None)
        launched()
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError, match=r"ZeRO stage 2; 3 is used \(scripts/configs/zero3\.yaml\)"):
        launched()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme")
    with pytest.raises(ConfigError, match="offload to NVMe"):
        launched()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "/no/such/file.json")
    with pytest.raises(ConfigError, match=r"configuration of DeepSpeed cannot be used .*/no/such/file\.json"):
        launched()


def test_shares_are_every_so_many_th_item():
    assert [Ranks(index, 3).mine("abcdefg") for index in range(3)] == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
