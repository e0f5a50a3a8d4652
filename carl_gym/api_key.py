"""The key of our servers: where it is read from, how a server checks it, to whom a client sends it.

It is never the value of an option, which `ps` shows, and never part of settings, which are logged, hashed and stored:
server and client read it from a variable (or a server from a file) when they need it.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from carl_gym.errors import ConfigError

VARIABLE = "CARL_GYM_API_KEY"
OPEN_PATHS = ("/healthz", "/health")
"""What is answered without the key: that a server is up, which load balancers ask."""


def read_api_key(file: Path | None = None) -> str:
    """The key in a file, else in the variable `VARIABLE`; "" where that is not set: then there is none.

    Raises:
        ConfigError: the file cannot be read or is empty, or the key has characters that no HTTP header may have.
    """
    where = VARIABLE if file is None else str(file)
    try:
        key = os.environ.get(VARIABLE, "") if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: the API key cannot be read ({error})") from error
    key = key.strip()
    if file is not None and not key:
        raise ConfigError(f"{where}: there is no API key in the file; write one line into it")
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"{where}: the API key has blanks or characters outside of ASCII; choose another one")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is this machine, and no other reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_header(url: str, *, trusted: bool) -> dict[str, str]:
    """The header by which a client shows the key to a server; none where there is no key, or not for this server.

    Args:
        url: of the server.
        trusted: whether the user named the server. An address in a card is not trusted: its author would choose who
            gets the key. It gets the key only where it is this machine.

    Raises:
        ConfigError: as `read_api_key`.
    """
    key = read_api_key()
    try:
        here = is_loopback(urlsplit(url).hostname or "")
    except ValueError:  # no URL, as its user will find out
        here = False
    return {"Authorization": f"Bearer {key}"} if key and (trusted or here) else {}


def key_advice(url: str, *, trusted: bool) -> str:
    """What to do about a server that answers 401."""
    if key_header(url, trusted=trusted):
        return f"the key in {VARIABLE} is not the server's"
    if read_api_key():
        return f"the address comes from a card, and only a server that you name yourself gets the key in {VARIABLE}"
    return f"set {VARIABLE} to the server's key"


def check_no_password(url: str) -> None:
    """Raises ConfigError on an address with a user name or password: addresses are shown, logged and stored."""
    if re.match(r"\s*\w+://[^/?#]*@", url):
        host = url.rpartition("@")[2]
        raise ConfigError(f"the address of {host} must hold no user name or password; put a key into {VARIABLE}")


class KeyGate:
    """An ASGI application behind a key: whoever does not send `Authorization: Bearer <key>` gets 401.

    Args:
        app: what is behind it.
        key: without one it is read from the environment, as vLLM needs it (`--middleware`).

    Raises:
        ConfigError: there is no key.
    """

    def __init__(self, app: Any, key: str = "") -> None:
        self._app = app
        key = key or read_api_key()
        if not key:
            raise ConfigError(f"there is no API key to guard the server with; set {VARIABLE}")
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._is_shown(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps(
                {"detail": f"this server needs its API key as 'Authorization: Bearer <key>'; clients of carl-gym send "
                           f"what is in {VARIABLE}"}
            ).encode()  # fmt: skip
            headers = [
                (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
                (b"www-authenticate", b"Bearer"), (b"connection", b"close"),
            ]  # fmt: skip
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _is_shown(self, scope: Any) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # In constant time: how long a refusal takes must not tell how much of a guess was right.
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
