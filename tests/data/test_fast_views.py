"""Batched views: Pillow's pixels, bit for bit; near ones close to them; the same draws; the same batches."""

import io
import pickle
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, RandAugment
from torchvision import transforms
from torchvision.transforms.autoaugment import AutoAugmentPolicy, _apply_op

from rescom_timm.data import fast_views
from rescom_timm.data.fast_views import BatchedPolicy, Draws, PlanePolicy
from rescom_timm.data.loaders import LoaderConfig, SpeedConfig, ViewsDataset, finish_views, set_epoch, train_loader
from rescom_timm.data.views import ViewsConfig, decode, magnitudes, parse, seed_all

EQUAL = [
    "cifar",
    "none",
    "crop(24) | flip(0.3) | grayscale(0.4) | cutout(5)",
    "autoaugment(imagenet,0) | flip(1) | cutout(1)",
    "autoaugment(svhn) | crop(40,4)",
    "crop(40,4) | autoaugment(cifar10) | autoaugment(cifar10)",
]
PLAIN = SpeedConfig(workers=0, batched=False, cache=0)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
WARPS = list(fast_views._RandAugment.MATRICES)
OTHERS = [name for name in fast_views._RandAugment.NAMES if name not in WARPS]


@pytest.fixture(autouse=True)
def random_states() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])


def made_up(height: int = 32, width: int = 32) -> np.ndarray:
    """(16, H, W, 3): noise of every contrast, flat images, two levels, ramps, a single different pixel."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, height, width, 3))
    images = images * np.arange(1, 17)[:, None, None, None] // 16
    images[0], images[1], images[2] = 0, 255, 77
    images[3] = np.where(images[3] > 5, 254, 3)
    images[4] = (np.arange(width) * 255 // (width - 1))[None, :, None]
    images[5], images[5, 1, 1] = 200, 40
    images[6] = 100 + images[6] // 64
    return images.astype(np.uint8)


@pytest.fixture(scope="module")
def photos(shared_cifar10: Path) -> np.ndarray:
    import pyarrow.parquet as pq

    table = next(pq.ParquetFile(next(shared_cifar10.rglob("test*.parquet"))).iter_batches(200))
    column = next(name for name in table.schema.names if name in ("img", "image"))
    return np.stack([np.asarray(decode(value.as_py())) for value in table.column(column)])


def tensor(images: np.ndarray, device: str = "cpu") -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)


def array(views: torch.Tensor) -> np.ndarray:
    return views.permute(0, 2, 3, 1).cpu().numpy()


def by_pillow(line: str, images: np.ndarray, seeds: list[int], num_views: int = 2) -> np.ndarray:
    policy, views = parse(line), []
    for image, seed in zip(images, seeds, strict=True):
        seed_all(seed)
        views += [np.asarray(policy.augment(Image.fromarray(image))) for _ in range(num_views)]
    return np.stack(views)


# ---------------------------------------------------------------------------------------------------- equal to Pillow


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (3, 3), (2, 2), (300, 260)], ids=str)
def test_every_operation_magnitude_and_sign_gives_pillows_pixels(size: tuple[int, int], device: str) -> None:
    """All of torchvision's, of which each policy uses some; 300 x 260 has more pixels than two bytes count."""
    images = made_up(*size)[:: 1 if size == (32, 32) else 7]
    space, nearest = magnitudes(10, size), transforms.InterpolationMode.NEAREST
    cases = [(name, level) for name in space for level in (range(10) if space[name][0].ndim else [None])]
    tables = fast_views._tables(tuple(((name, 1.0, level),) * 2 for name, level in cases), size, torch.device(device))
    step = fast_views._AutoAugment(transforms.AutoAugment(fill=99))  # type: ignore[arg-type]
    assert len(cases) == 11 * 10 + 3
    for case, sign in np.ndindex(len(cases), 2):
        name, level = cases[case]
        values, signed = space[name]
        value = 0.0 if level is None else float(values[level]) * (-1 if signed and sign == 0 else 1)
        expected = [np.asarray(_apply_op(Image.fromarray(image), name, value, nearest, 99)) for image in images]
        views = tensor(images, device)
        step.apply(views, np.full(len(images), tables.operation[case, 0, sign]), tables)
        assert np.array_equal(array(views), np.stack(expected)), (name, value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("line", EQUAL)
def test_whole_policies_give_pillows_pixels_from_the_same_seeds(line: str, device: str) -> None:
    images = np.concatenate([made_up()] * 8)
    seeds = np.random.default_rng(1).integers(0, 2**63, len(images)).tolist()
    batched = BatchedPolicy(parse(line))
    assert not batched.head and batched.serves(parse(line), (32, 32))
    for num_views in (1, 3):
        views = batched(tensor(images, device), batched.draw(seeds, num_views, (32, 32)))
        assert np.array_equal(array(views), by_pillow(line, images, seeds, num_views))


def test_cifar_policy_on_real_images(photos: np.ndarray) -> None:
    seeds = list(range(5, 5 + len(photos)))
    batched = BatchedPolicy(parse("cifar"))
    views = batched(tensor(photos), batched.draw(seeds, 2, (32, 32)))
    assert np.array_equal(array(views), by_pillow("cifar", photos, seeds))


def test_oblong_images() -> None:
    images, seeds = made_up(24, 40), list(range(16))
    for line in ("flip | autoaugment(cifar10) | cutout(9)", "crop(24,3) | autoaugment(imagenet)"):
        batched = BatchedPolicy(parse(line))
        assert np.array_equal(
            array(batched(tensor(images), batched.draw(seeds, 2, (24, 40)))), by_pillow(line, images, seeds)
        )


def test_autocontrast_of_every_pair_of_levels() -> None:
    pairs = [(low, high) for low in range(256) for high in range(low, 256)]
    pairs += [(0, 0)] * (-len(pairs) % 3)
    levels = np.array(pairs, np.uint8).reshape(-1, 3, 2).transpose(0, 2, 1)[:, None]  # (N, 1, 2, 3)
    table = fast_views.autocontrast_table(tensor(levels)).numpy()
    for image, found in zip(levels[::7], table[::7], strict=True):
        low, high = image[0]
        ramp = np.clip(np.arange(256)[:, None], low, high).astype(np.uint8)[None]
        expected = np.asarray(ImageOps.autocontrast(Image.fromarray(ramp)))[0]
        for channel in range(3):
            between = slice(low[channel], int(high[channel]) + 1)
            assert np.array_equal(found[channel, between], expected[between, channel])


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (16, 16), (17, 15), (64, 64)])
def test_equalize_mean_gray_and_smoothing_at_many_sizes(size: tuple[int, int]) -> None:
    from PIL import ImageFilter, ImageStat

    rng = np.random.default_rng(2)
    images = np.stack([rng.integers(0, 1 + n, (*size, 3)) + 255 - n for n in range(256)]).astype(np.uint8)
    pillow = [Image.fromarray(image) for image in images]
    views = tensor(images)
    equal = fast_views.lookup(views, fast_views.equalize_table(views))
    assert np.array_equal(array(equal), np.stack([np.asarray(ImageOps.equalize(image)) for image in pillow]))
    means = [int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5) for image in pillow]
    assert fast_views.mean_gray(views).tolist() == means
    smooth = np.stack([np.asarray(image.filter(ImageFilter.SMOOTH)) for image in pillow])
    if min(size) >= 3:
        assert np.array_equal(array(fast_views.smooth(views)), smooth)


# -------------------------------------------------------------------------------------------------------------- draws


def test_draws_are_torchs_own() -> None:
    seeds = np.random.default_rng(0).integers(0, 2**63, 50).tolist()
    draws = Draws(fast_views.first_words(seeds, 7), np.zeros((50, 0)))
    found = [
        draws.below(25),
        draws.uniform(),
        draws.uniform(),
        draws.below(2),
        draws.below(9),
        draws.uniform(),
        draws.below(32),
    ]
    for row, seed in enumerate(seeds):
        torch.manual_seed(seed)
        assert found[0][row] == torch.randint(25, (1,)).item()
        assert [found[1][row], found[2][row]] == torch.rand((2,)).tolist()
        assert [found[3][row]] == torch.randint(2, (1,)).tolist()
        assert found[4][row] == torch.randint(0, 9, size=(1,)).item()
        assert found[5][row] == torch.rand(1).item()
        assert found[6][row] == int(torch.randint(32, ()))


@pytest.mark.parametrize("count", [0, 1, 5, 16, 40])
def test_next_words_go_on_where_the_generator_stands(count: int) -> None:
    torch.manual_seed(3)
    first = torch.rand(3)
    words = fast_views.next_words(count)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), first)
    assert [torch.randint(1000, (1,)).item() for _ in range(count)] == (words % 1000).tolist()
    assert torch.equal(torch.rand(1), after)


def test_probabilities_are_compared_as_torch_compares_them() -> None:
    """A float32 draw against a float64 number: at the number itself the rounding decides."""
    for p in {
        p for policy in AutoAugmentPolicy for pair in transforms.AutoAugment(policy).policies for _, p, _ in pair
    }:
        nearest = round(p * 2**24)
        for word in range(max(nearest - 1, 0), min(nearest + 2, 2**24)):
            drawn = Draws(np.array([[word, word]], np.uint64), np.zeros((1, 0)))
            number = torch.tensor([word * 2**-24])
            assert bool(drawn.uniform()[0] <= np.array([p], np.float32)[0]) == bool(number[0] <= p)
            assert bool(drawn.uniform()[0] < np.float32(p)) == bool(number < p)


# ------------------------------------------------------------------------------------------- where it is not applied


def test_what_cannot_be_batched_is_left_to_pillow() -> None:
    for line in ("imagenet", "digits", "cifar | blur", "trivialaugment", "jitter(.4,.4,.4,0)", "crop(8) | rotate(10)"):
        batched = BatchedPolicy(parse(line))
        assert len(batched.head) == len(parse(line).steps) and not batched.steps
        assert not batched.serves(parse(line), (32, 32))
    assert not BatchedPolicy(parse("cifar")).serves(parse("cifar"), (224, 224)), "Pillow is as fast there"
    assert not BatchedPolicy(parse("cifar")).serves(parse("cifar"), (20, 32)), "too small for the crop: Pillow says so"


def test_a_library_that_computes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fast_views.first_words
    monkeypatch.setattr(fast_views, "first_words", lambda seeds, count: original(seeds, count) ^ np.uint64(1))
    split, views = make_split(), ViewsConfig()
    loader = train_loader(split, views, 2, 8, speed=SpeedConfig(workers=0))
    with pytest.warns(RuntimeWarning, match="differs from Pillow's"):
        batches = list(loader)
    assert_equal(batches, list(train_loader(split, views, 2, 8, speed=PLAIN)))


# ------------------------------------------------------------------------------------------------------------ loaders


def make_split(sizes: tuple[tuple[int, int], ...] = ((32, 32),) * 20, broken: tuple[int, ...] = ()) -> Any:
    rng, images = np.random.default_rng(3), []
    for position, (height, width) in enumerate(sizes):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
        images.append({"bytes": stream.getvalue()[: 60 if position in broken else None], "path": f"{position}.png"})
    labels = np.arange(len(sizes)) % 2
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels})
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    return SimpleNamespace(name="noise", dataset=dataset, labels=labels, rows=np.arange(len(sizes)) + 7)


def assert_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "row"}
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "speed",
    [
        SpeedConfig(workers=0),
        SpeedConfig(workers=0, cache=0),
        SpeedConfig(workers=0, batched=False),
        SpeedConfig(workers=2),
    ],
    ids=["batched, cached", "batched", "cached", "workers"],
)
def test_batches_do_not_depend_on_speed(speed: SpeedConfig) -> None:
    for split in (make_split(), make_split(broken=(3, 4))):
        config = LoaderConfig(broken="skip")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the broken images
            plain = train_loader(split, ViewsConfig(), 2, 7, seed=4, config=config, speed=PLAIN)
            loader = train_loader(split, ViewsConfig(), 2, 7, seed=4, config=config, speed=speed)
            for epoch in (0, 1):
                set_epoch(plain, epoch), set_epoch(loader, epoch)
                assert_equal(list(loader), list(plain))


def test_images_of_several_sizes_go_to_pillow_and_are_not_cached() -> None:
    split = make_split(((32, 32),) * 10 + ((40, 33),) * 10)
    loader = train_loader(split, ViewsConfig(), 2, 5, speed=SpeedConfig(workers=0))
    assert loader.dataset.cache is None
    assert_equal(list(loader), list(train_loader(split, ViewsConfig(), 2, 5, speed=PLAIN)))


def test_the_cache_is_bounded() -> None:
    split = make_split(((300, 300),) * 4)
    for megabytes, kept in ((0, False), (1, False), (2, True)):
        speed = SpeedConfig(workers=0, cache=megabytes)
        loader = train_loader(split, ViewsConfig("crop(8)"), 1, 2, speed=speed)
        assert (loader.dataset.cache is not None) == kept
    with pytest.raises(ValueError, match="cache must be 0 or more"):
        SpeedConfig(cache=-1)


def test_another_policy_put_into_a_loader_is_followed() -> None:
    loader = train_loader(make_split(), ViewsConfig(), 1, 5, speed=SpeedConfig(workers=0))
    loader.dataset.policy = parse("upscale(9)")
    assert next(iter(loader))["image"].shape == (5, 1, 3, 9, 9)
    pickle.loads(pickle.dumps(ViewsDataset(make_split(), parse("imagenet"), 2, device=True)))  # for spawned workers


# ------------------------------------------------------------------------------------------------------ on the device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("line", ["cifar", "center_crop(30) | flip | cutout(7) | grayscale(0.4)", "resize(20) | flip"])
def test_equal_steps_on_the_device_give_the_same_batches(line: str, device: str) -> None:
    config, views = LoaderConfig(device_views=True), ViewsConfig(line)
    loader = train_loader(make_split(), views, 2, 5, 1, config=config, speed=SpeedConfig(workers=0))
    finish = finish_views(views, config)
    moved = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in loader]
    found = [{key: value.cpu() for key, value in finish(batch).items()} for batch in moved]
    assert_equal(found, list(train_loader(make_split(), views, 2, 5, 1, speed=PLAIN)))
    plain = next(iter(train_loader(make_split(), views, 2, 5, 1, speed=PLAIN)))
    assert finish_views(views, LoaderConfig())(plain) is plain


@pytest.mark.parametrize("workers", [0, 1])
def test_device_views_pass_through_accelerate(workers: int) -> None:
    config, views = LoaderConfig(device_views=True), ViewsConfig("random_resized_crop(24) | flip | jitter(.4,.4,.4,0)")
    speed = SpeedConfig(workers=workers, cache=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    loader_config = accelerate.DataLoaderConfiguration(split_batches=True)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=loader_config)
    loader = accelerator.prepare(train_loader(make_split(), views, 2, 5, 1, config=config, speed=speed))
    finish = finish_views(views, config)
    set_epoch(loader, 1)
    found = [finish(batch) for batch in loader]
    plain = train_loader(make_split(), views, 2, 5, 1, speed=PLAIN)
    set_epoch(plain, 1)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours["row"], theirs["row"]) and ours["image"].shape == theirs["image"].shape
        assert (ours["image"].int() - theirs["image"].int()).abs().max() <= 1
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "method"), [(n, m) for n in WARPS for m in ("BILINEAR", "BICUBIC")] + [(n, "BILINEAR") for n in OTHERS]
)
def test_operations_of_randaugment_are_within_a_level(name: str, method: str, device: str) -> None:
    settings = {"img_mean": (10, 100, 200), "magnitude_std": 1.0, "interpolation": (Image.Resampling[method],)}
    reference = RandAugment([AugmentOp(name, prob=1.0, magnitude=8, hparams=settings)], num_layers=1)
    step, images, expected, notes = fast_views._RandAugment(reference), made_up(20, 30), [], []
    for seed, image in enumerate(images):
        seed_all(seed)
        expected.append(np.asarray(reference(Image.fromarray(image))))
        seed_all(seed)
        notes.append(step.note())
    views = step(tensor(images, device), Draws(np.zeros((16, 0), np.uint64), np.array(notes)))
    difference = np.abs(array(views).astype(int) - np.stack(expected))
    assert difference.max() <= (1 if name in WARPS or device == "cuda" else 0)
    assert (difference > 0).mean() < 0.1


@pytest.mark.parametrize(
    "line",
    [
        "imagenet",
        "random_resized_crop(224) | jitter(.4,0,.4,0) | randaugment(n3,m5,p1,inc1)",
        "random_resized_crop(224) | randaugment(n2,m9,tweights,inc1) | flip",
    ],
)
def test_near_policies_draw_the_same_and_stay_near(line: str) -> None:
    """All that differs are single levels, and what a threshold or a stretched contrast makes of them."""
    line = line.replace("imagenet", parse("imagenet").text).replace("(224", "(40")
    rng = np.random.default_rng(5)
    config, views = LoaderConfig(device_views=True), ViewsConfig(line)
    split = make_split(tuple((int(h), int(w)) for h, w in rng.integers(40, 90, (24, 2))))
    found = finish_views(views, config)(next(iter(train_loader(split, views, 2, 24, 1, config=config, speed=PLAIN))))
    plain = next(iter(train_loader(split, views, 2, 24, 1, speed=PLAIN)))
    difference = (found["image"].int() - plain["image"].int()).abs()
    assert torch.equal(found["row"], plain["row"]) and found["image"].shape == (24, 2, 3, 40, 40)
    assert (difference > 0).float().mean() < 0.04 and (difference > 1).float().mean() < 0.004


def test_device_views_need_a_step_that_the_device_can_do() -> None:
    config = LoaderConfig(device_views=True)
    for line in ("cifar | blur", "resize(40)", "flip | jitter(.4,.4,.4,.1)"):
        with pytest.raises(ValueError, match="device_views.*cannot be done on the device"):
            train_loader(make_split(), ViewsConfig(line), 2, 5, config=config, speed=PLAIN)


# ------------------------------------------------------------------------------------------------------------- planes

PLANED = [
    "imagenet",
    "places",
    "random_resized_crop(48) | randaugment(n4,m9,p1,mstd0.5) | flip | jitter(1,1,1,0) | grayscale(0.5)",
    "randaugment(n3,tweights,inc1)",
    "randaugment(n4,m10,p1) | blur | jitter(2,0,2,0) | cutout(5)",
]


@pytest.mark.parametrize("line", PLANED)
def test_planes_are_pillows_pixels(line: str) -> None:
    policy, rng = parse(line), np.random.default_rng(6)
    planes = pickle.loads(pickle.dumps(PlanePolicy(policy)))
    images = [*made_up(40, 56)]
    for height, width in ((1, 1), (1, 9), (2, 3), (3, 300), (260, 1), *rng.integers(2, 200, (15, 2))):
        images.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for seed, pixels in enumerate(images * 2):
        image = Image.fromarray(pixels)
        seed_all(seed)
        expected = [np.asarray(policy.augment(image)) for _ in range(2)] + [torch.rand(1), random.random()]
        seed_all(seed)
        found = [planes(image), planes(image), torch.rand(1), random.random()]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), (seed, pixels.shape)
        assert np.array_equal(np.asarray(image), pixels), "the image is shared by all views"


@pytest.mark.parametrize("name", fast_views._RandAugment.NAMES)
def test_operations_on_planes_are_pillows(name: str) -> None:
    images = [*made_up(20, 30), *made_up(31, 17)]
    for magnitude, spread in ((3, 0.0), (5, 0.0), (8, 0.5), (10, 0.0)):
        settings = {"img_mean": (10, 100, 200), "magnitude_std": spread}
        reference = RandAugment([AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=settings)], num_layers=1)
        step = fast_views._over_planes(reference)
        for seed, image in enumerate(images):
            seed_all(seed)
            expected = np.asarray(reference(Image.fromarray(image)))
            for view in (Image.fromarray(image), tensor(image[None])[0].numpy()):
                seed_all(seed)
                assert np.array_equal(fast_views._planes(step(view)).transpose(1, 2, 0), expected), (magnitude, seed)


def test_gray_of_every_colour_and_blends_of_every_pair() -> None:
    red, green = np.indices((256, 256), dtype=np.uint8)
    for blue in range(256):
        colours = np.stack([red, green, np.full_like(red, blue)])
        expected = np.asarray(Image.fromarray(colours.transpose(1, 2, 0)).convert("L"))
        assert np.array_equal(fast_views._gray(colours.astype(np.float32)), expected)
    for factor in (0, 1e-3, 1 / 3, 0.6, 1 - 1e-7, 1, 1 + 1e-7, 1.25, 1.4, 1.9, 2, 7.7):
        levels = red.astype(np.float32)
        fast_views._blend_in(levels, green.astype(np.float32), factor)
        expected = np.asarray(Image.blend(Image.fromarray(green), Image.fromarray(red), factor))
        assert np.array_equal(levels, expected), factor


@pytest.mark.parametrize("cubic", [False, True])
def test_slides_of_many_slopes_and_offsets(cubic: bool) -> None:
    image, method = (
        Image.fromarray(made_up(23, 37)[15]),
        Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR,
    )
    planes, left = fast_views._planes(image), 0
    for slope in (0, 0.3, -0.3, 1e-4, 0.25, 1.7, -3):
        for offset in (0, 0.5, -0.4, 1 / 3, 12, -12.3, 1e-13, 60):
            matrix = (1, slope, offset, 0, 1, 0)
            expected = image.transform(image.size, Image.Transform.AFFINE, matrix, method, fillcolor=(1, 2, 3))
            found = fast_views.slide(planes, slope, offset, cubic, (1, 2, 3))
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
    original = fast_views._gray
    monkeypatch.setattr(fast_views, "_gray", lambda levels: original(levels) + np.float32(1))
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
    assert_equal(list(train_loader(odd_split(), views, 2, 5, 1, config=config, speed=SpeedConfig(workers=0))), plain)
    assert len(calls) > 30


@pytest.mark.parametrize("kind", ["noise", "smooth", "edges"])
def test_near_resize_is_within_a_level(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rng = parse("random_resized_crop(64,0.05,1) | flip"), np.random.default_rng(7)
    near, different = fast_views.near_resized(policy), []
    assert near.text == policy.text
    for seed in range(60):
        noise = rng.integers(0, 2, (90, 120, 3)) * 255 if kind == "edges" else rng.integers(0, 256, (90, 120, 3))
        image = Image.fromarray(noise.astype(np.uint8))
        image = image.resize((9, 12)).resize((120, 90), Image.Resampling.BICUBIC) if kind == "smooth" else image
        seed_all(seed)
        expected = np.asarray(policy.augment(image)).astype(int)
        for augment in (near.augment, PlanePolicy(near)):
            seed_all(seed)
            difference = np.abs(np.asarray(augment(image)) - expected)  # type: ignore[operator]
            assert difference.max() <= 1
            different.append((difference > 0).mean())
    assert np.mean(different) < (0.005 if kind == "smooth" else 0.1)


@pytest.mark.parametrize("device_views", [False, True])
def test_near_resize_in_the_loader(device_views: bool) -> None:
    line = "random_resized_crop(40) | flip | jitter(.4,.4,.4,0)"
    views, config = ViewsConfig(line), LoaderConfig(near_resize=True, device_views=device_views)
    plain = next(iter(train_loader(make_split(), views, 2, 20, 1, speed=PLAIN)))
    for speed in (PLAIN, SpeedConfig(workers=0, cache=0)):
        loader = train_loader(make_split(), views, 2, 20, 1, config=config, speed=speed)
        found = finish_views(views, config)(next(iter(loader)))
        difference = (found["image"].int() - plain["image"].int()).abs()
        assert torch.equal(found["row"], plain["row"]) and difference.max() <= 4 and difference.float().mean() < 0.2
    for line in ("cifar", "random_resized_crop(9,interpolation=bicubic) | flip"):
        with pytest.raises(ValueError, match="loader.near_resize: no bilinear random_resized_crop"):
            train_loader(make_split(), ViewsConfig(line), 2, 5, config=LoaderConfig(near_resize=True), speed=PLAIN)
