"""`fit`: from images and minutes to a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from accelerate.utils import patch_environment

from rescom_timm.config.loading import load_dict
from rescom_timm.data.in_memory import InMemory, in_memory
from rescom_timm.engine.errors import AGAIN, CheckpointError, with_advice
from rescom_timm.engine.run_folder import existing, locked
from rescom_timm.errors import InputError
from rescom_timm.fitting.plan import FitOptions
from rescom_timm.fitting.record import FOLDER, Record
from rescom_timm.fitting.source import name_of
from rescom_timm.fitting.steps import Steps


def fit(
    options: FitOptions, output: str | Path | None = None, dataset: InMemory | None = None, used: float = 0.0
) -> Path:
    """Fit, or go on with a fit that was interrupted; returns the run's folder.

    output: the run's folder; None: the first of runs/NAME, NAME-2 ... that is free or of the same unfinished
    command.
    dataset: the images of the source "memory". used: seconds of the minutes that are gone. Raises InputError, what
    reading the data raises, and Interrupted.
    """
    folder = _folder(options, output)
    with _advised(), in_memory(dataset), ExitStack() as stack:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder / FOLDER))
        if options.device == "cpu":
            stack.enter_context(patch_environment(ACCELERATE_USE_CPU="1"))
        record = Record(folder, options, used)
        steps = Steps(options, folder, record)
        if record.values["finished"]:
            print(f"{folder} is finished; name another folder with -o for a new fit")
        else:
            steps.run()
    return folder


GO_ON = "then start the same command again, which goes on"
ADVICE = {
    AGAIN: GO_ON,
    "then finish with --resume": GO_ON,
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
        if (folder / FOLDER).is_dir():
            with contextlib.suppress(InputError):
                if not Record(folder, options).values["finished"]:
                    return folder
    number = len(existing(recipe)) + 1
    return recipe.folder.with_name(f"{recipe.folder.name}-{number}") if number > 1 else recipe.folder
