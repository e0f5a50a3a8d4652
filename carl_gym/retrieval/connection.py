"""Requests to retrieval servers: whose turn it is, retries, and a check that what answers is still what we know.

All servers of a connection serve the same; `sharded.py` joins those of a corpus in shards, and `remote.py` makes a
corpus and a retriever of them. Whatever a server does wrong is a `RetrievalError`.
"""

from __future__ import annotations

import logging
import os
import random
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import orjson

from carl_gym.api_key import check_no_password, key_advice, key_header
from carl_gym.cards import bounded
from carl_gym.errors import CarlGymError, ConfigError, RetrievalError
from carl_gym.harmless import visible
from carl_gym.retrieval.corpus import Passage, Shard
from carl_gym.retrieval.wire import CORPUS_HEADER, RETRIEVER_HEADER, clipped, passage_of

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

Api = Literal["auto", "carl", "search-r1"]

RETRIED_STATUSES = (502, 503, 504)
"""A proxy without its server, a server with too much to do: worth another attempt. Every request may be repeated."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts at most, whatever the server asks for."""
REST, LONGEST_REST = 5.0, 300.0
"""Seconds for which a server that failed is left alone, where there are others: doubled each time until it answers."""
HEALTH = 2.0
"""Seconds that one that has rested has to say that it is healthy."""


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """What a remote recipe may set.

    Attributes:
        url: of the server, such as http://127.0.0.1:8000; a trailing /retrieve is ignored. Several, with commas between
            them, share the work, and one that fails is left alone until it is healthy; semicolons stand between the
            servers of different shards, which are all asked. Empty: the corpus' own.
        timeout: seconds for an attempt as a whole, from connecting to the last byte (see `deadline`).
        retries: attempts after the first, on connection errors, timeouts and statuses 502, 503 and 504; where there are
            several servers, also on other errors of one of them.
        backoff: seconds before the second attempt; doubled each time, with jitter, and at least what the server's
            Retry-After says.
        api: carl for our server, search-r1 for one that has /retrieve only; auto asks for /info to find out.
    """

    url: str = ""
    timeout: float = bounded(0.01, 3600.0, 30.0)
    retries: int = bounded(0, 100, 6)
    backoff: float = bounded(0.0, 60.0, 0.25)
    api: Api = "auto"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says about itself.

    Attributes:
        api: which protocol it speaks.
        corpus: fingerprint of its corpus; for Search-R1's servers a hash of the URL.
        retriever: fingerprint of its retriever, likewise.
        passages: how many there are; 0 when it does not say.
        max_queries: per request.
        describe: its retriever's `describe`.
        shard: which part of a corpus it has, if not all.
        probe: its retriever's `probe`.
    """

    api: Literal["carl", "search-r1"]
    corpus: str
    retriever: str
    passages: int
    max_queries: int
    describe: Mapping[str, str | int | float]
    shard: Shard | None = None
    probe: tuple[float, ...] = ()


class Connection:
    """Requests to a server, or to several that serve the same: pooled connections, retries, and a check that each of
    them still serves what the first one did.

    Threads may share it; forked processes get connections of their own, and so do copies by pickle. Proxies that the
    environment names are not used: a retrieval server is near.

    Args:
        settings: with a URL.
        trusted: whether the user named the server, and no card: it is then sent the API key (see `api_key`).

    Raises:
        ConfigError: the URL is none, or holds a password.
        RetrievalError: the server cannot be reached, or is no retrieval server.
    """

    def __init__(self, settings: RemoteSettings, *, trusted: bool = False) -> None:
        import httpx

        given = settings.url.split(",")
        self._urls = [one.strip().rstrip("/").removesuffix("/retrieve").rstrip("/") for one in given]
        for name, one in zip(given, self._urls, strict=True):
            check_no_password(name)
            wrong = f"{name!r} is no URL of a server; expected something like http://127.0.0.1:8000"
            try:
                url = httpx.URL(one)
            except httpx.InvalidURL as error:
                raise ConfigError(f"{wrong} ({error})") from error
            if url.scheme not in ("http", "https") or not url.host or (url.port or 80) > 65535:
                raise ConfigError(wrong)
        if len(set(self._urls)) < len(self._urls):
            raise ConfigError(f"{settings.url!r} names a server twice; name each once")
        self.url = ",".join(self._urls)
        self._failed = dict.fromkeys(self._urls, 0.0)  # until when each is left alone, 0 for none
        self._rests = dict.fromkeys(self._urls, REST)
        self._turn = random.randrange(len(self._urls))  # so that processes which start together part
        self.settings, self.trusted = settings, trusted
        self._clients: dict[int, httpx.Client] = {}
        self.info = self._identify()

    def __getstate__(self) -> dict[str, Any]:
        # What the server was like goes along: a copy refuses a server that has changed meanwhile.
        fresh = {"_failed": dict.fromkeys(self._urls, 0.0), "_rests": dict.fromkeys(self._urls, REST)}
        return self.__dict__ | {"_clients": {}} | fresh

    def post(self, path: str, request: Mapping[str, object], count: int) -> list[Any]:
        """The `result` list of a request, whose length must be `count`. Raises RetrievalError."""
        response = self._send("POST", path, request)
        answer = self._json(response, path)
        result = answer.get("result")
        if not isinstance(result, list) or len(result) != count:
            found = f"a list of {len(result)}" if isinstance(result, list) else clipped(result)
            self.fail(path, f"expected a list of {count} under 'result', found {found}")
        return result

    def fail(self, path: str, problem: str) -> NoReturn:
        """Raise the RetrievalError of an answer that cannot be used."""
        raise RetrievalError(
            f"{self.url}{path} gave an answer that cannot be used: {problem}; is it a retrieval server?"
        )

    def parts(self, items: Sequence[str]) -> Iterator[Sequence[str]]:
        """As many at a time as the server takes."""
        most = self.info.max_queries
        return (items[start : start + most] for start in range(0, len(items), most))

    def passage(self, row: object, path: str) -> Passage:
        """The passage in a row of an answer. Raises RetrievalError."""
        try:
            return passage_of(row)
        except ValueError as error:
            self.fail(path, str(error))

    def hits(self, results: object) -> list[tuple[Passage, float]]:
        """The results of one query with their scores. Raises RetrievalError."""
        if not isinstance(results, list):
            self.fail("/retrieve", f"expected a list of results per query, found {clipped(results)}")
        hits = []
        for result in results:
            if not isinstance(result, dict) or type(score := result.get("score")) not in (int, float):
                self.fail("/retrieve", f"expected a document with a score, found {clipped(result)}")
            hits.append((self.passage(result.get("document"), "/retrieve"), float(cast(float, score))))
        return hits

    def _identify(self) -> ServerInfo:
        settings = self.settings
        if settings.api != "search-r1":
            response = self._send("GET", "/info", known=False, missing=settings.api == "auto")
            if response.status_code == 200:
                return self._described(self._json(response, "/info"))
            log.warning("%s has no /info: taken for a Search-R1 server", self.url)
        if len(self._urls) > 1:
            raise ConfigError(
                f"{self.url}: only servers that say what they serve can share the work (scripts/serve_retrieval.py); "
                "Search-R1's do not, and different passages would pass unnoticed. Name one of them"
            )
        name = blake2b(self.url.encode(), digest_size=16).hexdigest()
        return ServerInfo("search-r1", name, name, 0, 256, {})

    def _described(self, info: Mapping[str, Any]) -> ServerInfo:
        try:
            corpus, passages = info["corpus"]["fingerprint"], info["corpus"]["passages"]
            retriever, most = info["retriever_fingerprint"], info["limits"]["max_queries"]
            describe = dict(info["retriever"])
            shard = _shard(info["corpus"].get("shard"))
            probe = tuple(map(float, info.get("probe", ())))
            if shard and len(shard.rows) != passages:
                raise ValueError(f"{passages} passages in shard {shard} of {shard.passages}, not {len(shard.rows)}")
        except (KeyError, TypeError, ValueError, AttributeError, CarlGymError) as error:
            self.fail(
                "/info", f"it does not describe a retriever ({error!r}); with another server, set api = search-r1"
            )
        if not (isinstance(corpus, str) and isinstance(retriever, str) and type(passages) is type(most) is int):
            self.fail("/info", f"wrong types in {clipped(dict(info))}")
        return ServerInfo("carl", corpus, retriever, passages, max(1, most), describe, shard, probe)

    def _send(
        self,
        method: Literal["GET", "POST"],
        path: str,
        request: Mapping[str, object] | None = None,
        *,
        known: bool = True,
        missing: bool = False,
    ) -> httpx.Response:
        """The 200 response of the server that we know; one with 404 or 405 as well, if something may be missing."""
        import httpx

        content = None if request is None else orjson.dumps(request)
        problem, pause = "", self.settings.backoff
        broke: set[str] = set()
        for attempt in range(self.settings.retries + 1):
            url, is_up = self._next()
            if attempt:
                log.warning("%s: attempt %d, at %s%s", visible(problem), attempt + 1, url, path)
                if not is_up or len(self._urls) == 1:
                    time.sleep(min(pause, LONGEST_PAUSE))
            pause = self.settings.backoff * 2**attempt * random.uniform(1.0, 1.5)
            try:
                headers = {"content-type": "application/json", **key_header(url, trusted=self.trusted)}
                response = self._client().request(method, url + path, content=content, headers=headers)
            except (httpx.TransportError, httpx.DecodingError) as error:
                problem = f"{url}{path}: {type(error).__name__}: {error}"
                self._leave_alone(url)
                continue
            status = response.status_code
            if status >= 500 and status not in RETRIED_STATUSES:
                broke.add(url)  # which may be its own affair, such as a bad disk, until all have said the same
            if status in RETRIED_STATUSES or (url in broke and len(broke) < len(self._urls)):
                problem = f"{url}{path}: status {status}{_detail(response)}"
                self._leave_alone(url)
                asked = response.headers.get("retry-after", "")
                pause = max(pause, float(asked) if asked.isdecimal() else 0.0)
                continue
            self._failed[url], self._rests[url] = 0.0, REST
            if known:
                self._check_identity(response, url, path)
            if status == 200 or (missing and status in (404, 405)):
                return response
            advice = f"; {key_advice(url, trusted=self.trusted)}" if status == 401 else _advice(status)
            raise RetrievalError(f"{url}{path} answered with status {status}{_detail(response)}{advice}")
        advice = (
            "a server's log says more"
            if broke
            else "is the server running (scripts/serve_retrieval.py), and the URL right?"
        )
        raise RetrievalError(
            f"{self.url}{path} failed in all of {self.settings.retries + 1} attempts, at last with {problem}; {advice}"
        )

    def _next(self) -> tuple[str, bool]:
        """Whose turn it is, and whether it is up as far as we know; the one that failed first where none is."""
        self._turn += 1
        now = time.monotonic()
        order = [self._urls[(self._turn + i) % len(self._urls)] for i in range(len(self._urls))]
        chosen = next((url for url in order if self._failed[url] <= now and self._is_well(url)), None)
        return (chosen, True) if chosen else (min(order, key=lambda url: self._failed[url]), False)

    def _is_well(self, url: str) -> bool:
        """Whether to send work to a server: one that failed says first that it is healthy, where there are others. (A
        request to one that hangs would take the whole timeout, and the run with it.)"""
        import httpx

        if not self._failed[url] or len(self._urls) == 1:
            return True
        try:
            well = self._client().get(f"{url}/healthz", timeout=HEALTH).status_code == 200
        except httpx.TransportError:
            well = False
        if not well:
            self._leave_alone(url)
        return well

    def _leave_alone(self, url: str) -> None:
        self._failed[url] = time.monotonic() + self._rests[url]
        self._rests[url] = min(2 * self._rests[url], LONGEST_REST)

    def _check_identity(self, response: httpx.Response, url: str, path: str) -> None:
        """A server restarted with other passages, or another way to rank them, is not the one that we began with."""
        if self.info.api != "carl":
            return
        checks = (("corpus", CORPUS_HEADER, self.info.corpus), ("retriever", RETRIEVER_HEADER, self.info.retriever))
        for what, header, expected in checks:
            found = response.headers.get(header)
            if found is None:
                if response.status_code == 200:
                    self.fail(path, f"the header {header} is missing; another server answers at this address")
            elif found != expected:
                raise RetrievalError(
                    f"{url}{path}: the server's {what} is not the one that we connected to (fingerprint {found}, "
                    f"before {expected}); results would not compare. Start it with that {what}, or make the "
                    f"environment anew"
                )

    def _json(self, response: httpx.Response, path: str) -> dict[str, Any]:
        try:
            answer = orjson.loads(response.content)
        except orjson.JSONDecodeError as error:
            self.fail(path, f"not JSON ({error}): {clipped(response.text)}")
        if not isinstance(answer, dict):
            self.fail(path, f"expected a JSON object, found {clipped(answer)}")
        return answer

    def _client(self) -> httpx.Client:
        """This process' client: sockets must not be shared with the process that we were forked from."""
        client = self._clients.get(os.getpid())
        if client is None:
            import httpx

            from carl_gym.retrieval.deadline import DeadlineTransport

            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0)
            transport = DeadlineTransport(limits=limits, trust_env=False)
            client = httpx.Client(timeout=self.settings.timeout, transport=transport, trust_env=False)
            weakref.finalize(self, client.close)  # also at exit
            client = self._clients.setdefault(os.getpid(), client)
        return client


def _shard(value: Any) -> Shard | None:
    """The shard in an answer of /info. Raises KeyError, TypeError or ConfigError where it makes no sense."""
    if value is None:
        return None
    number, count, corpus, passages = (value[key] for key in ("number", "count", "corpus", "passages"))
    if not (type(number) is type(count) is type(passages) is int and isinstance(corpus, str)):
        raise TypeError(f"no shard: {clipped(value)}")
    return Shard(number, count, corpus, passages)


def _detail(response: httpx.Response) -> str:
    """What the server said about an error, as FastAPI and our server put it."""
    try:
        answer = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return f": {response.text.strip()[:300]}" if response.text.strip() else ""
    detail = answer.get("detail") if isinstance(answer, dict) else answer
    return f": {detail if isinstance(detail, str) else clipped(detail, 300)}"


def _advice(status: int) -> str:
    if status in (404, 405):
        return "; is this the URL of a retrieval server?"
    if status in (413, 422):
        return "; raise the server's limit, or send less"
    return "; its log says more" if status >= 500 else ""
