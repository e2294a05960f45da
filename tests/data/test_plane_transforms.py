"""Planes: Pillow's pixels, bit for bit, and its draws; the same batches."""

import io
import pickle
import random
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, RandAugment

from rescom_timm.data import near_views, plane_transforms
from rescom_timm.data.config import LoaderConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.loaders import train_loader
from rescom_timm.data.plane_transforms import PlanePolicy
from rescom_timm.data.transforms import parse, seed_all
from tests.data.made_up import PLAIN, assert_equal, made_up, tensor

PLANED = [
    "imagenet",
    "places",
    "random_resized_crop(48) | randaugment(n4,m9,p1,mstd0.5) | flip | jitter(1,1,1,0) | grayscale(0.5)",
    "randaugment(n3,tweights,inc1)",
    "randaugment(n4,m10,p1) | blur | jitter(2,0,2,0) | cutout(5)",
]

pytestmark = pytest.mark.usefixtures("random_states")


@pytest.mark.parametrize("line", PLANED)
def test_planes_are_pillows_pixels(line: str) -> None:
    policy, rng = parse(line), np.random.default_rng(6)
    over_planes = pickle.loads(pickle.dumps(PlanePolicy(policy)))
    images = [*made_up(40, 56)]
    for height, width in ((1, 1), (1, 9), (2, 3), (3, 300), (260, 1), *rng.integers(2, 200, (15, 2))):
        images.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for seed, pixels in enumerate(images * 2):
        image = Image.fromarray(pixels)
        seed_all(seed)
        expected = [np.asarray(policy.augment(image)) for _ in range(2)] + [torch.rand(1), random.random()]
        seed_all(seed)
        found = [over_planes(image), over_planes(image), torch.rand(1), random.random()]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), (seed, pixels.shape)
        assert np.array_equal(np.asarray(image), pixels), "the image is shared by all views"


@pytest.mark.parametrize("name", near_views.NearRandAugment.NAMES)
def test_operations_on_planes_are_pillows(name: str) -> None:
    images = [*made_up(20, 30), *made_up(31, 17)]
    for magnitude, spread in ((3, 0.0), (5, 0.0), (8, 0.5), (10, 0.0)):
        settings = {"img_mean": (10, 100, 200), "magnitude_std": spread}
        reference = RandAugment([AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=settings)], num_layers=1)
        step = plane_transforms._over_planes(reference)
        for seed, image in enumerate(images):
            seed_all(seed)
            expected = np.asarray(reference(Image.fromarray(image)))
            for view in (Image.fromarray(image), tensor(image[None])[0].numpy()):
                seed_all(seed)
                assert np.array_equal(plane_transforms._planes(step(view)).transpose(1, 2, 0), expected), (
                    magnitude,
                    seed,
                )


def test_gray_of_every_colour_and_blends_of_every_pair() -> None:
    red, green = np.indices((256, 256), dtype=np.uint8)
    for blue in range(256):
        colours = np.stack([red, green, np.full_like(red, blue)])
        expected = np.asarray(Image.fromarray(colours.transpose(1, 2, 0)).convert("L"))
        assert np.array_equal(plane_transforms._gray(colours.astype(np.float32)), expected)
    for factor in (0, 1e-3, 1 / 3, 0.6, 1 - 1e-7, 1, 1 + 1e-7, 1.25, 1.4, 1.9, 2, 7.7):
        levels = red.astype(np.float32)
        plane_transforms._blend_in(levels, green.astype(np.float32), factor)
        expected = np.asarray(Image.blend(Image.fromarray(green), Image.fromarray(red), factor))
        assert np.array_equal(levels, expected), factor


@pytest.mark.parametrize("cubic", [False, True])
def test_slides_of_many_slopes_and_offsets(cubic: bool) -> None:
    image, method = (
        Image.fromarray(made_up(23, 37)[15]),
        Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR,
    )
    pixels, left = plane_transforms._planes(image), 0
    for slope in (0, 0.3, -0.3, 1e-4, 0.25, 1.7, -3):
        for offset in (0, 0.5, -0.4, 1 / 3, 12, -12.3, 1e-13, 60):
            matrix = (1, slope, offset, 0, 1, 0)
            expected = image.transform(image.size, Image.Transform.AFFINE, matrix, method, fillcolor=(1, 2, 3))
            found = plane_transforms.slide(pixels, slope, offset, cubic, (1, 2, 3))
            if found is None:
                left += 1
            else:
                assert np.array_equal(found.transpose(1, 2, 0), np.asarray(expected)), (slope, offset)
    assert 0 < left < 20, "only whole steps are left to Pillow"


def test_planes_that_would_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not PlanePolicy(parse("resize(40) | flip")).serves(parse("resize(40) | flip"))
    line = "crop(300) | jitter(.4,.4,.4,0)"
    assert not PlanePolicy(parse(line)).serves(parse(line)), "too small to try: left to Pillow"
    assert PlanePolicy(parse("imagenet")).serves(parse("imagenet"))
    original = plane_transforms._gray
    monkeypatch.setattr(plane_transforms, "_gray", lambda levels: original(levels) + np.float32(1))
    with pytest.warns(RuntimeWarning, match="differs from Pillow's"):
        assert not PlanePolicy(parse("imagenet")).serves(parse("imagenet"))


def odd_split() -> Any:
    """Gray, transparent, CMYK, palette and tiny images, and two that are broken."""
    images = []
    for position, mode in enumerate(("L", "RGBA", "CMYK", "RGB", "P", "1", "RGB", "RGB") * 2):
        image = Image.fromarray(made_up(50 + position, 70)[position])
        image = image.resize((1, 1)) if position == 3 else image
        stream = io.BytesIO()
        image.convert(mode).save(stream, "JPEG" if mode == "CMYK" else "PNG")
        images.append({"bytes": stream.getvalue()[: 60 if position in (6, 7) else None], "path": f"{position}"})
    dataset = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image(decode=False))
    return SimpleNamespace(name="odd", dataset=dataset, labels=np.arange(16) % 2, rows=np.arange(16))


@pytest.mark.filterwarnings("ignore:cannot read the image:RuntimeWarning")
def test_batches_by_planes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    views, config = ViewsConfig(parse("imagenet").text.replace("(224", "(40")), LoaderConfig(broken="skip")
    plain = list(train_loader(odd_split(), views, 2, 5, 1, config=config, speed=PLAIN))
    calls, original = [], PlanePolicy.__call__
    monkeypatch.setattr(PlanePolicy, "__call__", lambda *a: calls.append(1) or original(*a))  # type: ignore[func-returns-value]
    assert_equal(list(train_loader(odd_split(), views, 2, 5, 1, config=config, speed=LoadingConfig(workers=0))), plain)
    assert len(calls) > 30
