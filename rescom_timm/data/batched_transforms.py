"""The steps of transforms.py over whole batches of small images, on any device.

*Equal* steps (crop, flip, rotate, autoaugment, jitter, grayscale, cutout) give Pillow's pixels, bit for bit: Pillow
makes the maps and tables of autoaugment from images of pixel numbers and gray levels, the rest is integer arithmetic or
Pillow's own in its order and precision. samples.py uses them if all steps of a policy are equal and all images of a
batch have one size; speed.batched=false gives the same pixels without.

The *near* step randaugment is for a GPU (loader.device_views): it draws what timm draws, but sums and interpolates in
another order than Pillow, so a few pixels differ by a level or two.

Draws come from the same generators, in the same order, as those of Pillow's steps. torch's is read in bulk: a draw is
one 32-bit word w of the Mersenne Twister, w mod n for an integer below n, the lower 24 bits for a number in [0, 1).

N views are uint8 (N, 3, H, W). Draws stay on the host, so nothing waits for a GPU. plane_transforms.py is for large
images.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from rescom_timm.data.autoaugment import BatchedAutoAugment
from rescom_timm.data.draws import BatchedStep, Draws, Size, first_words, next_words
from rescom_timm.data.near_views import Jitter, NearRandAugment
from rescom_timm.data.pixels import change, gather, gray, paint, rotate, to_device
from rescom_timm.data.transforms import Cutout, Policy, seed_all
from rescom_timm.errors import InputError


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
        if self.head or size[0] * size[1] > BatchedStep.largest:
            return False
        try:
            return self._pays(size) and (not self.count(size) or agrees(self, reference, size))
        except ValueError:
            return False  # Pillow's steps report it

    def _pays(self, size: Size) -> bool:
        """Whether no step gets larger images than it is faster for."""
        for step in self.steps:
            if size[0] * size[1] > step.largest:
                return False
            size = step.size(size)
        return True

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
        """Words (k,) and notes (m,) of one view from the global generators, after the head."""
        return next_words(self.count(size)), np.array(self.note(), dtype=np.float64)

    def note(self) -> list[float]:
        """What a view draws from the generators of NumPy and random."""
        return [number for step in self.steps for number in step.note()]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Views (N, 3, h, w) of images (B, 3, H, W), for N draws; the views of an image are consecutive."""
        views = images.repeat_interleave(len(draws.words) // len(images), dim=0)
        for step in self.steps:
            views = step(views, draws)
        return views

    def two_views(self, images: np.ndarray) -> np.ndarray:
        """See `FastPolicy.two_views`."""
        draws = self.draw(range(len(images)), 2, (images.shape[1], images.shape[2]))
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return self(batch, draws).permute(0, 2, 3, 1).numpy()


class FastPolicy(Protocol):
    """What `agrees` needs of a policy."""

    def two_views(self, images: np.ndarray) -> np.ndarray:
        """Two views (2 N, h, w, 3) of each of the images (N, H, W, 3), whose seeds are 0, 1, ..."""


def two_views(augment: Callable[[Image.Image], Image.Image | np.ndarray], images: np.ndarray) -> np.ndarray:
    """FastPolicy.two_views of a function of one image."""
    views = []
    for seed, image in enumerate(images):
        seed_all(seed)
        views += [np.asarray(augment(Image.fromarray(image))) for _ in range(2)]
    return np.stack(views)


@functools.lru_cache(maxsize=64)
def agrees(policy: FastPolicy, reference: Policy, size: Size) -> bool:
    """Whether the views of a few noise images equal Pillow's with the installed libraries.

    Another torch may draw, and another Pillow compute, differently.
    """
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


def _batched(step: Any, near: bool) -> BatchedStep | None:
    """The batched form of a step of transforms.py; None without one."""
    return next((kind(step) for kind in _KINDS if (near or kind.equal) and kind.takes(step)), None)


# -------------------------------------------------------------------------------------------------------- equal steps


class _Crop(BatchedStep):
    of = transforms.RandomCrop

    def __init__(self, step: transforms.RandomCrop) -> None:
        self.side, self.pad = step.size[0], cast(int, step.padding or 0)

    def size(self, size: Size) -> Size:
        if min(size) + 2 * self.pad < self.side:
            raise InputError("image.size", f"an image of {size[1]} x {size[0]} pixels has no crop of {self.side}")
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
        source = to_device(top * width + left, views)[:, None] + (side[:, None] * width + side).flatten()
        return gather(views, source).unflatten(2, (self.side, self.side))


class _Flip(BatchedStep):
    of = transforms.RandomHorizontalFlip
    draws = 1

    def __init__(self, step: transforms.RandomHorizontalFlip) -> None:
        self.p = np.float32(step.p)

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        change(views, draws.uniform() < self.p, lambda part, _: part.flip(3))
        return views


class _Rotate(BatchedStep):
    of = transforms.RandomRotation
    draws = 1
    largest = 24 * 24  # a tenth of Pillow's time at 8 x 8, more than its time at 32 x 32

    def __init__(self, step: transforms.RandomRotation) -> None:
        self.degrees = step.degrees

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        return rotate(views, draws.uniform(*self.degrees))


class _Grayscale(BatchedStep):
    of = transforms.RandomGrayscale
    draws = 1

    def __init__(self, step: transforms.RandomGrayscale) -> None:
        self.p = np.float32(step.p)

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        change(views, draws.uniform() < self.p, lambda part, _: gray(part).expand_as(part).to(torch.uint8))
        return views


class _Cutout(BatchedStep):
    of = Cutout
    draws = 2

    def __init__(self, step: Cutout) -> None:
        self.side, self.colour = step.size, step.colour

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        height, width = views.shape[2:]
        column, row = (to_device(self._inside(draws.below(side), side), views) for side in (width, height))
        square = (row[:, None, :, None] & column[:, None, None, :]).to(torch.uint8)
        return paint(views, square, to_device(np.array(self.colour, np.uint8)[:, None, None], views))

    def _inside(self, centre: np.ndarray, side: int) -> np.ndarray:
        distance = np.arange(side) - (centre - self.side // 2)[:, None]
        return (distance >= 0) & (distance < self.side)


_KINDS: tuple[type[BatchedStep], ...]
_KINDS = (_Crop, _Flip, _Rotate, _Grayscale, BatchedAutoAugment, _Cutout, Jitter, NearRandAugment)
