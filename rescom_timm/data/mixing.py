"""Mixup and CutMix: the images of a completed batch are mixed with those of partners, on their device.

timm.data.Mixup and torchvision's MixUp draw from the global generators, so a resumed run would differ, and give soft
targets, which losses with a margin, weight or smoothing per label do not take. Here the caller draws, and labels stay
labels: the loss is share * L(label) + (1 - share) * L(partner).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rescom_timm.data.config import MixConfig
from rescom_timm.data.samples import Batch


def mix(batch: Batch, config: MixConfig, draws: np.random.Generator, normalize: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with mixed images, the labels of their `partner` (B,) and the `share` (scalar) of their own.

    Unchanged with probability 1 - config.probability. batch: image (B, V, 3, H, W), label (B,). normalize: 8-bit images
    to floats.
    """
    if draws.random() >= config.probability:
        return batch
    cuts = config.cutmix > 0 and (not config.mixup or draws.random() < config.switch_probability)
    alpha = config.cutmix if cuts else config.mixup
    share = float(draws.beta(alpha, alpha))
    partner = torch.from_numpy(draws.permutation(len(batch["label"]))).to(batch["label"].device)
    images = normalize(batch["image"])
    if cuts:
        height, width = images.shape[-2:]
        rows, columns = box(height, width, share, draws)
        share = 1 - len(range(height)[rows]) * len(range(width)[columns]) / (height * width)
        others, images = images[partner, ..., rows, columns], images.clone()
        images[..., rows, columns] = others
    else:
        images = images.lerp(images[partner], 1 - share)
    mixed = {"image": images, "partner": batch["label"][partner], "share": torch.tensor(share)}
    return {**batch, **mixed}


def box(height: int, width: int, share: float, draws: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns that CutMix takes from the partner (eq. 2).

    1 - share of the area, around a uniform pixel, cut off at the edges.
    """
    ratio = math.sqrt(1 - share)
    ends = []
    for size in (height, width):
        cut, middle = int(size * ratio), int(draws.integers(size))
        ends.append(slice(max(middle - cut // 2, 0), min(middle + (cut + 1) // 2, size)))
    return ends[0], ends[1]
