"""Probabilistic contrastive learning (ProCo, Du et al. 2024, arXiv 2403.06726).

Shapes: B images of three views, K classes, D the width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rescom_timm.distributed import gather
from rescom_timm.errors import InputError
from rescom_timm.losses import at_least_float32, balanced_softmax, check_temperature, expected_contrast
from rescom_timm.methods.base import BaseConfig, Method, stack_views, with_parts
from rescom_timm.methods.bounds import NOT_NEGATIVE, check
from rescom_timm.models.net import Net

START = 0.9
"""Length of a class's mean of which nothing was seen yet, in a random direction."""


@dataclass(frozen=True)
class ProcoConfig(BaseConfig):
    """Probabilistic contrastive learning (ProCo, Du et al. 2024, arXiv 2403.06726)."""

    name: Literal["proco"] = "proco"
    contrast_weight: float = 1.0
    """alpha: total loss = Balanced Softmax of the first view + alpha * contrastive loss of the others."""
    temperature: float = 0.1
    """tau."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check(self, contrast_weight=NOT_NEGATIVE)


class Proco(Method):
    """Classify view 1; compare views 2 and 3 with a von Mises-Fisher distribution of each class.

    That is as many pairs as there could be: there is no queue and no mining.

    A class's distribution follows from the running mean of its embeddings. There are two: one that has all images since
    the start of the epoch before and gives the logits, and one that starts anew with each epoch and takes its place in
    the next. Embeddings of all processes enter both before the logits of their view are taken. The state is `means`,
    `numbers`, `seed` and the epoch in which they were last exchanged, so a resumed run goes on with the same bits.
    """

    config: ProcoConfig
    counts: Tensor
    means: Tensor
    numbers: Tensor
    seed: Tensor
    begun: Tensor
    views = 3
    embeds = True
    contrasts = True

    def __init__(self, net: Net, counts: Tensor, config: ProcoConfig) -> None:
        """counts: (K,) training images of each class. Raises InputError (recipe.value) for a width below 2."""
        super().__init__(net, config)
        if net.embedding_width < 2:
            raise InputError("recipe.value", "net.projector.dim must be at least 2 with method proco")
        self.shape = (len(counts), net.embedding_width)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("begun", torch.tensor(-1))
        self.register_buffer("numbers", torch.zeros(2, len(counts)))
        self.register_buffer("means", self.start(-1).expand(2, -1, -1).clone())

    def start(self, epoch: int) -> Tensor:
        """Means (K, D) of classes of which nothing was seen, the same in every process."""
        generator = torch.Generator().manual_seed(2**32 * (epoch + 1) + int(self.seed))
        return START * F.normalize(torch.randn(self.shape, generator=generator), dim=1)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Exchange the distributions, once an epoch.

        Called before each epoch, and where a run resumes within one, whose distributions are exchanged already.
        """
        if int(self.begun) == epoch:
            return
        self.means[0], self.numbers[0] = self.means[1].clone(), self.numbers[1].clone()
        self.means[1], self.numbers[1] = self.start(epoch).to(self.means), 0
        self.begun.fill_(epoch)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return loss (scalar), logits (B, K) of the first views and the loss's two parts, detached.

        batch: image (B, 3, 3, H, W), label (B,).
        """
        y = batch["label"]
        _, logits, embeddings = self.net(stack_views(batch["image"]))
        logits = logits[: len(y)]
        classification = balanced_softmax(logits, y, self.counts)
        losses = []
        for z in embeddings[len(y) :].chunk(2):
            self.see(gather(z.detach()), gather(y))
            expected = expected_contrast(z, self.means[0], self.config.temperature)
            losses.append(balanced_softmax(expected, y, self.counts))
        contrast = (losses[0] + losses[1]) / 2
        loss = classification + self.config.contrast_weight * contrast
        chance = balanced_softmax(torch.zeros_like(expected), y, self.counts)
        return with_parts(
            loss, logits, loss_classification=classification, loss_contrast=contrast, loss_contrast_chance=chance
        )

    @torch.no_grad()
    def see(self, embeddings: Tensor, labels: Tensor) -> None:
        """Let embeddings (N, D) of classes labels (N,) enter both running means."""
        own = F.one_hot(labels, len(self.counts)).to(self.means.dtype)
        number = own.sum(dim=0)
        mean = own.T @ at_least_float32(embeddings).to(own.dtype) / number.clamp(min=1)[:, None]
        self.numbers += number
        self.means += (number / self.numbers.clamp(min=1))[..., None] * (mean - self.means)
