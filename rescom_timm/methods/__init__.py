"""Methods: a net with its losses. One explicit table; a recipe chooses by `method.name`."""

from __future__ import annotations

from torch import Tensor

from rescom_timm.methods.baselines import BalancedSoftmaxConfig, Classification, CrossEntropyConfig
from rescom_timm.methods.rescom import ResCom, RescomConfig
from rescom_timm.nets.net import Net

MethodConfig = RescomConfig | CrossEntropyConfig | BalancedSoftmaxConfig
Method = ResCom | Classification

METHODS: dict[str, tuple[type, type]] = {
    "rescom": (RescomConfig, ResCom),
    "cross_entropy": (CrossEntropyConfig, Classification),
    "balanced_softmax": (BalancedSoftmaxConfig, Classification),
}


def create_method(net: Net, counts: Tensor, config: MethodConfig) -> Method:
    """counts: (K,) training images of each class. Raises ValueError where the config does not fit them."""
    return METHODS[config.name][1](net, counts, config)
