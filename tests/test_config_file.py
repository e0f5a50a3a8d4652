"""Options from a TOML file: what is refused, and that the files of the project are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from carl_gym.agents.card import resolve
from carl_gym.cards import parse_assignments
from carl_gym.envs.registration import env_card, task_arguments
from carl_gym.envs.schemas import read_examples
from carl_gym.errors import ConfigError
from carl_gym.training.config import TrainConfig
from carl_gym.training.config_file import read_options

CONFIGS = Path(__file__).parents[1] / "scripts" / "configs"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_gives_the_options_that_it_sets_and_no_others(tmp_path):
    text = 'algorithm = "grpo"\nrollouts = 4\nlearning_rate = 1\nbf16 = true\nenv_args = ["turns=3"]\nurls = []\n'
    text += 'backend = "vllm"\nweights_dir = "shared"\noutput_dir = "runs/a"\n'
    assert read_options(write(tmp_path, text)) == {
        "algorithm": "grpo", "rollouts": 4, "learning_rate": 1.0, "bf16": True, "env_args": ("turns=3",), "urls": (),
        "backend": "vllm", "weights_dir": Path("shared"), "output_dir": Path("runs/a"),
    }  # fmt: skip
    assert read_options(write(tmp_path, "")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 3", r"unknown key 'step' \(did you mean 'steps'\?\); known keys: algorithm, .*output_dir"),
        ('config = "other.toml"', "unknown key 'config'"),
        ("compare = []", "unknown key 'compare'"),
        ('steps = "many"', r"steps = 'many' \(str\); expected a whole number"),
        ("forks = 2.5", r"forks = 2.5 \(float\); expected a whole number"),
        ("output_dir = 3", r"output_dir = 3 \(int\); expected a text"),
        ('env_args = "turns=3"', r"env_args = 'turns=3' \(str\); expected a list"),
        ("urls = [1]", r"urls = 1 \(int\); expected a text"),
        ('backend = "vlm"', r"backend = 'vlm' \(str\); expected one of 'transformers', 'vllm', 'vllm-server'"),
        ('packing = "trees"', "packing = 'trees'.*expected one of 'tree', 'rows'"),
        ("steps = 0", "steps must be at least 1, not 0"),
        ('algorithm = "carl"\nrollouts = 4', "unknown setting 'rollouts' of algorithm 'carl'"),
        ('algorithm_args = ["initial"]', "'initial' is no assignment"),
        ("steps = ", "cannot be read as TOML .* pass --config a .toml file of options"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_file_the_key_and_what_is_allowed(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        read_options(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'agent = "\xe9"')
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read as TOML"):
            read_options(path)


@pytest.mark.parametrize(
    ("name", "agent", "questions", "rate"),
    [
        ("carl-qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", 128, 5e-6),
        ("carl-qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", 128, 5e-6),
        ("carl-qwen3-4b", "Qwen/Qwen3-4B", 64, 1e-5),
    ],
)
def test_the_papers_settings_are_in_their_files(name, agent, questions, rate):
    config = TrainConfig(**read_options(CONFIGS / f"{name}.toml"))
    explorer = config.make_algorithm().explorer
    assert (config.algorithm, explorer.initial, explorer.forks, explorer.forks_per_round) == ("carl", 8, 16, 1)
    assert (config.questions_per_step, config.learning_rate, config.steps) == (questions, rate, 100)
    assert config.train_questions >= questions * config.steps
    assert resolve(config.agent)[1] == agent

    arguments = parse_assignments(config.env_args)
    assert arguments.keys() <= task_arguments(config.env)
    card = env_card(config.env, {key: value for key, value in arguments.items() if key != "corpus"})
    assert (card.index.id, card.turns, card.reward) == ("wiki18-e5", 10, "f1_format")


def test_every_file_is_tested_and_fits_the_baseline_too():
    files = sorted(CONFIGS.glob("*.toml"))
    assert [path.stem for path in files] == ["carl-qwen2.5-3b", "carl-qwen2.5-7b", "carl-qwen3-4b"]
    for path in files:
        baseline = TrainConfig(**{**read_options(path), "algorithm": "grpo"}).make_algorithm()
        assert baseline.explorer.rollouts == 16
        assert f"--config scripts/configs/{path.name}" in path.read_text(encoding="utf-8")


def test_rows_in_the_form_of_asearcher_base_are_questions():
    row = {"question": "Who?", "answer": ["A"], "aug_answer": ["a"], "source": "x", "qid": "1"}
    (example,) = read_examples([("row", row)])
    assert (example.question.text, example.question.answers) == ("Who?", ("A",))
