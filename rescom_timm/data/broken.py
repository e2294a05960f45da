"""Unreadable images, found in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from rescom_timm.data.decoding import BrokenImage, ReadConfig, decode, look
from rescom_timm.data.splits import Split

IMAGES_AT_ONCE = 1024


def unreadable(
    split: Split,
    full: bool = True,
    reading: ReadConfig = ReadConfig(),
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, str]]:
    """(position in the split, problem) of each image that cannot be read.

    full: decode every image; else only headers are read, which finds empty files, files that are not images and
    unsupported formats, but not truncated images. progress: called with the number of images just checked.
    """
    read = decode if full else look

    def wrong(row: int, image: object) -> str:
        try:
            read(image, row, reading)
        except BrokenImage as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(split.rows), IMAGES_AT_ONCE):
            images = split.dataset[start : start + IMAGES_AT_ONCE]["image"]
            problems = pool.map(wrong, split.rows[start : start + IMAGES_AT_ONCE].tolist(), images)
            yield from ((start + i, problem) for i, problem in enumerate(problems) if problem)
            if progress is not None:
                progress(len(images))
