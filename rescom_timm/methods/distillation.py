"""Methods that learn from a teacher, a trained net that stays fixed: DiVE, and the last stage of SSD.

The recipe names the teacher, a run or an export: method.teacher=RUN. Shapes: B images of V views, N = V * B, K classes,
F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.losses import at_least_float32, balanced_softmax, check_temperature, distillation
from rescom_timm.methods.base import BaseConfig, stack_views, with_parts
from rescom_timm.methods.baselines import Classification, Views, replace_classifier
from rescom_timm.methods.bounds import PART, POSITIVE, check
from rescom_timm.methods.parts import Teacher as Teacher
from rescom_timm.methods.parts import ask
from rescom_timm.models.classifiers import linear
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class DiveConfig(BaseConfig):
    """Distilling virtual examples (DiVE, He et al. 2021, arXiv 2103.15042).

    The virtual examples are the flattened predictions of a teacher that was trained by Balanced Softmax.
    """

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
class SsdConfig(BaseConfig):
    """Self supervision to distillation, its last stage (SSD, Li et al. 2021, arXiv 2109.04075).

    Its first stage is method moco with contrast_weight 1, classification cross_entropy and same_class_negatives false;
    its second lws.
    """

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
    """Two linear classifiers over the same features.

    In training the logits of both, (2, N, K), soft before hard; in evaluation those of the soft one, (N, K), whose
    weights are this module's own.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.hard = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, F) to logits."""
        soft = super().forward(x)
        return torch.stack((soft, self.hard(x))) if self.training else soft

    def as_linear(self) -> nn.Linear:
        """A linear layer of the same logits in evaluation."""
        return linear(self.weight, self.bias)


class Dive(Classification):
    """(1 - alpha) Balanced Softmax + alpha tau^2 KL(virtual examples || student at tau)."""

    needs_teacher = True

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (V * B, K) and the loss's parts. batch: image (B, V, 3, H, W), label (B,)."""
        images, labels, config = stack_views(batch["image"]), batch["label"].repeat(self.views), self.config
        targets = ask(self.teacher, images)
        _, logits, _ = self.net(images)
        classification = balanced_softmax(logits, labels, self.counts)
        distilled = distillation(logits, targets, config.temperature, config.power)
        loss = (1 - config.alpha) * classification + config.alpha * distilled
        return with_parts(loss, logits, loss_classification=classification, loss_distillation=distilled)


class Ssd(Classification):
    """Cross-entropy of the hard classifier and distillation into the soft one; the encoder learns from both."""

    needs_teacher = True

    def __init__(self, net: Net, counts: Tensor, config: SsdConfig) -> None:
        super().__init__(net, counts, config)
        replace_classifier(net, SoftAndHard(net.classifier.in_features, len(counts)))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), the soft logits (V * B, K) and the loss's parts. batch: image (B, V, 3, H, W), label (B,)."""
        images, labels = stack_views(batch["image"]), batch["label"].repeat(self.views)
        targets = ask(self.teacher, images)
        soft, hard = self.net(images).logits
        classification = F.cross_entropy(at_least_float32(hard), labels)
        distilled = distillation(soft, targets, self.config.temperature)
        loss = classification + distilled
        return with_parts(loss, soft, loss_classification=classification, loss_distillation=distilled)
