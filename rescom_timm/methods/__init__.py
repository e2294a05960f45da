"""Methods: ResCom, baselines and second stages, each a config and a module over a net. base.py has their interface.

A recipe chooses from METHODS by `method.name`. A new method is a file here, its row in METHODS and a preset in
recipes/methods/ (CONTRIBUTING.md, "Add a method").
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from rescom_timm.errors import InputError
from rescom_timm.methods import (
    baselines,
    bcl,
    branches,
    distillation,
    elf,
    experts,
    gistnet,
    momentum,
    proco,
    prototypes,
    rsg,
    second_stage,
)
from rescom_timm.methods.base import BaseConfig, Method
from rescom_timm.methods.baselines import (
    BalancedSoftmaxConfig,
    CausalNormConfig,
    ClassBalancedConfig,
    CrossEntropyConfig,
    FocalConfig,
    LadeConfig,
    LdamConfig,
    LogitAdjustmentConfig,
)
from rescom_timm.methods.bcl import BclConfig
from rescom_timm.methods.branches import BbnConfig, ResltConfig
from rescom_timm.methods.distillation import DiveConfig, SsdConfig
from rescom_timm.methods.elf import ElfConfig
from rescom_timm.methods.experts import ExpertsConfig
from rescom_timm.methods.gistnet import GistNetConfig
from rescom_timm.methods.momentum import MocoConfig, PacoConfig
from rescom_timm.methods.proco import ProcoConfig
from rescom_timm.methods.prototypes import DroLtConfig, HybridPscConfig
from rescom_timm.methods.rescom import ResCom, RescomConfig
from rescom_timm.methods.rsg import RsgConfig
from rescom_timm.methods.second_stage import (
    CrtConfig,
    DisAlignConfig,
    LasConfig,
    LosConfig,
    LwsConfig,
    ProbeConfig,
    TauNormConfig,
)
from rescom_timm.models.net import Net

METHODS: dict[str, tuple[type[BaseConfig], type[Method]]] = {
    "rescom": (RescomConfig, ResCom),
    "cross_entropy": (CrossEntropyConfig, baselines.CrossEntropy),
    "balanced_softmax": (BalancedSoftmaxConfig, baselines.BalancedSoftmax),
    "focal": (FocalConfig, baselines.Focal),
    "class_balanced": (ClassBalancedConfig, baselines.ClassBalanced),
    "ldam": (LdamConfig, baselines.Ldam),
    "logit_adjustment": (LogitAdjustmentConfig, baselines.LogitAdjustment),
    "lade": (LadeConfig, baselines.Lade),
    "causal_norm": (CausalNormConfig, baselines.CausalNormalized),
    "moco": (MocoConfig, momentum.Moco),
    "paco": (PacoConfig, momentum.Paco),
    "bcl": (BclConfig, bcl.Bcl),
    "proco": (ProcoConfig, proco.Proco),
    "hybrid_psc": (HybridPscConfig, prototypes.HybridPsc),
    "dro_lt": (DroLtConfig, prototypes.DroLt),
    "experts": (ExpertsConfig, experts.Experts),
    "bbn": (BbnConfig, branches.Bbn),
    "reslt": (ResltConfig, branches.Reslt),
    "gistnet": (GistNetConfig, gistnet.GistNet),
    "elf": (ElfConfig, elf.Elf),
    "dive": (DiveConfig, distillation.Dive),
    "ssd": (SsdConfig, distillation.Ssd),
    "rsg": (RsgConfig, rsg.Rsg),
    "crt": (CrtConfig, second_stage.Crt),
    "lws": (LwsConfig, second_stage.Lws),
    "tau_norm": (TauNormConfig, second_stage.TauNorm),
    "las": (LasConfig, second_stage.Las),
    "los": (LosConfig, second_stage.Los),
    "disalign": (DisAlignConfig, second_stage.DisAlign),
    "probe": (ProbeConfig, second_stage.Probe),
}

if TYPE_CHECKING:
    MethodConfig: TypeAlias = BaseConfig
else:
    MethodConfig = reduce(or_, [config for config, _ in METHODS.values()])  # pydantic chooses by `name`


def create_method(net: Net, counts: Tensor, config: MethodConfig) -> Method:
    """Wrap a net in its method. counts: (K,) training images of each class. Raises InputError if they do not fit."""
    make: Callable[[Net, Tensor, MethodConfig], Method] = method_class(config)
    return make(net, counts, config)


def method_class(config: MethodConfig) -> type[Method]:
    """The method of a config."""
    return METHODS[config.name][1]


def _names(able: Callable[[type[Method]], bool]) -> str:
    """The methods that are able to do something, for a message."""
    return ", ".join(name for name, (_, method) in METHODS.items() if able(method))


def check(config: MethodConfig, *, mix: bool, fit_batch: bool, compiled: bool, contrast: bool = False) -> None:
    """Raises InputError if the recipe has an option that its method does not support.

    mix: images are mixed. fit_batch: train.fit_batch. compiled: speed.capture or speed.compile. contrast:
    views.contrast.
    """
    method = method_class(config)
    if contrast and not method.contrasts:
        raise InputError(
            "recipe.conflict",
            f"views.contrast makes views that are not classified, and {config.name} classifies all: set it to null, or "
            f"use one of {_names(lambda other: other.contrasts)}",
        )
    if mix and not method.per_image:
        raise InputError(
            "recipe.conflict",
            f"mix: mixup and cutmix need a per-image loss, and {config.name} compares images: set them to 0, or use "
            f"one of {_names(lambda other: other.per_image)}",
        )
    if fit_batch and not method.per_image:
        raise InputError(
            "recipe.conflict",
            f"train.fit_batch: method {config.name} compares the images of a pass, so smaller passes change the "
            "loss: set train.accumulate instead",
        )
    if compiled and not method.static_shapes:
        raise InputError("recipe.conflict", f"turn speed.capture and speed.compile off: {config.name} supports neither")
