import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.errors import DataError
from carl_gym.retrieval import Corpus, MappedCorpus, Passage, map_corpus, mapped_corpus

PASSAGES = [
    Passage("a", "Åland", "An island."),
    Passage("7", "ÅLAND", "The same title again.\u2028One line."),
    Passage("", " ", ""),
    Passage("big", "Big", "x" * 1_000_000),
]

texts = st.text(st.characters(codec=None), max_size=20)


@pytest.fixture
def mapped(tmp_path: Path) -> MappedCorpus:
    return map_corpus(PASSAGES, tmp_path / "corpus")


def assert_equal(mapped: Corpus, corpus: Corpus, *strangers: str) -> None:
    assert list(mapped) == list(corpus)
    assert len(mapped) == len(corpus) and list(mapped.ids) == list(corpus.ids)
    assert mapped.fingerprint == corpus.fingerprint
    for passage in corpus:
        assert passage.id in mapped and mapped[passage.id] == passage
        assert mapped.by_title(passage.title) == corpus.by_title(passage.title)
    for text in strangers:
        assert (text in mapped) == (text in corpus)
        assert mapped.by_title(text) == corpus.by_title(text)


@given(st.lists(st.builds(Passage, texts, texts, texts), min_size=1, max_size=20, unique_by=lambda p: p.id), texts)
def test_a_mapped_corpus_behaves_as_the_one_in_memory(passages: list[Passage], stranger: str) -> None:
    with TemporaryDirectory() as folder:
        assert_equal(map_corpus(passages, Path(folder) / "corpus"), Corpus(passages), stranger)


def test_long_texts_empty_fields_and_repeated_titles_are_kept(mapped: MappedCorpus) -> None:
    assert_equal(mapped, Corpus(PASSAGES), "nobody", "åland ")
    with pytest.raises(KeyError):
        mapped["nobody"]
    assert 7 not in mapped


def test_ids_are_a_sequence(mapped: MappedCorpus) -> None:
    ids = mapped.ids
    assert (ids[0], ids[-1], ids[1:3], len(ids)) == ("a", "big", ["7", ""], 4)
    for i in (4, -5):
        with pytest.raises(IndexError):
            ids[i]


def test_keys_with_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_corpus, "key_hash", lambda key: len(key) % 2)
    passages = [Passage(f"p{i}", f"Title {i % 7}", str(i)) for i in range(20)]
    assert_equal(map_corpus(passages, tmp_path / "corpus"), Corpus(passages), "p20", "Title 8")
    with pytest.raises(DataError, match="two passages have the id 'p3'"):
        map_corpus([*passages, passages[3]], tmp_path / "twice")


def test_what_cannot_be_mapped_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="wiki: two passages have the id 'a'"):
        map_corpus([*PASSAGES, PASSAGES[0]], tmp_path / "corpus", source="wiki")
    with pytest.raises(DataError, match="wiki: the corpus is empty"):
        map_corpus([], tmp_path / "corpus", source="wiki")

    def broken() -> Iterator[Passage]:
        yield PASSAGES[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        map_corpus(broken(), tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


def _map_and_die(folder: Path) -> None:
    def killed() -> Iterator[Passage]:
        yield PASSAGES[0]
        os.kill(os.getpid(), signal.SIGKILL)

    map_corpus(killed(), folder)


def test_what_a_killed_run_left_is_deleted_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=_map_and_die, args=(tmp_path / "corpus",))
    killed.start()
    killed.join()
    (left,) = tmp_path.iterdir()
    running = left.with_name(left.name.replace(str(killed.pid), str(os.getppid())))
    other = tmp_path / f".corpus.elsewhere.{killed.pid}"
    running.mkdir()
    other.mkdir()
    map_corpus(PASSAGES, tmp_path / "corpus")
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", running.name, other.name}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/corpus: the passages cannot be mapped there .*CARL_GYM_CACHE"):
        map_corpus(PASSAGES, tmp_path / "file" / "corpus")


def test_a_damaged_or_unfinished_folder_is_refused(tmp_path: Path) -> None:
    for path in list(map_corpus(PASSAGES, tmp_path / "whole").folder.iterdir()):
        folder = map_corpus(PASSAGES, tmp_path / path.name).folder
        file = folder / path.name
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(DataError, match=str(folder)):
            MappedCorpus(folder)
        file.unlink()
        with pytest.raises(DataError, match=str(folder)):
            MappedCorpus(folder)
    manifest = tmp_path / "whole" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="written in format 99"):
        MappedCorpus(tmp_path / "whole")


def test_mapping_twice_is_fine_and_another_corpus_is_not_overwritten(mapped: MappedCorpus) -> None:
    assert map_corpus(PASSAGES, mapped.folder).fingerprint == mapped.fingerprint
    with pytest.raises(DataError, match="holds another corpus"):
        map_corpus(PASSAGES[:1], mapped.folder)
    assert [path.name for path in mapped.folder.parent.iterdir()] == ["corpus"]


def _look(corpus: Corpus, found: "multiprocessing.Queue[tuple[str, bool]]") -> None:
    maps = Path("/proc/self/maps")
    found.put((corpus["a"].text, not maps.exists() or "passages.bin" in maps.read_text()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_open_the_same_files(mapped: MappedCorpus, method: str) -> None:
    assert len(pickle.dumps(mapped)) < 1000
    context = multiprocessing.get_context(method)
    found: multiprocessing.Queue[tuple[str, bool]] = context.Queue()
    workers = [context.Process(target=_look, args=(mapped, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [found.get(timeout=60) for _ in workers] == [("An island.", True)] * 2
    for worker in workers:
        worker.join()
