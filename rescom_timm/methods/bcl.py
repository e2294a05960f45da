"""Balanced contrastive learning (BCL, Zhu et al. 2022, arXiv 2207.09052).

Shapes: B images of three views, K classes, D the width of an embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rescom_timm.losses import balanced_contrast, balanced_softmax, check_temperature
from rescom_timm.methods.base import BaseConfig, Method, stack_views, with_parts
from rescom_timm.methods.bounds import NOT_NEGATIVE, check
from rescom_timm.methods.parts import Prototypes
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class BclConfig(BaseConfig):
    """Balanced contrastive learning (BCL, Zhu et al. 2022, arXiv 2207.09052)."""

    name: Literal["bcl"] = "bcl"
    contrast_weight: float = 0.35
    """lambda: total loss = Balanced Softmax of the first view + lambda * balanced contrastive loss of the others."""
    temperature: float = 0.07
    """tau."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check(self, contrast_weight=NOT_NEGATIVE)


class Bcl(Method):
    """Classify view 1; compare views 2 and 3 with each other and with a prototype of each class.

    Prototypes are made of the classifier's weights. Pairs are those of the local batch, as in the authors' training:
    there is no queue.
    """

    config: BclConfig
    counts: Tensor
    views = 3
    embeds = True
    contrasts = True

    def __init__(self, net: Net, counts: Tensor, config: BclConfig) -> None:
        """counts: (K,) training images of each class."""
        prototypes = Prototypes(net)
        super().__init__(net, config)
        self.prototypes = prototypes
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return loss (scalar), logits (B, K) of the first views and the loss's two parts, detached.

        batch: image (B, 3, 3, H, W), label (B,).
        """
        y = batch["label"]
        _, logits, embeddings = self.net(stack_views(batch["image"]))
        logits, embeddings = logits[: len(y)], embeddings[len(y) :]
        classification = balanced_softmax(logits, y, self.counts)
        prototypes = self.prototypes()
        contrast = balanced_contrast(embeddings, y.repeat(2), prototypes, self.config.temperature)
        loss = classification + self.config.contrast_weight * contrast
        # Each class of the denominator counts as one, and all of them are there.
        chance = torch.full_like(classification, math.log(len(prototypes)))
        return with_parts(
            loss, logits, loss_classification=classification, loss_contrast=contrast, loss_contrast_chance=chance
        )
