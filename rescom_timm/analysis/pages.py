"""What the HTML pages about runs and data share: thumbnails, and the findings as CSV and JSON beside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rescom_timm.data.decoding import BrokenImage, ReadConfig, decode
from rescom_timm.data.image_folders import IMAGE_SUFFIXES
from rescom_timm.io import write_csv, write_json, write_text

SIDE = 112
"""Pixels of a thumbnail's longer side."""


def files(path: str | Path) -> tuple[Path, Path, Path]:
    """The page, and its findings: NAME.html, NAME-findings.csv and NAME-findings.json."""
    page = Path(path)
    return page, page.with_name(f"{page.stem}-findings.csv"), page.with_name(f"{page.stem}-findings.json")


def write(
    path: str | Path, page: str, columns: Mapping[str, Iterable[object]], record: Mapping[str, object]
) -> list[Path]:
    """Write a page and its findings; returns their paths. Text that a spreadsheet would run gets an apostrophe."""
    names = files(path)
    write_text(names[0], page)
    write_csv(names[1], columns)
    write_json(names[2], record)
    return list(names)


class Thumbnail(NamedTuple):
    """What parts.html shows of an image."""

    caption: str
    jpeg: str = ""
    """In base64; empty for an image that cannot be read."""
    address: str = ""
    """file:// of the image; empty if it is in a table or elsewhere."""


def thumbnail(stored: object, row: int, reading: ReadConfig, caption: str) -> Thumbnail:
    """The thumbnail of a stored image (`decoding.decode`). Images smaller than a thumbnail are enlarged."""
    try:
        image = decode(stored, row, reading)
    except BrokenImage:
        return Thumbnail(caption)
    times = SIDE // max(image.size)
    if times > 1:
        image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=80)
    return Thumbnail(caption, base64.b64encode(file.getvalue()).decode("ascii"), address_of(stored))


def short(name: str) -> str:
    """The last two parts of an image's path."""
    return "/".join(name.split("/")[-2:])


def address_of(stored: object) -> str:
    """file:// of a stored image that is a local file.

    Only with the suffix of an image: a browser would run the scripts of a file named .html or .svg.
    """
    if not isinstance(stored, Mapping) or stored.get("bytes") is not None or not isinstance(stored.get("path"), str):
        return ""
    path = Path(stored["path"])
    return path.absolute().as_uri() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() else ""
