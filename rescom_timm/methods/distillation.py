"""Methods that learn from a teacher, a trained net that stays as it is: DiVE, and the last stage of SSD.

The recipe names the teacher, a run or an export: method.teacher=RUN. Shapes: B images of V views, N = V * B, K classes,
F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.losses import at_least_float32, balanced_softmax, check_temperature, distillation
from rescom_timm.methods.baselines import Classification, Views, linear, replace_classifier
from rescom_timm.methods.bounds import PART, POSITIVE, check
from rescom_timm.methods.rescom import stack_views
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


@dataclass(frozen=True)
class DiveConfig:
    """Distilling virtual examples (He et al. 2021, arXiv 2103.15042): the predictions of a teacher that was trained by
    Balanced Softmax, flattened."""

    name: Literal["dive"] = "dive"
    views: Views = 1
    teacher: str | None = None
    """Run, export or Hub id of the teacher."""
    alpha: float = 0.5
    """Share of the distillation in the loss."""
    temperature: float = 3.0
    """tau. The paper takes the one at which the sums of the teacher's predictions over the training images, the
    virtual examples of each class, are flat enough."""
    power: float = 0.5
    """Power normalisation of the teacher's predictions, which flattens them once more; 1: none."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check(self, alpha=PART, power=POSITIVE)


@dataclass(frozen=True)
class SsdConfig:
    """Self supervision to distillation, its last stage (SSD, Li et al. 2021, arXiv 2109.04075). Its first is
    method moco with contrast_weight 1, classification cross_entropy and same_class_negatives false; its second lws."""

    name: Literal["ssd"] = "ssd"
    views: Views = 1
    teacher: str | None = None
    """Run, export or Hub id of the second stage."""
    temperature: float = 2.0
    """T of the distillation."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


DistilledConfig = DiveConfig | SsdConfig


class SoftAndHard(nn.Linear):
    """Two linear classifiers over the same features: in training both, (2, N, K), soft before hard; in evaluation the
    soft one, (N, K), whose weights are this module's own."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.hard = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        soft = super().forward(x)
        return torch.stack((soft, self.hard(x))) if self.training else soft

    def as_linear(self) -> nn.Linear:
        return linear(self.weight, self.bias)


class Dive(Classification):
    """(1 - alpha) Balanced Softmax + alpha tau^2 KL(virtual examples || student at tau)."""

    teacher: Teacher | None = None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: image (B, V, 3, H, W), label (B,). Returns loss (scalar), logits (V * B, K) and the loss's parts."""
        images, labels, config = stack_views(batch["image"]), batch["label"].repeat(self.views), self.config
        targets = ask(self.teacher, images)
        _, logits, _ = self.net(images)
        classification = balanced_softmax(logits, labels, self.counts)
        distilled = distillation(logits, targets, config.temperature, config.power)
        return {
            "loss": (1 - config.alpha) * classification + config.alpha * distilled,
            "logits": logits,
            "loss_classification": classification.detach(),
            "loss_distillation": distilled.detach(),
        }


class Ssd(Classification):
    """Labels teach the hard classifier by cross-entropy, the teacher the soft one; the encoder learns from both."""

    teacher: Teacher | None = None

    def __init__(self, net: Net, counts: Tensor, config: SsdConfig) -> None:
        super().__init__(net, counts, config)
        replace_classifier(net, SoftAndHard(net.classifier.in_features, len(counts)))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: image (B, V, 3, H, W), label (B,). Returns loss (scalar), the soft classifier's logits (V * B, K) and
        the loss's parts."""
        images, labels = stack_views(batch["image"]), batch["label"].repeat(self.views)
        targets = ask(self.teacher, images)
        soft, hard = self.net(images).logits
        classification = F.cross_entropy(at_least_float32(hard), labels)
        distilled = distillation(soft, targets, self.config.temperature)
        return {
            "loss": classification + distilled,
            "logits": soft,
            "loss_classification": classification.detach(),
            "loss_distillation": distilled.detach(),
        }
