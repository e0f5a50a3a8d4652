"""The client: as good as a local retriever while the server is right, and loud whenever it is not."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from server_toys import Gated, queries, towns

from carl_gym.envs.task import SearchTask
from carl_gym.errors import ConfigError, RetrievalError
from carl_gym.retrieval import Corpus, Passage, SearchResults, connection, make_retriever
from carl_gym.retrieval.bm25 import BM25, BM25Settings
from carl_gym.retrieval.corpus import join_contents, split_contents
from carl_gym.retrieval.remote import Remote, RemoteSettings, remote_corpus
from carl_gym.retrieval.server import Limits, create_app, serving
from carl_gym.retrieval.wire import passage_of, row

ROOT = Path(__file__).resolve().parents[1]
CORPUS = towns()
DIRECT = BM25(CORPUS)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_app(DIRECT, Limits(max_queries=16))) as url:
        yield url


@given(st.text(min_size=1), st.text(), st.text())
def test_a_row_gives_back_its_passage(id: str, title: str, text: str) -> None:
    passage = Passage(id, title, text)
    assert passage_of(json.loads(json.dumps(row(passage)))) == passage


@given(*[st.text(st.characters(exclude_characters="\n")), st.text()])
def test_contents_are_put_together_and_taken_apart_in_one_place(title: str, text: str) -> None:
    """As a file has them and as another server's rows have them: marks in and around a title stay."""
    passage = Passage("a", title, text.rstrip())
    contents = join_contents(passage)
    assert split_contents(contents) == (title, passage.text)
    assert passage_of({"id": "a", "contents": contents}) == passage


def test_results_and_passages_are_those_of_the_served_retriever(url: str) -> None:
    remote = make_retriever("remote", remote_corpus(url))
    asked = [*queries(40), "", "no-such-word", "\udc80 kabel"]  # more than the server takes at once
    assert remote.search(asked, 5) == DIRECT.search(asked, 5)
    assert remote.search([], 5) == ([], [])
    ids = list(CORPUS.ids)
    assert remote.get(ids[::-1]) == DIRECT.get(ids[::-1])
    assert remote.describe()["server_retriever"] == "BM25"


def test_a_remote_corpus_is_the_corpus(url: str) -> None:
    corpus = remote_corpus(url)
    assert (corpus.fingerprint, len(corpus)) == (CORPUS.fingerprint, len(CORPUS))
    assert corpus["odd/1?"] == CORPUS["odd/1?"]
    assert "t0" in corpus and "t99999" not in corpus and 3 not in corpus and "\udc80" not in corpus
    for title in ("town  7 ", "Town 0", 'The "Odd" One', "nowhere", "", "\udc80"):
        for _ in range(2):  # asked, then remembered
            assert corpus.by_title(title) == CORPUS.by_title(title)
    with pytest.raises(KeyError):
        corpus["t99999"]
    with pytest.raises(RetrievalError, match="does not list"):
        list(corpus)


def test_what_a_search_brought_needs_no_second_request(url: str) -> None:
    corpus = remote_corpus(url)
    ((ids,), _) = Remote.build(corpus).search(["kabel"], 5)
    served = 'carl_requests_total{path="/passages",status="200"}'
    before = next(line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(served))
    assert [corpus[id] for id in ids] == DIRECT.get(ids)
    assert before in httpx.get(f"{url}/metrics").text.splitlines()


def test_a_task_runs_on_a_remote_corpus_as_on_a_local_one(small_task: SearchTask) -> None:
    actions = ["<search>Charles Babbage</search>", "<access>Markup</access>", "<answer>Babbage</answer>"]

    def play(task: SearchTask) -> list[object]:
        state = task.initial(task.questions["q0"])
        seen: list[object] = []
        for action in actions:
            state = task.transition(state, action)
            seen += [state, task.observation(state)]
        return seen

    with serving(create_app(small_task.retriever)) as url:
        corpus = remote_corpus(url)
        task = SearchTask(
            list(small_task.questions.values()), corpus, Remote.build(corpus), small_task.card, small_task.source
        )
        assert play(task) == play(small_task)


def test_a_local_copy_of_the_corpus_will_do_but_no_other(url: str) -> None:
    remote = Remote(CORPUS, RemoteSettings(url))
    assert remote.search(["kabel"], 3) == DIRECT.search(["kabel"], 3)
    with pytest.raises(RetrievalError, match="another corpus"):
        Remote(towns(seed=5), RemoteSettings(url))


def test_copies_and_forks_have_connections_of_their_own(url: str) -> None:
    remote = Remote.build(remote_corpus(url))
    expected = DIRECT.search(["kabel lodor"], 3)
    assert remote.search(["kabel lodor"], 3) == expected
    assert pickle.loads(pickle.dumps(remote)).search(["kabel lodor"], 3) == expected
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=lambda: results.put((remote.search(["kabel lodor"], 3), remote.corpus["t5"])))
        for _ in range(3)
    ]
    for child in children:
        child.start()
    assert [results.get(timeout=20) for _ in children] == [(expected, CORPUS["t5"])] * 3
    for child in children:
        child.join()
    assert remote.search(["kabel lodor"], 3) == expected


def test_what_the_server_refuses_is_an_error_that_says_why(url: str) -> None:
    remote = Remote.build(remote_corpus(url))
    with pytest.raises(ConfigError, match="k is 0"):
        remote.search(["kabel"], 0)
    with pytest.raises(RetrievalError, match=r"422.*max_topk"):
        remote.search(["kabel"], 101)
    with pytest.raises(RetrievalError, match=r"422.*max_query_chars"):
        remote.search(["k" * 10_001], 3)


def test_a_failed_search_of_the_server_is_an_error_here() -> None:
    with serving(create_app(Gated(CORPUS))) as url:
        remote = Remote.build(remote_corpus(url))
        with pytest.raises(RetrievalError, match=r"500.*disk on fire"):
            remote.search(["boom"], 3)


def test_a_search_that_fails_on_one_of_two_servers_is_done_by_the_other() -> None:
    class Broken(Gated):
        broken = True

        def search(self, queries: Sequence[str], k: int) -> SearchResults:
            if self.broken:
                self.calls.append((list(queries), k))
                raise OSError("bad disk")
            return super().search(queries, k)

    one, two = Broken(CORPUS), Broken(CORPUS)
    with serving(create_app(one)) as first, serving(create_app(two)) as second:
        one.broken = two.broken = False
        remote = Remote.build(remote_corpus(f"{first},{second}", backoff=0.0))
        expected = remote.search(["kabel"], 3)
        one.broken = True
        one.calls.clear()
        for _ in range(6):
            assert remote.search(["kabel"], 3) == expected
        assert len(one.calls) == 1, "it is left alone for a while"
        two.broken = True
        with pytest.raises(RetrievalError, match=r"500.*bad disk"):
            remote.search(["lodor"], 3)


def test_a_server_that_has_too_much_to_do_is_not_broken() -> None:
    """Of two one has a bad disk, and the other no room for one request."""
    answers = {"one": [503, 200], "two": [500] * 5}
    turns: list[str] = []

    def scripted(name: str, app):
        async def answer(scope, receive, send):
            status = answers[name].pop(0) if scope.get("path") == "/retrieve" and ready.is_set() else 200
            if status == 200:
                return await app(scope, receive, send)
            turns.append(name)
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return answer

    ready = threading.Event()
    with serving(scripted("one", create_app(DIRECT))) as one, serving(scripted("two", create_app(DIRECT))) as two:
        remote = Remote.build(remote_corpus(f"{one},{two}", backoff=0.0))
        expected = remote.search(["kabel"], 3)
        ready.set()
        assert remote.search(["kabel"], 3) == expected
        assert "one" in turns and answers["one"] == []


def test_nobody_there_is_an_error_that_names_the_address() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RetrievalError, match=f"{address}.*3 attempts.*ConnectError"):
        remote_corpus(address, retries=2, backoff=0.0)


def test_urls_are_checked() -> None:
    with pytest.raises(ConfigError, match="no URL"):
        remote_corpus("localhost:8000")
    for wrong in (
        "http://",
        "http://:80",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://[::1",
        "http://a\nb",
    ):
        with pytest.raises(ConfigError, match="no URL"):
            remote_corpus(wrong, retries=0)
    with pytest.raises(ConfigError, match="no server"):
        make_retriever("remote", CORPUS)


def test_a_server_that_hangs_is_given_up() -> None:
    retriever = Gated(CORPUS)
    with serving(create_app(retriever)) as url:
        remote = Remote.build(remote_corpus(url, timeout=0.2, retries=1, backoff=0.0))
        retriever.gate.clear()
        with pytest.raises(RetrievalError, match=r"2 attempts.*ReadTimeout"):
            remote.search(["a"], 3)
        retriever.gate.set()


def test_one_of_two_servers_that_hangs_costs_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its rest it is asked for its health, not for results; it has work again once it is well."""
    monkeypatch.setattr(connection, "REST", 0.1)
    monkeypatch.setattr(connection, "HEALTH", 0.1)
    asked: list[str] = []
    hangs = threading.Event()

    def stubborn(app):
        async def answer(scope, receive, send):
            asked.append(scope.get("path", ""))
            while hangs.is_set() and scope["type"] == "http":
                await asyncio.sleep(0.01)
            await app(scope, receive, send)

        return answer

    with serving(create_app(DIRECT)) as one, serving(stubborn(create_app(DIRECT))) as two:
        remote = Remote.build(remote_corpus(f"{one},{two}", timeout=1.0, backoff=0.0))
        expected = remote.search(["kabel"], 3)
        hangs.set()
        asked.clear()
        for _ in range(20):
            assert remote.search(["kabel"], 3) == expected
            time.sleep(0.05)
        assert asked.count("/retrieve") == 1 and "/healthz" in asked
        hangs.clear()
        while asked.count("/retrieve") < 2:
            assert remote.search(["kabel"], 3) == expected


def test_the_timeout_is_for_an_attempt_as_a_whole() -> None:
    """A server whose every piece comes soon, and whose answer never ends in time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "40")
            self.end_headers()
            for _ in range(40):
                time.sleep(0.1)
                try:
                    self.wfile.write(b" ")
                except OSError:  # the client has gone
                    return

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    with pytest.raises(RetrievalError, match=r"1 attempts.*ReadTimeout"):
        remote_corpus(f"http://127.0.0.1:{server.server_port}", timeout=0.5, retries=0)
    server.shutdown()
    server.server_close()


def test_no_socket_is_left_open_at_exit(url: str) -> None:
    code = "import sys; from carl_gym.retrieval.remote import remote_corpus; kept = remote_corpus(sys.argv[1])"
    run = subprocess.run([sys.executable, "-X", "dev", "-c", code, url], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "ResourceWarning" not in run.stderr, run.stderr


@pytest.mark.parametrize("what", ["corpus", "retriever"])
def test_a_server_that_comes_back_as_another_is_refused(what: str) -> None:
    port = free_port()
    with serving(create_app(DIRECT), port=port) as url:
        corpus = remote_corpus(url, backoff=0.01)
        remote = Remote.build(corpus)
        remote.search(["kabel"], 3)
    other = BM25(towns(seed=5)) if what == "corpus" else BM25(CORPUS, BM25Settings(k1=2.0))
    with serving(create_app(other), port=port):
        for attempt in (lambda: remote.search(["kabel"], 3), lambda: corpus["t250"], lambda: corpus.by_title("Town 9")):
            with pytest.raises(RetrievalError, match=f"{what} is not the one"):
                attempt()
    with serving(create_app(DIRECT), port=port):
        assert remote.search(["kabel"], 3) == DIRECT.search(["kabel"], 3)


def test_several_servers_share_the_work_and_do_each_other_s() -> None:
    counts = [0, 0]

    def counted(app, number):
        async def count(scope, receive, send):
            counts[number] += scope["type"] == "http" and scope["path"] == "/retrieve"
            await app(scope, receive, send)

        return count

    expected = DIRECT.search(["kabel", "north"], 3)
    with serving(counted(create_app(DIRECT), 0)) as one:
        with serving(counted(create_app(DIRECT), 1)) as two:
            corpus = remote_corpus(f"{one},{two}", backoff=20.0)
            remote = Remote.build(corpus)
            for _ in range(10):
                assert remote.search(["kabel", "north"], 3) == expected
            assert counts == [5, 5]
            copied = pickle.loads(pickle.dumps(remote))
        started = time.monotonic()
        for retriever in (remote, copied):  # half of their requests would go to the one that is gone
            for _ in range(4):
                assert retriever.search(["kabel", "north"], 3) == expected
        assert counts == [13, 5]
        assert time.monotonic() - started < 15, "no pause while another server is up"


def test_a_server_of_other_passages_among_several_is_refused() -> None:
    with serving(create_app(DIRECT)) as one, serving(create_app(BM25(towns(seed=5)))) as two:
        remote = Remote.build(remote_corpus(f"{one},{two}"))
        with pytest.raises(RetrievalError, match=r"corpus is not the one that we connected to"):
            for _ in range(2):
                remote.search(["kabel"], 3)
    with pytest.raises(ConfigError, match="names a server twice"):
        remote_corpus(f"{one}, {one}/retrieve")


INFO = {
    "corpus": {"fingerprint": CORPUS.fingerprint, "passages": len(CORPUS)},
    "retriever": {"retriever": "X"},
    "retriever_fingerprint": "x",
    "limits": asdict(Limits()),
}
HEADERS = {"x-corpus-fingerprint": CORPUS.fingerprint, "x-retriever-fingerprint": "x"}
ROW = {"id": "t0", "title": "Town 0", "contents": '"Town 0"\ntext'}
HIT = {"document": ROW, "score": 1.0}


@pytest.mark.parametrize("api", ["carl", "search-r1"])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("<html>", "not JSON"),
        ("", "not JSON"),
        ([], "JSON object"),
        ({}, "'result'"),
        ({"result": None}, "'result'"),
        ({"result": []}, "list of 1"),
        ({"result": [[], []]}, "list of 1"),
        ({"result": [None]}, "list of results"),
        ({"result": [{"0": HIT}]}, "list of results"),
        ({"result": [[ROW]]}, "with a score"),
        ({"result": [[{"document": ROW, "score": "1"}]]}, "with a score"),
        ({"result": [[{"document": ROW, "score": None}]]}, "with a score"),
        ({"result": [[{"document": "t0", "score": 1.0}]]}, "'contents'"),
        ({"result": [[{"document": {"id": "t0"}, "score": 1.0}]]}, "'contents'"),
        ({"result": [[{"document": {"id": [], "contents": "x"}, "score": 1.0}]]}, "an id"),
        ({"result": [[HIT] * 4]}, "4 results"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(api: str, answer: object, message: str) -> None:
    with scripted([(200, {}, answer)]) as (url, _):
        remote = Remote.build(remote_corpus(url, api=api))
        with pytest.raises(RetrievalError, match=message):
            remote.search(["kabel"], 3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {}, {"result": [[HIT, HIT]]}), "twice"),
        ((200, {"x-corpus-fingerprint": None}, {"result": [[HIT]]}), "header x-corpus-fingerprint is missing"),
        ((404, {}, {"detail": "Not Found"}), "404: Not Found; is this the URL"),
        ((500, {}, "Internal Server Error"), "500: Internal"),
        ((307, {"location": "/elsewhere"}, ""), "307"),
    ],
)
def test_our_servers_are_held_to_more(answer: tuple[int, dict[str, str | None], object], message: str) -> None:
    with scripted([answer]) as (url, _):
        remote = Remote.build(remote_corpus(url))
        with pytest.raises(RetrievalError, match=message):
            remote.search(["kabel"], 3)


def test_answers_cut_short_and_passages_mixed_up_are_errors() -> None:
    with scripted([(200, {"content-length": "1000"}, {"result": [[HIT]]})] * 2) as (url, asked):
        remote = Remote.build(remote_corpus(url, retries=1, backoff=0.0))
        with pytest.raises(RetrievalError, match="2 attempts"):
            remote.search(["kabel"], 3)
        assert len(asked) == 2
    with scripted([(200, {}, {"result": [ROW]})]) as (url, _), pytest.raises(RetrievalError, match="another passage"):
        remote_corpus(url)["t1"]


def test_a_busy_server_is_asked_again_when_it_says() -> None:
    script = [(503, {"retry-after": "1"}, {"detail": "full"}), (502, {}, ""), (200, {}, {"result": [[HIT]]})]
    with scripted(script) as (url, asked):
        remote = Remote.build(remote_corpus(url, backoff=0.0))
        assert remote.search(["kabel"], 3).ids == [["t0"]]
    assert len(asked) == 3
    assert asked[1] - asked[0] >= 1.0


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_plain_search_r1_server_will_do(with_ids: bool) -> None:
    """One in the manner of search_r1/search/retrieval_server.py; rows of its Lucene index have no id."""
    app = FastAPI()

    @app.post("/retrieve")
    def retrieve(request: QueryRequest) -> dict[str, object]:
        found = DIRECT.search(request.queries, request.topk)
        rows = [
            [{"contents": join_contents(CORPUS[id])} | ({"id": id} if with_ids else {}) for id in ids]
            for ids in found.ids
        ]
        scored = [
            [{"document": row, "score": score} for row, score in zip(one, scores, strict=True)]
            for one, scores in zip(rows, found.scores, strict=True)
        ]
        return {"result": scored}

    with serving(app) as url:
        corpus = remote_corpus(f"{url}/retrieve")
        remote = Remote.build(corpus)
        ids, scores = remote.search(["town 7 kabel"], 5)
        expected = DIRECT.search(["town 7 kabel"], 5)
        assert scores == expected.scores
        assert not with_ids or ids == expected.ids
        assert [(p.title, p.text) for p in remote.get(ids[0])] == [
            (p.title, p.text) for p in DIRECT.get(expected.ids[0])
        ]
        page, other = corpus.by_title("town 7"), corpus.by_title("No Such Town")
        assert (page and page.text, other) == (CORPUS["t7"].text, None)
        assert "never" not in corpus
        with pytest.raises(RetrievalError, match="Search-R1 server cannot be asked"):
            corpus["never"]


class QueryRequest(BaseModel):
    """Search-R1's."""

    queries: list[str]
    topk: int = 3
    return_scores: bool = False


def test_ten_thousand_requests_survive_a_server_that_is_killed(tmp_path: Path) -> None:
    """64 clients at once; the server is killed in the middle and comes back. None lost, none wrong."""
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(asdict(passage)) + "\n" for passage in CORPUS), encoding="utf-8")
    port = free_port()
    clients, each = 64, 157
    asked = queries(500)
    local = make_retriever("bm25", Corpus.load(file)).search(asked, 3)
    process = start_server(file, port)
    done, wrong, failed = threading.Semaphore(0), [], []
    try:

        def client(number: int) -> int:
            remote = Remote.build(remote_corpus(f"http://127.0.0.1:{port}", retries=20))
            for i in range(number * each, (number + 1) * each):
                query = i % len(asked)
                try:
                    found = remote.search([asked[query]], 3)
                except RetrievalError as error:
                    failed.append(error)
                else:
                    if found != ([local.ids[query]], [local.scores[query]]):
                        wrong.append(found)
                done.release()
            return each

        with ThreadPoolExecutor(clients) as threads:
            counts = [threads.submit(client, number) for number in range(clients)]
            for _ in range(4000):
                done.acquire()
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start_server(file, port)
            assert sum(count.result() for count in counts) == clients * each >= 10_000
        assert (wrong, failed) == ([], [])
    finally:
        process.kill()
        process.wait()


def start_server(file: Path, port: int) -> subprocess.Popen[str]:
    """scripts/serve_retrieval.py, ready."""
    command = [sys.executable, "scripts/serve_retrieval.py", "--corpus", str(file), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def scripted(answers: list[tuple[int, dict[str, str | None], object]]) -> Iterator[tuple[str, list[float]]]:
    """A server that gives /info and then these answers, whatever it is asked; and when it was asked."""
    left = list(answers)
    asked: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {}, INFO)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(time.monotonic())
            self.answer(*left.pop(0))

        def answer(self, status: int, headers: dict[str, str | None], body: object) -> None:
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            for name, value in ({"content-length": str(len(data))} | HEADERS | headers).items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
