"""What a stream to vLLM servers does while requests come and go; for faults of the servers see `test_vllm_faults`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from test_vllm_faults import EOS, TAGS, FakeServer, ask, sampled, status

from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.agents.vllm_server_policy import FAULTS, VllmServerPolicy
from carl_gym.envs.protocol import STOP_STRINGS
from carl_gym.errors import PolicyError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture
def client(fake: FakeServer) -> Iterator[VllmServerPolicy]:
    policy = VllmServerPolicy([fake.url], TAGS, STOP_STRINGS, EOS, context=256, timeout=20, patience=5)
    yield policy
    policy.close()


async def hang(body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(30)
    return sampled(body)


def in_flight(policy: VllmServerPolicy) -> int:
    return sum(server.in_flight for server in policy._servers)


def test_requests_join_while_others_are_under_way(fake: FakeServer, client: VllmServerPolicy) -> None:
    """The first request is answered only after the second, which comes later, has been."""
    second = threading.Event()

    async def wait(body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.to_thread(second.wait, 20)
        return sampled(body)

    fake.script = [wait]
    waiting = list(enumerate(ask(2)))
    order: list[int] = []

    def exchange(finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
        order.extend(number for number, _ in finished)
        if order == [1]:
            second.set()
        return [waiting.pop(0)] if waiting and (idle or fake.asked) else []

    client.stream(exchange)
    assert order == [1, 0]


def test_a_stream_that_breaks_off_cancels_what_is_under_way(fake: FakeServer, client: VllmServerPolicy) -> None:
    fake.script = [hang] * 6

    def exchange(finished: list[tuple[int, Completion]], idle: bool) -> list[tuple[int, SampleRequest]]:
        if idle:
            return list(enumerate(ask(6)))
        if fake.asked == 6:
            raise KeyboardInterrupt
        return []

    with pytest.raises(KeyboardInterrupt):
        client.stream(exchange)
    deadline = time.monotonic() + 10
    while in_flight(client) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert in_flight(client) == 0
    assert [c.logprobs[0] for c in client.sample(ask(3))] == [-0.0, -1.0, -2.0], "it can be used on"


def test_the_first_failure_ends_the_stream_and_the_rest(fake: FakeServer, client: VllmServerPolicy) -> None:
    fake.script = [hang] * 3 + [status(400, "no such thing")]
    with pytest.raises(PolicyError, match=r"refused \(400\): no such thing"):
        client.sample(ask(4))
    assert fake.asked == 4 < FAULTS
    deadline = time.monotonic() + 10
    while in_flight(client) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert in_flight(client) == 0


def test_a_policy_that_is_closed_meanwhile_does_not_hang(fake: FakeServer, client: VllmServerPolicy) -> None:
    fake.script = [hang] * 2
    closing = threading.Timer(0.3, client.close)
    closing.start()
    with pytest.raises(PolicyError, match="the policy was closed"):
        client.sample(ask(2))
    closing.join()


def test_a_request_that_cannot_be_served_is_refused_before_it_is_sent(
    fake: FakeServer, client: VllmServerPolicy
) -> None:
    with pytest.raises(PolicyError, match="exceed the model's context of 256"):
        client.stream(lambda finished, idle: [(0, SampleRequest([1] * 300, seed=0))])
    assert fake.asked == 0
