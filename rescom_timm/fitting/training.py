"""All weights trained from a fitted head, as an ordinary run, and what a step of it costs."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from rescom_timm.config.own_rules import BACKBONE, RATES, training_view
from rescom_timm.config.recipe import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SpeedConfig,
    TrackConfig,
    TrainConfig,
)
from rescom_timm.data.loaders import train_loader
from rescom_timm.data.sources import Data
from rescom_timm.engine import checkpoint
from rescom_timm.engine.errors import CheckpointError, NonFiniteLoss, RunError, one_line
from rescom_timm.engine.features import Features, loader_of
from rescom_timm.engine.follower import Follower
from rescom_timm.engine.nonfinite import copy_buffers, put_back
from rescom_timm.engine.trainer import train
from rescom_timm.fitting.choice import Scored
from rescom_timm.methods.baselines import BalancedSoftmaxConfig
from rescom_timm.methods.heads import softmax_regression, standard
from rescom_timm.models.classifiers import ClassifierConfig
from rescom_timm.models.net import Net

Kind = Literal["linear", "cosine"]
BATCH = 32
PATIENCE = 5
"""Epochs without a better mean over classes on validation after which a training ends."""
FALL = 10.0
"""Points of the mean over classes below its start at which a training has diverged."""


class Diverged(RunError):
    """A training fell far below its start."""


class OutOfTime(RunError):
    """The time of a training holds no further epoch."""


class Watcher(Follower):
    """Ends a training that has diverged, or whose time holds no further epoch."""

    def __init__(self, floor: float | None, seconds: float, epoch: float, epochs: int) -> None:
        """floor: of the mean over classes on validation; None: none. epoch: seconds that one is expected to take."""
        self.floor, self.epoch, self.epochs, self.done = floor, epoch, epochs, 0
        self.began = time.monotonic()
        self.end = self.began + seconds

    def opened(self, folder: Path, recipe: Recipe, data: Data) -> None:
        """Raises OutOfTime."""
        self._check()

    def evaluated(self, epoch: int, figures: dict[str, dict[str, float]]) -> None:
        """Raises Diverged."""
        self.done = epoch
        now = figures.get("validation", {}).get("mean_class")
        if self.floor is not None and now is not None and now < self.floor:
            raise Diverged("fit.diverged", f"epoch {epoch}: {now:.1f} on validation, below {self.floor:.1f}")

    def saved(self, newest: str, best: str | None) -> None:
        """Raises OutOfTime."""
        now = time.monotonic()
        self.epoch, self.began = now - self.began, now
        if self.done < self.epochs:
            self._check()

    def _check(self) -> None:
        if time.monotonic() + self.epoch > self.end:
            raise OutOfTime("fit.minutes", f"stopped after {self.done} of {self.epochs} epochs, for lack of time")


def floor_of(start: Scored | None) -> float | None:
    """The mean over classes on validation below which a training from `start` has diverged."""
    if start is None:
        return None
    return start.mean_class - max(FALL, start.mean_class - start.interval()[0])


def size_of(recipe: Recipe) -> int:
    """The side of the images that the net sees."""
    return int(recipe.views.eval.rpartition("center_crop(")[2].rstrip(") "))


def training_recipe(base: Recipe, kind: Kind, epochs: int, images: int, start: Path, validated: bool) -> Recipe:
    """The recipe of a candidate's run, in a folder beside `start`, the weights that it starts from.

    base: its data, views of evaluation, net and loader. images: training images. validated: whether its best epoch is
    chosen on validation. BatchNorm's statistics stay as they are: the head was fitted with them, and at another size
    than the pretraining's those of batches are so far away that a start at 76.5 fell to 42 in one epoch.
    """
    size = size_of(base)
    return replace(
        base,
        name=kind,
        output=str(start.parent),
        init_from=str(start),
        views=replace(base.views, train=training_view(size)),
        net=replace(base.net.untrained(), classifier=ClassifierConfig(kind), frozen_statistics=True),
        method=BalancedSoftmaxConfig(),
        optimizer=OptimizerConfig(lr=RATES[kind], weight_decay=1e-4, encoder_lr_scale=BACKBONE),
        schedule=ScheduleConfig(by="update", final=0.01),
        train=TrainConfig(epochs=epochs, batch_size=min(BATCH, 2 ** int(math.log2(images)))),
        evaluation=EvaluationConfig(
            every=1,
            batch_size=base.evaluation.batch_size,
            select="mean_class",
            patience=PATIENCE if validated else None,
        ),
        checkpoint=CheckpointConfig(keep=1),
        track=TrackConfig(log_with=()),
    )


class Outcome(TypedDict):
    """What came of a training."""

    used: bool
    """Whether it left weights that may be chosen."""
    why: str
    """It ended early or is not used; "" for neither."""


def trained(recipe: Recipe, class_names: Sequence[str], floor: float | None, seconds: float, epoch: float) -> Outcome:
    """Train a candidate, or go on with it.

    floor, epoch: as of Watcher. seconds: to stop after. Raises Stopped after saving, where a signal asked for it.
    """
    first = (Path(str(recipe.init_from)), class_names)
    watcher = Watcher(floor, seconds, epoch, recipe.train.epochs)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train(recipe, True, follower=watcher, first=first, splits=("validation",))
    except OutOfTime as error:
        return Outcome(used=checkpoint.newest(recipe.folder / "checkpoints") is not None, why=str(error))
    except (Diverged, NonFiniteLoss) as error:
        return Outcome(used=False, why=f"diverged: {one_line(error)}")
    return Outcome(used=True, why="")


def weights_of(recipe: Recipe) -> dict[str, Tensor]:
    """The best weights of a training on validation, or its last. Raises CheckpointError where there are none."""
    folder = recipe.folder / "checkpoints"
    newest = checkpoint.newest(folder)
    if newest is None:
        raise CheckpointError("checkpoint.missing", f"no checkpoint in {folder}: fit into another folder with -o")
    best = newest[2]["progress"]["best_checkpoint"]
    if not recipe.evaluation.patience or best in (None, newest[0].name):
        return newest[1]
    return checkpoint.load(folder / best)[0]


@dataclass(frozen=True)
class Pace:
    """Seconds an image takes, reading and decoding included."""

    forward: float
    """To classify."""
    step: float
    """Forward, backward and update of one view."""
    head: float = 0.0
    """One pass of L-BFGS over a row of features."""


def measured(accelerator: Accelerator, net: Net, recipe: Recipe, data: Data, batches: int = 2) -> Pace:
    """The pace on this machine, from a few batches after one to warm up. net: moved to its device; its weights stay."""
    reading = SpeedConfig(workers=0, cache=0)  # what workers do beside this process cannot be measured in a few batches
    batch = recipe.train.batch_size
    loader = accelerator.prepare(train_loader(data.train, recipe.views, 1, batch, config=recipe.loader, speed=reading))
    shown = replace(recipe, speed=reading, evaluation=replace(recipe.evaluation, batch_size=batch))
    evaluation = loader_of(accelerator, shown, data.train)
    net.to(accelerator.device)

    def forward(images: Tensor) -> None:
        with torch.no_grad():
            net.eval().classify(images)

    def step(images: Tensor) -> None:
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        F.cross_entropy(net.train()(images[:, 0]).logits, labels).backward()
        net.zero_grad(set_to_none=True)

    before = copy_buffers(net)
    try:
        head = _pass_seconds(int(net.classifier.in_features), len(data.counts), accelerator.device)
        return Pace(_timed(evaluation, forward, batches, recipe), _timed(loader, step, batches, recipe), head)
    finally:
        put_back(net, before)
        net.eval()


def _timed(loader: Iterable[dict[str, Tensor]], work: Callable[[Tensor], None], batches: int, recipe: Recipe) -> float:
    """Return the seconds per image of the batches after the first, or of the first where there is no other.

    Workers share the reading; beside a GPU it costs no time of its own unless it takes longer.
    """
    images, read, worked = 0, 0.0, 0.0
    started = time.monotonic()
    for number, batch in enumerate(islice(loader, batches + 1)):
        there = time.monotonic()
        work(batch["image"])
        if cuda := batch["image"].is_cuda:
            torch.cuda.synchronize()
        done = time.monotonic()
        if number == 1:
            images, read, worked = 0, 0.0, 0.0
        images, read, worked = images + len(batch["image"]), read + there - started, worked + done - there
        started = done
    read /= max(1, min(recipe.speed.workers, os.cpu_count() or 1))
    return (max(read, worked) if cuda else read + worked) / images


def _pass_seconds(width: int, classes: int, device: torch.device, images: int = 1024) -> float:
    """Return the seconds a row of features takes in one pass of L-BFGS."""
    values = np.random.default_rng(0).standard_normal((images, 1, width), dtype=np.float32)
    rows = Features(values, np.arange(images) % classes, device=device).rows()
    scale = standard(rows)
    for _ in range(2):  # the first warms up
        began = time.monotonic()
        softmax_regression(rows, torch.zeros(classes), 1.0, scale, tolerance=math.inf)  # ends after one pass
    return (time.monotonic() - began) / images
