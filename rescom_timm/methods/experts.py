"""RIDE-style experts: a net of several heads over a shared stem (Wang et al. 2021, arXiv 2010.01809).

Shapes: B images, E experts, K classes, F features. All experts are asked for every image: the router of the paper's
second stage is left out, and experts keep the backbone's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rescom_timm.losses import check_temperature, distillation, diversity, ldam, ldam_margins
from rescom_timm.methods.base import BaseConfig, Method, stack_views
from rescom_timm.methods.baselines import Cosine, balanced_weights
from rescom_timm.methods.bounds import A_FEW, BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, check
from rescom_timm.methods.parts import ask
from rescom_timm.models.branched import BranchedNet, branch_sources
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class ExpertsConfig(BaseConfig):
    """LDAM of each expert less how far it is from their mean (the diversity loss of RIDE)."""

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
        if self.experts < 2:
            raise ValueError("experts must be at least 2")
        check(self, experts=A_FEW)
        check_temperature(self.temperature)
        check(self, diversity=NOT_NEGATIVE, margin=NOT_NEGATIVE, scale=POSITIVE)
        check(self, distill_weight=NOT_NEGATIVE, distill_temperature=POSITIVE)
        check(self, temperature_by_count=BELOW_ONE, reweight_from=PART, beta=BELOW_ONE)

    @property
    def long_tailed(self) -> bool:
        return self.reweight_from == 1 or self.beta == 0  # never weighted


class Heads(nn.ModuleList):
    """E classifiers side by side: features (E, N, F) to logits (E, N, K)."""

    @property
    def in_features(self) -> int:
        return self[0].in_features  # type: ignore[union-attr, return-value]

    @property
    def out_features(self) -> int:
        return self[0].out_features  # type: ignore[union-attr, return-value]

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(own) for head, own in zip(self, features, strict=True)])


class ExpertOutputs(NamedTuple):
    """Means over the experts, features (N, F) and logits (N, K), and experts (E, N, K), each one's own logits."""

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
        stem = self.stem(images)
        features = torch.stack([expert(stem) for expert in self.experts])
        logits = self.classifier(features)
        mean = features.mean(dim=0)
        embeddings = self.projector(mean)
        return ExpertOutputs(mean, logits.mean(dim=0), embeddings, logits)

    def classify(self, images: Tensor) -> Tensor:
        return self(images).logits


class Experts(Method):
    net: ExpertsNet
    epoch_changes_host = True
    counts: Tensor
    margins: Tensor
    weights: Tensor
    temperature: Tensor

    def __init__(self, net: Net, counts: Tensor, config: ExpertsConfig) -> None:
        """counts: (K,) training images of each class. Raises ValueError where the backbone cannot be cut."""
        sources = branch_sources(net, config.experts, config.fresh)
        super().__init__(ExpertsNet(net, sources, config.branch, config.scale), config)
        if config.fresh:
            self.net.check_trained()
        self.views = config.views
        self.reweighted = False
        share = config.temperature_by_count
        temperature = share * len(counts) * counts / counts.sum() + 1 - share
        self.register_buffer("margins", ldam_margins(counts, config.margin), persistent=False)
        self.register_buffer("weights", balanced_weights(counts, config.beta), persistent=False)
        self.register_buffer("temperature", config.temperature * temperature / temperature.max(), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch: re-weighting starts after its fraction of the run."""
        self.reweighted = epoch >= self.config.reweight_from * epochs

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: image (B, V, 3, H, W), label (B,). Returns loss (scalar), logits (V * B, K) and the loss's parts.

        A teacher's logits are distilled into the experts' mean; its authors' sum of both is E times as large."""
        images = stack_views(batch["image"])
        outputs = self.net(images)
        labels, config = batch["label"].repeat(self.views), self.config
        weights = self.weights if self.reweighted else None
        classification = torch.stack(
            [ldam(own / config.scale, labels, self.margins, config.scale, weights) for own in outputs.experts]
        ).sum()
        even = torch.full_like(self.temperature, config.temperature)
        distance = diversity(outputs.experts, self.temperature if self.reweighted else even)
        loss, parts = classification - config.diversity * distance, {}
        if config.teacher is not None:
            distilled = distillation(outputs.logits, ask(self.teacher, images), config.distill_temperature)
            loss, parts = loss + config.distill_weight * distilled, {"loss_distillation": distilled.detach()}
        return {
            "loss": loss,
            "logits": outputs.logits,
            "loss_classification": classification.detach(),
            "diversity": distance.detach(),
            **parts,
        }
