"""What training keeps of a few fixed questions: the same ones at every evaluation, and without changing the run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from training_runs import arguments, config, run_record, same_training

from carl_gym.errors import ConfigError
from carl_gym.tracking.tree_record import read_records
from carl_gym.training import cli
from carl_gym.training.config import TrainConfig
from carl_gym.training.scores import TreeScores
from carl_gym.training.trainer import Trainer

FILES = ["step-000000.json", "step-000002.json", "step-000004.json"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def run(tiny_agent_folder: Path, tmp_path_factory: pytest.TempPathFactory, uri: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    list(Trainer(config(tiny_agent_folder, folder, tracking_uri=uri)).run())
    return folder


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "trees").iterdir())}


def test_the_same_questions_are_kept_at_every_evaluation(run):
    assert list(kept(run)) == FILES
    found = [read_records(run / "trees" / name) for name in FILES]
    assert [[record["step"] for record in records] for records in found] == [[0, 0], [2, 2], [4, 4]]
    assert len({tuple(record["question_id"] for record in records) for records in found}) == 1
    for record in itertools.chain.from_iterable(found):
        ends = [node for node in record["nodes"] if node["R"] is not None]
        assert len(ends) == 1 + 2, "N0 + N"
        assert any(node["trained"] for node in record["nodes"]), "with the algorithm's selection"
        assert "".join(record["nodes"][0]["observation"]).startswith("Question: ")
    assert found[0] != found[1], "the weights differ, the random numbers do not"


def test_the_page_is_left_behind_and_logged(run, uri):
    from mlflow import MlflowClient

    page = (run / "trees.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and '"step":4' in page
    assert "trees.html" in {file.path for file in MlflowClient(uri).list_artifacts(run_record(run)["run_id"])}


def test_trees_change_nothing_of_the_training(run, tiny_agent_folder, tmp_path, uri):
    list(Trainer(config(tiny_agent_folder, tmp_path / "none", tracking_uri=uri, tree_questions=0)).run())
    assert same_training(run, tmp_path / "none")
    assert not (tmp_path / "none" / "trees").exists()


def test_a_stopped_and_resumed_run_keeps_the_same_trees(run, tiny_agent_folder, tmp_path, uri):
    first = Trainer(config(tiny_agent_folder, tmp_path / "run", tracking_uri=uri)).run()
    assert len(list(itertools.islice(first, 4))) == 4  # steps 0 to 3; the checkpoint is of step 2
    first.close()
    list(Trainer(config(tiny_agent_folder, tmp_path / "run", tracking_uri=uri, resume=True)).run())
    assert kept(tmp_path / "run") == kept(run)


def test_without_held_out_questions_the_page_shows_the_last_tree(tiny_agent_folder, tmp_path, uri, capsys):
    words = arguments(tiny_agent_folder, tmp_path / "run", tracking_uri=uri, eval_questions=0, steps=1)
    cli.main(words)
    assert f"open {tmp_path / 'run' / 'trees.html'} in a browser" in capsys.readouterr().out.replace("\n", "")
    page = (tmp_path / "run" / "trees.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert [tree["step"] for tree in data["trees"]] == [None]
    assert not (tmp_path / "run" / "trees").exists()


def test_trees_that_cannot_be_credited_are_kept_without_credit(tiny_agent_folder, tmp_path, uri, monkeypatch):
    """An algorithm can need of a question what only the training questions were checked for."""
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", tracking_uri=uri))

    def refuse(self, trees):
        raise ConfigError("no gold answer")

    monkeypatch.setattr(TreeScores, "measure", refuse)
    with pytest.warns(UserWarning, match="kept without credit: no gold answer"):
        next(trainer.run())
    (record, _) = read_records(tmp_path / "run" / "trees" / FILES[0])
    assert {node["A"] for node in record["nodes"]} == {None}


def test_a_damaged_record_does_not_end_a_run_with_an_error(tiny_agent_folder, tmp_path, uri):
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", tracking_uri=uri, steps=1))
    rows = trainer.run()
    next(rows)
    (tmp_path / "run" / "trees" / FILES[0]).write_text("[{", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"no page of rollout trees: .*step-000000\.json"):
        list(rows)
    assert (tmp_path / "run" / "summary.json").is_file() and not (tmp_path / "run" / "trees.html").exists()


def test_a_negative_number_of_questions_is_refused():
    with pytest.raises(ConfigError, match="tree_questions must be at least 0"):
        TrainConfig(tree_questions=-1)
