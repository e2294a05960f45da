"""The one training loop, on Accelerate: the same recipe on a CPU, one GPU or many.

`Trainer.fit` is the loop: what an epoch does, in order. What surrounds it has files of its own: prepare.py (loaders,
the net on its devices), state.py (saving and restoring), run_folder.py (which folder), stop_signals.py, nonfinite.py (a
loss that is NaN), step_metrics.py (reading a loss late), errors.py.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from tqdm import tqdm

from rescom_timm.data.device_views import complete
from rescom_timm.data.loaders import set_epoch
from rescom_timm.data.sources import Data, load
from rescom_timm.methods import Method, call_if_defined
from rescom_timm.methods.distillation import Teacher
from rescom_timm.nets.classifiers import start_from_means
from rescom_timm.nets.trainable import trained_fraction
from rescom_timm.recipe.config import Recipe, RecipeError
from rescom_timm.training import checkpoint, nonfinite
from rescom_timm.training.build import build_method, build_optimizer, build_schedule, speed_up
from rescom_timm.training.captured_step import CapturedStep
from rescom_timm.training.errors import FAILURES, CheckpointError, NonFiniteLoss, Stopped, one_line, with_advice
from rescom_timm.training.evaluate import about, evaluate, table, title, write
from rescom_timm.training.follower import Follower
from rescom_timm.training.launch import launch, refuse_what_cannot_be_sharded
from rescom_timm.training.log import Log, epoch_line
from rescom_timm.training.prepare import (
    check_image_size,
    check_images,
    check_selection,
    class_feature_sums,
    evaluation_loaders,
    to_device,
    training_loader,
)
from rescom_timm.training.run_folder import RunElsewhere, check_place, choose_folder, locked
from rescom_timm.training.state import Progress, State, check_resumable
from rescom_timm.training.step_metrics import LAG, MetricsQueue, StepMetrics
from rescom_timm.training.stop_signals import StopSignals

Resume = bool | Path | RunElsewhere
"""Whether to resume a run: with the last of the recipe's name (True), or the one in a folder or elsewhere."""


def train(
    recipe: Recipe, resume: Resume = False, dry_run: bool = False, follower: Follower | None = None,
    teacher: Teacher | None = None,
) -> Path:  # fmt: skip
    """Train, evaluate and save as the recipe says; returns the run's folder.

    resume: go on from the newest whole checkpoint of this run's folder, or, with True, of the last run of the recipe's
    name; start where there is none. A run elsewhere is brought here first.
    dry_run: build everything, do one step and one evaluation batch, write nothing. teacher: whom method.teacher names.
    Raises RecipeError, CheckpointError, NonFiniteLoss, Stopped, and what fetching a run elsewhere does.
    """
    with with_advice():
        accelerator = launch(recipe)
        set_seed(recipe.seed)
        data = load(recipe.data)
        method = build_method(recipe, data, start=True, teacher=teacher)
        set_seed(recipe.seed, device_specific=True)  # the weights are the same everywhere, dropout is not
        trainer = Trainer(recipe, accelerator, data, method, follower)
        if dry_run:
            trainer.dry_run()
            return trainer.folder
        try:
            trainer.open(resume)
            trainer.fit()
            trainer.finish()
        finally:
            trainer.close()
        if trainer.main:
            trainer.follower.closed()
        return trainer.folder


class Trainer:
    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, data: Data, method: Method, follower: Follower | None = None
    ) -> None:
        self.recipe, self.accelerator, self.data, self.method = recipe, accelerator, data, method
        self.follower, self.main, self.folder = follower or Follower(), accelerator.is_main_process, recipe.folder
        self.log: Log | None = None
        self.signals = StopSignals()
        self.lock = ExitStack()
        refuse_what_cannot_be_sharded(accelerator, recipe, method)
        loader = training_loader(recipe, data, method)
        self.completed = complete(loader, recipe.views, recipe.loader, accelerator.device)
        self.steps_per_epoch = len(loader) // recipe.train.accumulate
        optimizer = build_optimizer(recipe.optimizer, method.net)
        self.schedule = build_schedule(recipe.schedule, optimizer, recipe.optimizer.lr, recipe.train.epochs)
        size = sum(parameter.numel() for parameter in method.net.parameters())
        self.trained = f"{100 * trained_fraction(method.net):.1f}% of {size / 1e6:.2f} M weights train"
        self.net = method.net  # as it is under what prepare wraps around it
        to_device(accelerator, recipe, method)
        check_image_size(method, recipe, data.train, accelerator.device)
        method.net, self.optimizer, self.loader = accelerator.prepare(method.net, optimizer, loader)
        if (momentum := getattr(method, "momentum_net", None)) is not None:  # its keys in the precision of the queries
            speed_up(momentum.copy, replace(recipe.speed, compile=False))
            momentum.copy = accelerator.prepare_model(momentum.copy, evaluation_mode=True)
        self.state = State(accelerator, method, self.net, self.optimizer, recipe)
        self.captured: CapturedStep | None = None
        if recipe.speed.capture:
            if accelerator.num_processes > 1 or self.state.sharded:
                raise RecipeError("speed.capture is for one process that is not sharded; turn it off")
            self.captured = CapturedStep(self._step, self.optimizer, accelerator.device)
        if self.state.sharded and recipe.net.classifier.init == "class_means":
            raise RecipeError("net.classifier.init: class_means does not work with FSDP; start from random")
        if self.state.sharded:
            register_fsdp_forward_method(self.net, "classify")
        check_selection(recipe, data)
        splits = {"test": data.test, "validation": data.validation}
        self.splits = {name: split for name, split in splits.items() if split is not None}
        check_images(accelerator, recipe, self.splits)
        self.eval_loaders = evaluation_loaders(accelerator, recipe, self.splits)

    @property
    def progress(self) -> Progress:
        return self.state.progress

    # ---------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Train to the last epoch. Raises Stopped, after saving, where a signal asked for it."""
        recipe, images = self.recipe, self.recipe.train.batch_size
        bar = tqdm(
            total=recipe.train.epochs * self.steps_per_epoch * images, initial=self.progress.step * images, unit="img",
            unit_scale=True, smoothing=0.05, disable=not (self.main and sys.stderr.isatty()), mininterval=0.5,
        )  # fmt: skip
        with bar:
            progress = self.progress
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

    def _epoch(self, bar: Any) -> bool:
        """One epoch, or what is left of it; moves progress to the start of the next. Returns whether to stop there."""
        recipe, progress = self.recipe, self.progress
        accumulate, skips = recipe.train.accumulate, recipe.train.nonfinite == "skip"
        self._start_epoch()
        skip = progress.step_in_epoch * accumulate
        loader = skip_first_batches(self.loader, skip) if skip else self.loader
        started, first_step = time.monotonic(), progress.step
        metrics = MetricsQueue(self.accelerator, lag=0 if skips else LAG)
        stop, finite, before = False, True, {}
        for index, batch in enumerate(self.completed(loader), start=skip):
            if index >= self.steps_per_epoch * accumulate:
                continue  # the rest of the epoch is less than one batch of the recipe
            if skips and index % accumulate == 0:
                before = nonfinite.copy_buffers(self.method)
            last = (index + 1) % accumulate == 0
            outputs = self._forward_backward(batch, last) if self.captured is None else self.captured(batch)
            metrics.push(outputs, batch["row"], self.signals.requested, progress.epoch, progress.step)
            for one in metrics.ready():
                finite &= self._count(one)
                stop |= one.stop
            if not last:
                continue
            if self.captured is None and not self._update(finite):
                nonfinite.put_back(self.method, before)
                progress.skipped += 1
            finite = True
            progress.step += 1
            progress.step_in_epoch += 1
            bar.update(recipe.train.batch_size)
            if stop and progress.step_in_epoch < self.steps_per_epoch:
                for one in metrics.drain():
                    self._count(one)
                progress.seconds += time.monotonic() - started
                raise self._stopped()
        for one in metrics.drain():
            self._count(one)
            stop |= one.stop
        seconds = time.monotonic() - started
        self._close_epoch(seconds, (progress.step - first_step) * recipe.train.batch_size / max(seconds, 1e-9), bar)
        return stop

    def _start_epoch(self) -> None:
        """Learning rate, method and data order of the epoch."""
        epoch = self.progress.epoch
        self.schedule.step(epoch)
        self.method.train()
        call_if_defined(self.method, "set_epoch", epoch, self.recipe.train.epochs)
        if self.captured is not None and hasattr(self.method, "set_epoch"):
            self.captured.forget()
        set_epoch(self.loader, epoch)

    def _forward_backward(self, batch: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """Scalars of a forward pass, its gradients added to the others of the step, of which it may be the last."""
        accumulate = self.recipe.train.accumulate
        for queue in self.state.queues:
            queue.holding = not last  # keys of a step are never its own pairs
        with nullcontext() if last else self.accelerator.no_sync(self.method.net):
            outputs = self.method(batch)
            self.accelerator.backward(outputs["loss"] / accumulate)
        labels = batch["label"].repeat(len(outputs["logits"]) // len(batch["label"]))
        outputs["top1"] = 100 * (outputs.pop("logits").detach().argmax(dim=1) == labels).float().mean()
        return outputs

    def _step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A whole step that the host need not look into."""
        outputs = self._forward_backward(batch, last=True)
        self._update(finite=True)
        return outputs

    def _update(self, finite: bool) -> bool:
        """An optimizer step, unless the batch was not finite; returns whether it was done."""
        parameters = list(self.method.net.parameters())
        if finite and self.recipe.optimizer.clip_norm is not None:
            self.accelerator.clip_grad_norm_(parameters, self.recipe.optimizer.clip_norm)
        if finite and self.recipe.train.nonfinite == "skip" and self.accelerator.scaler is None:
            largest = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf)
            finite = math.isfinite(largest)  # one wait for the device
        if finite:
            self.optimizer.step()
            call_if_defined(self.method, "after_step")
        self.optimizer.zero_grad()
        return finite

    def _count(self, metrics: StepMetrics) -> bool:
        """Add the figures of a forward pass to the epoch's means; returns whether they were finite. Raises
        NonFiniteLoss where they were not and the recipe does not skip such batches."""
        if not nonfinite.is_finite(metrics):
            lr, skip = self.optimizer.param_groups[0]["lr"], self.recipe.train.nonfinite == "skip"
            nonfinite.report(metrics, lr, self.folder, self.accelerator.process_index, skip)
            return False
        progress = self.progress
        progress.passes += 1
        for name, value in metrics.figures.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        return True

    def _close_epoch(self, seconds: float, images_per_second: float, bar: Any) -> None:
        progress = self.progress
        if not progress.passes:
            raise NonFiniteLoss(f"no batch of epoch {progress.epoch} had a finite loss; nothing was saved of it")
        means = {name: total / progress.passes for name, total in progress.sums.items()}
        skipped = {"train/skipped": float(progress.skipped)} if progress.skipped else {}
        progress.seconds += seconds
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        progress.sums, progress.passes, progress.skipped = {}, 0, 0
        lr = self.optimizer.param_groups[0]["lr"]
        told = {f"train/{name}": value for name, value in means.items()}
        pace = {"images_per_second": images_per_second, "seconds": progress.seconds}
        self._write(told | skipped | {"lr": lr} | pace)
        bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()}, refresh=False)
        bar.set_description(f"epoch {progress.epoch}/{self.recipe.train.epochs}")
        if self.main and bar.disable:  # a log: one line an epoch, which nothing is drawn over
            left = progress.seconds / progress.step * (self.recipe.train.epochs * self.steps_per_epoch - progress.step)
            epochs = f"{progress.epoch}/{self.recipe.train.epochs}"
            print(epoch_line(epochs, means, images_per_second, progress.seconds, left), flush=True)

    def _stopped(self) -> Stopped:
        """Save, and say so; a run that was asked to stop stops where it cannot save too."""
        where = f"asked to stop in epoch {self.progress.epoch} after step {self.progress.step}"
        try:
            self.save()
        except (CheckpointError, NonFiniteLoss) as error:
            return Stopped(f"{where}, which is not saved: {error}")
        return Stopped(f"{where}; all is saved in {self.folder}: continue with --resume")

    # ---------------------------------------------------------------- evaluation

    @contextmanager
    def _saving_on_failure(self) -> Iterator[None]:
        """What fails in an evaluation does not lose the epochs before it. Of several processes one may fail alone, and
        then the others cannot save with it."""
        try:
            yield
        except Exception:
            if self.accelerator.num_processes == 1:
                self.save()
            raise

    def _evaluate(self, bar: Any) -> None:
        figures: dict[str, dict[str, float]] = {}
        for name, loader in self.eval_loaders.items():
            figures[name] = evaluate(self.accelerator, self.net, loader, self.data.counts).compute()
        self._write({f"{split}/{k}": v for split, values in figures.items() for k, v in values.items()})
        progress = self.progress
        if "validation" in figures:
            score = figures["validation"][self.recipe.evaluation.select]
            if progress.best is None or score > progress.best:
                progress.best, progress.best_epoch = score, progress.epoch
                progress.best_checkpoint = f"step-{progress.step:08d}"
        if self.main:
            bar.write(f"after epoch {progress.epoch}\n{table(figures)}")

    def finish(self) -> None:
        """Evaluate the last and the best checkpoint and write the figures; the follower may export and push."""
        progress, trouble = self.progress, None
        results = self._final("last", f"last epoch ({progress.epoch}), not selected")
        best = progress.best_checkpoint
        if best is not None and best != f"step-{progress.step:08d}":
            try:
                net, _ = checkpoint.load(self.folder / "checkpoints" / best)
                self.state.load_weights(net)
                chosen = f"epoch {progress.best_epoch}, best {self.recipe.evaluation.select} on validation"
                results |= self._final("best", chosen)
            except CheckpointError as error:
                warnings.warn(f"the best checkpoint cannot be read, the last is exported: {error}", stacklevel=2)
        if self.main:
            print(table(results))
            if self.log is not None:
                self.log.trackers.table(results, progress.step)
            try:
                self.follower.finished(f"step-{progress.step:08d}", best)
            except Exception as error:  # whatever it is, the training is done and saved: no traceback
                trouble = CheckpointError(
                    f"{self.folder} is trained and saved, but its model could not be exported: {one_line(error)}. "
                    "Repair that (free disk space?), then finish with --resume"
                )
        raise_everywhere(trouble)

    def _final(self, name: str, chosen: str) -> dict[str, dict[str, float]]:
        rows = {}
        for split, loader in self.eval_loaders.items():
            meter = evaluate(self.accelerator, self.net, loader, self.data.counts)
            record = about(self.splits[split], name, chosen, self.data.class_names)
            if self.main:
                write(self.folder, f"{split}-{name}", meter, record)
            rows[title(record)] = meter.compute()
        return rows

    # ---------------------------------------------------------------- the run's folder

    def open(self, resume: Resume) -> None:
        """Choose the run's folder, go on from its newest checkpoint if asked to, and start the log and the signals."""
        self.signals.listen()
        trouble: Exception | None = None
        if self.main:
            try:
                self.folder = choose_folder(self.recipe, resume)
                self.lock.enter_context(locked(self.folder))
                if isinstance(resume, RunElsewhere):
                    resume.fetch(self.folder)
            except FAILURES as error:
                trouble = error
        raise_everywhere(trouble)
        self.folder = broadcast_object_list([self.folder])[0]
        before = checkpoint.newest(self.folder / "checkpoints") if resume else None
        seen = gather_object([before[0].name if before else "none"])
        if len(set(seen)) > 1:
            raise CheckpointError(
                f"the processes see different checkpoints in {self.folder} ({', '.join(seen)}): "
                "put the run's folder on a disk that all machines share (output=...)"
            )
        if before is not None:
            self._restore(*before)
        elif self.recipe.net.classifier.init == "class_means" and self.recipe.init_from is None:
            sums = class_feature_sums(self.accelerator, self.recipe, self.data, self.net)
            start_from_means(self.net.classifier, sums.to(self.accelerator.device))
        if self.main:
            record = {"processes": self.accelerator.num_processes, "data": self.data.provenance}
            self.log = Log(self.folder, self.recipe, record, self.progress.step)
            self.follower.opened(self.folder, self.recipe, self.data)
            nothing = ", no checkpoint to resume from: starting from the beginning" if resume else ""
            print(f"run folder: {self.folder}" + (f", resumed from {before[0].name}" if before else nothing))
            print(self.trained, flush=True)

    def _restore(self, path: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        check_resumable(path, state["recipe"], state["index"], self.recipe, self.data, self.folder)
        self.state.restore(path, weights, state)

    def save(self) -> None:
        """A checkpoint of this moment, written by the main process. Raises CheckpointError, in all processes, where the
        disk does not take it, and NonFiniteLoss where a weight is not finite."""
        trouble: Exception | None = None
        try:
            index = self.data.provenance["train"]["sha256"]
            written = self.state.save(self.folder / "checkpoints", self.recipe, index)
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
            raise CheckpointError(
                f"the log could not be written: {error}. Free disk space, then continue with --resume"
            ) from error

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        self.signals.close()
        self.lock.close()
        if self.accelerator.num_processes > 1:
            # gloo's threads need the GIL to let go of the last tensors. This one holds it while it destroys the group
            # and waits for them (torch 2.11): a process hung so, once.
            time.sleep(0.1)
        self.accelerator.end_training()

    def dry_run(self) -> None:
        """One step and one evaluation batch of each split; writes nothing."""
        check_place(self.recipe)
        self.method.train()
        batch = next(iter(self.completed(self.loader)))
        loss = self._forward_backward(batch, last=True)["loss"].item()
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the loss of the first step is {loss}")
        self._update(finite=True)
        with torch.no_grad(), self.accelerator.autocast():
            for loader in self.eval_loaders.values():
                self.net.eval().classify(next(iter(loader))["image"])
        if self.main:
            train = self.recipe.train
            did = f"one step of {train.batch_size}, loss {loss:.3f}; {self.trained}"
            pace = f"{self.steps_per_epoch} steps an epoch, {train.epochs} epochs"
            on = ", ".join(split.name for split in self.splits.values())
            print(f"dry run: {self.data.summary()}; {did}; {pace}; evaluated on {on}. Nothing was written.")


def raise_everywhere(trouble: Exception | None) -> None:
    """Raises the main process's trouble in every process, so that none waits for one that has left."""
    trouble = broadcast_object_list([trouble])[0]
    if trouble is not None:
        raise trouble
