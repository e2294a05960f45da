"""A recipe for your own data, with settings derived from its class counts."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch
import yaml

from rescom_timm.data.config import DataConfig
from rescom_timm.data.sizes import sample, sizes
from rescom_timm.data.sources import Data
from rescom_timm.data.splits import Split
from rescom_timm.errors import InputError
from rescom_timm.methods.rescom import auto_negatives
from rescom_timm.metrics import groups


def settings(counts: np.ndarray) -> dict[str, tuple[float, str]]:
    """Q, Qp, Qn and beta for data with these class counts (K,), each with its reason. Ours: only some are published."""
    classes = len(counts)
    q = int(np.clip(round(1000 / classes), 4, 64))
    others = (classes - 1) * q
    qn = auto_negatives(classes, q)
    many = int((counts > 100).sum())
    return {
        "per_class": (q, f"Q: {classes * q:,} keys in all; the paper has 10 for 100 classes and 4 for 1,000"),
        "positives": (1, "Qp: the hardest positive alone, as in every published setting"),
        "negatives": (qn, f"Qn: {100 * qn / others:.0f}% of {others:,} keys of other classes; paper: 400 of 990"),
        "beta": (0.99, f"weights level off above about 100 images, which {many} of {classes} classes have")
        if many
        else (0.999999, "weights of in effect 1 / count: no class has more than 100 images"),
    }


def recipe_for(data: Data, config: DataConfig, source: str, tune: str | None = None) -> str:
    """The text of a recipe for this data, with the reasons of its settings.

    tune: lora, adaptformer or prompt, over a frozen ViT of ImageNet-21k.
    """
    section = {key: value for key, value in asdict(config).items() if value != getattr(DataConfig, key, None)}
    chosen = settings(data.counts)
    least, side, most = _sides(data.train)
    images = int(data.counts.sum())
    batch = 128 if images >= 1024 else min(32, 2 ** int(np.log2(images)))
    few, many = (len(groups(data.counts).get(name, ())) for name in ("few", "many"))
    line = {key: f"{key}: {value:g}  # {why}" for key, (value, why) in chosen.items()}
    epochs, warmup = 100, 5
    if tune is not None:
        small = "small" if torch.cuda.is_available() else "tiny"
        net = (
            "net:  # less than 2% of the weights train: with few images, fine-tuning all of them hurts rare classes\n"
            f"  backbone: vit_{small}_patch16_224.augreg_in21k  # vit_base_... where a GPU has room\n"
            "  pretrained: true\n"
            f"  tuning: {{name: {tune}}}\n"
            "  classifier: {kind: cosine, scale: 25.0, init: class_means}"
        )
        views = (
            'views: {train: "random_resized_crop(224,0.08,1,bicubic) | flip", eval: "resize(256,bicubic) | '
            'center_crop(224)", mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}'
        )
        rate = "optimizer: {lr: 0.01, weight_decay: 5.0e-4}  # with the epochs, as LIFT's (arXiv 2309.10019)"
        epochs, warmup = 10, 0
    elif side <= 64:
        same = f"resize({side}) | center_crop({side})"
        net = "net: {backbone: resnet32_cifar, projector: {hidden: 64, dim: 32}}"
        views = f'views: {{train: "{same} | crop({side},4) | flip", eval: "{same}"}}'
        rate = "optimizer: {lr: 0.1, weight_decay: 5.0e-4}"
    else:
        net = "net: {backbone: resnet50.tv_in1k, pretrained: true}  # ImageNet weights: few data sets do without"
        views = "views: {train: imagenet, eval: eval224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
        rate = "optimizer: {lr: 0.02, weight_decay: 5.0e-4}"
    return f"""\
# {source}: {data.counts.sum():,} training images of {len(data.counts):,} classes, {data.counts.max():,} to \
{data.counts.min():,} a class; {many} classes have more than 100, {few} fewer than 20.
# Made by rescom-timm init. Q, Qp, Qn and beta are chosen for these counts, for the reasons beside them; nothing
# here was tuned. Train:  rescom-timm train THIS_FILE
{yaml.safe_dump({"data": section}, sort_keys=False, width=120, allow_unicode=True)}\
{views}  # shorter sides have {least} to {most} pixels, usually {side}
loader: {{exif: true}}  # photographs are turned upright by their EXIF orientation
{net}
method:
  name: rescom
  queue:
    {line["per_class"]}
  {line["positives"]}
  {line["negatives"]}
  {line["beta"]}
{rate}
schedule: {{name: cosine, warmup_epochs: {warmup}}}
train: {{epochs: {epochs}, batch_size: {batch}}}
evaluation: {{select: mean_class}}  # by which the best epoch on validation is chosen
"""


def _sides(train: Split) -> tuple[int, int, int]:
    """Least, usual and largest shorter side in pixels, of a sample over all classes.

    Usual is the median over images or that over classes, the larger one: enlarging some images costs time, shrinking
    the others loses what is in them. Raises InputError where none of the images can be read.
    """
    found = sizes(train, sample(train.labels))
    if not found:
        raise InputError("image.unreadable", f"no sampled image of {train.name} can be read: run rescom-timm doctor")
    sides, labels = np.array([min(size) for size, _ in found]), train.labels[[position for _, position in found]]
    by_class = [np.median(sides[labels == label]) for label in np.unique(labels)]
    return int(sides.min()), int(max(np.median(sides), np.median(by_class))), int(sides.max())
