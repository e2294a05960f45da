"""`peers`: whole pieces of work against what one would write with other libraries, interleaved in one run.

    python tools/benchmark.py peers -o tools/benchmarks/
    python tools/benchmark.py peers --only csv doctor --repetitions 5

epoch      JPEGs of 500 x 375 to trained steps at 224 pixels, one view, resnet10t, in this process: our loader and
           channels_last, torchvision v2 with a DataLoader, and timm's create_loader (its own augmentation: crop, flip)
predict    64 JPEGs: rescom_timm.predict, a plain loop over timm's model, and transformers' pipeline where it is
doctor     64 JPEGs: examine, against imagehash and md5 in a loop (it alone looks at sizes, levels and gray)
csv        437,513 rows of 8,142 classes: an Index, against pandas and factorize (no checks)

A ratio is the opponent's time over ours, turn by turn: median, smallest and largest. Above 1 we are faster.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Callable
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
from rescom_timm.data.config import LoadingConfig, ViewsConfig
from rescom_timm.data.doctor import examine
from rescom_timm.data.index import Index
from rescom_timm.data.loaders import train_loader
from rescom_timm.data.splits import Split
from rescom_timm.engine.allocator import keep_freed_memory
from rescom_timm.inference.export import export
from rescom_timm.inference.predict import predict
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.models.net import create_model

Contenders = dict[str, Callable[[], object]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONE, CLASSES, BATCH = "resnet10t", 10, 16


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


def epoch(files: list[Path], folder: Path, rows: int) -> Contenders:
    """One epoch of training from files."""

    def train(loader: Any, net: Any, forward: Callable[[Any], Any], parts: Callable[[Any], tuple[Any, Any]]) -> None:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        for images, labels in map(parts, loader):
            F.cross_entropy(forward(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    net = create_model(BACKBONE, CLASSES, projector=None, mean=MEAN, std=STD).to(memory_format=torch.channels_last)
    views = ViewsConfig(train="random_resized_crop(224) | flip", mean=MEAN, std=STD)
    ours = train_loader(split_of(files), views, 1, BATCH, speed=LoadingConfig(workers=0, cache=0))
    plain = [v2.PILToTensor(), v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*plain, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))])
    torchvision = DataLoader(Files(files, transform), BATCH, shuffle=True, drop_last=True)
    timms = create_loader(
        Files(files), (3, 224, 224), BATCH, is_training=True, mean=MEAN, std=STD, num_workers=0, use_prefetcher=False,
        color_jitter=0.0, persistent_workers=False, device=torch.device("cpu"),
    )  # fmt: skip
    one, other = (timm.create_model(BACKBONE, num_classes=CLASSES) for _ in range(2))
    return {
        "ours": lambda: train(ours, net, net.classify, lambda batch: (batch["image"].flatten(0, 1), batch["label"])),
        "torchvision v2": lambda: train(torchvision, one, one, tuple),
        "timm create_loader": lambda: train(timms, other, other, tuple),
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
    """A table of paths and labels to arrays."""
    table = folder / "list.csv"
    labels = np.random.default_rng(0).integers(0, 8142, rows)
    labels[: min(8142, rows)] = np.arange(min(8142, rows))
    frame = pd.DataFrame({"path": [f"train/{k:04d}/{i:06d}.jpg" for i, k in enumerate(labels)], "label": labels})
    frame.to_csv(table, index=False)

    def plain() -> None:
        found = pd.read_csv(table)
        found["label"].factorize()
        found["path"].tolist()

    return {"ours": lambda: Index.load(table, allow_empty=True), "pandas": plain}


WORK = {"epoch": epoch, "predict": prediction, "doctor": doctor, "csv": csv}


def turns(contenders: Contenders, repetitions: int) -> dict[str, Any]:
    """Milliseconds (medians) of each, and of the opponents the ratios over ours, turn by turn."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repetitions + 1):
        for name, work in contenders.items():
            spent = clocked(work, "cpu")
            if turn:  # the first warms up
                taken[name].append(spent)
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
    parser.add_argument("--only", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--rows", type=positive, default=437_513, help="of the CSV file")
    common_arguments(parser, repetitions=5, device="cpu alone")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    keep_freed_memory()
    packages = {"torchvision": "torchvision", "PIL": "pillow", "pandas": "pandas", "imagehash": "imagehash"}
    found = {package: version(package) for module, package in packages.items() if find_spec(module)}
    about = machine("cpu") | {"versions": found}
    print(f"{heading(about)}, {about['versions']}; CPU time, {options.repetitions} turns")
    measured = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = [folder / f"{i:03d}.jpg" for i in range(options.images)]
        for file, content in zip(files, photographs(options.images, 500, 375, "JPEG"), strict=True):
            file.write_bytes(content)
        for name in options.only:
            row = {"work": name, **turns(WORK[name](files, folder, options.rows), options.repetitions)}
            measured.append(row)
            print(f"{name}: ours {row['milliseconds']['ours']:.0f} ms")
            for peer, (middle, least, most) in row["ratio"].items():
                spent = f"{row['milliseconds'][peer]:>8.0f} ms"
                print(f"    {peer:<24} {spent} {middle:>6.2f} x ({least:.2f} to {most:.2f})", flush=True)
    keep(options, "peers", {**about, "images": options.images, "csv_rows": options.rows, "rows": measured})
    return 0
