"""Pillow's arithmetic over batches of views, on any device."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

PLAIN = ("AutoContrast", "Equalize")

LUMA = (19595, 38470, 7471)
"""Shares of red, green and blue in gray, in 2^-16."""
BLENDS = ("Contrast", "Color", "Sharpness")


def change(views: Tensor, chosen: np.ndarray, function: Callable[[Tensor, np.ndarray], Tensor]) -> None:
    """views[chosen] = function(views[chosen], the row numbers), for a mask (N,) on the host."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return
    index = to_device(rows, views)
    changed = function(views.index_select(0, index), rows)
    if views.device.type == "cpu":
        views.numpy()[rows] = changed.numpy()  # 25 times as fast as index_copy_ here, and torch.where slower still
    else:
        views.index_copy_(0, index, changed)


def paint(views: Tensor, area: Tensor, colour: Tensor) -> Tensor:
    """Set the colour where `area` is 1, uint8. On a CPU this takes a tenth of the time of torch.where."""
    return views.mul_(1 - area).add_(area * colour)


def to_device(array: np.ndarray, like: Tensor) -> Tensor:
    """The array as a tensor on the device of `like`."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if like.device.type == "cuda" and tensor.nbytes > 2**16:
        tensor = tensor.pin_memory()  # so much of memory that can be swapped is only sent when the device is idle
    return tensor.to(like.device, non_blocking=True)


# ----------------------------------------------------------------------------------------------- Pillow's arithmetic


def gather(views: Tensor, source: Tensor) -> Tensor:
    """(N, 3, P): the pixels `source` (N, P) of each view."""
    return views.flatten(2).gather(2, source[:, None].expand(-1, 3, -1))


def lookup(views: Tensor, table: Tensor) -> Tensor:
    """Each level replaced by its entry in the table, (N, 256) or, by channel, (N, 3, 256)."""
    table = table.view(len(views), -1, 256).expand(-1, 3, -1).contiguous()
    offset = torch.arange(0, table.numel(), 256, dtype=torch.int32, device=views.device).view(len(views), 3, 1, 1)
    return table.view(-1).index_select(0, (views + offset).view(-1)).view_as(views)


def gray(views: Tensor) -> Tensor:
    """convert("L"): int32 (N, 1, H, W)."""
    red, green, blue = views.int().split(1, dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 0x8000) >> 16


def mean_gray(views: Tensor) -> Tensor:
    """The rounded mean level of gray, (N,) int64, to which ImageEnhance.Contrast blends."""
    pixels = views.shape[2] * views.shape[3]
    return (2 * gray(views).sum((1, 2, 3)) + pixels).div(2 * pixels, rounding_mode="floor")


def smooth(views: Tensor) -> Tensor:
    """filter(SMOOTH), int32: the mean over 3 x 3 pixels, the middle one counted five times, rounded.

    The border stays. In thirteenths no mean lies halfway between two levels, so integers round as Pillow's floats do.
    """
    out = views.int()
    if min(views.shape[2:]) < 3:
        return out
    rows = out[:, :, :-2] + out[:, :, 1:-1] + out[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * out[:, :, 1:-1, 1:-1]
    out[:, :, 1:-1, 1:-1] = (2 * total + 13).div(26, rounding_mode="floor")
    return out


def autocontrast_table(views: Tensor) -> Tensor:
    """ImageOps.autocontrast: (N, 3, 256) uint8, the levels that occur stretched to 0..255."""
    low, high = views.amin((2, 3)).double()[..., None], views.amax((2, 3)).double()[..., None]
    level = torch.arange(256, dtype=torch.float64, device=views.device)
    span, flat = high - low, high == low
    scale = torch.full_like(span, 255.0).div(span + 255.0 * flat)  # 255.0 / x would multiply by 1 / x: a level less
    return (level * scale + -low * scale * ~flat).clamp(0, 255).to(torch.uint8)


def equalize_table(views: Tensor) -> Tensor:
    """ImageOps.equalize: (N, 3, 256) uint8, which makes the cumulative histogram a line."""
    count = len(views) * 3
    start = torch.arange(0, count * 256, 256, dtype=torch.int32, device=views.device).view(-1, 3, 1, 1)
    one = torch.ones(1, dtype=torch.int32, device=views.device)
    histogram = torch.zeros(count * 256, dtype=torch.int32, device=views.device)
    histogram.index_add_(0, (views + start).view(-1), one.expand(views.numel()))
    histogram = histogram.view(len(views), 3, 256)
    last = histogram.gather(2, views.amax((2, 3)).long()[..., None])
    step = (views[0, 0].numel() - last).div(255, rounding_mode="floor")
    before = histogram.cumsum(2, dtype=torch.int32) - histogram
    table = (step.div(2, rounding_mode="floor") + before).div(step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    level = torch.arange(256, dtype=torch.int32, device=views.device)
    return torch.where(step > 0, table, level).to(torch.uint8)


def autocontrast(views: Tensor, _: object) -> Tensor:
    """ImageOps.autocontrast."""
    return lookup(views, autocontrast_table(views))


def equalize(views: Tensor, _: object) -> Tensor:
    """ImageOps.equalize."""
    return lookup(views, equalize_table(views))


def blend(views: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Image.blend(other, views, factor (N,) float32): uint8, cut off below the point."""
    other = other.float()
    return (other + factor[:, None, None, None] * (views - other)).clamp(0, 255).to(torch.uint8)


def warp(views: Tensor, matrices: np.ndarray, taps: int, fill: Sequence[int]) -> Tensor:
    """Image.transform(AFFINE) between 2 x 2 (bilinear) or 4 x 4 (bicubic) pixels.

    The pixel at (x, y) comes from (a x + b y + c, d x + e y + f), matrices (N, 6); outside the colour is `fill`.
    """
    height, width = views.shape[2:]
    a, b, c, d, e, f = to_device(matrices.T, views)[..., None, None].unbind(0)
    x = torch.arange(width, device=views.device) + 0.5
    y = torch.arange(height, device=views.device)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    columns, across = _taps(x, taps, width)
    rows, down = _taps(y, taps, height)
    total = torch.zeros(views.shape, device=views.device)
    for row, weight in zip(rows, down, strict=True):
        line = torch.zeros_like(total)
        for column, share in zip(columns, across, strict=True):
            line += share[:, None] * gather(views, (row * width + column).flatten(1)).view_as(views)
        total += weight[:, None] * line
    warped = total.clamp(0, 255).to(torch.uint8)
    return torch.where(outside[:, None], to_device(np.array(fill, np.uint8)[:, None, None], views), warped)


def rotate(views: Tensor, degrees: np.ndarray) -> Tensor:
    """Image.rotate by degrees (N,), bilinear, corners black: in float64 and in Pillow's order of operations."""
    height, width = views.shape[2:]
    matrices = np.array([_rotation(float(angle), width / 2, height / 2) for angle in degrees])
    a, b, c, d, e, f = to_device(matrices.T, views)[..., None, None].unbind(0)
    x = torch.arange(width, dtype=torch.float64, device=views.device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=views.device)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    across, down = (x - left)[:, None], (y - top)[:, None]
    columns = [(left.long() + i).clamp(0, width - 1) for i in (0, 1)]
    rows = [(top.long() + i).clamp(0, height - 1) for i in (0, 1)]
    lines = []
    for row in rows:
        first, second = (gather(views, (row * width + one).flatten(1)).view_as(views).double() for one in columns)
        lines.append(first + (second - first) * across)
    return (lines[0] + (lines[1] - lines[0]) * down).masked_fill_(outside[:, None], 0).to(torch.uint8)


def _rotation(degrees: float, x: float, y: float) -> tuple[float, ...]:
    """Image.rotate's matrix about (x, y), counter-clockwise."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def _taps(at: Tensor, taps: int, side: int) -> tuple[list[Tensor], list[Tensor]]:
    """The pixels (N, H, W) int64 around a coordinate, and their weights float32; Pillow's bicubic has a = -1."""
    at = at - 0.5
    first = at.floor()
    t = (at - first).float()
    if taps == 2:
        weights = [1 - t, t]
    else:
        weights = [-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, -(t**2) + t**3]
    start = first.long() - (taps // 2 - 1)
    return [(start + i).clamp(0, side - 1) for i in range(taps)], weights
