"""Progress bars for loops over images, on a terminal and unless output is suppressed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_quiet = False


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress all output except warnings and errors: no line of an epoch, no table, no bar."""
    global _quiet
    _quiet = True
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        _quiet = False


def bars_shown() -> bool:
    """Whether progress bars are shown: on a terminal without `quiet`; a file gets lines instead."""
    return sys.stderr.isatty() and not _quiet


def first_process() -> bool:
    """Whether this is the only process of a launch or its first, which alone prints."""
    return os.environ.get("RANK", "0") == "0"


def image_bar(total: int, about: str) -> tqdm:
    """A bar that counts images, in the first process only, removed at its end: update(n) after n more."""
    return tqdm(total=total, desc=about, unit="img", leave=False, disable=not (first_process() and bars_shown()))


def progress(batches: Iterable[T], about: str, total: int, images: Callable[[T], int]) -> Iterator[T]:
    """The batches, with a bar of `total` images. images: the number of images in a batch."""
    with image_bar(total, about) as bar:
        for batch in batches:
            yield batch
            bar.update(min(images(batch), total - bar.n))
