"""The one training loop, on Accelerate: the same recipe on a CPU, one GPU or many.

`Trainer.fit` is the loop: what an epoch does, in order. What surrounds it has files of its own: prepare.py (loaders,
the net on its devices), step.py (passes and updates: accumulated, captured, undone), state.py (saving and restoring),
run_folder.py, stop_signals.py, nonfinite.py (a loss that is NaN), step_metrics.py (reading a loss late), errors.py.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import numpy as np
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from tqdm import tqdm

from rescom_timm.config.loading import refuse_secrets
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.device_transforms import complete
from rescom_timm.data.loaders import set_epoch
from rescom_timm.data.mixing import mix
from rescom_timm.data.samples import Batch
from rescom_timm.data.sources import Data, load
from rescom_timm.engine import checkpoint, collapse, errors, nonfinite
from rescom_timm.engine.build import First, build_method, build_optimizer, build_schedule, speed_up
from rescom_timm.engine.checkpoint import SavedState
from rescom_timm.engine.errors import CheckpointError, NonFiniteLoss, Stopped, one_line, raise_everywhere, with_advice
from rescom_timm.engine.evaluate import about, evaluate, file_name, table_of, title, write
from rescom_timm.engine.features import loader_of, on_disk, read_features
from rescom_timm.engine.fit_batch import fitted
from rescom_timm.engine.follower import Follower
from rescom_timm.engine.launch import launch, leave, refuse_what_cannot_be_sharded
from rescom_timm.engine.log import Log, epoch_line, evaluation_line, peak_memory, progress_bar, show, trained_line
from rescom_timm.engine.logits import Keeper
from rescom_timm.engine.own import NOTHING, Own
from rescom_timm.engine.prepare import (
    average_of,
    check_image_size,
    check_images,
    check_selection,
    class_feature_sums,
    settled,
    to_device,
    training_loader,
    with_memory_format,
)
from rescom_timm.engine.run_folder import Resume, lines, newest_of_all, open_folder
from rescom_timm.engine.sam import SamStep
from rescom_timm.engine.state import Progress, State, check_resumable
from rescom_timm.engine.step import TrainingStep
from rescom_timm.engine.step_metrics import MetricsQueue, StepMetrics
from rescom_timm.engine.stop_signals import StopSignals
from rescom_timm.methods import Method
from rescom_timm.methods.distillation import Teacher
from rescom_timm.metrics import QUICK_DRAWS, Meter
from rescom_timm.models.classifiers import start_from_means
from rescom_timm.models.trainable import count_weights

SPLITS = ("test", "validation")
"""What a training evaluates on, where there is such a split."""
EVALUATION_CACHE = 32
"""Megabytes of a split's images that stay decoded: the test images of CIFAR fit."""


def train(
    recipe: Recipe, resume: Resume = False, follower: Follower | None = None, teacher: Teacher | None = None,
    first: First | None = None, splits: Sequence[str] = SPLITS, own: Own = NOTHING,
) -> Path:  # fmt: skip
    """Train, evaluate and save as the recipe says; returns the run's folder.

    resume: go on from the newest whole checkpoint of this run's folder, or, with True, of the last run of the recipe's
    name; start if there is none. A run elsewhere is brought here first.
    teacher: whom method.teacher names. first: as build_method's. splits: of the data, those that are evaluated. own:
    metrics and callbacks. Raises RecipeError, CheckpointError, NonFiniteLoss, Stopped, and what fetching a run does.
    """
    with with_advice():
        trainer = prepared(recipe, resume, follower, teacher, first, splits, own)
        try:
            trainer.open(resume)
            trainer.fit()
            trainer.finish()
        finally:
            trainer.close()
        if trainer.main:
            trainer.follower.closed()
        return trainer.folder


def prepared(
    recipe: Recipe, resume: Resume = False, follower: Follower | None = None, teacher: Teacher | None = None,
    first: First | None = None, splits: Sequence[str] = SPLITS, own: Own = NOTHING,
) -> Trainer:  # fmt: skip
    """The trainer that `train` opens, fits and closes; nothing is written yet. Arguments and errors as of `train`."""
    refuse_secrets(recipe)
    accelerator = launch(recipe)
    set_seed(recipe.seed)
    data = load(recipe.data)
    recipe = fitted(settled(recipe, data, resume), accelerator, data, resume)
    method = build_method(recipe, data, start=True, teacher=teacher, first=first)
    recipe = with_memory_format(recipe, method.net, accelerator, resume)
    set_seed(recipe.seed, device_specific=True)  # the weights are the same everywhere, dropout is not
    return Trainer(recipe, accelerator, data, method, follower, splits, own)


class Trainer:
    """The training loop of one run: prepare, open, fit, finish, close."""

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, data: Data, method: Method, follower: Follower | None = None,
        splits: Sequence[str] = SPLITS, own: Own = NOTHING,
    ) -> None:  # fmt: skip
        self.recipe, self.accelerator, self.data, self.method = recipe, accelerator, data, method
        self.own = replace(own, select=recipe.evaluation.select)
        self.follower, self.main, self.folder = follower or Follower(), accelerator.is_main_process, recipe.folder
        self.log: Log | None = None
        self.signals, self.metrics = StopSignals(), MetricsQueue(accelerator)
        self.signals.unsaved = self.several = accelerator.num_processes > 1
        self.lock = ExitStack()
        refuse_what_cannot_be_sharded(accelerator, recipe, method)
        check_selection(recipe, data, own.metrics)
        found = {"test": None if recipe.evaluation.hide_test else data.test, "validation": data.validation}
        self.splits = {name: split for name, split in found.items() if name in splits and split is not None}
        check_images(accelerator, recipe, data.train, self.splits)
        loader = training_loader(recipe, data, method)
        self.completed = complete(loader, recipe.views, recipe.loader, accelerator.device)
        self.steps_per_epoch = len(loader) // recipe.train.accumulate
        optimizer = build_optimizer(recipe.optimizer, method.net)
        self.schedule = build_schedule(
            recipe.schedule, optimizer, recipe.optimizer.lr, recipe.train.epochs, self.steps_per_epoch
        )
        self.weights = count_weights(method.net)
        batch = recipe.train.batch_size
        self.trained = trained_line(self.weights, len(data.train.rows), self.steps_per_epoch, batch)
        self.net = method.net  # as it is under what prepare wraps around it
        to_device(accelerator, recipe, method)
        check_image_size(method, recipe, data.train, accelerator)
        self.average = average_of(self.net, recipe.train.ema) if recipe.train.ema is not None else None
        self.nets = {"raw": self.net} | ({"ema": self.average.module} if self.average is not None else {})
        method.net, self.optimizer, self.loader = accelerator.prepare(method.net, optimizer, loader)
        if (momentum := method.momentum_net) is not None:  # its keys in the precision of the queries
            speed_up(momentum.copy, replace(recipe.speed, compile=False))
            momentum.copy = accelerator.prepare_model(momentum.copy, evaluation_mode=True)
        self.state = State(accelerator, method, self.net, self.optimizer, recipe, self.nets.get("ema"))
        step = TrainingStep if recipe.optimizer.sam is None else SamStep
        self.step = step(self.state, recipe, self.average)
        if self.state.sharded:
            register_fsdp_forward_method(self.net, "classify")

    @cached_property
    def eval_loaders(self) -> dict[str, DataLoader[Batch]]:
        """Of each split, by its name; small images stay decoded from one evaluation to the next."""
        cache = min(self.recipe.speed.cache, EVALUATION_CACHE)
        return {name: loader_of(self.accelerator, self.recipe, split, cache) for name, split in self.splits.items()}

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.state.progress

    @property
    def limits(self) -> tuple[int, int]:
        """Classes with fewer images than the first are few, with more than the second many."""
        return self.recipe.evaluation.group_limits

    # ---------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Train to the last epoch. Raises Stopped, after saving, where a signal asked for it."""
        recipe, progress, images = self.recipe, self.progress, self.recipe.train.batch_size
        total = recipe.train.epochs * self.steps_per_epoch * images
        with self.signals.unstuck(self._stopped), progress_bar(total, progress.step * images, self.main) as bar:
            if progress.unevaluated:
                with self._saving_on_failure():
                    self._evaluate(bar)
                self.save()
            while not progress.ended(recipe):
                stop = self._epoch(bar)
                if progress.epoch == recipe.train.epochs or progress.epoch % recipe.evaluation.every == 0:
                    with self._saving_on_failure():
                        self._evaluate(bar)
                last = progress.ended(recipe)
                best = progress.best_epoch == progress.epoch
                if stop and not last:
                    raise self._stopped()
                if last or best or progress.epoch % recipe.checkpoint.every == 0:
                    self.save()
        if not recipe.train.epochs:
            self.save()

    def _epoch(self, bar: tqdm[NoReturn]) -> bool:
        """One epoch, or what is left of it; moves progress to the start of the next. Returns whether to stop there."""
        recipe, progress = self.recipe, self.progress
        accumulate = recipe.train.accumulate
        self.start_epoch()
        skip = progress.step_in_epoch * accumulate
        loader = skip_first_batches(self.loader, skip) if skip else self.loader
        started, first_step = time.monotonic(), progress.step
        metrics = self.metrics = MetricsQueue(self.accelerator, self.step.lag)
        stop, finite = False, True
        for index, batch in enumerate(self.completed(loader), start=skip):
            if index >= self.steps_per_epoch * accumulate:
                continue  # the rest of the epoch is less than one batch of the recipe
            last = (index + 1) % accumulate == 0
            self.schedule.step_update(progress.step)
            self.signals.unsaved = True
            outputs = self.step(self.mixed(batch, index), last)
            metrics.push(outputs, batch["row"], self.signals.requested, progress.epoch, progress.step)
            for one in metrics.ready():
                finite &= self._count(one)
                stop |= one.stop
            if not last:
                continue
            if not self.step.finish(finite):
                progress.skipped += 1
            finite, self.signals.unsaved = True, self.several
            progress.step += 1
            progress.step_in_epoch += 1
            show(bar, f"{progress.epoch + 1}/{recipe.train.epochs}", progress.sums, progress.passes)
            bar.update(recipe.train.batch_size)
            if stop and progress.step_in_epoch < self.steps_per_epoch:
                progress.seconds += time.monotonic() - started
                raise self._stopped()
        for one in metrics.drain():
            self._count(one)
            stop |= one.stop
        seconds = time.monotonic() - started
        self._close_epoch(seconds, (progress.step - first_step) * recipe.train.batch_size / max(seconds, 1e-9), bar)
        return stop

    def start_epoch(self) -> None:
        """Set learning rate, method and data order of the epoch."""
        epoch = self.progress.epoch
        self.schedule.step(epoch)
        self.step.start_epoch(epoch)
        set_epoch(self.loader, epoch)

    def mixed(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """Return the batch of pass `index` of the epoch, mixed if the recipe asks for it."""
        if not self.recipe.mix.on:
            return batch
        where = (self.recipe.seed, self.progress.epoch, index, self.accelerator.process_index)
        return mix(batch, self.recipe.mix, np.random.default_rng(where), self.net.normalize)

    def _count(self, metrics: StepMetrics) -> bool:
        """Add a pass's metrics to the epoch's means; whether they were finite. Raises NonFiniteLoss unless skipped."""
        if not nonfinite.is_finite(metrics):
            lr, skip = self.optimizer.param_groups[0]["lr"], self.recipe.train.nonfinite == "skip"
            nonfinite.report(metrics, lr, self.folder, self.accelerator.process_index, skip)
            return False
        self.progress.count(metrics.figures)
        return True

    def _close_epoch(self, seconds: float, images_per_second: float, bar: tqdm[NoReturn]) -> None:
        progress = self.progress
        if not progress.passes:
            raise NonFiniteLoss(
                "train.nonfinite", f"no batch of epoch {progress.epoch} had a finite loss; nothing was saved of it"
            )
        skipped = {"train/skipped": float(progress.skipped)} if progress.skipped else {}
        means = progress.close_epoch(seconds)
        lr = self.optimizer.param_groups[0]["lr"]
        logged = {f"train/{name}": value for name, value in means.items()}
        pace = {"images_per_second": images_per_second, "seconds": progress.seconds}
        if self.accelerator.device.type == "cuda":
            pace["memory_gib"] = peak_memory() / 2**30
        self._write(logged | skipped | {"lr": lr} | pace)
        self.own.call("on_epoch_end", progress.epoch, logged | {"lr": lr})
        show(bar, f"{progress.epoch}/{self.recipe.train.epochs}", means, 1)
        if self.main and bar.disable:  # a log: one line an epoch, which nothing is drawn over
            left = progress.seconds / progress.step * (self.recipe.train.epochs * self.steps_per_epoch - progress.step)
            epochs = f"{progress.epoch}/{self.recipe.train.epochs}"
            print(epoch_line(epochs, means, images_per_second, progress.seconds, left), flush=True)

    def _stopped(self) -> Stopped:
        """Save, and say so; a run that was asked to stop stops where it cannot save too."""
        where = f"asked to stop in epoch {self.progress.epoch} after step {self.progress.step}"
        if self.signals.stuck and self.signals.unsaved:
            return Stopped(f"{where}, which is not saved, for no batch came: continue with --resume")
        try:
            for one in self.metrics.drain():
                self._count(one)
            self.save()
        except (CheckpointError, NonFiniteLoss) as error:
            return Stopped(f"{where}, which is not saved: {error}")
        return Stopped(f"{where}; all is saved in {self.folder}: continue with --resume")

    # ---------------------------------------------------------------- evaluation

    @contextmanager
    def _saving_on_failure(self) -> Iterator[None]:
        """Save if an evaluation fails; not with several processes, of which one may fail alone."""
        try:
            yield
        except Exception:
            if self.accelerator.num_processes == 1:
                self.progress.unevaluated = True
                self.save()
            raise

    def _evaluate(self, bar: tqdm[NoReturn]) -> None:
        meters: dict[str, Meter] = {}
        for weights, net in self.nets.items():
            for split, loader in self.eval_loaders.items():
                name = split if weights == "raw" else f"{split}_{weights}"
                meters[name] = evaluate(self.accelerator, net, loader, self.data.counts, self.limits, own=self.own)
        figures = {name: meter.compute() for name, meter in meters.items()}
        self._write(
            {f"{split}/{k}": v for split, values in figures.items() for k, v in values.items()}
            | collapse.cosines(self.state.queues)
        )
        progress = self.progress
        progress.unevaluated = False
        if "validation" in figures:
            progress.scored(figures["validation"][self.recipe.evaluation.select])
        if self.main:
            self.follower.evaluated(progress.epoch, figures)
        self.own.call("on_evaluate", progress.epoch, figures)
        if self.main and bar.disable and figures:
            intervals = {name: meter.intervals(draws=QUICK_DRAWS) for name, meter in meters.items()}
            bar.write(evaluation_line(progress.epoch, figures, intervals))
        elif self.main and figures and not progress.ended(self.recipe):  # the last table is `finish`'s
            bar.write(f"after epoch {progress.epoch}\n{table_of(meters, QUICK_DRAWS)}")

    def finish(self) -> None:
        """Evaluate the last and the best checkpoint and write the results; the follower may export and push."""
        progress, trouble = self.progress, None
        origin = None if self.recipe.train.epochs else self.recipe.origin
        results = self._final("last", origin or f"last epoch ({progress.epoch}), not selected")
        best = progress.best_checkpoint
        if best is not None and best != f"step-{progress.step:08d}":
            try:
                net, state = checkpoint.load(self.folder / "checkpoints" / best)
                self.state.load_weights(net, state.get("average"))
                chosen = f"epoch {progress.best_epoch}, best {self.recipe.evaluation.select} on validation"
                results |= self._final("best", chosen)
            except CheckpointError as error:
                warnings.warn(f"the best checkpoint cannot be read, the last is exported: {error}", stacklevel=2)
        if self.main:
            if results:
                print(table_of(results))
            try:
                self.follower.finished(f"step-{progress.step:08d}", best)
            except Exception as error:  # whatever it is, the training is done and saved: no traceback
                trouble = CheckpointError(
                    "run.export",
                    f"{self.folder} is trained and saved, but its model could not be exported: {one_line(error)}: "
                    f"{errors.advice(error) or 'repair that'}, then finish with --resume",
                )
            if self.log is not None:
                self.log.finished(
                    {name: meter.compute() for name, meter in results.items()}, self.follower.pictures, progress.step
                )
        raise_everywhere(trouble)

    def _final(self, name: str, chosen: str) -> dict[str, Meter]:
        rows = {}
        for weights, net in self.nets.items():
            for split, loader in self.eval_loaders.items():
                keeper = Keeper(len(self.splits[split].labels), len(self.data.counts)) if self.main else None
                meter = evaluate(self.accelerator, net, loader, self.data.counts, self.limits, keeper, self.own)
                record = about(self.splits[split], name, chosen, self.data.class_names, weights)
                if self.main:
                    write(self.folder, file_name(split, name, weights), meter, record, keeper)
                rows[title(record)] = meter
        return rows

    # ---------------------------------------------------------------- the run's folder

    def open(self, resume: Resume) -> None:
        """Choose the run's folder, go on from its newest checkpoint if asked to, and start the log and the signals."""
        self.signals.listen()
        self.folder = open_folder(self.recipe, resume, self.lock)
        before = newest_of_all(self.folder) if resume else None
        if before is not None:
            self._restore(*before)
        elif self.recipe.net.classifier.init == "class_means":
            sums = class_feature_sums(self.accelerator, self.recipe, self.data, self.net)
            start_from_means(self.net.classifier, sums.to(self.accelerator.device))
        elif self.method.fits_head:
            shape = (len(self.data.train.rows), 2, int(self.net.classifier.in_features))
            with TemporaryFile(dir=self.folder) as file:
                values = on_disk(file, shape)
                found = read_features(self.accelerator, self.net, self.recipe, self.data.train, True, values)
                self.method.fit_head(found.rows())
        if before is None and self.average is not None:
            self.average.set(self.net)
        if self.main:
            processes = self.accelerator.num_processes
            record = {"processes": processes, "weights": self.weights, "data": self.data.provenance}
            self.log = Log(self.folder, self.recipe, record, self.progress.step, not self.progress.unevaluated)
            self.follower.opened(self.folder, self.recipe, self.data)
            nothing = ", no checkpoint to resume from: starting from the beginning" if resume else ""
            print(f"run folder: {self.folder}" + (f", resumed from {before[0].name}" if before else nothing))
            print(self.trained, flush=True)

    def _restore(self, path: Path, weights: dict[str, Tensor], state: SavedState) -> None:
        with checkpoint.consistent(path):
            names = checkpoint.class_names(path, state)
            check_resumable(path, state["recipe"], state["index"], self.recipe, self.data, self.folder, names)
        self.state.restore(path, weights, state)

    def save(self) -> None:
        """A checkpoint of this moment, written by the main process.

        Raises CheckpointError, in all processes, where the disk does not take it, and NonFiniteLoss where a weight is
        not finite.
        """
        trouble: Exception | None = None
        try:
            written = self.state.save(self.folder / "checkpoints", self.recipe, self.data)
            if written is not None:
                self.follower.saved(written, self.progress.best_checkpoint)
        except (CheckpointError, NonFiniteLoss) as error:
            trouble = error
        raise_everywhere(trouble)

    def _write(self, figures: dict[str, float]) -> None:
        if self.log is None:
            return
        try:
            self.log.write(self.progress.epoch, self.progress.step, figures)
        except OSError as error:
            raise errors.unwritten("the log", error) from error
        collapse.warn(lines(self.log.path), self.recipe.schedule.warmup_epochs, self.recipe.method.remedy)

    def close(self) -> None:
        """Close the log and the handlers, and release the run folder."""
        if self.log is not None:
            self.log.close()
        self.signals.close()
        self.lock.close()
        leave(self.accelerator)
