"""How many worker processes fit into the machine's shared memory.

Workers pass batches through /dev/shm, which has 64 MB by default in a container. If it is full, a worker loses its
batch and the loader waits for it forever.
"""

from __future__ import annotations

import os
import warnings
from typing import TypedDict

from rescom_timm.text import counted

PLACE = "/dev/shm"
TIMEOUT = 600.0
"""Seconds to wait for a batch; slow disks need less."""
SPARE = 2
"""Batches beside those ahead: the one in use, and the one that accelerate looks ahead to."""


class WorkerOptions(TypedDict, total=False):
    """Arguments of a torch DataLoader."""

    num_workers: int
    prefetch_factor: int
    timeout: float


def free_bytes() -> int | None:
    """Free shared memory; None if the system has no such limit (macOS, Windows)."""
    try:
        about = os.statvfs(PLACE)
    except (OSError, AttributeError):
        return None
    return about.f_bavail * about.f_frsize


def worker_options(
    workers: int, prefetch: int, batch_bytes: int, together: int = 1, timeout: float = TIMEOUT
) -> WorkerOptions:
    """num_workers, prefetch_factor and timeout (seconds per batch) of a torch DataLoader, limited by `fitting`."""
    workers, prefetch = fitting(workers, prefetch, batch_bytes, together)
    if not workers:
        return {"num_workers": 0}
    return {"num_workers": workers, "prefetch_factor": prefetch, "timeout": timeout}


def fitting(workers: int, prefetch: int, batch_bytes: int, together: int = 1) -> tuple[int, int]:
    """The largest (workers, prefetch) whose batches fit into free shared memory.

    First fewer batches ahead, then fewer workers, down to 0, which needs none; a warning if that is less than asked
    for. batch_bytes: of one batch. together: loaders that run at the same time.
    """
    free = free_bytes()
    if not workers or free is None:
        return workers, prefetch

    def needed(workers: int, prefetch: int) -> int:
        return together * (workers * prefetch + SPARE) * batch_bytes

    ways = [(workers, ahead) for ahead in range(prefetch, 0, -1)] + [(fewer, 1) for fewer in range(workers - 1, 0, -1)]
    found = next((way for way in ways if needed(*way) <= free), (0, prefetch))
    if found != (workers, prefetch):
        used = f"{counted(found[0], 'worker')} with speed.prefetch={found[1]}" if found[0] else "no workers"
        warnings.warn(
            f"{PLACE} has {free / 2**20:,.0f} MiB of shared memory free, and {counted(workers, 'worker')} with "
            f"{counted(prefetch, 'batch')} of {batch_bytes / 2**20:,.1f} MiB would need "
            f"{needed(workers, prefetch) / 2**20:,.0f}: using {used}; enlarge it "
            "(docker run --shm-size=8g, or --ipc=host), or lower speed.workers",
            stacklevel=3,
        )
    return found
