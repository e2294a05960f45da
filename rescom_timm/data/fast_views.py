"""The steps of views.py without Pillow, over whole batches of small images, on any device.

*Equal* steps (crop, flip, autoaugment, grayscale, cutout) give Pillow's pixels, bit for bit: their maps and tables are
made by letting Pillow work on images of pixel numbers and of gray levels, the rest is integer arithmetic. loaders.py
takes them wherever all steps of a policy are such and all images of a batch have one size; speed.batched switches that
off, and nothing but the time changes.

*Near* steps (jitter, randaugment) are for a GPU, on request (loader.device_views): they draw what torchvision and timm
draw, but sum and interpolate in another order than Pillow does, so a few pixels differ by a level or two.

Draws come from the generators that Pillow's steps draw from, seeded alike and read in the same order. Torch's is read
in bulk: each of its draws here is one 32-bit word w of the Mersenne Twister, w mod n for an integer below n and the
lower 24 bits for a number in [0, 1).

N views are uint8 (N, 3, H, W). What was drawn stays on the host, so a GPU is never waited for. planes.py is for images
larger than a batch gains from.
"""

import copy
import functools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import RandAugment as TimmRandAugment
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as VF

from rescom_timm.data.views import AutoAugment, Cutout, Policy, magnitudes, seed_all

Size = tuple[int, int]

LARGEST = 128 * 128
"""Pixels of an image up to which a CPU gains: of the time that Pillow takes image by image, a batch of 64 with CIFAR's
policy takes a fifth at 32 x 32, a third at 64 x 64, four fifths at 128 x 128, and all of it at 224 x 224."""

# ------------------------------------------------------------------------------------------------------------- draws


class Draws:
    """What N views draw, read from left to right: `words` (N, k), words of torch's generator, and `notes` (N, m), the
    numbers that timm drew."""

    def __init__(self, words: np.ndarray, notes: np.ndarray) -> None:
        self.words, self.notes = words, notes
        self._words, self._notes = iter(words.T), iter(notes.T)

    def below(self, n: int) -> np.ndarray:
        """(N,) int64: torch.randint(n, (1,))."""
        return (next(self._words) % np.uint64(n)).astype(np.int64)

    def uniform(self) -> np.ndarray:
        """(N,) float32: torch.rand(1)."""
        return (next(self._words) & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def note(self) -> np.ndarray:
        """(N,) float64."""
        return next(self._notes)


def first_words(seeds: Sequence[int], count: int) -> np.ndarray:
    """The first `count` 32-bit words (len(seeds), count) uint64 of torch's CPU generator after each seed."""
    drawn = torch.empty(len(seeds), -(-count // 2), dtype=torch.int64)
    if count == 0:
        return _split(drawn)
    generator = torch.Generator()
    for row, seed in zip(drawn.unbind(0), seeds, strict=True):
        generator.manual_seed(seed)
        row.random_(-(2**63), None, generator=generator)  # all 64 bits: two words, the first one on top
    return _split(drawn)[:, :count]


def _split(drawn: Tensor) -> np.ndarray:
    pairs = drawn.numpy().view(np.uint64)
    return np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)], axis=-1).reshape(len(pairs), -1)


def next_words(count: int) -> np.ndarray:
    """The next `count` words (count,) uint64 of torch's global generator, which moves on by as many."""
    ahead = torch.Generator()
    ahead.set_state(torch.get_rng_state())
    for _ in range(count):
        torch.rand(1)
    return _split(torch.empty(1, -(-count // 2), dtype=torch.int64).random_(-(2**63), None, generator=ahead))[0, :count]


# ------------------------------------------------------------------------------------------------------------ policy


class Step:
    """One step over N views, which it may change in place."""

    equal = True
    notes = 0
    """Numbers that `note` gives of each view."""

    def __init__(self, step: Any) -> None:
        """step: one that `takes` is true of."""

    @staticmethod
    def takes(step: Any) -> bool:
        """Whether it does the same as this step of views.py."""
        raise NotImplementedError

    def size(self, size: Size) -> Size:
        """(H, W) after the step. Raises ValueError for images too small for it."""
        return size

    def words(self, size: Size) -> int:
        """How many words of torch's generator a view of this size draws."""
        return 0

    def note(self) -> list[float]:
        """What a view draws from the other generators as they stand."""
        return []

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        raise NotImplementedError


class BatchedPolicy:
    """The last steps of a policy, over batches; `head` are the steps before them, Pillow's, image by image.

    near=False: equal steps only, and all of them (no head), or `steps` is empty and everything is in `head`.
    """

    def __init__(self, policy: Policy, near: bool = False) -> None:
        found = [_batched(step, near) for step in policy.steps]
        first = max((i + 1 for i, step in enumerate(found) if step is None), default=0)
        if not near and first:
            first = len(found)
        self.head = policy.steps[:first]
        self.steps = [step for step in found[first:] if step is not None]

    def count(self, size: Size) -> int:
        """Words that a view draws; `size` (H, W) is that of the images. Raises ValueError for images too small."""
        total = 0
        for step in self.steps:
            total += step.words(size)
            size = step.size(size)
        return total

    def serves(self, reference: Policy, size: Size) -> bool:
        """Whether this is the whole policy, pays for images of this size and gives Pillow's pixels."""
        if self.head or size[0] * size[1] > LARGEST:
            return False
        try:
            return not self.count(size) or agrees(self, reference, size)
        except ValueError:
            return False  # Pillow's steps will say so

    def draw(self, seeds: Sequence[int], num_views: int, size: Size) -> Draws:
        """The draws of all views, one seed an image, (len(seeds) * num_views, ...). Where there is no head."""
        count, notes = self.count(size), []
        for seed in seeds:
            if any(step.notes for step in self.steps):
                seed_all(seed)
            notes += [self.note() for _ in range(num_views)]
        drawn = first_words(seeds, num_views * count).reshape(len(notes), count)
        return Draws(drawn, np.array(notes, dtype=np.float64).reshape(len(notes), -1))

    def draw_next(self, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """Words (k,) and notes (m,) of one view from the global generators as they stand, after the head."""
        return next_words(self.count(size)), np.array(self.note(), dtype=np.float64)

    def note(self) -> list[float]:
        return [number for step in self.steps for number in step.note()]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """images (B, 3, H, W), with one view or more each, to views (N, 3, h, w), N the number of draws; those of an
        image stand together."""
        views = images.repeat_interleave(len(draws.words) // len(images), dim=0)
        for step in self.steps:
            views = step(views, draws)
        return views

    def two_views(self, images: np.ndarray) -> np.ndarray:
        draws = self.draw(range(len(images)), 2, (images.shape[1], images.shape[2]))
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return self(batch, draws).permute(0, 2, 3, 1).numpy()


class FastPolicy(Protocol):
    """What `agrees` needs of a policy."""

    def two_views(self, images: np.ndarray) -> np.ndarray:
        """Two views (2 N, h, w, 3) of each of the images (N, H, W, 3), whose seeds are 0, 1, ..."""


def two_views(augment: Callable[[Image.Image], Any], images: np.ndarray) -> np.ndarray:
    """FastPolicy.two_views of a function of one image."""
    views = []
    for seed, image in enumerate(images):
        seed_all(seed)
        views += [np.asarray(augment(Image.fromarray(image))) for _ in range(2)]
    return np.stack(views)


@functools.lru_cache(maxsize=64)
def agrees(policy: FastPolicy, reference: Policy, size: Size) -> bool:
    """Whether views of a few images of noise are Pillow's with the installed libraries: another torch may draw, and
    another Pillow compute, in another way."""
    noise = np.random.default_rng(0).integers(0, 256, (16, *size, 3))
    images = (noise * np.arange(1, 17)[:, None, None, None] // 16).astype(np.uint8)  # of weak and strong contrast
    try:
        expected = two_views(reference.augment, images)
    except ValueError:
        return False  # too small for a step
    same = np.array_equal(expected, policy.two_views(images))
    if not same:
        warnings.warn(
            f"the fast form of {reference.text!r} differs from Pillow's with these versions of torch, torchvision "
            "and Pillow: Pillow's is used, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
    return same


def _batched(step: Any, near: bool) -> Step | None:
    """The batched form of a step of views.py, where there is one."""
    kinds: tuple[type[Step], ...] = (_Crop, _Flip, _Grayscale, _AutoAugment, _Cutout, Jitter, _RandAugment)
    for kind in kinds:
        if (near or kind.equal) and kind.takes(step):
            return kind(step)
    return None


def _change(views: Tensor, chosen: np.ndarray, function: Callable[[Tensor, np.ndarray], Tensor]) -> None:
    """views[chosen] = function(views[chosen], the row numbers), for a mask (N,) on the host."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return
    index = _to(rows, views)
    changed = function(views.index_select(0, index), rows)
    if views.device.type == "cpu":
        views.numpy()[rows] = changed.numpy()  # 25 times as fast as index_copy_ here, and torch.where slower still
    else:
        views.index_copy_(0, index, changed)


def _paint(views: Tensor, area: Tensor, colour: Tensor) -> Tensor:
    """The colour where `area` is 1, uint8. On a CPU a tenth of the time of torch.where."""
    return views.mul_(1 - area).add_(area * colour)


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if like.device.type == "cuda" and tensor.nbytes > 2**16:
        tensor = tensor.pin_memory()  # so much of memory that can be swapped is only sent when the device is idle
    return tensor.to(like.device, non_blocking=True)


# -------------------------------------------------------------------------------------------------------- equal steps


class _Crop(Step):
    def __init__(self, step: transforms.RandomCrop) -> None:
        self.side, self.pad = step.size[0], cast(int, step.padding or 0)

    @staticmethod
    def takes(step: Any) -> bool:
        return type(step) is transforms.RandomCrop

    def size(self, size: Size) -> Size:
        if min(size) + 2 * self.pad < self.side:
            raise ValueError(f"images of {size[1]} x {size[0]} pixels are too small for a crop of {self.side}")
        return self.side, self.side

    def words(self, size: Size) -> int:
        return 0 if size == (self.side - 2 * self.pad,) * 2 else 2

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        if not self.words((views.shape[2], views.shape[3])):
            return F.pad(views, [self.pad] * 4)
        views = F.pad(views, [self.pad] * 4)
        height, width = views.shape[2:]
        top, left = draws.below(height - self.side + 1), draws.below(width - self.side + 1)
        side = torch.arange(self.side, device=views.device)
        source = _to(top * width + left, views)[:, None] + (side[:, None] * width + side).flatten()
        return _gather(views, source).unflatten(2, (self.side, self.side))


class _Flip(Step):
    def __init__(self, step: transforms.RandomHorizontalFlip) -> None:
        self.p = np.float32(step.p)

    @staticmethod
    def takes(step: Any) -> bool:
        return type(step) is transforms.RandomHorizontalFlip

    def words(self, size: Size) -> int:
        return 1

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        _change(views, draws.uniform() < self.p, lambda part, _: part.flip(3))
        return views


class _Grayscale(Step):
    def __init__(self, step: transforms.RandomGrayscale) -> None:
        self.p = np.float32(step.p)

    @staticmethod
    def takes(step: Any) -> bool:
        return type(step) is transforms.RandomGrayscale

    def words(self, size: Size) -> int:
        return 1

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        _change(views, draws.uniform() < self.p, lambda part, _: gray(part).expand_as(part).to(torch.uint8))
        return views


class _Cutout(Step):
    def __init__(self, step: Cutout) -> None:
        self.side, self.colour = step.size, step.colour

    @staticmethod
    def takes(step: Any) -> bool:
        return type(step) is Cutout

    def words(self, size: Size) -> int:
        return 2

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        height, width = views.shape[2:]
        column, row = (_to(self._inside(draws.below(side), side), views) for side in (width, height))
        square = (row[:, None, :, None] & column[:, None, None, :]).to(torch.uint8)
        return _paint(views, square, _to(np.array(self.colour, np.uint8)[:, None, None], views))

    def _inside(self, centre: np.ndarray, side: int) -> np.ndarray:
        distance = np.arange(side) - (centre - self.side // 2)[:, None]
        return (distance >= 0) & (distance < self.side)


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
BLENDS = ("Contrast", "Color", "Sharpness")
PLAIN = ("AutoContrast", "Equalize")
LOOKUPS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Brightness": lambda image, value: VF.adjust_brightness(image, 1 + value),
    "Posterize": lambda image, value: VF.posterize(image, int(value)),
    "Solarize": VF.solarize,
    "Invert": lambda image, value: VF.invert(image),
}


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
    """(H, W) int64: the number of the pixel that each pixel comes from, -1 for outside. Found by warping an image whose
    colours are the numbers of its pixels."""
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


class _AutoAugment(Step):
    def __init__(self, step: transforms.AutoAugment) -> None:
        self.subpolicies, self.fill = tuple(step.policies), cast(int, step.fill)

    @staticmethod
    def takes(step: Any) -> bool:
        return type(step) is AutoAugment

    def words(self, size: Size) -> int:
        return 5

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        tables = _tables(self.subpolicies, (views.shape[2], views.shape[3]), views.device)
        subpolicy = draws.below(len(tables.operation))
        chances, signs = [draws.uniform(), draws.uniform()], [draws.below(2), draws.below(2)]
        for place in (0, 1):
            applied = chances[place] <= tables.probability[subpolicy, place]
            self.apply(views, np.where(applied, tables.operation[subpolicy, place, signs[place]], -1), tables)
        return views

    def apply(self, views: Tensor, operation: np.ndarray, tables: _Tables) -> None:
        """Operation (N,) int64 of each view, -1 for none, in place."""
        kind, argument = tables.kind[operation], tables.argument[operation]
        size, fill = views.shape[2:], _to(np.array(self.fill, np.uint8), views)

        def warp(part: Tensor, row: Tensor) -> Tensor:
            return _paint(_gather(part, tables.sources[row]).unflatten(2, size), tables.outside[row][:, None], fill)

        def blend(part: Tensor, other: Tensor, row: Tensor) -> Tensor:
            index = (row.int()[:, None, None, None] * 256 + other) * 256 + part
            return tables.blends.view(-1).index_select(0, index.view(-1)).view_as(part)

        actions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "warp": warp,
            "lookup": lambda part, row: lookup(part, tables.lookups[row]),
            "Contrast": lambda part, row: lookup(part, tables.blends[row, mean_gray(part)]),
            "Color": lambda part, row: blend(part, gray(part), row),
            "Sharpness": lambda part, row: blend(part, smooth(part), row),
            "AutoContrast": _autocontrast,
            "Equalize": _equalize,
        }
        for name, action in actions.items():
            _change(views, (kind == name) & (operation >= 0), functools.partial(_with_rows, action, argument))


def _with_rows(
    action: Callable[[Tensor, Tensor], Tensor], argument: np.ndarray, part: Tensor, rows: np.ndarray
) -> Tensor:
    return action(part, _to(argument[rows], part))


# ----------------------------------------------------------------------------------------------- Pillow's arithmetic


def _gather(views: Tensor, source: Tensor) -> Tensor:
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
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def mean_gray(views: Tensor) -> Tensor:
    """The rounded mean level of gray, (N,) int64, to which ImageEnhance.Contrast blends."""
    pixels = views.shape[2] * views.shape[3]
    return (2 * gray(views).sum((1, 2, 3)) + pixels).div(2 * pixels, rounding_mode="floor")


def smooth(views: Tensor) -> Tensor:
    """filter(SMOOTH): int32, the mean over 3 x 3 pixels, the middle one counted five times, rounded; the border stays.
    In thirteenths no mean lies halfway between two levels, so whole numbers round as Pillow's floats do."""
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


def _autocontrast(views: Tensor, _: Any) -> Tensor:
    return lookup(views, autocontrast_table(views))


def _equalize(views: Tensor, _: Any) -> Tensor:
    return lookup(views, equalize_table(views))


def blend(views: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Image.blend(other, views, factor (N,) float32): uint8, cut off below the point."""
    other = other.float()
    return (other + factor[:, None, None, None] * (views - other)).clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------- near steps


class Jitter(Step):
    equal = False

    def __init__(self, step: transforms.ColorJitter) -> None:
        self.ranges = [step.brightness, step.contrast, step.saturation]

    @staticmethod
    def takes(step: Any) -> bool:
        return type(step) is transforms.ColorJitter and step.hue is None

    def words(self, size: Size) -> int:
        return 3 + sum(bounds is not None for bounds in self.ranges)

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        factors: dict[int, tuple[str, np.ndarray]] = {}
        order = np.tile(np.arange(4), (len(views), 1))  # torch.randperm(4)
        row = np.arange(len(views))
        for place in range(3):
            other = place + draws.below(4 - place)
            order[row, place], order[row, other] = order[row, other], order[row, place]
        for i, (name, bounds) in enumerate(zip(("Brightness", "Contrast", "Color"), self.ranges, strict=True)):
            if bounds is not None:
                factors[i] = name, bounds[0] + draws.uniform() * (bounds[1] - bounds[0])
        for place in range(4):
            for i, (name, factor) in factors.items():
                _change(views, order[:, place] == i, functools.partial(_enhance, name, factor))
        return views


def _enhance(name: str, factors: np.ndarray, views: Tensor, rows: np.ndarray) -> Tensor:
    """ImageEnhance: the views blended with black, their mean gray, their gray or their smoothed selves."""
    factor = _to(factors[rows].astype(np.float32), views)
    if name == "Brightness":
        other = torch.zeros_like(views[:, :1])
    elif name == "Contrast":
        other = mean_gray(views).view(-1, 1, 1, 1)
    else:
        other = gray(views) if name == "Color" else smooth(views)
    return blend(views, other, factor)


class _RandAugment(Step):
    """timm's RandAugment. timm itself draws: its operations are made to note what they are asked to do."""

    equal = False
    MATRICES: dict[str, Callable[[np.ndarray, Size], list[np.ndarray | float]]] = {
        "ShearX": lambda value, size: [1, value, 0, 0, 1, 0],
        "ShearY": lambda value, size: [1, 0, 0, value, 1, 0],
        "TranslateXRel": lambda value, size: [1, 0, value * size[1], 0, 1, 0],
        "TranslateYRel": lambda value, size: [1, 0, 0, 0, 1, value * size[0]],
        "Rotate": lambda value, size: _rotation(value, size),
    }
    LEVELS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
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

    @staticmethod
    def takes(step: Any) -> bool:
        names = _RandAugment.NAMES
        return type(step) is TimmRandAugment and all(op.name.removesuffix("Increasing") in names for op in step.ops)

    def note(self) -> list[float]:
        noted: list[float] = self.recorder([])
        return noted + [-1.0] * (self.notes - len(noted))

    @classmethod
    def _note(cls, name: str, noted: list[float], value: float = 0.0, *, resample: Any, **_: Any) -> list[float]:
        """In the place of timm's function of image and value: notes operation, value and interpolation."""
        if name in cls.MATRICES:
            resample = random.choice(resample)  # as timm does at this point
        return [*noted, cls.NAMES.index(name), value, float(resample == Image.Resampling.BICUBIC)]

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        for _ in range(self.notes // 3):
            operation, value, cubic = draws.note(), draws.note(), draws.note() == 1
            matrices = np.zeros((len(views), 6))
            for number, name in enumerate(self.MATRICES):
                chosen = operation == number
                entries = self.MATRICES[name](value[chosen], (views.shape[2], views.shape[3]))
                matrices[chosen] = np.stack(np.broadcast_arrays(value[chosen], *entries)[1:], axis=1)
            warped = (operation >= 0) & (operation < len(self.MATRICES))
            for taps, these in ((2, warped & ~cubic), (4, warped & cubic)):
                _change(views, these, functools.partial(self._warp, matrices, taps))
            for number, name in enumerate(self.NAMES[len(self.MATRICES) :], start=len(self.MATRICES)):
                chosen = operation == number
                if name in BLENDS or name == "Brightness":
                    _change(views, chosen, functools.partial(_enhance, name, value))
                elif name in self.LEVELS:
                    _change(views, chosen, functools.partial(self._replace, name, value))
                else:
                    _change(views, chosen, _autocontrast if name == "AutoContrast" else _equalize)
        return views

    def _warp(self, matrices: np.ndarray, taps: int, views: Tensor, rows: np.ndarray) -> Tensor:
        return warp(views, matrices[rows], taps, self.fill)

    def _replace(self, name: str, value: np.ndarray, views: Tensor, rows: np.ndarray) -> Tensor:
        table = self.LEVELS[name](np.arange(256), value[rows, None].astype(np.int64))
        return lookup(views, _to(table.astype(np.uint8), views))


def _rotation(degrees: np.ndarray, size: Size) -> list[np.ndarray | float]:
    """Image.rotate's matrix: about the middle, counter-clockwise."""
    x, y = size[1] / 2, size[0] / 2
    cos, sin = np.cos(-np.radians(degrees)), np.sin(-np.radians(degrees))
    return [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]


def warp(views: Tensor, matrices: np.ndarray, taps: int, fill: Sequence[int]) -> Tensor:
    """Image.transform(AFFINE): the pixel at (x, y) comes from (a x + b y + c, d x + e y + f), matrices (N, 6), between
    2 x 2 (bilinear) or 4 x 4 (bicubic) pixels; what comes from outside has the colour `fill`."""
    height, width = views.shape[2:]
    a, b, c, d, e, f = _to(matrices.T, views)[..., None, None].unbind(0)
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
            line += share[:, None] * _gather(views, (row * width + column).flatten(1)).view_as(views)
        total += weight[:, None] * line
    warped = total.clamp(0, 255).to(torch.uint8)
    return torch.where(outside[:, None], _to(np.array(fill, np.uint8)[:, None, None], views), warped)


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
