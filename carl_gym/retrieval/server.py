"""A retriever over HTTP: Search-R1's /retrieve, ASearcher's /access, and what our own client needs beyond them.

The routes that searches take are plain ASGI with validation by hand and orjson; FastAPI serves the rest. Searches of
concurrent requests are merged (`batching.Batcher`), and more than may wait are refused with 503.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from carl_gym.api_key import KeyGate
from carl_gym.errors import ConfigError, RetrievalError
from carl_gym.retrieval.batching import Batcher
from carl_gym.retrieval.corpus import Passage
from carl_gym.retrieval.retriever import Retriever, SearchResults, check_shardable
from carl_gym.retrieval.wire import CORPUS_HEADER, RETRIEVER_HEADER, Row, clipped, retriever_fingerprint, row

log = logging.getLogger(__name__)

RETRY_AFTER = 1
"""Seconds after which a client that was refused for load should ask again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_body_bytes: of a request; a longer one gets 413.
        max_queries: queries, ids, titles or urls in a request; more get 422, as does whatever exceeds the next two.
        max_query_chars: characters of a query, id, title or url.
        max_topk: passages per query.
        max_batch: queries at which a search takes no further request along.
        max_queue: queries that may wait or be worked on; a request beyond gets 503 and Retry-After.
    """

    max_body_bytes: int = 16_000_000
    max_queries: int = 1024
    max_query_chars: int = 10_000
    max_topk: int = 100
    max_batch: int = 256
    max_queue: int = 8192

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} = {getattr(self, field.name)}; it must be at least 1")
        if self.max_queue < self.max_queries:
            raise ConfigError(
                f"max_queue ({self.max_queue}) is less than max_queries ({self.max_queries}): some requests that are "
                f"allowed could never be served; raise the first or lower the second"
            )


class _Refusal(Exception):
    """A request that is not served: status and message for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _ClientGone(Exception):
    """The client closed the connection before its request was complete."""


def create_app(retriever: Retriever, limits: Limits | None = None, *, topk: int = 3, api_key: str = "") -> FastAPI:
    """The server of a retriever and its corpus, an ASGI application.

    Args:
        retriever: searched by one thread at a time.
        limits: what is taken on.
        topk: passages per query for requests that do not say (Search-R1's default).
        api_key: what every request but /healthz must show (see `api_key`); "" for none.

    Raises:
        ConfigError: `topk` is beyond the limits, or the corpus is a shard and the retriever none whose results could
            be merged.
    """
    limits = limits or Limits()
    if not 1 <= topk <= limits.max_topk:
        raise ConfigError(f"topk = {topk}; it must lie from 1 to max_topk ({limits.max_topk})")
    service = _Service(retriever, limits, topk)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        service.batcher.close()

    handlers = {
        "/retrieve": service.retrieve,
        "/access": service.access,
        "/passages": service.passages,
        "/titles": service.titles,
    }
    app = _App(
        {path: _Endpoint(path, handle, service) for path, handle in handlers.items()},
        api_key,
        title="carl-gym retrieval",
        description="\n\n".join(f"`POST {path}` {handle.__doc__}" for path, handle in handlers.items()),
        version=version("carl-gym"),
        lifespan=lifespan,
    )

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while requests are taken."""
        return service.response({"status": "ok"})

    @app.get("/info")
    async def info() -> Response:
        """What is served: corpus, retriever, limits."""
        return service.response(service.info)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _App(FastAPI):
    """FastAPI, but for a few paths that go straight to their endpoints: its layers would double what a search costs."""

    def __init__(self, endpoints: Mapping[str, _Endpoint], api_key: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._endpoints = endpoints
        self._guarded = KeyGate(self._route, api_key) if api_key else self._route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        await (super().__call__ if endpoint is None else endpoint)(scope, receive, send)


class _Metrics:
    """What /metrics reports; a registry of its own, so that a process may hold several servers."""

    def __init__(self, paths: Sequence[str], waiting: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("carl_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.rejected = Counter("carl_rejected", "Requests refused for load (503).", registry=registry)
        self.queries = Counter("carl_queries", "Queries searched for.", registry=registry)
        seconds = Histogram(
            "carl_request_seconds",
            "From the request's first byte in our hands to its answer.",
            ["path"],
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=registry,
        )
        self.seconds = {path: seconds.labels(path) for path in paths}
        self.ok = {path: self.requests.labels(path, "200") for path in paths}
        self.batch = Histogram(
            "carl_batch_queries",
            "Queries per call of the retriever.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=registry,
        )
        self.search = Histogram("carl_search_seconds", "Time of a call of the retriever.", registry=registry)
        queue = Gauge("carl_queue_queries", "Queries that wait or are worked on.", registry=registry)
        queue.set_function(waiting)

    def searched(self, queries: int, seconds: float) -> None:
        """A call of the retriever is done."""
        self.queries.inc(queries)
        self.batch.observe(queries)
        self.search.observe(seconds)


class _Service:
    """What the endpoints do: from the fields of a request to the bytes of the answer."""

    def __init__(self, retriever: Retriever, limits: Limits, topk: int) -> None:
        self.retriever, self.corpus, self.limits, self.topk = retriever, retriever.corpus, limits, topk
        check_shardable(type(retriever), self.corpus.shard)
        self.waiting = 0
        self.metrics = _Metrics(("/retrieve", "/access", "/passages", "/titles"), lambda: self.waiting)
        self.batcher = Batcher(retriever, limits.max_batch, self.metrics.searched)
        self.info = {
            "server": "carl-gym",
            "version": version("carl-gym"),
            "corpus": self.corpus.identity(),
            "retriever": retriever.describe(),
            "retriever_fingerprint": retriever_fingerprint(retriever),
            "probe": list(retriever.probe()),
            "limits": asdict(limits),
        }
        self.headers = [
            (CORPUS_HEADER.encode(), self.corpus.fingerprint.encode()),
            (RETRIEVER_HEADER.encode(), str(self.info["retriever_fingerprint"]).encode()),
        ]

    def response(self, content: object) -> Response:
        """For the routes that FastAPI serves."""
        headers = {name.decode(): value.decode() for name, value in self.headers}
        return Response(orjson.dumps(content), media_type="application/json", headers=headers)

    async def retrieve(self, request: dict[str, Any]) -> bytes:
        """`{"queries" or "query", "topk", "return_scores"}` -> `{"result": [[row or {"document", "score"}]]}`."""
        if "query" in request:
            if "queries" in request:
                raise _Refusal(422, "both 'query' and 'queries' are given; send one of them")
            queries = self._texts({"query": [request["query"]]}, "query", self.limits.max_queries)
        else:
            queries = self._texts(request, "queries", self.limits.max_queries)
        k = request.get("topk")
        k = self.topk if k is None or (type(k) is int and k == 0) else k
        if type(k) is not int or not 1 <= k <= self.limits.max_topk:
            raise _Refusal(
                422, f"'topk' must be a whole number from 1 to {self.limits.max_topk} (max_topk), not {clipped(k)}"
            )
        with_scores = request.get("return_scores")
        if with_scores not in (True, False, None):
            raise _Refusal(422, f"'return_scores' must be true or false, not {clipped(with_scores)}")
        if not queries:
            return b'{"result":[]}'

        def render(found: SearchResults) -> bytes:
            rows = [[row(passage) for passage in self.retriever.get(ids)] for ids in found.ids]
            if with_scores:
                rows = [
                    [{"document": document, "score": score} for document, score in zip(one, scores, strict=True)]
                    for one, scores in zip(rows, found.scores, strict=True)
                ]
            return orjson.dumps({"result": rows}, option=orjson.OPT_SERIALIZE_NUMPY)

        with self._admitted(len(queries)):
            return await self.batcher.search(queries, k, render)

    async def access(self, request: dict[str, Any]) -> bytes:
        """`{"urls"}`, each the id or title of a passage -> `{"result": [row or null]}`."""
        return await self._look_up(self._texts(request, "urls", self.limits.max_queries), self._page)

    async def passages(self, request: dict[str, Any]) -> bytes:
        """`{"ids"}` -> `{"result": [row or null]}`."""
        return await self._look_up(self._texts(request, "ids", self.limits.max_queries), self._passage)

    async def titles(self, request: dict[str, Any]) -> bytes:
        """`{"titles"}` -> `{"result": [row of the first passage with that title, or null]}`."""
        return await self._look_up(self._texts(request, "titles", self.limits.max_queries), self.corpus.by_title)

    def _passage(self, id: str) -> Passage | None:
        return self.retriever.get([id])[0] if id in self.corpus else None

    def _page(self, url: str) -> Passage | None:
        return self._passage(url) or self.corpus.by_title(url)

    async def _look_up(self, keys: list[str], find: Callable[[str], Passage | None]) -> bytes:
        """Off the event loop's thread: a mapped corpus may have to read from the disk."""

        def render() -> bytes:
            found = map(find, keys)
            result: list[Row | None] = [None if passage is None else row(passage) for passage in found]
            return orjson.dumps({"result": result})

        with self._admitted(len(keys)):
            return await asyncio.to_thread(render)

    @contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        """Counts what waits while the context lasts. Refuses when that is too much."""
        if self.waiting + count > self.limits.max_queue:
            self.metrics.rejected.inc()
            raise _Refusal(
                503,
                f"{self.waiting} queries wait, and {count} more would exceed max_queue ({self.limits.max_queue}); "
                f"ask again later",
            )
        self.waiting += count
        try:
            yield
        finally:
            self.waiting -= count

    def _texts(self, request: dict[str, Any], key: str, most: int) -> list[str]:
        """The list of texts under `key`, within the limits."""
        texts = request.get(key)
        if type(texts) is not list:
            found = "is missing" if key not in request else f"is {clipped(texts)}"
            raise _Refusal(422, f"{key!r} {found}; it must be a list of texts")
        if len(texts) > most:
            raise _Refusal(422, f"{key!r} has {len(texts)} entries; at most {most} are allowed (max_queries)")
        longest = self.limits.max_query_chars
        for text in texts:
            if type(text) is not str:
                raise _Refusal(422, f"{key!r} holds {clipped(text)}; every entry must be a text")
            if len(text) > longest:
                raise _Refusal(
                    422, f"{key!r} holds a text of {len(text)} characters; at most {longest} (max_query_chars)"
                )
        return texts


class _Endpoint:
    """A POST route as a bare ASGI application: JSON object in, JSON out, every error as `{"detail": message}`."""

    def __init__(self, path: str, handle: Callable[[dict[str, Any]], Awaitable[bytes]], service: _Service) -> None:
        self._path, self._handle, self._service = path, handle, service
        self._headers = [(b"content-type", b"application/json"), *service.headers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        metrics, headers, status = self._service.metrics, self._headers, 200
        try:
            if scope["method"] != "POST":
                raise _Refusal(405, f"{self._path} takes POST only, not {scope['method']}")
            payload = await self._handle(_json_object(await self._body(scope, receive)))
        except _ClientGone:
            return
        except _Refusal as refusal:
            status, payload = refusal.status, orjson.dumps({"detail": str(refusal)})
            if status == 503:
                headers = [*headers, (b"retry-after", b"%d" % RETRY_AFTER)]
            elif status == 413:
                headers = [*headers, (b"connection", b"close")]  # the rest of the body is not wanted
        except Exception as error:
            log.exception("%s failed", self._path)
            kind = "" if isinstance(error, RetrievalError) else f"{type(error).__name__}: "
            status, payload = 500, orjson.dumps({"detail": f"{self._path} failed: {kind}{error}"})
        (metrics.ok[self._path] if status == 200 else metrics.requests.labels(self._path, str(status))).inc()
        metrics.seconds[self._path].observe(time.perf_counter() - started)
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"content-length", b"%d" % len(payload))],
            }
        )
        await send({"type": "http.response.body", "body": payload})

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self._service.limits.max_body_bytes
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > most:
                raise _Refusal(413, f"the request has {int(value)} bytes; at most {most} (max_body_bytes)")
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise _Refusal(413, f"the request has more than {most} bytes (max_body_bytes)")
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _Refusal(400, f"the request is not JSON: {error}") from error
    if type(value) is not dict:
        raise _Refusal(422, f"the request must be a JSON object, not {clipped(value)}")
    return value


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def serve(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    grace: float = 30.0,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight are finished, new connections refused.

    Args:
        app: from `create_app`.
        host: address to listen on; whoever reaches it can search, unless the application asks for a key.
        port: 0 for any that is free.
        grace: seconds that requests in flight get at the end.
        ready: called with the URL as soon as connections are accepted.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listener, url = _listen(host, port)
    _Server(_uvicorn_config(app, grace), lambda: ready(url)).run(sockets=[listener])


@contextmanager
def serving(app: FastAPI, host: str = "127.0.0.1", port: int = 0, *, grace: float = 30.0) -> Iterator[str]:
    """Serve from a thread of this process while the context lasts; gives the URL."""
    listener, url = _listen(host, port)
    listening = threading.Event()
    server = _Server(_uvicorn_config(app, grace), listening.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="retrieval server")
    thread.start()
    try:
        while not listening.wait(0.05):
            if not thread.is_alive():
                raise RetrievalError(f"the server at {url} stopped before it listened; its log says why")
        yield url
    finally:
        server.should_exit = True
        thread.join()


def _uvicorn_config(app: FastAPI, grace: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(grace),
    )


def _listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A bound socket, and the URL under which it is reached."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from error
    shown = f"[{host}]" if ":" in host else host
    return listener, f"http://{shown}:{listener.getsockname()[1]}"
