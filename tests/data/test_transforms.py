"""Policies on real and made-up images; decoding of every kind of image that turns up."""

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from rescom_timm.data import decoding
from rescom_timm.data.config import NORMALISATIONS, ViewsConfig
from rescom_timm.data.decoding import BrokenImage, ReadConfig, decode, look
from rescom_timm.data.transforms import POLICIES, STEPS, check, parse, usage
from tests.raises import raises


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def noise(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def cifar_images(shared_cifar10: Path) -> list[Image.Image]:
    import pyarrow.parquet as pq

    table = next(pq.ParquetFile(next(shared_cifar10.rglob("test*.parquet"))).iter_batches(64))
    column = next(name for name in table.schema.names if name in ("img", "image"))
    return [decode(value.as_py()) for value in table.column(column)]


# ---------------------------------------------------------------------------------------------------------- policies


def test_policy_is_applied_left_to_right() -> None:
    image = noise()
    assert parse("center_crop(20) | upscale(8)")(image).shape == (3, 8, 8)
    assert parse("upscale(8) | center_crop(20)")(image).shape == (3, 20, 20)
    assert torch.equal(parse("none")(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(parse("flip(1)")(image), parse("none")(image).flip(2))


def test_names_defaults_and_arguments_by_name_are_written_out() -> None:
    assert parse("cifar").text == "crop(32,4) | flip(0.5) | autoaugment(cifar10,128) | cutout(16)"
    assert parse("imagenet").text == (
        "random_resized_crop(224,0.08,1.0,bilinear) | flip(0.5) | jitter(0.4,0.4,0.4,0.0,1.0) | grayscale(0.2) | "
        "randaugment(n2,m10,p0.5,mstd0.5,inc0)"
    )
    assert parse("places").text + " | blur(0.5,0.1,2.0)" == parse(" places|blur( )").text
    assert parse("crop(pad=4, size=32)").text == "crop(32,4)"
    assert parse("randaugment(mstd.5,n3)").text == "randaugment(n3,m10,p0.5,mstd0.5,inc0)"
    for name in POLICIES:
        text = parse(name).text
        assert parse(text).text == text


@pytest.mark.parametrize(
    ("line", "naming"),
    [
        ("cropp(32)", ["'crop'?"]),
        ("cifra", ["'cifar'?"]),
        ("flip | rand_augment(n2)", ["'randaugment'?"]),
        ("cifar(3)", ["'cifar'"]),  # a named policy takes no arguments
        ("crop(x)", ["size", "'x'", "crop(size, pad=0)"]),
        ("crop(32.5)", ["size", "'32.5'"]),
        *((line, [line.replace(",", ", "), "crop(size, pad=0)"]) for line in ("crop()", "crop(32,4,5)")),
        ("crop(32,size=3)", ["size", "crop(size, pad=0)"]),
        ("crop(pad=3,pad=4,size=1)", ["pad "]),
        ("crop(pad=4,32)", ["'32'"]),
        ("crop(32,padding=4)", ["padding", "crop(size, pad=0)"]),
        ("resize(100000)", ["size", "8,192", "not 100000"]),
        ("crop(32,100000)", ["pad", "8,192", "not 100000"]),
        ("jitter(nan,0,0,0)", ["brightness", "100", "not nan"]),
        ("jitter(0,inf,0,0)", ["contrast", "100", "not inf"]),
        ("jitter(-1,0,0,0)", ["brightness", "jitter(brightness, contrast, saturation, hue, p=1.0)"]),
        *((line, ["sigma", "lo <= hi"]) for line in ("blur(0.5,0,inf)", "blur(0.5,nan,1)", "blur(.5,2,1)")),
        *((line, ["degrees", "180"]) for line in ("rotate(nan)", "rotate(900)")),
        *((line, ["flip(p=0.5)", "0", "1"]) for line in ("flip(nan)", "flip(2)")),
        ("autoaugment(cifar10,300)", ["fill", "255", "not 300"]),
        ("trivialaugment(-1)", ["fill", "not -1"]),
        ("randaugment(n99999,m10)", ["n must", "20", "99999"]),
        ("crop(0)", ["size", "8,192", "not 0"]),
        ("crop(32,-1)", ["pad", "not -1"]),
        ("random_resized_crop(8,.9,.1)", ["0 < lo <= hi <= 1", "0.9"]),
        ("autoaugment(cifar)", ["cifar10, imagenet, svhn"]),
        ("resize(8,cubic)", ["bilinear, bicubic, nearest"]),
        ("randaugment(n2,k3)", ["'k3'"]),
        ("cutout(16,colour=3)", ["cutout(size)"]),
        ("crop(32) || flip", ["''"]),
        ("crop(32 | flip", ["'crop(32'"]),
    ],
)
def test_mistakes_are_named(line: str, naming: list[str]) -> None:
    with raises("recipe.views", *naming):
        parse(line)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_named_policies_give_eight_bit_views_decided_by_the_seed(name: str) -> None:
    policy = parse(name)
    side = {"cifar": 32, "simclr32": 32, "digits": 8}.get(name, 224)
    image = noise(8, 8) if name == "digits" else noise(40, 32) if name == "cifar" else noise(300, 260)
    before = np.array(image)
    seeded(3)
    first, second = policy(image), policy(image)
    assert first.shape == (3, side, side) and first.dtype == torch.uint8 and first.is_contiguous()
    seeded(3)
    assert torch.equal(first, policy(image)) and torch.equal(second, policy(image))
    assert torch.equal(first, second) == (name == "eval224")
    assert np.array_equal(before, np.array(image)), "a step changed the image that the views share"
    seeded(3)
    assert torch.equal(first, pickle.loads(pickle.dumps(policy))(image)), "workers need policies that can be sent"


@pytest.mark.parametrize("step", sorted(STEPS))
def test_every_step_runs_and_leaves_the_shared_image_alone(step: str) -> None:
    required = {
        "crop": "20",
        "random_resized_crop": "20",
        "rising_crop": "20",
        "rotate": "15",
        "autoaugment": "svhn",
        "grayscale": "1",
        "jitter": ".4,.4,.4,.1,.8",
        "cutout": "8",
        "resize": "20",
        "upscale": "20",
        "center_crop": "20",
        "corner_crop": "20,1",
        "blur": "1",
        "flip": "1",
    }
    policy, image = parse(f"{step}({required.get(step, '')})"), noise(36, 32)
    before, views = np.array(image), set()
    for seed in range(20):
        seeded(seed)
        views.add(policy(image).numpy().tobytes())
    assert np.array_equal(before, np.array(image))
    fixed = step in ("resize", "upscale", "center_crop", "corner_crop", "flip", "grayscale")
    assert (len(views) == 1) == fixed
    assert usage(step).startswith(step + "(") and "colour" not in usage(step)


@pytest.mark.parametrize("size", [(40, 40), (60, 30)], ids=str)
def test_the_least_area_of_the_rising_crop_rises_over_the_run(size: tuple[int, int]) -> None:
    """Areas, read off a ramp of one level a column and one a row; a square larger than the image is its largest."""
    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width), np.arange(height)[:, None]
    policy = parse("rising_crop(64,0.1,nearest)")
    for t, least in ((0.0, 0.1), (0.6, 0.1 + 0.9 * (1 - 0.8)), (1.0, 1.0)):
        policy.set_progress(t)
        sides = []
        for seed in range(300):
            seeded(seed)
            view = policy(Image.fromarray(ramp)).numpy()
            columns, rows = (int(view[c].max()) - int(view[c].min()) + 1 for c in (0, 1))
            assert columns == rows
            sides.append(columns)
        whole = width * height
        assert min(sides) >= round(min(least * whole, height**2) ** 0.5) and max(sides) <= height
        if t == 1:
            assert set(sides) == {height}
        else:
            assert min(sides) <= 1 + round((least * whole) ** 0.5) and max(sides) >= height - 1
    assert parse("rising_crop(8)").moves and not parse("random_resized_crop(8)").moves


def test_crop_pads_with_black_and_keeps_pixels() -> None:
    image = Image.new("RGB", (32, 32), (200, 200, 200))
    offsets = set()
    for seed in range(200):
        seeded(seed)
        view = parse("crop(32,4)")(image)
        assert set(view.unique().tolist()) <= {0, 200}
        rows, columns = (view[0] == 200).any(1).sum().item(), (view[0] == 200).any(0).sum().item()
        assert (view[0] == 200).sum() == rows * columns and min(rows, columns) >= 28
        offsets.add((rows, columns))
    assert len(offsets) == 25


def test_flips_half_of_the_time() -> None:
    image, policy = noise(), parse("flip")
    plain = parse("none")(image)
    seeded(0)
    flipped = sum(not torch.equal(policy(image), plain) for _ in range(1000))
    assert 450 < flipped < 550


@pytest.mark.parametrize("size", [16, 5])
def test_cutout_is_one_square_of_the_mean_colour(size: int) -> None:
    policy = parse(f"cutout({size})", mean=(0.5, 0.25, 1.0))
    image = Image.new("RGB", (32, 24), (1, 2, 3))
    areas = []
    seeded(0)
    for _ in range(400):
        view = policy(image)
        cut = (view == torch.tensor([128, 64, 255])[:, None, None]).all(0)
        rest = (view == torch.tensor([1, 2, 3])[:, None, None]).all(0)
        assert (cut ^ rest).all()
        rows, columns = cut.any(1).sum().item(), cut.any(0).sum().item()
        assert cut.sum() == rows * columns and max(rows, columns) <= size
        areas.append(int(cut.sum()))
    assert max(areas) == size * size
    assert min(areas) >= (size // 2) ** 2, "the centre lies in the image, so a quarter of the square does"


def test_cifar_policy_on_real_images(cifar_images: list[Image.Image]) -> None:
    """The steps of METHOD's policy, in order, and torchvision's own AutoAugment with the same draws."""
    image = cifar_images[0]
    for seed in range(40):
        seeded(seed)
        ours = parse("crop(32,4) | flip | autoaugment(cifar10)")(image)
        seeded(seed)
        plain = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=128),  # type: ignore[arg-type]
                transforms.PILToTensor(),
            ]
        )(image)
        assert torch.equal(ours, plain)
    seeded(0)
    policy = parse("cifar", NORMALISATIONS["cifar"][0])
    views = torch.stack([policy(i) for i in cifar_images])
    cut = (views == torch.tensor([125, 123, 114])[:, None, None]).all(1).sum((1, 2))
    assert views.shape == (64, 3, 32, 32) and views.min() == 0 and views.max() == 255
    assert ((cut >= 64) & (cut <= 256 + 32)).all(), "one square of 16 pixels, cut at the border (and a few like it)"


def test_imagenet_policy_equals_its_parts() -> None:
    """As torchvision and timm put together by hand: the order and the settings of METHOD's line."""
    from timm.data.auto_augment import rand_augment_transform

    mean = NORMALISATIONS["inat"][0]
    image = noise(400, 300)
    by_hand = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0),
            transforms.RandomGrayscale(0.2),
            rand_augment_transform("rand-n2-m10-mstd0.5", {"img_mean": (119, 120, 97)}),
            transforms.PILToTensor(),
        ]
    )
    gray = 0
    for seed in range(12):
        seeded(seed)
        ours = parse("imagenet", mean)(image)
        seeded(seed)
        assert torch.equal(ours, by_hand(image))
        gray += torch.equal(ours[0], ours[1])
    assert gray < 12


@pytest.mark.parametrize(("place", "name"), list(enumerate(["brightness", "contrast", "saturation", "hue"])))
def test_jitter_takes_its_values_in_this_order(place: int, name: str) -> None:
    values = ["0"] * 4
    values[place] = "0.5"
    seeded(1)
    ours = parse(f"jitter({','.join(values)})")(noise())
    seeded(1)
    theirs = transforms.ColorJitter(**{name: 0.5})(noise())
    assert torch.equal(ours, transforms.functional.pil_to_tensor(theirs))
    assert not torch.equal(ours, parse("none")(noise()))


def test_posterize_to_no_bits_is_black() -> None:
    """What randaugment(inc1) asks for at full magnitude, and Pillow refuses since its version 13."""
    policy, black = parse("randaugment(n4,m10,p1,inc1)"), 0
    for seed in range(60):
        seeded(seed)
        black += int(policy(noise()).sum() == 0)
    assert black > 0


def test_grayscale_fifth_and_random_resized_crop_area() -> None:
    image, policy = noise(), parse("grayscale(0.2)")
    seeded(0)
    gray = sum(torch.equal(view[0], view[1]) for view in (policy(image) for _ in range(1000)))
    assert 160 < gray < 240
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[None] * 2, np.arange(100)[:, None] * 2
    areas = []
    for _ in range(200):
        view = parse("random_resized_crop(64)")(Image.fromarray(ramp)).float()
        spans = [(view[c].max() - view[c].min()).item() / 198 for c in (0, 1)]
        areas.append(spans[0] * spans[1])
    assert 0.04 < min(areas) < 0.2 and max(areas) > 0.9


def test_evaluation_takes_the_middle() -> None:
    array = np.zeros((256, 356, 3), np.uint8)
    array[16:240, 66:290] = 255
    assert parse("eval224")(Image.fromarray(array)).min() == 255


def test_views_config_checks_itself() -> None:
    assert parse(ViewsConfig().train).text == parse("cifar").text and ViewsConfig().eval == "none"
    assert all(ViewsConfig(mean=mean, std=std) for mean, std in NORMALISATIONS.values())
    for wrong, code, *naming in [
        ({"train": "cropp(32)"}, "recipe.views", "'crop'?"),
        ({"eval": "resize(a)"}, "recipe.views", "resize(a)"),
        ({"mean": (123.7, 116.3, 103.5)}, "recipe.value", "mean", "123.7"),
        ({"mean": (0.5, 0.5)}, "recipe.value", "mean"),
        ({"std": (0.2, 0.2, 0.0)}, "recipe.value", "std"),
    ]:
        with raises(code, *naming):
            check(ViewsConfig(**wrong))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- decoding


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))  # type: ignore[return-value]


def test_decode_takes_bytes_mappings_paths_images_and_arrays(tmp_path: Path) -> None:
    image = noise(5, 4)
    (tmp_path / "a b.png").write_bytes(encode(image))
    array = np.asarray(image)
    for value in (
        encode(image),
        {"bytes": encode(image), "path": None},
        {"bytes": encode(image), "path": "gone.png"},
        {"bytes": None, "path": str(tmp_path / "a b.png")},
        {"path": str(tmp_path / "a b.png")},
        image,
        array,
        array.tolist(),
    ):
        assert np.array_equal(np.asarray(decode(value)), array)
    gray = decode(np.full((4, 5), 7, np.uint8))
    assert gray.size == (5, 4) and pixel(gray) == (7, 7, 7)


def test_decode_gray_bilevel_palette_and_cmyk() -> None:
    assert pixel(decode(encode(Image.new("L", (3, 2), 99)))) == (99, 99, 99)
    assert pixel(decode(encode(Image.new("1", (3, 2), 1)))) == (255, 255, 255)
    palette = Image.new("RGB", (3, 2), (10, 200, 30)).quantize(4)
    assert palette.mode == "P" and pixel(decode(encode(palette))) == (10, 200, 30)
    assert pixel(decode(encode(palette, "GIF"))) == (10, 200, 30)
    cmyk = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert all(abs(a - b) <= 4 for a, b in zip(pixel(cmyk), (255, 0, 0), strict=True))


def test_transparency_lies_on_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    decoded = decode(encode(rgba))
    assert pixel(decoded) == (255, 0, 0) and pixel(decoded, 1) == (255, 255, 255)
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    assert pixel(decode(encode(rgba)), 1) == (127, 127, 127)
    assert pixel(decode(encode(Image.new("LA", (2, 1), (50, 0))))) == (255, 255, 255)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    decoded = decode(encode(palette, transparency=b"\x00\xff"))  # the palette's first colour is clear
    assert pixel(decoded) == (255, 255, 255) and pixel(decoded, 1) == (9, 9, 9)
    keyed = decode(encode(Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3)))
    assert pixel(keyed) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    for value in (
        encode(Image.fromarray(levels)),
        encode(Image.fromarray(levels), "TIFF"),
        levels,
        encode(Image.fromarray(levels.astype(np.int32)), "TIFF"),
    ):
        assert [pixel(decode(value), x)[0] for x in range(4)] == [0, 1, 128, 255]
    with raises("image.unreadable", "32-bit"):
        decode(Image.fromarray(levels.astype(np.int32) * 2))
    with raises("image.unreadable", "floating-point"):
        decode(encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_exif_rotation_is_an_option() -> None:
    image = Image.new("RGB", (32, 16), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    value = encode(image, "JPEG", exif=exif)
    assert decode(value).size == (32, 16) and decode(value, reading=ReadConfig(exif=True)).size == (16, 32)


def test_broken_images_name_row_and_path(tmp_path: Path) -> None:
    jpeg, png = encode(noise(64, 64), "JPEG"), encode(noise(64, 64))
    for content in (jpeg[: len(jpeg) // 2], png[: len(png) // 2], b"", b"no image at all", jpeg[:10]):
        path = tmp_path / "cat 7.jpg"
        path.write_bytes(content)
        with raises("image.unreadable", f"row 12 ({path})", kind=BrokenImage) as caught:
            decode({"bytes": None, "path": str(path)}, row=12)
        assert "0x" not in str(caught.value), "no memory addresses in messages"
        with raises("image.unreadable", "row 12", kind=BrokenImage):
            decode(content, row=12)
    with raises("image.unreadable", "row 3", "gone.png"):
        decode({"bytes": None, "path": str(tmp_path / "gone.png")}, row=3)
    with raises("image.unreadable", "row 4"):
        decode(None, row=4)
    with raises("image.unreadable", "int"):
        decode(5)


def test_a_photograph_of_many_pixels_can_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 399)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would warn
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "png")
    for read in (decode, look):
        with raises("image.unreadable", "row 3 (x.png)", "loader.max_pixels=400"):
            read({"bytes": file.getvalue(), "path": "x.png"}, 3)
    allowed = ReadConfig(max_pixels=400)
    assert decode({"bytes": file.getvalue(), "path": None}, reading=allowed).size == (20, 20)
    look(file.getvalue(), reading=allowed)
    with raises("image.unreadable", "20 x 20", "399"):
        decode(file.getvalue())
    monkeypatch.setattr(decoding, "MAX_PIXELS", 400)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    crop = decode(file.getvalue()).crop((0, 0, 20, 20))  # without a word of Pillow's, as is the image
    assert crop.size == (20, 20)


def test_a_header_alone_tells_what_is_no_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    for name in ("empty.png", "float.tif", "none.png"):
        with raises("image.unreadable", name):
            look({"bytes": None, "path": str(tmp_path / name)}, 1)
    look({"bytes": None, "path": str(tmp_path / "good.png")})
    look({"bytes": None, "path": str(tmp_path / "cut.png")})
