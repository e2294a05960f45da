"""What a recipe takes on this machine, from a few steps that are timed:  rescom-timm train RECIPE --dry-run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from rescom_timm.config.recipe import Recipe
from rescom_timm.data.loaders import set_epoch
from rescom_timm.engine.build import First
from rescom_timm.engine.captured_step import WARM_UP
from rescom_timm.engine.errors import NonFiniteLoss, with_advice
from rescom_timm.engine.log import duration, peak_memory
from rescom_timm.engine.nonfinite import is_finite
from rescom_timm.engine.run_folder import Resume, check_place
from rescom_timm.engine.step_metrics import MetricsQueue
from rescom_timm.engine.trainer import Trainer, prepared
from rescom_timm.methods.distillation import Teacher

SECONDS = 15.0
"""For the timed steps, and a third of it for the evaluation batches of each split; two of each are timed anyway."""
ROUNDS = 3
PROCESSES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a whole recipe on this machine, without checkpoints, export and push."""

    about: str
    """Data, a loss and the weights that train."""
    device: str
    processes: int
    batch: int
    """Images of a step, over all processes."""
    accumulate: int
    steps: int
    step_seconds: float
    """Measured: reading, forward, backward and update."""
    evaluations: int
    splits: tuple[str, ...]
    """Of an evaluation."""
    evaluation_seconds: float
    """Of all splits once, by the measured seconds of a batch."""
    start_seconds: float
    """Before the first step: features for a head that is fitted or starts from class means."""
    memory: int
    """Bytes: the most that one process held, on its GPU where it has one; without loader workers."""

    @property
    def seconds(self) -> float:
        """The whole recipe."""
        evaluations = self.evaluations * self.evaluation_seconds
        return self.start_seconds + self.steps * self.step_seconds + evaluations

    def seconds_on(self, processes: int) -> float:
        """The whole recipe on another number of processes, as if they never waited for each other."""
        return self.seconds * self.processes / processes

    def lines(self) -> list[str]:
        """For the terminal."""
        passes = f" in {self.accumulate} passes" if self.accumulate > 1 else ""
        splits = ", ".join(self.splits) or "nothing"
        found = [
            f"dry run: {self.about}. Nothing was written.",
            f"measured on {self.device}, {self.processes} process{'es' * (self.processes > 1)}: "
            f"{self.step_seconds:.3g} s a step of {self.batch:,} images{passes}, {self.evaluation_seconds:.3g} s an "
            f"evaluation, {self.memory / 2**30:.2f} GiB a process (without its loader workers)",
            f"whole recipe: {self.steps:,} steps, {self.evaluations:,} evaluations on {splits}",
            "processes  images of each  time",
        ]
        for processes in sorted({*PROCESSES, self.processes}):
            if self.batch % (processes * self.accumulate) == 0:
                basis = "by the measured steps" if processes == self.processes else "estimate"
                time = duration(self.seconds_on(processes))
                found.append(f"{processes:>9}  {self.batch // processes:>14,}  {time}, {basis}")
        return [*found, "An estimate supposes such a device for each process, and communication that takes no time."]


def dry_run(
    recipe: Recipe, resume: Resume = False, teacher: Teacher | None = None, first: First | None = None,
    seconds: float = SECONDS,
) -> Estimate:  # fmt: skip
    """Build everything, time a few steps and evaluation batches, and write nothing.

    Arguments and errors as of `trainer.train`. seconds: for the timed steps, about.
    """
    check_place(recipe)
    with with_advice(""):
        trainer = prepared(recipe, resume, teacher=teacher, first=first)
        try:
            loss, step = _timed_steps(trainer, seconds)
            return _estimate(trainer, loss, step, _evaluation_seconds(trainer, seconds / 3))
        finally:
            trainer.close()


def _estimate(trainer: Trainer, loss: float, step: float, evaluation: float) -> Estimate:
    recipe, accelerator = trainer.recipe, trainer.accelerator
    train, every = recipe.train, recipe.evaluation.every
    is_selected = "validation" in trainer.splits
    threads = torch.get_num_threads()
    device = f"a CPU with {threads} thread{'s' * (threads > 1)}"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    passes = 2 if trainer.method.fits_head else int(recipe.net.classifier.init == "class_means")
    evaluated = sum(len(split.rows) for split in trainer.splits.values()) * len(trainer.nets)
    return Estimate(
        about=f"{trainer.data.summary()}; loss {loss:.3f}; {trainer.trained}",
        device=device,
        processes=accelerator.num_processes,
        batch=train.batch_size,
        accumulate=train.accumulate,
        steps=train.epochs * trainer.steps_per_epoch,
        step_seconds=step,
        splits=tuple(split.name for split in trainer.splits.values()),
        evaluations=math.ceil(train.epochs / every) + 1 + is_selected,  # at the end the last and the best once more
        evaluation_seconds=evaluation,
        start_seconds=passes * len(trainer.data.train.rows) * evaluation / max(1, evaluated),
        memory=max(gather_object([peak_memory()])),
    )


def _timed_steps(trainer: Trainer, limit: float) -> tuple[float, float]:
    """(a loss, seconds of an optimizer step). Raises NonFiniteLoss where a loss is not finite."""
    recipe, step, device = trainer.recipe, trainer.step, trainer.accelerator.device
    metrics = MetricsQueue(trainer.accelerator, step.lag if device.type == "cuda" else 0)
    trainer.start_epoch()
    clock = _Clock(trainer.loader, WARM_UP + 1 if device.type == "cuda" else 1, limit)
    for number, batch in enumerate(_batches(trainer)):
        outputs = step(trainer.mixed(batch, number), last := (number + 1) % recipe.train.accumulate == 0)
        metrics.push(outputs, batch["row"], last and clock.is_last(), 0, 0)
        read = metrics.ready()
        if broken := [one.figures["loss"] for one in read if not is_finite(one)]:
            raise NonFiniteLoss("train.nonfinite", f"the loss of the first steps is {broken[0]}")
        if last:
            step.finish(finite=True)
        clock.tick()
        if any(one.stop for one in read):  # all processes agree on it
            break
    return read[-1].figures["loss"], recipe.train.accumulate * clock.seconds()


def _batches(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    for epoch in count():
        set_epoch(trainer.loader, epoch)
        yield from trainer.completed(trainer.loader)


@torch.no_grad()
def _evaluation_seconds(trainer: Trainer, limit: float) -> float:
    """Seconds in which all weights that are evaluated see all splits once."""
    total = 0.0
    for loader in trainer.eval_loaders.values():
        clock = _Clock(loader, 1, limit)
        with trainer.accelerator.autocast():
            for batch in loader:
                trainer.net.eval().classify(batch["image"]).sum().item()
                last = any(gather_object([clock.is_last()]))  # all processes agree on it
                clock.tick()
                if last:
                    break
        total += len(loader) * clock.seconds()
    return total * len(trainer.nets)


class _Clock:
    """Seconds of a loader's pass, past its head start. Workers give batches in bursts: a round is one of each."""

    def __init__(self, loader: Any, warm_up: int, limit: float) -> None:
        self.round = max(1, loader.num_workers)
        self.first = warm_up + loader.num_workers * (loader.prefetch_factor or 0)
        self.limit, self.times = limit, [time.monotonic()]

    def tick(self) -> None:
        self.times.append(time.monotonic())

    def is_last(self) -> bool:
        """Whether the pass under way completes the rounds, or time is up and another pass was before it."""
        passes, late = len(self.times), time.monotonic() > self.times[0] + self.limit
        return passes >= self.first + ROUNDS * self.round or (passes > 1 and late)

    def seconds(self) -> float:
        """Of a pass: the median over the rounds; over single passes after the first where they are not complete."""
        rounds = np.diff(self.times[self.first :: self.round]) / self.round
        passes = np.diff(self.times)
        return float(np.median(rounds if len(rounds) >= ROUNDS else passes[1:] if len(passes) > 1 else passes))
