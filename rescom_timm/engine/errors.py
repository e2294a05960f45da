"""Errors of a run, and how the command line prints them."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import broadcast_object_list

from rescom_timm.config.recipe import RecipeError
from rescom_timm.config.secrets import without_secrets
from rescom_timm.errors import CodedError, code_of


class RunError(CodedError, RuntimeError):
    """A run that cannot continue. The message says why and what to do; secrets are removed from it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, without_secrets(message))


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


class MachineError(CheckpointError):
    """The machine refused a file or lost a process; the message says what to do."""


class NonFiniteLoss(RunError):
    """The loss became NaN or infinite; the message names the step and where its rows are saved."""


class Stopped(RuntimeError):
    """A signal asked the run to stop; its state is saved."""


FAILURES = (RunError, ValueError, OSError)
"""Errors of a run that need no traceback: recipe, data, disk, network or numbers."""

AGAIN = "then continue with --resume, from the last checkpoint"
FULL = "free disk space (or name a folder on another disk)"
_RIGHTS = "give this user read and write permission there, or name another folder"
_DISK = "the disk or its connection fails: repair it, or name a folder on another disk"
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: f"the quota is used up: {FULL}",
    errno.EFBIG: "the file is too large for ulimit -f or the file system: raise the limit, or name another folder",
    errno.EROFS: "the disk is read-only: make it writable, or name a folder on another disk",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENOTCONN: _DISK,
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n 65536)",
    errno.ENFILE: "too many files are open on this machine: close other programs",
}
"""What to do when the system refuses a file, by errno."""


def advice(error: BaseException | None) -> str:
    """What to do about an OSError, or one that the error was raised from; empty if unknown."""
    while error is not None:
        number = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors
        if known := ADVICE.get(int(number[1]) if number else getattr(error, "errno", None) or 0):
            return known
        error = error.__cause__
    return ""


def unwritten(what: str, error: BaseException, more: str = "") -> MachineError:
    """The error for a file of a run that could not be written."""
    reason = re.sub(r"^Error while serializing: (I/O error: )?| \(os error \d+\)$", "", str(error))  # of safetensors
    todo = advice(error) or "check that the run's folder exists (was it moved or removed?) and is writable"
    return MachineError(
        "file.failed", f"{what} could not be written: {reason}.{more} {todo[0].upper()}{todo[1:]}, {AGAIN}"
    )


@contextmanager
def with_advice(again: str = f"; {AGAIN}") -> Iterator[None]:
    """Re-raise errors of the machine with what to do. again: the end of the message.

    Raises RecipeError where a GPU's memory is full, MachineError for a disk that refuses a file, a lost worker of a
    loader, or a lost process of several.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        try:
            advised = _advised(error, again)
        except RuntimeError as late:  # torch reports a lost worker at any point of the process, also here
            advised = _advised(late, again)
        if advised is None:
            raise
        raise advised from error


def _advised(error: Exception, again: str) -> CodedError | None:
    """The error with what to do; None if there is no advice."""
    if isinstance(error, torch.OutOfMemoryError):
        return RecipeError(
            "train.memory",
            f"GPU out of memory ({str(error).partition('. ')[0]}): increase train.accumulate to split the batch "
            f"(train.fit_batch finds the value), or lower evaluation.batch_size{again}",
        )
    if worker_was_lost(error) or process_was_lost(error) or loader_timed_out(error):
        return MachineError("system.process", f"{one_line(error).partition(': ')[2]}{again}")
    if isinstance(error, OSError) and advice(error):
        return MachineError(code_of(error), f"{error}: {advice(error)}{again}")
    return None


def raise_everywhere(trouble: Exception | None) -> None:
    """Raise the main process's error in every process, so that none waits for it."""
    trouble = broadcast_object_list([trouble])[0]
    if trouble is not None:
        raise trouble


def one_line(error: BaseException) -> str:
    """An error's name and message, in one line; of one that a loader's worker sends, without the worker's traceback."""
    text, name = without_secrets(str(error)), type(error).__name__
    first = (text.splitlines() or [name])[0]
    if worker_was_lost(error):
        return (
            f"{name}: a data loading worker was killed, most likely because memory ran out ({first}): "
            "use fewer speed.workers, or less speed.prefetch or speed.cache"
        )
    if loader_timed_out(error):
        return (
            f"{name}: no batch came from the data loading workers ({first}): the disk hangs, shared memory (/dev/shm) "
            "is full, or a batch takes longer than speed.timeout; try speed.workers=0"
        )
    if process_was_lost(error):
        return (
            f"{name}: another process of this training is gone: it says why itself, or was killed, most likely "
            f"because memory ran out ({first.partition('. ')[0]})"
        )
    return text.strip().splitlines()[-1] if "Original Traceback" in text else f"{name}: {text}"


def message(error: BaseException) -> str:
    """An error as a command prints it: without its name and the system's number of it."""
    text = re.sub(rf"^([\w.]+\.)?{type(error).__name__}: ", "", one_line(error))
    text = re.sub(r"\[Errno (None|-?\d+)\] ", "", text)
    return text or ("memory is full" if isinstance(error, MemoryError) else type(error).__name__)


def worker_was_lost(error: BaseException) -> bool:
    """Whether torch says that a worker process of a loader is gone, or that it is shows as a tensor is asked of it."""
    asked = (
        isinstance(error, OSError | EOFError)
        and not advice(error)
        and any(frame.name == "rebuild_storage_fd" for frame in traceback.extract_tb(error.__traceback__))
    )
    return asked or _torch_says(error, r"DataLoader worker \(pid.*(is killed by|exited unexpectedly)")


def loader_timed_out(error: BaseException) -> bool:
    """Whether torch says that no batch came within a loader's timeout."""
    return _torch_says(error, "DataLoader timed out after")


def process_was_lost(error: BaseException) -> bool:
    """Whether gloo, NCCL or their store say that another process of the training is gone."""
    return _torch_says(
        error, "Connection (reset|closed|refused)|Broken pipe|ncclRemoteError|Timed out waiting|recvValue failed"
    )


def _torch_says(error: BaseException, pattern: str) -> bool:
    ours = isinstance(error, RunError) or not isinstance(error, RuntimeError)
    return not ours and re.search(pattern, str(error)) is not None
