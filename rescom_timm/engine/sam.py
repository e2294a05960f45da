"""Sharpness-aware minimisation (SAM): each step minimises the loss at the worst weights within a distance rho.

Foret et al. 2021, arXiv 2010.01412; for long tails: Rangwani et al. 2022, arXiv 2212.13827.

    e = rho g / |g|,  g = grad L(w);    step of the optimizer at w with grad L(w + e)

Adaptive (ASAM, Kwon et al. 2021, arXiv 2102.11600): e = rho T^2 g / |T g|, T = |w| + 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from rescom_timm.config.recipe import Recipe, SamConfig
from rescom_timm.engine.nonfinite import copy_buffers, put_back
from rescom_timm.engine.state import State
from rescom_timm.engine.step import TrainingStep

LATE = 0.8
"""Fraction of the epochs after which rho_late holds."""
FLOOR = 0.01
"""eta of ASAM: of |w|, so that weights of zero move too."""


class SamStep(TrainingStep):
    """Two passes over the same images, with the same views and mixing.

    The first is at w, whose loss and top-1 are logged, the second at w + e, whose gradient the optimizer takes. It
    costs twice the time of a step and the memory of one more copy of the trained weights and two of the buffers.

    |g| is one norm over all trained weights, after the processes' gradients are averaged; the scale of fp16 cancels
    in e, and clipping sees the second gradient alone. BatchNorm normalises both passes by the batch. Its running
    statistics, the queue and every other buffer move by the first pass alone, so that a batch counts once. Dropout
    draws anew in the second pass, as in the authors' code. Where |g| is not finite, e is 0.
    """

    def __init__(self, state: State, recipe: Recipe, average: ModelEmaV3 | None = None) -> None:
        """recipe: with optimizer.sam. Otherwise as TrainingStep."""
        super().__init__(state, recipe, average)
        assert recipe.optimizer.sam is not None
        self.config: SamConfig = recipe.optimizer.sam
        # A tensor, so that a captured step follows it.
        self.rho = torch.full((), self.config.rho, device=self.accelerator.device)
        self.batches: list[dict[str, Tensor]] = []  # of the step's passes
        self.first: dict[str, Tensor] = {}  # buffers before them

    def start_epoch(self, epoch: int) -> None:
        """Tell the method of the epoch and set rho."""
        super().start_epoch(epoch)
        rho, late = self.config.rho, self.config.rho_late
        self.rho.fill_(late if late is not None and epoch >= LATE * self.recipe.train.epochs else rho)

    def forward_backward(self, batch: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """Run the first pass over a batch, which is kept for the second."""
        if not self.batches:
            self.first = copy_buffers(self.method)
        self.batches.append(batch)
        return super().forward_backward(batch, last)

    def update(self, finite: bool) -> bool:
        """Run the second pass and an optimizer step, unless the gradients are not finite.

        Returns whether the step was done.
        """
        if finite:
            self.second_pass()
        self.batches, self.first = [], {}
        return super().update(finite)

    def second_pass(self) -> None:
        """Replace the gradient at w by that at w + e; weights and buffers stay as they are."""
        buffers = copy_buffers(self.method)
        trained: list[Tensor] = [weight for weight in self.net.parameters() if weight.grad is not None]
        weights = [weight.detach().clone() for weight in trained]
        put_back(self.method, self.first)
        climb(trained, self.rho, self.config.adaptive)
        self.optimizer.zero_grad()
        for number, batch in enumerate(self.batches, start=1):
            super().forward_backward(batch, last=number == len(self.batches))
        with torch.no_grad():
            torch._foreach_copy_(trained, weights)  # w + e - e is not w
        put_back(self.method, buffers)


@torch.no_grad()
def climb(weights: Sequence[Tensor], rho: Tensor, adaptive: bool = False) -> None:
    """Add e to weights that have a gradient, which may be scaled. rho: (). No host synchronisation."""
    sizes = [weight.abs() + FLOOR if adaptive else torch.ones_like(rho) for weight in weights]
    gradients = [size * weight.grad for size, weight in zip(sizes, weights, strict=True) if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    for weight, size, gradient in zip(weights, sizes, gradients, strict=True):
        weight.add_((size * gradient * (rho / (norm + 1e-12))).where(norm.isfinite(), 0))
