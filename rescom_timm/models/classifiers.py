"""Classifiers over features (N, F): linear, or scaled cosines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rescom_timm.class_names import rows_of


@dataclass(frozen=True)
class ClassifierConfig:
    kind: Literal["linear", "cosine"] = "linear"
    """cosine: features and class vectors normalised, no bias. It has no place in a plain timm model, whose linear layer
    ranks the classes the same with other probabilities; rescom_timm.from_pretrained has the exact ones."""
    scale: float = 25.0
    """By which cosines are multiplied (LIFT's)."""
    init: Literal["random", "class_means", "file"] = "random"
    """class_means: each class's vector starts as the mean of its training images' features, normalised: one pass over
    them before training. file: as it stands in `file`."""
    file: str | None = None
    """Safetensors with a tensor class_features (K, F), such as  rescom-timm class-features  makes of class names."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1000:
            raise ValueError(f"scale must be above 0 and at most 1,000, not {self.scale:g}")
        if (self.init == "file") != (self.file is not None):
            raise ValueError("init: file and the file's name in file belong together")


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

    def ranking_alike(self, norm: float) -> nn.Linear:
        """A linear layer that ranks the classes of every feature as this one does. Its logits are these ones times the
        feature's norm / `norm`."""
        layer = nn.Linear(self.in_features, self.out_features)
        with torch.no_grad():
            layer.weight.copy_(self.scale / norm * F.normalize(self.weight, dim=1))
            layer.bias.zero_()
        return layer


def classifier(config: ClassifierConfig, in_features: int, out_features: int) -> nn.Linear:
    if config.kind == "cosine":
        return Cosine(in_features, out_features, config.scale)
    return nn.Linear(in_features, out_features)


def read_class_features(path: str | Path, class_names: Sequence[str], width: int) -> Tensor:
    """Class features (K, F) from a file, in the order of the classes. Raises ValueError, naming them, where its classes
    are others, or its shape is not (K, width); FileNotFoundError where there is none."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file of class features {path}: make one with  rescom-timm class-features")
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("class_features")
            names = json.loads((file.metadata() or {}).get("class_names", "null"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} holds no tensor class_features: {error}") from None
    if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or ()):
        raise ValueError(f"{path} holds class_names that are no list of names")
    if features.dim() != 2 or not features.dtype.is_floating_point:
        raise ValueError(
            f"{path} holds class features of {tuple(features.shape)} {features.dtype}, no matrix of floats"
        )
    features = features.float()
    if names is not None:
        rows = rows_of(class_names, names, "data.source", str(path))
        features = features[rows] if rows is not None and len(features) == len(names) else features
    if features.shape != (len(class_names), width) or not bool(features.isfinite().all()):
        raise ValueError(
            f"{path} holds class features of {tuple(features.shape)}, and ({len(class_names)}, {width}) finite ones "
            "are needed: classes, and features of the backbone"
        )
    return features


@torch.no_grad()
def start_from_means(head: nn.Linear, sums: Tensor) -> None:
    """The class vectors become the normalised means of which `sums` (K, F) are multiples; a bias becomes zero. Classes
    whose sum is zero keep what they have."""
    norms = sums.norm(dim=1, keepdim=True)
    head.weight.copy_(torch.where(norms > 0, sums / norms.clamp(min=1e-30), head.weight.to(sums)))
    if head.bias is not None:
        head.bias.zero_()
