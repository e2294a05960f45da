"""The steps of transforms.py over *planes*: one view (3, H, W) in NumPy, for a CPU and large images.

Jitter, grayscale and randaugment use Pillow's arithmetic and the same generators, so the pixels are Pillow's, bit for
bit; steps that are not faster are left to Pillow. samples.py uses them where it cannot use batches and a step of the
policy is faster; speed.batched switches that off without changing any pixel. pixels.py's arithmetic is repeated here in
float32 and in place: a blend of a 224 x 224 view takes 0.15 ms, with pixels.py 0.33 ms.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment as TimmRandAugment
from torchvision import transforms

from rescom_timm.data.batched_transforms import agrees, two_views
from rescom_timm.data.draws import Size
from rescom_timm.data.near_views import Jitter
from rescom_timm.data.pixels import LUMA
from rescom_timm.data.transforms import Policy

View = Image.Image | np.ndarray
"""A view between two steps, as the last one left it: Pillow's image, or planes, uint8 (3, H, W)."""


class PlanePolicy:
    """A policy with the pixels and draws of `policy.augment`: an array (H, W, 3) whose memory is planes.

    Steps and operations that are not faster are left to Pillow.
    """

    def __init__(self, policy: Policy) -> None:
        self.steps = [_over_planes(step) for step in policy.steps]
        gaining = (transforms.ColorJitter, TimmRandAugment)
        self.gains = any(type(step) in gaining for step in policy.steps)

    def serves(self, reference: Policy) -> bool:
        """Whether it is faster and gives Pillow's pixels."""
        return self.gains and agrees(self, reference, (256, 256))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """One view, an array (H, W, 3)."""
        view: View = image
        for step in self.steps:
            view = step(view)
        return _planes(view).transpose(1, 2, 0)

    def two_views(self, images: np.ndarray) -> np.ndarray:
        """See `FastPolicy.two_views`."""
        return two_views(self, images)


def _over_planes(step: Any) -> Callable[[View], View]:
    if Jitter.takes(step):
        return functools.partial(_jitter, step)
    if type(step) is transforms.RandomHorizontalFlip:
        return functools.partial(_flip, step)
    if type(step) is transforms.RandomGrayscale:
        return functools.partial(_grayscale, step.p)
    if type(step) is not TimmRandAugment:
        return functools.partial(_by_pillow, step)
    step = copy.deepcopy(step)  # timm draws; its operations get other functions
    for operation in step.ops:
        name = operation.name.removesuffix("Increasing")
        if name in OTHERS:
            operation.aug_fn = functools.partial(_enhanced, name)
        else:
            way = _slid if name in SLIDES else _pointwise if name in POINTWISE else _by_pillow
            operation.aug_fn = functools.partial(way, operation.aug_fn)
    return cast(Callable[[View], View], step)


def _planes(view: View, kind: type = np.uint8) -> np.ndarray:
    """(3, H, W); shares its memory with planes of that kind."""
    planes = np.asarray(view).transpose(2, 0, 1) if isinstance(view, Image.Image) else view
    return planes.astype(kind, order="C", copy=False)


def _image(view: View) -> Image.Image:
    return view if isinstance(view, Image.Image) else Image.merge("RGB", [Image.fromarray(plane) for plane in view])


def _by_pillow(function: Callable[..., View], view: View, *arguments: Any, **settings: Any) -> View:
    return function(_image(view), *arguments, **settings)


def _pointwise(function: Callable[..., Any], view: View, *arguments: Any, **settings: Any) -> View:
    if isinstance(view, Image.Image):
        return cast(View, function(view, *arguments, **settings))
    tall = Image.fromarray(view.reshape(-1, view.shape[2]))  # the planes one below the other
    return np.asarray(function(tall, *arguments, **settings)).reshape(view.shape)


def _flip(step: transforms.RandomHorizontalFlip, view: View) -> View:
    if isinstance(view, Image.Image):
        return cast(View, step(view))
    return np.ascontiguousarray(view[..., ::-1]) if torch.rand(1) < step.p else view


def _grayscale(p: float, view: View) -> View:
    if torch.rand(1) >= p:
        return view
    return np.broadcast_to(_gray(_planes(view)).astype(np.uint8), (3, *_size(view)))


def _size(view: View) -> Size:
    return view.shape[1:] if isinstance(view, np.ndarray) else view.size[::-1]


def _jitter(step: transforms.ColorJitter, view: View) -> View:
    order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, None)
    levels = _planes(view, np.float32)
    for i in order.tolist():
        if factors[i] is not None:
            _blend_in(levels, OTHERS[("Brightness", "Contrast", "Color")[i]](levels), factors[i])
    return levels.astype(np.uint8)


def _enhanced(name: str, view: View, factor: float, **_: Any) -> View:
    levels = _planes(view, np.float32)
    _blend_in(levels, OTHERS[name](levels), factor)
    return levels.astype(np.uint8)


def _blend_in(levels: np.ndarray, other: np.ndarray | np.float32 | None, factor: float) -> None:
    """Image.blend(other, levels, factor) in place, levels float32 (3, H, W) here and below; None is black."""
    if other is not None:
        levels -= other
    levels *= np.float32(factor)
    if other is not None:
        levels += other
    if factor > 1:
        np.clip(levels, 0, 255, out=levels)
    np.trunc(levels, out=levels)


def _gray(levels: np.ndarray) -> np.ndarray:
    """convert("L"), (H, W). The sums stay below 2^24: float32 holds them exactly."""
    total = levels[0] * np.float32(LUMA[0])
    part = levels[1] * np.float32(LUMA[1])
    total += part
    total += np.multiply(levels[2], np.float32(LUMA[2]), out=part)
    total += np.float32(0x8000)
    total *= np.float32(2**-16)
    return np.floor(total, out=total)


def _mean_gray(levels: np.ndarray) -> np.float32:
    sums = _gray(levels).sum(axis=1)  # of a row: whole numbers below 2^24
    return np.float32(int(sums.sum(dtype=np.float64) / levels[0].size + 0.5))


def _smooth(levels: np.ndarray) -> np.ndarray:
    """filter(SMOOTH), see pixels.smooth."""
    out = levels.copy()
    if min(levels.shape[1:]) >= 3:
        rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels[:, 1:-1, 1:-1]
        np.floor((total + np.float32(6.5)) / np.float32(13), out=out[:, 1:-1, 1:-1])
    return out


OTHERS: dict[str, Callable[[np.ndarray], Any]] = {
    "Brightness": lambda levels: None,
    "Contrast": _mean_gray,
    "Color": _gray,
    "Sharpness": _smooth,
}
"""What an operation blends levels with."""

POINTWISE = ("Posterize", "Solarize", "SolarizeAdd", "Invert")
"""Operations that take each level alone."""

SLIDES = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
"""Operations that move each row, or each column, along itself."""


class _Slider:
    """Replaces the image that timm's shear and translation transform."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.size = _size(view)[::-1]

    def transform(self, size: Size, method: Any, matrix: Sequence[float], resample: Any, fillcolor: Any) -> View:
        along_rows = matrix[3] == matrix[5] == 0
        slope, offset = (matrix[1], matrix[2]) if along_rows else (matrix[3], matrix[5])
        planes = _planes(self.view) if along_rows else _planes(_planes(self.view).swapaxes(1, 2))
        slid = slide(planes, slope, offset, resample == Image.Resampling.BICUBIC, fillcolor)
        if slid is None:
            transform = Image.Image.transform
            return _by_pillow(transform, self.view, size, method, matrix, resample=resample, fillcolor=fillcolor)
        return slid if along_rows else _planes(slid.swapaxes(1, 2))


def _slid(function: Callable[..., View], view: View, *arguments: Any, **settings: Any) -> View:
    return function(_Slider(view), *arguments, **settings)


def slide(planes: np.ndarray, slope: float, offset: float, cubic: bool, fill: Sequence[int]) -> np.ndarray | None:
    """Image.transform if the pixel at (x, y) comes from (x + slope y + offset, y), between 2 or 4 pixels of its row.

    Outside the colour is `fill`. In float64 and in Pillow's order of operations, because levels are truncated. None if
    rounding may select other pixels in parts of a row.
    """
    height, width = planes.shape[1:]
    y = np.arange(height if slope else 1)[:, None] + 0.5  # without slope all rows are alike
    t = (np.arange(width) + 0.5) + slope * y
    t += offset
    outside = (t < 0) | (t >= width)
    t -= 0.5
    first = np.floor(t)
    t -= first
    if t.min() < 1e-9 or t.max() > 1 - 1e-9:
        return None
    source = np.clip(first[:, :1].astype(np.intp) + np.arange(-1, width + 2), 0, width - 1)
    source = source + width * np.arange(height)[:, None]
    views = np.empty_like(planes)
    for view, plane in zip(views, planes, strict=True):
        row = plane.take(source).astype(np.int16)
        before, left, right, after = (row[:, i : i + width] for i in range(4))
        if cubic:
            slid = (left - before + after - right) * t
            slid += 2 * (before - left) + right - after
            slid *= t
            slid += right - before
            slid *= t
            slid += left
            np.clip(slid, 0, 255, out=slid)
        else:
            slid = (right - left) * t
            slid += left
        view[:] = slid
    np.copyto(views, np.array(fill, np.uint8)[:, None, None], where=outside)
    return views
