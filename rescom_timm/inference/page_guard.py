"""Middleware of the demo page: requests must come from the page itself, name its own host and be of bounded size."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

MAX_UPLOAD = 64 * 2**20
"""Bytes of one uploaded file."""
MAX_REQUEST = 2**30
"""Bytes of one request with all its files."""
DELETE_CACHE = (60, 600)
"""Seconds between two checks of the uploads, and the age at which they are deleted."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class PageGuard:
    """ASGI middleware that refuses requests.

    403 for a request to another host name (DNS rebinding) or from another page (Origin), 413 above MAX_REQUEST bytes.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], host: str) -> None:
        """host: the address that the server listens on."""
        self.app, self.host = app, host

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        if (status := refusal(headers, self.host)) is None:
            await self.app(scope, _counted(receive) if scope["type"] == "http" else receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = {403: b"refused: another host or origin", 413: b"refused: too large"}[status]
            start = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": start})
            await send({"type": "http.response.body", "body": body})


def _counted(receive: Receive) -> Receive:
    """`receive` of a request that ends like a client's disconnect after MAX_REQUEST bytes.

    A chunked request does not state its length.
    """
    left = MAX_REQUEST

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return counted


def refusal(headers: MutableMapping[str, list[str]], host: str) -> int | None:
    """The HTTP status that refuses a request; None to accept it. headers: lower-case names and their values."""
    hosts, origins, lengths = (headers.get(name, []) for name in ("host", "origin", "content-length"))
    if len(hosts) != 1 or not _own_host(hosts[0], host):
        return 403
    if any(urlsplit(origin).netloc.lower() != hosts[0].lower() for origin in origins):
        return 403
    if any(not length.isdecimal() or int(length.lstrip("0")[:20] or 0) > MAX_REQUEST for length in lengths):
        return 413
    return None


def _own_host(asked: str, listening: str) -> bool:
    """Whether a Host header names this machine.

    Accepted are loopback names, the listening address and, if other machines may connect, any IP address (which DNS
    cannot redirect) and the machine's own names.
    """
    try:
        name = (urlsplit(f"//{asked}").hostname or "").lower()
    except ValueError:
        return False
    if name in ("localhost", "127.0.0.1", "::1", listening.lower().strip("[]")):
        return True
    if is_local(listening):
        return False
    return _is_address(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower())


def is_local(host: str) -> bool:
    """Whether a server on this address accepts connections from this machine only."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@contextmanager
def own_uploads() -> Iterator[str]:
    """A folder for uploads, removed at the end, also by SIGTERM (exit code 143)."""

    def end(*_: Any) -> None:
        raise SystemExit(143)

    before = tempfile.tempdir, os.environ.get("GRADIO_TEMP_DIR"), signal.signal(signal.SIGTERM, end)
    try:
        with tempfile.TemporaryDirectory(prefix="rescom-timm-demo-", ignore_cleanup_errors=True) as folder:
            tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder
            yield folder
    finally:
        tempfile.tempdir = before[0]
        os.environ.pop("GRADIO_TEMP_DIR", None)
        if before[1] is not None:
            os.environ["GRADIO_TEMP_DIR"] = before[1]
        signal.signal(signal.SIGTERM, before[2])
