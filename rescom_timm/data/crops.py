"""Crops that torchvision does not have, for transforms.py."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from rescom_timm.errors import InputError


class RisingCrop(torch.nn.Module):
    """A square crop whose area is uniform between `least` and 1 of the image's, as far as a square fits.

    `least` rises over the run.
    """

    def __init__(self, size: int, lo: float, interpolation: InterpolationMode) -> None:
        super().__init__()
        self.size, self.lo, self.interpolation = size, lo, interpolation
        self.progress = torch.zeros((), dtype=torch.float64).share_memory_()

    @property
    def least(self) -> float:
        """Smallest fraction of the area at the current progress."""
        return self.lo + (1 - self.lo) * (1 - math.sqrt(1 - float(self.progress) ** 2))

    def forward(self, image: Image.Image) -> Image.Image:
        """The crop, resized to `size` pixels."""
        area, most = image.width * image.height, min(image.size) ** 2
        lowest = min(self.least * area, most)
        side = round(math.sqrt(lowest + (most - lowest) * float(torch.rand(()))))
        y, x = (int(torch.randint(length - side + 1, ())) for length in (image.height, image.width))
        size = [self.size, self.size]
        return cast(Image.Image, resized_crop(cast(Any, image), y, x, side, side, size, self.interpolation))


@dataclass(frozen=True)
class CornerCrop:
    """The square of `size` pixels in a corner: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""

    size: int
    corner: int

    def __call__(self, image: Image.Image) -> Image.Image:
        """The crop. Raises InputError (image.size) if the image is too small."""
        if min(image.size) < self.size:
            raise InputError(
                "image.size", f"an image of {image.width} x {image.height} pixels has no crop of {self.size}"
            )
        x = (image.width - self.size) * (self.corner % 2)
        y = (image.height - self.size) * (self.corner // 2)
        return image.crop((x, y, x + self.size, y + self.size))
