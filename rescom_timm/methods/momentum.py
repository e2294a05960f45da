"""Methods with a queue besides ResCom: MoCo + Balanced Softmax (Table 6, first row) and PaCo / GPaCo.

Shapes: B images of two views, K classes, D the width of an embedding. A momentum encoder is state of the method, not of
the net: checkpoints hold it separately, it gets no gradient, and it is equal on every process because the weights that
it follows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rescom_timm.contrastive.pairs import Pairs, against_queue, in_batch
from rescom_timm.contrastive.queue import FifoQueue
from rescom_timm.contrastive.supcon import chance_of_pairs, paco, supcon
from rescom_timm.distributed import gather
from rescom_timm.losses import at_least_float32, balanced_softmax, check_temperature, log_prior
from rescom_timm.methods.base import BaseConfig, Method, stack_views, with_parts
from rescom_timm.methods.bounds import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, check
from rescom_timm.methods.parts import MomentumNet
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class MocoConfig(BaseConfig):
    """MoCo (He et al. 2020, arXiv 1911.05722, eqs. 1 and 2) with Balanced Softmax of the first view.

    With plain cross-entropy instead it is the first stage of SSD (Li et al. 2021, arXiv 2109.04075).
    """

    name: Literal["moco"] = "moco"
    contrast_weight: float = 0.5
    """lambda: total loss = classification + lambda * contrastive loss."""
    temperature: float = 0.2
    momentum: float = 0.999
    """m: of the momentum encoder, once an optimizer step."""
    queue_size: int = 4000
    """Most recent keys, of all classes."""
    classification: Literal["balanced_softmax", "cross_entropy"] = "balanced_softmax"
    same_class_negatives: bool = True
    """Keys of a query's own class are negatives too, as in MoCo; false leaves them out (SSD, as its authors train)."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check(self, contrast_weight=NOT_NEGATIVE, momentum=BELOW_ONE, queue_size=AT_LEAST_ONE)

    @property
    def long_tailed(self) -> bool:
        """True with plain cross-entropy."""
        return self.classification == "cross_entropy"

    def queue_slots(self, num_classes: int) -> tuple[str, int]:
        """The key and the number of slots."""
        return "queue_size", self.queue_size


@dataclass(frozen=True)
class PacoConfig(BaseConfig):
    """Parametric contrastive learning (PaCo, Cui et al. 2021, arXiv 2107.12028).

    GPaCo (arXiv 2209.12400) is the same without momentum encoder, with smoothed targets.
    """

    name: Literal["paco"] = "paco"
    alpha: float = 0.05
    """Weight of a positive pair beside the own class centre's 1."""
    temperature: float = 0.2
    momentum: float | None = 0.999
    """m: of the momentum encoder; null is GPaCo, in which both views are queries of the one net."""
    queue_size: int = 8192
    smoothing: float = 0.0
    """Share of a centre's target that goes to the other centres (GPaCo)."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check(self, alpha=NOT_NEGATIVE, smoothing=BELOW_ONE, momentum=BELOW_ONE, queue_size=AT_LEAST_ONE)

    def queue_slots(self, num_classes: int) -> tuple[str, int]:
        """The key and the number of slots."""
        return "queue_size", self.queue_size


class Moco(Method):
    """Classification of the first view and MoCo over a queue.

    Positive pair: the two views of an image, the second through the momentum encoder. Negatives: all keys of the queue,
    or those of other classes.
    """

    momentum_net: MomentumNet
    queue: FifoQueue
    counts: Tensor
    views = 2
    embeds = True
    contrasts = True

    def __init__(self, net: Net, counts: Tensor, config: MocoConfig) -> None:
        """counts: (K,) training images of each class."""
        super().__init__(net, config)
        self.momentum_net = MomentumNet(net, config.momentum)
        self.queue = FifoQueue(config.queue_size, net.embedding_width)
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (B, K) of the first views and the parts. batch: image (B, 2, 3, H, W), label (B,)."""
        labels = batch["label"]
        first, second = batch["image"].unbind(dim=1)
        _, logits, queries = self.net(first)
        keys = self.momentum_net(second)
        pairs = self.pairs(queries, keys, labels)
        contrast = supcon(pairs, self.config.temperature)
        self.queue.enqueue(gather(keys), gather(labels))
        if self.config.classification == "balanced_softmax":
            classification = balanced_softmax(logits, labels, self.counts)
        else:
            classification = F.cross_entropy(at_least_float32(logits), labels)
        loss, chance = classification + self.config.contrast_weight * contrast, chance_of_pairs(pairs)
        return with_parts(
            loss, logits, loss_classification=classification, loss_contrast=contrast, loss_contrast_chance=chance
        )

    def pairs(self, queries: Tensor, keys: Tensor, labels: Tensor) -> Pairs:
        """Pairs (B, 1 + S): each query with its own key, positive, and with all slots of the queue, negative.

        queries, keys: (B, D). labels: (B,).
        """
        own = (queries * keys).sum(dim=1, keepdim=True)
        yes = torch.ones_like(own, dtype=torch.bool)
        queue = against_queue(queries, labels, self.queue)
        valid = queue.valid if self.config.same_class_negatives else queue.valid & ~queue.positive
        return Pairs(own, yes, yes).join(queue._replace(positive=torch.zeros_like(queue.positive), valid=valid))

    def after_step(self) -> None:
        """Update the momentum encoder."""
        self.momentum_net.follow(self.net)


class Paco(Method):
    """Class centres, which are the classifier's weights, and embeddings in one softmax.

    With a momentum encoder the first views are the queries, the second views its keys; without one (GPaCo) both views
    are queries, and keys of each other with gradient. The second views enter the queue.
    """

    queue: FifoQueue
    prior: Tensor
    views = 2
    embeds = True

    def __init__(self, net: Net, counts: Tensor, config: PacoConfig) -> None:
        """counts: (K,) training images of each class."""
        super().__init__(net, config)
        self.momentum_net = None if config.momentum is None else MomentumNet(net, config.momentum)
        self.queue = FifoQueue(config.queue_size, net.embedding_width)
        self.register_buffer("prior", log_prior(counts).float(), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar) and logits (B, K), or (2B, K) in GPaCo. batch: image (B, 2, 3, H, W), label (B,).

        loss_contrast, which is not trained, is the supervised contrastive loss of the pairs without the centres: beside
        its chance level it shows whether embeddings tell classes apart.
        """
        y, config = batch["label"], self.config
        first, second = batch["image"].unbind(dim=1)
        if self.momentum_net is None:
            _, logits, queries = self.net(stack_views(batch["image"]))
            labels, keys = y.repeat(2), queries.detach().chunk(2)[1]
            batch_pairs = in_batch(queries, labels)
        else:
            _, logits, queries = self.net(first)
            labels, keys = y, self.momentum_net(second)
            batch_pairs = in_batch(queries, y, torch.cat((queries, keys)), y.repeat(2))
        pairs = batch_pairs.join(against_queue(queries, labels, self.queue))
        centres = logits + self.prior.to(torch.promote_types(logits.dtype, torch.float32))
        loss = paco(centres, labels, pairs, config.temperature, config.alpha, config.smoothing)
        self.queue.enqueue(gather(keys), gather(y))
        return {
            "loss": loss,
            "logits": logits,
            "loss_contrast": supcon(pairs._replace(similarity=pairs.similarity.detach()), config.temperature),
            "loss_contrast_chance": chance_of_pairs(pairs),
        }

    def after_step(self) -> None:
        """Update the momentum encoder, if any."""
        if self.momentum_net is not None:
            self.momentum_net.follow(self.net)
