"""Batched views: Pillow's pixels, bit for bit; near ones close to them; the same draws; the same batches."""

import pickle
import warnings
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, RandAugment
from torchvision import transforms
from torchvision.transforms.autoaugment import AutoAugmentPolicy, _apply_op

from rescom_timm.data import autoaugment, batched_transforms, near_views, pixels
from rescom_timm.data.batched_transforms import BatchedPolicy
from rescom_timm.data.config import LoaderConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.decoding import decode
from rescom_timm.data.device_transforms import Resident, complete, complete_views
from rescom_timm.data.draws import Draws, first_words, next_words
from rescom_timm.data.loaders import set_epoch, train_loader
from rescom_timm.data.samples import ViewsDataset
from rescom_timm.data.transforms import magnitudes, parse, seed_all
from tests.data.made_up import PLAIN, assert_equal, made_up, make_split, tensor
from tests.raises import raises

EQUAL = [
    "cifar",
    "none",
    "crop(24) | flip(0.3) | grayscale(0.4) | cutout(5)",
    "autoaugment(imagenet,0) | flip(1) | cutout(1)",
    "autoaugment(svhn) | crop(40,4)",
    "crop(40,4) | autoaugment(cifar10) | autoaugment(cifar10)",
    "jitter(0.8,0.7,0.9,0) | flip",
    "crop(24) | rotate(180) | jitter(0.4,0,0.4,0)",
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WARPS = list(near_views.NearRandAugment.MATRICES)
OTHERS = [name for name in near_views.NearRandAugment.NAMES if name not in WARPS]

pytestmark = pytest.mark.usefixtures("random_states")


@pytest.fixture(scope="module")
def photos(shared_cifar10: Path) -> np.ndarray:
    import pyarrow.parquet as pq

    table = next(pq.ParquetFile(next(shared_cifar10.rglob("test*.parquet"))).iter_batches(200))
    column = next(name for name in table.schema.names if name in ("img", "image"))
    return np.stack([np.asarray(decode(value.as_py())) for value in table.column(column)])


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
    tables = autoaugment._tables(tuple(((name, 1.0, level),) * 2 for name, level in cases), size, torch.device(device))
    step = autoaugment.BatchedAutoAugment(transforms.AutoAugment(fill=99))  # type: ignore[arg-type]
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


def test_the_digits_policy_gives_pillows_pixels() -> None:
    images, seeds = np.concatenate([made_up(8, 8)] * 8), list(range(128))
    batched = BatchedPolicy(parse("digits"))
    assert batched.serves(parse("digits"), (8, 8))
    views = batched(tensor(images), batched.draw(seeds, 2, (8, 8)))
    assert np.array_equal(array(views), by_pillow("digits", images, seeds))


@pytest.mark.parametrize("degrees", [0.0, 1e-9, 30.0, 45.0, 90.0, 180.0, 270.0, -90.0, -180.0])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 9)], ids=str)
def test_rotation_by_exact_angles(degrees: float, size: tuple[int, int]) -> None:
    images, black, bilinear = made_up(*size), (0, 0, 0), Image.Resampling.BILINEAR
    expected = [np.asarray(Image.fromarray(one).rotate(degrees, bilinear, fillcolor=black)) for one in images]
    views = pixels.rotate(tensor(images), np.full(len(images), degrees))
    assert np.array_equal(array(views), np.stack(expected))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.6, 1.4), (-10.0, 10.0), (0.2, 1.8)])
def test_numbers_between_bounds_are_torchs(low: float, high: float) -> None:
    torch.manual_seed(3)
    expected = [float(torch.empty(1).uniform_(low, high)) for _ in range(1000)]
    drawn = Draws(first_words([3], 1000).T, np.zeros((1000, 0)))
    assert drawn.uniform(low, high).tolist() == expected


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
    table = pixels.autocontrast_table(tensor(levels)).numpy()
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
    equal = pixels.lookup(views, pixels.equalize_table(views))
    assert np.array_equal(array(equal), np.stack([np.asarray(ImageOps.equalize(image)) for image in pillow]))
    means = [int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5) for image in pillow]
    assert pixels.mean_gray(views).tolist() == means
    smooth = np.stack([np.asarray(image.filter(ImageFilter.SMOOTH)) for image in pillow])
    if min(size) >= 3:
        assert np.array_equal(array(pixels.smooth(views)), smooth)


# -------------------------------------------------------------------------------------------------------------- draws


def test_draws_are_torchs_own() -> None:
    seeds = np.random.default_rng(0).integers(0, 2**63, 50).tolist()
    draws = Draws(first_words(seeds, 7), np.zeros((50, 0)))
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
    words = next_words(count)
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
    for line in ("imagenet", "cifar | blur", "trivialaugment", "jitter(.4,.4,.4,.1)"):
        batched = BatchedPolicy(parse(line))
        assert len(batched.head) == len(parse(line).steps) and not batched.steps
        assert not batched.serves(parse(line), (32, 32))
    for line, side in [("cifar", 128), ("jitter(.4,.4,.4,0)", 64), ("flip | rotate(10)", 24)]:
        batched = BatchedPolicy(parse(line))
        assert batched.serves(parse(line), (side, side))
        assert not batched.serves(parse(line), (side, side + 1)), "Pillow is as fast there"
    assert not BatchedPolicy(parse("cifar")).serves(parse("cifar"), (20, 32)), "too small for the crop: Pillow says so"


def test_a_library_that_computes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = first_words
    monkeypatch.setattr(batched_transforms, "first_words", lambda seeds, count: original(seeds, count) ^ np.uint64(1))
    split, views = make_split(), ViewsConfig()
    loader = train_loader(split, views, 2, 8, speed=LoadingConfig(workers=0))
    with pytest.warns(RuntimeWarning, match="differs from Pillow's"):
        batches = list(loader)
    assert_equal(batches, list(train_loader(split, views, 2, 8, speed=PLAIN)))


# ------------------------------------------------------------------------------------------------------------ loaders


@pytest.mark.parametrize(
    "speed",
    [
        LoadingConfig(workers=0),
        LoadingConfig(workers=0, cache=0),
        LoadingConfig(workers=0, batched=False),
        LoadingConfig(workers=2),
    ],
    ids=["batched, cached", "batched", "cached", "workers"],
)
def test_batches_do_not_depend_on_speed(speed: LoadingConfig) -> None:
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
    loader = train_loader(split, ViewsConfig(), 2, 5, speed=LoadingConfig(workers=0))
    assert loader.dataset.cache is None
    assert_equal(list(loader), list(train_loader(split, ViewsConfig(), 2, 5, speed=PLAIN)))


def test_the_cache_is_bounded() -> None:
    split = make_split(((300, 300),) * 4)
    for megabytes, kept in ((0, False), (1, False), (2, True)):
        speed = LoadingConfig(workers=0, cache=megabytes)
        loader = train_loader(split, ViewsConfig("crop(8)"), 1, 2, speed=speed)
        assert (loader.dataset.cache is not None) == kept
    with raises("recipe.value", "cache", "-1"):
        LoadingConfig(cache=-1)


def test_another_policy_put_into_a_loader_is_followed() -> None:
    loader = train_loader(make_split(), ViewsConfig(), 1, 5, speed=LoadingConfig(workers=0))
    loader.dataset.policy = parse("upscale(9)")
    assert next(iter(loader))["image"].shape == (5, 1, 3, 9, 9)
    pickle.loads(pickle.dumps(ViewsDataset(make_split(), parse("imagenet"), 2, device=True)))  # for spawned workers


# ------------------------------------------------------------------------------------------------------ on the device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("line", ["cifar", "center_crop(30) | flip | cutout(7) | grayscale(0.4)", "resize(20) | flip"])
def test_equal_steps_on_the_device_give_the_same_batches(line: str, device: str) -> None:
    config, views = LoaderConfig(device_views=True), ViewsConfig(line)
    loader = train_loader(make_split(), views, 2, 5, 1, config=config, speed=LoadingConfig(workers=0))
    complete = complete_views(views, config)
    moved = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in loader]
    found = [{key: value.cpu() for key, value in complete(batch).items()} for batch in moved]
    assert_equal(found, list(train_loader(make_split(), views, 2, 5, 1, speed=PLAIN)))
    plain = next(iter(train_loader(make_split(), views, 2, 5, 1, speed=PLAIN)))
    assert complete_views(views, LoaderConfig())(plain) is plain


@pytest.mark.parametrize("workers", [0, 1])
def test_device_views_pass_through_accelerate(workers: int) -> None:
    config, views = LoaderConfig(device_views=True), ViewsConfig("random_resized_crop(24) | flip | jitter(.4,.4,.4,0)")
    speed = LoadingConfig(workers=workers, cache=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    loader_config = accelerate.DataLoaderConfiguration(split_batches=True)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=loader_config)
    loader = accelerator.prepare(train_loader(make_split(), views, 2, 5, 1, config=config, speed=speed))
    complete = complete_views(views, config)
    set_epoch(loader, 1)
    found = [complete(batch) for batch in loader]
    plain = train_loader(make_split(), views, 2, 5, 1, speed=PLAIN)
    set_epoch(plain, 1)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours["row"], theirs["row"]) and ours["image"].shape == theirs["image"].shape
        assert (ours["image"].int() - theirs["image"].int()).abs().max() <= 1
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("line", ["cifar", "crop(8,4) | flip | grayscale(0.4)", "none"])
def test_resident_images_give_the_same_batches(line: str, device: str) -> None:
    split, views, speed = make_split(((32, 32),) * 24), ViewsConfig(line), LoadingConfig(workers=0, resident=True)
    loader = train_loader(split, views, 2, 5, 1, speed=speed)
    completed = complete(loader, views, LoaderConfig(), torch.device(device))
    plain = train_loader(split, views, 2, 5, 1, speed=PLAIN)
    for epoch in (0, 3):
        set_epoch(loader, epoch)
        set_epoch(plain, epoch)
        moved = ({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in loader)
        found = [{key: value.cpu() for key, value in batch.items()} for batch in completed(moved)]
        assert_equal(found, list(plain))
    assert loader.dataset.cache is None, "given away"
    assert completed(iter(())) is not None and list(completed(iter(()))) == []


def test_batches_of_resident_images_do_not_depend_on_how_many_are_finished_at_once() -> None:
    split, speed = make_split(((32, 32),) * 24), LoadingConfig(workers=0, resident=True)
    told = []
    for at_once in (1, 2**15, 2**24):
        loader = train_loader(split, ViewsConfig("cifar"), 2, 5, 1, speed=speed)
        told.append(list(Resident(loader.dataset, torch.device("cpu"), at_once)(loader)))
    assert_equal(told[0], told[1])
    assert_equal(told[0], told[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_resident_images_pass_through_accelerate(workers: int) -> None:
    views, split = ViewsConfig("cifar"), make_split(((32, 32),) * 24)
    AcceleratorState._reset_state(reset_partial_state=True)
    loader_config = accelerate.DataLoaderConfiguration(split_batches=True)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=loader_config)
    plain = train_loader(split, views, 2, 5, 1, speed=LoadingConfig(workers=workers, resident=True))
    completed = complete(plain, views, LoaderConfig(), accelerator.device)
    loader = accelerator.prepare(plain)
    expected = train_loader(split, views, 2, 5, 1, speed=PLAIN)
    for each in (loader, expected):
        set_epoch(each, 1)
    whole = list(expected)
    assert_equal(list(completed(loader)), whole)
    set_epoch(loader, 1)
    assert_equal(list(completed(accelerate.skip_first_batches(loader, 2))), whole[2:])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_resident_images_may_be_finished_nearly_on_request() -> None:
    line, split = "jitter(.4,.4,.4,0) | flip", make_split(((32, 32),) * 24)
    speed, config, views = LoadingConfig(workers=0, resident=True), LoaderConfig(device_views=True), ViewsConfig(line)
    loader = train_loader(split, views, 2, 24, 1, config=config, speed=speed)
    found = next(iter(complete(loader, views, config, torch.device("cpu"))(loader)))
    plain = next(iter(train_loader(split, views, 2, 24, 1, speed=PLAIN)))
    assert (found["image"].int() - plain["image"].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("sizes", "line", "cache", "naming"),
    [
        (((32, 32), (32, 40)) * 12, "cifar", 256, ["speed.cache", "256 MB"]),
        (((32, 32),) * 24, "cifar", 0, ["speed.cache", "0 MB"]),
        (((32, 32),) * 24, "trivialaugment", 256, ["trivialaugment(", "loader.device_views=true"]),
        (((32, 32),) * 24, "cifar | blur", 256, ["blur(0.5", "loader.device_views=true"]),
        (((20, 20),) * 24, "crop(32,4)", 256, ["crop(32,4)", "loader.device_views=true"]),
    ],
)
def test_what_cannot_stay_on_a_device_is_refused(sizes, line: str, cache: int, naming: list[str]) -> None:
    with raises("recipe.conflict", "speed.resident", *naming):
        speed = LoadingConfig(workers=0, resident=True, cache=cache)
        train_loader(make_split(sizes), ViewsConfig(line), 2, 5, speed=speed)


def test_a_policy_that_begins_with_pillow_cannot_be_resident() -> None:
    speed, config = LoadingConfig(workers=0, resident=True), LoaderConfig(device_views=True)
    with raises("recipe.conflict", "speed.resident", "resize(20"):
        train_loader(make_split(((32, 32),) * 24), ViewsConfig("resize(20) | flip"), 2, 5, config=config, speed=speed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "method"), [(n, m) for n in WARPS for m in ("BILINEAR", "BICUBIC")] + [(n, "BILINEAR") for n in OTHERS]
)
def test_operations_of_randaugment_are_within_a_level(name: str, method: str, device: str) -> None:
    settings = {"img_mean": (10, 100, 200), "magnitude_std": 1.0, "interpolation": (Image.Resampling[method],)}
    reference = RandAugment([AugmentOp(name, prob=1.0, magnitude=8, hparams=settings)], num_layers=1)
    step, images, expected, notes = near_views.NearRandAugment(reference), made_up(20, 30), [], []
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
    found = complete_views(views, config)(next(iter(train_loader(split, views, 2, 24, 1, config=config, speed=PLAIN))))
    plain = next(iter(train_loader(split, views, 2, 24, 1, speed=PLAIN)))
    difference = (found["image"].int() - plain["image"].int()).abs()
    assert torch.equal(found["row"], plain["row"]) and found["image"].shape == (24, 2, 3, 40, 40)
    assert (difference > 0).float().mean() < 0.04 and (difference > 1).float().mean() < 0.004


def test_device_views_need_a_step_that_the_device_can_do() -> None:
    config = LoaderConfig(device_views=True)
    for line in ("cifar | blur", "resize(40)", "flip | jitter(.4,.4,.4,.1)"):
        with raises("recipe.conflict", "loader.device_views"):
            train_loader(make_split(), ViewsConfig(line), 2, 5, config=config, speed=PLAIN)
