"""Made-up images and splits, for the tests of fast views."""

import io
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from rescom_timm.data.config import LoadingConfig

PLAIN = LoadingConfig(workers=0, batched=False, cache=0)


def made_up(height: int = 32, width: int = 32) -> np.ndarray:
    """(16, H, W, 3): noise of every contrast, flat images, two levels, ramps, a single different pixel."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, height, width, 3))
    images = images * np.arange(1, 17)[:, None, None, None] // 16
    images[0], images[1], images[2] = 0, 255, 77
    images[3] = np.where(images[3] > 5, 254, 3)
    images[4] = (np.arange(width) * 255 // (width - 1))[None, :, None]
    images[5], images[5, 1, 1] = 200, 40
    images[6] = 100 + images[6] // 64
    return images.astype(np.uint8)


def tensor(images: np.ndarray, device: str = "cpu") -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)


def make_split(sizes: tuple[tuple[int, int], ...] = ((32, 32),) * 20, broken: tuple[int, ...] = ()) -> Any:
    rng, images = np.random.default_rng(3), []
    for position, (height, width) in enumerate(sizes):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
        images.append({"bytes": stream.getvalue()[: 60 if position in broken else None], "path": f"{position}.png"})
    labels = np.arange(len(sizes)) % 2
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels})
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    return SimpleNamespace(name="noise", dataset=dataset, labels=labels, rows=np.arange(len(sizes)) + 7)


def assert_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "row"}
        assert all(torch.equal(a[key], b[key]) for key in a)
