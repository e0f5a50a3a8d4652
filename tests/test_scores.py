"""What algorithms need beside trees: missed before a run starts, measured in it, kept by its checkpoints."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from training_runs import config, last_checkpoint, metrics, same_training, without_times

from carl_gym.agents.agent import load_agent
from carl_gym.algorithms import get_algorithm
from carl_gym.envs.registration import make_task
from carl_gym.errors import ConfigError, DataError
from carl_gym.training.scores import TreeScores
from carl_gym.training.trainer import Trainer

PPO = {"algorithm": "ppo", "forks": None, "rollouts": 3}


@dataclass
class Reads:
    """Gives `inner` with another attribute."""

    inner: object
    name: str
    value: object

    def __getattr__(self, name: str) -> object:
        return self.value if name == self.name else getattr(self.inner, name)


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ("gold answers", "needs the gold answer of every training question, and 1 have none"),
        ("repeated states", "no two sequences of actions lead to the same state"),
        ("entropies", "needs the exact entropies of the sampled tokens, which Silent does not give"),
    ],
)
def test_what_is_lacking_is_said_before_the_start(need, message, tiny_agent_folder, tmp_path):
    class Silent:
        pass

    algorithm = replace(get_algorithm("grpo"), requires=(need,))
    run, agent = config(tiny_agent_folder, tmp_path), load_agent(str(tiny_agent_folder), device="cpu")
    task = make_task("carl/MiniWiki-v0", questions=3)
    questions = list(task.questions.values())
    TreeScores(algorithm, run, task, questions, agent)  # everything is there
    with pytest.raises(ConfigError, match=message):
        TreeScores(
            algorithm,
            run,
            Reads(task, "repeats_states", False),
            [*questions, replace(questions[0], id="without", answers=())],
            replace(agent, policy=Silent()),
        )


def test_a_gold_answer_without_room_after_its_prompt_is_refused_before_the_start(tiny_agent_folder, tmp_path):
    run, agent = config(tiny_agent_folder, tmp_path), load_agent(str(tiny_agent_folder), device="cpu")
    task = make_task("carl/MiniWiki-v0", questions=3)
    questions = list(task.questions.values())
    algorithm = get_algorithm("igpo", rollouts=2)
    TreeScores(algorithm, run, task, questions, agent)
    prompt = agent.transcript.prompt(task.observation(task.initial(questions[0])))
    narrow = replace(agent, transcript=Reads(agent.transcript, "context", len(prompt) + 1))
    with pytest.raises(ConfigError, match=f"gold answer of question {questions[0].id!r} has .* leaves room for 1 in"):
        TreeScores(algorithm, run, task, questions, narrow)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def test_a_critic_learns_beside_the_policy_and_is_resumed_with_it(tiny_agent_folder: Path, tmp_path: Path, uri: str):
    def trainer(name: str, **changes: object) -> Trainer:
        return Trainer(config(tiny_agent_folder, tmp_path / name, tracking_uri=uri, **PPO, **changes))

    rows = list(trainer("whole").run())
    assert [row["critic/loss"] > 0 for row in rows[1:]] == [True] * 4
    assert all(row["critic/explained_variance"] < 1 for row in rows[1:])

    run = trainer("stopped").run()
    assert len(list(itertools.islice(run, 4))) == 4  # step 3, past the checkpoint of step 2
    run.close()
    list(trainer("stopped", resume=True).run())
    assert same_training(tmp_path / "stopped", tmp_path / "whole")
    assert without_times(metrics(tmp_path / "stopped")) == without_times(metrics(tmp_path / "whole"))
    kept = [torch.load(last_checkpoint(tmp_path / name) / "trainer.pt")["critic"] for name in ("whole", "stopped")]
    assert all(torch.equal(kept[0]["model"][name], kept[1]["model"][name]) for name in kept[0]["model"])


def test_a_checkpoint_without_the_critic_is_refused(tiny_agent_folder: Path, tmp_path: Path, uri: str):
    options = {"tracking_uri": uri, **PPO, "steps": 2}
    list(Trainer(config(tiny_agent_folder, tmp_path / "run", **options)).run())
    path = last_checkpoint(tmp_path / "run") / "trainer.pt"
    torch.save({**torch.load(path), "critic": {}}, path)
    (path.parent / "files.json").unlink()  # else the change is noticed as damage
    with (
        pytest.warns(UserWarning, match="without checksums"),
        pytest.raises(DataError, match="not a checkpoint to resume from"),
    ):
        Trainer(config(tiny_agent_folder, tmp_path / "run", **options, resume=True))
