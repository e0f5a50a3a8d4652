"""The LLM judge against a real HTTP server that speaks the chat-completions protocol."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from carl_gym.envs.judge import Judge, JudgeSettings
from carl_gym.errors import ConfigError, JudgeError

Reply = tuple[int, object]


class Endpoint:
    """A chat-completions server; `answer` decides what each request gets."""

    def __init__(self, answer: Callable[[str], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.keys.append(self.headers.get("Authorization"))
                status, content = answer(body["messages"][0]["content"])
                if isinstance(content, str):
                    content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
                data = json.dumps(content).encode()
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def endpoints() -> Iterator[list[Endpoint]]:
    started: list[Endpoint] = []
    yield started
    for endpoint in started:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def start(endpoints: list[Endpoint], answer: Callable[[str], Reply], **settings: Any) -> tuple[Judge, Endpoint]:
    endpoints.append(Endpoint(answer))
    return Judge(JudgeSettings(endpoints[-1].url, "judge-1", **settings)), endpoints[-1]


def compares(prompt: str) -> Reply:
    """Says Correct where a line of the gold answers is the prediction."""
    golds = prompt.split("<gold_answers>\n")[1].split("\n</gold_answers>")[0].splitlines()
    prediction = prompt.split("<predicted_answer>\n")[1].split("\n</predicted_answer>")[0]
    return 200, "Correct" if prediction in golds else "Incorrect."


def test_a_verdict_is_asked_for_once_and_remembered(endpoints: list[Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    judge, endpoint = start(endpoints, compares, api_key_variable="SOME_KEY")
    with judge:
        assert judge.score("Who?", ["Ada", "Ada Lovelace"], "Ada Lovelace")
        assert judge.score("Who?", ["Ada", "Ada Lovelace"], "Ada Lovelace")
        assert not judge.score("Who?", ["Ada"], "Charles")
        assert not judge.score("Who?", ["Ada"], "  ")
    assert len(endpoint.requests) == 2 and endpoint.keys == ["Bearer secret"] * 2
    assert endpoint.requests[0]["temperature"] == 0 and endpoint.requests[0]["model"] == "judge-1"


def test_a_batch_keeps_its_order(endpoints: list[Endpoint]) -> None:
    judge, _ = start(endpoints, compares, concurrency=8)
    items = [(f"q{i}", [f"a{i}"], f"a{i}" if i % 3 else "wrong") for i in range(60)]
    assert judge.score_batch(items) == [bool(i % 3) for i in range(60)]


def test_what_stands_twice_in_a_batch_is_asked_once(endpoints: list[Endpoint]) -> None:
    def slow(prompt: str) -> Reply:
        time.sleep(0.05)  # so that all are on their way before the first verdict is there
        return compares(prompt)

    judge, endpoint = start(endpoints, slow, concurrency=8)
    assert judge.score_batch([("q", ["a"], "a"), ("q", ["a"], "b")] * 4) == [True, False] * 4
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("**Correct**", True), ("INCORRECT.", False), ("<think>Correct?</think>\nIncorrect", False), (" correct", True)],
)  # fmt: skip
def test_verdicts_are_read_without_decoration(endpoints: list[Endpoint], text: str, verdict: bool) -> None:
    judge, _ = start(endpoints, lambda _: (200, text))
    assert judge.score("q", ["a"], "b") is verdict


@pytest.mark.parametrize("text", ["", "Yes", "It is correct", "Correct or Incorrect", "not correct"])
def test_anything_else_is_no_verdict(endpoints: list[Endpoint], text: str) -> None:
    judge, _ = start(endpoints, lambda _: (200, text))
    with pytest.raises(JudgeError, match="neither Correct nor Incorrect"):
        judge.score("q", ["a"], "b")


def test_a_busy_endpoint_is_asked_again(endpoints: list[Endpoint]) -> None:
    replies = iter([(503, {}), (429, {}), (200, "Correct")])
    judge, endpoint = start(endpoints, lambda _: next(replies))
    assert judge.score("q", ["a"], "b")
    assert len(endpoint.requests) == 3


def test_failures_are_loud(endpoints: list[Endpoint]) -> None:
    judge, endpoint = start(endpoints, lambda _: (401, {"error": "no key"}))
    with pytest.raises(JudgeError, match=r"status 401.*check base_url, model and OPENAI_API_KEY"):
        judge.score("q", ["a"], "b")
    assert len(endpoint.requests) == 1  # trying again would not help
    judge, _ = start(endpoints, lambda _: (503, {}), retries=1)
    with pytest.raises(JudgeError, match="status 503"):
        judge.score("q", ["a"], "b")
    judge, _ = start(endpoints, lambda _: (200, {"something": "else"}))
    with pytest.raises(JudgeError, match="no chat completion"):
        judge.score("q", ["a"], "b")
    with pytest.raises(JudgeError, match="ConnectError"):
        Judge(JudgeSettings("http://127.0.0.1:9/v1", "m", retries=0)).score("q", ["a"], "b")


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"base_url": "localhost"}, {"concurrency": 0}, {"timeout": 0.0}, {"retries": -1}):
        with pytest.raises(ConfigError, match="judge: "):
            JudgeSettings(**{"base_url": "http://x", "model": "m"} | wrong)
