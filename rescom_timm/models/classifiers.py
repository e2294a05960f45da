"""Classifiers over features (N, F): linear, or scaled cosines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rescom_timm.class_names import rows_of
from rescom_timm.errors import InputError, MissingFileError


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier and how its class vectors start."""

    kind: Literal["linear", "cosine"] = "linear"
    """cosine: features and class vectors normalised, no bias. A plain timm model has a linear layer instead, which
    ranks the classes the same with other probabilities; rescom_timm.from_pretrained has the exact ones."""
    scale: float = 25.0
    """Factor of the cosines (LIFT's)."""
    init: Literal["random", "class_means", "file"] = "random"
    """class_means: each class vector starts as the normalised mean of its training images' features, computed in one
    pass before training. file: as in `file`."""
    file: str | None = None
    """Safetensors with a tensor class_features (K, F), as  rescom-timm class-features  makes from class names."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1000:
            raise InputError("recipe.value", f"scale must be above 0 and at most 1,000, not {self.scale:g}")
        if (self.init == "file") != (self.file is not None):
            raise InputError("recipe.conflict", "init: file needs the name of a file in file, and the reverse")


def full_precision(x: Tensor) -> torch.autocast:
    """Switch autocast off: logits of norm 16 or 30 would keep two digits in bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


class Cosine(nn.Linear):
    """Scaled cosines of features (N, F) and class vectors: (N, K)."""

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K), float32 or wider."""
        with full_precision(x):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def ranking_alike(self, norm: float) -> nn.Linear:
        """A linear layer of the same ranking; its logits are these times the norm of the features / `norm`."""
        return linear(self.scale / norm * F.normalize(self.weight, dim=1), self.weight.new_zeros(self.out_features))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with this weight (K, F) and bias (K,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return layer


def classifier(config: ClassifierConfig, in_features: int, out_features: int) -> nn.Linear:
    """The classifier of a config."""
    if config.kind == "cosine":
        return Cosine(in_features, out_features, config.scale)
    return nn.Linear(in_features, out_features)


def read_class_features(path: str | Path, class_names: Sequence[str], width: int) -> Tensor:
    """Class features (K, F) from a file, in the order of the classes.

    Raises InputError for other classes, naming them, or a shape other than (K, width), and MissingFileError if there is
    no file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError("file.missing", f"no file {path}: make it with  rescom-timm class-features")
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("class_features")
            names = json.loads((file.metadata() or {}).get("class_names", "null"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise InputError("net.class_features", f"{path} has no tensor class_features: {error}") from None
    if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or ()):
        raise InputError("net.class_features", f"{path}: class_names must be a list of names")
    shape, number = tuple(features.shape), features.dtype
    if len(shape) != 2 or not number.is_floating_point:
        raise InputError("net.class_features", f"{path}: class_features must be float (K, F), not {shape} {number}")
    features = features.float()
    if names is not None:
        rows = rows_of(class_names, names, "data.source", str(path))
        features = features[rows] if rows is not None and len(features) == len(names) else features
    if features.shape != (len(class_names), width) or not bool(features.isfinite().all()):
        raise InputError(
            "net.class_features",
            f"{path}: class_features must be finite and of {len(class_names)} classes and the backbone's {width} "
            f"features, not {tuple(features.shape)}",
        )
    return features


@torch.no_grad()
def start_from_means(head: nn.Linear, sums: Tensor) -> None:
    """Set the class vectors to normalised means, of which `sums` (K, F) are multiples, and a bias to zero.

    Classes whose sum is zero keep their vector.
    """
    norms = sums.norm(dim=1, keepdim=True)
    head.weight.copy_(torch.where(norms > 0, sums / norms.clamp(min=1e-30), head.weight.to(sums)))
    if head.bias is not None:
        head.bias.zero_()
