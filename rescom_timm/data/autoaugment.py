"""AutoAugment over batches of views, with Pillow's pixels."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as VF

from rescom_timm.data.draws import BatchedStep, Draws, Size
from rescom_timm.data.pixels import (
    BLENDS,
    PLAIN,
    autocontrast,
    change,
    equalize,
    gather,
    gray,
    lookup,
    mean_gray,
    paint,
    smooth,
    to_device,
)
from rescom_timm.data.transforms import AutoAugment, magnitudes

LOOKUPS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Brightness": lambda image, value: VF.adjust_brightness(image, 1 + value),
    "Posterize": lambda image, value: VF.posterize(image, int(value)),
    "Solarize": VF.solarize,
    "Invert": lambda image, value: VF.invert(image),
}


class _Tables(NamedTuple):
    """AutoAugment for images of one size. Operation o is of kind[o] and uses row argument[o] of that kind's table."""

    operation: np.ndarray
    """(policies, 2, 2) int64: of sub-policy, place and drawn sign (0 negates)."""
    probability: np.ndarray
    """(policies, 2) float32."""
    kind: np.ndarray
    argument: np.ndarray
    sources: Tensor
    """(_, H * W) int64: the pixel that each pixel of a warped image comes from."""
    outside: Tensor
    """(_, H, W) uint8: 1 where it comes from outside."""
    lookups: Tensor
    """(_, 256) uint8: of operations that change each level to another."""
    blends: Tensor
    """(_, 256, 256) uint8: Image.blend of a level of the first image (row) and of the second (column)."""


WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


@functools.lru_cache(maxsize=16)
def _tables(subpolicies: tuple[Any, ...], size: Size, device: torch.device) -> _Tables:
    """subpolicies: pairs of (operation, probability, number of the magnitude), as torchvision writes them."""
    space = magnitudes(10, size)
    cases: dict[tuple[str, float], int] = {}
    operation = np.zeros((len(subpolicies), 2, 2), np.int64)
    for i, j, sign in np.ndindex(operation.shape):
        name, _, level = subpolicies[i][j]
        values, signed = space[name]
        value = 0.0 if level is None else float(values[level])
        operation[i, j, sign] = cases.setdefault((name, -value if signed and not sign else value), len(cases))
    kind, argument = [], []
    sources: list[np.ndarray] = []
    lookups: list[np.ndarray] = []
    blends: list[np.ndarray] = []
    for name, value in cases:
        if name in WARPS:
            argument.append(len(sources))
            sources.append(_source(name, value, size))
        elif name in BLENDS:
            argument.append(len(blends))
            blends.append(_blend_table(1.0 + value))
        elif name in PLAIN:
            argument.append(0)
        else:
            argument.append(len(lookups))
            lookups.append(_lookup_table(name, value))
        kind.append("warp" if name in WARPS else name if name in BLENDS + PLAIN else "lookup")
    where = torch.from_numpy(np.stack(sources)).to(device)
    return _Tables(
        operation,
        np.array([[p for _, p, _ in pair] for pair in subpolicies], np.float32),
        np.array(kind),
        np.array(argument),
        where.clamp(min=0).flatten(1),
        (where < 0).to(torch.uint8),
        torch.from_numpy(np.stack(lookups)).to(device),
        torch.from_numpy(np.stack(blends)).to(device),
    )


def _source(name: str, value: float, size: Size) -> np.ndarray:
    """The number of the pixel that each pixel comes from, (H, W) int64; -1 from outside.

    Found by warping an image whose colours are the numbers of its pixels.
    """
    number = np.arange(size[0] * size[1]).reshape(size)
    colours = np.stack([number & 255, number >> 8 & 255, (number >> 16) + 1], axis=-1).astype(np.uint8)
    warped = _warped(Image.fromarray(colours), name, value)
    red, green, blue = np.moveaxis(np.asarray(warped).astype(np.int64), -1, 0)
    return np.where(blue > 0, red + (green << 8) + (blue - 1 << 16), -1)


def _warped(image: Image.Image, name: str, value: float) -> Image.Image:
    """A warp of AutoAugment as torchvision asks Pillow for it; what it uncovers is black."""
    if name == "Rotate":
        return VF.rotate(image, value, fill=[0, 0, 0])
    along, down = (value, 0.0) if name.endswith("X") else (0.0, value)
    if name.startswith("Translate"):
        return VF.affine(image, 0.0, [int(along), int(down)], 1.0, [0.0, 0.0], fill=[0, 0, 0])
    shear = [math.degrees(math.atan(along)), math.degrees(math.atan(down))]
    return VF.affine(image, 0.0, [0, 0], 1.0, shear, fill=[0, 0, 0], center=[0, 0])


def _lookup_table(name: str, value: float) -> np.ndarray:
    """(256,) uint8: what an operation makes of each level."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2))
    return np.asarray(LOOKUPS[name](ramp, value))[0, :, 0]


def _blend_table(factor: float) -> np.ndarray:
    row, column = (Image.fromarray(levels.astype(np.uint8)) for levels in np.indices((256, 256)))
    return np.asarray(Image.blend(row, column, factor))


class BatchedAutoAugment(BatchedStep):
    """AutoAugment by precomputed tables of pixel sources and levels."""

    of = AutoAugment
    draws = 5

    def __init__(self, step: transforms.AutoAugment) -> None:
        self.subpolicies, self.fill = tuple(step.policies), cast(int, step.fill)

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        """See `BatchedStep.__call__`."""
        tables = _tables(self.subpolicies, (views.shape[2], views.shape[3]), views.device)
        subpolicy = draws.below(len(tables.operation))
        chances, signs = [draws.uniform(), draws.uniform()], [draws.below(2), draws.below(2)]
        for place in (0, 1):
            applied = chances[place] <= tables.probability[subpolicy, place]
            self.apply(views, np.where(applied, tables.operation[subpolicy, place, signs[place]], -1), tables)
        return views

    def apply(self, views: Tensor, operation: np.ndarray, tables: _Tables) -> None:
        """Apply operation (N,) int64 to each view, -1 for none, in place."""
        kind, argument = tables.kind[operation], tables.argument[operation]
        size, fill = views.shape[2:], to_device(np.array(self.fill, np.uint8), views)

        def warp(part: Tensor, row: Tensor) -> Tensor:
            return paint(gather(part, tables.sources[row]).unflatten(2, size), tables.outside[row][:, None], fill)

        def blend(part: Tensor, other: Tensor, row: Tensor) -> Tensor:
            index = (row.int()[:, None, None, None] * 256 + other) * 256 + part
            return tables.blends.view(-1).index_select(0, index.view(-1)).view_as(part)

        actions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "warp": warp,
            "lookup": lambda part, row: lookup(part, tables.lookups[row]),
            "Contrast": lambda part, row: lookup(part, tables.blends[row, mean_gray(part)]),
            "Color": lambda part, row: blend(part, gray(part), row),
            "Sharpness": lambda part, row: blend(part, smooth(part), row),
            "AutoContrast": autocontrast,
            "Equalize": equalize,
        }
        for name, action in actions.items():
            change(views, (kind == name) & (operation >= 0), functools.partial(_with_rows, action, argument))


def _with_rows(
    action: Callable[[Tensor, Tensor], Tensor], argument: np.ndarray, part: Tensor, rows: np.ndarray
) -> Tensor:
    return action(part, to_device(argument[rows], part))
