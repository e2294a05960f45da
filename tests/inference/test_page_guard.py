"""The demo page answers its own page alone, takes uploads within bounds and leaves none behind."""

import asyncio
import os
import signal
import tempfile
from pathlib import Path

import pytest

from rescom_timm.inference import page_guard
from rescom_timm.inference.page_guard import MAX_REQUEST, PageGuard, own_uploads

PAGE = "127.0.0.1:7860"


def status(host="127.0.0.1", kind="http", **headers):
    """Of the answer to a request with these headers, by a server that listens on `host`."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(PageGuard(app, host)({"type": kind, "headers": pairs}, None, send))
    return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize("host", [PAGE, "localhost:7860", "[::1]:7860", "LOCALHOST"])
def test_the_own_page_is_served(host):
    assert answer(host) == 200
    assert answer(host, origin=f"http://{host}") == 200


def answer(asked, listening="127.0.0.1", **headers):
    return status(listening, Host=asked, **headers)


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:7860", "127.0.0.1.evil.com", "10.0.0.1:7860", "", "[::1", "a@b"]
)
def test_another_host_is_refused(host):
    assert status() == 403  # none at all
    assert answer(host) == 403
    assert status("127.0.0.1", "websocket", Host=host) == 1008


@pytest.mark.parametrize("origin", ["http://evil.com", "null", "", f"http://{PAGE}.evil.com", "http://127.0.0.1:9999"])
def test_another_origin_is_refused(origin):
    assert answer(PAGE, origin=origin) == 403


def test_other_machines_call_by_address_or_own_name(monkeypatch):
    monkeypatch.setattr(page_guard.socket, "gethostname", lambda: "box")
    monkeypatch.setattr(page_guard.socket, "getfqdn", lambda: "box.lan")
    for host in ("10.0.0.5:7860", "box:7860", "BOX.lan", "localhost:7860", "[fe80::1]:7860"):
        assert answer(host, "0.0.0.0") == 200
        assert answer(host, "0.0.0.0", origin=f"http://{host}") == 200
    for host in ("evil.com", "box.evil.com"):
        assert answer(host, "0.0.0.0") == 403
    assert answer("photos.lan", "photos.lan") == 200


@pytest.mark.parametrize(
    ("length", "code"),
    [("10", 200), (str(MAX_REQUEST + 1), 413), ("9" * 5000, 413), ("-1", 413), ("0" * 30 + "9" * 12, 413)],
)
def test_a_large_request_is_refused(length, code):
    assert answer(PAGE, content_length=length) == code


def test_a_request_in_chunks_ends_at_the_bound(monkeypatch):
    """It says no length."""
    monkeypatch.setattr(page_guard, "MAX_REQUEST", 25)
    taken = []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            taken.append(message["body"])

    async def receive():
        return {"type": "http.request", "body": bytes(10), "more_body": True}

    scope = {"type": "http", "headers": [(b"host", PAGE.encode()), (b"transfer-encoding", b"chunked")]}
    asyncio.run(asyncio.wait_for(PageGuard(app, "127.0.0.1")(scope, receive, None), 5))
    assert sum(map(len, taken)) == 20


def test_uploads_are_removed_at_the_end(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/before")
    folders = []

    def terminated() -> None:
        with own_uploads() as folder:
            folders.append(Path(folder))
            assert os.environ["GRADIO_TEMP_DIR"] == tempfile.gettempdir() == folder
            (Path(folder) / "x").mkdir()
            (Path(folder) / "x/photo.png").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)

    with pytest.raises(SystemExit) as ended:
        terminated()
    assert ended.value.code == 143 and not folders[0].exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "/before" and Path(tempfile.gettempdir()) != folders[0]


def test_the_page_is_launched_with_the_guard():
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from rescom_timm.cli.demo import guarded

    options = guarded("127.0.0.1")
    assert options["server_name"] == "127.0.0.1" and options["max_file_size"] == page_guard.MAX_UPLOAD
    assert options["app_kwargs"]["middleware"][0].cls is PageGuard
