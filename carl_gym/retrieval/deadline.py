"""An httpx transport whose timeout is for a request as a whole, not for each of its reads and writes.

Every step of a request (connecting, sending, waiting for the head of the answer, waiting for its body) gets what is
left of the time, and an answer that goes on after its end is cut off at the first piece that comes late. So a server
that trickles holds up nobody; the very longest that a request can take, when it falls silent just before its time is
over, is twice the timeout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import cast

import httpx


class DeadlineTransport(httpx.HTTPTransport):
    """Takes the request's `read` timeout as seconds for everything; raises httpx.TimeoutException after."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """As `httpx.HTTPTransport`, on time."""
        end = time.monotonic() + request.extensions["timeout"]["read"]
        request.extensions["timeout"] = _Remaining(end)
        response = super().handle_request(request)
        response.stream = _Limited(cast(httpx.SyncByteStream, response.stream), end)
        return response


class _Remaining:
    """What httpcore asks for timeouts, as if it were a dict, when it begins a step: whichever it is, the time left."""

    def __init__(self, end: float) -> None:
        self._end = end

    def get(self, kind: str, default: object = None) -> float:
        """Seconds until the end."""
        return max(self._end - time.monotonic(), 0.001)  # 0 would mean not to wait at all


class _Limited(httpx.SyncByteStream):
    """A body that must not come in after `end`."""

    def __init__(self, stream: httpx.SyncByteStream, end: float) -> None:
        self._stream, self._end = stream, end

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            if time.monotonic() > self._end:
                raise httpx.ReadTimeout("the answer was not complete in time")
            yield chunk

    def close(self) -> None:
        self._stream.close()
