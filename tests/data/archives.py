"""Small archives of iNaturalist 2018 and Places-LT in the official layout, served from this machine."""

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from rescom_timm.data.benchmarks import BENCHMARKS

PLACES = {"train": ["airfield", "airfield", "arena-hockey"], "val": ["airfield", "arena-hockey"]}


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def archive(members: dict[str, bytes], gz: bool = False) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz" if gz else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def places() -> dict[str, bytes]:
    """The published files of Places-LT, small."""
    classes = ["airfield", "arena-hockey"]
    files, images = {}, {"train": {}, "val": {}}
    for split, members in PLACES.items():
        rows = []
        for number, name in enumerate(members):
            if split == "train":
                listed, stored = f"train/{name}/{number}.jpg", f"data_256/a/{name.replace('-', '/')}/{number}.jpg"
            else:
                listed, stored = f"val/{name}/Places365_val_{number}.jpg", f"val_256/Places365_val_{number}.jpg"
            images[split][stored] = jpeg(10 * number)
            rows.append(f"{listed} {classes.index(name)}\n")
        files[f"Places_LT_{'test' if split == 'val' else split}.txt"] = "".join(rows).encode()
    files["Places_LT_val.txt"] = b"train/airfield/9.jpg 0\n"
    files["val_256.tar"] = archive(images["val"])
    files["train_256_places365standard.tar"] = archive(images["train"])
    return files


def inat() -> dict[str, bytes]:
    names = ["train_val2018/A/0/x.jpg", "train_val2018/B/1/y.jpg", "train_val2018/B/1/z.jpg"]
    files = {"train_val2018.tar.gz": archive({name: jpeg(9) for name in names}, gz=True)}
    for split, chosen in {"train": [0, 1], "val": [2]}.items():
        content = {
            "images": [{"id": i, "file_name": names[i]} for i in chosen],
            "annotations": [{"id": i, "image_id": i, "category_id": min(i, 1)} for i in chosen],
            "categories": [{"id": 0, "name": "Apis mellifera"}, {"id": 1, "name": "Bufo bufo"}],
        }
        members = {f"{split}2018.json": json.dumps(content).encode()}
        files[f"{split}2018.json.tar.gz"] = archive(members, gz=True)
    return files


def git_id(content: bytes) -> str:
    return "git:" + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        state, name = self.server.state, self.path.rpartition("/")[2]
        if body:
            state["asked"].append((name, self.headers.get("Range")))
        if name in state["gone"]:
            self.send_error(404)
            return
        content, start = state["files"][name], 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        cut = state["cut"].pop(name, None)
        self.wfile.write(content[start : len(content) if cut is None else cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The two benchmarks with small files of their own, served from this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.state = {"files": {**places(), **inat()}, "gone": set(), "cut": {}, "asked": []}
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    for name, (rows, classes) in {"places_lt": (3, 2), "inat18": (2, 2)}.items():
        files = []
        for file in BENCHMARKS[name].files:
            content = http.state["files"][file.name]
            is_list = file.digest.startswith("git:")
            digest = git_id(content) if is_list else f"md5:{hashlib.md5(content).hexdigest()}"
            url = f"http://127.0.0.1:{http.server_port}/{file.name}"
            files.append(replace(file, url=url, digest=digest, size=len(content)))
        small = replace(BENCHMARKS[name], files=tuple(files), rows=rows, classes=classes)
        monkeypatch.setitem(BENCHMARKS, name, small)
    yield http.state
    http.shutdown()
    http.server_close()
    thread.join()
