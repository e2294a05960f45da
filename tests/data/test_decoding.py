"""From the bytes of an image to 8-bit RGB: orientation, white level, memory."""

import ast
import io
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rescom_timm
from rescom_timm.data import decoding
from rescom_timm.data.decoding import BrokenImage, ReadConfig, decode, inspect, look
from tests.raises import raises

STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""What a camera does to an upright picture that it stores with this tag."""
UPRIGHT = ReadConfig(exif=True)


def scene(height: int = 12, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


SCENE = np.asarray(scene())


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, tag: int, kind: str = "PNG") -> bytes:
    """The file of an upright image as a camera that was held otherwise writes it; without loss."""
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = image.transpose(STORED[tag]) if tag in STORED else image
    return saved(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def pixels(value: object, reading: ReadConfig = ReadConfig()) -> np.ndarray:
    return np.asarray(decode(value, reading=reading))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_a_turned_photograph_is_read_upright(kind: str, tag: int) -> None:
    content = turned(scene(), tag, kind)
    assert np.array_equal(pixels(content, UPRIGHT), SCENE)
    found = inspect(content, reading=UPRIGHT)
    assert (found.orientation, found.levels) == (tag, None)
    assert look(content, reading=UPRIGHT) == look(Image.open(io.BytesIO(content)), reading=UPRIGHT) == (20, 12)
    assert np.array_equal(pixels(Image.open(io.BytesIO(content)), UPRIGHT), SCENE), "an image that is open already"
    assert np.array_equal(pixels(found.image, UPRIGHT), SCENE), "not a second time"


@pytest.mark.parametrize("tag", [3, 6, 8])
def test_without_exif_a_photograph_is_read_as_it_is_stored(tag: int) -> None:
    assert np.array_equal(pixels(turned(scene(), tag)), np.asarray(scene().transpose(STORED[tag])))


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_an_orientation_that_is_none_changes_nothing(tag: int) -> None:
    assert np.array_equal(pixels(turned(scene(), tag), UPRIGHT), SCENE)
    assert inspect(turned(scene(), tag)).orientation == 1


def test_damaged_exif_does_not_cost_the_image() -> None:
    for junk in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"no exif"):
        assert np.array_equal(pixels(saved(scene(), exif=junk), UPRIGHT), SCENE)


def test_a_turned_gray_image_of_16_bits() -> None:
    levels = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 10000)
    expected = pixels(levels)
    assert np.array_equal(pixels(turned(levels, 6), UPRIGHT), expected)


# --------------------------------------------------------------------------------------------------------- white level


def container(levels: np.ndarray, kind: str) -> object:
    if kind == "array":
        return levels
    if kind == "big-endian TIFF":
        return saved(Image.frombytes("I;16B", levels.shape[::-1], levels.astype(">u2").tobytes()), "TIFF")
    if kind == "TIFF of 32 bits":
        return saved(Image.fromarray(levels.astype(np.int32)), "TIFF")
    return saved(Image.fromarray(levels), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "TIFF of 32 bits", "array"])
@pytest.mark.parametrize("white", [1023, 4095, 16383, 65535])
def test_images_of_fewer_bits_equal_those_of_8(kind: str, white: int) -> None:
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    levels = np.round(eight.astype(float) * white / 255).astype(np.uint16)
    found = inspect(container(levels, kind), reading=ReadConfig(white_level=white))
    assert np.abs(np.asarray(found.image)[..., 0].astype(int) - eight).max() <= 1
    assert found.levels == (0, white)
    assert np.array_equal(pixels(container(levels, kind)), pixels(levels)), "without the key, as before"


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize(("most", "said"), [(1023, 1023), (4000, 4095), (65535, 65535)])
def test_levels_of_colour_of_16_bits_are_those_of_the_upper_8(kind: int, channels: int, most: int, said: int) -> None:
    row = np.full((2, channels), 65535)  # opaque, where there is alpha
    row[:, : channels - (channels % 2 == 0)] = [[0], [most]]
    image = png(2, 16, b"\0" + row.astype(">u2").tobytes(), kind)
    assert inspect(image).levels == (0, said)


def test_what_is_above_the_white_level_is_white() -> None:
    levels = np.array([[0, 4095, 4096, 65535]], np.uint16)
    assert pixels(levels, ReadConfig(white_level=4095))[0, :, 0].tolist() == [0, 255, 255, 255]
    assert pixels(levels)[0, :, 0].tolist() == [0, 16, 16, 255]


def test_the_white_level_is_of_gray_of_16_bits_alone() -> None:
    reading = ReadConfig(white_level=4095)
    for image in (scene(), scene().convert("L"), scene().convert("P"), scene().convert("RGBA")):
        assert np.array_equal(pixels(saved(image), reading), pixels(saved(image)))
    scaled = b"P5 2 1 4095\n" + struct.pack(">2H", 2048, 4095)  # this file says what is white
    assert np.array_equal(pixels(scaled, reading), pixels(scaled)) and pixels(scaled)[0, :, 0].tolist() == [128, 255]
    for read in (decode, look):
        with raises("image.unreadable", "row 3", "loader.white_level", kind=BrokenImage):
            read(png(2, 16, b"\0" + struct.pack(">6H", *range(6))), 3, reading)


@pytest.mark.parametrize("white", [0, -1, 65536])
def test_a_white_level_that_cannot_be(white: int) -> None:
    with raises("recipe.value", "white_level", white):
        ReadConfig(white_level=white)


def test_what_an_export_says_of_reading() -> None:
    for reading in (ReadConfig(), UPRIGHT, ReadConfig(white_level=4095)):
        assert ReadConfig.of(reading.record()) == reading
    assert ReadConfig.of(ReadConfig(max_pixels=9).record()) == ReadConfig()
    wrong: list[object] = [
        {"exif": 1},
        {"exif": "yes"},
        {"white_level": 0},
        {"white_level": 9.5},
        {"gamma": 2},
        [],
        None,
        "x",
    ]
    for record in wrong:
        with raises("recipe.value", "white_level"):
            ReadConfig.of(record)


# -------------------------------------------------------------------------------------------------------------- memory


def png(width: int, bits: int, rows: bytes, colour: int = 2, height: int = 1) -> bytes:
    """A PNG of these filtered rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["gray of 16 bits", "transparent", "palette"])
def test_strips_give_the_same_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        "gray of 16 bits": lambda: saved(Image.fromarray(np.arange(7 * 5, dtype=np.uint16).reshape(7, 5) * 1800)),
        "transparent": lambda: saved(Image.fromarray(np.arange(7 * 5 * 4, dtype=np.uint8).reshape(7, 5, 4))),
        "palette": lambda: saved(scene(7, 5).quantize(8), transparency=bytes([0, 90, 255, 9])),
    }[kind]()
    whole = pixels(content)
    for strip in (1, 5, 11, 34):
        monkeypatch.setattr(decoding, "STRIP", strip)
        assert np.array_equal(pixels(content), whole)


def test_a_large_image_of_16_bits_is_not_copied_to_wide_integers() -> None:
    """NumPy's memory: at most a strip's, however large the image is. Pillow's is source and result."""
    side = 4096  # four strips
    content = png(side, 16, (b"\0" + bytes(2 * side)) * side, 0, side)
    tracemalloc.start()
    try:
        image = decode(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert image.size == (side, side) and image.getextrema() == ((0, 0),) * 3
    assert peak < 20 * decoding.STRIP < 8 * side * side


def test_an_image_is_refused_by_its_header_in_our_words() -> None:
    small, large = png(13_000, 16, b"", 0, 13_000), png(14_000, 1, b"", 0, 14_000)
    for value in (large, {"bytes": large, "path": "x.png"}):
        for read in (decode, look):
            with pytest.raises(BrokenImage) as caught:  # not Pillow's warning, which is an error in tests
                read(value, 7)
            assert "\n" not in str(caught.value) and "14,000 x 14,000 pixels, more than 178,956,970" in str(
                caught.value
            )
            assert "loader.max_pixels=196000000" in str(caught.value)
    look(small)  # of 169 million pixels
    look(large, reading=ReadConfig(max_pixels=196_000_000))


# ------------------------------------------------------------------------------------------------- every reader of ours


def test_every_reader_says_how_it_reads() -> None:
    """A call of decode, inspect, look or ViewsDataset without its `reading` reads otherwise than the recipe."""
    package, without = Path(rescom_timm.__file__).parent, []
    positions = {"decode": 2, "inspect": 2, "look": 2, "ViewsDataset": 4, "unreadable": 2, "examine": 2}
    for path in package.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if any(f"{name}(" in text for name in positions) else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in positions:
                given = len(node.args) > positions[node.func.id] or any(k.arg == "reading" for k in node.keywords)
                if not given:
                    without.append(f"{path.relative_to(package)}: {ast.unparse(node)[:60]}")
    free = ("config/own_data.py", "cli/parts/index.py")
    """The shorter side alone, embedded data, and files without a recipe: whether they can be read."""
    assert not [line for line in without if not line.startswith(free) and "look(options)" not in line]


def icon(image: bytes, width: int = 16, height: int = 16) -> bytes:
    """An ICO of one image, with a directory that states this size."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, width, height, 0, 0, 1, 32, len(image), 22) + image


def test_an_icon_has_the_size_of_its_image_not_of_its_directory():
    png = saved(scene(40, 60))
    with pytest.warns(UserWarning, match="size"):  # Pillow's, of the other size
        assert look(icon(png)) == (60, 40) and np.array_equal(decode(icon(png)), scene(40, 60))
    bitmap = struct.pack("<IiiHHIIiiII", 40, 60, 80, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(60 * 40 * 4)
    for content in (png, bitmap):
        with raises("image.unreadable", "60 x 40", "loader.max_pixels=2400", kind=BrokenImage):
            decode(icon(content), reading=ReadConfig(max_pixels=2399))
        with raises("image.unreadable", "60 x 40", kind=BrokenImage):
            look(icon(content), reading=ReadConfig(max_pixels=2399))
    huge = png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:]
    with raises("image.unreadable", "60,000 x 60,000", kind=BrokenImage):
        decode(icon(huge))


def test_icons_of_pillow_are_read_as_before():
    square = scene(32, 32).convert("RGBA")
    content = saved(square, "ICO", sizes=[(16, 16), (32, 32)])
    assert look(content) == (32, 32) and np.array_equal(decode(content), square.convert("RGB"))
    plain = saved(square, "ICO", sizes=[(32, 32)], bitmap_format="bmp")
    assert look(plain) == (32, 32) and np.array_equal(decode(plain), square.convert("RGB"))


def test_an_unreadable_image_keeps_its_code_between_processes() -> None:
    error = BrokenImage("row 3")
    for copied in (pickle.loads(pickle.dumps(error)), type(error)(str(error))):  # by torch's workers: from its text
        assert type(copied) is BrokenImage and (copied.code, str(copied)) == ("image.unreadable", "row 3")
