"""LDAM margins with deferred re-weighting (Cao et al. 2019), shared by several methods. Shapes: K classes."""

from __future__ import annotations

from torch import Tensor

from rescom_timm.losses import class_weights, ldam_margins
from rescom_timm.methods.base import BaseConfig, Method


class DeferredConfig(BaseConfig):
    """Settings of margins and weights."""

    margin: float
    """Margin of the rarest class."""
    reweight_from: float
    """Fraction of the epochs after which classes are weighted; 1: never."""
    beta: float
    """Of the effective number of images in those weights."""

    @property
    def long_tailed(self) -> bool:
        """True if classes are never weighted."""
        return self.reweight_from == 1 or self.beta == 0


def balanced_weights(counts: Tensor, beta: float) -> Tensor:
    """Weights 1 / E_k scaled to sum to K, (K,) (Cui et al. 2019, section 4). counts: (K,) training images."""
    weights = class_weights(counts, beta, "printed")
    return len(counts) * weights / weights.sum()


class Deferred(Method):
    """Base class: margins (K,), and weights (K,) that apply from `reweight_from` of the epochs on."""

    epoch_changes_host = True
    margins: Tensor
    weights: Tensor
    reweighted = False

    def add_margins(self, counts: Tensor) -> None:
        """Register margins and weights. counts: (K,) training images of each class."""
        self.register_buffer("margins", ldam_margins(counts, self.config.margin), persistent=False)
        self.register_buffer("weights", balanced_weights(counts, self.config.beta), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Start re-weighting after its fraction of the epochs."""
        self.reweighted = epoch >= self.config.reweight_from * epochs

    @property
    def current_weights(self) -> Tensor | None:
        """Class weights (K,) of this epoch, those of the recipe included; None where all are 1."""
        if self.class_weights is None:
            return self.weights if self.reweighted else None
        return self.class_weights * self.weights if self.reweighted else self.class_weights
