"""From a recipe to the objects of a run: method, optimizer, schedule."""

from __future__ import annotations

import timm.optim
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from rescom_timm.data.sources import Data
from rescom_timm.data.views import ViewsConfig
from rescom_timm.methods import Method, create_method
from rescom_timm.nets.net import Net, NetConfig, create_model
from rescom_timm.runs.recipe import OptimizerConfig, Recipe, RecipeError, ScheduleConfig


def build_net(config: NetConfig, views: ViewsConfig, num_classes: int) -> Net:
    return create_model(
        config.backbone,
        num_classes,
        pretrained=config.pretrained,
        weights_file=config.weights_file,
        projector=config.projector,
        mean=views.mean,
        std=views.std,
        **config.options,
    )


def build_method(recipe: Recipe, data: Data) -> Method:
    """Raises RecipeError where the method's settings do not fit the data's classes."""
    net = build_net(recipe.net, recipe.views, len(data.counts))
    try:
        return create_method(net, torch.as_tensor(data.counts), recipe.method)
    except ValueError as error:
        raise RecipeError(f"method: {error}") from error


def build_optimizer(config: OptimizerConfig, net: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizers; SGD is without Nesterov unless asked for (timm's own `sgd` is with it)."""
    weight_decay = config.weight_decay
    parameters: object = net
    if config.layer_decay is not None:
        parameters = [
            *param_groups_layer_decay(net.encoder, weight_decay, layer_decay=config.layer_decay),  # type: ignore[arg-type]
            {"params": [p for m in (net.classifier, net.projector) for p in m.parameters() if p.requires_grad]},  # type: ignore[union-attr]
        ]
    elif config.decay_norm_and_bias:
        parameters = [p for p in net.parameters() if p.requires_grad]
    extra = {"nesterov": config.nesterov} if config.name == "sgd" else {}
    if config.name not in timm.optim.list_optimizers():
        raise RecipeError(f"optimizer.name: timm has no optimizer {config.name!r}; see timm.optim.list_optimizers()")
    return create_optimizer_v2(
        parameters, config.name, config.lr, weight_decay, config.momentum,
        filter_bias_and_bn=not config.decay_norm_and_bias, **extra,
    )  # fmt: skip


def build_schedule(config: ScheduleConfig, optimizer: torch.optim.Optimizer, lr: float, epochs: int) -> Scheduler:
    """timm's schedule, a pure function of the epoch: `schedule.step(epoch)` at the start of each.

    Warm-up gives lr * (t + 1) / W in epoch t < W; the cosine starts from its end, as in the authors' training.
    """
    ramp = max(config.warmup_epochs - 1, 0)
    warmup = {"warmup_t": ramp, "warmup_lr_init": lr / max(config.warmup_epochs, 1)}
    if config.name == "cosine":
        return CosineLRScheduler(
            optimizer, t_initial=max(epochs - ramp, 2), lr_min=config.final * lr, warmup_prefix=True, **warmup
        )
    # timm applies milestone m in epoch m - 1.
    milestones = [milestone + 1 for milestone in config.milestones]
    return MultiStepLRScheduler(optimizer, milestones, config.gamma, warmup_prefix=False, **warmup)
