"""Sizes of images: in a sample over all classes, and after a policy of views."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from torchvision import transforms

from rescom_timm.data.broken import IMAGES_AT_ONCE
from rescom_timm.data.crops import CornerCrop, RisingCrop
from rescom_timm.data.decoding import BrokenImage, ReadConfig, look
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import Policy
from rescom_timm.errors import InputError

PixelSize: TypeAlias = tuple[int, int]
"""Width and height in pixels."""
READ = ReadConfig()
SAMPLE = 256
"""Images whose sizes represent those of a split."""


def sample(labels: np.ndarray, number: int = SAMPLE) -> np.ndarray:
    """At most `number` positions of labels (N,), ascending: one of each class in turn. Deterministic."""
    random = np.random.RandomState(0)
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, mixed within each
    counts = np.bincount(labels)
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    tie = random.permutation(len(counts))[labels[order]]
    return np.sort(order[np.lexsort((tie, turn))][:number])


def sizes(split: Split, positions: np.ndarray, reading: ReadConfig = READ) -> list[tuple[PixelSize, int]]:
    """(size, position) of the readable images at these positions, by their headers. reading: EXIF orientation."""
    found = []
    for start in range(0, len(positions), IMAGES_AT_ONCE):
        some = positions[start : start + IMAGES_AT_ONCE].tolist()
        for position, row in zip(some, split.dataset.select(some), strict=True):
            try:
                found.append((look(row["image"], int(split.rows[position]), reading), position))
            except BrokenImage:
                continue
    return found


def after(policy: Policy, size: PixelSize) -> PixelSize:
    """The size of an image after the policy. Raises InputError (image.size) if it is too small for a crop."""
    for step in policy.steps:
        width, height = size
        if isinstance(step, transforms.RandomCrop | CornerCrop):
            side = step.size if isinstance(step, CornerCrop) else step.size[0]
            pad = 0 if isinstance(step, CornerCrop) else 2 * int(step.padding or 0)
            if min(size) + pad < side:
                raise InputError("image.size", f"an image of {width} x {height} pixels has no crop of {side}")
            size = (side, side)
        elif isinstance(step, transforms.RandomResizedCrop | transforms.CenterCrop):
            size = (step.size[1], step.size[0])
        elif isinstance(step, RisingCrop):
            size = (step.size, step.size)
        elif isinstance(step, transforms.Resize) and isinstance(step.size, int):
            longer = int(step.size * max(size) / min(size))  # as torchvision rounds it
            size = (step.size, longer) if width <= height else (longer, step.size)
        elif isinstance(step, transforms.Resize):
            size = (step.size[1], step.size[0])
    return size


def one_size(policy: Policy) -> bool:
    """Whether images of any size have the same size after the policy."""
    try:
        return after(policy, (9000, 9000)) == after(policy, (18000, 9000))  # larger than any step makes them
    except ValueError:  # a crop of more than an earlier step leaves, of any image
        return True


def check_views(policy: Policy, split: Split, key: str, reading: ReadConfig = READ) -> PixelSize | None:
    """The size of a split's images after the policy of the recipe's `key`; None if no image can be read.

    Checks a sample of images, or all if the policy does not end in one size. Raises InputError (image.size), naming key
    and image, if an image is too small or the sizes differ.
    """
    ends = one_size(policy)
    made: dict[PixelSize, int] = {}
    for size, position in sizes(split, sample(split.labels) if ends else np.arange(len(split.rows)), reading):
        try:
            made.setdefault(after(policy, size), position)
        except ValueError as error:
            raise InputError(
                "image.size", f"{key}: row {split.rows[position]} of {split.name}: {error} ({policy.text!r})"
            ) from None
        if len(made) > 1:
            (w0, h0), (w1, h1) = sorted(made)
            raise InputError(
                "image.size",
                f"{key}: images of {split.name} differ in size ({w0} x {h0} and {w1} x {h1}) after {policy.text!r}: "
                f"end it with one size, such as {key}='resize(256) | center_crop(224)'",
            )
    return next(iter(made), None)
