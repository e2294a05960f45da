"""glibc keeps freed memory for the next step instead of returning it to the system.

A training step on a CPU allocates and frees the same large tensors. By default glibc unmaps them, and the next step
takes a page fault for each of their pages (51,000 to 67,000 a step of ResNet-32).
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, malloc.h."""
TRIM, MMAP = 2**31 - 1, 2**25
"""Bytes: free memory above which glibc returns it, and size from which a block is mapped by itself (its largest)."""
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables by which a user sets the allocator; with one of them nothing is changed."""

thresholds: dict[str, int] = {}
"""What keep_freed_memory has set in this process."""


def keep_freed_memory() -> None:
    """Raise glibc's thresholds for the rest of the process, which then holds the memory of its largest step.

    Without effect on other C libraries and where the environment sets the allocator. No computed number depends on it.
    """
    if thresholds or platform.libc_ver()[0] != "glibc" or any(map(os.environ.get, OWN)):
        return
    mallopt = ctypes.CDLL(None).mallopt
    for name, parameter, value in (("trim", M_TRIM_THRESHOLD, TRIM), ("mmap", M_MMAP_THRESHOLD, MMAP)):
        if mallopt(parameter, value) == 1:
            thresholds[name] = value
