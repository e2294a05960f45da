"""Nets with branches of different tasks: BBN (two ends of the backbone, two draws), ResLT (three light branches).

Shapes: B images of V views, N = V * B, K classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.errors import InputError
from rescom_timm.losses import at_least_float32, weighted_mean
from rescom_timm.methods.base import BaseConfig, Method, stack_views, with_parts
from rescom_timm.methods.baselines import replace_classifier
from rescom_timm.methods.bounds import PART, check
from rescom_timm.models.branched import BranchedNet, Remade, agrees, branch_sources, last_block
from rescom_timm.models.classifiers import linear
from rescom_timm.models.net import Net, Outputs


@dataclass(frozen=True)
class BbnConfig(BaseConfig):
    """Bilateral-branch network (Zhou et al. 2020, arXiv 1912.02413, eqs. 1 to 5).

    Each step has B more images, one view each, for the second branch, drawn with more weight on rare classes
    (`reversed`).
    """

    name: Literal["bbn"] = "bbn"
    views: Literal[1] = 1
    branch: str | None = None
    """First child of the encoder, in the order in which it runs them, of which both branches have their own copy, as
    they have of all that follow; null: the last block, as the authors' (layer3.4 of a ResNet-32)."""
    fresh: bool = True
    """The second branch starts from weights of its own; false: from the first's, as a pretrained backbone wants."""


@dataclass(frozen=True)
class ResltConfig(BaseConfig):
    """Residual learning over groups of classes (ResLT, Cui et al. 2021, arXiv 2101.10633).

    Branches for all classes, for the medium and rare ones and for the rare ones, whose logits are added. Each is a
    BatchNorm over the last feature map, as in the authors' code for CIFAR, so that they reduce to one linear layer; the
    1x1 convolutions of their code for ImageNet-LT and iNaturalist are not implemented.
    """

    name: Literal["reslt"] = "reslt"
    views: Literal[1, 2] = 1
    beta: float = 0.998
    """Weight of the branches' own losses; 1 - beta is that of their sum's. The authors', for imbalance factors 100, 50,
    10: 0.998, 0.998, 0.96 on CIFAR-10 and 0.995, 0.99, 0.72 on CIFAR-100."""
    medium: float = 0.8
    """Part of the classes, from the rarest on, that the second branch learns. The authors': 0.8, 0.65 on CIFAR-100."""
    tail: float = 0.6
    """The same of the third branch. The authors': 0.6, 0.3 on CIFAR-100."""

    def __post_init__(self) -> None:
        check(self, beta=PART, medium=PART, tail=PART)
        if self.tail > self.medium:
            raise InputError("method.value", f"tail ({self.tail:g}) must be at most medium ({self.medium:g})")


# --------------------------------------------------------------------------------------------------------------- BBN


class BbnNet(BranchedNet):
    """A stem, two ends of the backbone and one classifier over both ends' features (2F)."""

    def __init__(self, net: Net, config: BbnConfig) -> None:
        """Raises InputError if the backbone cannot be split."""
        sources = branch_sources(net, 2, config.fresh)
        super().__init__(net, sources, config.branch or last_block(net.encoder))
        width, classes = net.classifier.in_features, net.classifier.out_features
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor, alpha: Tensor | None = None) -> Outputs:
        """Outputs of images (N, 3, H, W).

        In evaluation both branches see all images. With alpha (), as in training, the first half is for the first
        branch and the second half for the second, whose features are weighted (eq. 1; the rows are then N / 2).
        """
        if alpha is None:
            stem = self.stem(images)
            parts = [end(stem) for end in self.experts]
            features = torch.cat(parts, dim=1)  # 2 * [f_a / 2, f_b / 2]
        else:
            halves = zip(self.experts, images.chunk(2), strict=True)
            parts = [end(self.stem(half)) for end, half in halves]  # BatchNorm sees each draw by itself
            features = 2 * torch.cat([alpha * parts[0], (1 - alpha) * parts[1]], dim=1)
        embeddings = self.projector(parts[0])
        return Outputs(features, self.classifier(features), embeddings)

    def classify(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self(images).logits


class Bbn(Method):
    """Two branches over two draws, weighted by alpha and 1 - alpha."""

    net: BbnNet
    alpha: Tensor
    second_sampler = "reversed"

    def __init__(self, net: Net, counts: Tensor, config: BbnConfig) -> None:
        """counts: (K,) training images of each class. Raises InputError if the backbone cannot be split."""
        super().__init__(BbnNet(net, config), config)
        if config.fresh:
            self.net.check_trained()
        self.views = config.views
        self.register_buffer("alpha", torch.ones(()), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Set alpha = 1 - (t / T)^2 (eq. 5)."""
        self.alpha.fill_(1 - (epoch / max(epochs, 1)) ** 2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar, eq. 3) and logits (2B, K), those of each pair once for either label.

        batch: image (2B, 1, 3, H, W), label (2B,), the second half from the second draw.
        """
        logits = at_least_float32(self.net(stack_views(batch["image"]), self.alpha).logits)
        first, second = (F.cross_entropy(logits, labels) for labels in batch["label"].chunk(2))
        return {"loss": self.alpha * first + (1 - self.alpha) * second, "logits": logits.repeat(2, 1)}


# ------------------------------------------------------------------------------------------------------------- ResLT


class Residual(nn.Linear):
    """Three BatchNorms in front of one linear classifier, whose logits are added."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.norms = nn.ModuleList(nn.BatchNorm2d(in_features) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (N, F, H, W) to the logits of each branch (3, N, K), or features (N, F) to their sum (N, K).

        Features are for evaluation, in which BatchNorm is linear and may come before the mean over the map or after it.
        """
        maps = x if x.ndim == 4 else x[:, :, None, None]
        logits = super().forward(torch.stack([norm(maps).mean(dim=(2, 3)) for norm in self.norms]))
        return logits if x.ndim == 4 else logits.sum(dim=0)

    def as_linear(self) -> nn.Linear:
        """A linear layer of the same logits in evaluation."""
        norms: list[Any] = list(self.norms)
        scales = [norm.weight / (norm.running_var + norm.eps).sqrt() for norm in norms]
        shifts = [norm.bias - norm.running_mean * scale for norm, scale in zip(norms, scales, strict=True)]
        bias = F.linear(torch.stack(shifts).sum(dim=0), self.weight) + len(norms) * self.bias
        return linear(self.weight * torch.stack(scales).sum(dim=0), bias)


class ResltOutputs(NamedTuple):
    """Features (N, F), the sum of the branches' logits (N, K), and the logits of each branch (3, N, K)."""

    features: Tensor
    logits: Tensor
    embeddings: Tensor
    branches: Tensor


class ResltNet(Remade):
    """A Net whose classifier gets the feature map in training."""

    def __init__(self, net: Net) -> None:
        """Raises InputError for a backbone whose features are not the mean of its last feature map."""
        super().__init__(net)
        if not agrees(net.encoder, lambda images: self._maps(images).mean(dim=(2, 3))):
            raise InputError(
                "net.unsupported",
                "method reslt needs a feature map (N, F, H, W) whose mean is the features: use a ResNet, a RegNet or "
                "an EfficientNet",
            )
        replace_classifier(self, Residual(net.classifier.in_features, net.classifier.out_features))

    def _maps(self, images: Tensor) -> Tensor:
        return self.encoder.forward_features(images)  # type: ignore[operator]

    def forward(self, images: Tensor) -> ResltOutputs:  # type: ignore[override]
        """Outputs of images (N, 3, H, W)."""
        maps = self._maps(self.normalize(images))
        branches = self.classifier(maps)
        features = maps.mean(dim=(2, 3))
        embeddings = self.projector(features)
        return ResltOutputs(features, branches.sum(dim=0), embeddings, branches)


class Reslt(Method):
    """ResLT: cross-entropy of the sum of the branches, and of each branch over its classes."""

    taught: Tensor

    def __init__(self, net: Net, counts: Tensor, config: ResltConfig) -> None:
        """counts: (K,) training images of each class. Raises InputError for a backbone without a feature map."""
        super().__init__(ResltNet(net), config)
        self.views = config.views
        classes = len(counts)
        rank = counts.argsort(descending=True, stable=True).argsort()  # 0: the most frequent
        taught = [rank >= classes - round(part * classes) for part in (1.0, config.medium, config.tail)]
        self.register_buffer("taught", torch.stack(taught).float(), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (V * B, K) and the loss's parts. batch: image (B, V, 3, H, W), label (B,)."""
        outputs = self.net(stack_views(batch["image"]))
        labels, beta = batch["label"].repeat(self.views), self.config.beta
        fused = F.cross_entropy(at_least_float32(outputs.logits), labels)
        own = reslt_branches(outputs.branches, labels, self.taught)
        return with_parts((1 - beta) * fused + beta * own, outputs.logits, loss_fused=fused, loss_branches=own)


def reslt_branches(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
    """Mean cross-entropy over pairs of a branch and an image of one of its classes.

    logits: (3, N, K). labels: (N,). taught: (3, K), 1 for the classes of a branch. Returns a scalar.
    """
    raised = at_least_float32(logits)
    weights = taught[:, labels].to(raised.dtype)
    each = F.cross_entropy(raised.flatten(0, 1), labels.repeat(len(logits)), reduction="none").view_as(weights)
    return weighted_mean(each, weights)
