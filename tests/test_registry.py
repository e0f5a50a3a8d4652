import json
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from carl_gym.cards import list_cards, load_card, make_card
from carl_gym.errors import CardError, RetrievalError
from carl_gym.retrieval import Corpus, Passage, make_retriever
from carl_gym.retrieval.builder import index_folder, read_manifest, verify_index
from carl_gym.retrieval.registry import IndexCard, retriever_class
from carl_gym.retrieval.retriever import Retriever, SearchResults

PASSAGES = [
    Passage("p0", "Cats", "cats chase mice"),
    Passage("p1", "Dogs", "dogs chase cats, cats and cats"),
    Passage("p2", "Mice", "mice eat cheese"),
]
CARD = IndexCard("test", "for tests", settings={"k1": 1.2, "b": 0.75})


@pytest.fixture(scope="module")
def animals() -> Corpus:
    return Corpus(PASSAGES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CARL_GYM_CACHE", str(folder))
    return folder


def indexes(cache: Path) -> list[Path]:
    """Built indexes and everything else but locks: a killed or finished build must leave nothing behind."""
    return sorted(path for path in cache.iterdir() if path.name != ".locks")


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_index_is_built_once_and_then_opened(animals: Corpus, cache: Path) -> None:
    calls: list[str] = []
    built = make_retriever(CARD, animals, lambda what, done, total: calls.append(what)).search(["cats and mice"], 5)
    (folder,) = indexes(cache)
    before = times(folder)
    calls.clear()
    again = make_retriever(CARD, animals, lambda what, done, total: calls.append(what)).search(["cats and mice"], 5)
    in_memory = retriever_class("bm25").build(animals, retriever_class("bm25").Settings(1.2, 0.75))
    assert again == built == in_memory.search(["cats and mice"], 5)
    assert built.ids[0][0] == "p0"
    assert times(folder) == before and not calls


def test_settings_corpora_and_formats_have_indexes_of_their_own(
    animals: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_retriever(CARD, animals)
    make_retriever(IndexCard("renamed", "other words, same index", settings={"k1": 1.2, "b": 0.75}), animals)
    assert len(indexes(cache)) == 1
    make_retriever(IndexCard("test", "", settings={"k1": 0.9, "b": 0.75}), animals)
    make_retriever(CARD, Corpus(PASSAGES[:2]))
    monkeypatch.setattr(retriever_class("bm25"), "FORMAT_VERSION", 1000)
    make_retriever(CARD, animals)
    assert len(indexes(cache)) == 4
    assert all(path.name.startswith("bm25-") for path in indexes(cache))


def test_an_uncached_index_leaves_no_files(animals: Corpus, cache: Path) -> None:
    make_retriever(IndexCard("test", "", cache=False), animals)
    assert not cache.exists()


def test_the_manifest_says_what_the_index_is(animals: Corpus, cache: Path) -> None:
    make_retriever(CARD, animals)
    (folder,) = indexes(cache)
    manifest = verify_index(folder)
    assert manifest == read_manifest(folder) == json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "bm25" and manifest["settings"] == {
        "k1": 1.2, "b": 0.75, "title_weight": 1,
    }  # fmt: skip
    assert manifest["corpus"] == {"fingerprint": animals.fingerprint, "passages": 3}
    assert "bm25s" in manifest["libraries"]
    files = {path.relative_to(folder / "index").as_posix() for path in (folder / "index").rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files


def test_damage_is_noticed_and_the_index_built_again(animals: Corpus, cache: Path) -> None:
    good = make_retriever(CARD, animals).search(["cats"], 5)
    (folder,) = indexes(cache)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        for damage in (b"", path.read_bytes()[: path.stat().st_size // 2], None):
            path.write_bytes(damage) if damage is not None else path.unlink()
            with pytest.warns(UserWarning, match="damaged index, building it again"):
                assert make_retriever(CARD, animals).search(["cats"], 5) == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_retriever(CARD, animals).search(["cats"], 5) == good
    assert indexes(cache) == [folder]


def test_changed_bytes_are_found_by_their_checksum(animals: Corpus, cache: Path) -> None:
    make_retriever(CARD, animals)
    (folder,) = indexes(cache)
    path = max((path for path in (folder / "index").iterdir()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read_manifest(folder)  # sizes are right
    with pytest.raises(RetrievalError, match=f"changed since it was built: {path.name}; delete"):
        verify_index(folder)
    path.unlink()
    with pytest.raises(RetrievalError, match=f"{path.name}: missing, expected {len(content)} bytes"):
        verify_index(folder)
    with pytest.raises(RetrievalError, match="no manifest of a built index"):
        verify_index(cache)


def test_a_cache_folder_that_cannot_be_written_is_named(
    animals: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CARL_GYM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RetrievalError, match="set CARL_GYM_CACHE to a folder that can be written"):
        make_retriever(CARD, animals)


def _search(results: "multiprocessing.Queue[tuple[SearchResults, bool]]", barrier: threading.Barrier) -> None:
    barrier.wait(60)
    built = False

    def progress(what: str, done: int, total: int) -> None:
        nonlocal built
        built = built or not what.startswith("waiting")

    found = make_retriever(IndexCard("test", "", kind="test_registry:Counting"), Corpus(PASSAGES), progress)
    results.put((found.search(["cats"], 5), built))


def test_processes_that_start_at_once_build_once(animals: Corpus, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[SearchResults, bool]] = context.Queue()
    barrier = context.Barrier(3)
    workers = [context.Process(target=_search, args=(results, barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert [result for result, _ in found] == [SearchResults([["p0"]], [[0.0]])] * 3
    assert sum(built for _, built in found) == 1
    assert len(indexes(cache)) == 1


class Counting(Retriever):
    """Builds in steps that it keeps in its working folder; may be stopped at one."""

    stop_at = -1
    steps: tuple[int, ...] = ()

    def search(self, queries, k):  # type: ignore[no-untyped-def]
        return SearchResults([self.corpus.ids[:1] and [self.corpus.ids[0]] for _ in queries], [[0.0] for _ in queries])

    @classmethod
    def build(cls, corpus, settings=None, *, work=None, progress=print):  # type: ignore[no-untyped-def]
        done = []
        for step in range(4):
            if work and (work / str(step)).exists():
                continue
            if step == cls.stop_at:
                raise KeyboardInterrupt
            done.append(step)
            if work:
                (work / str(step)).write_text("done")
            progress("counting", step + 1, 4)
        cls.steps = tuple(done)
        return cls(corpus, settings)

    def save(self, folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "steps").write_text("0123")

    @classmethod
    def load(cls, folder, corpus, settings=None):  # type: ignore[no-untyped-def]
        if (folder / "sub" / "steps").read_text() != "0123":
            raise ValueError("wrong content")
        return cls(corpus, settings)


@pytest.fixture
def counting() -> Iterator[type[Counting]]:
    import test_registry  # what the card imports: pytest's copy of this module may be another one

    cls: type[Counting] = test_registry.Counting
    yield cls
    cls.stop_at, cls.steps = -1, ()


def test_a_stopped_build_goes_on_from_what_is_done(animals: Corpus, cache: Path, counting: type[Counting]) -> None:
    card = IndexCard("test", "", kind="test_registry:Counting")
    counting.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        make_retriever(card, animals)
    folder = index_folder(card.kind, counting, counting.Settings(), animals)
    assert not folder.exists()
    counting.stop_at = -1
    make_retriever(card, animals)
    assert counting.steps == (2, 3)
    assert indexes(cache) == [folder] and folder.name.startswith("test-registry-Counting-")
    (folder / "index" / "sub" / "steps").write_text("9876")  # the right size; the class itself notices
    with pytest.warns(UserWarning, match="damaged index.*wrong content"):
        make_retriever(card, animals)
    assert counting.steps == (0, 1, 2, 3)
    verify_index(folder)


class OneMethod(Retriever):
    def search(self, queries, k):  # type: ignore[no-untyped-def]
        return SearchResults([list(self.corpus.ids[:k]) for _ in queries], [[1.0] * k for _ in queries])


def test_a_retriever_of_ones_own_needs_one_method_and_no_index(animals: Corpus, cache: Path) -> None:
    found = make_retriever(IndexCard("own", "", kind="test_registry:OneMethod"), animals)
    assert found.search(["x"], 2).ids == [["p0", "p1"]] and found.get(["p1"]) == [PASSAGES[1]]
    assert found.describe() == {"retriever": "OneMethod"}
    assert not cache.exists()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (
            IndexCard("x", "", settings={"b": 2.0}),
            r"index card x, \[settings\]: b = 2.0 \(float\); expected a number fr",
        ),
        (IndexCard("x", "", settings={"k": 1}), r"index card x, \[settings\]: unknown key 'k'.*known keys: k1, b"),
        (IndexCard("x", "", kind="bm52"), r"unknown retriever 'bm52'; one of bm25, dense.*package.module:Class"),
        (IndexCard("x", "", kind="nowhere:X"), "'nowhere:X' cannot be imported: No module named 'nowhere'"),
        (IndexCard("x", "", kind="json:X"), "'json:X' cannot be imported: .*has no attribute 'X'"),
        (IndexCard("x", "", kind="json:JSONDecoder"), "no Retriever; derive it from carl_gym.retrieval.Retriever"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_name(animals: Corpus, cache: Path, card: IndexCard, message: str) -> None:
    with pytest.raises(CardError, match=message):
        make_retriever(card, animals)
    assert not cache.exists()


def test_the_recipes_of_the_project_have_settings_that_their_classes_allow() -> None:
    from carl_gym.cards import make_card

    names = list_cards("retrieval_index")
    assert {"bm25", "miniwiki-bm25", "lucene", "wiki18-bm25", "wiki18-e5"} <= set(names)
    for name in names:
        card = load_card("retrieval_index", name, IndexCard)
        make_card(retriever_class(card.kind).Settings, card.settings, name)


def test_a_recipe_is_found_by_name_and_by_path(animals: Corpus, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('id = "own"\ndescription = ""\ncache = false\n[settings]\nk1 = 0.5\n')
    assert make_retriever(str(path), animals).settings.k1 == 0.5
    assert make_retriever("miniwiki-bm25", animals).settings.k1 == 1.2
    with pytest.raises(
        CardError, match=r"no card 'miniln' in retrieval_index/ \(did you mean 'minilm'\?\)|no card 'miniln'"
    ):
        make_retriever("miniln", animals)
    assert os.listdir(tmp_path) == ["own.toml"]


def test_settings_of_the_search_alone_share_an_index(animals: Corpus, cache: Path) -> None:
    from carl_gym.retrieval.dense import Dense, DenseSettings

    def folder(**settings: object) -> Path:
        made = make_card(DenseSettings, {"encoder": "some-encoder", **settings}, "test")
        return index_folder("dense", Dense, made, animals)

    assert folder() == folder(search="nprobe=8", query_prefix="query: ") != folder(index="HNSW32")
