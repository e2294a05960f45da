"""A small server on 127.0.0.1 that speaks the Hub's routes, for tests of pushing and fetching with the real client.

    with HubServer(tokens={"hf_me": {"me"}}) as server:      # token -> owners that it may write to
        os.environ["HF_ENDPOINT"] = server.url               # before huggingface_hub is imported, as is
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        server.faults.append(Fault("PUT /lfs/", "cut", times=1))

Repositories live in `server.repos`: each a list of commits (sha, {path: bytes}), with `private`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = r"(?:models/|(?=spaces/))((?:spaces/)?[^/]+/[^/]+)"
"""Of a repository in a route: a Space keeps the word before its name."""


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD path" begins as this regular expression says, the next few times."""

    where: str
    what: int | str
    """A status; "cut": the connection ends in the middle of a body; "corrupt": a byte of the body is another;
    "slow": answered after `seconds`; "body": answered with `body`; "torn": half of the body, which is said to be all;
    "longer", "shorter", "huge": the answer says another length than it has; "redirect": elsewhere, as `headers` say."""
    times: int = 1
    seconds: float = 0.3
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the newest commit."""
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}{message}".encode()).hexdigest()
        self.commits.append((sha, files))
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubServer:
    def __init__(self, tokens: dict[str, set[str]]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.headers: list[dict[str, str]] = []
        self.requests: list[str] = []
        self.lock = Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.http.daemon_threads = True
        self.http.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository that is there already."""
        repo = self.repos[name] = Repo(private)
        repo.commit(files, "by hand")
        return repo

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.match(fault.where, request):
                    fault.times -= 1
                    return fault
        return None


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", text: str = "", **more: str) -> None:
        self.status, self.code, self.text, self.more = status, code, text, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *words: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has left
            super().handle()

    def do(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(f"{self.command} {path}")
        self.corrupt = fault is not None and fault.what == "corrupt"
        self.cut_answer = fault is not None and fault.what == "cut" and self.command == "GET"
        self.lie = fault.what if fault is not None and fault.what in ("torn", "longer", "shorter", "huge") else ""
        self.hub.headers.append(dict(self.headers))
        size = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.what == "cut" and not self.cut_answer:
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        if fault is not None and fault.what == "slow":
            time.sleep(fault.seconds)
        try:
            if fault is not None and isinstance(fault.what, int):
                raise _Refused(fault.what, text="injected")
            if fault is not None and fault.what in ("body", "redirect"):
                self.answer(fault.body, 302 if fault.what == "redirect" else 200, fault.headers)
                return
            self.route(path, body)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self.answer(json.dumps({"error": refused.text, **refused.more}).encode(), refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if self.lie == "torn":
            body = body[: len(body) // 2]
        lengths = {"longer": 2 * len(body) + 9, "shorter": len(body) // 2, "huge": 10**13}
        self.send_header("Content-Length", str(lengths.get(self.lie, len(body))))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.corrupt and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.cut_answer:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)
        if self.lie in lengths:
            self.close_connection = True

    def tell(self, value: Any) -> None:
        self.answer(json.dumps(value).encode())

    # ------------------------------------------------------------------------------------------------------- routes

    def route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.tell({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            hub.blobs[match[1]] = body
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise _Refused(400, text="sha256 differs")
            return self.answer(b"")
        if path == "/verify":
            return self.tell({})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repo(match[1], write=True)
            return self.batch(json.loads(body))
        if match := re.fullmatch(rf"/api/{NAME}/(preupload|commit)/(.+)", path):
            repo = self.repo(match[1], write=True)
            return self.preupload(json.loads(body)) if match[2] == "preupload" else self.commit(match[1], repo, body)
        if match := re.fullmatch(rf"/api/{NAME}(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path):
            return self.describe(match[1], match[2], match[3] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(match[1], match[2], match[3])
        raise _Refused(404, text=f"no such route: {path}")

    def owners(self) -> set[str] | None:
        """Those that the caller's token may write to; None without a token. Refuses an unknown token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refused(401, text="Invalid credentials in Authorization header")
        return self.hub.tokens[token] if token else None

    def repo(self, name: str, write: bool = False) -> Repo:
        owners = self.owners()
        repo = self.hub.repos.get(name)
        owner = name.removeprefix("spaces/").split("/")[0]
        if repo is None or (repo.private and owner not in (owners or ())):
            raise _Refused(401 if owners is None else 404, "RepoNotFound", "Repository not found")
        if write and owner not in (owners or ()):
            raise _Refused(401 if owners is None else 403, text="this token may not write here")
        return repo

    def create(self, asked: dict[str, Any]) -> None:
        owners = self.owners()
        name = f"{'spaces/' * (asked.get('type') == 'space')}{asked['organization']}/{asked['name']}"
        if owners is None:
            raise _Refused(401, text="log in")
        if asked["organization"] not in owners:
            raise _Refused(403, text="you have no right to create there")
        if name in self.hub.repos:
            raise _Refused(409, text="You already created this model repo", url=f"{self.hub.url}/{name}")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, bool(private))
        self.tell({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def preupload(self, asked: dict[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self.tell({"files": modes})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            oid = wanted["oid"]
            there = oid in self.hub.blobs and len(self.hub.blobs[oid]) == wanted["size"]
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append({**wanted, **({} if there else {"actions": actions})})
        self.tell({"transfer": "basic", "objects": objects})

    def commit(self, name: str, repo: Repo, body: bytes) -> None:
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        header = lines[0]["value"]
        with self.hub.lock:
            if header.get("parentCommit") not in (None, repo.commits[-1][0]):
                raise _Refused(412, text="A commit has happened since. Please refresh and try again.")
            files = dict(repo.files)
            for line in lines[1:]:
                kind, value = line["key"], line["value"]
                if kind == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        raise _Refused(400, text="that object was never uploaded")
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif kind == "deletedFile":
                    del files[value["path"]]
                else:
                    raise _Refused(400, text=f"unknown operation {kind}")
            sha = repo.commit(files, header["summary"])
        self.tell({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def describe(self, name: str, what: str | None, revision: str) -> None:
        repo = self.repo(name)
        found = repo.at(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", "no such revision")
        sha, files = found
        if what == "tree":
            entries = []
            for path, content in files.items():
                oid = hashlib.sha1(content).hexdigest()
                entries.append({"type": "file", "path": path, "size": len(content), "oid": oid})
            return self.tell(entries)
        siblings = [{"rfilename": path} for path in files]
        self.tell({"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        found = repo.at(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", "no such revision")
        sha, files = found
        if path not in files:
            raise _Refused(404, "EntryNotFound", "no such file")
        etag = hashlib.sha256(files[path]).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        self.answer(files[path], headers=headers)
