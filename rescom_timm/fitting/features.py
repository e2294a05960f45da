"""Features of the frozen net: one pass over the images, kept on disk under a digest of all that they depend on.

Shapes: N images in V versions (as they are, flipped), F features of the backbone.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from rescom_timm.config.recipe import Recipe
from rescom_timm.data.splits import Split
from rescom_timm.data.tables import cache_folder
from rescom_timm.data.transforms import parse
from rescom_timm.engine.errors import one_line
from rescom_timm.engine.features import Features, allocate, read_features
from rescom_timm.fitting.inventory import digest_of, image_states
from rescom_timm.io import atomic_path
from rescom_timm.models.net import Net
from rescom_timm.models.trainable import digest

KEPT = 10 * 2**30
"""Bytes of features in the cache; what was used longest ago is removed first."""


def features_of(
    accelerator: Accelerator, net: Net, recipe: Recipe, split: Split, flipped: bool,
    together: Callable[[np.ndarray, str], Features] | None = None,
) -> Features:  # fmt: skip
    """Like read_features, but read from the cache where they are there, and kept in it.

    together: fills the values (N, V, F) of a pass of this name, instead of read_features.
    """
    images = digest_of(image_states(split))
    labels = np.asarray(split.labels, dtype=np.int64)
    shape = (len(labels), 1 + flipped, int(net.classifier.in_features))
    key = hashlib.sha256(f"{_encoder_digest(net)} {images} {_reading(recipe)} {flipped}".encode()).hexdigest()[:32]
    path = features_folder() / f"{key}.npy"
    try:
        values = np.load(path, mmap_mode="r")
        if values.shape == shape and values.dtype == np.float32:
            os.utime(path)
            return Features(values, labels, device=accelerator.device)
    except (OSError, ValueError):
        pass  # not there, or damaged: it is made anew
    with ExitStack() as written:
        try:
            target = written.enter_context(_array(path, shape))
        except OSError as error:
            warnings.warn(f"features are kept in memory, not in {path.parent}: {one_line(error)}", stacklevel=2)
            target = None
        if together is not None:
            found = together(np.empty(shape, np.float32) if target is None else target, key)
        else:
            found = read_features(accelerator, net, recipe, split, flipped, target)
    if target is None:
        return found
    _forget(path)
    return replace(found, values=np.load(path, mmap_mode="r"))


@contextmanager
def _array(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A new .npy file to write to."""
    with atomic_path(path) as beside:
        values = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=shape)
        with beside.open("r+b") as file:
            allocate(file, beside.stat().st_size)
        yield values
        values.flush()


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
