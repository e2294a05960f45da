"""Labels with probabilities for images, by a trained model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rescom_timm.data.decoding import BrokenImage, decode
from rescom_timm.data.image_folders import IMAGE_SUFFIXES, files_under
from rescom_timm.data.splits import Split
from rescom_timm.data.views import parse
from rescom_timm.files import write_rows
from rescom_timm.nets.net import Net
from rescom_timm.sharing.pretrained import Pretrained, from_pretrained

LONG_TAILED = ("cross_entropy", "focal")
"""Methods whose logits hold the class frequencies of the training data; those of all others are balanced."""

Prior = Sequence[float] | Tensor | Literal["uniform", "train"]


@dataclass(frozen=True)
class Prediction:
    """Of one image: the k most probable classes, most probable first."""

    image: str
    """Its path, or its position among the images given."""
    labels: list[str]
    probabilities: list[float]
    error: str = ""
    """Why the image could not be read; labels and probabilities are empty then."""
    label: str = ""
    """Its true class, where the images are a data set's."""


def predict(
    model: str | Path | Pretrained,
    images: Any,
    *,
    top_k: int = 5,
    prior: Prior | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
) -> list[Prediction]:
    """The top-k classes of every image, in order; an unreadable image is told in its Prediction and stops nothing.

    model: anything from_pretrained takes, or what it gave. images: a file, a folder (searched through, sorted), a list
    of files, PIL images or arrays, or a Split of a data set. prior: how frequent the K classes are where the images
    come from, as K counts or probabilities, "uniform", or "train" (as in training); None: as the model was trained to
    answer. The logits s of Balanced Softmax and its relatives are those of evenly frequent classes (the training
    frequencies were in the loss), so by Bayes' rule s + log prior are those of the prior (Ren et al. 2020, eq. 3; Menon
    et al. 2021); of a model trained by plain cross-entropy the log of the training frequencies is taken off first.
    Raises FileNotFoundError and ValueError for a model, images or a prior that cannot be.
    """
    return list(predictions(model, images, top_k, prior, batch_size, workers, device))


def predictions(
    model: str | Path | Pretrained,
    images: Any,
    top_k: int = 5,
    prior: Prior | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
) -> Iterator[Prediction]:
    """As predict, one after the other: for more images than one wants to hold results of."""
    if top_k < 1 or batch_size < 1:
        raise ValueError("top_k and batch_size must be at least 1")
    source = Images(images)
    model = model if isinstance(model, Pretrained) else from_pretrained(model)
    shift = adjustment(model, prior)
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        net = copy.deepcopy(model.net).to(device).eval()  # the caller's stays where and as it is
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return _run(model, net, source, min(top_k, net.classifier.out_features), shift, batch_size, workers, device)


@torch.inference_mode()
def _run(
    model: Pretrained, net: Net, source: Images, top_k: int, shift: Tensor, batch_size: int, workers: int, device: Any
) -> Iterator[Prediction]:
    names = model.class_names or [str(k) for k in range(net.classifier.out_features)]
    source.prepare(model)
    for batch in DataLoader(source, batch_size, num_workers=workers, collate_fn=list):
        read = [image for image, _ in batch if image is not None]
        rows: list[tuple[list[float], list[int]]] = []
        if read:
            logits = net.classify(torch.stack(read).to(device)).float() + shift.to(device)
            top = logits.softmax(dim=1).topk(top_k)
            rows = list(zip(top.values.tolist(), top.indices.tolist(), strict=True))
        for image, about in batch:
            probabilities, classes = rows.pop(0) if image is not None else ([], [])
            yield Prediction(labels=[names[k] for k in classes], probabilities=probabilities, **about)


def adjustment(model: Pretrained, prior: Prior | None) -> Tensor:
    """What is added to the logits (K,) for a known distribution of the classes; zeros for None. Raises ValueError."""
    classes = model.net.classifier.out_features
    if prior is None:
        return torch.zeros(classes)
    if isinstance(prior, str):
        if prior not in ("uniform", "train"):
            raise ValueError(f'prior must be {classes} numbers, "uniform" or "train", not {prior!r}')
        prior = torch.ones(classes) if prior == "uniform" else _counts(model)
    share = torch.as_tensor(prior, dtype=torch.float64)
    if (
        share.shape != (classes,)
        or not bool((share >= 0).all())
        or not bool(share.isfinite().all())
        or share.sum() == 0
    ):
        raise ValueError(
            f"prior must be {classes} counts or probabilities, one a class, at least 0 and not all 0; "
            f"got {len(share) if share.ndim else 1} of them: {share.flatten()[:5].tolist()}"
        )
    shift = (share / share.sum()).log()
    if model.recipe is not None and model.recipe.method.name in LONG_TAILED:
        counts = _counts(model).double()
        shift = shift - (counts / counts.sum()).log()
    return shift.float()


def _counts(model: Pretrained) -> Tensor:
    if model.counts is None:
        raise ValueError("this model does not tell the class counts of its training: give the prior as numbers")
    return model.counts


class Images(Dataset[tuple[Tensor | None, dict[str, str]]]):
    """Anything predict takes: position -> (uint8 (3, H, W) or None, what to tell of it)."""

    def __init__(self, images: Any) -> None:
        self.split = images if isinstance(images, Split) else None
        self.names: list[str] = []
        self.items: Any = images
        if self.split is not None:
            self.items = self.split.dataset
            self.true = self.split.labels
            return
        if isinstance(images, str | Path):
            self.items = _files(Path(images))
        elif not isinstance(images, Iterable) or isinstance(images, np.ndarray | Tensor):
            raise ValueError("images must be a file, a folder, a Split or a list of files, PIL images or arrays")
        else:
            self.items = [
                one for item in images for one in (_files(Path(item)) if isinstance(item, str | Path) else [item])
            ]
        if not self.items:
            raise ValueError("there are no images to predict")

    def prepare(self, model: Pretrained) -> None:
        _, height, width = model.input_size
        self.policy, self.size = parse(model.eval_policy if model.eval_policy != "none" else ""), (width, height)
        # Images of another size than those in training are brought to it, as timm's own transform does.
        self.fit = parse(f"resize({min(height, width)}) | center_crop({min(height, width)})")
        self.names = model.class_names

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Tensor | None, dict[str, str]]:
        value = self.items[position]
        about = {"image": str(value) if isinstance(value, Path) else str(position)}
        if self.split is not None:
            value = value["image"]
            row = int(self.split.rows[position])
            about = {"image": value.get("path") or str(row)}
            number = int(self.true[position])
            about["label"] = self.names[number] if number < len(self.names) else str(number)
        try:
            image = self.policy.augment(decode(str(value) if isinstance(value, Path) else value, position))
            if image.size != self.size:
                image = self.fit.augment(image)
            if image.size != self.size:
                raise BrokenImage(f"it has {image.size} pixels, the model wants {self.size}")
        except BrokenImage as error:
            return None, {**about, "error": str(error)}
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), about


def _files(path: Path) -> list[Path]:
    """The file, or all images in and below the folder, but for hidden ones. Raises FileNotFoundError, ValueError for a
    folder without."""
    if path.is_dir():
        files = map(Path, files_under(path))
        found = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not found:
            raise ValueError(f"no image in {path}: images end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        return found
    if not path.exists():
        raise FileNotFoundError(f"no image {path}")
    return [path]


def write_csv(found: Iterable[Prediction], path: str | Path, top_k: int) -> tuple[int, int]:
    """image, label_1, probability_1 ... label_k, probability_k, error, true_label; returns (images, unreadable)."""
    images = broken = 0

    def rows() -> Iterator[list[str]]:
        nonlocal images, broken
        pairs = [f"{name}_{k}" for k in range(1, top_k + 1) for name in ("label", "probability")]
        yield ["image", *pairs, "error", "true_label"]
        for one in found:
            cells = [
                cell for pair in zip(one.labels, one.probabilities, strict=True) for cell in (pair[0], f"{pair[1]:.6f}")
            ]
            yield [one.image, *cells, *[""] * (2 * top_k - len(cells)), one.error, one.label]
            images, broken = images + 1, broken + bool(one.error)

    # Row by row, so that what was predicted stays if the rest cannot be; a name that is no UTF-8 keeps its bytes.
    with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        write_rows(file, rows())
    return images, broken
