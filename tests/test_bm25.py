import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from carl_gym.envs.data import load_folder
from carl_gym.envs.registration import env_card
from carl_gym.retrieval import BM25, Corpus, Hit
from carl_gym.retrieval.corpus import Passage

PASSAGES = [
    Passage("p0", "Cats", "cats chase mice"),
    Passage("p1", "Dogs", "dogs chase cats, cats and cats"),
    Passage("p2", "Mice", "mice eat cheese"),
    Passage("p3", "The", "and of the"),  # nothing but stop words
]


@pytest.fixture(scope="module")
def animals() -> Corpus:
    return Corpus(PASSAGES)


def test_scores_are_bm25(animals: Corpus) -> None:
    """Lucene's BM25 of "cats", worked out: idf * tf / (tf + k1 (1 - b + b length / mean length))."""
    k1, b = 1.2, 0.75
    lengths = [4, 6, 4, 0]  # words of title and text without stop words
    idf = math.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    expected = {
        f"p{i}": idf * tf / (tf + k1 * (1 - b + b * lengths[i] / (sum(lengths) / 4))) for i, tf in ((0, 2), (1, 3))
    }
    (hits,) = BM25(animals, k1, b, cache=False).search(["cats"], 10)
    assert {hit.passage_id: hit.score for hit in hits} == pytest.approx(expected, rel=1e-5)
    assert [hit.passage_id for hit in hits] == sorted(expected, key=lambda id: -expected[id])


def test_words_match_by_stem_and_without_case(animals: Corpus) -> None:
    retriever = BM25(animals, cache=False)
    assert retriever.search(["CHASING cat"], 5) == retriever.search(["chase cats"], 5) != [[]]


@pytest.mark.parametrize("query", ["", "  ", "the of and", "zebra", "?!", "\x00", "a" * 100_000])
def test_a_query_without_matching_words_finds_nothing(animals: Corpus, query: str) -> None:
    assert BM25(animals, cache=False).search([query], 3) == [[]]


def test_only_passages_that_share_a_word_are_found(animals: Corpus) -> None:
    assert [hit.passage_id for hit in BM25(animals, cache=False).search(["cheese"], 10)[0]] == ["p2"]


def test_ties_keep_the_corpus_order_for_every_k() -> None:
    """Two groups of equal scores, mixed in the corpus: many enough for an unstable sort to show."""
    texts = ("same same words", "other words here", "same words here")
    corpus = Corpus(Passage(f"p{i:04d}", f"Page {i}", texts[i % 3]) for i in range(3000))
    retriever = BM25(corpus, cache=False)
    expected = [f"p{i:04d}" for group in (0, 2) for i in range(3000) if i % 3 == group]
    for k in (1, 7, 999, 1000, 1001, 1999, 2000, 2001, 5000):
        assert [hit.passage_id for hit in retriever.search(["same"], k)[0]] == expected[:k]


def test_a_batch_gives_what_single_queries_give(animals: Corpus) -> None:
    retriever = BM25(animals, cache=False)
    queries = ["cats", "", "mice cheese", "dogs", "cats"]
    assert retriever.search(queries, 2) == [retriever.search([query], 2)[0] for query in queries]
    assert retriever.search([], 2) == []


def test_a_corpus_of_stop_words_can_be_searched() -> None:
    assert BM25(Corpus([Passage("a", "The", "of the")]), cache=False).search(["the cat"], 3) == [[]]


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARL_GYM_CACHE", str(tmp_path))
    return tmp_path


def test_an_index_is_built_once_and_then_mapped_from_disk(animals: Corpus, cache: Path) -> None:
    built = BM25(animals).search(["cats and mice"], 5)
    (folder,) = folders(cache)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    loaded = BM25(animals)
    assert loaded.search(["cats and mice"], 5) == built == BM25(animals, cache=False).search(["cats and mice"], 5)
    assert isinstance(loaded._index.scores["data"].base, np.memmap)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_settings_and_corpus_have_indexes_of_their_own(animals: Corpus, cache: Path) -> None:
    BM25(animals)
    BM25(animals, k1=0.9)
    BM25(animals, b=0.4)
    BM25(Corpus(PASSAGES[:3]))
    assert len(folders(cache)) == 4


def test_a_damaged_index_is_built_again(animals: Corpus, cache: Path) -> None:
    good = BM25(animals).search(["cats"], 5)
    (folder,) = folders(cache)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:10])
        assert BM25(animals).search(["cats"], 5) == good
    path.unlink()
    assert BM25(animals).search(["cats"], 5) == good


def test_an_uncached_index_leaves_no_files(animals: Corpus, cache: Path) -> None:
    BM25(animals, cache=False)
    assert list(cache.iterdir()) == []


def _search(results: "multiprocessing.Queue[list[list[Hit]]]") -> None:
    results.put(BM25(Corpus(PASSAGES)).search(["cats"], 5))


def test_processes_that_build_at_once_end_with_one_whole_index(animals: Corpus, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[list[list[Hit]]] = context.Queue()
    workers = [context.Process(target=_search, args=(results,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [BM25(animals).search(["cats"], 5)] * 3
    assert len(list(cache.iterdir())) == 1


def test_gold_passages_of_hotpotqa_are_in_the_top_ten(hotpotqa_dir: Path) -> None:
    data = load_folder(hotpotqa_dir, "hotpotqa")
    index = env_card("carl/HotpotQA-v0").index
    hits = BM25(data.corpus, index.k1, index.b).search([question.text for question in data.questions], 10)
    recalls = [
        len({data.corpus[hit.passage_id].title for hit in found} & set(question.supporting_titles))
        / len(question.supporting_titles)
        for found, question in zip(hits, data.questions, strict=True)
    ]
    assert sum(recalls) / len(recalls) >= 0.87
