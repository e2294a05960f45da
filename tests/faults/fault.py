"""What a line of the table is, and what the files of a line are made by."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rescom_timm.engine.checkpoint import FILES
from rescom_timm.io import sha256

Change = Callable[[Path], object]
"""Makes or damages files below a folder."""


@dataclass(frozen=True)
class Fault:
    """A line of the table."""

    kind: str
    """What is wrong, in words; no two lines are of one kind."""
    given: str
    """What is typed after rescom-timm, in the folder that `made` has filled."""
    said: str
    """What must be told, in one line; ... stands for whatever is between."""
    code: int = 1
    """How it ends: 1 failed, 2 usage error, 3 something was found, 0 a warning."""
    made: tuple[Change, ...] = ()
    """What makes the files that are there before, in turn."""
    whole: str = "*"
    """Which of them must be there afterwards as they were, byte for byte: a pattern of their paths."""
    lines: int = 1
    """The most lines of the message."""
    new: str = ""
    """Which files may be new afterwards: a pattern of their paths; none by default."""


def text(name: str, content: str, encoding: str = "utf-8") -> Change:
    return data(name, content.encode(encoding, "surrogateescape"))


def data(name: str, content: bytes) -> Change:
    def write(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)

    return write


def photos(root: str = "p", side: int = 8, **classes: int) -> Change:
    """Small pictures in class folders, so many of each class; of a and b by default."""

    def write(place: Path) -> None:
        dice = np.random.default_rng(0)
        for name, number in (classes or {"a": 6, "b": 4}).items():
            (place / root / name).mkdir(parents=True)
            for k in range(number):
                pixels = dice.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / root / name / f"{k}.png")

    return write


def gone(name: str) -> Change:
    return lambda place: shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


def empty(name: str) -> Change:
    return lambda place: os.truncate(place / name, 0)


def half(name: str) -> Change:
    return lambda place: os.truncate(place / name, (place / name).stat().st_size // 2)


def flipped(name: str) -> Change:
    """One bit in the middle of the file is another."""

    def flip(place: Path) -> None:
        content = bytearray((place / name).read_bytes())
        content[len(content) // 2] ^= 1
        (place / name).write_bytes(content)

    return flip


def folder(name: str) -> Change:
    """A folder where a file is expected."""

    def make(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).mkdir(parents=True)

    return make


def link(name: str, target: str) -> Change:
    return lambda place: (place / name).symlink_to(target)


def changed(name: str, **values: object) -> Change:
    """Keys of a JSON object are others; None takes a key away, and of "a__b" the key b of the object a is meant."""

    def change(place: Path) -> None:
        whole = json.loads((place / name).read_text())
        for key, value in values.items():
            *sections, last = key.split("__")
            at = whole
            for section in sections:
                at = at[section]
            at[last] = value
            if value is None:
                del at[last]
        (place / name).write_text(json.dumps(whole))

    return change


def hashed(name: str) -> Change:
    """hashes.json of a checkpoint or an export is made to fit what was changed, as one does who means harm."""

    def fit(place: Path) -> None:
        path = place / name / "hashes.json"
        there = json.loads(path.read_text()) if path.is_file() else FILES
        hashes = {file: sha256(place / name / file) for file in there if (place / name / file).is_file()}
        path.write_text(json.dumps(hashes))

    return fit
