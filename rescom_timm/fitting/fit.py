"""`fit`: from images and minutes to a run."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from accelerate.utils import patch_environment

from rescom_timm.config.loading import load_dict
from rescom_timm.data.in_memory import InMemory, in_memory
from rescom_timm.engine.errors import AGAIN, FAILURES, CheckpointError, with_advice
from rescom_timm.engine.run_folder import existing, locked
from rescom_timm.errors import InputError
from rescom_timm.fitting.inventory import SEEN
from rescom_timm.fitting.plan import FitOptions
from rescom_timm.fitting.record import FILE, FOLDER, Record
from rescom_timm.fitting.source import name_of
from rescom_timm.fitting.steps import Steps
from rescom_timm.fitting.tasks import work
from rescom_timm.fitting.workers import Workers, follow, free, independent


def fit(
    options: FitOptions, output: str | Path | None = None, dataset: InMemory | None = None, used: float = 0.0,
    join: bool = False,
) -> Path:  # fmt: skip
    """Fit, or go on with a fit that was interrupted; returns the run's folder.

    output: the run's folder; None: the first of runs/NAME, NAME-2 ... that is free or of the same unfinished command.
    dataset: the images of the source "memory". used: seconds of the minutes that are gone. join: work beside the
    process that works there, if one does; the processes of one launch always do. Raises InputError, what reading the
    data raises, Interrupted, and KeyboardInterrupt in a process that joined.
    """
    started = independent()
    run = _folder(options, output)
    folder = run / FOLDER
    with _advised(), in_memory(dataset), ExitStack() as stack:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if options.device == "cpu":
            stack.enter_context(patch_environment(ACCELERATE_USE_CPU="1"))
        while not _leads(folder, stack, join or started > 1):
            if follow(folder, lambda: bool(Record(run, options).values["finished"]), work):
                print(f"finished by the process that leads it; run folder: {run}")
                return run
            print("the process that led this fit has ended: another one leads")
            if (folder / FILE).exists():  # the time since the leader's last word counts
                used, started = max(0.0, time.time() - (folder / FILE).stat().st_mtime), 1
        record = Record(run, options, used)
        try:
            steps = Steps(options, run, record, Workers(folder, started))
            if record.values["finished"]:
                print(f"{run} is finished; name another folder with -o for a new fit")
            else:
                steps.run()
        except FAILURES:
            if "frozen" not in record.values:  # nothing is done yet: other options and images may be tried
                for name in (FILE, *SEEN):
                    (folder / name).unlink(missing_ok=True)
                if new:
                    stack.callback(_removed, run)
            raise
    return run


def _removed(run: Path) -> None:
    """Remove the folder of a fit that has not begun."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds something else
        run.rmdir()


def _leads(folder: Path, stack: ExitStack, join: bool) -> bool:
    """Whether this process has locked RUN/fit, and so leads; else it may join the one that has."""
    try:
        if join:
            free(folder / JOINED)  # raises where the disk has no locks
        stack.enter_context(locked(folder))
    except CheckpointError as error:
        if not join or error.code != "run.locked":
            raise
        print(f"{str(error).partition(': ')[0]}; this process takes a part of the work", flush=True)
        return False
    return True


JOINED = ".join.lock"
"""In RUN/fit, to try whether its disk has locks."""
GO_ON = "then start the same command again, which goes on"
ADVICE = {
    AGAIN: GO_ON,
    "then finish with --resume": GO_ON,
    "wait for it or stop it, or start another run without --resume": (
        "add --join to be one more worker of it, or fit into another folder with -o"
    ),
    "start another run without --resume": "fit into another folder with -o",
}
"""What the errors of a training advise, and what they advise in a fit, which has no --resume."""


@contextlib.contextmanager
def _advised() -> Iterator[None]:
    try:
        with with_advice(f"; {GO_ON}"):
            yield
    except CheckpointError as error:
        text = str(error)
        for old, new in ADVICE.items():
            text = text.replace(old, new)
        raise type(error)(error.code, text) from error


def _folder(options: FitOptions, output: str | Path | None) -> Path:
    if output is not None:
        folder = Path(output).expanduser()
        if folder.exists() and not (folder / FOLDER).is_dir() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError("file.exists", f"{folder} is there and no fit is in it: name another folder with -o")
        return folder
    recipe = load_dict({"data": {"source": "digits"}, "name": name_of(options.source)})
    for folder in existing(recipe):
        if (folder / FOLDER).is_dir() or not any(folder.iterdir()):
            with contextlib.suppress(InputError):
                if not Record(folder, options).values["finished"]:
                    return folder
    number = len(existing(recipe)) + 1
    return recipe.folder.with_name(f"{recipe.folder.name}-{number}") if number > 1 else recipe.folder
