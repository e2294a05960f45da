"""Several processes that work on one fit, on this machine or on others that see its folder.

One of them leads: it goes through the steps and posts what can be done beside it as RUN/fit/tasks/NAME.json. A task
belongs to the process that holds NAME.lock; its result is NAME.done. The system frees the lock of a process that ends,
and then another process does the task.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from filelock import Timeout

from rescom_timm.engine.launch import STARTED
from rescom_timm.engine.run_folder import LOCK
from rescom_timm.errors import InputError
from rescom_timm.io import file_lock, read_json, write_json

TASKS, WORKERS = "tasks", "workers"
"""Folders in RUN/fit."""
POLL = 0.5
"""Seconds between two looks at tasks and results."""
STARTING = 60.0
"""Seconds that the leader waits for the other processes of its launch."""

T = TypeVar("T", bound=Mapping[str, object])


def independent() -> int:
    """Make this process of a launch one that works by itself, on its own GPU; returns how many were started.

    Raises InputError where the processes have formed a group.
    """
    if dist.is_available() and dist.is_initialized():
        raise InputError("train.distributed", "fit takes processes that form no group: start it with accelerate launch")
    started = max(int(os.environ.get(name) or 1) for name in STARTED)
    if started > 1:
        if devices := torch.cuda.device_count():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
            place = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % devices]
        for name in ("RANK", "LOCAL_RANK", *STARTED):
            os.environ.pop(name, None)
    return started


class Workers:
    """The processes of a fit, as its leader sees them."""

    def __init__(self, folder: Path, started: int = 1) -> None:
        """folder: RUN/fit. started: processes of this launch, which are waited for."""
        self.folder, self.tasks = folder, folder / TASKS
        self.tasks.mkdir(exist_ok=True)
        end = time.monotonic() + STARTING
        while self.number() < started and time.monotonic() < end:
            time.sleep(POLL)

    def number(self) -> int:
        """How many there are now, with the leader."""
        return 1 + sum(not free(path) for path in (self.folder / WORKERS).glob("*.lock"))

    def post(self, name: str, task: Mapping[str, object]) -> None:
        """Let any worker do a task."""
        write_json(self.tasks / f"{name}.json", dict(task))

    def result(self, name: str, work: Callable[[], T], waits: Callable[[], bool]) -> T | None:
        """The result of a task, done here by `work` unless another worker has it.

        Then it is waited for as long as `waits` is true, and None afterwards.
        """
        while (found := done_once(self.tasks / f"{name}.json", work)) is None and waits():
            time.sleep(POLL)
        return found


def follow(folder: Path, finished: Callable[[], bool], work: Callable[[Path], Mapping[str, object]]) -> bool:
    """Do the tasks of a fit until it is finished (True) or nobody leads it (False).

    folder: RUN/fit. work: does the task in a file.
    """
    with _present(folder):
        while not finished():
            if free(folder / LOCK):
                return False
            tasks = [path for path in sorted((folder / TASKS).glob("*.json")) if not _result(path).exists()]
            if not any(_done(path, work) for path in tasks):
                time.sleep(POLL)
    return True


def _done(task: Path, work: Callable[[Path], T]) -> T | None:
    """As done_once; None too where the leader clears the task away meanwhile."""
    try:
        return done_once(task, lambda: work(task))
    except FileNotFoundError:
        if task.exists():
            raise
        return None


def done_once(task: Path, work: Callable[[], T]) -> T | None:
    """The result of a task, which `work` makes where there is none; None where another process does it, or has."""
    if not _result(task).exists():
        with ExitStack() as owned:
            try:
                owned.enter_context(file_lock(task.with_suffix(".lock"), timeout=0))
            except Timeout:
                return None
            if not _result(task).exists() and task.exists():
                found = work()
                if task.exists():
                    write_json(_result(task), dict(found))
                return found
    try:
        found = read_json(_result(task))
    except FileNotFoundError:  # done, and cleared away by the leader
        return None
    return found


def free(lock: Path) -> bool:
    """Whether no process holds a lock. Raises InputError where the disk has no locks."""
    try:
        with file_lock(lock, timeout=0) as held:
            if not held:
                raise InputError("fit.argument", f"--join needs file locks, which the disk of {lock.parent} has not")
            return True
    except Timeout:
        return False


def _result(task: Path) -> Path:
    return task.with_suffix(".done")


@contextmanager
def _present(folder: Path) -> Iterator[None]:
    """This process is one of the workers during the block."""
    (folder / WORKERS).mkdir(exist_ok=True)
    path = folder / WORKERS / f"{socket.gethostname()}-{os.getpid()}.lock"
    with file_lock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
