"""Decoding of images to 8-bit RGB."""

import io
import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from rescom_timm.errors import InputError
from rescom_timm.io import regular_size

FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX", "SGI",
)  # fmt: skip
"""Image formats, whatever the file's name. Pillow reads more, among them EPS, which Ghostscript executes."""
MAX_BYTES = 2**30
"""Bytes of the largest image file that is read."""
MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is read if `max_pixels` is None: Pillow's limit for decompression bombs."""
STRIP = 2**22
"""Pixels that are converted at a time, so that a conversion needs little memory beside its source and its result."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_TAGS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Where Pillow finds an orientation among an image's info."""
_SCALED = ("ppm", "ppm_plain", "jpeg2k")
"""Pillow's decoders that scale gray to 16 bits by the depth that the file names."""


class BrokenImage(InputError):
    """An image that cannot be decoded (image.unreadable). The message names its row and its path, if known."""

    def __init__(self, *message: str) -> None:
        """message: its last item; pickling gives the code too, torch raises a worker's error anew by text alone."""
        super().__init__("image.unreadable", message[-1])


@dataclass(frozen=True)
class ReadConfig:
    """How a stored image becomes 8-bit RGB, in training, evaluation, prediction and all plots.

    From the recipe (`LoaderConfig.reading`); an export stores it (`record`).
    """

    exif: bool = False
    """Rotate an image by its EXIF orientation."""
    white_level: int | None = None
    """Level of 16-bit gray that is white, 1 to 65535; None: 65535."""
    max_pixels: int | None = None
    """Of the largest image that is read; None: MAX_PIXELS."""

    def __post_init__(self) -> None:
        if self.white_level is not None and not 1 <= self.white_level <= 65535:
            raise InputError(
                "recipe.value", f"white_level must be from 1 to 65535 (12 bits: 4095), not {self.white_level}"
            )
        if self.max_pixels is not None and not 1 <= self.max_pixels <= 2**33:
            raise InputError("recipe.value", f"max_pixels must be from 1 to {2**33:,}, not {self.max_pixels}")

    def record(self) -> dict[str, bool | int | None]:
        """What decides the pixels, as plain JSON; not max_pixels, which bounds the reader's memory."""
        return {"exif": self.exif, "white_level": self.white_level}

    @classmethod
    def of(cls, record: object) -> "ReadConfig":
        """The inverse of `record`. Raises InputError (recipe.value) for anything else."""
        kinds = {"exif": (bool,), "white_level": (int, type(None))}
        if not isinstance(record, dict) or not all(type(record[key]) in kinds.get(key, ()) for key in record):
            raise InputError(
                "recipe.value",
                f"reading must be exif (true or false) and white_level (a number or null), not {record!r}",
            )
        return cls(**record)


class Decoded(NamedTuple):
    """An image with its file's orientation and levels."""

    image: Image.Image
    orientation: int
    """The EXIF orientation, 1 to 8; 1, upright, where there is none."""
    levels: tuple[int, int] | None
    """Lowest and highest level of 16 bits, in colour by the upper 8 bits of a channel; None for 8 bits."""


def decode(value: object, row: int | None = None, reading: ReadConfig = ReadConfig()) -> Image.Image:
    """The RGB image in `value`.

    value: encoded bytes, a {"bytes", "path"} mapping (an undecoded `datasets` image), a PIL image or an array (H, W) of
    8 or 16 bits or (H, W, 3) of 8 bits. Gray, palette, CMYK and similar modes are converted as by Pillow. Transparent
    images are composited on white, because the colour under transparency is arbitrary. 16-bit gray is scaled to 8 bits,
    not clipped: 0..white_level to 0..255, rounded. Of 16-bit colour Pillow reads the upper 8 bits. Raises BrokenImage,
    naming `row` and the path.
    """
    return inspect(value, row, reading).image


def inspect(value: object, row: int | None = None, reading: ReadConfig = ReadConfig()) -> Decoded:
    """As `decode`, with the orientation and the levels of the file."""
    with _as_broken(value, row):
        return _rgb(_open(value, reading), reading)


def look(value: object, row: int | None = None, reading: ReadConfig = ReadConfig()) -> tuple[int, int]:
    """Width and height of an image as it is read, from its header alone. Arguments and errors as in `decode`."""
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
    with _as_broken(value, row), _opened(path) if isinstance(path, str) else nullcontext(value) as source:
        image = _image(cast(BinaryIO, source), reading) if source is not value else _open(value, reading)
        _refuse_mode(image, reading)
        turned = reading.exif and image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns a TIFF itself
        return image.size[::-1] if turned else image.size


@contextmanager
def _as_broken(value: object, row: int | None) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        what = "it is not an image in a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BrokenImage(f"cannot read the image of {where(value, row)}: {what}") from error


def name_of(value: object) -> str | None:
    """The path of a stored image, if known."""
    return value.get("path") if isinstance(value, Mapping) else None


def where(value: object, row: int | None) -> str:
    """For messages: row 7 (path), or what is known of the two."""
    path = name_of(value)
    if row is None:
        return path or "row unknown"
    return f"row {row}" + (f" ({path})" if path else "")


def _open(value: Any, reading: ReadConfig) -> Image.Image:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, str):
        if (size := regular_size(value)) > MAX_BYTES:
            raise ValueError(f"its file has {size / 2**20:,.0f} MiB; at most {MAX_BYTES / 2**20:,.0f} are read")
        value = Path(value).read_bytes()  # read whole, so that no file stays open
    if isinstance(value, bytes):
        return _image(io.BytesIO(value), reading)
    if isinstance(value, list):
        value = np.asarray(value)
        if value.size and value.min() >= 0 and value.max() <= 255 and value.dtype.kind in "iu":
            value = value.astype(np.uint8)
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if isinstance(value, Image.Image):
        return value
    raise ValueError("there is no image" if value is None else f"{type(value).__name__} is no image")


def _opened(path: str) -> BinaryIO:
    regular_size(path)
    return open(path, "rb")


_opening = threading.Lock()


def _image(source: BinaryIO, reading: ReadConfig) -> Image.Image:
    """The image, not decoded yet. Raises ValueError if it is larger than `reading` allows."""
    most = reading.max_pixels or MAX_PIXELS
    _check_size(_icon_size(source), most)  # Pillow decodes an icon as it opens it
    with _opening:
        bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's own check warns in its own words
        try:
            image = Image.open(source, formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = bound
    _check_size(image.size, most)
    return image


def _check_size(size: tuple[int, int], most: int) -> None:
    if math.prod(size) > most:
        raise ValueError(
            f"it has {size[0]:,} x {size[1]:,} pixels, more than {most:,} (a decompression bomb?); allow a photograph "
            f"with loader.max_pixels={math.prod(size)}"
        )


def _icon_size(source: BinaryIO) -> tuple[int, int]:
    """Size of the largest image in an ICO, by the images' own headers; (0, 0) for another format.

    The ICO's directory may state other sizes.
    """
    sizes = [(0, 0)]
    start = source.read(6)
    for k in range(struct.unpack("<H", start[4:])[0] if start[:4] == b"\0\0\1\0" and len(start) == 6 else 0):
        source.seek(6 + 16 * k + 12)
        if len(offset := source.read(4)) < 4:
            break
        source.seek(*struct.unpack("<I", offset))
        head = source.read(24).ljust(24, b"\0")
        if head.startswith(b"\x89PNG"):
            sizes.append(struct.unpack(">II", head[16:]))
        else:  # a bitmap; its height includes the mask's
            width, height = struct.unpack("<ii", head[4:12])
            sizes.append((abs(width), abs(height) // 2))
    source.seek(0)
    return max(sizes, key=math.prod)


@cache
def _formats() -> list[str]:
    """The FORMATS that this Pillow reads; plugins such as AVIF are known only after init."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _rgb(image: Image.Image, reading: ReadConfig) -> Decoded:
    _refuse_mode(image, reading)
    colour = not image.mode.startswith("I") and "16" in _tile(image)[1]
    white = 65535 if _tile(image)[0] in _SCALED else reading.white_level or 65535
    tag = _orientation(image) if image.format == "TIFF" else 1  # Pillow turns a TIFF as it loads it
    image.load()
    turn = _orientation(image)
    if reading.exif and turn in _TURNS:
        image = image.transpose(_TURNS[turn])
        for key in _TAGS:  # so that nobody turns it a second time
            image.info.pop(key, None)
    _allow(image.width * image.height)
    tag = max(tag, turn)
    if image.mode.startswith("I"):
        levels: list[int] = []
        return Decoded(_by_strips(image, lambda part: _to_8_bits(part, white, levels)), tag, (min(levels), max(levels)))
    found = None
    if colour:
        low, high = (
            side(band) for side, band in zip((min, max), zip(*image.getextrema()[:3], strict=True), strict=True)
        )
        found = 256 * low, 256 * high + 255 * (high > low)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = _by_strips(image, _on_white)
    return Decoded(image if image.mode == "RGB" else image.convert("RGB"), tag, found)


def _allow(pixels: int) -> None:
    """Keep Pillow from warning about crops of an image of so many pixels, which has been allowed."""
    with _opening:
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = pixels


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the tag is missing, out of range or unreadable."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises several kinds for damaged tags
        return 1
    return found if type(found) is int and found in _TURNS else 1


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """convert(image), an RGB image, a few rows at a time."""
    rows = max(1, STRIP // image.width)
    if rows >= image.height:
        return convert(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        whole.paste(convert(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return whole


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_8_bits(image: Image.Image, white: int, found: list[int]) -> Image.Image:
    """0..white to 0..255, rounded; higher levels to 255. Pillow's convert clips at 255.

    found: the lowest and the highest level are appended.
    """
    levels = np.asarray(image)
    lowest, highest = int(levels.min()), int(levels.max())
    if lowest < 0 or highest > 65535:
        raise ValueError("its pixels are 32-bit numbers beyond 0..65535; save it with 8 or 16 bits")
    found += [lowest, highest]
    scaled = (np.minimum(levels, white).astype(np.uint32) * 255 + white // 2) // white
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _refuse_mode(image: Image.Image, reading: ReadConfig) -> None:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    if reading.white_level is not None and not image.mode.startswith("I") and "16" in _tile(image)[1]:
        raise ValueError("it has several channels of 16 bits, and loader.white_level is for gray; save it with 8 bits")


def _tile(image: Image.Image) -> tuple[str, str]:
    """Pillow's decoder of an image that is not decoded yet, and how its pixels are stored, such as "RGB;16B"."""
    tile = getattr(image, "tile", None)
    if not tile:
        return "", ""
    decoder, _, _, stored = tile[0]
    return decoder, str(stored[0] if isinstance(stored, tuple) and stored else stored)
