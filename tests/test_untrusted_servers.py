"""Servers and their key: who gets in, to whom a client shows it, and that it stands nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import torch
from fastapi import FastAPI, Request
from model_toys import tag_tokenizer
from server_toys import towns

from carl_gym import api_key
from carl_gym.agents import vllm_engine
from carl_gym.agents.agent import load_agent
from carl_gym.agents.card import resolve
from carl_gym.agents.vllm_server_policy import VllmServerPolicy
from carl_gym.agents.weight_transfer import DiskTransfer
from carl_gym.api_key import VARIABLE, KeyGate, is_loopback, key_header, read_api_key
from carl_gym.errors import CardError, ConfigError, PolicyError, RetrievalError
from carl_gym.retrieval import make_retriever
from carl_gym.retrieval.bm25 import BM25
from carl_gym.retrieval.registry import IndexCard
from carl_gym.retrieval.remote import remote_corpus
from carl_gym.retrieval.server import create_app, serving
from scripts import evaluate, serve_agent, serve_retrieval

ROOT = Path(__file__).resolve().parents[1]
KEY = "sesame-0123456789"
CORPUS = towns(20)
SHOWN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that asks for the key."""
    with serving(create_app(BM25(CORPUS), api_key=KEY)) as url:
        yield url


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(asdict(passage)) + "\n" for passage in CORPUS), encoding="utf-8")
    return path


# --- the door ---------------------------------------------------------------------------------------------------------

REQUESTS = [
    ("POST", "/retrieve"), ("POST", "/access"), ("POST", "/passages"), ("POST", "/titles"), ("GET", "/info"),
    ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/retrieve"), ("GET", "/nothing"),
    ("OPTIONS", "/retrieve"), ("GET", "/healthz/"), ("GET", "/healthz/../info"), ("GET", "//healthz"),
]  # fmt: skip
WRONG: list[dict[str, str]] = [
    {}, {"Authorization": ""}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"X-API-Key": KEY},
    {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer ü"},
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), REQUESTS)
def test_without_the_key_there_is_nothing(url: str, method: str, path: str) -> None:
    body = json.dumps({"queries": ["kabel"], "urls": ["t1"], "ids": ["t1"], "titles": ["Town 1"]})
    for headers in WRONG:
        given = {name: value.encode() for name, value in headers.items()}
        answer = httpx.request(method, url + path, content=body, headers=given)  # type: ignore[arg-type]
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert VARIABLE in answer.json()["detail"] and KEY not in answer.text
        assert not [name for name in answer.headers if name.startswith("x-")]
    assert httpx.request(method, url + path, content=body, headers=SHOWN).status_code != 401


def test_the_key_opens_and_health_is_for_everybody(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    found = httpx.post(f"{url}/retrieve", json={"query": "kabel"}, headers=SHOWN).json()
    assert len(found["result"][0]) == 3
    for path in ("/info", "/metrics", "/openapi.json"):
        answer = httpx.get(url + path, headers=SHOWN)
        assert answer.status_code == 200 and KEY not in answer.text


def test_a_large_request_without_the_key_is_not_read(url: str) -> None:
    """The connection ends: with the answer, or while the rest is still being sent."""
    with contextlib.suppress(httpx.TransportError):
        assert httpx.post(f"{url}/retrieve", content=b"x" * 20_000_000).status_code == 401
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(api_key.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or False)

    async def request(headers: list[tuple[bytes, bytes]]) -> int:
        sent: list[dict[str, int]] = []

        async def send(message: dict[str, int]) -> None:
            sent.append(message)

        await KeyGate(None, KEY)({"type": "http", "path": "/info", "headers": headers}, None, send)
        return sent[0]["status"]

    assert asyncio.run(request([(b"authorization", b"Bearer x")])) == 401
    assert compared == [(b"Bearer x", f"Bearer {KEY}".encode())]
    assert asyncio.run(request([(b"authorization", b"Bearer x")] * 2)) == 401  # which of the two counts?


def test_a_gate_without_a_key_does_not_open() -> None:
    with pytest.raises(ConfigError, match=f"no API key to guard the server with; set {VARIABLE}"):
        KeyGate(FastAPI())


# --- clients ----------------------------------------------------------------------------------------------------------


def test_a_client_shows_the_key_in_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RetrievalError, match=f"status 401: .*; set {VARIABLE} to the server's key"):
        remote_corpus(url, retries=0)
    monkeypatch.setenv(VARIABLE, "another")
    with pytest.raises(RetrievalError, match=f"the key in {VARIABLE} is not the server's") as refused:
        remote_corpus(url, retries=0)
    assert "another" not in str(refused.value)
    monkeypatch.setenv(VARIABLE, f" {KEY}\n")
    retriever = make_retriever("remote", remote_corpus(url))
    assert retriever.search(["kabel"], 3) == BM25(CORPUS).search(["kabel"], 3)


def test_a_card_does_not_choose_who_gets_the_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every address counts as another machine's: one that a card names gets no key, one of the user's does."""
    monkeypatch.setenv(VARIABLE, KEY)
    card = IndexCard("mine", "", "remote", cache=False, settings={"url": url, "retries": 0})
    assert make_retriever(card, CORPUS).search(["kabel"], 1)  # this machine, which cannot be a stranger's
    monkeypatch.setattr(api_key, "is_loopback", lambda host: False)
    with pytest.raises(RetrievalError, match="the address comes from a card, and only a server that you name yourself"):
        make_retriever(card, CORPUS)
    assert make_retriever("remote", remote_corpus(url)).search(["kabel"], 1)
    patient = IndexCard("mine", "", "remote", cache=False, settings={"retries": 1})  # the corpus' address
    assert make_retriever(patient, remote_corpus(url)).search(["kabel"], 1)
    with pytest.raises(RetrievalError, match="comes from a card"):
        make_retriever(card, remote_corpus(url.replace("127.0.0.1", "localhost")))


@pytest.mark.parametrize(
    ("address", "here"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_which_addresses_are_this_machine(address: str, here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback(address) is here
    monkeypatch.setenv(VARIABLE, KEY)
    host = f"[{address}]" if ":" in address else address
    assert key_header(f"http://{host}:80", trusted=False) == (SHOWN if here else {})


def test_the_card_of_a_model_folder_names_no_hosted_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maker would get the user's questions, and the key of whatever variable it names."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    asked = []
    with serving(stranger(asked)) as evil:
        card = f'id = "x"\ndescription = ""\nmodel = "m"\nbackend = "openai"\nurls = ["{evil}/v1"]\n'
        (tmp_path / "agent.toml").write_text(card + '[openai]\napi_key_variable = "AWS_SECRET_ACCESS_KEY"\n')
        with pytest.raises(CardError, match=r"agent\.toml: backend is openai, and the card of a model folder is about"):
            load_agent(str(tmp_path))
    assert not asked
    (tmp_path / "agent.toml").rename(tmp_path / "hosted.toml")  # a card that the user chose as such
    assert resolve(str(tmp_path / "hosted.toml"))[0].backend == "openai"


def stranger(asked: list[dict[str, str]]) -> FastAPI:
    """What answers vLLM's endpoints, and notes what it was sent."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def any_path(path: str, request: Request) -> object:
        asked.append({"path": path, **request.headers})
        return {"data": [{"max_model_len": 64}], "success": True}

    return app


def test_vllm_servers_get_the_key_with_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []
    tokenizer = tag_tokenizer()

    def connect(url: str, **settings: object) -> VllmServerPolicy:
        return VllmServerPolicy(
            [url], tokenizer, (), set(), context=64, transfer=DiskTransfer(tmp_path), patience=0.5, **settings
        )

    with serving(KeyGate(stranger(asked), KEY)) as url:  # type: ignore[arg-type]
        with pytest.raises(PolicyError, match=f"asks for an API key; set {VARIABLE} to the server's key"):
            connect(url)
        monkeypatch.setenv(VARIABLE, "another")
        with pytest.raises(PolicyError, match="is not the server's"):
            connect(url)
        assert not [request for request in asked if request["path"] != "health"]
        monkeypatch.setenv(VARIABLE, KEY)
        policy = connect(url)
        policy.sync({"w": torch.zeros(1)})
        policy.close()
        guarded = [request for request in asked if request["path"] != "health"]
        assert {"v1/models", "pause", "collective_rpc", "update_weight_version"} <= {r["path"] for r in guarded}
        monkeypatch.setattr(api_key, "is_loopback", lambda host: False)
        with pytest.raises(PolicyError, match="the address comes from a card"):
            connect(url, trusted=False)


@pytest.mark.parametrize("make", ["retrieval", "vllm"])
def test_addresses_hold_no_passwords(make: str) -> None:
    """They are shown, logged, hashed and stored."""
    with pytest.raises(ConfigError, match="must hold no user name or password") as refused:
        if make == "retrieval":
            remote_corpus("http://me:hunter2@127.0.0.1:1", retries=0)
        else:
            VllmServerPolicy(["http://me:hunter2@127.0.0.1:1"], tag_tokenizer(), (), set(), context=8, patience=0.1)
    assert "hunter2" not in str(refused.value)


# --- where the key does not stand -------------------------------------------------------------------------------------


def test_the_key_is_in_no_setting_state_result_or_store(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    retriever = make_retriever("remote", remote_corpus(url))
    retriever.search(["kabel"], 1)
    (connection,) = retriever.servers.connections  # type: ignore[attr-defined]
    texts = [repr(vars(connection)), repr(retriever.settings), json.dumps(retriever.describe())]
    assert KEY not in "".join(texts) and KEY.encode() not in pickle.dumps(retriever)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"id": "q", "question": "Which town?", "answers": ["Town 1"]}\n')
    evaluate.main(
        ["--agents", "heuristic", "--envs", "carl/SearchQA-v0", "--env-args", f"questions={questions}",
         f"corpus={url}", "--output-dir", str(tmp_path / "out"), "--tracking-uri", f"sqlite:///{tmp_path / 'ml.db'}"]
    )  # fmt: skip
    printed = "".join(capsys.readouterr())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and KEY not in printed
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("by", ["variable", "file"])
def test_a_served_key_is_not_seen_by_ps_or_in_the_log(file: Path, tmp_path: Path, by: str) -> None:
    environment, options = dict(os.environ), ["--corpus", str(file), "--index", "miniwiki-bm25", "--port", "0"]
    if by == "variable":
        environment[VARIABLE] = KEY
    else:
        (tmp_path / "key").write_text(KEY + "\n")
        options += ["--api-key-file", str(tmp_path / "key")]
    command = [sys.executable, "scripts/serve_retrieval.py", *options]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        address = line.split()[3]
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(f"{address}/info").status_code == 401
        assert httpx.get(f"{address}/info", headers=SHOWN).status_code == 200
        shown = Path(f"/proc/{process.pid}/cmdline")
        if shown.exists():
            assert KEY.encode() not in shown.read_bytes()
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert KEY not in line + process.stdout.read() + process.stderr.read()


# --- addresses --------------------------------------------------------------------------------------------------------


def test_servers_listen_on_this_machine_unless_told_otherwise() -> None:
    assert serve_retrieval.Options().host == serve_agent.Options("tiny").host == "127.0.0.1"
    command = vllm_engine.serve_arguments("m", dtype="auto", context=None, port=1, cpu=False)
    assert command[command.index("--host") + 1] == "127.0.0.1" and "--middleware" not in command


def test_an_open_retrieval_server_warns_first(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what Search-R1's clients need, in a network that is trusted: so it runs, but says what that means."""
    monkeypatch.setattr(serve_retrieval, "serve", lambda *_, **__: None)
    options = ["--corpus", str(file), "--index", "miniwiki-bm25"]
    serve_retrieval.main([*options, "--host", "0.0.0.0"])
    said = " ".join(capsys.readouterr().err.split())
    assert f"warning: without a key, whoever reaches 0.0.0.0 can read the whole corpus; set {VARIABLE}" in said
    serve_retrieval.main(options)
    monkeypatch.setenv(VARIABLE, KEY)
    serve_retrieval.main([*options, "--host", "0.0.0.0"])
    assert "warning" not in capsys.readouterr().err


def test_an_open_agent_server_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reaches it could change the weights: nobody wants that, and a key costs nothing."""
    for host in ("0.0.0.0", "::", "10.0.0.1", socket.gethostname()):
        with pytest.raises(SystemExit, match="2"):
            serve_agent.main(["tiny", "--dry-run", "--host", host])
        assert "without a key: whoever reaches the server could change its weights" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, KEY)
    serve_agent.main(["tiny", "--dry-run", "--host", "0.0.0.0"])
    said = capsys.readouterr().out
    assert f"--middleware {vllm_engine.KEY_GATE}" in said and "--host 0.0.0.0" in said and KEY not in said


def test_the_key_is_no_option_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--api-key", KEY], [f"--api_key={KEY}"]):
        with pytest.raises(SystemExit, match="2"):
            serve_agent.main(["tiny", "--dry-run", *given])
        said = capsys.readouterr().err
        assert "shows the key to everybody who runs ps" in said and KEY not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("\n", "no API key in the file"), ("a b", "has blanks"), ("ü", "ASCII")],
)
def test_keys_that_are_none_are_explained(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_api_key(path)
