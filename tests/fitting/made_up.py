"""Photographs that a random net tells apart: each class has its colours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NET = "test_resnet.r160_in1k"
"""timm's, of 0.5 M weights."""


def photographs(root: Path, train: Sequence[int], validation: int = 5, test: int = 4, size: int = 20) -> Path:
    """Folders train, val and test of class folders a, b ...; train: images of each class."""
    random = np.random.default_rng(0)
    colours = random.integers(40, 215, (len(train), 3))
    for split, counts in (("train", train), ("val", [validation] * len(train)), ("test", [test] * len(train))):
        for label, count in enumerate(counts):
            folder = root / split / chr(97 + label)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                noise = random.normal(colours[label], 45, (size, size, 3))
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return root
