"""Features of a net over the images of a split, in one pass without training.

Shapes: N images in V versions (as they are, flipped), F features of the backbone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from rescom_timm.config.recipe import Recipe
from rescom_timm.data.loaders import eval_loader
from rescom_timm.data.progress import image_bar
from rescom_timm.data.samples import Batch
from rescom_timm.data.splits import Split
from rescom_timm.engine.stop_signals import in_own_process_group
from rescom_timm.models.net import Net

CHUNK = 4096
"""Rows that are read and multiplied at a time."""


@dataclass(frozen=True, eq=False)
class Features:
    """Of a split, in its order."""

    values: np.ndarray
    """(N, V, F) float32, perhaps of a file; V = 1 without flipped images."""
    labels: np.ndarray
    """(N,) int64."""
    seconds: float = 0.0
    """That the pass took; 0 for features of a cache."""
    device: torch.device = torch.device("cpu")
    """Of the tensors that `rows` makes."""

    def counts(self, classes: int) -> Tensor:
        """Images of each class, (K,) int64."""
        return torch.from_numpy(np.bincount(self.labels, minlength=classes))

    def rows(self, positions: np.ndarray | None = None, versions: int | None = None) -> Rows:
        """The rows at some positions (all by default), in so many versions (all by default)."""
        positions = np.arange(len(self.labels)) if positions is None else positions
        return Rows(self, positions, versions or self.values.shape[1])


class Rows:
    """Chunks of (features (m, F), labels (m,)), the same each time; one alone is read once."""

    def __init__(self, features: Features, positions: np.ndarray, versions: int) -> None:
        self.features, self.positions, self.versions = features, positions, versions
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
            chunk = values.to(self.features.device), labels.to(self.features.device)
            if len(self.positions) <= step:
                self.only = chunk
            yield chunk


@torch.no_grad()
def read_features(
    accelerator: Accelerator, net: Net, recipe: Recipe, split: Split, flipped: bool, values: np.ndarray | None = None
) -> Features:
    """The features of a split's images as the recipe's views.eval shows them, in every process.

    net: whole, on its device; in evaluation mode afterwards. flipped: in a second version too. values: where they are
    written, such as a memory-mapped file; None: new memory. Raises BrokenImage for an image that cannot be read.
    """
    labels, began, done = np.asarray(split.labels, dtype=np.int64), time.monotonic(), 0
    if values is None:
        values = np.empty((len(labels), 1 + flipped, int(net.classifier.in_features)), dtype=np.float32)
    net.eval()
    with image_bar(len(split.rows), f"features of {split.name}") as bar:
        for batch in loader_of(accelerator, recipe, split):
            images = net.normalize(batch["image"])
            both = torch.cat([images, images.flip(-1)]) if flipped else images
            with accelerator.autocast():
                by_image = net.encoder(both).float().unflatten(0, (1 + flipped, -1)).transpose(0, 1)
            found = accelerator.gather_for_metrics(by_image.contiguous()).cpu().numpy()
            values[done : done + len(found)] = found
            done += len(found)
            bar.update(len(found))
    return Features(values, labels, time.monotonic() - began, accelerator.device)


def allocate(file: BinaryIO, size: int) -> None:
    """Give a file its space at once, so that a full disk is an OSError here and not a crash while memory is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def on_disk(file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array whose values are in an open file, and not in memory."""
    allocate(file, 4 * math.prod(shape))
    return np.memmap(file, np.float32, "w+", shape=shape)


@torch.no_grad()
def read_logits(accelerator: Accelerator, net: Net, recipe: Recipe, split: Split) -> Iterator[Tensor]:
    """Logits (m, K) of a split's images, batch by batch, on the CPU and in every process.

    net: anywhere; on the accelerator's device and in evaluation mode afterwards.
    """
    net.to(accelerator.device).eval()
    for batch in loader_of(accelerator, recipe, split):
        yield accelerator.gather_for_metrics(net.classify(batch["image"])).float().cpu()


def loader_of(accelerator: Accelerator, recipe: Recipe, split: Split, cache: int = 0) -> DataLoader[Batch]:
    """Batches of a split as evaluation sees them, prepared. cache: as eval_loader's."""
    batch = -(-recipe.evaluation.batch_size // accelerator.num_processes) * accelerator.num_processes
    loader = eval_loader(split, recipe.views, batch, recipe.loader, recipe.speed, cache=cache)
    loader.worker_init_fn = in_own_process_group
    prepared: DataLoader[Batch] = accelerator.prepare(loader)
    return prepared
