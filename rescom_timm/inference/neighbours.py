"""Embeddings of images, their file, and nearest neighbours. N images, F features, D the projector's width."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.io import write_tensors


class Neighbour(NamedTuple):
    """An image near another: its path or row, its class ("" if unknown), the cosine of their features."""

    image: str
    label: str
    similarity: float


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Of N images: features (N, F), the classifier's input, and unit embeddings (N, D) of the projector; float32."""

    features: Tensor
    embeddings: Tensor
    images: list[str]
    """Their paths, or rows of the data set."""
    labels: list[str]
    """Their class names, "" if unknown."""

    def save(self, path: str | Path) -> None:
        """As safetensors: `features`, `embeddings`, and in the metadata `images` and `labels`, each a JSON list."""
        about = {"images": json.dumps(self.images), "labels": json.dumps(self.labels)}
        write_tensors(Path(path), {"features": self.features, "embeddings": self.embeddings}, about)

    @classmethod
    def load(cls, path: str | Path) -> Embeddings:
        """Raises MissingFileError, and InputError (predict.embeddings) for a file that `save` did not write."""
        if not Path(path).is_file():
            raise MissingFileError("file.missing", f"no file of embeddings {path}")
        try:
            with safe_open(path, framework="pt") as file:
                about = {key: json.loads((file.metadata() or {})[key]) for key in ("images", "labels")}
                read = cls(file.get_tensor("features"), file.get_tensor("embeddings"), about["images"], about["labels"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            message = f"{path} is not a file of embeddings ({error}): make one with predict --embeddings"
            raise InputError("predict.embeddings", message) from None
        lengths = {len(read.features), len(read.embeddings), len(read.images), len(read.labels)}
        if read.features.ndim != 2 or len(lengths) != 1:
            message = f"{path}: features, embeddings, images and labels differ in number: make the file again"
            raise InputError("predict.embeddings", message)
        return read

    def nearest(self, features: Tensor, number: int) -> list[list[Neighbour]]:
        """The `number` nearest of these images for each of other features (M, F), by the cosine, nearest first."""
        if features.shape[1] != self.features.shape[1]:
            raise InputError(
                "predict.embeddings",
                f"the embeddings have {self.features.shape[1]} features and the model {features.shape[1]}: they are of "
                "another model",
            )
        top = (F.normalize(features, dim=1) @ self._unit.T).topk(min(number, len(self.images)), dim=1)
        rows = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        return [
            [Neighbour(self.images[i], self.labels[i], value) for value, i in zip(values, found, strict=True)]
            for values, found in rows
        ]

    @cached_property
    def _unit(self) -> Tensor:
        return F.normalize(self.features, dim=1)


@dataclass
class Gatherer:
    """Collects embeddings batch by batch."""

    features: list[Tensor] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, features: Tensor, embeddings: Tensor, images: list[str], labels: list[str]) -> None:
        """Add a batch: features (B, F), embeddings (B, D), names and labels of B images."""
        self.features.append(features.cpu())
        self.embeddings.append(embeddings.cpu())
        self.images += images
        self.labels += labels

    def gathered(self) -> Embeddings:
        """Raises InputError (predict.images) if no image could be read."""
        if not self.images:
            raise InputError("predict.images", "no image could be read, so there are no embeddings")
        return Embeddings(torch.cat(self.features), torch.cat(self.embeddings), self.images, self.labels)
