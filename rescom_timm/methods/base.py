"""What every method is: a net with its losses. `Method` has the attributes and hooks that the engine reads and calls;
a method sets or overrides those that it needs.

Shapes: B images of V views, N = V * B, K classes, D the width of an embedding.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from rescom_timm.contrastive.queue import Queue
from rescom_timm.methods.parts import MomentumNet, Teacher
from rescom_timm.models.net import Net


class BaseConfig:
    """Base of the methods' configs, frozen dataclasses: the section `method` of a recipe."""

    name: str
    """Literal: the method's name in METHODS."""

    @property
    def teacher(self) -> str | None:
        """Run, export or Hub id of a trained net to learn from; a method that may have one has this as a field."""
        return None

    @property
    def long_tailed(self) -> bool:
        """Whether the classification loss leaves the frequencies of the classes drawn in the logits, as plain
        cross-entropy does. Losses that know the frequencies, and what learns from a net that does, give logits of
        balanced classes."""
        return False

    def queue_slots(self, num_classes: int) -> tuple[str, int] | None:
        """(the key that sets it, keys that the queue holds over num_classes classes); None: there is no queue."""
        return None


class Method(nn.Module):
    """A net with its losses; forward(batch) gives the loss of a training step.

    A checkpoint holds the net, and beside it the other parameters and buffers of the method that are persistent. The
    optimizer and DistributedDataParallel see `net` alone. A module that is the net's own and that the method names too
    stands in a tuple, so that it is not registered twice.
    """

    per_image: ClassVar[bool] = False
    """Whether the loss is a sum over images, each of its own logits and label: batches may then be mixed
    (batch["partner"], batch["share"]) or cut into smaller ones (train.fit_batch)."""
    embeds: ClassVar[bool] = False
    """Whether it uses the embeddings of the net's projector, which others drop."""
    second_stage: ClassVar[bool] = False
    """Whether it starts from a trained net (from=RUN)."""
    new_classifier: ClassVar[bool] = False
    """Whether it takes the encoder alone from the net that it starts from."""
    needs_teacher: ClassVar[bool] = False
    """Whether it cannot train without a teacher."""
    second_sampler: ClassVar[Literal["class_balanced", "reversed"] | None] = None
    """A loader.sampler, of which each batch has B rows more, below the B rows of the recipe's own sampler."""
    static_shapes: ClassVar[bool] = True
    """Whether each step has tensors of the same shapes, as speed.capture and speed.compile need."""
    epoch_changes_host: ClassVar[bool] = False
    """Whether set_epoch changes numbers or flags on the host that forward reads: a captured step is then captured
    again for each epoch. Buffers that are changed in place need no new capture."""

    views: int = 1
    """V: augmented views of each image in a batch."""
    teacher: Teacher | None = None
    """The trained net that it learns from, set before training."""
    queue: Queue | None
    """Keys of earlier steps; None: it has none."""
    momentum_net: MomentumNet | None
    """A copy of the net that follows it; None: it has none."""
    net: Net
    """All that is trained. Accelerate wraps it for several processes."""

    def __init__(self, net: Net, config: Any) -> None:
        """config: the method's own. A subclass is made of (net, counts, config), counts (K,) the training images of
        each class, and raises ValueError where these do not fit each other."""
        super().__init__()
        self.net = net
        self.config = config
        self.queue = self.momentum_net = None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: image (B, V, 3, H, W), eight-bit, and label (B,); with a second_sampler 2B rows; of mixed images also
        partner (B,), the partners' labels, and share (), that of the own labels.

        Returns loss (), which is differentiated, logits, whose rows are the batch's or those of its views view by view
        (V * B, K), and any other scalars to log, detached.
        """
        raise NotImplementedError

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, 0 <= epoch < epochs. A method that changes with it says whether
        `epoch_changes_host`."""

    def after_step(self) -> None:
        """Called after each optimizer step, not after one that is skipped."""


def stack_views(images: Tensor) -> Tensor:
    """(B, V, ...) -> (V * B, ...), view by view."""
    return images.transpose(0, 1).flatten(0, 1)
