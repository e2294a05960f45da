"""Jitter over batches of views, and RandAugment, of which some pixels differ from Pillow's by a level or two."""

import copy
import functools
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment as TimmRandAugment
from torch import Tensor
from torchvision import transforms

from rescom_timm.data.draws import BatchedStep, Draws, Size
from rescom_timm.data.pixels import (
    BLENDS,
    PLAIN,
    autocontrast,
    blend,
    change,
    equalize,
    gray,
    lookup,
    mean_gray,
    smooth,
    to_device,
    warp,
)


class Jitter(BatchedStep):
    """torchvision's ColorJitter without hue."""

    largest = 64 * 64

    def __init__(self, step: transforms.ColorJitter) -> None:
        self.ranges = [step.brightness, step.contrast, step.saturation]

    @classmethod
    def takes(cls, step: object) -> bool:
        """See `BatchedStep.takes`."""
        return isinstance(step, transforms.ColorJitter) and step.hue is None

    def words(self, size: Size) -> int:
        """See `BatchedStep.words`."""
        return 3 + sum(bounds is not None for bounds in self.ranges)

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        """See `BatchedStep.__call__`."""
        factors: dict[int, tuple[str, np.ndarray]] = {}
        order = np.tile(np.arange(4), (len(views), 1))  # torch.randperm(4)
        row = np.arange(len(views))
        for place in range(3):
            other = place + draws.below(4 - place)
            order[row, place], order[row, other] = order[row, other], order[row, place]
        for i, (name, bounds) in enumerate(zip(("Brightness", "Contrast", "Color"), self.ranges, strict=True)):
            if bounds is not None:
                factors[i] = name, draws.uniform(*bounds)
        for place in range(4):
            for i, (name, factor) in factors.items():
                change(views, order[:, place] == i, functools.partial(_enhance, name, factor))
        return views


def _enhance(name: str, factors: np.ndarray, views: Tensor, rows: np.ndarray) -> Tensor:
    """ImageEnhance: the views blended with black, their mean gray, their gray or their smoothed form."""
    factor = to_device(factors[rows].astype(np.float32), views)
    if name == "Brightness":
        other = torch.zeros_like(views[:, :1])
    elif name == "Contrast":
        other = mean_gray(views).view(-1, 1, 1, 1)
    else:
        other = gray(views) if name == "Color" else smooth(views)
    return blend(views, other, factor)


class NearRandAugment(BatchedStep):
    """timm's RandAugment: timm draws, and its operations record their arguments."""

    equal = False
    MATRICES: ClassVar[dict[str, Callable[[np.ndarray, Size], list[np.ndarray | float]]]] = {
        "ShearX": lambda value, size: [1, value, 0, 0, 1, 0],
        "ShearY": lambda value, size: [1, 0, 0, value, 1, 0],
        "TranslateXRel": lambda value, size: [1, 0, value * size[1], 0, 1, 0],
        "TranslateYRel": lambda value, size: [1, 0, 0, 0, 1, value * size[0]],
        "Rotate": lambda value, size: _rotation(value, size),
    }
    LEVELS: ClassVar[dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
        "Posterize": lambda level, bits: level & ~(2 ** (8 - np.minimum(bits, 8)) - 1),
        "Solarize": lambda level, limit: np.where(level < limit, level, 255 - level),
        "SolarizeAdd": lambda level, more: np.where(level < 128, np.minimum(level + more, 255), level),
        "Invert": lambda level, none: 255 - level + 0 * none,
    }
    NAMES = (*MATRICES, *LEVELS, *PLAIN, "Brightness", *BLENDS)

    def __init__(self, step: TimmRandAugment) -> None:
        self.fill = step.ops[0].kwargs["fillcolor"]
        self.notes = 3 * step.num_layers
        self.recorder = copy.deepcopy(step)
        for operation in self.recorder.ops:
            operation.aug_fn = functools.partial(self._note, operation.name.removesuffix("Increasing"))

    @classmethod
    def takes(cls, step: object) -> bool:
        """See `BatchedStep.takes`."""
        return isinstance(step, TimmRandAugment) and all(
            op.name.removesuffix("Increasing") in cls.NAMES for op in step.ops
        )

    def note(self) -> list[float]:
        """See `BatchedStep.note`."""
        noted: list[float] = self.recorder([])
        return noted + [-1.0] * (self.notes - len(noted))

    @classmethod
    def _note(cls, name: str, noted: list[float], value: float = 0.0, *, resample: Any, **_: Any) -> list[float]:
        """Replaces timm's function of image and value: records operation, value and interpolation."""
        if name in cls.MATRICES:
            resample = random.choice(resample)  # as timm does at this point
        return [*noted, cls.NAMES.index(name), value, float(resample == Image.Resampling.BICUBIC)]

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        """See `BatchedStep.__call__`."""
        for _ in range(self.notes // 3):
            operation, value, cubic = draws.note(), draws.note(), draws.note() == 1
            matrices = np.zeros((len(views), 6))
            for number, name in enumerate(self.MATRICES):
                chosen = operation == number
                entries = self.MATRICES[name](value[chosen], (views.shape[2], views.shape[3]))
                matrices[chosen] = np.stack(np.broadcast_arrays(value[chosen], *entries)[1:], axis=1)
            warped = (operation >= 0) & (operation < len(self.MATRICES))
            for taps, these in ((2, warped & ~cubic), (4, warped & cubic)):
                change(views, these, functools.partial(self._warp, matrices, taps))
            for number, name in enumerate(self.NAMES[len(self.MATRICES) :], start=len(self.MATRICES)):
                chosen = operation == number
                if name in BLENDS or name == "Brightness":
                    change(views, chosen, functools.partial(_enhance, name, value))
                elif name in self.LEVELS:
                    change(views, chosen, functools.partial(self._replace, name, value))
                else:
                    change(views, chosen, autocontrast if name == "AutoContrast" else equalize)
        return views

    def _warp(self, matrices: np.ndarray, taps: int, views: Tensor, rows: np.ndarray) -> Tensor:
        return warp(views, matrices[rows], taps, self.fill)

    def _replace(self, name: str, value: np.ndarray, views: Tensor, rows: np.ndarray) -> Tensor:
        table = self.LEVELS[name](np.arange(256), value[rows, None].astype(np.int64))
        return lookup(views, to_device(table.astype(np.uint8), views))


def _rotation(degrees: np.ndarray, size: Size) -> list[np.ndarray | float]:
    """Image.rotate's matrix: about the middle, counter-clockwise."""
    x, y = size[1] / 2, size[0] / 2
    cos, sin = np.cos(-np.radians(degrees)), np.sin(-np.radians(degrees))
    return [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
