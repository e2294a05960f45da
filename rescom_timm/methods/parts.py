"""What a method may keep beside its net: a teacher, a copy of the net that follows it.

Shapes: N images, B images of one view, K classes, D the width of an embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rescom_timm.losses import at_least_float32
from rescom_timm.models.net import Net
from rescom_timm.models.trainable import digest


class Teacher:
    """A trained net that is asked for its logits: in evaluation mode, without gradient. It is no part of the method's
    module, so no optimizer, checkpoint or process group sees it; a checkpoint holds its digest."""

    def __init__(self, net: Net, class_names: Sequence[str] = ()) -> None:
        """class_names: (K,), or empty where they are not known."""
        self.net = net.eval().requires_grad_(False)
        self.class_names = list(class_names)
        self.digest = digest(net.state_dict())
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def place(self, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Go to a device, and compute in the precision that autocast() gives."""
        self.net.to(device)
        self.autocast = autocast

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W), eight-bit, which the net normalises as it did in its own training. Returns logits
        (N, K), float32 or wider."""
        with self.autocast():
            return at_least_float32(self.net.classify(images))


def ask(teacher: Teacher | None, images: Tensor) -> Tensor:
    """The teacher's logits (N, K). Raises ValueError where there is none."""
    if teacher is None:
        raise ValueError("this method learns from a teacher: set method.teacher = Teacher(net) before training")
    return teacher(images)


class MomentumNet(nn.Module):
    """A copy of a net that follows it: theta_k <- m theta_k + (1 - m) theta_q (MoCo, eq. 2).

    In training its BatchNorm uses each batch's own statistics, as the net's does; there is no shuffling over processes.
    """

    def __init__(self, net: Net, momentum: float) -> None:
        super().__init__()
        self.copy = copy.deepcopy(net).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W). Returns embeddings (B, D)."""
        return self.copy(images).embeddings

    @torch.no_grad()
    def follow(self, net: nn.Module) -> None:
        """Move towards the net, plain or wrapped; call it once an optimizer step."""
        torch._foreach_lerp_(list(self.copy.parameters()), list(net.parameters()), 1 - self.momentum)
