"""`loader`: one core's way from encoded images to a batch of two views.

    python tools/benchmark.py loader --source ../shared/cifar10 -o tools/benchmarks/

plain                the same policy of torchvision and timm over PIL, ToTensor, Normalize, default_collate;
                     plain, eight bits: without ToTensor and Normalize, which we leave to the device
image by image       ours with Pillow's steps, one image after the other (speed.batched=false, speed.cache=0)
batched              ours over whole batches, Pillow's pixels; batched, cached: images decoded once, at the start
planes               ours, one image after the other in NumPy where that is faster, Pillow's pixels
for the device       decoding and the policy's first steps; the rest is done on the device (loader.device_views)
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from statistics import median_high
from typing import Any

import numpy as np
import torch
from datasets import Dataset as HuggingFaceDataset
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

from benchmarks.common import clocked, common_arguments, keep, machine
from rescom_timm.data.config import CIFAR_MEAN, CIFAR_STD, DataConfig, LoaderConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.decoding import decode
from rescom_timm.data.device_transforms import complete_views
from rescom_timm.data.loaders import train_loader
from rescom_timm.data.sources import load
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import parse

PLAIN: dict[str, Callable[[], list[Any]]] = {
    "cifar": lambda: [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=128),  # type: ignore[arg-type]
        parse("cutout(16)").augment,
    ],
    "imagenet": lambda: [
        transforms.RandomResizedCrop(224, scale=(0.08, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0),
        transforms.RandomGrayscale(0.2),
        rand_augment_transform("rand-n2-m10-mstd0.5", {"img_mean": (125, 123, 114)}),
    ],
}
"""Policies as one would put them together, over PIL images; their last steps make a tensor of the image."""


class PlainDataset(Dataset[tuple[Tensor, int]]):
    """What one would write first: decode, augment twice, stack; default_collate makes the batch."""

    def __init__(self, encoded: list[bytes], policy: str, floats: bool) -> None:
        last = [transforms.ToTensor(), transforms.Normalize(CIFAR_MEAN, CIFAR_STD)]
        self.encoded = encoded
        self.transform = transforms.Compose([*PLAIN[policy](), *(last if floats else [transforms.PILToTensor()])])

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image = Image.open(io.BytesIO(self.encoded[position])).convert("RGB")
        return torch.stack([self.transform(image) for _ in range(2)]), position


def photographs(count: int, width: int, height: int, kind: str) -> list[bytes]:
    """Smooth colours under some noise: about 80 kB as a JPEG of 500 x 375."""
    random, encoded = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
        pixels = (smooth + random.integers(-16, 17, smooth.shape)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, quality=90)
        encoded.append(stream.getvalue())
    return encoded


def read_images(source: str | None, policy: str, count: int) -> tuple[list[bytes], str]:
    """(encoded images, where they are from): the first of a data set, CIFAR's by --source, or made up."""
    if policy == "cifar" and source is not None:
        column = load(DataConfig(source)).train.dataset.select(range(count))["image"]
        return [value["bytes"] for value in column], source
    if policy == "cifar":
        return photographs(count, 32, 32, "PNG"), "made up, PNG of 32 x 32"
    return photographs(count, 500, 375, "JPEG"), "made up, JPEG of 500 x 375"


def measure_loader(
    policy: str, source: str | None, count: int, batch: int, repetitions: int, device: str
) -> dict[str, Any]:
    """One policy: images a second (medians), from bytes to a batch of two views, and ratios to the plain pipeline."""
    encoded, origin = read_images(source, policy, count)
    dataset = HuggingFaceDataset.from_dict({"image": [{"bytes": each, "path": None} for each in encoded]})
    split = Split(origin, dataset, np.zeros(count, np.int64), np.arange(count))
    views, start = ViewsConfig(train=policy), [0]

    def ours(config: LoaderConfig = LoaderConfig(), **speed: Any) -> Callable[[], Any]:
        loader = train_loader(split, views, 2, batch, config=config, speed=LoadingConfig(workers=0, **speed))
        samples = list(loader.sampler)
        return lambda: loader.dataset.__getitems__(  # type: ignore[attr-defined]
            [samples[i % count] for i in range(start[0], start[0] + batch)]
        )

    def plain(floats: bool) -> Callable[[], Any]:
        dataset = PlainDataset(encoded, policy, floats)
        return lambda: default_collate([dataset[i % count] for i in range(start[0], start[0] + batch)])

    contenders = {
        "plain": plain(True),
        "plain, eight bits": plain(False),
        "image by image": ours(batched=False, cache=0),
        "decoding alone": lambda: [decode(encoded[i % count]) for i in range(start[0], start[0] + batch)],
    }
    if policy == "cifar":
        contenders |= {"batched": ours(cache=0), "batched, cached": ours()}
    else:
        contenders["planes"] = ours(cache=0)
    on_device = LoaderConfig(device_views=True)
    contenders["for the device"] = begin = ours(on_device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repetitions + 1):
        start[0] = turn * batch
        for name, step in contenders.items():
            taken = clocked(step, "cpu")
            if turn:  # the first warms up
                seconds[name].append(taken / 1e3)
    rate = {name: batch / median_high(values) for name, values in seconds.items()}
    finish, begun = complete_views(views, on_device), begin()
    begun = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in begun.items()}
    turns = repetitions if device == "cuda" else 1  # on a CPU it only has to run
    finished = sorted(clocked(partial(finish, begun), device) for _ in range(turns + 1))[turns // 2]
    return {
        "policy": policy,
        "source": origin,
        "images": count,
        "batch": batch,
        "images_per_second": rate,
        "over_plain": {name: value / rate["plain"] for name, value in rate.items()},
        "milliseconds_of_a_batch_on_the_device": finished,
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policies", nargs="+", default=list(PLAIN), choices=list(PLAIN))
    parser.add_argument("--source", help="CIFAR's data set, as data.source of a recipe; made-up images otherwise")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    common_arguments(parser, repetitions=11, device="cpu, cuda: where views are finished with loader.device_views")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    about = {
        **machine(options.device),
        "versions": {name: version(name) for name in ("torchvision", "timm", "pillow", "numpy", "datasets")},
    }
    print(f"# {about['device']}, one thread of {about['cores']} cores, load {about['load']}, {about['date']}, "
          f"{about['versions']}; images a second, medians of {options.repetitions} batches")  # fmt: skip
    rows = []
    for policy in options.policies:
        row = measure_loader(policy, options.source, options.images, options.batch, options.repetitions, options.device)
        rows.append(row)
        print(f"{policy} ({row['source']}, {row['images']} images, batches of {row['batch']})")
        for name, rate in row["images_per_second"].items():
            print(f"    {name:<20} {rate:>9.0f} {row['over_plain'][name]:>7.2f} x", flush=True)
        print(f"    (the rest of a batch on the device: {row['milliseconds_of_a_batch_on_the_device']:.1f} ms)")
    keep(options, "loader", {**about, "rows": rows})
    return 0
