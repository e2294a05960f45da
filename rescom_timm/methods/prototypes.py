"""Methods with one vector of each class: Hybrid-PSC and DRO-LT.

Shapes: B images of V views, N = V * B, K classes, F features, D the width of an embedding. Trained vectors are
parameters of the net, so that the optimizer and DistributedDataParallel see them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.distributed import gather
from rescom_timm.losses import at_least_float32, check_temperature, focal, prototype_contrast, robust_centroids
from rescom_timm.methods.base import BaseConfig, Method, stack_views, with_parts
from rescom_timm.methods.bounds import BELOW_ONE, NOT_NEGATIVE, PART, check
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class HybridPscConfig(BaseConfig):
    """Hybrid-PSC (Wang et al. 2021, arXiv 2103.14267)."""

    name: Literal["hybrid_psc"] = "hybrid_psc"
    views: Literal[1, 2] = 1
    temperature: float = 0.1
    """tau of the prototypes; the paper: 1 for CIFAR-10, 0.1 for the others."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


@dataclass(frozen=True)
class DroLtConfig(BaseConfig):
    """DRO-LT (Samuel & Chechik 2021, arXiv 2104.03066)."""

    name: Literal["dro_lt"] = "dro_lt"
    views: Literal[1, 2] = 1
    weight: float = 0.5
    """lambda: total loss = lambda * cross-entropy + (1 - lambda) * robust loss."""
    temperature: float = 1.0
    """tau of the distances: 1 in the paper's equations and the authors' published command. The default of their code
    is 0.07, with which features collapsed in our runs on digits."""
    radius: Literal["shared", "by_count", "learned"] = "by_count"
    """eps_c of the ball of uncertainty: epsilon; epsilon / sqrt(N_c); or a trained number that starts at epsilon and
    stays at least 0 (below it, the loss would fall without any feature moving)."""
    epsilon: float = 1.0
    momentum: float = 0.99
    """Weight of the old centroid when one image of its class is seen."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check(self, epsilon=NOT_NEGATIVE, weight=PART, momentum=BELOW_ONE)

    long_tailed: ClassVar[bool] = True


class HybridPsc(Method):
    """Prototypes first, the classifier later: alpha * PSC + (1 - alpha) * CE with alpha = 1 - (t / T)^2.

    The paper gives the classifier class-balanced batches of its own; here its cross-entropy is weighted by N / (K N_y),
    the same in expectation, so that one loader serves both branches.
    """

    weights: Tensor
    embeds = True
    epoch_changes_host = True

    def __init__(self, net: Net, counts: Tensor, config: HybridPscConfig) -> None:
        """counts: (K,) training images of each class."""
        net.prototypes = nn.ParameterList([F.normalize(torch.randn(len(counts), net.embedding_width), dim=1)])
        super().__init__(net, config)
        self.prototypes = (net.prototypes[0],)  # a tuple: they are the net's
        self.views = config.views
        self.alpha = 1.0
        weights = counts.double().reciprocal() * counts.sum() / len(counts)
        self.register_buffer("weights", weights.float(), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Set alpha."""
        self.alpha = 1 - (epoch / max(epochs, 1)) ** 2

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (V * B, K) and the loss's parts. batch: image (B, V, 3, H, W), label (B,)."""
        _, logits, embeddings = self.net(stack_views(batch["image"]))
        labels = batch["label"].repeat(self.views)
        prototypes = F.normalize(self.prototypes[0], dim=1)
        contrast = prototype_contrast(embeddings, labels, prototypes, self.config.temperature)
        classification = focal(logits, labels, 0.0, self.weights)  # gamma 0: weighted cross-entropy, the mean over N
        loss = self.alpha * contrast + (1 - self.alpha) * classification
        chance = torch.full_like(contrast, math.log(len(prototypes) - 1))
        return with_parts(
            loss, logits, loss_classification=classification, loss_contrast=contrast, loss_contrast_chance=chance
        )


class DroLt(Method):
    """Features move to their class's centroid, measured from the worst point of a ball around it.

    The authors compute the centroids on the whole training set before each epoch; here they are moving averages of the
    features seen, equal on every process, which need no second pass over the data.
    """

    counts: Tensor
    centroids: Tensor
    known: Tensor

    def __init__(self, net: Net, counts: Tensor, config: DroLtConfig) -> None:
        """counts: (K,) training images of each class."""
        net.drop_projector()
        super().__init__(net, config)
        epsilon = torch.full((len(counts),), config.epsilon)
        if config.radius == "by_count":
            epsilon = epsilon / counts.sqrt()
        net.epsilon = nn.ParameterList([nn.Parameter(epsilon, requires_grad=config.radius == "learned")])
        self.epsilon = (net.epsilon[0],)  # a tuple: it is the net's
        self.views = config.views
        self.register_buffer("centroids", torch.zeros(len(counts), net.classifier.in_features))
        self.register_buffer("known", torch.zeros(len(counts), dtype=torch.bool))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (V * B, K) and the loss's parts. batch: image (B, V, 3, H, W), label (B,)."""
        features, logits, _ = self.net(stack_views(batch["image"]))
        labels, config = batch["label"].repeat(self.views), self.config
        classification = F.cross_entropy(at_least_float32(logits), labels)
        radius = self.epsilon[0].clamp(min=0)
        robust = robust_centroids(
            features, labels, self.centroids.clone(), self.known.clone(), radius, config.temperature
        )
        self.move_centroids(gather(features.detach()), gather(labels))
        loss = config.weight * classification + (1 - config.weight) * robust
        return with_parts(loss, logits, loss_classification=classification, loss_contrast=robust)

    @torch.no_grad()
    def move_centroids(self, features: Tensor, labels: Tensor) -> None:
        """Update the centroids from features (N, F) with labels (N,).

        A class with n images keeps momentum^n of its centroid, so that splitting a batch into passes makes no
        difference; its first images set the centroid.
        """
        own = F.one_hot(labels, len(self.centroids)).to(self.centroids.dtype)
        number = own.sum(dim=0)
        mean = own.T @ features.to(own.dtype) / number.clamp(min=1)[:, None]
        keep = torch.where(self.known, self.config.momentum**number, (number == 0).to(own.dtype))[:, None]
        self.centroids.copy_(keep * self.centroids + (1 - keep) * mean)
        self.known |= number > 0
