"""`packed`: what `rescom-timm pack` changes: accuracy of a probe on smaller images; time and memory of reading.

    python tools/benchmark.py packed my_photos --sizes 256 128 96 --weights lite0.safetensors --inputs 64 128

FOLDER has class folders in train and test. Accuracy (with --weights, of a timm backbone): a Balanced Softmax head over
frozen features, fitted on the copy; tested on the copy, and on the original images. Differences are those from original
images for both, with 95% intervals of a paired bootstrap over the test images. Reading: one process per row opens the
lists or the copy and draws one epoch of training views, in seconds of CPU time; memory is what it holds more at its
peak. Files are in the page cache of the system, so no disk is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.common import heading, keep, machine, positive
from rescom_timm import losses
from rescom_timm.config.loading import load_dict
from rescom_timm.config.own_splits import OwnImages, parts, saved_lists
from rescom_timm.data.config import DataConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.loaders import train_loader
from rescom_timm.data.pack import PackConfig, pack
from rescom_timm.data.sources import Data, load
from rescom_timm.engine.build import build_net
from rescom_timm.engine.features import Features
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.fitting.features import features_of
from rescom_timm.methods.heads import softmax_regression, standard
from rescom_timm.paired import compare

RIDGE = 0.1


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--sizes", nargs="+", type=positive, default=[256, 128, 96])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", metavar="FILE", help="of the backbone; without it only reading is measured")
    parser.add_argument("--inputs", nargs="+", type=positive, default=[64], help="pixels that the net sees")
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    parser.set_defaults(device="cpu")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    about = machine("cpu")
    print(heading(about))
    with TemporaryDirectory() as place:
        indexes, config = parts(OwnImages(options.folder, validation="none"))
        configs = {"files": saved_lists(indexes, config, place)}
        data = {"files": load(configs["files"])}
        for size in options.sizes:
            folder = f"{place}/{size}"
            pack(data["files"], folder, PackConfig(size))
            configs[f"pack {size}"] = DataConfig(folder)
            data[f"pack {size}"] = load(configs[f"pack {size}"])
        accuracy = [row for size in options.inputs for row in probes(data, size, options)] if options.weights else []
        rows = []
        for name, one in configs.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append({"source": name, **pool.submit(reading, one).result()})
            print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    keep(options, "packed", {**about, "accuracy": accuracy, "reading": rows})
    return 0


def probes(data: dict[str, Data], size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracies of heads over features of `size` pixels, and their differences from that of the original images."""
    found = {name: features(one, size, options) for name, one in data.items()}
    counts, (_, original) = data["files"].counts, found["files"]
    systems = {}
    for name, (train, test) in found.items():
        rows = train.rows()
        head = standard(rows).folded(
            softmax_regression(rows, losses.log_prior(torch.from_numpy(counts)), RIDGE, standard(rows))
        )
        tests = {name: test} if name == "files" else {name: test, f"{name}, tested on the original images": original}
        for title, one in tests.items():
            logits = torch.from_numpy(np.array(one.values[:, 0])) @ head[0].T + head[1]
            systems[title] = logits.argmax(dim=1).numpy()
    right = [predicted == original.labels for predicted in systems.values()]
    compared = compare([one[None] for one in right], original.labels, counts)
    result = []
    for place, (name, predicted) in enumerate(systems.items()):
        row: dict[str, Any] = {"input": size, "images": name, **compared.accuracies[place]}
        row["other predictions"] = int((predicted != systems["files"]).sum())
        if place:
            row["differences"] = {key: asdict(one) for key, one in compared.differences[place - 1].items()}
        print(json.dumps(row), flush=True)
        result.append(row)
    return result


def features(data: Data, size: int, options: argparse.Namespace) -> tuple[Features, Features]:
    """Of the training and test images."""
    crop = f"resize({round(size * 8 / 7)},bicubic) | center_crop({size})"
    recipe = load_dict({
        "data": {"source": "digits"},
        "net": {"backbone": options.backbone, "pretrained": True, "weights_file": options.weights},
        "views": {"train": crop, "eval": crop},
        "evaluation": {"batch_size": 64},
        "speed": {"workers": 0},
    })  # fmt: skip
    net, accelerator = build_net(recipe.net, recipe.views, len(data.counts)), new_accelerator("no", cpu=True)
    assert data.test is not None
    train, test = (features_of(accelerator, net, recipe, split, False) for split in (data.train, data.test))
    return train, test


def reading(config: DataConfig) -> dict[str, Any]:
    """Seconds of CPU time and bytes to open a source and to draw an epoch of 64-pixel views."""
    torch.set_num_threads(1)
    begun, held = time.process_time(), psutil.Process().memory_info().rss
    data = load(config)
    opened = time.process_time()
    views = ViewsConfig(train="random_resized_crop(64) | flip")
    loader = train_loader(data.train, views, 1, min(64, len(data.train.rows)), speed=LoadingConfig(workers=0, cache=0))
    images = sum(len(batch["label"]) for batch in loader)
    done, peak = time.process_time(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    root = Path(config.source)
    stored = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    return {
        "open_seconds": round(opened - begun, 3),
        "epoch_seconds": round(done - opened, 2),
        "images": images,
        "memory_mb": round((peak - held) / 1e6),
        "stored_mb": round(float(np.sum(stored)) / 1e6, 1),
        "stored_files": len(stored),
    }
