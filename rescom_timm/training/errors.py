"""What a run may fail with, and how an error is told."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import broadcast_object_list

from rescom_timm.recipe.config import RecipeError
from rescom_timm.recipe.private import without_secrets


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what to do, and no token."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


class NonFiniteLoss(RunError):
    """The loss became NaN or infinite; the message names the step and where its rows are saved."""


class Stopped(RuntimeError):
    """A signal asked the run to stop; its state is saved."""


FAILURES = (RunError, ValueError, OSError)
"""What a run may fail with whose message is enough: recipe, data, disk, network or numbers."""

AGAIN = "then continue with --resume, from the last checkpoint"


@contextmanager
def with_advice() -> Iterator[None]:
    """What the machine lacks, as an error that says what to do.

    Raises RecipeError where a GPU's memory is full, CheckpointError for a full disk or a lost worker of a loader.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            f"the GPU's memory is full ({str(error).partition('. ')[0]}): raise train.accumulate, which cuts the same "
            f"batch into parts (train.fit_batch finds how many), or lower evaluation.batch_size; {AGAIN}"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(f"{error}: free disk space (or name another folder with output=...), {AGAIN}") from error
    except RuntimeError as error:
        if not worker_was_lost(error):
            raise
        raise CheckpointError(f"{one_line(error)}; {AGAIN}") from error


def raise_everywhere(trouble: Exception | None) -> None:
    """Raises the main process's trouble in every process, so that none waits for one that has left."""
    trouble = broadcast_object_list([trouble])[0]
    if trouble is not None:
        raise trouble


def one_line(error: BaseException) -> str:
    """An error's name and message, in one line; of one that a loader's worker sends, without the worker's traceback."""
    text = without_secrets(str(error))
    if worker_was_lost(error):
        return (
            f"{type(error).__name__}: a data loading worker was killed, most likely because memory ran out "
            f"({text.splitlines()[0]}): use fewer speed.workers, or less speed.prefetch or speed.cache"
        )
    return text.strip().splitlines()[-1] if "Original Traceback" in text else f"{type(error).__name__}: {text}"


def worker_was_lost(error: BaseException) -> bool:
    """Whether torch says that a worker process of a loader is gone."""
    lost = r"DataLoader worker \(pid.*(is killed by|exited unexpectedly)"
    return isinstance(error, RuntimeError) and re.search(lost, str(error)) is not None
