"""Steps whose loss is NaN or infinite: the rows of the batch are kept, and the run stops or leaves the batch out."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

from torch import Tensor, nn

from rescom_timm.engine.errors import NonFiniteLoss
from rescom_timm.engine.step_metrics import StepMetrics
from rescom_timm.io import write_json


def is_finite(metrics: StepMetrics) -> bool:
    """Whether every metric of a batch is finite."""
    return all(map(math.isfinite, metrics.figures.values()))


def report(metrics: StepMetrics, lr: float, folder: Path, process: int, skip: bool) -> None:
    """Keep the rows of a batch whose metrics are not finite. Raises NonFiniteLoss, or warns if it is skipped."""
    record = {"epoch": metrics.epoch, "step": metrics.step, "lr": lr, "rows": metrics.rows.tolist()}
    path = folder / f"nonfinite-step{metrics.step}-process{process}.json"
    write_json(path, record, indent=None)
    what = (
        f"the loss is not finite in epoch {metrics.epoch}, step {metrics.step} (learning rate {lr:g}, "
        f"{metrics.figures}). The rows of that batch are in {path}"
    )
    if not skip:
        raise NonFiniteLoss(
            "train.nonfinite",
            f"{what}; nothing was saved after it. Lower optimizer.lr, set optimizer.clip_norm or raise "
            "schedule.warmup_epochs and start again, or leave such batches out: train.nonfinite=skip --resume",
        )
    warnings.warn(f"{what}; the batch is left out (train.nonfinite: skip)", RuntimeWarning, stacklevel=2)


def copy_buffers(method: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's statistics and the queue, to put back if the next step is left out."""
    return {name: buffer.clone() for name, buffer in method.named_buffers()}


def put_back(method: nn.Module, before: dict[str, Tensor]) -> None:
    """Buffers as they were before the batch that is left out."""
    for name, buffer in method.named_buffers():
        buffer.copy_(before[name])
