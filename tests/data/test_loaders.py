"""The same batches for any workers and processes, exact resume, samplers, broken images, nothing left behind."""

import dataclasses
import gc
import io
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import textwrap
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
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from rescom_timm.data import sampling
from rescom_timm.data.config import LoaderConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.decoding import BrokenImage
from rescom_timm.data.device_transforms import complete
from rescom_timm.data.loaders import eval_loader, set_epoch, train_loader
from rescom_timm.data.sampling import InOrder, Order, class_probabilities
from rescom_timm.data.transforms import parse, seed_all
from tests.raises import raises

VIEWS = ViewsConfig(train="crop(8,2) | flip | randaugment(n2,m10,mstd0.5) | cutout(4)", eval="center_crop(8)")
COUNTS = (20, 9, 4, 3)
HERE = LoadingConfig(workers=0)
PINNED = {
    "uniform": [
        (3, 7481764827887823697),
        (5, 5238026173210942400),
        (2, 1863299695503478076),
        (1, 3021479453666819396),
        (0, 6052553110335791546),
        (4, 3650494251030705096),
    ],
    "class_balanced": [5, 4, 1, 3, 2, 5],
}


def make_split(counts: tuple[int, ...] = COUNTS, broken: tuple[int, ...] = (), size: int = 10) -> Any:
    """A stand-in for Split: noise images, labels mixed, rows that differ from positions."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    images = []
    for position in range(len(labels)):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(stream, "PNG")
        content = stream.getvalue()
        images.append({"bytes": content[:60] if position in broken else content, "path": f"folder/{position}.png"})
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column(
        "image", datasets.Image(decode=False)
    )
    return SimpleNamespace(name="noise train", dataset=dataset, labels=labels, rows=np.arange(len(labels)) * 3 + 100)


@pytest.fixture(scope="module")
def split() -> Any:
    return make_split()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def epoch_of(loader: Any, epoch: int) -> list[dict[str, torch.Tensor]]:
    set_epoch(loader, epoch)
    return list(loader)


def assert_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "row"}
        assert all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------------------- order


def test_uniform_order_is_a_permutation_decided_by_seed_and_epoch() -> None:
    def items(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = Order(np.zeros(500, np.int64), "uniform", seed)
        order.set_epoch(epoch)
        return list(order)

    assert sorted(position for position, _ in items(0, 0)) == list(range(500))
    assert len({seed for _, seed in items(0, 0)}) == 500
    assert items(3, 7) == items(3, 7)
    assert items(3, 7) != items(7, 3)
    orders = [items(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert len({seed for order in orders for _, seed in order}) == 2000, "no draw is repeated in another epoch or run"


def test_order_never_changes_between_versions() -> None:
    """Written down once: a run resumed with newer libraries must go on as it began."""
    order = Order(np.array([0, 0, 0, 1, 1, 2]), "uniform", seed=5)
    order.set_epoch(2)
    assert list(order) == PINNED["uniform"]
    assert Order(order.labels, "class_balanced", seed=5).positions().tolist() == PINNED["class_balanced"]


@pytest.mark.parametrize("at_once", [1, 7, 40, 1000])
def test_an_epoch_is_the_same_however_many_items_are_made_at_a_time(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(np.arange(40) % 3, "class_balanced", seed=2)
    bits = [sampling._random_bits(40, 2, 0, stream) for stream in (0, 1)]
    monkeypatch.setattr(sampling, "CHUNK", at_once)
    items = list(order)
    assert [position for position, _ in items] == order.positions().tolist()
    assert [seed for _, seed in items] == [int(bit) >> 1 for bit in bits[1]]
    assert all(type(number) is int for item in items for number in item)


def test_evaluation_goes_through_all_positions_without_a_list_of_them() -> None:
    order = InOrder(10**9)
    assert len(order) == 10**9 and next(iter(order)) == (0, 0)
    assert list(InOrder(3)) == [(0, 0), (1, 1), (2, 2)] == list(InOrder(3)), "and can be walked again"


def test_class_probabilities_by_hand() -> None:
    counts = np.array([100, 0, 16, 4])
    assert np.allclose(class_probabilities(counts, "uniform"), [100 / 120, 0, 16 / 120, 4 / 120])
    assert np.allclose(class_probabilities(counts, "square_root"), [10 / 16, 0, 4 / 16, 2 / 16])
    assert np.allclose(class_probabilities(counts, "class_balanced"), [1 / 3, 0, 1 / 3, 1 / 3])
    first, middle, last = (class_probabilities(counts, "progressive", t, 11) for t in (0, 5, 10))
    assert np.allclose(first, [100 / 120, 0, 16 / 120, 4 / 120])
    assert np.allclose(middle, (first + last) / 2)
    assert np.allclose(last, [1 / 3, 0, 1 / 3, 1 / 3])
    assert np.allclose(class_probabilities(counts, "progressive", 0, 1), first)
    inverse = np.array([1 / 100, 0, 1 / 16, 1 / 4])
    assert np.allclose(class_probabilities(counts, "reversed"), inverse / inverse.sum())


@pytest.mark.parametrize("sampler", ["class_balanced", "square_root", "progressive", "reversed"])
def test_samplers_draw_classes_as_they_should_and_images_evenly(sampler: Any) -> None:
    counts = np.array([800, 0, 160, 40])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    order = Order(labels, sampler, seed=1, epochs=21)
    drawn = []
    for epoch in range(21):
        order.set_epoch(epoch)
        drawn.append(order.positions())
        assert len(drawn[-1]) == len(order) == 1000
    expected = np.stack([class_probabilities(counts, sampler, epoch, 21) for epoch in range(21)])
    seen = np.stack([np.bincount(labels[p], minlength=4) / 1000 for p in drawn])
    assert np.abs(seen - expected).max() < 0.07 and np.abs(seen.mean(0) - expected.mean(0)).max() < 0.015
    tail = np.bincount(np.concatenate(drawn), minlength=1000)[labels == 3]
    assert tail.min() > 0.6 * tail.mean() and tail.max() < 1.4 * tail.mean()


# ----------------------------------------------------------------------------------------------------------- batches


def test_training_batches_keep_the_contract(split: Any) -> None:
    loader = train_loader(split, VIEWS, 3, 8, seed=1, speed=HERE)
    batches = epoch_of(loader, 0)
    assert len(batches) == len(loader) == 36 // 8
    for batch in batches:
        assert batch["image"].shape == (8, 3, 3, 8, 8) and batch["image"].dtype == torch.uint8
        assert batch["label"].dtype == batch["row"].dtype == torch.int64
        positions = (batch["row"] - 100) // 3
        assert batch["label"].tolist() == split.labels[positions].tolist()
        assert not torch.equal(batch["image"][:, 0], batch["image"][:, 1])
    rows = torch.cat([batch["row"] for batch in batches])
    assert len(rows.unique()) == 32


def test_pixels_belong_to_their_rows(split: Any) -> None:
    batch = epoch_of(train_loader(split, ViewsConfig(train="none"), 1, 36, speed=HERE), 0)[0]
    for image, row in zip(batch["image"][:, 0], batch["row"].tolist(), strict=True):
        stored = np.asarray(Image.open(io.BytesIO(split.dataset[(row - 100) // 3]["image"]["bytes"])))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), stored)


def test_views_depend_on_seed_epoch_and_place_only(split: Any) -> None:
    plain = train_loader(split, VIEWS, 2, 8, seed=1, speed=HERE)
    first, second = epoch_of(plain, 0), epoch_of(plain, 1)
    small = epoch_of(train_loader(split, VIEWS, 2, 4, seed=1, speed=HERE), 0)
    assert torch.equal(torch.cat([b["image"] for b in first]), torch.cat([b["image"] for b in small])[:32])
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert_equal(epoch_of(plain, 0), first)
    assert not torch.equal(first[0]["image"], second[0]["image"])
    other = epoch_of(train_loader(split, VIEWS, 2, 8, seed=2, speed=HERE), 0)
    assert not torch.equal(first[0]["row"], other[0]["row"])
    workers = train_loader(split, VIEWS, 2, 8, seed=1, speed=LoadingConfig(workers=2, prefetch=1))
    assert_equal(epoch_of(workers, 1), second)  # persistent workers hear of the epoch too
    assert_equal(epoch_of(workers, 0), first)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_states_stay_untouched(split: Any, workers: int) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    epoch_of(train_loader(split, VIEWS, 2, 8, speed=LoadingConfig(workers=workers)), 0)
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert before[0] == after[0] and torch.equal(before[2], after[2])
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))


def test_workers_see_how_far_the_run_is(split: Any) -> None:
    """The crop that rises with the epochs: as without workers, in each epoch anew, and all of the image in the last."""
    views = ViewsConfig(train="rising_crop(10,0.08,nearest)")
    with raises("recipe.value", "rising_crop(10", "epochs"):
        train_loader(split, views, 1, 8)
    loaders = [train_loader(split, views, 1, 8, epochs=3, speed=LoadingConfig(workers=n, cache=0)) for n in (0, 2)]
    changed = []
    for epoch in (0, 1, 2, 1):
        ours, theirs = (epoch_of(loader, epoch) for loader in loaders)
        assert_equal(ours, theirs)
        changed.append(torch.cat([batch["image"].flatten() for batch in ours]))
    assert torch.equal(changed[1], changed[3]) and not torch.equal(changed[0], changed[1])
    whole = torch.cat([batch["image"] for batch in eval_loader(split, ViewsConfig(), 8)])  # in the order of the rows
    place = {int(row): i for i, row in enumerate(split.rows)}
    for batch in epoch_of(loaders[1], 2):
        assert torch.equal(batch["image"][:, 0], whole[[place[int(row)] for row in batch["row"]]])


def test_evaluation_gives_every_image_once_in_order(split: Any) -> None:
    for workers in (0, 2):
        batches = list(eval_loader(split, VIEWS, 16, speed=LoadingConfig(workers=workers)))
        assert [len(b["row"]) for b in batches] == [16, 16, 4]
        assert batches[0]["image"].shape == (16, 3, 8, 8) and batches[0]["image"].dtype == torch.uint8
        assert torch.cat([b["row"] for b in batches]).tolist() == split.rows.tolist()
        assert torch.cat([b["label"] for b in batches]).tolist() == split.labels.tolist()


def test_one_sample_can_be_looked_at(split: Any) -> None:
    loader = train_loader(split, VIEWS, 2, 8, seed=1, speed=HERE)
    sample = loader.dataset[next(iter(loader.sampler))]
    assert torch.equal(sample["image"], epoch_of(loader, 0)[0]["image"][0])
    assert sample["label"].shape == sample["row"].shape == ()


def test_images_already_in_memory_need_no_encoding() -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Array2D((8, 8), "uint8"), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": arrays, "label": np.arange(6)}, features=features)
    split: Any = SimpleNamespace(name="arrays", dataset=dataset, labels=np.arange(6), rows=np.arange(6))
    batch = next(iter(eval_loader(split, ViewsConfig(), 6, speed=HERE)))
    assert all(np.array_equal(batch["image"][:, channel].numpy(), arrays) for channel in range(3))


@pytest.mark.parametrize("contrast", ["random_resized_crop(8) | grayscale(0.5)", "crop(8,2) | flip"])
@pytest.mark.parametrize("batched", [True, False])
def test_other_views_have_a_policy_of_their_own_and_leave_the_first_as_it_is(
    split: Any, contrast: str, batched: bool
) -> None:
    speed = dataclasses.replace(HERE, batched=batched)
    plain = next(iter(train_loader(split, VIEWS, 3, 6, speed=speed)))
    ours = next(iter(train_loader(split, dataclasses.replace(VIEWS, contrast=contrast), 3, 6, speed=speed)))
    assert ours["image"].shape == (6, 3, 3, 8, 8) and torch.equal(ours["row"], plain["row"])
    assert torch.equal(ours["image"][:, 0], plain["image"][:, 0])
    policy = parse(contrast)
    for (position, seed), image in zip(Order(split.labels, "uniform"), ours["image"], strict=False):
        source = Image.open(io.BytesIO(split.dataset[position]["image"]["bytes"]))
        seed_all(seed ^ 1)
        assert torch.equal(image[1], policy(source)) and torch.equal(image[2], policy(source))
    alone = next(iter(train_loader(split, dataclasses.replace(VIEWS, contrast=contrast), 1, 6, speed=speed)))
    assert torch.equal(alone["image"], plain["image"][:, :1])


def test_impossible_requests_are_refused(split: Any) -> None:
    with raises("recipe.value", "37", "36 images", "noise train"):
        train_loader(split, VIEWS, 2, 37)
    with raises("recipe.value", "batch of 0"):
        train_loader(split, VIEWS, 2, 0)
    with raises("recipe.value", "batch size", "0"):
        eval_loader(split, VIEWS, 0)
    with raises("recipe.value", "view", "0"):
        train_loader(split, VIEWS, 0, 8)
    with raises("recipe.value", "progressive", "epochs"):
        train_loader(split, VIEWS, 2, 8, config=LoaderConfig(sampler="progressive"))
    with raises("recipe.value", "seed", "-1"):
        train_loader(split, VIEWS, 2, 8, seed=-1)
    for config, wrong, *naming in [
        (LoaderConfig, {"sampler": "balanced"}, "sampler", "uniform, class_balanced, square_root, progressive"),
        (LoaderConfig, {"broken": "ignore"}, "broken", "stop", "skip"),
        (LoadingConfig, {"workers": -1}, "workers", "-1"),
        (LoadingConfig, {"prefetch": 10**9}, "prefetch", "1,000"),
        (LoadingConfig, {"prefetch": 0}, "prefetch", "1,000"),
    ]:
        with raises("recipe.value", *naming):
            config(**wrong)  # type: ignore[arg-type]


def test_evaluation_images_that_stay_decoded_are_the_same(split: Any) -> None:
    loader = eval_loader(split, VIEWS, 16, speed=HERE, cache=1)
    assert loader.dataset.cache is not None
    for _ in range(2):
        assert_equal(list(loader), list(eval_loader(split, VIEWS, 16, speed=HERE)))
    assert eval_loader(split, VIEWS, 16, speed=HERE).dataset.cache is None


def test_images_of_several_sizes_are_named(split: Any) -> None:
    small = make_split((2,), size=6)
    mixed: Any = SimpleNamespace(
        name="mixed",
        dataset=datasets.concatenate_datasets([split.dataset, small.dataset]),
        labels=np.concatenate([split.labels, small.labels]),
        rows=np.arange(38),
    )
    with raises("image.size", "6 x 6", "10 x 10", "center_crop"):
        list(eval_loader(mixed, ViewsConfig(), 38, speed=HERE))
    assert len(list(eval_loader(mixed, ViewsConfig(eval="upscale(8)"), 38, speed=HERE))) == 1


# ---------------------------------------------------------------------------------------------------- broken images


def rare(split: Any, count: int) -> tuple[int, ...]:
    return tuple(np.flatnonzero(split.labels == 3)[:count].tolist())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_run_with_its_path(split: Any, workers: int) -> None:
    (position,) = rare(split, 1)
    loader = train_loader(make_split(broken=(position,)), VIEWS, 1, 36, speed=LoadingConfig(workers=workers))
    row = f"row {position * 3 + 100} (folder/{position}.png)"
    with raises("image.unreadable", row, "loader.broken=skip", kind=BrokenImage):
        epoch_of(loader, 0)


def test_a_broken_image_gives_its_place_to_one_of_its_class(split: Any) -> None:
    positions = rare(split, 2)
    damaged, skip = make_split(broken=positions), LoaderConfig(broken="skip")
    loader = train_loader(damaged, VIEWS, 2, 36, config=skip, speed=HERE)
    with pytest.warns(RuntimeWarning) as caught:
        batches = [epoch_of(loader, epoch)[0] for epoch in range(3)]
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and all(f"folder/{p}.png" in " ".join(messages) for p in positions), "once a path"
    assert loader.dataset.replaced.sum() == 6 and loader.dataset.replaced[list(positions)].tolist() == [3, 3]
    for batch in batches:
        assert batch["label"].bincount().tolist() == list(COUNTS)
        used = set(((batch["row"] - 100) // 3).tolist())
        assert len(used) == 34 and not used & set(positions), "row says which image was really used"
    whole = [epoch_of(train_loader(split, VIEWS, 2, 36, speed=HERE), epoch)[0] for epoch in range(3)]
    same = batches[0]["row"] == whole[0]["row"]
    assert same.sum() == 34 and torch.equal(batches[0]["image"][same], whole[0]["image"][same])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # inherited by the workers
        parallel = train_loader(damaged, VIEWS, 2, 36, config=skip, speed=LoadingConfig(workers=2))
        assert_equal([epoch_of(parallel, epoch)[0] for epoch in range(3)], batches)
    assert parallel.dataset.replaced.sum() == 6, "workers count into shared memory"


def test_a_class_without_a_readable_image_stops_even_when_skipping(split: Any) -> None:
    damaged = make_split(broken=rare(split, 3))
    loader = train_loader(damaged, VIEWS, 1, 36, config=LoaderConfig(broken="skip"), speed=HERE)
    with pytest.warns(RuntimeWarning), raises("image.unreadable", "class 3", "folder/", kind=BrokenImage):
        epoch_of(loader, 0)


def test_evaluation_never_skips(split: Any) -> None:
    damaged = make_split(broken=rare(split, 1))
    with raises("image.unreadable", "folder/", kind=BrokenImage) as caught:
        list(eval_loader(damaged, VIEWS, 36, LoaderConfig(broken="skip"), HERE))
    assert "loader.broken" not in str(caught.value)


def turned(broken: int = 0) -> Any:
    """One image of 16 rows and 32 columns that EXIF turns upright, and some of its class that cannot be read."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16)).save(stream, "JPEG", exif=exif)
    images = [{"bytes": content, "path": None} for content in [stream.getvalue()] + [b"no image"] * broken]
    dataset = datasets.Dataset.from_dict({"image": images})
    rows = np.arange(len(images))
    return SimpleNamespace(name="turned", dataset=dataset, labels=np.zeros_like(rows), rows=rows)


def test_exif_is_followed_on_request_only() -> None:
    for turn, shape in ((False, (1, 3, 16, 32)), (True, (1, 3, 32, 16))):
        batch = next(iter(eval_loader(turned(), ViewsConfig(), 1, LoaderConfig(exif=turn), HERE)))
        assert batch["image"].shape == shape


@pytest.mark.parametrize("cache", [0, 1])
def test_exif_is_followed_in_the_cache_and_for_what_replaces_a_broken_image(cache: int) -> None:
    config, speed = LoaderConfig(exif=True, broken="skip"), LoadingConfig(workers=0, cache=cache)
    loader = train_loader(turned(broken=1), ViewsConfig(train="none"), 1, 2, config=config, speed=speed)
    assert (loader.dataset.cache is not None) == bool(cache)
    with pytest.warns(RuntimeWarning, match="another image of its class takes its place"):
        assert next(iter(loader))["image"].shape == (2, 1, 3, 32, 16)


# ------------------------------------------------------------------------------------------- accelerate and processes


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("fresh_accelerate")
def test_resume_in_mid_epoch_is_exact(split: Any, workers: int) -> None:
    def prepared() -> Any:
        config = accelerate.DataLoaderConfiguration(split_batches=True)
        accelerator = accelerate.Accelerator(cpu=True, dataloader_config=config)
        speed = LoadingConfig(workers=workers)
        return accelerator.prepare(train_loader(split, VIEWS, 2, 8, 1, 4, LoaderConfig("progressive"), speed))

    plain = train_loader(split, VIEWS, 2, 8, 1, 4, LoaderConfig("progressive"), HERE)
    whole = [epoch_of(plain, epoch) for epoch in range(4)]
    loader = prepared()
    for epoch in range(4):
        assert_equal(epoch_of(loader, epoch), whole[epoch])
    loader = prepared()
    set_epoch(loader, 2)
    assert_equal(list(skip_first_batches(loader, 3)), whole[2][3:])
    assert_equal(epoch_of(loader, 3), whole[3])


@pytest.mark.usefixtures("fresh_accelerate")
def test_each_process_gets_its_slice_of_the_same_global_batch(split: Any) -> None:
    """Accelerate's wrappers as they are in two processes: the epoch must reach our order through both."""
    plain = train_loader(split, VIEWS, 2, 8, seed=1, speed=HERE)
    loaders = [train_loader(split, VIEWS, 2, 8, seed=1, speed=HERE) for _ in range(2)]
    ranks = [
        prepare_data_loader(loader, num_processes=2, process_index=rank, split_batches=True)
        for rank, loader in enumerate(loaders)
    ]
    for epoch in (0, 3):
        whole = epoch_of(plain, epoch)
        parts = [epoch_of(rank, epoch) for rank in ranks]
        joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
        assert_equal(joined, whole)
        # a finished epoch moved accelerate's own count on, so the epoch is set again before a resume
        for rank in ranks:
            set_epoch(rank, epoch)
        resumed = [list(skip_first_batches(rank, 2)) for rank in ranks]
        assert_equal(resumed[0], parts[0][2:])
        assert_equal(resumed[1], parts[1][2:])


# --------------------------------------------------------------------------------------------------------- two draws


def in_pairs(split: Any, config: LoaderConfig = LoaderConfig(), **speed: Any) -> Any:
    speed = {"workers": 0} | speed
    return train_loader(split, VIEWS, 2, 8, 1, config=config, speed=LoadingConfig(**speed), second="reversed")


def test_the_second_draw_lies_below_the_first_and_leaves_it_as_it_is(split: Any) -> None:
    plain, paired = train_loader(split, VIEWS, 2, 8, seed=1, speed=HERE), in_pairs(split)
    assert len(paired) == len(plain) == 4
    for epoch in (0, 3):
        batches = epoch_of(paired, epoch)
        assert_equal([{key: value[:8] for key, value in batch.items()} for batch in batches], epoch_of(plain, epoch))
        for batch, pairs in zip(batches, np.split(np.array(list(paired.sampler))[:32], 4), strict=True):
            alone = [paired.dataset[position, seed] for position, seed in pairs[:, 1].tolist()]
            assert all(torch.equal(batch[key][8:], torch.stack([one[key] for one in alone])) for key in batch)
            assert batch["row"][8:].tolist() == [100 + 3 * position for position in pairs[:, 1, 0]]
    assert_equal(list(in_pairs(split, workers=2)), list(in_pairs(split)))


def test_the_second_draw_is_its_samplers_and_independent_of_the_first() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (800, 0, 160, 40)))
    order = Order(labels, "class_balanced", 1, second="class_balanced")
    (first, seeds), (second, others) = (np.array(drawn).T for drawn in zip(*order, strict=True))
    assert first.tolist() == order.positions().tolist() and len(set(seeds) | set(others)) == 2000
    assert np.mean(first == second) < 0.05
    reversed_ = Order(labels, "uniform", 1, second="reversed")
    drawn = np.bincount(labels[[position for _, (position, _) in reversed_]], minlength=4) / 1000
    assert np.abs(drawn - class_probabilities(np.bincount(labels), "reversed")).max() < 0.05
    with raises("recipe.value", "progressive"):
        Order(labels, "uniform", second="progressive")


@pytest.mark.usefixtures("fresh_accelerate")
def test_each_process_gets_both_halves_of_its_pairs_and_resumes_exactly(split: Any) -> None:
    whole = epoch_of(in_pairs(split), 2)
    ranks = [prepare_data_loader(in_pairs(split), None, 2, rank, split_batches=True) for rank in range(2)]
    parts = [epoch_of(rank, 2) for rank in ranks]
    for batch, *own in zip(whole, *parts, strict=True):
        for half in range(2):
            for key in batch:
                joined = torch.cat([part[key].chunk(2)[half] for part in own])
                assert torch.equal(joined, batch[key].chunk(2)[half])
    for rank, part in zip(ranks, parts, strict=True):
        set_epoch(rank, 2)
        assert_equal(list(skip_first_batches(rank, 3)), part[3:])


@pytest.mark.parametrize("way", ["device_views", "resident"])
def test_pairs_are_augmented_on_the_device_too(split: Any, way: str) -> None:
    views = ViewsConfig(train="crop(8,2) | flip | cutout(4)")
    config, speed = (
        LoaderConfig(device_views=way == "device_views"),
        LoadingConfig(workers=0, resident=way == "resident"),
    )
    loader = train_loader(split, views, 2, 8, 1, config=config, speed=speed, second="reversed")
    plain = train_loader(split, views, 2, 8, 1, speed=HERE, second="reversed")
    assert_equal(list(complete(loader, views, config, torch.device("cpu"))(loader)), list(plain))


SCRIPT = """
    import sys
    sys.path[:0] = [{root!r}]
    from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
    from safetensors.torch import save_file
    from rescom_timm.data.config import LoaderConfig, LoadingConfig
    from rescom_timm.data.loaders import eval_loader, set_epoch, train_loader
    from tests.data.test_loaders import VIEWS, make_split

    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    assert accelerator.num_processes == 2
    split, speed = make_split(), LoadingConfig(workers=1)
    loader = train_loader(split, VIEWS, 2, 8, 1, config=LoaderConfig("class_balanced"), speed=speed)
    loader = accelerator.prepare(loader)
    kept = {{}}
    for epoch in (0, 1):
        set_epoch(loader, epoch)
        for step, batch in enumerate(loader):
            kept |= {{f"{{epoch}}/{{step}}/{{key}}": value for key, value in batch.items()}}
    set_epoch(loader, 1)
    for step, batch in enumerate(skip_first_batches(loader, 3), 3):
        kept |= {{f"resumed/{{step}}/{{key}}": value for key, value in batch.items()}}
    test = accelerator.prepare(eval_loader(split, VIEWS, 16, speed=speed))
    for step, batch in enumerate(test):
        kept |= {{f"test/{{step}}/{{key}}": accelerator.gather_for_metrics(value) for key, value in batch.items()}}
    save_file(kept, f"{out}/{{accelerator.process_index}}.safetensors")
    accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_together_see_the_single_process_batches(split: Any, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(SCRIPT).format(root=str(root), out=str(tmp_path)))
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    plain = train_loader(split, VIEWS, 2, 8, 1, config=LoaderConfig("class_balanced"), speed=HERE)
    expected = {
        f"{epoch}/{step}/{key}": value
        for epoch in (0, 1)
        for step, batch in enumerate(epoch_of(plain, epoch))
        for key, value in batch.items()
    }
    trained = {key: torch.cat([rank[key] for rank in ranks]) for key in ranks[0] if key[0] in "01"}
    assert trained.keys() == expected.keys() and len(expected) == 2 * 4 * 3
    assert all(torch.equal(trained[key], expected[key]) for key in expected)
    for key in ("image", "label", "row"):
        assert all(torch.equal(rank[f"resumed/3/{key}"], rank[f"1/3/{key}"]) for rank in ranks)
        whole = torch.cat([batch[key] for batch in eval_loader(split, VIEWS, 16, speed=HERE)])
        assert all(torch.equal(torch.cat([rank[f"test/{s}/{key}"] for s in range(3)]), whole) for rank in ranks)


@pytest.mark.usefixtures("fresh_accelerate")
def test_training_never_loses_the_rows_that_evaluation_pads(split: Any) -> None:
    """gather_for_metrics cuts the last batch to the remainder: right in evaluation, wrong where it was dropped."""
    training = prepare_data_loader(train_loader(split, VIEWS, 1, 8, speed=HERE), split_batches=True)
    evaluation = prepare_data_loader(eval_loader(split, VIEWS, 8, speed=HERE), split_batches=True)
    for loader, remainder in ((training, -1), (evaluation, 36 % 8)):
        for _ in loader:
            assert GradientState().remainder == remainder


# ------------------------------------------------------------------------------------------------------------ tidiness


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
@pytest.mark.usefixtures("fresh_accelerate")
def test_no_workers_or_open_files_are_left(split: Any) -> None:
    def use() -> None:
        config = LoaderConfig(broken="skip")
        loader = prepare_data_loader(train_loader(split, VIEWS, 2, 8, config=config, speed=LoadingConfig(workers=2)))
        for epoch in range(2):
            epoch_of(loader, epoch)
        resumed = iter(skip_first_batches(loader, 1))
        next(resumed)  # left in the middle
        list(eval_loader(split, VIEWS, 8, speed=LoadingConfig(workers=2)))
        assert len(multiprocessing.active_children()) == 4

    counts = []
    for _ in range(3):  # the first two may open what stays: the server that starts workers, libraries' own files
        use()
        gc.collect()
        assert multiprocessing.active_children() == []
        counts.append(open_files())
    assert counts[2] <= counts[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_keeps_its_code(workers):
    loader = eval_loader(
        make_split(size=10), ViewsConfig(eval="corner_crop(16,0)"), 2, speed=LoadingConfig(workers=workers)
    )
    with raises("image.size", "10 x 10") as caught:
        next(iter(loader))
    again = pickle.loads(pickle.dumps(caught.value))  # as other processes get it
    assert (again.code, str(again)) == ("image.size", str(caught.value)) and "\n" not in str(again)
