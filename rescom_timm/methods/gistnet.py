"""GistNet: each class is a constellation of points whose shape frequent classes teach all others.

Liu et al. 2021, arXiv 2105.00131. Shapes: B images, N of a forward pass, K classes, F features, J structures. Built
from the abstract and the authors' code for ImageNet-LT; the docstrings name what differs. The class-balanced draw does:
here each image's class is drawn independently, in theirs classes take turns in a shuffled order, four images each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.losses import at_least_float32
from rescom_timm.methods.base import BaseConfig
from rescom_timm.methods.baselines import Classification, replace_classifier
from rescom_timm.methods.bounds import A_FEW, NOT_NEGATIVE, PART, POSITIVE, check
from rescom_timm.models.classifiers import full_precision
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class GistNetConfig(BaseConfig):
    """Cross-entropy of an instance-balanced and of a class-balanced batch (`class_balanced`, one view each).

    The two batches have two sets of class centres that share their structures. The structures learn from the first
    batch alone.
    """

    name: Literal["gistnet"] = "gistnet"
    views: Literal[1] = 1
    structures: int = 4
    """J, displacements from a class's centre to its other points; the authors' for ImageNet-LT."""
    weight: float = 0.5
    """lambda, of the class-balanced batch's loss."""
    structures_from: float = 0.5
    """Fraction of the epochs after which the structures take part. The authors train as many epochs without them as
    with them, the second time from the full learning rate again; here both are one run under one schedule."""
    scale: float = 16.0
    """At which the two learned scales of the cosines start: ours. The authors draw them from a normal distribution."""

    def __post_init__(self) -> None:
        check(self, structures=A_FEW, weight=NOT_NEGATIVE, structures_from=PART, scale=POSITIVE)


class Constellation(nn.Linear):
    """Logits scale * max over j of cos(x, w_k + u_j), u_0 = 0.

    `weight` are the centres w of the class-balanced draw, which evaluation uses, `even` those of the instance-balanced
    draw, `structures` (J, F) the other u.

    Structures start at a tenth of the centres' size. The authors' code starts them at zero, where all points of a class
    are equally near, and its maximum gives the structures no gradient: they stay at zero.
    """

    taken: Tensor

    def __init__(self, in_features: int, out_features: int, config: GistNetConfig) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.even = nn.Parameter(torch.empty_like(self.weight))
        self.structures = nn.Parameter(torch.empty(config.structures, in_features))
        self.scales = nn.Parameter(torch.full((2,), config.scale))
        self.register_buffer("taken", torch.ones(()))

    @torch.no_grad()
    def start(self) -> None:
        """Copy both sets of centres from `weight` and draw new structures."""
        self.even.copy_(self.weight)
        self.structures.normal_(std=0.1 * float(self.weight.std()))

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K); in training the first half of the rows is of the instance-balanced draw."""
        with full_precision(x):
            x = F.normalize(at_least_float32(x), dim=1)
            if not self.training:
                return self.scales[0] * self._nearest(x, self.weight, self.structures)
            even, balanced = x.chunk(2)
            return torch.cat([
                self.scales[1] * self._nearest(even, self.even, self.structures),
                self.scales[0] * self._nearest(balanced, self.weight, self.structures.detach()),
            ])  # fmt: skip

    def _nearest(self, x: Tensor, centres: Tensor, structures: Tensor) -> Tensor:
        points = torch.cat([centres[:, None], centres[:, None] + self.taken * structures], dim=1)  # (K, 1 + J, F)
        cosines = F.linear(x, F.normalize(points, dim=2).flatten(0, 1))
        return cosines.unflatten(1, points.shape[:2]).amax(dim=2)


class GistNet(Classification):
    """Cross-entropy of both draws over a Constellation."""

    second_sampler = "class_balanced"

    def __init__(self, net: Net, counts: Tensor, config: GistNetConfig) -> None:
        """counts: (K,) training images of each class."""
        super().__init__(net, counts, config)
        head = Constellation(net.classifier.in_features, len(counts), config)
        replace_classifier(net, head)
        head.start()
        self.head = (head,)  # a tuple: it is the net's module

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Switch the structures on after `structures_from` of the epochs."""
        self.head[0].taken.fill_(float(epoch >= self.config.structures_from * epochs))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted sum of both draws' losses. logits: (2B, K). labels: (2B,), class-balanced in the second half."""
        raised = at_least_float32(logits)
        even, balanced = map(F.cross_entropy, raised.chunk(2), labels.chunk(2))
        return even + self.config.weight * balanced
