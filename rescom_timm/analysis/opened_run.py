"""A run with its net, its queue and its data, for plots that need more than its files.

Shapes: N images, F features, D the width of an embedding, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from rescom_timm.analysis.run_files import Missing
from rescom_timm.config.recipe import Recipe, SpeedConfig
from rescom_timm.contrastive.queue import Queue
from rescom_timm.data.loaders import eval_loader
from rescom_timm.data.progress import progress
from rescom_timm.data.samples import Batch
from rescom_timm.data.sources import Data
from rescom_timm.data.splits import Split
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import base_net, build_method, speed_up, whole_weights
from rescom_timm.engine.evaluate import data_of, digest_of, evaluated_otherwise, load_net, open_checkpoint
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.engine.run_folder import run_recipe
from rescom_timm.errors import InputError
from rescom_timm.io import read_json
from rescom_timm.methods import Method
from rescom_timm.metrics import Meter


class Seen(NamedTuple):
    """One pass over N images: features (N, F), embeddings (N, D), logits (N, K) float32, labels (N,); on the CPU."""

    features: Tensor
    embeddings: Tensor
    logits: Tensor
    labels: Tensor


@dataclass(frozen=True)
class OpenedRun:
    """A run's recipe, data and method, with the weights and the queue of one of its checkpoints, in evaluation mode."""

    name: str
    recipe: Recipe
    data: Data
    method: Method
    checkpoint: str
    """last, best or the checkpoint's folder name, with a suffix for overrides: part of the names of written files."""
    chosen: str
    """How the checkpoint was chosen, as text."""
    weights: str
    """sha256 of the net's weights."""
    accelerator: Accelerator

    def queue(self) -> Queue:
        """The method's queue. Raises Missing if there is none or it has no keys."""
        queue = self.method.queue
        if queue is None:
            raise Missing("plot.queue", f"method {self.recipe.method.name} of run {self.name} has no queue")
        if not bool(queue.valid.any()):
            raise Missing("plot.queue", f"the queue of run {self.name} is empty: the checkpoint is of step 0")
        return queue

    @property
    def tested(self) -> Split:
        """The test images, else those of validation. Raises Missing if there are neither."""
        found = self.data.test if self.data.test is not None else self.data.validation
        if found is None:
            raise Missing("data.split", f"run {self.name} has neither test nor validation images")
        return found

    def split(self, name: str) -> Split:
        """The train, test or validation split. Raises InputError if the recipe has none of that name."""
        known = {"train": self.data.train, "test": self.data.test, "validation": self.data.validation}
        found = known.get(name)
        if found is None:
            raise InputError(
                "data.split", f"run {self.name} has no {name} split (data.{name}: {getattr(self.recipe.data, name)})"
            )
        return found

    def loader(self, split: Split, policy: str | None = None) -> DataLoader[Batch]:
        """The split's images once, in order.

        policy: instead of the recipe's views.eval, such as its views.train (the draws of an image depend on its
        position alone).
        """
        views = self.recipe.views if policy is None else dataclasses.replace(self.recipe.views, eval=policy)
        return eval_loader(split, views, self.recipe.evaluation.batch_size, self.recipe.loader, self.recipe.speed)

    def autocast(self) -> AbstractContextManager[object]:
        """The recipe's precision (fp16 on a GPU only)."""
        kind, precision = self.accelerator.device.type, self.recipe.train.precision
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(
            kind, types.get(precision), enabled=precision == "bf16" or (precision == "fp16" and kind != "cpu")
        )

    @torch.inference_mode()
    def look(self, split: Split, policy: str | None = None) -> Seen:
        """The net's outputs on a split. policy as in loader."""
        return Seen(*(torch.cat(column) for column in zip(*self._batches(split, policy), strict=True)))

    @cached_property
    def judged(self) -> list[npt.NDArray]:
        """Labels, predictions and their confidence, (N,) each, of `tested`, in one pass for all plots.

        The net's outputs are not kept: N x K logits would be gigabytes.
        """
        meter = Meter(len(self.data.counts))
        with torch.inference_mode():
            for seen in self._batches(self.tested):
                meter.update(seen.logits, seen.labels)
        return [column.numpy() for column in meter.predictions().values()]

    def _batches(self, split: Split, policy: str | None = None) -> Iterator[Seen]:
        loader = self.loader(split, policy)
        for batch in progress(loader, f"{self.name}, {split.name}", len(split.rows), lambda batch: len(batch["label"])):
            with self.autocast():
                features, logits, embeddings, *_ = self.method.net(batch["image"].to(self.accelerator.device))
            features, logits, embeddings = (x.float().cpu() for x in (features, logits, embeddings))
            yield Seen(features, embeddings, logits, batch["label"])


def take(split: Split, positions: npt.NDArray[np.int64]) -> Split:
    """The split's images at these positions."""
    return Split(split.name, split.dataset.select(positions), split.labels[positions], split.rows[positions])


def open_run(folder: Path, which: str = "last", overrides: Sequence[str] = (), name: str = "") -> OpenedRun:
    """A run with the net and the queue of a checkpoint: "last", "best" (on validation), its name or folder.

    overrides: key=value arguments over the run's own recipe, such as data.source=PATH. Needs no pretrained weights, and
    the network only for the data. Raises RecipeError, CheckpointError, MissingFileError or InputError.
    """
    own = run_recipe(folder)
    recipe = run_recipe(folder, overrides) if overrides else own
    path, weights, state, chosen = open_checkpoint(folder, which, recipe.evaluation.select)
    data = data_of(folder, own, recipe, checkpoint.class_names(path, state))
    read = digest_of(data.test or data.validation or data.train)
    _, changed, suffix = evaluated_otherwise(own, recipe, read) if overrides else ({}, "", "")
    recipe = dataclasses.replace(recipe, net=base_net(recipe, state))
    accelerator = new_accelerator("no")  # one for all runs; precision is each one's own (autocast)
    method = build_method(recipe, data)
    with checkpoint.consistent(path):
        load_net(method.net, whole_weights(method.net, weights, state, path), path)
    speed_up(method.net, SpeedConfig(channels_last=recipe.speed.channels_last))  # rounded as in training
    try:
        method.load_state_dict(state.get("method", {}), strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError("checkpoint.differs", f"{path} does not fit the recipe and its data: {reason}") from None
    label = (which if which in ("last", "best") else path.name) + suffix
    chosen += f"; {changed}" if changed else ""
    sha256 = read_json(path / "hashes.json").get("net.safetensors", "")
    name = name or folder.resolve().name
    return OpenedRun(name, recipe, data, method.to(accelerator.device).eval(), label, chosen, sha256, accelerator)
