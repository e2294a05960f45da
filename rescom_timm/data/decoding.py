"""Images of any kind to RGB."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rescom_timm.files import regular_size

FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX", "SGI",
)  # fmt: skip
"""What is read as an image, whatever its name says. Pillow knows more, of which EPS is a program that it hands to
Ghostscript."""
MAX_BYTES = 2**30
"""Of the largest image file that is read."""


class BrokenImage(ValueError):
    """An image that cannot be read. The message names its row and, where known, its path."""


def decode(value: Any, row: int | None = None, exif: bool = False, max_pixels: int | None = None) -> Image.Image:
    """The RGB image in `value`: encoded bytes, a {"bytes", "path"} mapping (an undecoded `datasets` image), a PIL image
    or an 8-bit array (H, W) or (H, W, 3).

    Gray, palette, CMYK and the like become RGB as Pillow does it. Transparent images are laid on white (the colour that
    hides under transparency is arbitrary). 16-bit gray is scaled to 8 bits, not clipped. `exif` turns the image as its
    EXIF tag says; the papers' pipelines do not, so that is the default. `max_pixels`: see `allow`.
    Raises BrokenImage, naming `row` and the path.
    """
    with _told(value, row):
        return _rgb(_open(value, max_pixels), exif)


def look(value: Any, row: int | None = None, max_pixels: int | None = None) -> None:
    """Read the header of an image alone, and of a file no more. Arguments and what is raised as in `decode`."""
    allow(max_pixels)
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
    with _told(value, row), _opened(path) if isinstance(path, str) else nullcontext(value) as source:
        _refuse_mode(_image(source) if source is not value else _open(value, max_pixels))


@contextmanager
def _told(value: Any, row: int | None) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        what = "it is not an image in a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        if isinstance(error, Image.DecompressionBombError):
            what = f"{what.rstrip('.')}; if it is a photograph, allow it with loader.max_pixels"
        raise BrokenImage(f"cannot read the image of {where(value, row)}: {what}") from error


def name_of(value: Any) -> str | None:
    """The path of a stored image, where one is known."""
    return value.get("path") if isinstance(value, Mapping) else None


def where(value: Any, row: int | None) -> str:
    """For messages: row 7 (path), or what of the two is known."""
    path = name_of(value)
    if row is None:
        return path or "row unknown"
    return f"row {row}" + (f" ({path})" if path else "")


def allow(max_pixels: int | None) -> None:
    """In this process Pillow warns above so many pixels, and refuses twice as many. None changes nothing."""
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _open(value: Any, max_pixels: int | None = None) -> Image.Image:
    allow(max_pixels)
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, str):
        if (size := regular_size(value)) > MAX_BYTES:
            raise ValueError(f"its file has {size / 2**20:,.0f} MiB; at most {MAX_BYTES / 2**20:,.0f} are read")
        value = Path(value).read_bytes()  # read whole, so that no file stays open
    if isinstance(value, bytes):
        return _image(io.BytesIO(value))
    if isinstance(value, list):
        value = np.asarray(value)
        if value.size and 0 <= value.min() and value.max() <= 255 and value.dtype.kind in "iu":
            value = value.astype(np.uint8)
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if isinstance(value, Image.Image):
        return value
    raise ValueError("there is no image" if value is None else f"{type(value).__name__} is no image")


def _opened(path: str) -> BinaryIO:
    regular_size(path)
    return open(path, "rb")


def _image(source: Any) -> Image.Image:
    return Image.open(source, formats=_formats())


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow reads: AVIF, say, is a plugin, which is only known after init."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _rgb(image: Image.Image, exif: bool) -> Image.Image:
    image.load()
    if exif:
        image = ImageOps.exif_transpose(image)
    _refuse_mode(image)
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _refuse_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255, rounded. Pillow's own convert clips at 255."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError("its pixels are 32-bit numbers beyond 0..65535; save it with 8 or 16 bits")
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
