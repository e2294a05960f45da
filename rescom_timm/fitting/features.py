"""Features of the frozen net: one pass over the images, kept on disk under a digest of all that they depend on.

Shapes: N images in V versions (as they are, flipped), F features of the backbone.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from rescom_timm.config.recipe import Recipe
from rescom_timm.data.loaders import eval_loader
from rescom_timm.data.progress import image_bar
from rescom_timm.data.splits import Split
from rescom_timm.data.tables import cache_folder
from rescom_timm.data.transforms import parse
from rescom_timm.engine.errors import one_line
from rescom_timm.engine.stop_signals import in_own_process_group
from rescom_timm.io import atomic_path
from rescom_timm.models.net import Net
from rescom_timm.models.trainable import digest

CHUNK = 4096
"""Rows that are read and multiplied at a time."""
KEPT = 10 * 2**30
"""Bytes of features in the cache; what was used longest ago is removed first."""


@dataclass(frozen=True, eq=False)
class Features:
    """Of a split, in its order."""

    values: np.ndarray
    """(N, V, F) float32, perhaps of a file; V = 1 without flipped images."""
    labels: np.ndarray
    """(N,) int64."""

    def rows(self, positions: np.ndarray | None = None, versions: int | None = None, device: Any = "cpu") -> Rows:
        """The rows at some positions (all by default), in so many versions (all by default)."""
        positions = np.arange(len(self.labels)) if positions is None else positions
        return Rows(self, positions, versions or self.values.shape[1], device)


class Rows:
    """Chunks of (features (m, F), labels (m,)), the same each time; one alone is read once."""

    def __init__(self, features: Features, positions: np.ndarray, versions: int, device: Any) -> None:
        self.features, self.positions, self.versions, self.device = features, positions, versions, device
        self.length = len(positions) * versions
        self.only: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.only is not None:
            yield self.only
            return
        step = max(1, CHUNK // self.versions)
        for start in range(0, len(self.positions), step):
            chosen = self.positions[start : start + step]
            values = torch.from_numpy(self.features.values[chosen, : self.versions]).flatten(0, 1)
            labels = torch.from_numpy(self.features.labels[chosen]).repeat_interleave(self.versions)
            chunk = values.to(self.device), labels.to(self.device)
            if len(self.positions) <= step:
                self.only = chunk
            yield chunk


def features_of(
    accelerator: Accelerator, net: Net, recipe: Recipe, split: Split, flipped: bool, images: str | None = None
) -> Features:
    """The features of a split's images as the recipe's views.eval shows them, read from the cache where they are there.

    net: whole, on its device. flipped: in a second version too. images: `image_digest` of the split; None: nothing is
    read from the cache or kept there. Raises BrokenImage for one that cannot be read.
    """
    labels = np.asarray(split.labels, dtype=np.int64)
    width = int(net.classifier.in_features)
    shape = (len(labels), 1 + flipped, width)
    if images is None:
        return Features(_passed(accelerator, net, recipe, split, flipped, shape), labels)
    key = hashlib.sha256(f"{_encoder_digest(net)} {images} {_reading(recipe)} {flipped}".encode()).hexdigest()[:32]
    path = features_folder() / f"{key}.npy"
    try:
        values = np.load(path, mmap_mode="r")
        if values.shape == shape and values.dtype == np.float32:
            os.utime(path)
            return Features(values, labels)
    except (OSError, ValueError):
        pass  # not there, or damaged: it is made anew
    values = _passed(accelerator, net, recipe, split, flipped, shape)
    try:
        with atomic_path(path) as beside, beside.open("wb") as file:
            np.save(file, values)
        _forget(path)
        values = np.load(path, mmap_mode="r")
    except OSError as error:
        warnings.warn(f"features are kept in memory, not in {path.parent}: {one_line(error)}", stacklevel=2)
    return Features(values, labels)


@torch.no_grad()
def _passed(
    accelerator: Accelerator, net: Net, recipe: Recipe, split: Split, flipped: bool, shape: Sequence[int]
) -> np.ndarray:
    values, done = np.empty(shape, dtype=np.float32), 0
    net.eval()
    with image_bar(len(split.rows), f"features of {split.name}") as bar:
        for batch in loader_of(accelerator, recipe, split):
            images = net.normalize(batch["image"])
            both = torch.cat([images, images.flip(-1)]) if flipped else images
            by_image = net.encoder(both).float().unflatten(0, (1 + flipped, -1)).transpose(0, 1)
            found = accelerator.gather_for_metrics(by_image).cpu().numpy()
            values[done : done + len(found)] = found
            done += len(found)
            bar.update(len(found))
    return values


def loader_of(accelerator: Accelerator, recipe: Recipe, split: Split) -> DataLoader[Any]:
    """Batches of a split as evaluation sees them."""
    loader = eval_loader(split, recipe.views, recipe.evaluation.batch_size, recipe.loader, recipe.speed)
    loader.worker_init_fn = in_own_process_group
    prepared: DataLoader[Any] = accelerator.prepare(loader)
    return prepared


def features_folder() -> Path:
    """Where features are kept: $XDG_CACHE_HOME or ~/.cache, then rescom_timm/features."""
    return cache_folder().with_name("features")


def _forget(new: Path) -> None:
    """Remove what was used longest ago, but not `new`, until KEPT bytes are left."""
    found = sorted(((path.stat().st_mtime, path) for path in new.parent.glob("*.npy") if path != new), reverse=True)
    total = new.stat().st_size
    for _, path in found:
        total += path.stat().st_size
        if total > KEPT:
            path.unlink(missing_ok=True)


def _encoder_digest(net: Net) -> str:
    own = {f"encoder.{name}": value for name, value in net.encoder.state_dict().items()}
    name = net.recreate and net.recreate["model_name"]
    return f"{name} {digest(own | {'mean': net.mean, 'std': net.std})}"


def _reading(recipe: Recipe) -> str:
    return f"{parse(recipe.views.eval, recipe.views.mean).text} {recipe.loader.reading.record()}"


def image_digest(split: Split) -> str:
    """Of a split's labels and stored images, in order: of a file its path, size and time of change, of others their
    bytes or pixels."""
    found = hashlib.sha256(np.asarray(split.labels, dtype=np.int64).tobytes())
    images = split.dataset.select_columns("image")
    for start in range(0, len(split.labels), 1024):
        for value in images[start : start + 1024]["image"]:
            if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
                status = os.stat(value["path"])
                found.update(f"{value['path']} {status.st_size} {status.st_mtime_ns}".encode())
            else:
                found.update(value["bytes"] if isinstance(value, Mapping) else np.asarray(value).tobytes())
    return found.hexdigest()
