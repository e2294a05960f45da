"""What the leader of a fit lets other workers do: parts of a pass over images, and trainings."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from safetensors.torch import load_file

from rescom_timm.config.loading import load_dict
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.sources import load
from rescom_timm.data.splits import Split
from rescom_timm.engine.build import build_net
from rescom_timm.engine.errors import Stopped
from rescom_timm.engine.features import Features, read_features
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.errors import InputError
from rescom_timm.fitting.budget import sampled
from rescom_timm.fitting.inventory import refuse_other_images
from rescom_timm.fitting.training import trained
from rescom_timm.fitting.workers import Workers
from rescom_timm.io import atomic_path, read_json, write_tensors
from rescom_timm.models.net import Net

PATIENCE = 60.0
"""Seconds at least that a part of a pass is waited for; then the leader reads it too."""


class Images(NamedTuple):
    """Images of a recipe's data, by which another process finds them."""

    split: str
    """train or validation."""
    at_most: int | None
    """Of a class; None: all."""


def read_together(
    workers: Workers, accelerator: Accelerator, net: Net, recipe: Recipe, split: Split, images: Images, flipped: bool,
    values: np.ndarray, key: str,
) -> Features:  # fmt: skip
    """Like read_features, by all workers; the values are those of one process.

    images: which ones `split` has. values: that are filled. key: a name of the pass.
    """
    batch = recipe.evaluation.batch_size  # parts are of whole batches, whose sizes have a share in the last digits
    step = batch * -(-len(split.rows) // (2 * batch * workers.number()))
    parts = {f"{key}-{start}-{step}": (start, start + step) for start in range(0, len(split.rows), step)}
    weights = {name: value.cpu() for name, value in net.encoder.state_dict().items()}
    write_tensors(workers.tasks / f"{key}.safetensors", weights)
    for name, rows in parts.items():
        task = {"kind": "features", "recipe": recipe.to_dict(), "weights": key, "flipped": flipped, "rows": rows}
        workers.post(name, task | images._asdict())
    began, end = time.monotonic(), math.inf
    for waits in (False, True):  # what is free, then what others have
        for name, rows in parts.items():
            file = workers.tasks / f"{name}.npy"
            work = partial(_read_part, accelerator, net, recipe, split, flipped, rows, file)
            found = workers.result(name, work, lambda: waits and time.monotonic() < end)  # noqa: B023
            if waits:
                if found is None:
                    work()
                values[slice(*rows)] = np.load(file)
        end = time.monotonic() + max(PATIENCE, 2 * (time.monotonic() - began))
    for path in workers.tasks.glob(f"{key}*"):
        path.unlink()
    return Features(values, np.asarray(split.labels, dtype=np.int64), device=accelerator.device)


def _read_part(
    accelerator: Accelerator, net: Net, recipe: Recipe, split: Split, flipped: bool, rows: Sequence[int], file: Path
) -> Mapping[str, object]:
    chosen = np.arange(len(split.rows))[slice(*rows)]
    dataset, labels = split.dataset.select(chosen), split.labels[chosen]
    part = replace(split, dataset=dataset, labels=labels, rows=split.rows[chosen])
    found = read_features(accelerator, net, recipe, part, flipped)
    with atomic_path(file) as beside, beside.open("wb") as written:
        np.save(written, found.values)
    return {"seconds": found.seconds}


def train_elsewhere(
    workers: Workers, name: str, recipe: Recipe, class_names: Sequence[str], floor: float | None, seconds: float,
    epoch: float,
) -> None:  # fmt: skip
    """Let any worker train a candidate. Arguments as of `trained`; the seconds are from now."""
    task = {"kind": "training", "recipe": recipe.to_dict(), "class_names": list(class_names), "floor": floor}
    workers.post(name, task | {"until": time.time() + seconds, "epoch": epoch})


def work(path: Path) -> Mapping[str, object]:
    """Do the task in a file as a worker beside the leader. Raises KeyboardInterrupt where a signal stops it."""
    task, fit = read_json(path), path.parents[1]
    recipe = load_dict(task["recipe"], str(path))
    refuse_other_images(fit)
    if task["kind"] == "training":
        print(f"training: {recipe.name}, {recipe.train.epochs} epochs", flush=True)
        # The folder may have another path here than for the leader.
        recipe = replace(recipe, output=str(fit), init_from=str(fit / Path(str(recipe.init_from)).name))
        try:
            return trained(recipe, task["class_names"], task["floor"], task["until"] - time.time(), task["epoch"])
        except Stopped as error:
            raise KeyboardInterrupt from error
    print(f"features: {task['split']} images {task['rows'][0]:,} to {task['rows'][1]:,}", flush=True)
    data = load(recipe.data)
    split = {"train": data.train, "validation": data.validation}[task["split"]]
    if split is None:
        raise InputError("fit.changed", f"there are no {task['split']} images here")
    net = build_net(recipe.net.untrained(), recipe.views, len(data.counts))
    net.encoder.load_state_dict(load_file(path.with_name(f"{task['weights']}.safetensors")))
    accelerator = new_accelerator("no")
    part = sampled(split, task["at_most"])
    file = path.with_suffix(".npy")
    found = _read_part(accelerator, net.to(accelerator.device), recipe, part, task["flipped"], task["rows"], file)
    if not path.exists():  # the leader has read it in the meantime
        file.unlink()
    return found
