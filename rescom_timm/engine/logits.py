"""Logits of an evaluation, kept in RUN/evaluation/logits, so that temperature, prior and ensembles need no net again.

Half precision, less each row's largest, which no softmax sees: what counts is near 0, where half precision is finest.
Up to WHOLE bytes an evaluation all K logits of the N images are kept, beyond that the TOP largest and the log of the
sum of all exponentials; what is computed from these is approximate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.io import write_tensors
from rescom_timm.metrics import LIMITS, Limits, Meter

WHOLE = 256 * 2**20
TOP = 100


class Keeper:
    """Takes the logits (n, K) and labels (n,) of an evaluation of N images, batch by batch, on any device."""

    def __init__(self, images: int, classes: int) -> None:
        whole = 2 * images * classes <= WHOLE
        self.kept = classes if whole else min(TOP, classes)
        self.tensors: dict[str, Tensor] = {
            "labels": torch.empty(images, dtype=torch.long),
            "logits": torch.empty(images, self.kept, dtype=torch.float16),
        }
        if not whole:
            self.tensors["classes"] = torch.empty(images, self.kept, dtype=torch.int32)
            self.tensors["log_sum_exp"] = torch.empty(images)
        self.number, self.length = classes, 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add the logits (n, K) and labels (n,) of a batch."""
        logits = logits.detach().float()
        logits = logits - logits.amax(dim=1, keepdim=True)
        values = {"labels": labels, "logits": logits}
        if "classes" in self.tensors:
            top = logits.topk(self.kept, dim=1)
            values |= {"logits": top.values, "classes": top.indices, "log_sum_exp": logits.logsumexp(dim=1)}
        end = self.length + len(labels)
        for name, value in values.items():
            self.tensors[name][self.length : end] = value.cpu()
        self.length = end

    def write(self, path: Path) -> None:
        """Write what was added as a safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value[: self.length] for name, value in self.tensors.items()}
        write_tensors(path, tensors, {"classes": str(self.number)})


def place(run: Path, name: str) -> Path:
    """Where the logits of an evaluation <split>-<checkpoint> are."""
    return run / "evaluation" / "logits" / f"{name}.safetensors"


@dataclass(frozen=True, eq=False)
class Logits:
    """labels (N,) and values (N, K); or values (N, T), the largest, of classes (N, T), and log_sum_exp (N,) of all."""

    labels: Tensor
    values: Tensor
    num_classes: int
    classes: Tensor | None = None
    log_sum_exp: Tensor | None = None

    @property
    def approximate(self) -> bool:
        """True if only the largest logits of each image were kept."""
        return self.classes is not None

    def batches(self, size: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits (n, K) float32 and labels (n,), at most `size` images at a time.

        Where only the largest were kept, the other classes share what is left of the sum of exponentials evenly.
        """
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            values = self.values[part].float()
            if self.classes is not None and self.log_sum_exp is not None:
                rest = (self.log_sum_exp[part].exp() - values.exp().sum(dim=1)).clamp(min=1e-12)
                each = (rest / max(1, self.num_classes - values.shape[1])).log()
                # No class that was left out had a larger logit than the least that was kept.
                each = torch.minimum(each, values.amin(dim=1))
                dense = each[:, None].repeat(1, self.num_classes)
                values = dense.scatter(1, self.classes[part].long(), values)
            yield values, self.labels[part]

    def whole(self) -> tuple[Tensor, Tensor]:
        """All logits (N, K) float32 and labels (N,)."""
        found, labels = zip(*self.batches(), strict=True)
        return torch.cat(found), torch.cat(labels)

    def judged(
        self, counts: Tensor | np.ndarray | None = None, limits: Limits = LIMITS, shift: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Meter:  # fmt: skip
        """The evaluation of softmax(s / temperature + shift). shift: (K,), such as the log of a prior."""
        meter = Meter(self.num_classes, None if counts is None else torch.as_tensor(counts), limits=limits)
        for values, labels in self.batches():
            meter.update(values / temperature + (0 if shift is None else shift), labels)
        return meter


def read(run: Path, name: str) -> Logits:
    """Read the kept logits of an evaluation.

    Raises FileNotFoundError where there are none, ValueError where they cannot be read.
    """
    path = place(run, name)
    if not path.is_file():
        raise MissingFileError("file.missing", f"no {path}: write it with rescom-timm evaluate {run}")
    try:
        tensors: Mapping[str, Tensor] = load_file(path)
        labels, values = tensors["labels"], tensors["logits"]
        number = values.shape[1] if "classes" not in tensors else _classes(path)
    except (SafetensorError, LookupError, ValueError, OSError) as error:
        raise InputError(
            "run.evaluation", f"{path} cannot be read ({error}): write it again with rescom-timm evaluate {run}"
        ) from error
    return Logits(labels, values, number, tensors.get("classes"), tensors.get("log_sum_exp"))


def _classes(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return int(file.metadata()["classes"])
