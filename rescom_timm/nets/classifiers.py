"""Classifiers over features (N, F): linear, or scaled cosines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassifierConfig:
    kind: Literal["linear", "cosine"] = "linear"
    """cosine: features and class vectors normalised, no bias. It has no place in a plain timm model: its export is read
    by rescom_timm.from_pretrained alone."""
    scale: float = 25.0
    """By which cosines are multiplied (LIFT's)."""
    init: Literal["random", "class_means"] = "random"
    """class_means: each class's vector starts as the mean of its training images' features, normalised: one pass over
    them before training."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1000:
            raise ValueError(f"scale must be above 0 and at most 1,000, not {self.scale:g}")


def full_precision(x: Tensor) -> Any:
    """Mixed precision off: logits of norm 16 or 30 would keep two digits in bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


class Cosine(nn.Linear):
    """Scaled cosines of features (N, F) and class vectors: (N, K)."""

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


def classifier(config: ClassifierConfig, in_features: int, out_features: int) -> nn.Linear:
    if config.kind == "cosine":
        return Cosine(in_features, out_features, config.scale)
    return nn.Linear(in_features, out_features)


@torch.no_grad()
def start_from_means(head: nn.Linear, sums: Tensor) -> None:
    """The class vectors become the normalised means of which `sums` (K, F) are multiples; a bias becomes zero. Classes
    whose sum is zero keep what they have."""
    norms = sums.norm(dim=1, keepdim=True)
    head.weight.copy_(torch.where(norms > 0, sums / norms.clamp(min=1e-30), head.weight.to(sums)))
    if head.bias is not None:
        head.bias.zero_()
