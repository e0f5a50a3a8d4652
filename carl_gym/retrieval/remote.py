"""Searching over HTTP: a retriever and a corpus that live in another process, or on another machine.

Works with our server (`server.py`), whose answers say which corpus and retriever they come from, and with plain
Search-R1 servers, which say neither. Whatever a server does wrong is a `RetrievalError`, never an empty result.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

import orjson

from carl_gym.api_key import check_no_password, key_advice, key_header
from carl_gym.cards import bounded
from carl_gym.errors import ConfigError, RetrievalError
from carl_gym.harmless import visible
from carl_gym.retrieval.corpus import Corpus, Passage
from carl_gym.retrieval.retriever import Progress, Retriever, SearchResults, check_k, silent
from carl_gym.retrieval.wire import CORPUS_HEADER, RETRIEVER_HEADER, clipped, passage_of

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)
V = TypeVar("V")

Api = Literal["auto", "carl", "search-r1"]

RETRIED_STATUSES = (502, 503, 504)
"""A proxy without its server, a server with too much to do: worth another attempt. Every request may be repeated."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts at most, whatever the server asks for."""
KEPT_PASSAGES = 50_000
"""Passages that a `RemoteCorpus` remembers: what a search brought is mostly what is opened next."""
REST = 5.0
"""Seconds for which a server that failed is left alone, where there are others."""
TITLE_CANDIDATES = 20
"""How far down the results for a title a passage with that title is looked for, where there is no /titles."""


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """What a remote recipe may set.

    Attributes:
        url: of the server, such as http://127.0.0.1:8000; a trailing /retrieve is ignored. Several, with commas between
            them, share the work, and one that fails is left alone for a while. Empty: the corpus' own.
        timeout: seconds for an attempt as a whole, from connecting to the last byte (see `deadline`).
        retries: attempts after the first, on connection errors, timeouts and statuses 502, 503 and 504.
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
    """

    api: Literal["carl", "search-r1"]
    corpus: str
    retriever: str
    passages: int
    max_queries: int
    describe: Mapping[str, str | int | float]


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
        self._failed = dict.fromkeys(self._urls, 0.0)  # until when each is left alone
        self._turn = random.randrange(len(self._urls))  # so that processes which start together part
        self.settings, self.trusted = settings, trusted
        self._clients: dict[int, httpx.Client] = {}
        self.info = self._identify()

    def __getstate__(self) -> dict[str, Any]:
        # What the server was like goes along: a copy refuses a server that has changed meanwhile.
        return self.__dict__ | {"_clients": {}, "_failed": dict.fromkeys(self._urls, 0.0)}

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
        except (KeyError, TypeError, ValueError) as error:
            self.fail(
                "/info", f"it does not describe a retriever ({error!r}); with another server, set api = search-r1"
            )
        if not (isinstance(corpus, str) and isinstance(retriever, str) and type(passages) is type(most) is int):
            self.fail("/info", f"wrong types in {clipped(dict(info))}")
        return ServerInfo("carl", corpus, retriever, passages, max(1, most), describe)

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
                self._failed[url] = time.monotonic() + REST
                continue
            status = response.status_code
            if status in RETRIED_STATUSES:
                problem = f"{url}{path}: status {status}{_detail(response)}"
                self._failed[url] = time.monotonic() + REST
                asked = response.headers.get("retry-after", "")
                pause = max(pause, float(asked) if asked.isdecimal() else 0.0)
                continue
            if known:
                self._check_identity(response, url, path)
            if status == 200 or (missing and status in (404, 405)):
                return response
            advice = f"; {key_advice(url, trusted=self.trusted)}" if status == 401 else _advice(status)
            raise RetrievalError(f"{url}{path} answered with status {status}{_detail(response)}{advice}")
        raise RetrievalError(
            f"{self.url}{path} failed in all of {self.settings.retries + 1} attempts, at last with {problem}; is the "
            f"server running (scripts/serve_retrieval.py), and the URL right?"
        )

    def _next(self) -> tuple[str, bool]:
        """Whose turn it is, and whether it is up as far as we know; the one that failed first where none is."""
        self._turn += 1
        now = time.monotonic()
        order = [self._urls[(self._turn + i) % len(self._urls)] for i in range(len(self._urls))]
        chosen = next((url for url in order if self._failed[url] <= now), None)
        return (chosen, True) if chosen else (min(order, key=lambda url: self._failed[url]), False)

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


class _Recent(OrderedDict[str, V]):
    """The most recently used values, at most `KEPT_PASSAGES`. Used under `_lock` only."""

    def keep(self, key: str, value: V) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > KEPT_PASSAGES:
            self.popitem(last=False)

    def recall(self, key: str) -> V | None:
        if key not in self:
            return None
        self.move_to_end(key)
        return self[key]


_lock = threading.Lock()
"""Over all remembered passages. Held while the process forks, so that no child inherits it locked."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class RemoteCorpus(Corpus):
    """The passages of a server: fetched when they are asked for, and a number of them remembered.

    A Search-R1 server gives passages as search results only. Of its corpus, `[id]` knows what results have brought to
    this process, `len` counts that, and `by_title` searches for the title.

    Args:
        connection: to the server.

    Attributes:
        fingerprint: of the corpus that the server has: the same as when that is opened locally.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.fingerprint = connection.info.corpus
        self._passages: _Recent[Passage] = _Recent()
        self._titles: _Recent[Passage] = _Recent()

    @property
    def ids(self) -> Sequence[str]:
        """Not to be had. Raises RetrievalError."""
        raise RetrievalError(f"{self.connection.url} does not list its passages; open its corpus locally for that")

    def __iter__(self) -> Iterator[Passage]:
        raise RetrievalError(f"{self.connection.url} does not list its passages; open its corpus locally for that")

    def __len__(self) -> int:
        return self.connection.info.passages or len(self._passages)

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and self.fetch([passage_id])[0] is not None

    def __getitem__(self, passage_id: str) -> Passage:
        passage = self.fetch([passage_id])[0]
        if passage is not None:
            return passage
        if self.connection.info.api == "carl":
            raise KeyError(passage_id)
        raise RetrievalError(
            f"passage {passage_id!r} has not been among the results of {self.connection.url} in this process, and a "
            f"Search-R1 server cannot be asked for it; serve the corpus with scripts/serve_retrieval.py"
        )

    def fetch(self, ids: Sequence[str]) -> list[Passage | None]:
        """The passages with these ids, None for those that there are not; one request for what is not remembered."""
        with _lock:
            known = {id: self._passages.recall(id) for id in ids}
        unknown = [id for id, passage in known.items() if passage is None and _encodable(id)]
        if unknown and self.connection.info.api == "carl":
            for part in self.connection.parts(unknown):
                rows = self.connection.post("/passages", {"ids": part}, len(part))
                found = [None if row is None else self.connection.passage(row, "/passages") for row in rows]
                if wrong := [id for id, p in zip(part, found, strict=True) if p is not None and p.id != id]:
                    self.connection.fail("/passages", f"another passage than the one asked for ({wrong[0]!r})")
                known.update(zip(part, found, strict=True))
            self.remember(passage for passage in known.values() if passage is not None)
        return [known[id] for id in ids]

    def by_title(self, title: str) -> Passage | None:
        """The first passage with this title; of a Search-R1 server, the best result of a search for the title that
        has it.
        """
        key = " ".join(title.casefold().split())
        if not key or not _encodable(key):
            return None
        with _lock:
            passage = self._titles.recall(key)
        if passage is not None:
            return passage
        if self.connection.info.api == "carl":
            (row,) = self.connection.post("/titles", {"titles": [title]}, 1)
            passage = None if row is None else self.connection.passage(row, "/titles")
        else:
            request = {"queries": [title], "topk": TITLE_CANDIDATES, "return_scores": True}
            found = (hit[0] for hit in self.connection.hits(*self.connection.post("/retrieve", request, 1)))
            passage = next((p for p in found if " ".join(p.title.casefold().split()) == key), None)
        if passage is not None:
            self.remember([passage])
            with _lock:
                self._titles.keep(key, passage)
        return passage

    def remember(self, passages: Iterable[Passage]) -> None:
        """Keep passages for later."""
        with _lock:
            for passage in passages:
                self._passages.keep(passage.id, passage)


class Remote(Retriever):
    """Searches on a server.

    Args:
        corpus: the server's (`remote_corpus`), or a local copy of it, which must be the same to the letter.
        settings: where and how; the corpus' own where it is a `RemoteCorpus` and the settings name no URL.

    Raises:
        ConfigError: no URL.
        RetrievalError: the server cannot be reached, or has another corpus.
    """

    Settings = RemoteSettings

    def __init__(self, corpus: Corpus, settings: RemoteSettings | None = None) -> None:
        if settings is None:
            settings = corpus.connection.settings if isinstance(corpus, RemoteCorpus) else RemoteSettings()
        elif isinstance(corpus, RemoteCorpus) and not settings.url:
            settings = replace(settings, url=corpus.connection.settings.url)
        if not settings.url:
            raise ConfigError(
                "no server to search on: set url in the index card, or give the corpus as http://host:port"
            )
        if isinstance(corpus, RemoteCorpus) and corpus.connection.settings == settings:
            self.connection = corpus.connection
        else:
            named = corpus.connection if isinstance(corpus, RemoteCorpus) else None
            self.connection = Connection(
                settings, trusted=named is not None and named.trusted and named.settings.url == settings.url
            )
        info = self.connection.info
        if (info.api == "carl" or isinstance(corpus, RemoteCorpus)) and info.corpus != corpus.fingerprint:
            raise RetrievalError(
                f"{self.connection.url} serves another corpus (fingerprint {info.corpus}, {info.passages:,} passages) "
                f"than the one given ({corpus.fingerprint}); give the same file to both, or no corpus here but the URL"
            )
        super().__init__(corpus, settings)
        self._remote = corpus if isinstance(corpus, RemoteCorpus) else RemoteCorpus(self.connection)

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        settings: RemoteSettings | None = None,
        *,
        work: Path | None = None,
        progress: Progress = silent,
    ) -> Remote:
        """Connect: there is nothing to index."""
        return cls(corpus, settings)

    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        """What the server finds.

        Raises:
            ConfigError: `k` is below 1.
            RetrievalError: the server fails or answers nonsense.
        """
        check_k(k)
        found: list[list[tuple[Passage, float]]] = []
        clean = [query if _encodable(query) else query.encode("utf-8", "replace").decode() for query in queries]
        for part in self.connection.parts(clean):
            request = {"queries": part, "topk": k, "return_scores": True}
            found += map(self.connection.hits, self.connection.post("/retrieve", request, len(part)))
        for hits in found:
            if len(hits) > k:
                self.connection.fail("/retrieve", f"{len(hits)} results for a query, asked for {k}")
            if self.connection.info.api == "carl" and len({passage.id for passage, _ in hits}) < len(hits):
                self.connection.fail("/retrieve", "the same passage twice in the results of a query")
            for passage, _ in hits:
                if self._remote is not self.corpus and passage.id not in self.corpus:
                    self.connection.fail("/retrieve", f"passage {passage.id!r}, which the local corpus does not have")
        self._remote.remember(passage for hits in found for passage, _ in hits)
        return SearchResults(
            [[passage.id for passage, _ in hits] for hits in found], [[score for _, score in hits] for hits in found]
        )

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in order, in one request. Raises KeyError on an id that the server lacks."""
        if self._remote is not self.corpus:
            return super().get(ids)
        found = self._remote.fetch(ids)
        return [self.corpus[id] if passage is None else passage for id, passage in zip(ids, found, strict=True)]

    def describe(self) -> dict[str, str | int | float]:
        """The server's URL and what its own retriever says."""
        server = {f"server_{key}": value for key, value in self.connection.info.describe.items()}
        return {"retriever": "Remote", "url": self.connection.url, "api": self.connection.info.api, **server}


def remote_corpus(url: str, **settings: Any) -> RemoteCorpus:
    """The corpus of the server at a URL.

    Args:
        url: such as http://127.0.0.1:8000.
        **settings: others of `RemoteSettings`.

    Raises:
        ConfigError: the URL is none.
        RetrievalError: nobody answers there, or no retrieval server does.
    """
    return RemoteCorpus(Connection(RemoteSettings(url, **settings), trusted=True))


def _encodable(text: str) -> bool:
    """Whether it can be sent: not with half of a surrogate pair, which no corpus holds either."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
