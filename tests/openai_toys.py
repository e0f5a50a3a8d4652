"""A chat-completions server over real HTTP whose replies a test writes, and which is strict about what it is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from carl_gym.agents.messages import MessageTranscript
from carl_gym.agents.openai_policy import OpenAIPolicy, openai_agent
from carl_gym.agents.policy import Completion, SampleRequest
from carl_gym.envs.protocol import function_schemas

Body = dict[str, Any]
Start = Callable[..., tuple[OpenAIPolicy, MessageTranscript, "ChatServer"]]
TOOLS = function_schemas()


@dataclass(frozen=True)
class Reply:
    """An HTTP response: `body` as JSON, or these bytes.

    Attributes:
        cut: close the connection before the last so many bytes.
        hang: send nothing until the client hangs up.
        drip: then send a byte now and then, for as long as somebody listens.
    """

    body: object = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int = 0
    hang: bool = False
    drip: bool = False


def message(content: str | None = None, *calls: tuple[str, object], finish: str = "", **more: object) -> Reply:
    """An assistant's message; a call is a function's name and its arguments, which a text gives as they are."""
    found: dict[str, object] = {"role": "assistant", "content": content, **more}
    if calls:
        texts = [(name, given if isinstance(given, str) else json.dumps(given)) for name, given in calls]
        found["tool_calls"] = [
            {"id": f"id{n}", "type": "function", "function": {"name": name, "arguments": text}}
            for n, (name, text) in enumerate(texts)
        ]
    choice = {"index": 0, "message": found, "finish_reason": finish or ("tool_calls" if calls else "stop")}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return Reply({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


def error(status: int, text: str, **headers: str) -> Reply:
    """An error as OpenAI's API has it; `retry_after="0"` becomes the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply({"error": {"message": text, "type": "invalid_request_error", "code": None}}, status, named)


class ChatServer:
    """Use as a context manager.

    Args:
        answer: what the request with this body and this number (from 0, in the order of arrival) gets.

    Attributes:
        bodies: of all requests.
        keys: their Authorization headers.
        peak: most requests that were in flight at once.
        hung_up: set once a client did not wait for a reply that hangs.
    """

    def __init__(self, answer: Callable[[Body, int], Reply]) -> None:
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.peak = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self.hung_up = threading.Event()
        self._closing = threading.Event()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat._lock:
                    number = len(chat.bodies)
                    chat.bodies.append(body)
                    chat.keys.append(self.headers.get("Authorization"))
                    chat._in_flight += 1
                    chat.peak = max(chat.peak, chat._in_flight)
                try:
                    if self.path != "/v1/chat/completions":
                        reply = error(404, f"no {self.path} here")
                    else:
                        reply = error(400, fault) if (fault := mistake(body["messages"])) else answer(body, number)
                finally:
                    with chat._lock:  # before the client can know, so that its next request finds the place free
                        chat._in_flight -= 1
                self.send(reply)

            def send(self, reply: Reply) -> None:
                if reply.hang:
                    self.close_connection = not self.rfile.read(1)
                    chat.hung_up.set()
                    return
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                length = 1 << 30 if reply.drip else len(data)
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(length), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.close_connection = bool(reply.cut) or reply.drip
                try:
                    self.wfile.write(data[: len(data) - reply.cut])
                    while reply.drip and not chat._closing.wait(0.01):
                        self.wfile.write(b" ")
                except OSError:
                    pass  # nobody listens any more

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


def mistake(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with a conversation, as strict servers see it; None where it is a valid one."""
    roles = ["user"]  # who may speak next
    called: set[str] = set()
    for position, said in enumerate(messages):
        role = said["role"]
        if position if role == "system" else role not in roles:
            return f"message {position}: {role} where {roles} may speak"
        if not isinstance(said.get("content"), str) or said.keys() - {"role", "content", "tool_calls", "tool_call_id"}:
            return f"message {position}: content that is no text, or unknown fields {list(said)}"
        if role == "tool" and {said["tool_call_id"]} != called:
            return f"message {position}: answers {said['tool_call_id']}, expected {called}"
        called = set()
        for call in said.get("tool_calls", ()):
            called.add(call["id"])
            try:
                if call["type"] != "function" or not isinstance(json.loads(call["function"]["arguments"]), dict):
                    return f"message {position}: arguments that are no object"
            except ValueError:
                return f"message {position}: arguments that are not JSON"
        roles = ["assistant"] if role in ("user", "tool") else ["tool"] if called else ["user"]
    return None if roles == ["assistant"] else "the user or a tool must speak last"


@contextmanager
def starting() -> Iterator[Start]:
    """Gives a function that starts a server which answers so, and an agent that asks it and rarely pauses."""
    with ExitStack() as stack:

        def start(
            answer: Callable[[Body, int], Reply], **settings: Any
        ) -> tuple[OpenAIPolicy, MessageTranscript, ChatServer]:
            server = stack.enter_context(ChatServer(answer))
            settings = {"tools": TOOLS, "base_url": server.url, "backoff": 0.001, **settings}
            policy, transcript = openai_agent("toy", **settings)
            return stack.enter_context(policy), transcript, server

        yield start


def ask(policy: OpenAIPolicy, transcript: MessageTranscript, text: str = "Who?", **more: Any) -> Completion:
    """The action of an agent that was asked this question."""
    (found,) = policy.sample([SampleRequest(transcript.prompt(text), seed=1, max_tokens=50, **more)])
    return found
