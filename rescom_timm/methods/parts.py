"""Parts that a method may have beside its net: a teacher, a momentum encoder.

Shapes: N images, B images of one view, K classes, D the width of an embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.errors import InputError
from rescom_timm.losses import at_least_float32
from rescom_timm.models.net import Net
from rescom_timm.models.trainable import digest


class Teacher:
    """A trained net whose logits are a target, in evaluation mode and without gradient.

    It is no part of the method's module, so no optimizer, checkpoint or process group sees it; a checkpoint holds its
    digest.
    """

    def __init__(self, net: Net, class_names: Sequence[str] = ()) -> None:
        """class_names: (K,), or empty if they are not known."""
        self.net = net.eval().requires_grad_(False)
        self.class_names = list(class_names)
        self.digest = digest(net.state_dict())
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def place(self, device: torch.device, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        """Move to a device, and compute in the precision of autocast()."""
        self.net.to(device)
        self.autocast = autocast

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, K), float32 or wider.

        images: (N, 3, H, W), eight-bit, normalised as in the teacher's own training.
        """
        with self.autocast():
            return at_least_float32(self.net.classify(images))


def ask(teacher: Teacher | None, images: Tensor) -> Tensor:
    """The teacher's logits (N, K). Raises InputError if there is no teacher."""
    if teacher is None:
        raise InputError("method.teacher", "the method has no teacher: set method.teacher = Teacher(net) first")
    return teacher(images)


class ClassProjector(nn.Sequential):
    """An MLP of the projector's shape that makes prototypes of the classes of the classifier's rows.

    BCL, Zhu et al. 2022, arXiv 2207.09052. It belongs to the net; in training its BatchNorm sees the K rows.
    """

    def __init__(self, net: Net) -> None:
        """Raises InputError for a net without a projector."""
        width, dim = net.classifier.in_features, net.embedding_width
        hidden = int(net.projector[0].out_features)  # type: ignore[index, arg-type]
        super().__init__(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (K, F). Returns unit vectors (K, D)."""
        return F.normalize(at_least_float32(super().forward(weight)), dim=1)


class Prototypes:
    """Prototypes of the classes, made of a net's classifier; not a module, because the weights are the net's."""

    def __init__(self, net: Net) -> None:
        """Gives the net a ClassProjector. Raises as that does."""
        self.classifier, self.projector = net.classifier, ClassProjector(net)
        net.class_projector = self.projector

    def __call__(self) -> Tensor:
        """Unit vectors (K, D)."""
        found: Tensor = self.projector(self.classifier.weight)
        return found


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
        """Embeddings (B, D) of images (B, 3, H, W)."""
        return self.copy(images).embeddings

    @torch.no_grad()
    def follow(self, net: nn.Module) -> None:
        """Move towards the net, plain or wrapped; once an optimizer step."""
        torch._foreach_lerp_(list(self.copy.parameters()), list(net.parameters()), 1 - self.momentum)
