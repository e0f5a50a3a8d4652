import builtins
import json
import math
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carl_gym.errors import ConfigError, RetrievalError
from carl_gym.retrieval import Corpus, Passage, SearchResults, bm25, make_retriever
from carl_gym.retrieval.analysis import analyze
from carl_gym.retrieval.bm25 import BM25, BM25Settings

PASSAGES = [
    Passage("p0", "Cats", "cats chase mice"),
    Passage("p1", "Dogs", "dogs chase cats, cats and cats"),
    Passage("p2", "Mice", "mice eat cheese"),
    Passage("p3", "The", "and of the"),  # nothing but stop words
]
QUERIES = ["cats", "", "mice cheese", "dogs", "cats chase cats", "unknown"]

passage_texts = st.lists(st.text("abcde ", max_size=30), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def animals() -> Corpus:
    return Corpus(PASSAGES)


@pytest.fixture(params=["numpy", "kernel"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way to search, whatever the sizes."""
    if request.param == "kernel":
        pytest.importorskip("numba", reason="the compiled search needs carl-gym[fast]")
    kernel = bm25._kernel() if request.param == "kernel" else None
    monkeypatch.setattr(bm25, "_kernel_for", lambda work: kernel)
    return str(request.param)


@pytest.fixture(params=["exact", "coarse first"])
def compiled(request: pytest.FixtureRequest) -> Callable[[pytest.MonkeyPatch], None]:
    """Switches to either compiled search, whatever the sizes."""
    pytest.importorskip("numba", reason="the compiled search needs carl-gym[fast]")

    def switch(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(bm25, "_kernel_for", lambda work: bm25._kernel())
        if request.param == "coarse first":
            patch.setattr(bm25, "COLUMNS_FROM", 0)
            patch.setattr(bm25, "COLUMNS_K", 0)

    return switch


def corpus_of(texts: list[str]) -> Corpus:
    return Corpus(Passage(str(i), "", text) for i, text in enumerate(texts))


def save(retriever: BM25, folder: Path) -> Path:
    folder.mkdir()
    retriever.save(folder)
    return folder


def test_scores_are_bm25(animals: Corpus, path: str) -> None:
    """Lucene's BM25 of "cats", worked out: idf * tf / (tf + k1 (1 - b + b length / mean length))."""
    k1, b = 1.2, 0.75
    lengths = [4, 6, 4, 0]  # words of title and text without stop words
    idf = math.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    expected = {
        f"p{i}": idf * tf / (tf + k1 * (1 - b + b * lengths[i] / (sum(lengths) / 4))) for i, tf in ((0, 2), (1, 3))
    }
    ids, scores = BM25(animals, BM25Settings(k1, b)).search(["cats"], 10)
    assert dict(zip(ids[0], scores[0], strict=True)) == pytest.approx(expected, rel=1e-5)
    assert ids == [sorted(expected, key=lambda id: -expected[id])]


def test_words_match_by_stem_and_without_case(animals: Corpus) -> None:
    retriever = BM25(animals)
    assert retriever.search(["CHASING cat"], 5) == retriever.search(["chase cats"], 5) != ([[]], [[]])


@pytest.mark.parametrize("query", ["", "  ", "the of and", "zebra", "?!", "\x00", "a" * 100_000])
def test_a_query_without_matching_words_finds_nothing(animals: Corpus, path: str, query: str) -> None:
    assert BM25(animals).search([query], 3) == ([[]], [[]])


def test_only_passages_that_share_a_word_are_found(animals: Corpus, path: str) -> None:
    assert BM25(animals).search(["cheese"], 10).ids == [["p2"]]


def test_ties_keep_the_corpus_order_for_every_k(path: str) -> None:
    """Two groups of equal scores, mixed in the corpus: many enough for an unstable sort to show."""
    texts = ("same same words", "other words here", "same words here")
    retriever = BM25(Corpus(Passage(f"p{i:04d}", f"Page {i}", texts[i % 3]) for i in range(3000)))
    expected = [f"p{i:04d}" for group in (0, 2) for i in range(3000) if i % 3 == group]
    for k in (1, 7, 999, 1000, 1001, 1999, 2000, 2001, 5000):
        assert retriever.search(["same"], k).ids == [expected[:k]]


def test_a_batch_gives_what_single_queries_give(animals: Corpus, path: str) -> None:
    retriever = BM25(animals)
    single = [retriever.search([query], 2) for query in QUERIES]
    assert retriever.search(QUERIES, 2) == ([s.ids[0] for s in single], [s.scores[0] for s in single])
    assert retriever.search([], 2) == ([], [])


def test_k_must_be_positive(animals: Corpus) -> None:
    with pytest.raises(ConfigError, match="k is 0"):
        BM25(animals).search(["cats"], 0)


def test_a_corpus_of_stop_words_can_be_searched(tmp_path: Path, path: str) -> None:
    retriever = BM25(Corpus([Passage("a", "The", "of the")]))
    assert retriever.search(["the cat"], 3).ids == [[]]
    assert BM25.load(save(retriever, tmp_path / "i"), retriever.corpus).search(["the cat"], 3).ids == [[]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=passage_texts,
    queries=st.lists(st.text("abcde ", max_size=12), min_size=1, max_size=5),
    k=st.integers(1, 40),
)
def test_the_compiled_search_equals_numpy_to_the_bit(
    compiled: Callable[[pytest.MonkeyPatch], None], texts: list[str], queries: list[str], k: int
) -> None:
    retriever = BM25(corpus_of(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25, "_kernel_for", lambda work: None)
        expected = retriever.search(queries, k)
        compiled(patch)
        assert retriever.search(queries, k) == expected


@pytest.mark.parametrize("k", [1, 5, 100, 2000, 5000])
@pytest.mark.parametrize("distinct", [40, 2000])
def test_common_terms_ties_and_repetitions_change_nothing_for_the_compiled_search(
    compiled: Callable[[pytest.MonkeyPatch], None], distinct: int, k: int
) -> None:
    """Words from everywhere to nowhere; with 40 distinct passages there are 50 of each, so every place is tied for."""
    rng = np.random.default_rng(distinct)
    share = 1 / np.arange(1, 301) ** 1.2
    texts = [" ".join(f"w{i}" for i in rng.choice(300, 20, p=share / share.sum())) for _ in range(distinct)]
    retriever = BM25(corpus_of([texts[i] for i in rng.permutation(2000) % distinct]))
    queries = [" ".join(f"w{i}" for i in rng.integers(0, 310, size)) for size in rng.integers(0, 15, 40)]
    queries += ["w0 w1 w2", "w0", "w299 w0", "w0 w0 w0 w250", "", "nothing"]  # common terms alone; rare with common
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25, "_kernel_for", lambda work: None)
        expected = retriever.search(queries, k)
        compiled(patch)
        for _ in range(2):  # again with what it remembers of the terms
            assert retriever.search(queries, k) == expected
    assert any(len(ids) == min(k, 2000) for ids in expected.ids) and expected.ids[-2:] == [[], []]


def test_coarse_scores_are_never_too_low_and_at_most_a_step_per_term_too_high() -> None:
    pytest.importorskip("numba", reason="the compiled search needs carl-gym[fast]")
    from carl_gym.retrieval import bm25_columns

    rng = np.random.default_rng(0)
    retriever = BM25(corpus_of([" ".join(f"w{i}" for i in rng.geometric(0.1, 12)) for _ in range(1000)]))
    data, indices, indptr, _ = retriever._index
    columns = bm25_columns.make_columns(data, indices, indptr, 1000)
    common = np.flatnonzero(columns.slots >= 0)
    assert 5 < len(common) < len(indptr) - 1
    for term in common:
        of_term = slice(indptr[term], indptr[term + 1])
        steps = columns.steps[columns.slots[term]]
        over = steps[indices[of_term]] - data[of_term] * columns.scale
        assert (over > -1e-3).all() and (over < 1 + 1e-3).all() and np.count_nonzero(steps) == len(over)
    assert not columns.steps[-1].any()


def test_a_query_of_more_terms_than_coarse_scores_hold_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the compiled search needs carl-gym[fast]")
    retriever = BM25(corpus_of([f"w{i} w{i % 7} w{i % 3}" for i in range(200)]))
    query = " ".join(f"w{i % 9}" for i in range(5000))
    monkeypatch.setattr(bm25, "_kernel_for", lambda work: None)
    expected = retriever.search([query, "w3"], 10)
    monkeypatch.setattr(bm25, "_kernel_for", lambda work: bm25._kernel())
    monkeypatch.setattr(bm25, "COLUMNS_FROM", 0)
    assert retriever.search([query, "w3"], 10) == expected


def test_titles_count_as_often_as_the_settings_say() -> None:
    corpus = Corpus([Passage("text", "Other", "cats cats"), Passage("title", "Cats", "other other")])
    best = {n: BM25(corpus, BM25Settings(title_weight=n)).search(["cats"], 1).ids for n in (1, 3)}
    assert best == {1: [["text"]], 3: [["title"]]}


@settings(max_examples=30, deadline=None)
@given(passage_texts)
def test_the_index_is_the_one_that_bm25s_builds(texts: list[str]) -> None:
    import bm25s

    corpus, index = corpus_of(texts), BM25(corpus_of(texts))._index
    vocabulary = index.vocabulary
    documents = [[vocabulary[t] for t in analyze(p.text)] for p in corpus]
    if not any(documents):
        return  # bm25s divides by the mean length
    reference = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    reference.index((documents, dict(vocabulary)), show_progress=False)  # it adds an empty term
    for term in vocabulary.values():
        mine, theirs = (slice(p[term], p[term + 1]) for p in (index.indptr, reference.scores["indptr"]))
        assert index.indices[mine].tolist() == reference.scores["indices"][theirs].tolist()
        np.testing.assert_allclose(index.data[mine], reference.scores["data"][theirs], rtol=1e-6)


def test_bm25s_opens_a_saved_index(animals: Corpus, tmp_path: Path) -> None:
    import bm25s

    retriever = BM25(animals)
    reference = bm25s.BM25.load(save(retriever, tmp_path / "i"), mmap=True, show_progress=False)
    rows, scores = reference.retrieve([["cat", "chase"]], k=2, show_progress=False)
    expected = retriever.search(["cats chase"], 2)
    assert [animals.ids[row] for row in rows[0]] == expected.ids[0]
    assert scores[0].tolist() == pytest.approx(expected.scores[0])


def test_parts_on_disk_give_the_index_and_a_killed_build_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpus_of([f"word{i % 7} word{i % 11} common the common{i}" for i in range(200)])
    expected = BM25(corpus)._index
    monkeypatch.setattr(bm25, "PART_TOKENS", 100)

    def kill(what: str, done: int, total: int) -> None:
        if done >= 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BM25.build(corpus, work=tmp_path, progress=kill)
    told: list[tuple[str, int, int]] = []
    index = BM25.build(corpus, work=tmp_path, progress=lambda *step: told.append(step))._index
    assert min(done for what, done, _ in told if what == "counting terms") > 100  # the finished parts were used
    assert told[-1] == ("scoring terms", len(index.vocabulary), len(index.vocabulary))
    assert index.vocabulary == expected.vocabulary
    for mine, theirs in zip(index[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["terms.npy", "rows.npy", "counts.npy", "lengths.npy", "terms.json"])
@pytest.mark.parametrize("damage", [lambda whole: b"\0" * len(whole), lambda whole: whole[: len(whole) // 2]])
def test_a_damaged_part_of_an_unfinished_build_is_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[bytes], bytes]
) -> None:
    corpus = corpus_of([f"word{i % 7} word{i % 11} common the common{i}" for i in range(200)])
    expected = BM25(corpus)._index
    monkeypatch.setattr(bm25, "PART_TOKENS", 100)
    BM25.build(corpus, work=tmp_path)
    (tmp_path / "part00000.99").mkdir()  # left by a process that was killed while it wrote
    file = tmp_path / "part00002" / name
    file.write_bytes(damage(file.read_bytes()))
    told: list[int] = []
    index = BM25.build(
        corpus, work=tmp_path, progress=lambda what, done, _: told.append(done) if what == "counting terms" else None
    )._index
    assert told[0] == 60  # the third part of 20 passages, and all that came after it
    assert index.vocabulary == expected.vocabulary
    for mine, theirs in zip(index[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["indices", "indptr"])
@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
def test_a_damaged_index_of_the_right_size_does_not_end_the_process(
    animals: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(bm25, "KERNEL_WORK", 0)
    folder = save(BM25(animals), tmp_path / "i")
    path = folder / f"{name}.csc.index.npy"
    array = np.load(path)
    array[1] = value
    array[2] = 1
    np.save(path, array)
    retriever = BM25.load(folder, animals)
    with pytest.raises(RetrievalError, match=f"{folder}: the index is damaged"):
        retriever.search(QUERIES, 5)


def test_a_loaded_index_is_mapped_and_finds_the_same(animals: Corpus, tmp_path: Path, path: str) -> None:
    built = BM25(animals)
    loaded = BM25.load(save(built, tmp_path / "i"), animals)
    assert loaded.search(QUERIES, 5) == built.search(QUERIES, 5)
    assert isinstance(loaded._index.data.base, np.memmap)
    assert loaded.describe() == built.describe() == {
        "retriever": "BM25", "k1": 0.9, "b": 0.4, "title_weight": 1,
    }  # fmt: skip


def test_files_that_do_not_fit_are_refused(animals: Corpus, tmp_path: Path) -> None:
    folder = save(BM25(animals), tmp_path / "i")
    with pytest.raises(ValueError, match="passages, k1 and b"):
        BM25.load(folder, Corpus(PASSAGES[:2]))
    with pytest.raises(ValueError, match="passages, k1 and b"):
        BM25.load(folder, animals, BM25Settings(k1=2.0))
    (folder / "vocab.index.json").write_text(json.dumps({"cat": 0}))
    with pytest.raises(ValueError, match="do not fit together"):
        BM25.load(folder, animals)
    for file in list(folder.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:10])
        with pytest.raises((OSError, ValueError)):
            BM25.load(folder, animals)
        file.write_bytes(whole)


def _search(retriever: BM25, found: "multiprocessing.Queue[tuple[SearchResults, bool]]") -> None:
    maps = Path("/proc/self/maps")
    found.put((retriever.search(QUERIES, 5), not maps.exists() or "data.csc.index.npy" in maps.read_text()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_map_one_file(animals: Corpus, tmp_path: Path, method: str) -> None:
    retriever = BM25.load(save(BM25(animals), tmp_path / "i"), animals)
    context = multiprocessing.get_context(method)
    found: multiprocessing.Queue[tuple[SearchResults, bool]] = context.Queue()
    workers = [context.Process(target=_search, args=(retriever, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [found.get(timeout=60) for _ in workers] == [(retriever.search(QUERIES, 5), True)] * 2
    for worker in workers:
        worker.join()


def test_an_index_in_memory_can_be_pickled(animals: Corpus) -> None:
    retriever = BM25(animals, BM25Settings(1.2, 0.75))
    copy = pickle.loads(pickle.dumps(retriever))
    assert copy.search(QUERIES, 5) == retriever.search(QUERIES, 5) and copy.settings == retriever.settings


def test_threads_search_at_once(path: str) -> None:
    retriever = BM25(corpus_of([f"word{i % 7} word{i % 11} word{i % 13}" for i in range(500)]))
    batches = [[f"word{i} word{i + 3}", f"word{i + 1}"] for i in range(10)] * 5
    expected = [retriever.search(batch, 5) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda batch: retriever.search(batch, 5), batches)) == expected


def test_without_numba_numpy_searches(animals: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = BM25(animals).search(QUERIES, 5)
    real: Callable[..., object] = builtins.__import__

    def no_numba(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == "numba":
            raise ImportError("no numba")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "carl_gym.retrieval.bm25_kernel", raising=False)
    monkeypatch.delattr("carl_gym.retrieval.bm25_kernel", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_numba)
    monkeypatch.setattr(bm25, "KERNEL_WORK", 0)
    bm25._kernel.cache_clear()
    try:
        assert bm25._kernel() is None
        assert BM25(animals).search(QUERIES, 5) == expected
    finally:
        bm25._kernel.cache_clear()


def test_gold_passages_of_hotpotqa_are_in_the_top_ten(hotpotqa_dir: Path) -> None:
    from carl_gym.envs.data import load_folder

    data = load_folder(hotpotqa_dir, "hotpotqa")
    found = make_retriever("bm25", data.corpus).search([question.text for question in data.questions], 10).ids
    recalls = [
        len({data.corpus[id].title for id in ids} & set(question.supporting_titles)) / len(question.supporting_titles)
        for ids, question in zip(found, data.questions, strict=True)
    ]
    assert sum(recalls) / len(recalls) >= 0.84  # measured 0.8485; 0.8687 with k1 = 1.2, b = 0.75
