"""Metrics and callbacks of the caller of `rescom_timm.train`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from rescom_timm.data.samples import random_state_kept
from rescom_timm.distributed import processes
from rescom_timm.engine.errors import AGAIN, RunError, one_line, raise_everywhere
from rescom_timm.errors import InputError
from rescom_timm.metrics import Meter

Metric = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], float]
"""Labels (N,) and probabilities (N, K) of an evaluation to a number."""
HOOKS = ("on_epoch_end", "on_evaluate")
WORST = "worst_class"
"""The accuracy of the worst class that has images, reported where evaluation.select names it."""
RESERVED = re.compile(rf"top\d+|(many|medium|few)(_mean_class)?|mean_class|ece|invalid|{WORST}")


@dataclass(frozen=True)
class Own:
    """metrics: by name, larger is better where evaluation.select names one. callbacks: objects with a method of HOOKS.

    on_epoch_end(epoch, metrics) gets the means of the epoch by name, on_evaluate(epoch, figures) those of each split.
    They run in the main process, and may draw random numbers without a change to the training. Raises InputError
    (train.metric, train.callback) for names, functions and objects that cannot be used.
    """

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    callbacks: Sequence[object] = ()
    select: str = "top1"
    """evaluation.select of the recipe."""

    def __post_init__(self) -> None:
        for name, function in self.metrics.items():
            if not re.fullmatch(r"[A-Za-z]\w{0,39}", str(name), re.ASCII) or RESERVED.fullmatch(name):
                message = f"metrics: {name!r} must be letters, digits and _, and not a name that evaluation uses itself"
                raise InputError("train.metric", message)
            if not callable(function):
                raise InputError("train.metric", f"metrics: {name!r} must be a function of labels and probabilities")
        for one in self.callbacks:
            if not any(callable(getattr(one, hook, None)) for hook in HOOKS):
                raise InputError(
                    "train.callback", f"callbacks: {type(one).__name__} has no method {' or '.join(HOOKS)}"
                )

    def call(self, hook: str, epoch: int, values: Mapping[str, object]) -> None:
        """Call this hook of every callback. Raises RunError (train.callback), in all processes, if one raises."""
        trouble = None
        if processes()[0] == 0:
            for one in self.callbacks:
                try:
                    with random_state_kept():
                        getattr(one, hook, _nothing)(epoch, dict(values))
                except Exception as error:
                    where = f"{type(one).__name__}.{hook} after epoch {epoch}"
                    trouble = RunError("train.callback", f"{where} raised {one_line(error)}: repair it, {AGAIN}")
                    trouble.__cause__ = error
                    break
        if self.callbacks:
            raise_everywhere(trouble)

    def collector(self) -> Collector | None:
        """What takes the logits of an evaluation; None if no metric needs them."""
        return Collector() if self.metrics else None

    def add_to(self, meter: Meter, collector: Collector | None) -> None:
        """Add the metrics to those of the meter. Raises RunError (train.metric) if one raises or is not finite."""
        if self.select == WORST:
            accuracy = meter.per_class()["accuracy"]
            meter.own[WORST] = float(accuracy[~accuracy.isnan()].min())
        if collector is None:
            return
        found: list[object] = [None]
        if processes()[0] == 0:
            found = [self._computed(*collector.arrays())]
        (result,) = broadcast_object_list(found)
        if isinstance(result, Exception):
            raise result
        meter.own |= result

    def _computed(self, labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32]) -> object:
        """The metrics, or the error of one of them."""
        values = {}
        for name, function in self.metrics.items():
            try:
                with random_state_kept():
                    values[name] = float(function(labels, probabilities))
            except Exception as error:
                trouble = RunError("train.metric", f"metric {name!r} raised {one_line(error)}: repair it, {AGAIN}")
                trouble.__cause__ = error
                return trouble
            if not math.isfinite(values[name]):
                return RunError("train.metric", f"metric {name!r} is {values[name]}: return a finite number, {AGAIN}")
        return values


NOTHING = Own()
"""No metrics and no callbacks."""


class Collector:
    """Labels and probabilities of an evaluation, 4 bytes an image and class."""

    def __init__(self) -> None:
        self.labels: list[Tensor] = []
        self.probabilities: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add the logits (n, K) and labels (n,) of a batch."""
        self.labels.append(labels.cpu().long())
        self.probabilities.append(logits.detach().float().softmax(dim=1).cpu())

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """(N,) and (N, K), read-only: every metric gets the same."""
        found = torch.cat(self.labels).numpy(), torch.cat(self.probabilities).numpy()
        for array in found:
            array.flags.writeable = False
        return found


def _nothing(epoch: int, values: Mapping[str, object]) -> None:
    """In place of a hook that a callback does not have."""
