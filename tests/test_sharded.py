"""A corpus in shards, each on a server of its own, is searched as the whole one is: exactly, or loudly not."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import gymnasium as gym
import httpx
import numpy as np
import pytest
from encoder_toys import WORDS, save_tiny_encoder
from hypothesis import example, given, settings
from hypothesis import strategies as st

import carl_gym  # noqa: F401  # registers the environments
from carl_gym.errors import ConfigError, DataError, RetrievalError
from carl_gym.retrieval import Corpus, Passage, Retriever, make_retriever, map_corpus, open_corpus
from carl_gym.retrieval import corpus as corpus_module
from carl_gym.retrieval import dense as dense_module
from carl_gym.retrieval.bm25 import BM25
from carl_gym.retrieval.corpus import Shard
from carl_gym.retrieval.dense import Dense, DenseSettings
from carl_gym.retrieval.remote import Remote, RemoteSettings, remote_corpus
from carl_gym.retrieval.server import create_app, serving

ROOT = Path(__file__).resolve().parents[1]
QUERIES = ["paris france", "cats", "", "dogs bark berlin"]


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """So that small corpora can be cut."""
    with blocks_of(4):
        yield


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (corpus_module, dense_module):
            patch.setattr(module, "BLOCK", size)
        yield


def corpus_of(count: int, seed: int = 0) -> Corpus:
    """So many passages; every seventh has the same title."""
    random = np.random.default_rng(seed)
    return Corpus(Passage(f"p{i}", f"cats {i % 7}", " ".join(random.choice(WORDS, 6))) for i in range(count))


def shard_of(corpus: Corpus, number: int, count: int, folder: Path) -> Corpus:
    shard = Shard(number, count, corpus.fingerprint, len(corpus))
    passages = list(corpus)
    return map_corpus([passages[row] for row in shard.rows], folder / shard.fingerprint, shard=shard)


def write(corpus: Corpus, path: Path) -> Path:
    path.write_text("".join(json.dumps(asdict(passage)) + "\n" for passage in corpus), encoding="utf-8")
    return path


@contextmanager
def served(*retrievers: Retriever) -> Iterator[list[str]]:
    """A real server for each; gives the URLs."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(create_app(retriever))) for retriever in retrievers]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseSettings:
    return DenseSettings(encoder=save_tiny_encoder(tmp_path_factory.mktemp("encoder")), max_tokens=32)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return corpus_of(50)


@pytest.fixture(scope="module")
def shards(corpus: Corpus, dense: DenseSettings, tmp_path_factory: pytest.TempPathFactory) -> list[Dense]:
    folder = tmp_path_factory.mktemp("shards")
    return [Dense.build(shard_of(corpus, number, 3, folder), dense) for number in range(3)]


@pytest.fixture(scope="module")
def urls(shards: list[Dense]) -> Iterator[list[str]]:
    with served(*shards) as urls:
        yield urls


# --- cutting a corpus -------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**9), st.data())
def test_every_row_is_in_one_shard_and_no_block_in_two(passages: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(-(-passages // 4), 100)))
    rows = [Shard(number, count, "", passages).rows for number in range(count)]
    assert [rows[0].start, *(part.stop for part in rows)] == [*(part.start for part in rows), passages]
    assert all(part.start % 4 == 0 for part in rows)
    assert min(map(len, rows)) >= 1 and max(map(len, rows)) - min(map(len, rows)) < 8


@pytest.mark.parametrize("form", ["plain", "gz", "mapped"])
def test_the_shards_of_a_file_are_the_corpus(
    corpus: Corpus, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARL_GYM_CACHE", str(tmp_path / "cache"))
    path = write(corpus, tmp_path / "corpus.jsonl")
    if form == "gz":
        path = tmp_path / "corpus.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "corpus.jsonl").read_bytes()))
    elif form == "mapped":
        path = map_corpus(corpus, tmp_path / "mapped").folder
    parts = [open_corpus(path, shard=f"{number}/3") for number in range(3)]
    assert [passage for part in parts for passage in part] == list(corpus)
    assert len({part.fingerprint for part in (*parts, corpus)}) == 4
    for number, part in enumerate(parts):
        shard = {"number": number, "count": 3, "corpus": corpus.fingerprint, "passages": 50}
        assert part.identity() == {"fingerprint": part.fingerprint, "passages": len(part), "shard": shard}
        again = open_corpus(part.folder)  # type: ignore[attr-defined]
        assert again.identity() == part.identity() == pickle.loads(pickle.dumps(part)).identity()
    with pytest.raises(ConfigError, match=r"is itself shard 1/3"):
        open_corpus(parts[1].folder, shard="0/2")  # type: ignore[attr-defined]
    (questions := tmp_path / "questions.jsonl").write_text('{"id": "q", "question": "Who?", "answers": ["cats"]}\n')
    with pytest.raises(DataError, match=r"is only shard 1/3 of a corpus; serve every shard"):
        gym.make("carl/SearchQA-v0", questions=str(questions), corpus=str(parts[1].folder))  # type: ignore[attr-defined]


def test_a_shard_that_cannot_be_is_refused(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARL_GYM_CACHE", str(tmp_path / "cache"))
    path = write(corpus, tmp_path / "corpus.jsonl")
    for wrong in ("3/3", "0/0", "2", "-1/3", "1/3/3", "a/b"):
        with pytest.raises(ConfigError, match=f"shard '{wrong}': expected NUMBER/COUNT"):
            open_corpus(path, shard=wrong)
    with pytest.raises(ConfigError, match=r"no shard 0/14 of 50 passages; .* blocks of 4 .* at most 13"):
        open_corpus(path, shard="0/14")
    assert [len(open_corpus(path, shard=f"{number}/13")) for number in (0, 12)] == [4, 2]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="of 0 passages"):
        open_corpus(tmp_path / "empty.jsonl", shard="0/1")
    with path.open("a") as file:
        file.write(json.dumps({"id": "p0", "title": "again", "text": "in another shard"}) + "\n")
    with pytest.raises(DataError, match=r"corpus.jsonl: two passages have the id 'p0'"):
        open_corpus(path, shard="1/3")


# --- searching it -----------------------------------------------------------------------------------------------------


texts = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)


@settings(max_examples=20, deadline=None)
@given(
    runs=st.lists(st.tuples(texts, st.integers(1, 40)), min_size=1, max_size=6),
    count=st.integers(1, 5),
    queries=st.lists(texts, max_size=25),
    k=st.integers(1, 50),
)
@example(runs=[("cats", 60), ("dogs", 2)], count=2, queries=[], k=4)
def test_shards_find_what_the_whole_corpus_finds(
    dense: DenseSettings, runs: list[tuple[str, int]], count: int, queries: list[str], k: int
) -> None:
    """The same passages, order and scores, with many ties, and with shards of fewer passages than are asked for."""
    bodies = [body for body, length in runs for _ in range(length)]
    corpus = Corpus(Passage(f"p{i}", "a", body) for i, body in enumerate(bodies))
    count = min(count, -(-len(corpus) // 4))
    queries = [*queries, f"a\n{bodies[-1]}"]  # is found last, and first
    with TemporaryDirectory() as folder:
        parts = [Dense.build(shard_of(corpus, i, count, Path(folder)), dense) for i in range(count)]
        with served(*parts) as urls:
            remote = make_retriever("remote", remote_corpus(";".join(reversed(urls))))
            assert remote.search(queries, k) == Dense.build(corpus, dense).search(queries, k)


def test_a_shard_may_have_several_servers_and_shards_any_order(
    corpus: Corpus, dense: DenseSettings, shards: list[Dense]
) -> None:
    expected = Dense.build(corpus, dense).search(QUERIES, 9)
    with served(*shards) as (zero, one, two):
        with served(shards[0]) as (other,):
            remote = Remote.build(remote_corpus(f"{two};{zero},{other};{one}"))
            for _ in range(4):
                assert remote.search(QUERIES, 9) == expected
        for retriever in (remote, pickle.loads(pickle.dumps(remote))):
            for _ in range(4):  # half of the requests would go to the one that is gone
                assert retriever.search(QUERIES, 9) == expected


def test_the_corpus_of_the_servers_is_the_whole_corpus(corpus: Corpus, urls: list[str]) -> None:
    remote = remote_corpus(";".join(reversed(urls)))
    assert (remote.fingerprint, len(remote)) == (corpus.fingerprint, len(corpus))
    assert Remote.build(remote).get(list(corpus.ids)) == list(corpus)
    assert "p49" in remote and "p50" not in remote
    assert remote.by_title("Cats 5") == corpus.by_title("cats 5") == corpus["p5"]
    assert remote.by_title("nowhere") is None
    with pytest.raises(KeyError):
        remote["p50"]


def test_what_a_search_brought_needs_no_second_request(urls: list[str]) -> None:
    corpus = remote_corpus(";".join(urls))
    ids = Remote.build(corpus).search(["cats"], 9).ids[0]

    def asked() -> list[str]:
        lines = [line for url in urls for line in httpx.get(f"{url}/metrics").text.splitlines()]
        return [line for line in lines if line.startswith('carl_requests_total{path="/passages",status="200"}')]

    before = asked()
    assert [corpus[id].id for id in ids] == ids
    assert asked() == before


def test_a_local_copy_of_the_whole_corpus_will_do(corpus: Corpus, dense: DenseSettings, urls: list[str]) -> None:
    remote = Remote(corpus, RemoteSettings(";".join(urls)))
    assert remote.search(QUERIES, 5) == Dense.build(corpus, dense).search(QUERIES, 5)
    with pytest.raises(RetrievalError, match="serves another corpus"):
        Remote(corpus_of(50, seed=1), RemoteSettings(";".join(urls)))


def test_clients_that_know_of_no_shards_search_through_a_server_that_joins_them(
    corpus: Corpus, dense: DenseSettings, urls: list[str]
) -> None:
    with served(make_retriever("remote", remote_corpus(";".join(urls)))) as (url,):
        answer = httpx.post(f"{url}/retrieve", json={"queries": QUERIES, "topk": 5}).json()["result"]
        assert httpx.get(f"{url}/info").json()["corpus"] == corpus.identity()
    assert [[row["id"] for row in rows] for rows in answer] == Dense.build(corpus, dense).search(QUERIES, 5).ids


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(shards: list[Dense], urls: list[str]) -> None:
    for named in (f"{urls[0]};{urls[2]}", urls[1]):
        with pytest.raises(RetrievalError, match=r"1/3 at|0/3 at") as error:
            remote_corpus(named)
        missing = {0, 1, 2} - {urls.index(url) for url in named.split(";")}
        listed = ", ".join(f"{number}/3" for number in sorted(missing))
        assert f"{len(missing)} of 3 shards of the corpus are missing: {listed}. There" in str(error.value)
        assert all(url in str(error.value) for url in named.split(";"))
    with served(shards[1]) as (gone,):
        corpus = remote_corpus(f"{urls[0]};{gone};{urls[2]}", retries=0)
        remote = Remote.build(corpus)
    for attempt in (lambda: remote.search(["cats"], 3), lambda: corpus["p7"], lambda: corpus.by_title("cats 1")):
        with pytest.raises(RetrievalError, match=f"shard 1/3 of the corpus failed: {gone}"):
            attempt()
    with pytest.raises(RetrievalError, match=rf"1 of 3 shards .* missing: 1/3\. .*{gone}/info failed in all of 1"):
        remote_corpus(f"{gone};{urls[0]};{urls[2]}", retries=0)


def test_a_server_that_comes_back_with_another_shard_is_refused(shards: list[Dense], urls: list[str]) -> None:
    """Among the servers of a shard, too, where one is asked when its turn comes."""
    message = r"corpus is not the one that we connected to|both serve shard 0/3"
    with served(shards[0]) as (wrong,), pytest.raises(RetrievalError, match=message):
        remote = Remote.build(remote_corpus(f"{urls[0]};{urls[1]},{wrong};{urls[2]}"))
        for _ in range(2):
            remote.search(["cats"], 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("corpus", r"serve shards of different corpora"),
        ("count", r"serve shards of different corpora, or of a corpus cut into different numbers"),
        ("settings", r"rank passages differently.*: max_tokens = 32 and 16; serve all shards by the same recipe"),
        ("weights", r"indexed by different encoders, both named"),
        ("duplicate", r"both serve shard 0/3; name the servers of each shard once"),
        ("whole", r"serves a whole corpus and no shard"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    corpus: Corpus, dense: DenseSettings, urls: list[str], tmp_path: Path, other: str, message: str
) -> None:
    part = shard_of(corpus, 1, 3, tmp_path)
    match other:
        case "corpus":
            odd = Dense.build(shard_of(corpus_of(50, seed=1), 1, 3, tmp_path), dense)
        case "count":
            odd = Dense.build(shard_of(corpus, 1, 4, tmp_path), dense)
        case "settings":
            odd = Dense.build(part, replace(dense, max_tokens=16))
        case "weights":
            odd = Dense.build(part, replace(dense, encoder=save_tiny_encoder(tmp_path / "other", seed=1)))
            odd.settings = dense  # as a folder of the same name on another machine
        case "duplicate":
            odd = Dense.build(shard_of(corpus, 0, 3, tmp_path), dense)
        case _:
            odd = Dense.build(corpus, dense)
    with served(odd) as (url,), pytest.raises(RetrievalError, match=message) as error:
        remote_corpus(f"{urls[0]};{url};{urls[2]}")
    assert url in str(error.value)


def test_retrievers_whose_scores_depend_on_all_passages_take_no_shard(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARL_GYM_CACHE", str(tmp_path / "cache"))
    part = shard_of(corpus, 1, 3, tmp_path)
    for recipe, name in (("bm25", "BM25"), ("hybrid", "Hybrid")):
        with pytest.raises(ConfigError, match=f"{name} cannot search shard 1/3 of a corpus"):
            make_retriever(recipe, part)
    with pytest.raises(ConfigError, match=r"BM25 cannot search shard 1/3"):
        create_app(BM25(part))


# --- as users do it ---------------------------------------------------------------------------------------------------


def run(script: str, *arguments: str | Path, folder: Path, cache: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"CARL_GYM_CACHE": str(folder / cache), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_machines_build_and_serve_a_shard_each_and_an_environment_searches_all(
    dense: DenseSettings, tmp_path: Path
) -> None:
    corpus, sizes = corpus_of(4100), (2048, 2052)
    path = write(corpus, tmp_path / "corpus.jsonl")
    (tmp_path / "tiny.toml").write_text(
        f'id = "tiny"\ndescription = ""\nkind = "dense"\n[settings]\nencoder = "{dense.encoder}"\nmax_tokens = 32\n'
    )
    (tmp_path / "questions.jsonl").write_text('{"id": "q", "question": "Who?", "answers": ["cats"]}\n')
    servers, urls = [], []
    try:
        for number in range(2):
            machine = {"folder": tmp_path, "cache": f"machine{number}"}
            built = run(
                "build_index.py", "tiny.toml", "--corpus", path, "--shard", f"{number}/2", "--verify", **machine
            )
            out, err = built.communicate(timeout=300)
            assert built.returncode == 0, err
            assert f"tiny over {sizes[number]:,} passages, shard {number}/2 of 4,100, in" in out
            serve = f"python scripts/serve_retrieval.py --index tiny.toml --corpus {path} --shard {number}/2"
            assert f"serve it: {serve}" in out
            (index,) = (tmp_path / f"machine{number}").glob("dense-*")
            manifest = json.loads((index / "manifest.json").read_text())
            assert manifest["corpus"]["shard"] == asdict(Shard(number, 2, corpus.fingerprint, 4100))
            servers.append(run("serve_retrieval.py", *serve.split()[2:], "--port", "0", **machine))
        for number, server in enumerate(servers):
            assert server.stdout is not None
            line = server.stdout.readline()
            assert f"{sizes[number]:,} passages, shard {number}/2 of corpus {corpus.fingerprint})" in line
            urls.append(line.split(" at ")[1].split()[0])
        with blocks_of(2048):  # as the scripts have them
            env = gym.make("carl/SearchQA-v0", questions=str(tmp_path / "questions.jsonl"), corpus=";".join(urls))
            retriever = env.unwrapped.task.retriever  # type: ignore[attr-defined]
            assert retriever.search(QUERIES, 5) == Dense.build(corpus, dense).search(QUERIES, 5)
        env.reset(seed=0)
        assert "Doc 1(Title: cats" in env.step("<search>cats</search>")[0]
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    for arguments in (("bm25", "--corpus", path), ("tiny.toml", "--env", "carl/MiniWiki-v0")):
        refused = run("build_index.py", *arguments, "--shard", "0/2", folder=tmp_path, cache="none")
        _, err = refused.communicate(timeout=120)
        assert refused.returncode == 2
        assert ("BM25 cannot search shard 0/2" if arguments[0] == "bm25" else "--env and --shard") in err
