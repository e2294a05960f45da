"""The backbones of a fit with their weights, and their recipes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import set_seed

from rescom_timm.config.own_rules import default_backbones, evaluation_view, options_of
from rescom_timm.config.recipe import EvaluationConfig, Recipe, RecipeError
from rescom_timm.engine.build import build_net
from rescom_timm.engine.errors import advice, one_line
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.errors import InputError
from rescom_timm.fitting.plan import FitOptions
from rescom_timm.fitting.record import Record
from rescom_timm.fitting.source import is_recipe
from rescom_timm.models.net import Net, NetConfig, check_backbone


def nets(options: FitOptions, base: Recipe, classes: int, record: Record) -> Iterator[tuple[Recipe, Net]]:
    """The backbones to probe: those that are named, else the first of the default ones whose weights are here.

    base: the recipe of the images. Downloads take no time of the record. Raises InputError (fit.weights).
    """
    if options.backbones:
        for name in options.backbones:
            yield _net(name, options, base, classes, record)
        return
    device, file = new_accelerator("no").device.type, options.weights_file
    rows = default_backbones(device, options.minutes)
    known = record.values.get("backbone")
    for name in [known] if known else [one.name for one in rows[: None if file is None else 1]]:
        with contextlib.suppress(InputError):
            found = _net(name, options, base, classes, record)
            record.save(backbone=name)
            yield found
            return
    raise InputError("fit.weights", _no_weights(f"{rows[0].name} ({rows[0].megabytes} MB)", file))


def _net(name: str, options: FitOptions, base: Recipe, classes: int, record: Record) -> tuple[Recipe, Net]:
    """A net with its weights and a new head, and its recipe. Raises InputError where the weights cannot be had."""
    file = options.weights_file
    config = NetConfig(name, pretrained=file != "none", weights_file=None if file == "none" else file)
    check_backbone(config.backbone)
    views = base.views
    try:
        with record.uncounted():
            set_seed(options.seed)  # of weights from scratch
            net = build_net(config, views, classes)
        cfg: Any = net.encoder.pretrained_cfg
        size = options.size or cfg["input_size"][1]
        if more := options_of(cfg, size):
            config = replace(config, options=more)
            set_seed(options.seed)
            net = build_net(config, views, classes)
    except (OSError, RuntimeError, LookupError, RecipeError) as error:  # no network, no file, or one of another net
        if advice(error):  # a full disk, a file without permission
            raise
        raise InputError("fit.weights", f"{_no_weights(name, file)}: {one_line(error)}") from error
    if not is_recipe(options.source):
        views = replace(views, mean=cfg["mean"], std=cfg["std"])
    net.mean.copy_(torch.tensor(views.mean).view_as(net.mean))
    net.std.copy_(torch.tensor(views.std).view_as(net.std))
    net.drop_projector()
    views = replace(views, train="flip", eval=evaluation_view(cfg, size))
    recipe = replace(base, net=config, views=views, seed=options.seed, evaluation=EvaluationConfig(batch_size=64))
    return recipe, net


def _no_weights(what: str, file: str | None) -> str:
    if file is not None:
        return f"the weights of {what} cannot be read from --weights-file {file} (--backbone NAME says whose they are)"
    return (
        f"the weights of {what} cannot be downloaded and are not in timm's cache: give them with --weights-file FILE "
        "(and --backbone NAME), or train from scratch with --weights-file none"
    )
