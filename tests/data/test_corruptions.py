"""Corruptions: every kind and severity, from the seed alone, on images of any size; prepared folders as they are."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rescom_timm.analysis import robustness
from rescom_timm.analysis.robustness import ALEXNET_IMAGENET_C
from rescom_timm.data import corruptions
from rescom_timm.data.config import DataConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.corruptions import COMMON, EXTRA, KINDS, SEVERITIES, Corrupt, corrupted_loader, prepared
from rescom_timm.data.loaders import eval_loader
from rescom_timm.data.sources import load
from tests.raises import raises

INLINE = LoadingConfig(workers=0)


@pytest.fixture(scope="module")
def package() -> None:
    pytest.importorskip("imagecorruptions", reason="needs the extra: pip install 'rescom-timm[robustness]'")


def photo(side: int, seed: int = 0) -> Image.Image:
    """Smooth colours, as photographs have, and no pixel at the ends of the scale."""
    small = np.random.default_rng(seed).integers(60, 190, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def corrupted(image: Image.Image, kind: str, severity: int, place: int = 0, seed: int = 0) -> np.ndarray:
    np.random.seed(place)
    return np.asarray(Corrupt(kind, severity, seed)(image))


def change(image: Image.Image, pixels: np.ndarray) -> float:
    return float(np.abs(pixels.astype(float) - np.asarray(image)).mean())


def test_the_kinds_are_the_benchmarks() -> None:
    assert set(COMMON) == set(ALEXNET_IMAGENET_C) and len(COMMON) == 15
    assert len(set(KINDS)) == len(COMMON) + len(EXTRA) == 19 and SEVERITIES == (1, 2, 3, 4, 5)


GLASS = pytest.param("glass_blur", marks=pytest.mark.slow)  # compiled at its first use


@pytest.mark.parametrize("kind", [GLASS if kind == "glass_blur" else kind for kind in KINDS])
def test_every_kind_changes_an_image_and_keeps_its_size(kind: str, package: None) -> None:
    image = photo(32)
    found = {severity: corrupted(image, kind, severity) for severity in (1, 5)}
    for pixels in found.values():
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    # A drop of spatter may miss so small an image; pixelate and jpeg hardly change a smooth one.
    least = 0.0 if kind in ("spatter", "saturate", "zoom_blur", "pixelate", "jpeg_compression", "glass_blur") else 2.0
    assert change(image, found[5]) > least
    if kind in ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "contrast", "brightness"):
        assert change(image, found[5]) > 1.3 * change(image, found[1])


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", GLASS, "snow", "elastic_transform"])
def test_draws_come_from_place_and_seed_alone(kind: str, package: None) -> None:
    image = photo(32)
    first = corrupted(image, kind, 3, place=5, seed=1)
    np.testing.assert_array_equal(first, corrupted(image, kind, 3, place=5, seed=1))
    assert (first != corrupted(image, kind, 3, place=6, seed=1)).any()
    assert (first != corrupted(image, kind, 3, place=5, seed=2)).any()


def test_every_kind_and_severity_has_draws_of_its_own(package: None) -> None:
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    noise = [
        corrupted(grey, *one).ravel() for one in (("gaussian_noise", 1), ("gaussian_noise", 2), ("speckle_noise", 1))
    ]
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.1  # with the same draws they would be copies, scaled


def test_contrast_by_its_formula(package: None) -> None:
    image = photo(40)
    x = np.asarray(image) / 255
    mean = x.mean(axis=(0, 1))
    expected = np.clip((x - mean) * 0.05 + mean, 0, 1) * 255
    np.testing.assert_allclose(corrupted(image, "contrast", 5), np.floor(expected), atol=1)


@pytest.mark.parametrize("size", [(8, 8), (20, 31), (33, 47)])
def test_sizes_that_the_package_does_not_take(size: tuple[int, int], package: None, capsys) -> None:
    image = photo(64).resize(size)
    for kind in ("gaussian_noise", "zoom_blur", "frost", "snow", "pixelate"):
        assert corrupted(image, kind, 4).shape == (size[1], size[0], 3)
    assert capsys.readouterr().out == ""
    # The noise of a small image is as strong as that of a large one.
    grey = Image.new("RGB", size, (128, 128, 128))
    noise = corrupted(grey, "gaussian_noise", 1).astype(float).std()
    assert noise == pytest.approx(0.08 * 255, rel=0.25)


def test_spatter_without_a_drop_leaves_the_image(package: None) -> None:
    image = Image.new("RGB", (32, 32), (120, 130, 140))
    for place in range(20):  # somewhere no drop falls, where the package divides by zero
        pixels = corrupted(image, "spatter", 1, place)
        assert change(image, pixels) < 60


def test_impossible_corruptions_are_refused() -> None:
    with raises("data.corrupted", "'defocus'", "defocus_blur?"):
        Corrupt("defocus", 1)
    with raises("data.corrupted", "severity", "not 0"):
        Corrupt("fog", 0)
    with raises("data.corrupted", "seed", "-1"):
        Corrupt("fog", 1, -1)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with raises("system.package", "pip install 'rescom-timm[robustness]'"):
        corruptions.origin()
    np.random.seed(0)
    with raises("system.package", "folder"):
        Corrupt("fog", 1)(photo(32))


def test_a_loader_corrupts_after_the_evaluation_policy(package: None) -> None:
    split = load(DataConfig("digits")).test
    views = ViewsConfig(eval="upscale(40)", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    few = type(split)(split.name, split.dataset.select(range(6)), split.labels[:6], split.rows[:6])
    clean = torch.cat([batch["image"] for batch in eval_loader(few, views, 4, speed=INLINE)])
    state = np.random.get_state()[1].copy()
    noisy = [
        torch.cat(
            [batch["image"] for batch in corrupted_loader(few, views, "gaussian_noise", 5, size, 3, speed=INLINE)]
        )
        for size in (4, 6)
    ]
    assert (np.random.get_state()[1] == state).all()  # the process's own draws are not touched
    assert noisy[0].shape == clean.shape == (6, 3, 40, 40) and noisy[0].dtype == torch.uint8
    assert torch.equal(noisy[0], noisy[1])  # whatever the batches
    assert (noisy[0].float() - clean.float()).abs().mean() > 20
    labels = [batch["label"] for batch in corrupted_loader(few, views, "fog", 1, 6, speed=INLINE)]
    assert labels[0].tolist() == few.labels.tolist()
    loader = corrupted_loader(few, views, "fog", 2, 6, 7, speed=INLINE)
    assert loader.dataset.policy.text == "upscale(40,bilinear) | fog(2,7)"


# Prepared folders


def cifar_c(folder: Path, images: int = 4, labels: int | None = None) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 255, (5 * images, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "fog.npy", pixels)
    np.save(folder / "jpeg_compression.npy", pixels[::-1])
    np.save(folder / "labels.npy", np.arange(labels or 5 * images, dtype=np.uint8) % images)
    return pixels


def test_cifar_c_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = cifar_c(tmp_path)
    found = prepared(tmp_path, list("abcd"))
    assert found.kinds == ["fog", "jpeg_compression"]
    split = found.split("fog", 2)
    assert split.labels.tolist() == [0, 1, 2, 3] and split.rows.tolist() == [4, 5, 6, 7]
    (batch,) = eval_loader(split, corruptions.unprocessed(ViewsConfig(eval="resize(8)")), 8, speed=INLINE)
    np.testing.assert_array_equal(batch["image"].permute(0, 2, 3, 1).numpy(), pixels[4:8])
    with raises("data.corrupted", "'frost'", "fog"):
        found.split("frost", 1)


def test_cifar_c_that_is_not_as_it_should_be(tmp_path: Path) -> None:
    cifar_c(tmp_path)
    with raises("data.corrupted", "labels.npy", "3", "2 classes"):
        prepared(tmp_path, ["a", "b"]).split("fog", 1)
    np.save(tmp_path / "fog.npy", np.zeros((7, 32, 32, 3), np.uint8))
    with raises("data.corrupted", "fog.npy", "(7, 32, 32, 3)"):
        prepared(tmp_path, list("abcd")).split("fog", 1)
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    with raises("data.corrupted", "20 labels", "fog.npy", "10 images"):
        prepared(tmp_path, list("abcd")).split("fog", 1)
    (tmp_path / "labels.npy").unlink()
    with raises("file.missing", "labels.npy"):
        prepared(tmp_path, list("abcd"))


def imagenet_c(root: Path, inside: str = "") -> None:
    for severity in (1, 2):
        for wnid, shade in (("n02", 40), ("n01", 10)):
            folder = root / inside / "fog" / str(severity) / wnid
            folder.mkdir(parents=True)
            Image.new("RGB", (24, 24), (shade + severity,) * 3).save(folder / "image.png")


@pytest.mark.parametrize("inside", ["", "weather"])
def test_imagenet_c_is_read_as_it_is_and_matched_by_class(tmp_path: Path, inside: str) -> None:
    imagenet_c(tmp_path, inside)
    found = prepared(tmp_path, ["n02", "n00", "n01"])
    assert found.kinds == ["fog"]
    split = found.split("fog", 2)
    assert split.labels.tolist() == [2, 0]  # by name, though n00 is not there
    (batch,) = eval_loader(split, corruptions.unprocessed(ViewsConfig(eval="resize(8)")), 8, speed=INLINE)
    assert batch["image"].shape == (2, 3, 24, 24) and batch["image"][:, 0, 0, 0].tolist() == [12, 42]
    # A run that calls its classes otherwise: the folders in their order.
    assert prepared(tmp_path, ["tench", "shark"]).split("fog", 1).labels.tolist() == [0, 1]
    with raises("data.corrupted", "2 class folders", "3 classes"):
        prepared(tmp_path, ["tench", "shark", "ray"]).split("fog", 1)
    with raises("file.missing", "severity 5", "fog"):
        found.split("fog", 5)


def test_a_folder_of_neither(tmp_path: Path) -> None:
    with raises("data.corrupted", str(tmp_path)):
        prepared(tmp_path, ["a"])
    with raises("file.missing", "absent"):
        prepared(tmp_path / "absent", ["a"])


def test_two_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = []
    for parent in ("a", "b"):
        (tmp_path / parent / "CIFAR-10-C").mkdir(parents=True)
        cifar_c(tmp_path / parent / "CIFAR-10-C")
        names.append(prepared(tmp_path / parent / "CIFAR-10-C", list("abcd")).name)
    assert names[0] != names[1] and all(name.startswith("CIFAR-10-C-") for name in names)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "CIFAR-10-C")
    assert prepared(tmp_path / "link", list("abcd")).name == names[0]
    paths = {
        robustness.path_of(tmp_path, "test", "last", prepared(tmp_path / parent / "CIFAR-10-C", list("abcd")))
        for parent in "ab"
    }
    assert len(paths) == 2
