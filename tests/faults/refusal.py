"""A machine that refuses a file: at the first, the second, the third ... time that one is written to."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Refusal:
    """Operations below a folder that would change it are counted, and number `at` fails with this error, as do all
    after it where it is lasting. Python's audit events tell of each: opened to write, renamed, made. Syncing
    and what safetensors writes are told of besides."""

    def __init__(self, place: Path, at: int, number: int, lasting: bool = False) -> None:
        self.place, self.at, self.number, self.lasting = str(place), at, number, lasting
        self.count = 0

    def happens(self, path: Any) -> None:
        known = isinstance(path, str | bytes | os.PathLike)
        if not known or not os.path.abspath(os.fsdecode(path)).startswith(self.place):
            return
        self.count += 1
        if self.count == self.at or (self.lasting and self.count > self.at):
            raise OSError(self.number, os.strerror(self.number), os.fsdecode(path))


_now: Refusal | None = None


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if _now is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if any(letter in (mode or "") for letter in "wax+") or (mode is None and flags & WRITES):
            _now.happens(path)
    elif event == "os.rename":
        _now.happens(arguments[1])
    elif event == "os.truncate" or (event == "os.mkdir" and not os.path.isdir(arguments[0])):
        _now.happens(arguments[0])


sys.addaudithook(_heard)  # which cannot be taken back: it does nothing outside of `refused`
_fsync, _serialize = os.fsync, safetensors.torch.serialize_file


def _synced(handle: int) -> None:
    if _now is not None:
        _now.happens(os.readlink(f"/proc/self/fd/{handle}"))
    _fsync(handle)


def _serialized(tensors: Any, path: Any, *arguments: Any, **words: Any) -> None:
    """As a disk that fills: half of the file is there."""
    _serialize(tensors, path, *arguments, **words)
    if _now is not None:
        try:
            _now.happens(path)
        except OSError as error:
            os.truncate(path, os.path.getsize(path) // 2)
            raise safetensors.SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None


@contextmanager
def refused(place: Path, at: int, number: int, lasting: bool = False) -> Iterator[Refusal]:
    global _now
    os.fsync, safetensors.torch.serialize_file = _synced, _serialized
    try:
        _now = Refusal(place, at, number, lasting)
        yield _now
    finally:
        _now = None
        os.fsync, safetensors.torch.serialize_file = _fsync, _serialize


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file can be written beyond so many bytes, by whatever library: each write to it fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
