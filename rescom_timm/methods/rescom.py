"""ResCom: Siamese Balanced Softmax and a class-balanced contrastive loss over mined pairs (arXiv 2203.11506).

Shapes: B images of V views, K classes, D the width of an embedding. Views are stacked view by view: rows 0..B-1 are
the first views of the batch, rows B..2B-1 the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rescom_timm.contrastive.mined import mined_supcon
from rescom_timm.contrastive.queue import ClassBalancedQueue, FifoQueue, Queue, ReversedQueue
from rescom_timm.contrastive.supcon import chance_level
from rescom_timm.distributed import gather, processes
from rescom_timm.errors import InputError
from rescom_timm.losses import WeightForm, balanced_softmax, check_temperature, class_weights, weighted_mean
from rescom_timm.methods.base import BaseConfig, ByClass, Method, stack_views, with_parts
from rescom_timm.methods.bounds import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, check
from rescom_timm.methods.parts import Prototypes
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class QueueConfig:
    """The memory of past embeddings (paper eq. 3, Fig. 3)."""

    kind: Literal["class_balanced", "reversed", "fifo"] = "class_balanced"
    """class_balanced: Q slots of each class. reversed: more slots for rarer classes. fifo: the most recent keys."""
    per_class: int = 4
    """Q. The other kinds get as many slots in all: K * Q."""

    def __post_init__(self) -> None:
        check(self, per_class=AT_LEAST_ONE)

    def build(self, counts: Tensor, dim: int) -> Queue:
        """counts: (K,) training images of each class; dim: D."""
        if self.kind == "class_balanced":
            return ClassBalancedQueue(len(counts), self.per_class, dim)
        size = self.per_class * len(counts)
        return FifoQueue(size, dim) if self.kind == "fifo" else ReversedQueue(counts, size, dim)


@dataclass(frozen=True)
class RescomConfig(BaseConfig):
    """ResCom (arXiv 2203.11506), as published in code or in the paper."""

    name: Literal["rescom"] = "rescom"
    mode: Literal["released", "paper"] = "released"
    """paper: view 1 against mined queue keys, view 2 enters the queue (eq. 5, Algorithm 1).
    released: both views against mined queue keys and all other views of the batch, view 1 enters (published code)."""
    contrast_weight: float = 0.5
    """lambda: total loss = Siamese Balanced Softmax + lambda * contrastive loss."""
    contrast_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: lambda falls to 0 over the epochs, as a cosine learning rate does."""
    temperature: float = 0.2
    """tau."""
    beta: float = 0.99
    """Effective number of images (eq. 2); 0 switches class weights off."""
    class_weight: WeightForm = "normalized"
    queue: QueueConfig = QueueConfig()
    positives: int | None = 1
    """Qp, hardest positive keys of each query; null: all (eq. 3)."""
    negatives: int | Literal["auto"] | None = "auto"
    """Qn, hardest negative keys of each query; null: all (eq. 3); auto: see `auto_negatives`."""
    prototypes: bool = False
    """A prototype of each class among the keys of every query, never mined, which an MLP makes of the classifier's
    vectors, as in BCL (Zhu et al. 2022)."""
    siamese: bool = True
    """Balanced Softmax on both views (eq. 6) or on the first only, as always with views.contrast."""
    weights: ByClass = field(default_factory=dict)
    """Weights of classes by name in Balanced Softmax, such as {defect: 10}; 1 for the others. The loss is the weighted
    mean, the sum of w_y L over the sum of w_y."""
    gather_pairs: bool = False
    """In-batch pairs from all processes instead of the local batch (released mode)."""

    remedy = (
        "raise method.positives (Qp; null for all), lower method.queue.per_class (Q), change method.contrast_weight "
        "(lambda) or the second view (views.contrast)"
    )

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check(self, beta=BELOW_ONE, contrast_weight=NOT_NEGATIVE, positives=AT_LEAST_ONE)
        if not isinstance(self.negatives, str):
            check(self, negatives=AT_LEAST_ONE)
        if self.queue.kind == "class_balanced" and (self.positives or 0) > self.queue.per_class:
            raise InputError(
                "queue.mined",
                f"positives (Qp = {self.positives}) are more than queue.per_class (Q = {self.queue.per_class}): lower "
                "positives or raise queue.per_class",
            )

    @property
    def queue_kind(self) -> str:
        """The queue's own kind."""
        return self.queue.kind

    def queue_slots(self, num_classes: int) -> tuple[str, int]:
        """The key and the number of slots."""
        return "queue.per_class", num_classes * self.queue.per_class

    def for_classes(self, num_classes: int) -> RescomConfig:
        """The config with a number (or None) for Qn.

        Raises InputError if the negatives are more than a queue over num_classes classes holds.
        """
        negatives, slots = self.negatives, (num_classes - 1) * self.queue.per_class
        if isinstance(negatives, str):
            negatives = auto_negatives(num_classes, self.queue.per_class)
        if self.queue.kind == "class_balanced" and (negatives or 0) > slots:
            raise InputError(
                "queue.mined",
                f"negatives (Qn = {negatives}) are more than the (K - 1) Q = {slots} keys of the other classes "
                f"(K = {num_classes}, Q = {self.queue.per_class}): lower negatives or raise queue.per_class",
            )
        return replace(self, negatives=negatives)


def auto_negatives(num_classes: int, per_class: int) -> int:
    """Qn for K classes and Q keys of each: two fifths of the keys of other classes, at most 500.

    The paper has 400 of 990 for CIFAR-100-LT, and 500 for 1,000 classes and more.
    """
    return max(1, min(500, round(0.4 * (num_classes - 1) * per_class)))


class ResCom(Method):
    """Siamese Balanced Softmax and the contrastive loss of mined pairs over a queue."""

    config: RescomConfig
    queue: Queue
    counts: Tensor
    weights: Tensor
    contrast_share: Tensor
    views = 2
    embeds = True
    contrasts = True

    def __init__(self, net: Net, counts: Tensor, config: RescomConfig = RescomConfig()) -> None:
        """counts: (K,) training images of each class. Raises InputError if Q, Qp, Qn and K do not fit."""
        config = config.for_classes(len(counts))
        prototypes = Prototypes(net) if config.prototypes else None
        super().__init__(net, config)
        self.prototypes = prototypes
        self.queue = config.queue.build(counts, net.embedding_width)
        self.register_buffer("counts", counts, persistent=False)
        weights = class_weights(counts, config.beta, config.class_weight)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("contrast_share", torch.ones(()), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch: how much of lambda is left."""
        if self.config.contrast_schedule == "cosine":
            self.contrast_share.fill_((1 + math.cos(math.pi * epoch / max(epochs, 1))) / 2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (2B, K) and the loss's parts. batch: image (B, 2, 3, H, W), label (B,).

        With views.contrast the logits are (B, K), of the first views. Keys enter the queue after their step's
        similarities are taken.
        """
        y = batch["label"]
        _, logits, embeddings = self.net(stack_views(batch["image"]))
        labels = y.repeat(self.views)
        chance = self.chance(labels)
        contrast = self.contrast(embeddings, labels)  # first: its peak of memory comes before that of the logits
        if self.contrast_views:
            logits = logits[: len(y)]
        classified = slice(None if self.config.siamese else len(y))
        targets = labels[: len(logits)]
        classification = self.classification(logits[classified], targets[classified])
        z1, z2 = embeddings.detach().chunk(2)
        key = z2 if self.config.mode == "paper" or self.contrast_views else z1
        self.queue.enqueue(gather(key), gather(y))
        share = contrast if self.config.contrast_schedule == "constant" else self.contrast_share * contrast
        loss = classification + self.config.contrast_weight * share
        return with_parts(
            loss, logits, loss_classification=classification, loss_contrast=contrast, loss_contrast_chance=chance
        )

    def classification(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Balanced Softmax of logits (N, K), labels (N,), with the class weights, if there are any."""
        if self.class_weights is None:
            return balanced_softmax(logits, labels, self.counts)
        rows = balanced_softmax(logits, labels, self.counts, reduction="none")
        return weighted_mean(rows, self.class_weights[labels])

    def pair_loss(self) -> tuple[float, Tensor | None]:
        """Temperature and class weights (K,)."""
        return self.config.temperature, self.weights

    def chance(self, labels: Tensor) -> Tensor:
        """The contrastive loss of embeddings that are all equal. labels: (2B,) of the stacked views."""
        config, own = self.config, 1
        keys = None
        if config.mode == "paper":
            labels, own = labels.chunk(2)[0], 0
        else:
            keys = gather(labels) if config.gather_pairs else labels
        if config.prototypes:
            keys = torch.cat(
                [labels[:0] if keys is None else keys, torch.arange(len(self.counts), device=labels.device)]
            )
        assert not isinstance(config.negatives, str)
        return chance_level(labels, self.queue, config.positives, config.negatives, self.weights, keys, own)

    def contrast(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The contrastive loss (eq. 5) of the 2B stacked views. embeddings: (2B, D) unit vectors. labels: (2B,)."""
        config, negatives = self.config, self.config.negatives
        assert not isinstance(negatives, str)
        z, y, first = embeddings, labels, 0
        keys, key_labels = (z, y) if config.mode == "released" else (None, None)
        if config.mode == "paper":
            z, y = embeddings.chunk(2)[0], labels.chunk(2)[0]
        elif config.gather_pairs:
            keys, key_labels, first = gather(z), gather(y), processes()[0] * len(z)
        if self.prototypes is not None:
            centres = self.prototypes().to(z.dtype)
            if keys is None or key_labels is None:
                keys, key_labels, first = z[:0], y[:0], len(centres)  # no query is a key
            keys = torch.cat([keys, centres])
            key_labels = torch.cat([key_labels, torch.arange(len(centres), device=y.device)])
        return mined_supcon(
            z, y, self.queue, config.positives, negatives, config.temperature, self.weights[y],
            keys=keys, key_labels=key_labels, first=first,
        )  # fmt: skip
