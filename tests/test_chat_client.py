"""Servers that fail, hang or talk nonsense, limits and many requests at once, over real HTTP (openai_toys)."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from openai_toys import TOOLS, Body, ChatServer, Reply, ask, error, message, starting

from carl_gym.agents import chat_client
from carl_gym.agents.chat_client import Pacer
from carl_gym.agents.openai_policy import openai_agent
from carl_gym.agents.policy import SampleRequest
from carl_gym.envs.protocol import parse
from carl_gym.envs.state import ParsedAction
from carl_gym.errors import CardError, ConfigError, PolicyError


@pytest.fixture
def start():
    with starting() as start:
        yield start


FINE = message("", ("read", {}))


@pytest.mark.parametrize(
    "fault",
    [
        error(500, "oops"),
        error(503, "busy", Retry_After="0"),
        error(429, "slow down", Retry_After="0.001"),
        error(429, "slow down", Retry_After="Thu, 01 Jan 1970 00:00:00 GMT"),
        error(429, "slow down", Retry_After="soon"),
        error(408, "too slow"),
        error(409, "conflict"),
        Reply(b"<html>hello</html>"),
        Reply(b""),
        Reply(b'{"choices": [{"message"'),
        Reply(b"[" * 100_000),
        Reply(FINE.body, cut=10),
        Reply({"choices": []}),
        Reply({"choices": None}),
        Reply({"error": {"message": "upstream failed"}}),
        Reply([1]),
        Reply({"choices": [{"message": "hello"}]}),
        Reply({"choices": [{"text": "hello"}]}),
        Reply({"choices": [{"message": {"content": ["part"]}}]}),
        Reply({"choices": [{"message": {"content": "", "tool_calls": "search"}}]}),
        Reply({"choices": [{"message": {"content": "", "tool_calls": [{"name": "search"}]}}]}),
        Reply({"choices": [{"message": {"content": "", "tool_calls": [{"function": {"name": 3}}]}}]}),
        Reply(b'{"choices": []}', headers={"Content-Encoding": "gzip"}),
    ],
)
def test_what_another_attempt_mends(start, fault):
    policy, transcript, server = start(lambda body, number: FINE if number == 2 else fault)
    assert parse(ask(policy, transcript).text) == ParsedAction("read")
    assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]
    assert (policy.usage.requests, policy.usage.retries, policy.usage.prompt_tokens) == (3, 2, 7)
    policy, transcript, server = start(lambda *_: fault, retries=1)
    with pytest.raises(PolicyError, match="no answer after 2 attempts"):
        ask(policy, transcript)
    assert len(server.bodies) == 2


@pytest.mark.parametrize("fault", [Reply(hang=True), Reply(b"{", drip=True)])
def test_a_server_that_hangs_or_never_ends(start, fault):
    policy, transcript, _ = start(lambda *_: fault, timeout=0.2, retries=2)
    with pytest.raises(PolicyError, match=r"after 3 attempts.*no reply within 0.2 s.*raise retries, timeout"):
        ask(policy, transcript)
    policy, transcript, _ = start(lambda *_: fault, timeout=60, deadline=0.2)
    with pytest.raises(PolicyError, match=r"after 1 attempts.*no reply within 0.2 s"):
        ask(policy, transcript)
    policy, transcript, server = start(lambda *_: fault, timeout=0.2, deadline=0.5, retries=100)
    with pytest.raises(PolicyError, match="no answer after"):
        ask(policy, transcript)
    assert len(server.bodies) <= 3
    policy, transcript, _ = start(lambda body, number: fault if number == 0 else FINE, timeout=0.5)
    assert parse(ask(policy, transcript).text) == ParsedAction("read")


@pytest.mark.parametrize("after", ["3600", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_pause_that_the_server_asks_for_is_kept_or_not_begun(start, after):
    policy, transcript, server = start(lambda *_: error(429, "tomorrow", Retry_After=after), deadline=60)
    with pytest.raises(PolicyError, match="after 1 attempts, at last: status 429: tomorrow"):
        ask(policy, transcript)
    assert len(server.bodies) == 1


def test_pauses_are_drawn_from_the_requests_seed(start, caplog):
    def pauses(seed: int) -> list[float]:
        policy, transcript, _ = start(lambda *_: error(500, "oops"), retries=5, backoff=0.002)
        caplog.clear()
        with pytest.raises(PolicyError):
            policy.sample([SampleRequest(transcript.prompt("Who?"), seed=seed)])
        return [record.args[2] for record in caplog.records if record.name == chat_client.__name__]

    first = pauses(1)
    assert first == pauses(1) != pauses(2) and len(first) == 5
    assert all(0 <= pause <= 0.002 * 2**n for n, pause in enumerate(first))


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "check the key"), (404, "base_url and model"), (308, "base_url"), (400, "omit")]
)
def test_refusals_come_out_at_once_and_never_show_the_key(start, status, hint, monkeypatch, caplog):
    monkeypatch.setenv("TOY_KEY", "sk-secret")
    refusal = error(status, "Incorrect: sk-secret")
    policy, transcript, server = start(lambda *_: refusal, api_key_variable="TOY_KEY")
    with caplog.at_level(logging.DEBUG), pytest.raises(PolicyError, match=hint) as caught:
        ask(policy, transcript)
    assert len(server.bodies) == 1 and f"status {status}: Incorrect: [the API key]" in str(caught.value)
    server_fault = start(lambda *_: error(500, "sk-secret again"), api_key_variable="TOY_KEY", retries=1)
    with caplog.at_level(logging.DEBUG), pytest.raises(PolicyError, match="again"):
        ask(*server_fault[:2])
    assert "again; attempt 2" in caplog.text
    assert "sk-secret" not in caplog.text + repr(policy) + str(policy.settings) + str(vars(policy)) + repr(caught)


def test_nobody_listens_at_the_address():
    with ChatServer(lambda *_: FINE) as server:
        url = server.url
    policy, transcript = openai_agent("toy", TOOLS, base_url=url, retries=2, backoff=0.001)
    with policy, pytest.raises(PolicyError, match=r"after 3 attempts, at last: ConnectError.*check base_url"):
        ask(policy, transcript)
    with pytest.raises(PolicyError, match="closed"):
        ask(policy, transcript)


def test_settings_that_cannot_work(monkeypatch):
    urls = [{"base_url": url} for url in ("localhost:8000/v1", "http://", "http://a:b@c/v1", "http://[::1")]
    for wrong in (*urls, {"extra_body": {"messages": []}}, {"extra_body": {"stream": True}}):
        with pytest.raises(ConfigError, match=r"base_url|extra_body"):
            openai_agent("toy", TOOLS, **wrong)
    for wrong in ({"timeout": 0}, {"retries": -1}, {"tool_mode": "xml"}, {"modle": 1}, {"omit": "seed"}):
        with pytest.raises(CardError, match="model toy"):
            openai_agent("toy", TOOLS, **wrong)
    monkeypatch.setenv("TOY_KEY", "sk-“curly”")
    with pytest.raises(ConfigError, match="TOY_KEY") as caught:
        openai_agent("toy", TOOLS, api_key_variable="TOY_KEY")
    assert "curly" not in str(caught.value)


def test_every_one_of_many_requests_gets_its_own_answer_and_no_more_are_in_flight_than_allowed(start):
    crowd = threading.Barrier(8, lambda: time.sleep(0.05))  # in which a ninth would come

    def answer(body: Body, number: int) -> Reply:
        crowd.wait(30)  # breaks unless eight come together
        return message(None, ("search", {"query": body["messages"][-1]["content"]}))

    policy, transcript, server = start(answer, concurrency=8)
    requests = [SampleRequest(transcript.prompt(f"question {n}"), seed=n) for n in range(56)]
    found = policy.sample(requests)
    assert [parse(action.text).argument for action in found] == [f"question {n}" for n in range(56)]
    assert server.peak == 8 and len(server.bodies) == 56


def test_the_first_refusal_ends_the_other_requests(start):
    waiting = threading.Barrier(2)

    def answer(body: Body, number: int) -> Reply:
        if body["messages"][-1]["content"] == "bad":
            waiting.wait(30)
            return error(403, "not you")
        waiting.wait(30)
        return Reply(hang=True)

    policy, transcript, server = start(answer)
    requests = [SampleRequest(transcript.prompt(text), seed=1) for text in ("good", "bad")]
    with pytest.raises(PolicyError, match=r"403: not you.*which is not set"):
        policy.sample(requests)
    assert server.hung_up.wait(30)


def test_a_pacer_spaces_costs():
    pacer = Pacer(60)
    assert [pacer.reserve(1, 10.0) for _ in range(3)] == [10.0, 11.0, 12.0]
    assert pacer.reserve(1, 100.0) == 100.0, "nothing is saved up"
    assert (pacer.reserve(30, 100.0), pacer.reserve(1, 100.0)) == (101.0, 131.0)
    pacer.correct(-20)
    assert pacer.reserve(1, 100.0) == 112.0
    assert [Pacer(0).reserve(10**9, 5.0) for _ in range(2)] == [5.0, 5.0]


@pytest.mark.parametrize(
    ("limit", "expected"), [({"requests_per_minute": 1}, [0, 1, 2]), ({"tokens_per_minute": 1000}, [0, 10, 20])]
)
def test_requests_wait_for_their_share_of_a_minute(start, limit, expected, monkeypatch):
    waits: list[float] = []
    real = chat_client.asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    policy, transcript, _ = start(lambda *_: FINE, tools=[], **limit)
    monkeypatch.setattr(chat_client.asyncio, "sleep", sleep)
    policy.sample([SampleRequest(transcript.prompt("Who?"), seed=n, max_tokens=10_000 - 130) for n in range(3)])
    assert [round(wait / 60) for wait in waits] == expected
