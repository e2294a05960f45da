"""One optimizer step: passes of forward and backward, then the update.

Gradients are accumulated over the passes, a step that is not finite is undone, and the whole may be captured as one
CUDA graph, as the recipe says.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from rescom_timm.config.recipe import Recipe
from rescom_timm.engine.captured_step import CapturedStep
from rescom_timm.engine.nonfinite import copy_buffers, put_back
from rescom_timm.engine.state import State
from rescom_timm.engine.step_metrics import LAG
from rescom_timm.models.trainable import still_statistics


class TrainingStep:
    """`step(batch, last)` for each pass, then `step.finish(finite)`.

    Another kind of step is a subclass with its own `forward_backward`, `update` or both.
    """

    def __init__(self, state: State, recipe: Recipe, average: ModelEmaV3 | None = None) -> None:
        """state: method, net and optimizer as they are prepared.

        average: moving average of the weights, None if there is none. Raises RecipeError for an optimizer that
        cannot be captured.
        """
        self.state, self.recipe, self.average = state, recipe, average
        self.accelerator, self.method, self.net = state.accelerator, state.method, state.net
        self.optimizer = state.optimizer
        self.skips = recipe.train.nonfinite == "skip"
        self.lag = 0 if self.skips else LAG  # passes after which the host reads their metrics
        self.before: dict[str, Tensor] | None = None  # buffers before the step, where it may be undone
        self.captured: CapturedStep | None = None
        if recipe.speed.capture:
            self.captured = CapturedStep(self.whole, self.optimizer, self.accelerator.device)

    def start_epoch(self, epoch: int) -> None:
        """Tell the method of the epoch."""
        self.method.train()
        self.method.set_epoch(epoch, self.recipe.train.epochs)
        if self.captured is not None and self.method.epoch_changes_host:
            self.captured.forget()

    def __call__(self, batch: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """A pass, of which the step may have several.

        batch: as the method takes it. last: of the step. Returns the pass's scalars: loss, top1 in percent, and what
        else the method gives.
        """
        if self.captured is not None:
            return self.captured(batch)
        if self.skips and self.before is None:
            self.before = copy_buffers(self.method)
        return self.forward_backward(batch, last)

    def finish(self, finite: bool) -> bool:
        """The update after the last pass; finite: whether all passes were.

        Returns whether it was done: if not, weights and buffers are as they were before the step.
        """
        done = self.captured is not None or self.update(finite)
        if not done and self.before is not None:
            put_back(self.method, self.before)
        self.before = None
        return done

    def forward_backward(self, batch: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """Scalars of a forward pass, its gradients added to the others of the step, of which it may be the last."""
        for queue in self.state.queues:
            queue.holding = not last  # keys of a step are never its own pairs
        with nullcontext() if last else self.accelerator.no_sync(self.method.net):
            outputs = self.method(batch)
            # What is computed a second time moves no statistics a second time.
            with still_statistics(self.net) if self.recipe.speed.grad_checkpointing else nullcontext():
                self.accelerator.backward(outputs["loss"] / self.recipe.train.accumulate)
        labels = batch["label"].repeat(len(outputs["logits"]) // len(batch["label"]))
        outputs["top1"] = 100 * (outputs.pop("logits").detach().argmax(dim=1) == labels).float().mean()
        return outputs

    def update(self, finite: bool) -> bool:
        """An optimizer step, unless the gradients are not finite; returns whether it was done."""
        parameters = list(self.method.net.parameters())
        if finite and self.recipe.optimizer.clip_norm is not None:
            self.accelerator.clip_grad_norm_(parameters, self.recipe.optimizer.clip_norm)
        if finite and self.skips and self.accelerator.scaler is None:
            largest = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf)
            finite = math.isfinite(largest)  # one wait for the device
        if finite:
            self.optimizer.step()
            self.method.after_step()
            if self.average is not None:
                self.average.update(self.net, self.state.progress.step + 1)
        self.optimizer.zero_grad()
        return finite

    def whole(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A step of one pass that the host need not look into, as it is captured."""
        outputs = self.forward_backward(batch, last=True)
        self.update(finite=True)
        return outputs
