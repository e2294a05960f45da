"""What ResCom is compared with: the same net, loop and views with another loss.

Shapes: B images of V views, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.contrast.losses import at_least_float32, balanced_softmax
from rescom_timm.methods.rescom import stack_views
from rescom_timm.nets.net import Net


@dataclass(frozen=True)
class CrossEntropyConfig:
    name: Literal["cross_entropy"] = "cross_entropy"
    views: Literal[1, 2] = 1
    """Augmented views of each image in a batch; 2 costs as much as ResCom."""
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError("label_smoothing must be in [0, 1)")


@dataclass(frozen=True)
class BalancedSoftmaxConfig:
    name: Literal["balanced_softmax"] = "balanced_softmax"
    views: Literal[1, 2] = 1
    """Augmented views of each image in a batch; 2 is Siamese Balanced Softmax (eq. 6)."""


class Classification(nn.Module):
    """A net trained by a loss on its logits alone; the projector is not trained."""

    counts: Tensor

    def __init__(self, net: Net, counts: Tensor, config: CrossEntropyConfig | BalancedSoftmaxConfig) -> None:
        """counts: (K,) training images of each class."""
        super().__init__()
        net.projector.requires_grad_(False)
        self.net = net
        self.config = config
        self.views: int = config.views
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: image (B, V, 3, H, W), label (B,). Returns loss (scalar) and logits (V * B, K)."""
        _, logits, _ = self.net(stack_views(batch["image"]))
        labels = batch["label"].repeat(self.views)
        if isinstance(self.config, BalancedSoftmaxConfig):
            return {"loss": balanced_softmax(logits, labels, self.counts), "logits": logits}
        loss = F.cross_entropy(at_least_float32(logits), labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "logits": logits}
