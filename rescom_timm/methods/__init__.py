"""Methods: a net with its losses. One explicit table; a recipe chooses by `method.name`.

A method is a module with `net` (all that is trained), `views` (how many it wants of each image) and forward(batch) ->
{"loss": scalar, "logits": (n * B, K), other scalars}. It may define `set_epoch(epoch, epochs)`, called before each
epoch, and `after_step()`, called after each optimizer step. Other state is part of the method outside of `net`. Where
its loss is a sum over images, each of its own logits and label, it says `per_image = True`: its batches may be mixed
(batch["partner"], batch["share"]) or cut into parts. With `second_sampler` (a loader.sampler) its batches have 2 B
rows: below the B rows of the recipe's draw, B of that one's. One that uses embeddings says `embeds = True`; others drop
the net's projector. One that learns from a teacher has it as `teacher`, which
is set before training.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rescom_timm.methods import (
    baselines,
    branches,
    distillation,
    elf,
    experts,
    gistnet,
    momentum,
    prototypes,
    rsg,
    second_stage,
)
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
from rescom_timm.methods.branches import BbnConfig, ResltConfig
from rescom_timm.methods.distillation import DiveConfig, SsdConfig
from rescom_timm.methods.elf import ElfConfig
from rescom_timm.methods.experts import ExpertsConfig
from rescom_timm.methods.gistnet import GistNetConfig
from rescom_timm.methods.momentum import MocoConfig, PacoConfig
from rescom_timm.methods.prototypes import DroLtConfig, HybridPscConfig
from rescom_timm.methods.rescom import ResCom, RescomConfig
from rescom_timm.methods.rsg import RsgConfig
from rescom_timm.methods.second_stage import CrtConfig, DisAlignConfig, LasConfig, LwsConfig, TauNormConfig
from rescom_timm.models.net import Net

MethodConfig = (
    RescomConfig
    | CrossEntropyConfig
    | BalancedSoftmaxConfig
    | FocalConfig
    | ClassBalancedConfig
    | LdamConfig
    | LogitAdjustmentConfig
    | LadeConfig
    | CausalNormConfig
    | MocoConfig
    | PacoConfig
    | HybridPscConfig
    | DroLtConfig
    | ExpertsConfig
    | BbnConfig
    | ResltConfig
    | GistNetConfig
    | ElfConfig
    | DiveConfig
    | SsdConfig
    | RsgConfig
    | CrtConfig
    | LwsConfig
    | TauNormConfig
    | LasConfig
    | DisAlignConfig
)
Method = (
    ResCom
    | baselines.Classification
    | momentum.Moco
    | momentum.Paco
    | prototypes.HybridPsc
    | prototypes.DroLt
    | experts.Experts
    | branches.Bbn
    | branches.Reslt
    | elf.Elf
    | distillation.Dive
    | distillation.Ssd
    | rsg.Rsg
)

METHODS: dict[str, tuple[type, Any]] = {
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
    "disalign": (DisAlignConfig, second_stage.DisAlign),
}

SECOND_STAGE = ("crt", "lws", "tau_norm", "las", "disalign")
"""Methods that need a trained net to start from."""


DISTILLED = ("dive", "ssd")
"""Methods that need a teacher."""


def create_method(net: Net, counts: Tensor, config: MethodConfig) -> Method:
    """counts: (K,) training images of each class. Raises ValueError where the config does not fit them."""
    return METHODS[config.name][1](net, counts, config)


def long_tailed(config: MethodConfig) -> bool:
    """Whether the classification loss leaves the frequencies of the classes drawn in the logits, as plain cross-entropy
    does. Losses that know the frequencies, and what learns from a net that does, give logits of even classes."""
    match config:
        case CrossEntropyConfig() | FocalConfig() | DroLtConfig() | CrtConfig() | LwsConfig() | LasConfig():
            return True
        case MocoConfig(classification="cross_entropy") | RsgConfig(loss="cross_entropy"):
            return True
        case LdamConfig() | ExpertsConfig() | ElfConfig() | RsgConfig():
            return config.reweight_from == 1 or config.beta == 0  # never weighted
        case (
            ClassBalancedConfig(beta=0) | LogitAdjustmentConfig(tau=0) | TauNormConfig(tau=0) | DisAlignConfig(power=0)
        ):
            return True
    return False


def embeds(name: str) -> bool:
    """Whether a method uses the embeddings of a projector."""
    return getattr(METHODS[name][1], "embeds", False)


def per_image(name: str) -> bool:
    """Whether a method's loss is a sum over images, each of its own logits and label."""
    return getattr(METHODS[name][1], "per_image", False)


def call_if_defined(method: nn.Module, name: str, *arguments: Any) -> None:
    """Call a method's optional `set_epoch` or `after_step`."""
    if hasattr(method, name):
        getattr(method, name)(*arguments)
