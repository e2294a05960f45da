"""The images that predict is asked for: files, folders, splits, PIL images and arrays."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rescom_timm.data.decoding import BrokenImage, decode
from rescom_timm.data.image_folders import IMAGE_SUFFIXES, LeftOut, files_under
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import Policy, parse
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.inference.pretrained import Pretrained

ImageSource = str | Path | Split | Iterable[str | Path | Image.Image | np.ndarray]
"""A file, a folder, a split of a data set, or files, PIL images and arrays."""


class Images(Dataset[tuple[Tensor | None, dict[str, str]]]):
    """The images of predict: position -> (uint8 (views, 3, H, W) or None, fields of its Prediction)."""

    def __init__(self, images: ImageSource) -> None:
        self.split = images if isinstance(images, Split) else None
        self.names: Sequence[str] = []
        self.items: Any = images
        if self.split is not None:
            self.items = self.split.dataset
            self.true = self.split.labels
            return
        if isinstance(images, str | Path):
            self.items = _files(Path(images))
        elif not isinstance(images, Iterable) or isinstance(images, np.ndarray | Tensor):
            message = "images must be a file, a folder, a Split or a list of files, PIL images or arrays"
            raise InputError("predict.images", message)
        else:
            self.items = [
                one for item in images for one in (_files(Path(item)) if isinstance(item, str | Path) else [item])
            ]
        if not self.items:
            raise InputError("predict.images", "there are no images to predict")

    def prepare(self, model: Pretrained, names: Sequence[str], crops: Sequence[str]) -> None:
        """names: class names of a split's labels. crops: policies of further views of each image."""
        _, height, width = model.input_size
        own = model.eval_policy if model.eval_policy != "none" else ""
        self.policies, self.size = [parse(policy) for policy in (own, *crops)], (width, height)
        # Images of another size than in training are resized, as timm's own transform does.
        self.fit = parse(f"resize({min(height, width)}) | center_crop({min(height, width)})")
        self.names, self.reading = names, model.reading

    @property
    def from_disk(self) -> bool:
        """Whether all are files; images of a caller or a data set are read in the caller's thread."""
        return self.split is None and all(isinstance(item, Path) for item in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Tensor | None, dict[str, str]]:
        value = self.items[position]
        about = {"image": str(value) if isinstance(value, Path) else str(position)}
        if self.split is not None:
            value = value["image"]
            about = {"image": value.get("path") or str(int(self.split.rows[position]))}
            number = int(self.true[position])
            about["label"] = self.names[number] if number < len(self.names) else str(number)
        try:
            decoded = decode(str(value) if isinstance(value, Path) else value, position, self.reading)
            views = [self._view(decoded, policy) for policy in self.policies]
        except BrokenImage as error:
            return None, {**about, "error": str(error)}
        return torch.stack(views), about

    def _view(self, decoded: Image.Image, policy: Policy) -> Tensor:
        image = policy.augment(decoded)
        if image.size != self.size:
            image = self.fit.augment(image)
        if image.size != self.size:
            raise BrokenImage(f"it has {image.size} pixels and the model needs {self.size}")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def image_name(split: Split, position: int) -> str:
    """The name of a split's image in predictions and embeddings: its path, else its row."""
    return split.dataset[position]["image"].get("path") or str(int(split.rows[position]))


def _files(path: Path) -> list[Path]:
    """The file, or all images in and below the folder except hidden ones.

    Raises MissingFileError, and InputError (predict.images) for a folder without images.
    """
    if path.is_dir():
        left = LeftOut()
        files = list(map(Path, files_under(path, left)))
        left.paths.pop("are hidden", None)
        left.say(path, logging.getLogger(__name__).warning)
        found = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not found:
            message = f"no image in {path}: images end in {', '.join(sorted(IMAGE_SUFFIXES))}"
            raise InputError("predict.images", message)
        return found
    if not path.exists():
        raise MissingFileError("file.missing", f"no image {path}")
    return [path]
