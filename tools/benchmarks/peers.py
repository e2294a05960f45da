"""`peers`: whole pieces of work against what one would write with other libraries, interleaved in one run.

    python tools/benchmark.py peers -o tools/benchmarks/         # the full measurement, on an idle machine
    python tools/benchmark.py peers --short                      # a few images and rows, one turn
    python tools/benchmark.py peers --only csv doctor --repetitions 5

step       resnet10t at 224 pixels, a batch of 16 as its loader gives it: normalising, forward, backward, optimizer;
           our net in channels_last, torchvision's and timm's batches into timm's net
epoch      JPEGs of 500 x 375 to such steps, one view, in this process: our loader, torchvision v2 with a DataLoader,
           and timm's create_loader (its own augmentation: crop, flip)
workers    the loaders of `epoch` with two workers each, and normalising; seconds of a clock
predict    JPEGs: rescom_timm.predict, a plain loop over timm's model, and transformers' pipeline where it is
doctor     JPEGs: examine, against imagehash and md5 in a loop (it alone looks at sizes, levels, gray and equal pixels)
csv        437,513 rows of 8,142 classes over image files: sources.load, against pandas, factorize and os.path.exists
classes    8,142 classes, 24,426 test images: our evaluation and report, in a process of its own, as in `scale`

Without another word, milliseconds of CPU time. A ratio is the opponent's time over ours, turn by turn: median, smallest
and largest. Above 1 we are faster.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader, create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.common import clocked, common_arguments, heading, keep, machine, positive
from benchmarks.loader import photographs
from benchmarks.scale import image_names, link_images, measure
from rescom_timm.data.config import DataConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.doctor import examine
from rescom_timm.data.loaders import train_loader
from rescom_timm.data.sources import load
from rescom_timm.data.splits import Split
from rescom_timm.engine.allocator import keep_freed_memory
from rescom_timm.inference.export import export
from rescom_timm.inference.predict import predict
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.models.net import create_model

Contenders = dict[str, Callable[[], object]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONE, CLASSES, BATCH = "resnet10t", 10, 16
INAT = 8142
"""Classes of iNaturalist 2018."""


class Files(Dataset[Any]):
    """Image files with labels, as one would write it; timm sets `transform`."""

    def __init__(self, files: list[Path], transform: Any = None) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(Image.open(self.files[i]).convert("RGB")), i % CLASSES


def split_of(files: list[Path]) -> Split:
    from datasets import Dataset as HuggingFaceDataset

    rows = [{"bytes": None, "path": str(file)} for file in files]
    return Split("made up", HuggingFaceDataset.from_dict({"image": rows}), np.arange(len(files)) % CLASSES,
                 np.arange(len(files)))  # fmt: skip


def loaders(files: list[Path], workers: int) -> dict[str, Any]:
    """Training loaders at 224 pixels with crop and flip."""
    views = ViewsConfig(train="random_resized_crop(224) | flip", mean=MEAN, std=STD)
    plain = [v2.PILToTensor(), v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*plain, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))])
    return {
        "ours": train_loader(split_of(files), views, 1, BATCH, speed=LoadingConfig(workers=workers, cache=0)),
        "torchvision v2": DataLoader(
            Files(files, transform), BATCH, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0,
        ),
        "timm create_loader": create_loader(
            Files(files), (3, 224, 224), BATCH, is_training=True, mean=MEAN, std=STD, num_workers=workers,
            use_prefetcher=False, color_jitter=0.0, persistent_workers=workers > 0, device=torch.device("cpu"),
        ),
    }  # fmt: skip


def ours_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["image"].flatten(0, 1), batch["label"]


def our_net() -> Any:
    net = create_model(BACKBONE, CLASSES, projector=None, mean=MEAN, std=STD)
    return net.to(memory_format=torch.channels_last)


def trainers(loader: dict[str, Any]) -> dict[str, Callable[[Any], None]]:
    """Of each loader, what trains a net on batches of it."""

    def trainer(net: Any, forward: Callable[[Any], Any], parts: Callable[[Any], tuple[Any, Any]]) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

        def train(batches: Any) -> None:
            for images, labels in map(parts, batches):
                F.cross_entropy(forward(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

        return train

    net = our_net()
    others = {name: timm.create_model(BACKBONE, num_classes=CLASSES) for name in loader if name != "ours"}
    return {"ours": trainer(net, net.classify, ours_of)} | {
        name: trainer(other, other, tuple) for name, other in others.items()
    }


def step(files: list[Path], folder: Path, rows: int) -> Contenders:
    """One step of training on a batch."""
    loader = loaders(files, 0)
    batches = {name: [next(iter(one))] for name, one in loader.items()}
    return {name: partial(train, batches[name]) for name, train in trainers(loader).items()}


def epoch(files: list[Path], folder: Path, rows: int) -> Contenders:
    """One epoch of training from files."""
    loader = loaders(files, 0)
    return {name: partial(train, loader[name]) for name, train in trainers(loader).items()}


def workers(files: list[Path], folder: Path, rows: int) -> Contenders:
    """One epoch of normalised batches from two workers."""
    loader, net = loaders(files, 2), our_net()
    return {
        "ours": lambda: [net.normalize(ours_of(batch)[0]) for batch in loader["ours"]],
        "torchvision v2": lambda: list(loader["torchvision v2"]),
        "timm create_loader": lambda: list(loader["timm create_loader"]),
    }


def prediction(files: list[Path], folder: Path, rows: int) -> Contenders:
    """Labels of all files by a net of 224 pixels."""
    net, names = create_model(BACKBONE, CLASSES, projector=None, mean=MEAN, std=STD), [str(k) for k in range(CLASSES)]
    model = from_pretrained(
        export(net, folder / "model", names, (3, 224, 224), eval_policy="resize(256,bicubic) | center_crop(224)")
    )
    peer = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    transform = create_transform((3, 224, 224), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=0.875)

    @torch.inference_mode()
    def plain() -> None:
        for images, _ in DataLoader(Files(files, transform), 64):
            peer(images).softmax(dim=1).topk(5)

    contenders: Contenders = {"ours": lambda: predict(model, files, device="cpu"), "timm in a loop": plain}
    if find_spec("transformers") is None:
        print("    (transformers is not installed: its pipeline is left out)")
        return contenders
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    place = f"{folder / 'model'}"
    hub = AutoModelForImageClassification.from_pretrained(place)
    pipe = pipeline("image-classification", hub, image_processor=AutoImageProcessor.from_pretrained(place))
    return {**contenders, "transformers pipeline": lambda: pipe([str(file) for file in files], batch_size=64)}


def doctor(files: list[Path], folder: Path, rows: int) -> Contenders:
    """Hashes of all files."""
    import imagehash

    def plain() -> None:
        for file in files:
            hashlib.md5(file.read_bytes()).hexdigest()
            imagehash.phash(Image.open(file))

    split = split_of(files)
    return {"ours": lambda: examine({"train": split}), "imagehash and md5": plain}


def csv(files: list[Path], folder: Path, rows: int) -> Contenders:
    """A table of paths and labels to a data set that is ready to be read, every file looked for."""
    root, table = folder / "images", folder / "list.csv"
    names = image_names(rows, "train")
    link_images(root, names)
    labels = np.random.default_rng(0).integers(0, INAT, rows)
    labels[: min(INAT, rows)] = np.arange(min(INAT, rows))
    pd.DataFrame({"path": names, "label": labels}).to_csv(table, index=False)

    def plain() -> None:
        found = pd.read_csv(table)
        found["label"].factorize()
        if not all(os.path.exists(root / path) for path in found["path"]):
            raise FileNotFoundError(root)

    config = DataConfig(str(root), index=str(table), test="none")
    return {"ours": lambda: load(config), "pandas and exists": plain}


def many_classes(folder: Path, short: bool) -> dict[str, Any]:
    """Seconds of our evaluation and report of many classes."""
    classes = 100 if short else INAT
    size = argparse.Namespace(tests=3 * classes, steps=1, overrides=[])
    for top, number in (("train", 4 * classes), ("test", size.tests)):
        link_images(folder / "images", image_names(number, top))
    found = measure(folder / "classes", 4 * classes, classes, size)
    return {"work": "classes", **{key: found[key] for key in ("classes", "tests", "seconds", "megabytes")}}


WORK = {
    "step": step, "epoch": epoch, "workers": workers, "predict": prediction, "doctor": doctor, "csv": csv,
}  # fmt: skip


def turns(contenders: Contenders, repetitions: int, wall: bool = False) -> dict[str, Any]:
    """Milliseconds (medians) of each, of CPU time or of a clock, and the opponents' ratios over ours, turn by turn."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repetitions + 1):
        for name, work in contenders.items():
            begun = time.perf_counter()
            spent = clocked(work, "cpu")
            if turn:  # the first warms up
                taken[name].append(1e3 * (time.perf_counter() - begun) if wall else spent)
    ratios = {
        name: [theirs / ours for theirs, ours in zip(values, taken["ours"], strict=True)]
        for name, values in taken.items()
        if name != "ours"
    }
    return {
        "milliseconds": {name: median(values) for name, values in taken.items()},
        "ratio": {name: [median(values), min(values), max(values)] for name, values in ratios.items()},
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    every = [*WORK, "classes"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--short", action="store_true", help="16 images, 2,000 rows, 100 classes, one turn")
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--rows", type=positive, default=437_513, help="of the CSV file")
    common_arguments(parser, repetitions=5, device="cpu alone")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.short:
        options.images, options.rows, options.repetitions = BATCH, 2000, 1
    packages = ("torchvision", "pillow", "pandas", "imagehash", "transformers")
    found = {name: version(name) for name in packages if find_spec("PIL" if name == "pillow" else name)}
    about = machine("cpu") | {"versions": found}
    print(f"{heading(about)}, {about['versions']}; {options.repetitions} turns")
    measured = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        files = [folder / f"{i:03d}.jpg" for i in range(options.images)]
        for file, content in zip(files, photographs(options.images, 500, 375, "JPEG"), strict=True):
            file.write_bytes(content)
        for name in options.only:
            (folder / name).mkdir()
            if name == "classes":
                row = many_classes(folder / name, options.short)
                seconds = ", ".join(f"{part} {spent:.2f} s" for part, spent in row["seconds"].items())
                print(f"{row['classes']:,} classes, {row['tests']:,} test images: {seconds}", flush=True)
            else:
                contenders = WORK[name](files, folder / name, options.rows)
                row = {"work": name, **turns(contenders, options.repetitions, wall=name == "workers")}
                print(f"{name}: ours {row['milliseconds']['ours']:.0f} ms")
            measured.append(row)
            for peer, (middle, least, most) in row.get("ratio", {}).items():
                spent = f"{row['milliseconds'][peer]:>8.0f} ms"
                print(f"    {peer:<24} {spent} {middle:>6.2f} x ({least:.2f} to {most:.2f})", flush=True)
    about |= {"repetitions": options.repetitions, "images": options.images, "csv_rows": options.rows}
    keep(options, "peers", {**about, "rows": measured})
    return 0
