"""The rules by which `init` and `fit` choose for own images: backbone, length of a training, method, rates.

RESULTS.md has what was measured ("Fitting photographs", "init on photographs"); rows for a GPU are not measured.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from rescom_timm.models.net import PretrainedCfg

SMALL = 64
"""Shorter side of images, in pixels, up to which a CIFAR ResNet is trained from scratch."""
EVEN = 1.5
"""Imbalance below which classes count as even."""
CONTRAST = 100
"""Classes from which on ResCom is the method where a net trains from scratch: ahead on 101, within the noise."""
RATES: dict[Literal["linear", "cosine"], float] = {"linear": 0.002, "cosine": 0.005}
"""Learning rate of a fitted head in fine-tuning, by its kind; the backbone has BACKBONE of it."""
BACKBONE = 0.3


class Backbone(NamedTuple):
    """A row of BACKBONES."""

    device: str
    minutes: float
    """From which budget on."""
    name: str
    megabytes: int
    """Of the download."""


BACKBONES = (
    Backbone("cpu", 0, "tf_efficientnet_lite0.in1k", 19),
    Backbone("cpu", 60, "convnext_tiny.fb_in22k_ft_in1k", 114),
    Backbone("cuda", 0, "convnext_tiny.fb_in22k_ft_in1k", 114),
    Backbone("cuda", 10, "convnext_small.fb_in22k_ft_in1k", 201),
    Backbone("cuda", 60, "convnext_base.fb_in22k_ft_in1k", 354),
)
"""The default by device and minutes. Lite0 is what was measured here; the others are by their ImageNet accuracy."""


def default_backbones(device: str, minutes: float = 20.0) -> list[Backbone]:
    """The rows for a device, the default for the budget first, then the others, of which one may be in timm's cache."""
    rows = [row for row in BACKBONES if row.device == ("cpu" if device == "cpu" else "cuda")]
    fit = [row for row in rows if row.minutes <= minutes]
    return [*reversed(fit), *(row for row in rows if row not in fit)]


class Row(NamedTuple):
    """A row of ROWS."""

    start: Literal["weights", "scratch"]
    device: Literal["cpu", "cuda"]
    images: float
    """Up to so many training images."""
    kind: Literal["fine_tune", "probe", "tune", "scratch"]
    """Which of SETTINGS."""
    epochs: int
    batch: int


ROWS = (
    Row("weights", "cpu", 1_000, "fine_tune", 10, 32),
    Row("weights", "cpu", 5_000, "fine_tune", 5, 32),
    Row("weights", "cpu", math.inf, "probe", 0, 32),
    Row("weights", "cuda", 20_000, "fine_tune", 30, 32),
    Row("weights", "cuda", 200_000, "fine_tune", 15, 32),
    Row("weights", "cuda", math.inf, "fine_tune", 8, 32),
    Row("scratch", "cpu", 1_000, "scratch", 100, 32),
    Row("scratch", "cpu", 20_000, "scratch", 100, 128),
    Row("scratch", "cpu", math.inf, "scratch", 30, 128),
    Row("scratch", "cuda", 1_000, "scratch", 200, 32),
    Row("scratch", "cuda", 200_000, "scratch", 200, 128),
    Row("scratch", "cuda", math.inf, "scratch", 100, 128),
)
"""Epochs and batch by start, device and training images, such that a CPU takes hours at most."""

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "fine_tune": (
        {
            "net": {"classifier": {"kind": "cosine", "init": "class_means"}, "frozen_statistics": True},
            "optimizer": {"lr": RATES["cosine"], "weight_decay": 1e-4, "encoder_lr_scale": BACKBONE},
            "schedule": {"name": "cosine", "by": "update", "final": 0.01},
        },
        "head: cosine, from class means; then all weights train, the backbone's at 0.3 of the rate: where the head "
        "starts mattered more than the loss",
    ),
    "probe": (
        {"method": {"name": "probe"}, "schedule": {"name": "constant"}},
        "head: fitted over the frozen net, in two passes over the images: to train all weights would take a CPU days",
    ),
    "tune": (
        {
            "net": {"classifier": {"kind": "cosine", "init": "class_means"}},
            "optimizer": {"lr": 0.01, "weight_decay": 5e-4},
            "schedule": {"name": "cosine"},
        },
        "head: cosine from class means; less than 2% of the weights train, for 10 epochs (as LIFT, arXiv 2309.10019)",
    ),
    "scratch": (
        {
            "optimizer": {"lr": 0.1, "weight_decay": 5e-4},
            "schedule": {"name": "cosine", "warmup_epochs": 5},
        },
        "",
    ),
}
"""Sections of a recipe by the kind of its training, and why."""


def row_for(start: str, is_cpu: bool, images: int) -> Row:
    """The row for so many images, its batch no larger than they are."""
    device = "cpu" if is_cpu else "cuda"
    row = next(row for row in ROWS if (row.start, row.device) == (start, device) and images <= row.images)
    return row._replace(batch=min(row.batch, 2 ** int(math.log2(images))))


def rescom(counts: np.ndarray) -> dict[str, object]:
    """The section `method` of ResCom with a contrastive branch that learns, for classes of these counts (K,)."""
    q = int(np.clip(round(1000 / len(counts)), 4, 10))
    beta = 0.99 if counts.max() > 100 else 0.999999
    return {"name": "rescom", "queue": {"per_class": q}, "positives": q, "beta": beta}


def method(counts: np.ndarray, start: str) -> tuple[dict[str, object], str]:
    """The section `method` for classes of these counts (K,), and why."""
    imbalance, views = counts.max() / max(counts.min(), 1), 2 if start == "scratch" else 1
    if imbalance < EVEN:
        return {"name": "cross_entropy", "views": views}, "method: cross-entropy, because the classes are nearly even"
    why = f"an imbalance of {imbalance:.3g}"
    if start == "scratch" and len(counts) >= CONTRAST:
        section = rescom(counts)
        return section, (
            f"method: ResCom for {why} and {len(counts):,} classes: 1 to 2 points ahead on 101, within the noise; "
            f"Q = Qp = {section['positives']}, because with Qp = 1 it collapsed"
        )
    level = "on two views" if views == 2 else "on one view"
    section = {"name": "balanced_softmax", "views": views}
    return section, f"method: Balanced Softmax {level} for {why}; ResCom's contrast added nothing to it here"


def training_view(size: int) -> str:
    """The policy of fine-tuning at a size in pixels."""
    return f"random_resized_crop({size},0.35,1,bicubic) | flip"


def evaluation_view(cfg: PretrainedCfg, size: int) -> str:
    """The policy by which a net of timm's pretrained_cfg sees images whole, at a size in pixels."""
    how = cfg["interpolation"] if cfg["interpolation"] in ("bicubic", "bilinear") else "bicubic"
    return f"resize({round(size / cfg['crop_pct'])},{how}) | center_crop({size})"


def views(cfg: PretrainedCfg, size: int, pretrained: bool, small: bool) -> dict[str, object]:
    """The section `views` at a size in pixels. cfg: timm's pretrained_cfg. small: images of up to SMALL pixels."""
    if pretrained:
        normalisation = {"mean": list(cfg["mean"]), "std": list(cfg["std"])}
        return {"train": training_view(size), "eval": evaluation_view(cfg, size), **normalisation}
    if small:
        same = f"resize({size}) | center_crop({size})"
        return {"train": f"{same} | crop({size},{max(1, size // 8)}) | flip", "eval": same}
    return {"train": f"random_resized_crop({size}) | flip", "eval": evaluation_view(cfg, size)}


def options_of(cfg: PretrainedCfg, size: int) -> dict[str, object]:
    """net.options with which a backbone takes images of that size."""
    return {"img_size": size} if cfg.get("fixed_input_size") and size != cfg["input_size"][1] else {}
