"""What is asked for, and what a budget holds: backbone, epochs, candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from rescom_timm.errors import InputError
from rescom_timm.fitting.training import Kind, Pace


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


def default_backbones(device: str, minutes: float) -> list[Backbone]:
    """The rows for a device, the default for the budget first, then the others, of which one may be in timm's cache."""
    rows = [row for row in BACKBONES if row.device == ("cpu" if device == "cpu" else "cuda")]
    fit = [row for row in rows if row.minutes <= minutes]
    return [*reversed(fit), *(row for row in rows if row not in fit)]


@dataclass(frozen=True)
class FitOptions:
    """What the command says; the same again goes on with what was interrupted."""

    source: str
    """A folder, a list, a recipe, or an id of the Hub."""
    minutes: float = 20.0
    backbones: tuple[str, ...] = ()
    """timm names; the best of several by its probe goes on. None: by BACKBONES."""
    size: int | None = None
    """Side of the images that the net sees; None: that of its weights."""
    device: str | None = None
    """cpu or cuda; None: a GPU where there is one."""
    weights_file: str | None = None
    """Of the one backbone, in timm's format; "none" trains from scratch."""
    class_features: str | None = None
    """File of class features from class names, for a backbone whose features are in their space (CLIP, SigLIP)."""
    use_validation: bool = False
    """Fit the chosen head on the validation images too, at the end."""
    seed: int = 0
    overrides: tuple[str, ...] = ()
    """key=value over a recipe."""
    images: dict[str, Any] = field(default_factory=dict)
    """What else `OwnImages` takes: list, columns, splits."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise InputError("fit.minutes", f"--minutes {self.minutes:g}: give a positive number")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Training(NamedTuple):
    """A planned candidate: its kind, and its epochs at most."""

    kind: Kind
    epochs: int


MOST = {"linear": 20, "cosine": 30}
"""Epochs of a candidate that a larger budget does not raise."""
BOTH = 10
"""Epochs from which on a budget is shared by both kinds."""
SECONDS = 10.0
"""For what is not measured: export, reports."""


def reserve(pace: Pace, images: dict[str, int], refits: bool) -> float:
    """Return the seconds that follow the trainings.

    They go to the test images once, three soups on validation and, where a head may be re-fitted, the features of the
    trained net.
    """
    passes = images["test"] + 3 * images["validation"]
    passes += (2 * images["train"] + images["validation"]) if refits else 0
    return SECONDS + passes * pace.forward


def trainings(seconds: float, pace: Pace, images: dict[str, int]) -> list[Training]:
    """The candidates that so many seconds hold; none where that is less than an epoch."""
    epoch = images["train"] * pace.step + images["validation"] * pace.forward
    epochs = int(seconds / epoch)
    if epochs < BOTH:
        return [Training("linear", epochs)] if epochs >= 1 else []
    linear = min(MOST["linear"], epochs // 2)
    return [Training("linear", linear), Training("cosine", min(MOST["cosine"], epochs - linear))]


def described(plan: Sequence[Training]) -> str:
    """A plan in words."""
    if not plan:
        return "the probe alone"
    names = {"linear": "from the probe", "cosine": "from class means"}
    return "all weights trained " + " and ".join(
        f"{names[one.kind]} for {one.epochs} epoch{'s' * (one.epochs > 1)}" for one in plan
    )
