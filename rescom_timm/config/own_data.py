"""A recipe for your own data, by the rules of own_rules and what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import yaml

from rescom_timm.config import own_rules
from rescom_timm.config.loading import load_dict, merged
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.config import DataConfig
from rescom_timm.data.sizes import sample, sizes
from rescom_timm.data.sources import Data
from rescom_timm.data.splits import Split
from rescom_timm.errors import InputError
from rescom_timm.methods import create_method
from rescom_timm.metrics import groups
from rescom_timm.models.net import create_model, pretrained_cfg, timm_name
from rescom_timm.text import escape_controls

SIZES = (1, 2048)
"""Least and largest side of the images that a net sees, in pixels."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for; None: by the rules.

    Raises InputError for a size out of bounds, and for a backbone that timm does not know.
    """

    device: str | None = None
    """cpu or cuda; None: a GPU where there is one."""
    backbone: str | None = None
    """timm's name."""
    pretrained: bool | None = None
    """Whether it starts from its weights; None: where timm has them."""
    size: int | None = None
    """Side of the images that the net sees, in pixels."""
    tune: str | None = None
    """lora, adaptformer or prompt, over a frozen ViT."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """Sections over those by the rules, as a preset has them."""

    def __post_init__(self) -> None:
        if self.size is not None and not SIZES[0] <= self.size <= SIZES[1]:
            raise InputError("recipe.value", f"the size of images must be {SIZES[0]} to {SIZES[1]:,}, not {self.size}")
        if self.backbone is not None:
            pretrained_cfg(self.backbone)

    @property
    def is_cpu(self) -> bool:
        """Whether the training is to be on a CPU."""
        return self.device == "cpu" or (self.device is None and not torch.cuda.is_available())


@dataclass(frozen=True)
class Proposal:
    """Settings as the sections of a recipe, and the reason of each choice, a line each."""

    sections: dict[str, Any]
    reasons: tuple[str, ...]

    def text(self, source: str) -> str:
        """The text of the recipe. source: of the images."""
        comments = (
            f"{source}: {self.reasons[0]}",
            "Made by rescom-timm init. Train:  rescom-timm train THIS_FILE",
            *self.reasons[1:],
        )
        body = yaml.safe_dump(self.sections, sort_keys=False, width=120, allow_unicode=True, default_flow_style=None)
        return "".join(f"# {escape_controls(line)}\n" for line in comments) + body


def propose(data: Data, config: DataConfig, wanted: Wanted | None = None) -> Proposal:
    """The recipe for this data, and why.

    Raises InputError for a method that does not fit the data or the net, and as `_sides` does.
    """
    wanted = wanted or Wanted()
    counts, images = data.counts, int(data.counts.sum())
    least, side, most = _sides(data.train)
    few, many = (len(groups(counts).get(name, ())) for name in ("few", "many"))
    sections, start, choices = _net_and_views(wanted, side)
    row = own_rules.row_for(start, wanted.is_cpu, images)
    named = wanted.method.get("method", {}).get("name")
    if wanted.tune:
        row = row._replace(kind="tune", epochs=10)
    elif row.kind == "probe" and named not in (None, "probe"):
        row = row._replace(kind="fine_tune", epochs=1)
    settings, why = own_rules.SETTINGS[row.kind]
    method, loss = own_rules.method(counts, start)
    base = {
        "data": section(config),
        **sections,
        "loader": {"exif": True},
        "method": own_rules.rescom(counts) if named == "rescom" else method,
        "optimizer": {},
        "schedule": {},
        "train": {"epochs": row.epochs, "batch_size": row.batch},
        "evaluation": {"select": "mean_class"},
    }
    tree: dict[str, Any] = merged(merged(base, settings), wanted.method)
    epochs = tree["train"]["epochs"]
    tree["evaluation"].setdefault("every", max(2, epochs // 5))
    if "classifier" in tree["net"] and named and not _keeps_classifier(load_dict(tree), counts):
        tree["net"] = {key: value for key, value in tree["net"].items() if key != "classifier"}
        why = "head: the method's own"
    if named:
        loss = f"method: {tree['method']['name']}, as asked for"
    device = "a CPU" if wanted.is_cpu else "a GPU"
    return Proposal(
        tree,
        (
            f"{images:,} training images of {len(counts):,} classes, {counts.max():,} to {counts.min():,} a class; "
            f"{many} classes have more than 100, {few} fewer than 20; shorter sides have {least} to {most} pixels, "
            f"usually {side}",
            *choices,
            *[why] * bool(why),
            *[loss] * (row.kind != "probe"),
            *[f"epochs: {epochs}, for {images:,} images on {device}"] * (epochs > 0),
        ),
    )


def section(config: DataConfig) -> dict[str, object]:
    """The section `data` of a recipe, without defaults."""
    return {key: value for key, value in asdict(config).items() if value != getattr(DataConfig, key, None)}


def _net_and_views(wanted: Wanted, side: int) -> tuple[dict[str, Any], str, list[str]]:
    """The sections net and views for images of a shorter side, whether it starts from weights or scratch, and why."""
    default = own_rules.default_backbones("cpu" if wanted.is_cpu else "cuda")[0]
    small = side <= own_rules.SMALL
    if wanted.backbone:
        backbone, why = timm_name(wanted.backbone), "as asked for"
    elif wanted.tune:
        backbone, why = f"vit_{'tiny' if wanted.is_cpu else 'small'}_patch16_224.augreg_in21k", "a small ViT"
    elif small:
        backbone, why = "resnet32_cifar", f"images of {side} pixels (--backbone NAME --size N enlarges them instead)"
    else:
        backbone = default.name
        why = f"fit's default for a {'CPU' if wanted.is_cpu else 'GPU'}, {default.megabytes} MB to download"
    cfg = pretrained_cfg(backbone)
    pretrained = wanted.pretrained
    if pretrained is None:
        pretrained = ":" in backbone or any(cfg.get(key) for key in ("hf_hub_id", "url", "file"))
    own = cfg["input_size"][1]
    size = wanted.size or (side if small and not pretrained else own)
    options = own_rules.options_of(cfg, size)
    net: dict[str, Any] = {"backbone": backbone, "pretrained": pretrained}
    if options:
        net["options"] = options
    if wanted.tune:
        net["tuning"] = {"name": wanted.tune}
    views = own_rules.views(cfg, size, pretrained, small)
    choices = [f"net: {backbone}, {'from its weights' if pretrained else 'from scratch'}: {why}"]
    whose = "as asked for" if wanted.size else "those of the images" if size == side else "the net's own"
    choices.append(f"size: {size} pixels, {whose}" + "; smaller images are enlarged" * (size > side))
    start = "weights" if pretrained else "scratch"
    return {"views": views, "net": net}, start, choices


def _keeps_classifier(recipe: Recipe, counts: np.ndarray) -> bool:
    """Whether the recipe's method trains the net's classifier, and not one of its own."""
    net = create_model(recipe.net.backbone, len(counts), **recipe.net.options)
    head = net.classifier
    method = create_method(net, torch.as_tensor(counts), recipe.method)
    return method.net.classifier is head and not method.fits_head


def _sides(train: Split) -> tuple[int, int, int]:
    """Least, usual (the larger median, over images or classes) and largest shorter side in pixels, of a sample."""
    found = sizes(train, sample(train.labels))
    if not found:
        raise InputError("image.unreadable", f"no sampled image of {train.name} can be read: run rescom-timm doctor")
    sides, labels = np.array([min(size) for size, _ in found]), train.labels[[position for _, position in found]]
    by_class = [np.median(sides[labels == label]) for label in np.unique(labels)]
    return int(sides.min()), int(max(np.median(sides), np.median(by_class))), int(sides.max())
