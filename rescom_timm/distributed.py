"""Processes that train together: how many there are, and rows of tensors from all of them. Imports torch only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) if nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(tensor: Tensor) -> Tensor:
    """Gather the rows of every process, in rank order: (B, ...) -> (processes * B, ...).

    Every process needs the same B. Gradients flow back to the process that the rows came from, summed over all
    processes' losses, as DistributedDataParallel (which averages) expects of a loss that is a mean over each process's
    own queries.
    """
    return _Gather.apply(tensor) if processes()[1] > 1 else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(tensor) for _ in range(processes()[1])]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        rank, world = processes()
        return grad.chunk(world)[rank]
