"""What is asked for, and what a budget holds: backbone, epochs, candidates."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rescom_timm.errors import InputError
from rescom_timm.fitting.training import Kind, Pace


@dataclass(frozen=True)
class FitOptions:
    """What the command says; the same again goes on with what was interrupted."""

    source: str
    """A folder, a list, a recipe, or an id of the Hub."""
    minutes: float = 20.0
    backbones: tuple[str, ...] = ()
    """timm names; the best of several by its probe goes on. None: by own_rules.BACKBONES."""
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
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise InputError("fit.argument", f"--size {self.size}: give the side of the images in pixels")

    def to_dict(self) -> dict[str, object]:
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
SOURCES: dict[Kind, str] = {"linear": "from the probe", "cosine": "from class means"}
"""Where the head of a training starts."""
SECONDS = 10.0
"""For what is not measured: export, reports."""
PASSES = 250
"""Passes over its rows that a head takes at all of its ridges; 232 and 207 on 2,430 rows of 40 classes."""
LEAST = 5
"""Images of a class that a sample has at least, or all of the class."""


@dataclass(frozen=True)
class Frozen:
    """What is done with the frozen nets in the time there is."""

    versions: int = 2
    """Of training images: as they are, and flipped."""
    logistic: bool = True
    """Whether logistic regression is fitted too."""
    at_most: int | None = None
    """Training and validation images of a class; None: all."""


def frozen(seconds: float, pace: Pace, train: np.ndarray, validation: np.ndarray, fits: int) -> Frozen | None:
    """What so many seconds hold; None where that is less than LEAST images of each class.

    First flipped images are left out, then logistic regression, then images of frequent classes: rare ones stay whole.
    train, validation: images of each class (K,). fits: of a head to all training images, cross-validation included.
    """
    for choice in (Frozen(), Frozen(1), Frozen(1, False)):
        if frozen_seconds(choice, pace, train, validation, fits) <= seconds:
            return choice

    def needed(at_most: int) -> float:
        return frozen_seconds(Frozen(1, False, at_most), pace, train, validation, fits)

    held = bisect_right(range(LEAST, int(train.max())), seconds, key=needed)
    return Frozen(1, False, LEAST + held - 1) if held else None


def frozen_seconds(choice: Frozen, pace: Pace, train: np.ndarray, validation: np.ndarray, fits: int) -> float:
    """Return the seconds of a choice: features and heads."""
    images, shown = taken(train, choice.at_most), taken(validation, choice.at_most)
    rows = choice.versions * images
    return pace.forward * (rows + shown) + (1 + choice.logistic) * fits * PASSES * pace.head * rows


def taken(counts: np.ndarray, at_most: int | None) -> int:
    """Return the images in a sample. counts: images of each class (K,)."""
    return int((counts if at_most is None else np.minimum(counts, at_most)).sum())


@dataclass(frozen=True)
class Reserve:
    """Seconds of what follows the trainings."""

    end: float
    """Evaluation and export of the chosen net."""
    training: float = 0.0
    """Of each training: its evaluations and the soup by default."""
    options: float = 0.0
    """Of each training: other soups and a re-fitted head, which are left out where time is short."""

    def after(self, kinds: int) -> float:
        """Of so many trainings."""
        return self.end + kinds * (self.training + self.options)


def trainings(
    seconds: float, pace: Pace, images: dict[str, int], reserve: Reserve, times: int = 1,
    kinds: Sequence[Kind] = ("linear", "cosine"), workers: int = 1,
) -> list[Training]:  # fmt: skip
    """The candidates that so many seconds hold, with what follows them; none where that is less than an epoch.

    times: how often the chosen one is trained. kinds: of trainings; a few epochs go to the last one alone. workers: of
    which two train at the same time.
    """
    epoch = times * epoch_seconds(pace, images)
    each = int((seconds - reserve.after(2)) / epoch)
    if len(kinds) == 2 and (epochs := each * min(workers, 2)) >= BOTH:
        linear = min(MOST["linear"], epochs // 2)
        return [Training("linear", linear), Training("cosine", min(MOST["cosine"], epochs - linear, each))]
    for after in (reserve.after(1), reserve.end + reserve.training):
        if (epochs := min(MOST[kinds[-1]], int((seconds - after) / epoch))) >= 1:
            return [Training(kinds[-1], epochs)]
    return []


def epoch_seconds(pace: Pace, images: dict[str, int]) -> float:
    """Return the seconds of an epoch and its evaluation."""
    return images["train"] * pace.step + images["validation"] * pace.forward


def described(plan: Sequence[Training]) -> str:
    """A plan in words."""
    if not plan:
        return "the probe alone"
    return "all weights trained " + " and ".join(
        f"{SOURCES[one.kind]} for {one.epochs} epoch{'s' * (one.epochs > 1)}" for one in plan
    )
