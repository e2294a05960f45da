"""Metrics of each forward pass, which the host reads late, so that it never waits for the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

LAG = 2
"""Forward passes after which the host reads a loss."""


@dataclass
class StepMetrics:
    """What the host reads of one forward pass."""

    epoch: int
    step: int
    rows: Tensor
    figures: dict[str, float]
    stop: bool


class MetricsQueue:
    """The metrics of each forward pass, and whether a process was asked to stop.

    Agreed by all processes, and read `lag` passes late, so that the host never waits for the device.
    """

    def __init__(self, accelerator: Accelerator, lag: int = LAG) -> None:
        self.accelerator, self.lag = accelerator, lag
        self.waiting: deque[tuple[int, int, Tensor, list[str], Tensor, Any]] = deque()

    def push(self, outputs: dict[str, Tensor], rows: Tensor, stop: bool, epoch: int, step: int) -> None:
        """outputs: scalars on the device."""
        values = [*(value.detach().float() for value in outputs.values()), outputs["loss"].new_full((), float(stop))]
        host = self.accelerator.reduce(torch.stack(values), "mean").to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if rows.is_cuda else None
        if copied is not None:
            copied.record()
        self.waiting.append((epoch, step, rows, list(outputs), host, copied))

    def ready(self) -> list[StepMetrics]:
        """Those that are `lag` passes old."""
        return [self._read() for _ in range(len(self.waiting) - self.lag)]

    def drain(self) -> list[StepMetrics]:
        """All that are left."""
        return [self._read() for _ in range(len(self.waiting))]

    def _read(self) -> StepMetrics:
        epoch, step, rows, names, host, copied = self.waiting.popleft()
        if copied is not None:
            copied.synchronize()
        *figures, stop = host.tolist()
        return StepMetrics(epoch, step, rows, dict(zip(names, figures, strict=True)), stop > 0)
