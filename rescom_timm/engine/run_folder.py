"""A run's folder: which one a training takes, that no other training writes into it, and the recipe in it."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import psutil
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import Timeout
from torch import Tensor

from rescom_timm.config.loading import load, load_dict
from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.engine import checkpoint
from rescom_timm.engine.errors import FAILURES, CheckpointError, advice, raise_everywhere
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.io import clear_leftovers, file_lock, read_json, read_text, refuse_links, write_json

LOCK, OWNER = checkpoint.LOCK, ".lock.json"
FOLDERS = ("checkpoints", "evaluation", "figures", "hub", "model", "tensorboard")
"""Folders of a run folder that we write to."""
CHANGED = "-changed-"
"""In the name of an evaluation that is not the run's own: of other data, or of overrides that change what is read."""
MARKS = ("recipe.yaml", "metrics.jsonl", "evaluation", "checkpoints")
"""A run folder has at least one of these."""
Line: TypeAlias = dict[str, float]
"""A line of metrics.jsonl: epoch, step and named metrics."""
PATIENCE = 10.0
"""Seconds to wait for a lock whose owner is gone: the workers of a killed run hold it until they exit."""


def existing(recipe: Recipe) -> list[Path]:
    """The folders name, name-2, name-3 ... that are there, oldest first."""
    first, found = recipe.folder, []
    folder = first
    while folder.exists():
        found.append(folder)
        folder = first.with_name(f"{first.name}-{len(found) + 1}")
    return found


def resumed(recipe: Recipe, resume: bool | Path) -> Recipe | None:
    """The recipe of the run on this machine that will be resumed; None where there is no checkpoint to resume from."""
    folders = [resume] if isinstance(resume, Path) else existing(recipe) if resume else []
    if folders and checkpoint.listed(folders[-1] / "checkpoints"):
        return run_recipe(folders[-1])
    return None


def check_place(recipe: Recipe) -> None:
    """Raises RecipeError where the run's folder cannot be made."""
    parent = Path(os.path.abspath(recipe.folder.parent))
    there = next(folder for folder in (parent, *parent.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise RecipeError("run.output", f"output: {there} is no folder, so {parent} cannot hold runs: name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError("run.output", f"output: {there} is not writable, so {parent} cannot hold runs: name another")


def make(recipe: Recipe) -> Path:
    """A new folder: the first of name, name-2, name-3 ... that is free. Raises RecipeError where none can be made."""
    check_place(recipe)
    try:
        recipe.folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            number = len(existing(recipe)) + 1
            folder = recipe.folder.with_name(f"{recipe.folder.name}-{number}") if number > 1 else recipe.folder
            try:
                folder.mkdir()  # one start alone succeeds in it
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        todo = f": {advice(error)}" if advice(error) else ""
        raise RecipeError("run.output", f"output: the run's folder cannot be made: {error}{todo}") from error


def same_run(run: Path, theirs: Sequence[Line]) -> bool:
    """Whether a folder holds the run of which `theirs` are lines of metrics.jsonl.

    One log begins with the other, to the seconds, which no two runs share.
    """
    ours = lines(run / "metrics.jsonl")
    both = min(len(ours), len(theirs))
    return both > 0 and ours[:both] == list(theirs[:both])


class RunElsewhere(ABC):
    """A run that is not on this machine, such as on the Hub, to resume. str() of it is its address."""

    @abstractmethod
    def lines(self) -> list[Line]:
        """Of its metrics.jsonl; empty where it has none."""

    @abstractmethod
    def fetch(self, folder: Path) -> None:
        """Download its newest and best checkpoint, and the log up to it, into a run's folder that is not as far."""


Resume = bool | Path | RunElsewhere
"""Whether to resume a run: with the last of the recipe's name (True), or the one in a folder or elsewhere."""


def choose_folder(recipe: Recipe, resume: Resume) -> Path:
    """A new folder; to resume, the last of the recipe's name, the one named, or the one of the run elsewhere.

    Raises CheckpointError if the one named does not exist, RecipeError if none can be made.
    """
    there = existing(recipe)
    if isinstance(resume, Path):
        if not resume.is_dir():
            raise CheckpointError("run.missing", f"no run folder {resume} to resume")
        return resume
    if isinstance(resume, RunElsewhere):
        theirs = resume.lines()
        same = [folder for folder in there if same_run(folder, theirs)]
        folder = same[-1] if same else make(recipe)
        if there and not same:
            print(f"{there[-1]} is another run than {resume}, which is downloaded into {folder}")
        return folder
    return there[-1] if resume and there else make(recipe)


def open_folder(recipe: Recipe, resume: Resume, lock: ExitStack) -> Path:
    """The run's folder, the same in all processes, locked while `lock` is open, with what a run elsewhere has."""
    trouble: Exception | None = None
    folder = recipe.folder
    if PartialState().is_main_process:
        try:
            folder = choose_folder(recipe, resume)
            lock.enter_context(locked(folder))
            if isinstance(resume, RunElsewhere):
                resume.fetch(folder)
        except FAILURES as error:
            trouble = error
    raise_everywhere(trouble)
    return Path(broadcast_object_list([folder])[0])


def newest_of_all(folder: Path) -> tuple[Path, dict[str, Tensor], checkpoint.SavedState] | None:
    """checkpoint.newest of a run's folder.

    Raises CheckpointError where the processes see different ones, and for a trained run that has none left: to start it
    from the beginning would overwrite its evaluation and its model.
    """
    before = checkpoint.newest(folder / "checkpoints")
    if before is None and (folder / "model").is_dir() and (folder / "evaluation" / "test-last.json").is_file():
        raise CheckpointError(
            "checkpoint.missing",
            f"{folder} is finished and has no checkpoints, so it cannot be resumed: start another run without "
            "--resume, or remove that folder",
        )
    seen = gather_object([before[0].name if before else "none"])
    if len(set(seen)) > 1:
        raise CheckpointError(
            "run.not_shared",
            f"the processes see different checkpoints in {folder} ({', '.join(seen)}): "
            "put the run's folder on a disk that all machines share (output=...)",
        )
    return before


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """The folder is this process's to write to, while the block runs.

    Raises CheckpointError, naming who has it, and ValueError where something in it is a link out of it.
    """
    refuse_links(run, FOLDERS)
    end = time.monotonic() + PATIENCE
    with ExitStack() as held:
        while True:
            try:
                if not held.enter_context(file_lock(run / LOCK, timeout=0)):
                    yield
                    return
                break
            except Timeout:
                owner = _owner(run)
                if _lives(owner) or time.monotonic() > end:
                    raise CheckpointError(
                        "run.locked",
                        f"{run} is being trained by {_describe(owner)}: wait for it or stop it, or start another run "
                        "without --resume",
                    ) from None
                time.sleep(0.2)
        try:
            checkpoint.repair(run / "checkpoints")
            for folder in (run, *(run / name for name in FOLDERS)):
                clear_leftovers(folder)
            own = {"host": socket.gethostname(), "process": os.getpid(), "created": psutil.Process().create_time()}
            write_json(run / OWNER, own | {"since": time.strftime("%Y-%m-%d %H:%M:%S")})
            yield
        finally:
            (run / OWNER).unlink(missing_ok=True)


def _owner(run: Path) -> dict[str, Any]:
    try:
        return dict(read_json(run / OWNER))
    except (OSError, ValueError):
        return {}


def _lives(owner: dict[str, Any]) -> bool:
    try:
        return owner["host"] == socket.gethostname() and (
            psutil.Process(owner["process"]).create_time() == owner["created"]
        )
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}"


def check_run(path: str | Path) -> Path:
    """The folder of a run. Raises FileNotFoundError where nothing is there, ValueError for what is no run's folder."""
    path = Path(path)
    if not path.exists():
        there = Path("runs") / path
        hint = (
            f"did you mean {there}?" if there.is_dir() else "name the folder that training printed, such as runs/NAME"
        )
        raise MissingFileError("run.missing", f"no run folder {path}: {hint}")
    if not path.is_dir():
        raise InputError("run.missing", f"{path} is no run folder: it is a file")
    if not any((path / mark).exists() for mark in MARKS):
        within = sorted(str(one.parent) for one in path.glob("*/recipe.yaml"))
        hint = f"; did you mean {', '.join(within[:3])}?" if within else ""
        raise InputError("run.missing", f"{path} is no run folder: it holds none of {', '.join(MARKS)}{hint}")
    return path


def run_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run's folder, changed by key=value; of its newest checkpoint where recipe.yaml is damaged.

    Raises FileNotFoundError or ValueError where the folder is no run's, RecipeError where neither can be read, or for
    the overrides, and CheckpointError where every checkpoint is damaged.
    """
    path = check_run(run) / "recipe.yaml"
    try:
        load(path)
    except RecipeError as error:
        found = checkpoint.newest(run / "checkpoints")
        if found is None:
            raise
        warnings.warn(f"{error}; using the recipe in {found[0]}", stacklevel=2)
        return load_dict(found[2]["recipe"], f"the recipe in {found[0]}", overrides)
    return load(path, overrides)


def class_names(run: Path) -> list[str] | None:
    """The names (K,) of the classes that a run was trained on; None where it has no classes.json, or a damaged one."""
    try:
        names = read_json(run / "classes.json").get("class_names")
    except (OSError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def lines(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl, each with its epoch and step; empty if there is no file.

    Incomplete lines are skipped, with a warning unless it is the last (a crash leaves one).
    """
    found: list[Line] = []
    texts = read_text(path, errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            whole = isinstance(line, dict) and all(type(line.get(key, 0)) is int for key in ("epoch", "step"))
        except (ValueError, RecursionError):
            whole = False
        if whole:
            found.append(line)
        elif number < len(texts):
            warnings.warn(f"{path}: line {number} is damaged and skipped: {text[:60]!r}", stacklevel=2)
    return found
