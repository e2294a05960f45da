"""RIDE-style experts: a net of several heads over a shared stem (Wang et al. 2021, arXiv 2010.01809).

Shapes: B images, E experts, K classes, F features. Every image goes through all experts: the router of the paper's
second stage is not implemented, and experts keep the backbone's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rescom_timm.losses import check_temperature, distillation, diversity, ldam
from rescom_timm.methods.base import stack_views, with_parts
from rescom_timm.methods.bounds import BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, SEVERAL, check
from rescom_timm.methods.deferred import Deferred, DeferredConfig
from rescom_timm.methods.parts import ask
from rescom_timm.models.branched import BranchedNet, branch_sources
from rescom_timm.models.classifiers import Cosine
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class ExpertsConfig(DeferredConfig):
    """LDAM of each expert minus their distance from the mean expert (the diversity loss of RIDE)."""

    name: Literal["experts"] = "experts"
    views: Literal[1, 2] = 1
    experts: int = 3
    branch: str = "layer3"
    """First child of the encoder, in the order in which it runs them, of which each expert has its own copy, as it has
    of all that follow: layer3 or layer2 of a ResNet, stages.3 of a ConvNeXt."""
    fresh: bool = True
    """The experts after the first start from weights of their own; false: from the first's, as a pretrained backbone
    wants."""
    diversity: float = 0.2
    temperature: float = 1.0
    """Of the distributions whose divergence is taken."""
    temperature_by_count: float = 0.05
    """How much higher it is for frequent classes, after re-weighting starts."""
    margin: float = 0.5
    scale: float = 30.0
    reweight_from: float = 0.8
    """Fraction of the epochs after which classes are weighted; 1: never."""
    beta: float = 0.9999
    teacher: str | None = None
    """Run, export or Hub id of a net to learn from besides, such as one of more experts (RIDE's distillation, which its
    authors do from 6 experts)."""
    distill_weight: float = 1.0
    distill_temperature: float = 1.5

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check(self, experts=SEVERAL, diversity=NOT_NEGATIVE, margin=NOT_NEGATIVE, scale=POSITIVE, reweight_from=PART)
        check(self, distill_weight=NOT_NEGATIVE, distill_temperature=POSITIVE)
        check(self, temperature_by_count=BELOW_ONE, beta=BELOW_ONE)


class Heads(nn.ModuleList):
    """E parallel classifiers: features (E, N, F) to logits (E, N, K)."""

    @property
    def in_features(self) -> int:
        """F."""
        return self[0].in_features  # type: ignore[union-attr, return-value]

    @property
    def out_features(self) -> int:
        """K."""
        return self[0].out_features  # type: ignore[union-attr, return-value]

    def forward(self, features: Tensor) -> Tensor:
        """Features (E, N, F) to logits (E, N, K)."""
        return torch.stack([head(own) for head, own in zip(self, features, strict=True)])


class ExpertOutputs(NamedTuple):
    """Means over the experts, features (N, F) and logits (N, K), and the logits of each expert (E, N, K)."""

    features: Tensor
    logits: Tensor
    embeddings: Tensor
    experts: Tensor


class ExpertsNet(BranchedNet):
    """A stem (`encoder`), E copies of the rest of the backbone and E classifiers; its logits are their mean."""

    kind = "experts"

    def __init__(self, net: Net, sources: Sequence[nn.Module], branch: str, scale: float) -> None:
        """As a BranchedNet."""
        super().__init__(net, sources, branch)
        width, classes = net.classifier.in_features, net.classifier.out_features
        self.classifier = Heads(Cosine(width, classes, scale) for _ in sources)  # type: ignore[assignment]

    def forward(self, images: Tensor) -> ExpertOutputs:  # type: ignore[override]
        """Outputs of images (N, 3, H, W)."""
        stem = self.stem(images)
        features = torch.stack([expert(stem) for expert in self.experts])
        logits = self.classifier(features)
        mean = features.mean(dim=0)
        embeddings = self.projector(mean)
        return ExpertOutputs(mean, logits.mean(dim=0), embeddings, logits)

    def classify(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self(images).logits


class Experts(Deferred):
    """LDAM of every expert, their diversity, and distillation from a teacher if there is one."""

    net: ExpertsNet
    temperature: Tensor

    def __init__(self, net: Net, counts: Tensor, config: ExpertsConfig) -> None:
        """counts: (K,) training images of each class. Raises InputError if the backbone cannot be split."""
        sources = branch_sources(net, config.experts, config.fresh)
        super().__init__(ExpertsNet(net, sources, config.branch, config.scale), config)
        if config.fresh:
            self.net.check_trained()
        self.views = config.views
        self.add_margins(counts)
        share = config.temperature_by_count
        temperature = share * len(counts) * counts / counts.sum() + 1 - share
        self.register_buffer("temperature", config.temperature * temperature / temperature.max(), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (V * B, K) and the loss's parts. batch: image (B, V, 3, H, W), label (B,).

        A teacher's logits are distilled into the experts' mean; the authors' sum of both is E times as large.
        """
        images = stack_views(batch["image"])
        outputs = self.net(images)
        labels, config = batch["label"].repeat(self.views), self.config
        of_experts = (own / config.scale for own in outputs.experts)
        losses = [ldam(own, labels, self.margins, config.scale, self.current_weights) for own in of_experts]
        classification = torch.stack(losses).sum()
        even = torch.full_like(self.temperature, config.temperature)
        distance = diversity(outputs.experts, self.temperature if self.reweighted else even)
        loss, parts = classification - config.diversity * distance, {}
        if config.teacher is not None:
            distilled = distillation(outputs.logits, ask(self.teacher, images), config.distill_temperature)
            loss, parts = loss + config.distill_weight * distilled, {"loss_distillation": distilled}
        return with_parts(loss, outputs.logits, loss_classification=classification, diversity=distance, **parts)
