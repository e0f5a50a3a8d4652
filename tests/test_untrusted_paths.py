"""Names in cards, questions and passages that want to be paths: nothing outside of its place is read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_toys import random_model, tag_tokenizer

import carl_gym
from carl_gym.agents.agent import load_agent
from carl_gym.agents.card import resolve
from carl_gym.benchmark.arms import parse_arms
from carl_gym.cards import beside, make_card
from carl_gym.envs.data_card import DataCard
from carl_gym.envs.pages import load_tokenizer
from carl_gym.envs.wrappers import RecordTranscript
from carl_gym.errors import CardError
from carl_gym.retrieval import make_retriever
from carl_gym.retrieval.builder import index_folder
from carl_gym.retrieval.corpus import Corpus, Passage
from carl_gym.retrieval.registry import IndexCard, corpus_of
from scripts import build_index, evaluate

ESCAPES = ["../outside", "inside/../../outside", "ABSOLUTE", "link", "link/deeper", "inside/link"]
"""Where `outside` is a folder beside that of the card, and `link` leads to it."""
NAMES = ["../../escaped", "/tmp/escaped", "a/b", "..", ".", "C:\\x", "x\x00y", "con", "a" * 300, "%2e%2e%2f", "~/x"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a card, with a model in it and one beside it."""
    tokenizer, model = tag_tokenizer(), random_model("llama", len(tag_tokenizer()))
    for place in (tmp_path / "outside", tmp_path / "outside" / "deeper", tmp_path / "card" / "inside"):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    for link in ("link", "inside/link"):
        (tmp_path / "card" / link).symlink_to(tmp_path / "outside")
    return tmp_path / "card"


def agent_card(folder: Path, **values: str) -> str:
    keys = {"id": "c", "description": "", "prompt": "{observation}", "model": "inside"} | values
    path = folder / "mine.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return str(path)


def spelled(escape: str, folder: Path) -> str:
    return escape.replace("ABSOLUTE", str(folder.parent / "outside"))


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("key", ["model", "lora"])
def test_a_model_is_beside_its_card(folder: Path, key: str, escape: str) -> None:
    value = spelled(escape, folder)
    with pytest.raises(CardError, match=rf"mine\.toml: {key} = .* leads out of the card's folder"):
        load_agent(agent_card(folder, **{key: value}), device="cpu")


def test_what_is_beside_a_card_or_named_by_the_user_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_agent(agent_card(folder), device="cpu").model is not None
    assert resolve(agent_card(folder, model="owner/name", lora="owner/adapter"))[1] == "owner/name"
    # A path on the command line goes wherever the user wants.
    monkeypatch.chdir(folder)
    for path in ("../outside", "link", str(folder.parent / "outside")):
        assert resolve(path)[1] == path
    # A snapshot of the hub is made of links, and its card is one of them.
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list((folder / "inside").glob("*.*")):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    (blobs / "card").write_text('id = "c"\ndescription = ""\nmodel = "."\nprompt = "{observation}"\n')
    (folder / "inside" / "agent.toml").symlink_to(blobs / "card")
    assert load_agent(str(folder / "inside"), device="cpu").card.id == "c"


def test_a_tokenizer_by_the_name_of_an_agent_is_beside_its_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Path(agent_card(folder, model="../outside"))
    monkeypatch.setattr("carl_gym.envs.pages.list_cards", lambda kind: {"mine": card})
    with pytest.raises(CardError, match="leads out of the card's folder"):
        load_tokenizer("mine")


@pytest.mark.parametrize(
    "name", ["../hotpotqa", "/etc", "..", ".", "a/b", "", "a\nb", "~", "a b", "[red]x", "x\x1b[2J"]
)
def test_a_data_set_is_a_folder_of_the_data_folder(name: str) -> None:
    with pytest.raises(CardError, match=r"mine\.toml: name = .*; expected the name of a folder"):
        make_card(DataCard, {"name": name}, "mine.toml")


def test_a_data_set_elsewhere_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user meets it: a stranger's card, and data of one's own outside of CARL_GYM_DATA."""
    (tmp_path / "data").mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "questions.jsonl").write_text('{"id": "1", "question": "?", "answers": ["secret"]}\n')
    (tmp_path / "private" / "corpus.jsonl").write_text('{"id": "1", "title": "a", "text": "secret"}\n')
    monkeypatch.setenv("CARL_GYM_DATA", str(tmp_path / "data"))
    card = tmp_path / "card.toml"
    card.write_text(
        'id = "evil/Private-v0"\ndescription = ""\nindex = "miniwiki-bm25"\nturns = 2\ntop_k = 1\nsnippet_length = 9\n'
        'page_length = 9\n[data]\nname = "../private"\n'
    )
    with pytest.raises(CardError, match="expected the name of a folder"):
        carl_gym.make_task(str(card))
    assert carl_gym.make_task("carl/SearchQA-v0", data_dir=tmp_path / "private").questions  # the user's own word


@pytest.mark.parametrize("hub", ["/etc", "../x", "./x/y", "a/b/c", "json", "a/..", "http://x/y", "C:\\x"])
def test_a_data_set_on_the_hub_is_an_id(hub: str) -> None:
    """`datasets` reads whatever else it is given from this machine."""
    with pytest.raises(CardError, match="expected owner/name"):
        make_card(DataCard, {"name": "x", "hub": hub}, "mine.toml")


@pytest.mark.parametrize("escape", ["../secret.jsonl", "ABSOLUTE/secret.jsonl", "link/secret.jsonl"])
def test_a_recipe_that_is_a_file_names_a_corpus_beside_it(
    folder: Path, escape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (folder.parent, folder.parent / "outside", folder):
        (place / "secret.jsonl").write_text('{"id": "1", "title": "a", "text": "secret"}\n')
    recipe = folder / "recipe.toml"
    text = 'id = "r"\ndescription = ""\ncache = false\ncorpus = '
    recipe.write_text(text + json.dumps(spelled(escape, folder)))
    with pytest.raises(SystemExit, match="2"):
        build_index.main([str(recipe)])
    assert "leads out of the card's folder" in capsys.readouterr().err
    recipe.write_text(text + '"secret.jsonl"')
    assert corpus_of(str(recipe)) == str(folder / "secret.jsonl")
    build_index.main([str(recipe)])
    build_index.main([str(recipe), "--corpus", str(folder.parent / "secret.jsonl")])


@pytest.mark.parametrize("kind", ["../../evil:X", "/tmp/evil:X", "a.b:C", "..:.."])
def test_an_index_has_its_own_folder_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from carl_gym.retrieval.bm25 import BM25

    monkeypatch.setenv("CARL_GYM_CACHE", str(tmp_path))
    corpus = Corpus([Passage("../../p", "/etc/passwd", "words")])
    folder = index_folder(kind, BM25, BM25.Settings(), corpus)
    assert folder.parent == tmp_path and ".." not in folder.name


def test_names_of_questions_and_passages_become_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played, recorded and evaluated: every file that is written is where it belongs."""
    home, place = tmp_path / "home", tmp_path / "home" / "a" / "b" / "c"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("CARL_GYM_CACHE", str(place / "cache"))
    questions = [{"id": name, "question": f"Who? {name}", "answers": [name], "type": name} for name in NAMES]
    passages = [{"id": name, "title": name, "text": f"words {name}"} for name in NAMES]
    Path("questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    Path("corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    task = carl_gym.make_task("carl/SearchQA-v0", questions="questions.jsonl", corpus="corpus.jsonl", index="bm25")
    env = RecordTranscript(carl_gym.envs.gym_env.SearchEnv(task), place / "out" / "transcript.jsonl")
    for name in NAMES:
        env.reset(options={"question_id": name})
        env.step(f"<access>{name}</access>")
    env.close()
    evaluate.main(
        ["--agents", "heuristic", "--envs", "carl/SearchQA-v0", "--env-args", "questions=questions.jsonl",
         "corpus=corpus.jsonl", "--output-dir", "out/evaluation"]
    )  # fmt: skip
    assert make_retriever(IndexCard("bm25", ""), task.corpus).search(["words"], 1)
    written = {path.relative_to(home).parts[:4] for path in home.rglob("*") if path.is_file()}
    top = {"questions.jsonl", "corpus.jsonl", "out", "cache"}
    assert written == {("a", "b", "c", name) for name in top}
    assert not Path("/tmp/escaped").exists()


def test_folders_of_benchmark_arms_are_names(tmp_path: Path) -> None:
    (arm,) = parse_arms(["carl:x=../../y/z"])
    assert "/" not in arm.slug and (tmp_path / arm.slug).resolve().parent == tmp_path.resolve()


def test_beside_finds_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    card = tmp_path / "card.toml"
    assert beside(card, "model", "owner/name") is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert beside(card, "model", "owner/name") == tmp_path / "owner" / "name"
    assert beside(card, "model", ".") == tmp_path
