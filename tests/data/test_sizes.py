"""Sizes of images: a sample over all classes, and what policies make of them."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from rescom_timm.data.decoding import ReadConfig
from rescom_timm.data.sizes import after, check_views, one_size, sample, sizes
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import POLICIES, parse
from tests.raises import raises


def split_of(folder: Path, shapes: list[tuple[int, int]], exif: bool = False) -> Split:
    paths = []
    for k, shape in enumerate(shapes):
        image = Image.new("RGB", shape)
        tag = image.getexif()
        if exif:
            tag[274] = 6
        image.save(folder / f"{k}.jpg", exif=tag)
        paths.append({"bytes": None, "path": str(folder / f"{k}.jpg")})
    labels = np.arange(len(shapes)) % 2
    features = Features(image=ImageFeature(decode=False), label=Value("int64"))
    dataset = Dataset.from_dict({"image": paths, "label": labels}, features=features)
    return Split("p", dataset, labels, np.arange(len(shapes)))


def test_a_sample_has_images_of_all_classes_and_is_always_the_same() -> None:
    labels = np.repeat([0, 1, 2, 3], [5000, 40, 3, 1])
    chosen = sample(labels)
    assert len(chosen) == 256 == len(set(chosen.tolist())) and chosen.tolist() == sorted(chosen.tolist())
    assert np.bincount(labels[chosen]).tolist() == [212, 40, 3, 1], "the small ones whole, the large one fills up"
    assert sample(labels).tolist() == chosen.tolist()
    assert chosen[:212].max() > 4000 and chosen[:212].min() < 1000, "not the first rows"
    many = np.repeat(np.arange(3000), 2)
    found = many[sample(many)]
    assert len(found) == len(set(found.tolist())) == 256 and found.max() > 2500 and found.min() < 500
    assert sample(labels[:10]).tolist() == list(range(10))


@pytest.mark.parametrize(
    "line",
    [*POLICIES, "resize(20)", "upscale(7) | rotate(3)", "resize(9) | crop(9,4)", "rising_crop(16)", "corner_crop(8,2)"],
)
@pytest.mark.parametrize("size", [(40, 40), (61, 40), (40, 93)])
def test_the_size_after_a_policy_is_that_of_its_image(line: str, size: tuple[int, int]) -> None:
    policy = parse(line)
    assert after(policy, size) == policy.augment(Image.new("RGB", size)).size
    assert one_size(policy) == (line not in ("none", "resize(20)"))


@pytest.mark.parametrize(("line", "least"), [("crop(32)", 32), ("crop(32,4)", 24), ("corner_crop(16,1)", 16)])
def test_an_image_too_small_for_a_crop_is_named(line: str, least: int, tmp_path: Path) -> None:
    assert after(parse(line), (least, 90)) == parse(line).augment(Image.new("RGB", (least, 90))).size
    small = split_of(tmp_path, [(60, 60), (least - 1, 60)])
    with raises("image.size", "views.train", "row 1 of p", f"{least - 1} x 60", line[:7]):
        check_views(parse(line), small, "views.train")


def test_images_that_differ_in_size_after_a_policy_are_refused(tmp_path: Path) -> None:
    split = split_of(tmp_path, [(40, 30)] * 299 + [(30, 30)])  # beyond the sample: all are looked at
    with raises("image.size", "views.eval", "30 x 30", "40 x 30"):
        check_views(parse("flip"), split, "views.eval")
    assert check_views(parse("resize(9) | center_crop(8)"), split, "views.eval") == (8, 8)
    assert check_views(parse("upscale(5)"), split, "views.eval") == (5, 5)


def test_sizes_are_those_upright_where_asked(tmp_path: Path) -> None:
    split = split_of(tmp_path, [(40, 30)] * 2, exif=True)
    (tmp_path / "1.jpg").write_bytes(b"no image")
    assert sizes(split, np.arange(2)) == [((40, 30), 0)]
    assert sizes(split, np.arange(2), ReadConfig(exif=True)) == [((30, 40), 0)]
