"""ResCom: Siamese Balanced Softmax and a class-balanced contrastive loss over mined pairs (arXiv 2203.11506).

Shapes: B images of V views, K classes, D the width of an embedding. Views are stacked view by view: rows 0..B-1 are
the first views of the batch, rows B..2B-1 the second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from rescom_timm.contrastive.mined import mined_supcon
from rescom_timm.contrastive.queue import ClassBalancedQueue, FifoQueue, Queue, ReversedQueue
from rescom_timm.contrastive.supcon import chance_level
from rescom_timm.distributed import gather, processes
from rescom_timm.errors import InputError
from rescom_timm.losses import WeightForm, balanced_softmax, check_temperature, class_weights
from rescom_timm.methods.base import BaseConfig, Method, stack_views
from rescom_timm.methods.bounds import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, check
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
    siamese: bool = True
    """Balanced Softmax on both views (eq. 6) or on the first only."""
    gather_pairs: bool = False
    """In-batch pairs from all processes instead of the local batch (released mode)."""

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
    views = 2
    embeds = True

    def __init__(self, net: Net, counts: Tensor, config: RescomConfig = RescomConfig()) -> None:
        """counts: (K,) training images of each class. Raises InputError if Q, Qp, Qn and K do not fit."""
        config = config.for_classes(len(counts))
        super().__init__(net, config)
        self.queue = config.queue.build(counts, net.embedding_width)
        self.register_buffer("counts", counts, persistent=False)
        weights = class_weights(counts, config.beta, config.class_weight)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (2B, K) and the loss's parts. batch: image (B, 2, 3, H, W), label (B,).

        Keys enter the queue after their step's similarities are taken.
        """
        y = batch["label"]
        _, logits, embeddings = self.net(stack_views(batch["image"]))
        labels = y.repeat(self.views)
        chance = self.chance(labels)
        contrast = self.contrast(embeddings, labels)  # first: its peak of memory comes before that of the logits
        classified = slice(None) if self.config.siamese else slice(len(y))
        classification = balanced_softmax(logits[classified], labels[classified], self.counts)
        z1, z2 = embeddings.detach().chunk(2)
        key = z2 if self.config.mode == "paper" else z1
        self.queue.enqueue(gather(key), gather(y))
        loss = classification + self.config.contrast_weight * contrast
        return {
            "loss": loss,
            "logits": logits,
            "loss_classification": classification.detach(),
            "loss_contrast": contrast.detach(),
            "loss_contrast_chance": chance,
        }

    def pair_loss(self) -> tuple[float, Tensor | None]:
        """Temperature and class weights (K,)."""
        return self.config.temperature, self.weights

    def chance(self, labels: Tensor) -> Tensor:
        """The contrastive loss of embeddings that are all equal. labels: (2B,) of the stacked views."""
        config = self.config
        keys = None
        if config.mode == "paper":
            labels = labels.chunk(2)[0]
        else:
            keys = gather(labels) if config.gather_pairs else labels
        assert not isinstance(config.negatives, str)
        return chance_level(labels, self.queue, config.positives, config.negatives, self.weights, keys)

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
        return mined_supcon(
            z, y, self.queue, config.positives, negatives, config.temperature, self.weights[y],
            keys=keys, key_labels=key_labels, first=first,
        )  # fmt: skip
