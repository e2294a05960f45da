"""The one training loop, on Accelerate: the same recipe on a CPU, one GPU or many.

Everything that decides the next step is in a checkpoint: net, queue, optimizer, scaler, random generators of every
process, epoch and step. Data order and augmentation are functions of (seed, epoch, position), the learning rate of the
epoch; so a resumed run is the uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import errno
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor
from torch.distributed.checkpoint import state_dict as shards
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm import tqdm

from rescom_timm.contrast.queue import Queue
from rescom_timm.data.device_views import finish
from rescom_timm.data.loaders import eval_loader, last_words, set_epoch, train_loader, worker_was_lost
from rescom_timm.data.samples import ViewsDataset
from rescom_timm.data.sources import Data, load
from rescom_timm.data.views import parse
from rescom_timm.files import write_json
from rescom_timm.methods import Method, hook
from rescom_timm.metrics import GROUPS, groups
from rescom_timm.nets.net import check_weights
from rescom_timm.nets.trainable import trained_fraction
from rescom_timm.recipe.config import Recipe, RecipeError
from rescom_timm.recipe.loading import differences, flat, load_dict
from rescom_timm.sharing.export import describe, save_model
from rescom_timm.sharing.hub import HubError, fetch_log, fetch_run
from rescom_timm.sharing.staging import Pusher
from rescom_timm.training import checkpoint
from rescom_timm.training.build import build_method, build_optimizer, build_schedule, speed_up
from rescom_timm.training.captured_step import CapturedStep
from rescom_timm.training.checkpoint import CheckpointError
from rescom_timm.training.evaluate import about, agreed_statistics, evaluate, table, title, write
from rescom_timm.training.launch import launch, own_group, prepare_to_shard, refuse_what_cannot_be_sharded
from rescom_timm.training.log import Log
from rescom_timm.training.run_folder import check_place, existing, held, lines, same_run
from rescom_timm.training.run_folder import make as make_folder
from rescom_timm.training.step_metrics import LAG, Pulse, Pulses

SIGNALS = (signal.SIGTERM, signal.SIGINT)

WHOLE = shards.StateDictOptions(full_state_dict=True, cpu_offload=True)


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names the step and where its rows are saved."""


class Stopped(RuntimeError):
    """A signal asked the run to stop; its state is saved."""


FAILURES = (CheckpointError, HubError, NonFiniteLoss, ValueError, OSError)
"""What a run may fail with whose message is enough: recipe, data, disk, network or numbers."""


@dataclass
class Progress:
    """Where a run stands: `step` optimizer steps done in all, of which `step_in_epoch` in the current epoch."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    best_epoch: int | None = None
    best_checkpoint: str | None = None
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    """Of every figure over the forward passes of the current epoch."""
    passes: int = 0
    """Forward passes counted in `sums`."""
    skipped: int = 0
    """Steps of the current epoch that were not finite and left out (train.nonfinite: skip)."""


def train(recipe: Recipe, resume: bool | str | Path = False, dry_run: bool = False) -> Path:
    """Train, evaluate and save as the recipe says; returns the run's folder.

    resume: go on from the newest whole checkpoint of this run's folder, or, with True, of the last run of the recipe's
    name; start where there is none. hf://owner/name first brings the checkpoint of a run that was pushed there.
    dry_run: build everything, do one step and one evaluation batch, write nothing.
    Raises RecipeError, CheckpointError, NonFiniteLoss, Stopped.
    """
    with told_to_users():
        return _train(recipe, resume, dry_run)


def _train(recipe: Recipe, resume: bool | str | Path, dry_run: bool) -> Path:
    accelerator = launch(recipe)
    set_seed(recipe.seed)
    data = load(recipe.data)
    method = build_method(recipe, data, start=True)
    set_seed(recipe.seed, device_specific=True)  # the weights are the same everywhere, dropout is not
    trainer = Trainer(recipe, accelerator, data, method)
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
        trainer.pusher.wait()
    return trainer.folder


@contextmanager
def told_to_users() -> Iterator[None]:
    """What the machine lacks, as an error that says what to do."""
    again = "then go on with --resume, from the last checkpoint"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            f"the GPU's memory is full ({str(error).partition('. ')[0]}): raise train.accumulate, which cuts the same "
            f"batch into parts, or lower evaluation.batch_size; {again}"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(f"{error}: make room (or name another folder with output=...), {again}") from error
    except RuntimeError as error:
        if not worker_was_lost(error):
            raise
        raise CheckpointError(f"{last_words(error)}; {again}") from error


class Trainer:
    def __init__(self, recipe: Recipe, accelerator: Accelerator, data: Data, method: Method) -> None:
        self.recipe, self.accelerator, self.data, self.method = recipe, accelerator, data, method
        self.main = accelerator.is_main_process
        self.progress = Progress()
        self.folder = recipe.folder
        self.log: Log | None = None
        self.stop_requested = False
        self.handlers: dict[signal.Signals, Any] = {}
        self.held = ExitStack()
        self.queues = [module for module in method.modules() if isinstance(module, Queue)]
        refuse_what_cannot_be_sharded(accelerator, recipe, method)
        micro_batch = recipe.train.batch_size // recipe.train.accumulate
        loader = train_loader(
            data.train, recipe.views, method.views, micro_batch, recipe.seed, recipe.train.epochs,
            recipe.loader, recipe.speed,
        )  # fmt: skip
        self.finished = finish(loader, recipe.views, recipe.loader, accelerator.device)
        self.steps_per_epoch = len(loader) // recipe.train.accumulate
        if self.steps_per_epoch == 0:
            raise RecipeError(f"train.batch_size {recipe.train.batch_size} is more than {data.train.name} holds")
        optimizer = build_optimizer(recipe.optimizer, method.net)
        self.schedule = build_schedule(recipe.schedule, optimizer, recipe.optimizer.lr, recipe.train.epochs)
        size = sum(parameter.numel() for parameter in method.net.parameters())
        self.trained = f"{100 * trained_fraction(method.net):.1f}% of {size / 1e6:.2f} M weights train"
        method.to(accelerator.device)
        self.net = method.net  # as it is under what prepare wraps around it
        self.sharded = accelerator.is_fsdp2
        if self.sharded:
            prepare_to_shard(accelerator, self.net)
        # FSDP takes no weights that are not contiguous.
        speed_up(self.net, replace(recipe.speed, channels_last=recipe.speed.channels_last and not self.sharded))
        self._refuse_size(ViewsDataset(data.train, parse(recipe.views.train), 1, recipe.loader.broken)[0, 0]["image"])
        loader.worker_init_fn = own_group
        method.net, self.optimizer, self.loader = accelerator.prepare(method.net, optimizer, loader)
        if (momentum := getattr(method, "momentum_net", None)) is not None:  # its keys in the precision of the queries
            speed_up(momentum.copy, replace(recipe.speed, compile=False))
            momentum.copy = accelerator.prepare_model(momentum.copy, evaluation_mode=True)
        self.captured: CapturedStep | None = None
        if recipe.speed.capture:
            if accelerator.num_processes > 1 or self.sharded:
                raise RecipeError("speed.capture is for one process that is not sharded; turn it off")
            self.captured = CapturedStep(self._step, self.optimizer, accelerator.device)
        if self.sharded:
            register_fsdp_forward_method(self.net, "classify")
        splits = {"test": data.test, "validation": data.validation}
        self.splits = {name: split for name, split in splits.items() if split is not None}
        select = recipe.evaluation.select
        if data.validation is not None and select in GROUPS:
            chosen = groups(torch.as_tensor(data.counts)).get(select, torch.empty(0))
            if not np.isin(data.validation.labels, chosen).any():
                raise RecipeError(f"evaluation.select: {data.validation.name} has no image of a class of {select}")
        batch = -(-recipe.evaluation.batch_size // accelerator.num_processes) * accelerator.num_processes
        self.eval_loaders = {}
        for name, split in self.splits.items():
            loader = eval_loader(split, recipe.views, batch, recipe.loader, recipe.speed)
            loader.worker_init_fn = own_group
            self.eval_loaders[name] = accelerator.prepare(loader)

    @torch.no_grad()
    def _refuse_size(self, view: Tensor) -> None:
        """Raises RecipeError where the net takes no images of a view's size, as a ViT made for another."""
        height, width = view.shape[-2:]
        try:
            self.net.eval().classify(torch.zeros(1, 3, height, width, device=self.accelerator.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise RecipeError(
                f"net.backbone: {self.recipe.net.backbone} takes no images of {height} x {width} pixels, which "
                f"views.train makes: {error}. Say net.options.img_size={height} where it has that, or change the views"
            ) from error

    # ---------------------------------------------------------------- the loop

    def fit(self) -> None:
        recipe, progress = self.recipe, self.progress
        images = recipe.train.batch_size
        bar = tqdm(
            total=recipe.train.epochs * self.steps_per_epoch * images, initial=progress.step * images, unit="img",
            unit_scale=True, smoothing=0.05, disable=not (self.main and sys.stderr.isatty()), mininterval=0.5,
        )  # fmt: skip
        with bar:
            while progress.epoch < recipe.train.epochs:
                stop = self._epoch(bar)
                last = progress.epoch == recipe.train.epochs
                if last or progress.epoch % recipe.evaluation.every == 0:
                    self._evaluate(bar)
                best = progress.best_epoch == progress.epoch
                if last or stop or best or progress.epoch % recipe.checkpoint.every == 0:
                    self.save()
                if stop and not last:
                    raise self._stopped()
        if not recipe.train.epochs:
            self.save()

    def _epoch(self, bar: Any) -> bool:
        """One epoch, or what is left of it; moves progress to the start of the next. Returns whether to stop there.
        Raises Stopped, after saving, where a signal asked for it within the epoch."""
        recipe, progress = self.recipe, self.progress
        self.schedule.step(progress.epoch)
        self.method.train()
        hook(self.method, "set_epoch", progress.epoch, recipe.train.epochs)
        if self.captured is not None and hasattr(self.method, "set_epoch"):
            self.captured.forget()
        accumulate, careful = recipe.train.accumulate, recipe.train.nonfinite == "skip"
        set_epoch(self.loader, progress.epoch)
        skip = progress.step_in_epoch * accumulate
        loader = skip_first_batches(self.loader, skip) if skip else self.loader
        started, first_step = time.monotonic(), progress.step
        pulses = Pulses(self.accelerator, lag=0 if careful else LAG)
        stop, sound, before = False, True, {}
        for index, batch in enumerate(self.finished(loader), start=skip):
            if index >= self.steps_per_epoch * accumulate:
                continue  # the rest of the epoch is less than one batch of the recipe
            if careful and index % accumulate == 0:
                before = {name: buffer.clone() for name, buffer in self.method.named_buffers()}
            last = (index + 1) % accumulate == 0
            outputs = self._forward_backward(batch, last) if self.captured is None else self.captured(batch)
            pulses.push(outputs, batch["row"], self.stop_requested, progress.epoch, progress.step)
            for pulse in pulses.ready():
                sound &= self._heed(pulse)
                stop |= pulse.stop
            if not last:
                continue
            if self.captured is None and not self._update(sound):
                self._undo(before)
            sound = True
            progress.step += 1
            progress.step_in_epoch += 1
            bar.update(recipe.train.batch_size)
            if stop and progress.step_in_epoch < self.steps_per_epoch:
                for pulse in pulses.drain():
                    self._heed(pulse)
                progress.seconds += time.monotonic() - started
                self.save()
                raise self._stopped()
        for pulse in pulses.drain():
            self._heed(pulse)
            stop |= pulse.stop
        seconds = time.monotonic() - started
        self._close_epoch(seconds, (progress.step - first_step) * recipe.train.batch_size / max(seconds, 1e-9), bar)
        return stop

    def _forward_backward(self, batch: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        accumulate = self.recipe.train.accumulate
        for queue in self.queues:
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
        self._update(sound=True)
        return outputs

    def _update(self, sound: bool) -> bool:
        """An optimizer step, unless the batch was not sound; returns whether it was done."""
        parameters = list(self.method.net.parameters())
        if sound and self.recipe.optimizer.clip_norm is not None:
            self.accelerator.clip_grad_norm_(parameters, self.recipe.optimizer.clip_norm)
        if sound and self.recipe.train.nonfinite == "skip" and self.accelerator.scaler is None:
            largest = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf)
            sound = math.isfinite(largest)  # one wait for the device
        if sound:
            self.optimizer.step()
            hook(self.method, "after_step")
        self.optimizer.zero_grad()
        return sound

    def _undo(self, before: dict[str, Tensor]) -> None:
        """Buffers (BatchNorm's, the queue) as they were before the batch that is left out."""
        for name, buffer in self.method.named_buffers():
            buffer.copy_(before[name])
        self.progress.skipped += 1

    def _heed(self, pulse: Pulse) -> bool:
        """Count the figures of a forward pass. Where they are not finite: raises NonFiniteLoss, or returns False."""
        progress = self.progress
        if all(map(math.isfinite, pulse.figures.values())):
            progress.passes += 1
            for name, value in pulse.figures.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
            return True
        lr = self.optimizer.param_groups[0]["lr"]
        record = {"epoch": pulse.epoch, "step": pulse.step, "lr": lr, "rows": pulse.rows.tolist()}
        path = self.folder / f"nonfinite-step{pulse.step}-process{self.accelerator.process_index}.json"
        write_json(path, record, indent=None)
        what = (
            f"the loss is not finite in epoch {pulse.epoch}, step {pulse.step} (learning rate {lr:g}, "
            f"{pulse.figures}). The rows of that batch are in {path}"
        )
        if self.recipe.train.nonfinite == "skip":
            warnings.warn(f"{what}; the batch is left out (train.nonfinite: skip)", RuntimeWarning, stacklevel=2)
            return False
        raise NonFiniteLoss(
            f"{what}; nothing was saved after it. Lower optimizer.lr, set optimizer.clip_norm or raise "
            "schedule.warmup_epochs and start again, or leave such batches out: train.nonfinite=skip --resume"
        )

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
            print(
                f"epoch {progress.epoch}/{self.recipe.train.epochs}: "
                + ", ".join(f"{name} {value:.3f}" for name, value in means.items())
                + f", {images_per_second:,.0f} images/s, {timedelta(seconds=round(progress.seconds))} trained, "
                f"{timedelta(seconds=round(left))} left",
                flush=True,
            )

    def _stopped(self) -> Stopped:
        return Stopped(
            f"asked to stop in epoch {self.progress.epoch} after step {self.progress.step}; all is saved in "
            f"{self.folder}: go on with --resume"
        )

    # ---------------------------------------------------------------- evaluation

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
        """Evaluate the last and the best checkpoint, write the figures, and export a plain timm model."""
        progress, trouble = self.progress, None
        results = self._final("last", f"last epoch ({progress.epoch}), not selected")
        best = progress.best_checkpoint
        if best is not None and best != f"step-{progress.step:08d}":
            try:
                net, _ = checkpoint.load(self.folder / "checkpoints" / best)
                self._load(net)
                chosen = f"epoch {progress.best_epoch}, best {self.recipe.evaluation.select} on validation"
                results |= self._final("best", chosen)
            except CheckpointError as error:
                warnings.warn(f"the best checkpoint cannot be read, the last is exported: {error}", stacklevel=2)
        if self.main:
            print(table(results))
            try:
                print(save_model(self.folder))
                self.pusher.finished(f"step-{progress.step:08d}", best)
            except (
                Exception
            ) as error:  # whatever it is, the training is done and saved, and must not end in a traceback
                trouble = CheckpointError(
                    f"{self.folder} is trained and saved, but its model could not be exported: {last_words(error)}. "
                    "Mend that (make room?), then finish with --resume"
                )
        trouble = broadcast_object_list([trouble])[0]
        if trouble is not None:
            raise trouble

    def _final(self, name: str, chosen: str) -> dict[str, dict[str, float]]:
        rows = {}
        for split, loader in self.eval_loaders.items():
            meter = evaluate(self.accelerator, self.net, loader, self.data.counts)
            record = about(self.splits[split], name, chosen, self.data.class_names)
            if self.main:
                write(self.folder, f"{split}-{name}", meter, record)
            rows[title(record)] = meter.compute()
        return rows

    # ---------------------------------------------------------------- state

    def save(self) -> None:
        """A checkpoint of this moment, written by the main process. Raises CheckpointError, in all processes, where the
        disk does not take it, and NonFiniteLoss where a weight is not finite."""
        progress = self.progress
        own = {"random": checkpoint.random_state(), "buffers": {k: v.cpu() for k, v in self._own_buffers()}}
        ranks = gather_object([own])
        trouble: Exception | None = None
        with agreed_statistics(self.net):
            weights, optimizer = self._whole()
            broken = [k for k, v in weights.items() if v.is_floating_point() and not bool(v.isfinite().all())]
            if broken:
                what = ", ".join(broken[:3])
                trouble = NonFiniteLoss(f"{what} is not finite after step {progress.step}: not saved")
            elif self.main:
                scaler = self.accelerator.scaler
                state = {
                    "progress": asdict(progress),
                    "recipe": self.recipe.to_dict(),
                    "index": self.data.provenance["train"]["sha256"],
                    "processes": self.accelerator.num_processes,
                    "method": {k: v for k, v in self.method.state_dict().items() if not k.startswith("net.")},
                    "sharded": self.sharded,
                    "optimizer": optimizer,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "ranks": ranks,
                }
                try:
                    written = checkpoint.save(self.folder / "checkpoints", progress.step, weights, state)
                    checkpoint.prune(written, self.recipe.checkpoint.keep, progress.best_checkpoint)
                    self.pusher.saved(written.name, progress.best_checkpoint)
                except CheckpointError as error:
                    trouble = error
        trouble = broadcast_object_list([trouble])[0]  # so that no process waits for one that has left
        if trouble is not None:
            raise trouble

    def _whole(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and optimizer state, gathered by the main process where FSDP has cut them into shards."""
        if not self.sharded:
            return self.net.state_dict(), self.optimizer.state_dict()
        weights: dict[str, Any] = shards.get_model_state_dict(self.net, options=WHOLE)
        return weights, dict(shards.get_optimizer_state_dict(self.net, self.optimizer.optimizer, options=WHOLE))

    def _load(self, weights: dict[str, Tensor]) -> None:
        if self.sharded:
            for module in self.net.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # which an evaluation leaves undone
            shards.set_model_state_dict(self.net, dict[str, Any](weights), options=WHOLE)
        else:
            self.net.load_state_dict(weights)

    def _own_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that each process has for itself (BatchNorm's, running means): all but the queues."""
        shared = {id(buffer) for queue in self.queues for buffer in queue.buffers()}
        for name, buffer in self.method.named_buffers():
            if id(buffer) not in shared:
                yield name.replace("net.module.", "net.", 1), buffer

    def open(self, resume: bool | str | Path) -> None:
        """Choose the run's folder, read its newest checkpoint if asked to, and start the log and the signals."""
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        folder: Path | None = None
        trouble: Exception | None = None
        if self.main:
            try:
                folder = self._take_folder(resume)
                self.held.enter_context(held(folder))
                if isinstance(resume, str):
                    fetch_run(resume, folder)
            except FAILURES as error:
                trouble = error
        self.folder, trouble = broadcast_object_list([folder, trouble])
        if trouble is not None:
            raise trouble
        self.pusher = Pusher(self.recipe.hub, self.folder)
        before = checkpoint.newest(self.folder / "checkpoints") if resume else None
        seen = gather_object([before[0].name if before else "none"])
        if len(set(seen)) > 1:
            raise CheckpointError(
                f"the processes see different checkpoints in {self.folder} ({', '.join(seen)}): "
                "put the run's folder on a disk that all machines share (output=...)"
            )
        if before is not None:
            self._restore(*before)
        if self.main:
            record = {"processes": self.accelerator.num_processes, "data": self.data.provenance}
            self.log = Log(self.folder, self.recipe, record, self.progress.step)
            describe(self.folder, self.data, self.recipe.views)
            nothing = ", no checkpoint to resume from: starting anew" if resume else ""
            print(f"run folder: {self.folder}" + (f", resumed from {before[0].name}" if before else nothing))
            print(self.trained, flush=True)

    def _take_folder(self, resume: bool | str | Path) -> Path:
        """A new folder; to resume, the last of the recipe's name, the one told, or the one of the run on the Hub."""
        there = existing(self.recipe)
        if isinstance(resume, Path):
            if not resume.is_dir():
                raise CheckpointError(f"no run's folder {resume} to go on with")
            return resume
        if isinstance(resume, str):
            log = fetch_log(resume)
            theirs = lines(log) if log is not None else []
            same = [folder for folder in there if same_run(folder, theirs)]
            folder = same[-1] if same else make_folder(self.recipe)
            if there and not same:
                print(f"{there[-1]} is another run than {resume}, which is brought into {folder}")
            return folder
        return there[-1] if resume and there else make_folder(self.recipe)

    def _restore(self, path: Path, net: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._check_recipe(path, state["recipe"], state["index"])
        accelerator = self.accelerator
        if state.get("sharded", False) != self.sharded:
            raise CheckpointError(
                f"{path} was saved {'without' if self.sharded else 'with'} FSDP: go on with it the same"
            )
        own = {k: v for k, v in self.method.state_dict().items() if not k.startswith("net.")}
        try:
            check_weights(net, self.net.state_dict(), str(path))
            check_weights(state["method"], own, f"the method in {path}")
        except ValueError as error:
            raise CheckpointError(f"{error}; it cannot be gone on with") from None
        self._load(net)
        self.method.load_state_dict(state["method"], strict=False)
        if self.sharded:
            shards.set_optimizer_state_dict(self.net, self.optimizer.optimizer, state["optimizer"], options=WHOLE)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, moments in self.optimizer.state.items():  # saved contiguous: back to the weights' own layout
                for name, value in moments.items():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if state["processes"] == accelerator.num_processes:
            own = state["ranks"][accelerator.process_index]
            for name, buffer in self._own_buffers():
                buffer.copy_(own["buffers"][name])
            checkpoint.set_random_state(own["random"])
        elif self.main:
            warnings.warn(
                f"{path} was saved by {state['processes']} processes and goes on with {accelerator.num_processes}: "
                "batches, learning rate and augmentations stay the same; BatchNorm's batches, dropout and in-batch "
                "pairs of one process change, so the result will differ in the noise of training",
                stacklevel=2,
            )

    def _check_recipe(self, path: Path, saved: dict[str, Any], index: str) -> None:
        """Raises RecipeError, naming the keys, where the checkpoint's recipe trains something else,
        or the same index now names other rows."""
        old, new = load_dict(saved, f"the recipe in {path}").to_dict(), self.recipe.to_dict()
        one, other = flat(old), flat(new)
        changed = [f"{key} ({one.get(key)!r} then, {other.get(key)!r} now)" for key in differences(old, new)]
        if changed:
            raise RecipeError(
                f"{path} was made by another recipe; different: {', '.join(changed)}. Resume with "
                f"{self.folder / 'recipe.yaml'}, or start a new run without --resume"
            )
        if index != self.data.provenance["train"]["sha256"]:
            raise RecipeError(f"{path} was trained on other rows or labels than {self.data.train.name} has now")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def _write(self, figures: dict[str, float]) -> None:
        if self.log is None:
            return
        try:
            self.log.write(self.progress.epoch, self.progress.step, figures)
        except OSError as error:
            raise CheckpointError(
                f"the log could not be written: {error}. Make room, then go on with --resume"
            ) from error

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.held.close()
        self.accelerator.end_training()

    def dry_run(self) -> None:
        """One step and one evaluation batch of each split; writes nothing."""
        check_place(self.recipe)
        self.method.train()
        batch = next(iter(self.finished(self.loader)))
        loss = self._forward_backward(batch, last=True)["loss"].item()
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the loss of the first step is {loss}")
        self._update(sound=True)
        with torch.no_grad(), self.accelerator.autocast():
            for loader in self.eval_loaders.values():
                self.net.eval().classify(next(iter(loader))["image"])
        if self.main:
            counts = self.data.counts
            print(
                f"dry run: {self.data.train.name}: {len(self.data.train.labels)} images, {len(counts)} classes of "
                f"{counts.max()} to {counts.min()}; one step of {self.recipe.train.batch_size}, loss {loss:.3f}; "
                f"{self.trained}; "
                f"{self.steps_per_epoch} steps an epoch, {self.recipe.train.epochs} epochs; evaluated on "
                f"{', '.join(split.name for split in self.splits.values())}. Nothing was written."
            )
