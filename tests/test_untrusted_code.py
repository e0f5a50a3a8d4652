"""Nothing of a card or an index is run: no such call in the sources, and imports of installed modules only."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import carl_gym
from carl_gym.errors import CardError, DataError
from carl_gym.retrieval import Corpus, make_retriever
from carl_gym.retrieval.bm25 import BM25
from carl_gym.retrieval.corpus import Passage
from carl_gym.retrieval.mapped_corpus import MappedCorpus, map_corpus
from carl_gym.retrieval.registry import IndexCard

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("carl_gym", "scripts", "examples")
SOURCES = [ROOT / "carl_gym_verifiers.py", *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]

NEVER = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.loads", "shelve.open", "yaml.load",
    "yaml.unsafe_load", "pd.read_pickle", "os.system", "os.popen",
}  # fmt: skip
"""Calls that run what they are given."""


def called(source: str) -> Iterator[tuple[int, str, dict[str | None, str]]]:
    """Line, function and keyword arguments of every call in a source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def complaints(source: str) -> list[str]:
    """What is wrong with the calls of a source."""
    found = []
    for line, name, given in called(source):
        wrong = name in NEVER
        if name == "torch.load":
            wrong = given.get("weights_only") != "True"
        elif name in ("np.load", "numpy.load"):
            wrong = given.get("allow_pickle", "False") != "False"
        elif name.startswith("subprocess."):
            wrong = given.get("shell", "False") != "False"
        elif (name.endswith(".from_pretrained") and name.startswith("Auto")) or name in ("SentenceTransformer", "LLM"):
            wrong = given.get("trust_remote_code") != "False"
        if name.endswith(".from_pretrained") and ("Model" in name):
            wrong |= given.get("use_safetensors") != "True"
        if name == "LLM":
            wrong |= given.get("load_format") != "'safetensors'"
        if wrong or given.get("trust_remote_code", "False") != "False":
            found.append(f"line {line}: {name}({given})")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    assert complaints(path.read_text(encoding="utf-8")) == []


def test_such_calls_would_be_found() -> None:
    bad = [
        "eval(text)", "torch.load(path)", "np.load(path, allow_pickle=True)", "subprocess.run(x, shell=True)",
        "AutoTokenizer.from_pretrained(x)", "AutoModel.from_pretrained(x, trust_remote_code=False)", "pickle.load(f)",
        "PeftModel.from_pretrained(m, x)", "f(x, trust_remote_code=True)", "LLM(model=x, trust_remote_code=False)",
    ]  # fmt: skip
    assert [len(complaints(line)) for line in bad] == [1] * len(bad)


# --- import paths in cards --------------------------------------------------------------------------------------------

MODULE = """
import os
os.mkdir({flag!r})
from carl_gym.retrieval import Retriever
def reward(outcome): return 1.0
class Mine(Retriever): pass
"""
INDEX = 'id = "evil"\ndescription = ""\nkind = "evil_module:Mine"\n'
ENV = """
id = "evil/{id}-v0"
description = ""
index = {index}
turns = 4
top_k = 2
snippet_length = 80
page_length = 80
reward = {reward}
[data]
name = "miniwiki"
"""


@pytest.mark.parametrize(
    ("id", "index", "reward"),
    [("Reward", '"miniwiki-bm25"', '"evil_module:reward"'), ("Index", '"{folder}/evil.toml"', '"f1"')],
)
def test_a_card_cannot_have_a_module_beside_it_imported(tmp_path: Path, id: str, index: str, reward: str) -> None:
    folder, flag = tmp_path / "stranger", tmp_path / "ran"
    folder.mkdir()
    (folder / "evil_module.py").write_text(MODULE.format(flag=str(flag)))
    (folder / "evil.toml").write_text(INDEX)
    (folder / "env.toml").write_text(ENV.format(id=id, index=index.format(folder=folder), reward=reward))
    carl_gym.register_card(folder / "env.toml")
    with pytest.raises(CardError, match=r"'evil_module:.*' cannot be imported: No module named 'evil_module'"):
        carl_gym.make_task(f"evil/{id}-v0")
    # The same from the command line, as a stranger's folder would be tried out.
    command = [sys.executable, "scripts/evaluate.py", "--agents", "oracle", "--envs", str(folder / "env.toml")]
    done = subprocess.run(
        [*command, "--questions", "1", "--output-dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "cannot be imported" in done.stderr
    assert not flag.exists()


@pytest.mark.parametrize("reward", ["os:system", "subprocess:run", "builtins:eval", "builtins:exec", "pickle:loads"])
def test_what_is_installed_gets_no_text_of_the_card(reward: str) -> None:
    """A card may name any installed function. It is called with the outcome of an episode: no command, no code."""
    task = carl_gym.make_task("carl/MiniWiki-v0", reward=reward, questions=5)
    state = task.initial(next(iter(task.questions.values())))
    after = task.transition(state, "<answer>__import__('os')</answer>")
    with pytest.raises(TypeError):
        task.reward(state, "", after)


# --- indexes ----------------------------------------------------------------------------------------------------------

CORPUS = Corpus([Passage(f"p{n}", f"Title {n}", f"some words {n}") for n in range(5)])


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (self.flag,)


def arm(path: Path, flag: Path) -> None:
    """An array of objects, which numpy pickles."""
    np.save(path, np.array([Bomb(flag)], dtype=object), allow_pickle=True)


def test_arrays_of_a_bm25_index_are_numbers(tmp_path: Path) -> None:
    folder, flag = tmp_path / "index", tmp_path / "ran"
    folder.mkdir()
    BM25(CORPUS).save(folder)
    files = sorted(folder.glob("*.npy"))
    assert files
    for file in files:
        before = file.read_bytes()
        arm(file, flag)
        with pytest.raises(ValueError, match=r"[Oo]bject"):
            BM25.load(folder, CORPUS)
        file.write_bytes(before)
    assert not flag.exists()


def test_the_sample_of_a_dense_index_is_numbers(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    from carl_gym.retrieval.dense import Dense, DenseSettings

    index = faiss.IndexFlatIP(4)
    index.add(np.ones((5, 4), np.float32))
    Dense(CORPUS, DenseSettings(), index, np.ones((1, 4), np.float32)).save(tmp_path)
    assert Dense.load(tmp_path, CORPUS)
    arm(tmp_path / "sample.npy", tmp_path / "ran")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Dense.load(tmp_path, CORPUS)
    (tmp_path / "index.faiss").write_bytes(b"\x80\x04evil" * 10)
    (tmp_path / "size.json").write_text(json.dumps({"bytes": 60}))
    with pytest.raises(ValueError, match=r"index\.faiss"):
        Dense.load(tmp_path, CORPUS)
    assert not (tmp_path / "ran").exists()


def test_tables_of_a_mapped_corpus_are_numbers(tmp_path: Path) -> None:
    folder, flag = tmp_path / "mapped", tmp_path / "ran"
    map_corpus(CORPUS, folder)
    for file in sorted(folder.glob("*.npy")):
        arm(file, flag)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][file.name] = file.stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="damaged"):
        MappedCorpus(folder)
    assert not flag.exists()


def test_a_damaged_index_is_built_again_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user meets it: through the cache folder, whose manifest says what a stranger likes."""
    monkeypatch.setenv("CARL_GYM_CACHE", str(tmp_path))
    card = IndexCard("bm25", "", cache=True)
    expected = make_retriever(card, CORPUS).search(["words 3"], 2)
    (folder,) = tmp_path.glob("bm25-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in (folder / "index").glob("*.npy"):
        arm(file, tmp_path / "ran")
        manifest["files"][file.name]["bytes"] = file.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="damaged index, building it again"):
        assert make_retriever(card, CORPUS).search(["words 3"], 2) == expected
    assert not (tmp_path / "ran").exists()
