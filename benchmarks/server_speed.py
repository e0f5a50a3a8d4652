"""The retrieval server against the design of Search-R1's BM25 server, as a Markdown table.

    python benchmarks/server_speed.py --data-dir DIR [--output FILE.json]

Both serve the same passages in a process of their own and answer the same queries, the questions that lie beside the
passages, to the same client: raw sockets with keep-alive and requests made beforehand, so that the client costs
little of the machine. Every answer is checked for its status and its number of results. The baseline follows
search_r1/search/retrieval_server.py (PeterGriffinJin/Search-R1): FastAPI, a pydantic model, a synchronous endpoint,
one synchronous Lucene call per query. `--synthetic N` takes N generated passages instead of real ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import orjson
import uvloop
from pydantic import BaseModel

from carl_gym.retrieval.corpus import Corpus, Passage, read_jsonl

TOPK = 3
SECONDS = 6.0
WARM_UP = 4.0
"""Java compiles while it runs."""
POSTED = 64
"""Queries in a batched post."""


class QueryRequest(BaseModel):
    """What Search-R1's server takes."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


@dataclass(frozen=True)
class Measured:
    """Queries per second, and the latency of requests in milliseconds."""

    server: str
    concurrency: int
    queries_per_request: int
    queries_per_second: float
    p50: float
    p99: float
    failed: int


def passages(arguments: argparse.Namespace) -> list[Passage]:
    """Those of all data sets under --data-dir, or generated ones with word frequencies as in a language (Zipf)."""
    if not arguments.synthetic:
        files = sorted(Path(arguments.data_dir).rglob("corpus.jsonl*"))
        found = [passage for file in files for passage in Corpus.load(file)]
        return list({passage.id: passage for passage in found}.values())
    rng = np.random.default_rng(0)
    words = np.minimum(rng.zipf(1.2, (arguments.synthetic, 60)), 200_000)
    return [Passage(f"s{i}", f"w{line[0]} w{i}", " ".join(f"w{w}" for w in line)) for i, line in enumerate(words)]


def queries(arguments: argparse.Namespace) -> list[str]:
    """Questions of the same data sets; words of the generated ones."""
    if arguments.synthetic:
        rng = np.random.default_rng(1)
        return [" ".join(f"w{min(w, 200_000)}" for w in rng.zipf(1.2, 10)) for _ in range(1000)]
    files = sorted(Path(arguments.data_dir).rglob("questions.jsonl*"))
    found = [str(record["question"]) for file in files for _, record in read_jsonl(file)]
    random.Random(0).shuffle(found)
    return found


def serve_ours(corpus: Corpus) -> None:
    """What scripts/serve_retrieval.py runs."""
    from carl_gym.retrieval import make_retriever
    from carl_gym.retrieval.server import create_app, serve

    serve(create_app(make_retriever("bm25", corpus)), port=0, ready=lambda url: print(url, flush=True))


def serve_baseline(corpus: Corpus) -> None:
    """Search-R1's design; its passages come from memory, which is faster than its own ways to them."""
    import uvicorn
    from fastapi import FastAPI

    from carl_gym.retrieval import make_retriever
    from carl_gym.retrieval.corpus import join_contents
    from carl_gym.retrieval.lucene import Lucene
    from carl_gym.retrieval.server import _listen

    lucene = cast(Lucene, make_retriever("lucene", corpus))
    documents = {passage.id: {"id": passage.id, "contents": join_contents(passage)} for passage in corpus}
    app = FastAPI()

    @app.post("/retrieve")
    def retrieve(request: QueryRequest) -> dict[str, object]:
        result = []
        for query in request.queries:
            # As LuceneSearcher does: threads of the pool stay attached to Java, which is faster than `search`.
            ((ids, scores),) = lucene._search([query], request.topk or TOPK)
            result.append([{"document": documents[id], "score": score} for id, score in zip(ids, scores, strict=True)])
        return {"result": result}

    listener, url = _listen("127.0.0.1", 0)
    listener.listen(2048)
    print(url, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


SERVERS = {"search-r1 design, Lucene": serve_baseline, "carl-gym, bm25": serve_ours}


@contextmanager
def running(server: str, arguments: argparse.Namespace) -> Iterator[str]:
    """A server in a process of its own; gives its URL."""
    command = [sys.executable, __file__, "--serve", server, "--synthetic", str(arguments.synthetic)]
    command += ["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = next((line.strip() for line in process.stdout if line.startswith("http")), "")
        if not url:
            raise SystemExit(f"{server} did not start")
        yield url
    finally:
        process.terminate()
        process.wait()


class Client(asyncio.Protocol):
    """One connection that sends the next request as soon as it has the answer to the last."""

    def __init__(self, load: Load) -> None:
        self.load, self.buffer, self.needed = load, bytearray(), 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.send()

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.load.next_request())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.needed:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end]).lower()
            start = head.index(b"content-length:") + 15
            self.needed = end + 4 + int(head[start:].split(b"\r\n", 1)[0])
        if len(self.buffer) >= self.needed:
            right = self.buffer.startswith(b"HTTP/1.1 200") and self.buffer.count(b'"document"') >= self.load.expected
            self.load.done(self.sent, right)
            self.buffer.clear()
            self.needed = 0
            self.send()

    def connection_lost(self, error: Exception | None) -> None:
        self.load.lost += error is not None


class Load:
    """Requests of one shape, and how they were answered."""

    def __init__(self, url: str, texts: list[str], size: int) -> None:
        host = url.removeprefix("http://")
        self.expected = size  # at least one result per query
        self.requests = []
        for start in range(0, len(texts) - size + 1, size):
            body = orjson.dumps({"queries": texts[start : start + size], "topk": TOPK, "return_scores": True})
            head = f"POST /retrieve HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            self.requests.append(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.at = self.lost = self.failed = 0
        self.since = float("inf")
        self.latencies: list[float] = []

    def next_request(self) -> bytes:
        self.at += 1
        return self.requests[self.at % len(self.requests)]

    def done(self, sent: float, right: bool) -> None:
        now = time.perf_counter()
        if sent >= self.since:
            self.latencies.append(now - sent)
            self.failed += not right


async def measure(server: str, url: str, texts: list[str], concurrency: int, size: int) -> Measured:
    """Closed loop: so many connections, each with one request in flight."""
    load = Load(url, texts, size)
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    clients = [await loop.create_connection(lambda: Client(load), host, int(port)) for _ in range(concurrency)]
    await asyncio.sleep(WARM_UP)
    load.since = start = time.perf_counter()
    await asyncio.sleep(SECONDS)
    seconds = time.perf_counter() - start
    for transport, _ in clients:
        transport.abort()
    p50, p99 = np.percentile(load.latencies, [50, 99]) * 1000
    rate = len(load.latencies) * size / seconds
    return Measured(server, concurrency, size, round(rate, 1), round(p50, 3), round(p99, 3), load.failed + load.lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with data sets: corpus.jsonl and questions.jsonl (plain or .gz)")
    parser.add_argument("--synthetic", type=int, default=0, help="generated passages instead, so many")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, too")
    parser.add_argument("--serve", choices=list(SERVERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.data_dir or arguments.synthetic):
        parser.error("give --data-dir or --synthetic")
    if arguments.serve:
        SERVERS[arguments.serve](Corpus(passages(arguments)))
        return
    texts = queries(arguments)
    rows: list[Measured] = []
    print("| server | connections | queries per post | queries/s | p50 ms | p99 ms | wrong |\n|---|" + "---:|" * 6)
    for server in arguments.servers:
        with running(server, arguments) as url:
            for concurrency, size in ((1, 1), (32, 1), (1, POSTED)):
                row = uvloop.run(measure(server, url, texts, concurrency, size))
                rows.append(row)
                print(
                    f"| {row.server} | {row.concurrency} | {row.queries_per_request} | {row.queries_per_second:,.0f} | "
                    f"{row.p50:.2f} | {row.p99:.2f} | {row.failed} |",
                    flush=True,
                )
    if arguments.output:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "cores": os.cpu_count()}
        record = {"command": sys.argv[1:], **machine, "rows": [asdict(row) for row in rows]}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
