"""The retrieval server, asked over real sockets by what the clients of others send and expect."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import requests
from server_toys import Gated, queries, towns

from carl_gym.errors import ConfigError
from carl_gym.retrieval.bm25 import BM25
from carl_gym.retrieval.corpus import join_contents
from carl_gym.retrieval.server import Limits, create_app, serving

CORPUS = towns()
DIRECT = BM25(CORPUS)
LIMITS = Limits(max_body_bytes=5000, max_queries=8, max_query_chars=100, max_topk=20)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_app(DIRECT, LIMITS)) as url:
        yield url


def test_the_search_r1_client_gets_what_it_expects(url: str) -> None:
    """LLMGenerationManager._batch_search and _passages2string of search_r1/llm_agent/generation.py."""
    asked = queries(5)
    answer = requests.post(f"{url}/retrieve", json={"queries": asked, "topk": 3, "return_scores": True}).json()
    texts = []
    for found in answer["result"]:
        text = ""
        for index, item in enumerate(found):
            content = item["document"]["contents"]
            title, body = content.split("\n")[0], "\n".join(content.split("\n")[1:])
            text += f"Doc {index + 1}(Title: {title}) {body}\n"
        texts.append(text)
    direct = DIRECT.search(asked, 3)
    assert [[item["score"] for item in found] for found in answer["result"]] == direct.scores
    for text, ids in zip(texts, direct.ids, strict=True):
        passages = [CORPUS[id] for id in ids]
        assert text == "".join(f'Doc {i}(Title: "{p.title}") {p.text}\n' for i, p in enumerate(passages, start=1))


def test_the_asearcher_client_gets_what_it_expects(url: str) -> None:
    """AsyncSearchBrowserClient.query_async and access_async of ASearcher/utils/search_utils.py."""
    asked = queries(4)
    answer = httpx.post(f"{url}/retrieve", json={"queries": asked, "topk": 3, "return_scores": False}).json()
    documents = [[row["contents"] for row in found] for found in answer["result"]]
    urls = [[row["url"] for row in found] for found in answer["result"]]
    direct = DIRECT.search(asked, 3)
    assert documents == [[join_contents(CORPUS[id]) for id in ids] for ids in direct.ids]
    pages = httpx.post(f"{url}/access", json={"urls": [*urls[0], "no such page"]}).json()["result"]
    assert [None if page is None else page["contents"] for page in pages] == [*documents[0], None]


def test_pages_open_by_title_as_well(url: str) -> None:
    (page,) = httpx.post(f"{url}/access", json={"urls": ["  town 0 "]}).json()["result"]
    assert page["id"] == "t0"


@pytest.mark.parametrize("topk", [{}, {"topk": None}, {"topk": 0}])
def test_the_singular_query_and_the_default_topk(url: str, topk: dict[str, int | None]) -> None:
    (query,) = queries(1)
    answer = requests.post(f"{url}/retrieve", json={"query": query, **topk}).json()
    assert [[row["id"] for row in found] for found in answer["result"]] == DIRECT.search([query], 3).ids


def test_no_queries_have_no_results(url: str) -> None:
    assert httpx.post(f"{url}/retrieve", json={"queries": []}).json() == {"result": []}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/retrieve", "{", 400, "not JSON"),
        ("/retrieve", b'{"queries": ["\xff"]}', 400, "not JSON"),
        ("/retrieve", "[1]", 422, "JSON object"),
        ("/retrieve", {}, 422, "'queries' is missing"),
        ("/retrieve", {"queries": "q"}, 422, "list of texts"),
        ("/retrieve", {"queries": ["q", 3]}, 422, "'queries' holds 3"),
        ("/retrieve", {"query": ["q"]}, 422, "'query' holds"),
        ("/retrieve", {"query": "q", "queries": ["q"]}, 422, "one of them"),
        ("/retrieve", {"queries": ["q"], "topk": 21}, 422, "max_topk"),
        ("/retrieve", {"queries": ["q"], "topk": -1}, 422, "1 to 20"),
        ("/retrieve", {"queries": ["q"], "topk": True}, 422, "whole number"),
        ("/retrieve", {"queries": ["q"], "topk": "3"}, 422, "whole number"),
        ("/retrieve", {"queries": ["q"], "return_scores": "yes"}, 422, "true or false"),
        ("/retrieve", {"queries": ["q"], "return_scores": []}, 422, "true or false"),
        ("/retrieve", {"queries": ["q"] * 9}, 422, "max_queries"),
        ("/retrieve", {"queries": ["q" * 101]}, 422, "max_query_chars"),
        ("/access", {"queries": ["q"]}, 422, "'urls' is missing"),
        ("/passages", {"ids": [1]}, 422, "'ids' holds 1"),
        ("/titles", {"titles": ["t"] * 9}, 422, "max_queries"),
        ("/retrieve", "q" * 5001, 413, "max_body_bytes"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    url: str, path: str, body: str | bytes | dict[str, object], status: int, message: str
) -> None:
    answer = httpx.post(url + path, content=json.dumps(body) if isinstance(body, dict) else body)
    assert answer.status_code == status
    assert message in answer.json()["detail"]


def test_a_body_of_unknown_length_is_limited_too(url: str) -> None:
    answer = httpx.post(f"{url}/retrieve", content=(b"q" * 1000 for _ in range(9)))
    assert answer.status_code == 413


def test_other_methods_and_paths_are_refused(url: str) -> None:
    assert httpx.get(f"{url}/retrieve").status_code == 405
    assert httpx.post(f"{url}/search").status_code == 404


def test_every_answer_names_its_corpus(url: str) -> None:
    answers = [
        httpx.get(f"{url}/healthz"),
        httpx.post(f"{url}/retrieve", json={"queries": ["kabel"]}),
        httpx.post(f"{url}/retrieve", json={}),
    ]
    assert [answer.headers["x-corpus-fingerprint"] for answer in answers] == [CORPUS.fingerprint] * 3


def test_info_says_what_is_served(url: str) -> None:
    info = httpx.get(f"{url}/info").json()
    assert info["corpus"] == {"fingerprint": CORPUS.fingerprint, "passages": len(CORPUS)}
    assert info["retriever"] == DIRECT.describe()
    assert info["limits"]["max_topk"] == 20


def test_metrics_count_requests_queries_and_batches() -> None:
    with serving(create_app(DIRECT, LIMITS)) as url:
        httpx.post(f"{url}/retrieve", json={"queries": ["kabel", "lodor"]})
        httpx.post(f"{url}/retrieve", json={"queries": "kabel"})
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    for line in (
        'carl_requests_total{path="/retrieve",status="200"} 1.0',
        'carl_requests_total{path="/retrieve",status="422"} 1.0',
        "carl_queries_total 2.0",
        "carl_batch_queries_sum 2.0",
        'carl_request_seconds_count{path="/retrieve"} 2.0',
        "carl_queue_queries 0.0",
        "carl_rejected_total 0.0",
    ):
        assert line in lines


def test_waiting_requests_are_searched_together_and_each_gets_its_own() -> None:
    retriever = Gated(CORPUS)
    retriever.gate.clear()

    def ask(number: int) -> list[str]:
        """With topk 2 or 3: their results differ in order."""
        body = {"queries": [f"q{number}"], "topk": 2 + number % 2}
        return [row["id"] for row in httpx.post(f"{url}/retrieve", json=body, timeout=30).json()["result"][0]]

    with serving(create_app(retriever)) as url, ThreadPoolExecutor(21) as threads:
        first = threads.submit(ask, 0)
        assert retriever.called.wait(10)
        others = [threads.submit(ask, number) for number in range(1, 21)]
        wait_until(lambda: "carl_queue_queries 21.0" in httpx.get(f"{url}/metrics").text)
        retriever.gate.set()
        assert first.result() == ["t0", "t1"]
        for number, other in enumerate(others, start=1):
            assert other.result() == (["t2", "t1", "t0"] if number % 2 else ["t0", "t1"])
    assert retriever.calls[0] == (["q0"], 2)
    assert sorted((len(texts), k) for texts, k in retriever.calls[1:]) == [(10, 2), (10, 3)]


def test_beyond_the_queue_requests_are_refused_at_once_and_none_that_was_taken_is_lost() -> None:
    retriever = Gated(CORPUS)
    retriever.gate.clear()
    with serving(create_app(retriever, Limits(max_queries=2, max_queue=4))) as url, ThreadPoolExecutor(2) as threads:
        post = lambda: httpx.post(f"{url}/retrieve", json={"queries": ["a", "b"]}, timeout=30)  # noqa: E731
        taken = [threads.submit(post) for _ in range(2)]
        wait_until(lambda: "carl_queue_queries 4.0" in httpx.get(f"{url}/metrics").text)
        refused = post()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "max_queue" in refused.json()["detail"]
        assert httpx.get(f"{url}/healthz").status_code == 200
        retriever.gate.set()
        assert [len(answer.result().json()["result"]) for answer in taken] == [2, 2]
        assert "carl_rejected_total 1.0" in httpx.get(f"{url}/metrics").text
        assert post().status_code == 200


def test_a_failed_search_is_an_error_and_fails_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    retriever = Gated(CORPUS)
    retriever.gate.clear()
    with serving(create_app(retriever)) as url, ThreadPoolExecutor(4) as threads:
        post = lambda query: httpx.post(f"{url}/retrieve", json={"query": query}, timeout=30)  # noqa: E731
        answers = [threads.submit(post, "first")]
        assert retriever.called.wait(10)
        answers += [threads.submit(post, query) for query in ("boom", "fine", "short")]
        wait_until(lambda: "carl_queue_queries 4.0" in httpx.get(f"{url}/metrics").text)
        retriever.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 500, 200, 500]
        assert "disk on fire" in answers[1].result().json()["detail"]
        assert "0 lists of ids" in answers[3].result().json()["detail"]
    assert "disk on fire" in caplog.text


def test_stopping_finishes_what_was_taken_and_takes_no_more() -> None:
    retriever = Gated(CORPUS)
    retriever.gate.clear()
    with ThreadPoolExecutor(1) as threads:
        with serving(create_app(retriever)) as url:
            taken = threads.submit(httpx.post, f"{url}/retrieve", json={"query": "a"}, timeout=30)
            assert retriever.called.wait(10)
            threading.Timer(0.5, retriever.gate.set).start()
        assert taken.result().status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_queue"):
        Limits(max_queries=10, max_queue=9)
    with pytest.raises(ConfigError, match="at least 1"):
        Limits(max_topk=0)
    with pytest.raises(ConfigError, match="topk = 21"):
        create_app(DIRECT, LIMITS, topk=21)


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
