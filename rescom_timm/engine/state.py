"""The state of a run: all that decides its next step, collected for a checkpoint and put back from one.

Net, queue, optimizer, scaler, random generators of every process, epoch and step. Data order and augmentation are
functions of (seed, epoch, position), the learning rate of the epoch; so a resumed run is the uninterrupted one, bit for
bit on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as shards
from torch.distributed.fsdp import FSDPModule

from rescom_timm.class_names import numbers_in
from rescom_timm.config.loading import differences, flat, load_dict
from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.contrastive.queue import Queue
from rescom_timm.data.sources import Data
from rescom_timm.engine import checkpoint
from rescom_timm.engine.checkpoint import SavedState
from rescom_timm.engine.errors import CheckpointError, NonFiniteLoss
from rescom_timm.engine.evaluate import agreed_statistics
from rescom_timm.methods import Method
from rescom_timm.models.net import Net, check_weights
from rescom_timm.models.trainable import digest

WHOLE = shards.StateDictOptions(full_state_dict=True, cpu_offload=True)


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
    """Of every metric over the forward passes of the current epoch."""
    passes: int = 0
    """Forward passes counted in `sums`."""
    unevaluated: bool = False
    """The epoch that has ended is still to be evaluated: that failed, and what was trained was saved all the same."""
    skipped: int = 0
    """Steps of the current epoch that were not finite and left out (train.nonfinite: skip)."""

    def count(self, figures: dict[str, float]) -> None:
        """Add the metrics of a forward pass to those of the epoch."""
        self.passes += 1
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def close_epoch(self, seconds: float) -> dict[str, float]:
        """Go to the start of the next epoch, after so many seconds more; returns the means of the metrics."""
        means = {name: total / self.passes for name, total in self.sums.items()}
        self.seconds += seconds
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.sums, self.passes, self.skipped = {}, 0, 0
        return means

    def scored(self, score: float) -> None:
        """Keep an epoch's validation score if it is the best one yet."""
        if self.best is None or score > self.best:
            self.best, self.best_epoch, self.best_checkpoint = score, self.epoch, f"step-{self.step:08d}"

    def ended(self, recipe: Recipe) -> bool:
        """Whether all epochs are done, or so many were without a better one that the recipe's patience is at its end.

        Asked between epochs.
        """
        patience, every = recipe.evaluation.patience, recipe.evaluation.every
        if self.epoch >= recipe.train.epochs:
            return True
        if patience is None or self.best_epoch is None or self.step_in_epoch or self.epoch % every:
            return False
        return self.epoch - self.best_epoch >= patience


class State:
    """What a run saves and restores.

    method, optimizer: as accelerate prepared them; net: as it is under that; average: of its weights, None where there
    is none.
    """

    def __init__(
        self, accelerator: Accelerator, method: Method, net: Net, optimizer: torch.optim.Optimizer, recipe: Recipe,
        average: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.accelerator, self.method, self.net, self.optimizer = accelerator, method, net, optimizer
        self.average, self.sharded = average if average is not None else nn.Module(), accelerator.is_fsdp2
        self.queues = [module for module in method.modules() if isinstance(module, Queue)]
        self.progress = Progress()
        self.frozen: dict[str, Tensor] = {}
        """Pretrained weights that do not train: a checkpoint holds their digest in their place. Not those of heads that
        a method leaves as they are: they are random."""
        if recipe.net.pretrained and recipe.init_from is None and not self.sharded:
            still = {name: value for name, value in net.named_parameters() if not value.requires_grad}
            self.frozen = {name: value for name, value in still.items() if name.startswith("encoder.")}
        self.frozen_digest = digest(self.frozen) if self.frozen else None
        self.teacher_digest = None if method.teacher is None else method.teacher.digest

    def save(self, folder: Path, recipe: Recipe, data: Data) -> str | None:
        """Write checkpoint `progress.step` into the folder, in the main process alone, which gets its name.

        Every process must call it. data: of which it keeps the class names and the digest of the rows trained on.

        Raises NonFiniteLoss where a weight is not finite, CheckpointError where the disk does not take it.
        """
        own = {"random": checkpoint.random_state(), "buffers": {k: v.cpu() for k, v in self._own_buffers()}}
        ranks = gather_object([own])
        with agreed_statistics(self.net), agreed_statistics(self.average):
            weights, optimizer = self._whole()
            broken = [k for k, v in weights.items() if v.is_floating_point() and not bool(v.isfinite().all())]
            if broken:
                raise NonFiniteLoss(
                    "train.nonfinite",
                    f"{', '.join(broken[:3])} is not finite after step {self.progress.step}; not saved",
                )
            if not self.accelerator.is_main_process:
                return None
            weights = {name: value for name, value in weights.items() if name not in self.frozen}
            average = {name: value for name, value in self.average.state_dict().items() if name not in self.frozen}
            scaler = self.accelerator.scaler
            state: SavedState = {
                "progress": asdict(self.progress),
                "recipe": recipe.to_dict(),
                "index": data.provenance["train"]["sha256"],
                "class_names": data.class_names,
                "processes": self.accelerator.num_processes,
                "method": self._beside_the_net(),
                "average": average,
                "sharded": self.sharded,
                "frozen": self.frozen_digest,
                "teacher": self.teacher_digest,
                "optimizer": optimizer,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "ranks": ranks,
            }
            written = checkpoint.save(folder, self.progress.step, weights, state)
        checkpoint.prune(written, recipe.checkpoint.keep, self.progress.best_checkpoint)
        return written.name

    def restore(self, path: Path, weights: dict[str, Tensor], state: SavedState) -> None:
        """Resume from a checkpoint. Raises CheckpointError where it is of another net, method or way of sharding."""
        accelerator = self.accelerator
        if state.get("sharded", False) != self.sharded:
            raise CheckpointError(
                "checkpoint.differs",
                f"{path} was saved {'without' if self.sharded else 'with'} FSDP: resume it the same way",
            )
        if state.get("frozen") not in (None, self.frozen_digest):
            raise CheckpointError(
                "checkpoint.differs",
                f"{path} was tuned over other pretrained weights than the net has now: restore them "
                "(net.weights_file, or timm's cache), or start a new run without --resume",
            )
        if state.get("teacher") != self.teacher_digest:
            raise CheckpointError(
                "checkpoint.differs",
                f"{path} was trained with another teacher than method.teacher names now: restore it, or start a new "
                "run without --resume",
            )
        if state.get("frozen"):
            weights = self._with_frozen(weights)
        try:
            check_weights(weights, self.net.state_dict(), str(path))
            check_weights(state.get("method", {}), self._beside_the_net(), f"the method in {path}")
        except ValueError as error:
            raise CheckpointError("checkpoint.differs", f"{error}; the run cannot be resumed from it") from None
        with checkpoint.consistent(path):
            self.load_weights(weights, state.get("average"))
            self.method.load_state_dict(state["method"], strict=False)
            self._load_optimizer(state["optimizer"])
            if accelerator.scaler is not None and state["scaler"] is not None:
                accelerator.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
            same = state["processes"] == accelerator.num_processes
            if same:
                own = state["ranks"][accelerator.process_index]
                for name, buffer in self._own_buffers():
                    buffer.copy_(own["buffers"][name])
                checkpoint.set_random_state(own["random"])
        if not same and accelerator.is_main_process:
            warnings.warn(
                f"{path} was saved by {state['processes']} processes and is resumed by {accelerator.num_processes}: "
                "batches, learning rate and augmentations stay the same; BatchNorm's batches, dropout and in-batch "
                "pairs of one process change, so the result will differ in the noise of training",
                stacklevel=2,
            )

    def load_weights(self, weights: dict[str, Tensor], average: dict[str, Tensor] | None) -> None:
        """The whole net's weights, into shards where FSDP has cut it, and their average where there is one."""
        if average:
            self.average.load_state_dict(self._with_frozen(average))
        if self.sharded:
            for module in self.net.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # which an evaluation leaves undone
            shards.set_model_state_dict(self.net, dict[str, Any](weights), options=WHOLE)
        else:
            self.net.load_state_dict(self._with_frozen(weights))

    def _with_frozen(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**{name: value.detach() for name, value in self.frozen.items()}, **weights}

    def _whole(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and optimizer state, gathered by the main process where FSDP has cut them into shards."""
        if not self.sharded:
            return self.net.state_dict(), self.optimizer.state_dict()
        weights: dict[str, Any] = shards.get_model_state_dict(self.net, options=WHOLE)
        return weights, dict(shards.get_optimizer_state_dict(self.net, self._plain_optimizer, options=WHOLE))

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        if self.sharded:
            shards.set_optimizer_state_dict(self.net, self._plain_optimizer, saved, options=WHOLE)
            return
        self.optimizer.load_state_dict(saved)
        for parameter, moments in self.optimizer.state.items():  # saved contiguous: back to the weights' own layout
            for name, value in moments.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """What accelerate has wrapped."""
        wrapped: Any = self.optimizer
        return wrapped.optimizer

    def _beside_the_net(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.method.state_dict().items() if not k.startswith("net.")}

    def _own_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that each process has for itself (BatchNorm's, running means): all but the queues."""
        shared = {id(buffer) for queue in self.queues for buffer in queue.buffers()}
        yield from self.average.named_buffers(prefix="average")
        for name, buffer in self.method.named_buffers():
            if id(buffer) not in shared:
                yield name.replace("net.module.", "net.", 1), buffer


def check_resumable(
    path: Path, saved: dict[str, object], index: str, recipe: Recipe, data: Data, folder: Path,
    class_names: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Check that a run in `folder` resumes from checkpoint `path` with this recipe and data.

    saved, index, class_names: the recipe, the digest of training rows and the classes in it. Raises RecipeError, naming
    the keys or the classes, where they train something else.
    """
    old, new = load_dict(saved, f"the recipe in {path}").to_dict(), recipe.to_dict()
    one, other = flat(old), flat(new)
    changed = [f"{key} ({one.get(key)!r} then, {other.get(key)!r} now)" for key in differences(old, new)]
    if changed:
        raise RecipeError(
            "checkpoint.differs",
            f"{path} was made by another recipe; different: {', '.join(changed)}. Resume with "
            f"{folder / 'recipe.yaml'}, or start a new run without --resume",
        )
    try:
        numbers_in(data.class_names, class_names, data.train.name, str(path), ordered=True)
    except ValueError as error:
        raise RecipeError(
            "checkpoint.differs",
            f"{error}: resume with the classes of the checkpoint, or start a new run without --resume",
        ) from None
    if index != data.provenance["train"]["sha256"]:
        raise RecipeError(
            "checkpoint.differs", f"{path} was trained on other rows or labels than {data.train.name} has now"
        )
