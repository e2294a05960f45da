"""What `sweep --search` does: Optuna proposes the settings, and each trial is a normal run of the sweep.

Workers share the journal OUTPUT/search.log, on any machine that sees the folder. A trial belongs to the process that
holds its lock; one that nobody holds was killed, and goes on in the same run.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from accelerate import PartialState
from filelock import Timeout

from rescom_timm.analysis.writing import pictures
from rescom_timm.api import train_recipe
from rescom_timm.cli.parts.sweep import Cell, finished, left_out, remember, split
from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.engine.errors import FAILURES
from rescom_timm.engine.run_folder import lines
from rescom_timm.errors import InputError, MissingPackageError
from rescom_timm.hub.publish import Publisher
from rescom_timm.io import file_lock

if TYPE_CHECKING:
    from optuna import Study, Trial

JOURNAL = "search.log"
RANGE = re.compile(r"([^:,\s]+):([^:,\s]+?)(:log)?")
AGAIN = "again"
"""User attribute of a trial that goes on with the run of a killed one."""


@dataclass(frozen=True)
class Range:
    """The values of a key between two bounds."""

    low: float
    high: float
    log: bool
    whole: bool
    """Whether the key takes whole numbers alone."""

    def suggest(self, trial: Trial, key: str) -> str:
        """A value of the key, as an override writes it."""
        if self.whole:
            return str(trial.suggest_int(key, int(self.low), int(self.high), log=self.log))
        return f"{trial.suggest_float(key, self.low, self.high, log=self.log):.6g}"


@dataclass(frozen=True)
class Space:
    """A recipe, and what is searched: ranges and choices of keys."""

    recipe: str
    presets: tuple[str, ...]
    fixed: tuple[tuple[str, str], ...]
    searched: tuple[tuple[str, Range | tuple[str, ...]], ...]
    seed: int

    def cell(self, values: Sequence[tuple[str, str]]) -> Cell:
        """The run of a trial."""
        overrides = tuple(f"{key}={value}" for key, value in (*self.fixed, *values))
        return Cell(self.recipe, self.presets, tuple(values), overrides, self.seed)

    def suggest(self, trial: Trial) -> Cell:
        """The run that a trial proposes."""
        values = [
            (key, way.suggest(trial, key) if isinstance(way, Range) else str(trial.suggest_categorical(key, way)))
            for key, way in self.searched
        ]
        return self.cell(values)


def space_of(recipe: str, presets: Sequence[str], settings: Sequence[str], seed: int, output: Path) -> Space:
    """The space of KEY=LOW:HIGH, KEY=LOW:HIGH:log and KEY=A,B,C; a key with one value is fixed.

    Raises InputError (usage.arguments) for a range that cannot be searched, and RecipeError where the recipe refuses a
    bound or a choice, or has no validation images to judge by.
    """
    given = dict(setting.split("=", 1) for setting in settings)
    fixed = [(key, value) for key, value in given.items() if not RANGE.fullmatch(value) and len(split(value)) == 1]
    bare = Space(recipe, tuple(presets), tuple(fixed), (), seed)
    searched: list[tuple[str, Range | tuple[str, ...]]] = []
    for key, value in given.items():
        if found := RANGE.fullmatch(value):
            searched.append((key, _range(bare, key, value, found, output)))
        elif len(choices := tuple(split(value))) > 1:
            for choice in choices:
                bare.cell([(key, choice)]).load(output)
            searched.append((key, choices))
    if not searched:
        raise InputError(
            "usage.arguments", "--search needs keys to search, such as optimizer.lr=1e-4:1e-1:log or train.epochs=5,10"
        )
    if bare.cell([]).load(output).data.validation == "none":
        raise RecipeError(
            "recipe.conflict", "--search judges by validation images: give some, such as data.validation=holdout(0.1)"
        )
    return Space(recipe, tuple(presets), tuple(fixed), tuple(searched), seed)


def _range(bare: Space, key: str, text: str, found: re.Match[str], output: Path) -> Range:
    try:
        low, high = float(found[1]), float(found[2])
    except ValueError:
        raise InputError("usage.arguments", f"{key}={text}: a range is LOW:HIGH or LOW:HIGH:log, of numbers") from None
    log = found[3] is not None
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)):
        raise InputError(
            "usage.arguments", f"{key}={text}: LOW must be below HIGH{', and above 0 for log' if log else ''}"
        )
    for bound in (found[1], found[2]):
        bare.cell([(key, bound)]).load(output)
    try:
        bare.cell([(key, repr(math.floor((low + high) / 2) + 0.5))]).load(output)
        whole = False
    except RecipeError:
        whole = low.is_integer() and high.is_integer()
    return Range(low, high, log, whole)


class Reporter(Publisher):
    """Tells Optuna the validation metric of each evaluation, and ends a trial that falls behind the others."""

    def __init__(self, trial: Trial, by: str, pruned: type[Exception]) -> None:
        super().__init__(pictures)
        self.trial, self.by, self.pruned = trial, by, pruned

    def evaluated(self, epoch: int, figures: dict[str, dict[str, float]]) -> None:
        """Raises TrialPruned."""
        if (value := figures.get("validation", {}).get(self.by)) is not None:
            self.trial.report(value, epoch)
            if self.trial.should_prune():
                raise self.pruned


class Search:
    """One worker of a search."""

    def __init__(self, space: Space, number: int, by: str, output: Path, lean: bool = False) -> None:
        """number: of trials in all, of all workers. by: the validation metric to maximise.

        Raises MissingPackageError without optuna, InputError where the folder holds another search.
        """
        if PartialState().num_processes > 1:
            raise InputError(
                "train.distributed", "--search takes one process: start the same command once on each GPU or machine"
            )
        self.optuna = _optuna()
        self.space, self.number, self.by, self.output, self.lean = space, number, by, output, lean
        output.mkdir(parents=True, exist_ok=True)
        with file_lock(output / ".search.lock"):
            self.study = self._study()

    def _study(self) -> Study:
        optuna, journal = self.optuna, self.optuna.storages.journal
        file = str(self.output / JOURNAL)
        backend = journal.JournalFileBackend(file, journal.JournalFileOpenLock(file))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend), study_name="sweep", direction="maximize",
            load_if_exists=True, pruner=optuna.pruners.MedianPruner(),
        )  # fmt: skip
        space = repr((self.space, self.by))
        if study.user_attrs.get("space", space) != space:
            raise InputError(
                "run.output", f"{self.output} holds a search of other keys, ranges, seed or --by: give another --output"
            )
        study.set_user_attr("space", space)
        return study

    def run(self) -> list[str]:
        """Train trials until there are enough; returns the errors. Raises Stopped: the same command goes on."""
        errors: list[str] = []
        while True:
            with ExitStack() as owned:
                if (found := self._next(owned)) is None:
                    return errors
                errors += self._train(*found)

    def _next(self, owned: ExitStack) -> tuple[Trial, Cell] | None:
        """The next trial, whose lock `owned` holds; a killed one first. None where there are enough."""
        state = self.optuna.trial.TrialState
        with file_lock(self.output / ".search.lock"):
            for one in self.study.get_trials(states=(state.RUNNING,)):
                with suppress(Timeout), file_lock(self._lock(one.number), timeout=0):
                    self.study.tell(one.number, state=state.FAIL)
                    self.study.enqueue_trial(one.params, user_attrs={AGAIN: one.number})
            trials = self.study.get_trials()
            begun = sum(AGAIN not in one.user_attrs for one in trials)
            if begun >= self.number and not any(one.state == state.WAITING for one in trials):
                return None
            self.study.sampler = self.optuna.samplers.TPESampler(seed=10**6 * self.space.seed + len(trials))
            trial = self.study.ask()
            owned.enter_context(file_lock(self._lock(trial.number)))
            owned.callback(self._lock(trial.number).unlink, missing_ok=True)
            return trial, self.space.suggest(trial)

    def _lock(self, number: int) -> Path:
        return self.output / f".trial-{number}.lock"

    def _train(self, trial: Trial, cell: Cell) -> list[str]:
        """Train a trial; returns its error."""
        state = self.optuna.trial.TrialState
        remember([cell], self.output)
        print(f"[trial {trial.number + 1}] {cell.name}", flush=True)
        try:
            recipe = cell.load(self.output)
            if not finished(recipe):
                train_recipe(recipe, True, follower=Reporter(trial, self.by, self.optuna.TrialPruned))
            self.study.tell(trial, judged(recipe, self.by))
        except self.optuna.TrialPruned:
            self.study.tell(trial, state=state.PRUNED)
            print(f"{cell.name}: ended, below the median of the trials before it", flush=True)
        except FAILURES as error:
            self.study.tell(trial, state=state.FAIL)
            line = left_out(cell, error)
            print(line, file=sys.stderr, flush=True)
            return [line]
        if self.lean:
            shutil.rmtree(recipe.folder / "checkpoints", ignore_errors=True)
        return []


def judged(recipe: Recipe, by: str) -> float:
    """The last validation metric of a trained run."""
    values = [line[f"validation/{by}"] for line in lines(recipe.folder / "metrics.jsonl") if f"validation/{by}" in line]
    return float(values[-1])


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError(
            "system.package", "--search needs optuna: pip install 'rescom-timm[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
