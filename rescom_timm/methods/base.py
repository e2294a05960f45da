"""The interface of methods: a net with its losses.

`Method` has the attributes and hooks that the engine reads and calls; a method sets or overrides those that it needs.

Shapes: B images of V views, N = V * B, K classes, D the width of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from rescom_timm.class_names import numbers_of
from rescom_timm.contrastive.queue import Queue
from rescom_timm.errors import InputError
from rescom_timm.methods.heads import Rows
from rescom_timm.methods.parts import MomentumNet, Teacher
from rescom_timm.models.net import Net


def _by_name(value: Any) -> Any:
    """Class names that YAML reads as numbers are text."""
    return {str(name): number for name, number in value.items()} if isinstance(value, Mapping) else value


ByClass = Annotated[dict[str, float], pydantic.BeforeValidator(_by_name)]
"""Numbers by class name, in a recipe."""


class BaseConfig:
    """Base of the methods' configs, frozen dataclasses: the section `method` of a recipe."""

    name: str
    """Literal: the method's name in METHODS."""

    weights: Mapping[str, float] = MappingProxyType({})
    """Weights of classes by name. A method that supports them has this as a field."""

    remedy: ClassVar[str] = "change method.contrast_weight (lambda), method.temperature or views.contrast"
    """What to change where the contrastive branch learns nothing."""

    @property
    def teacher(self) -> str | None:
        """Run, export or Hub id of a trained net to learn from. A method that supports one has this as a field."""
        return None

    @property
    def long_tailed(self) -> bool:
        """Whether the logits keep the prior of the training classes, as those of plain cross-entropy do.

        Losses that know the class frequencies, and distillation from such a net, give logits of balanced classes.
        """
        return False

    @property
    def queue_kind(self) -> str:
        """The kind of the queue, if there is one: class_balanced, reversed or fifo."""
        return "fifo"

    def queue_slots(self, num_classes: int) -> tuple[str, int] | None:
        """The key that sets the queue's size, and its slots for num_classes classes. None: there is no queue."""
        return None


class Method(nn.Module):
    """A net with its losses; forward(batch) gives the loss of a training step.

    A checkpoint holds the net, and separately the method's own persistent parameters and buffers. The optimizer and
    DistributedDataParallel see `net` alone. A reference to a module of the net stands in a tuple, so that it is not
    registered twice.
    """

    per_image: ClassVar[bool] = False
    """Whether the loss is a mean over images, each of its own logits and label: batches may then be mixed
    (batch["partner"], batch["share"]) or split (train.fit_batch)."""
    embeds: ClassVar[bool] = False
    """Whether it uses the embeddings of the net's projector."""
    contrasts: ClassVar[bool] = False
    """Whether it may classify the first view alone and contrast the others, which views.contrast then makes."""
    second_stage: ClassVar[bool] = False
    """Whether it starts from a trained net (from=RUN)."""
    new_classifier: ClassVar[bool] = False
    """Whether it keeps only the encoder of the net that it starts from."""
    fits_head: ClassVar[bool] = False
    """Whether its classifier is fitted over the features of the training images before training, by fit_head."""
    needs_teacher: ClassVar[bool] = False
    """Whether it cannot train without a teacher."""
    second_sampler: ClassVar[Literal["class_balanced", "reversed"] | None] = None
    """A loader.sampler that adds B rows to each batch, below the B rows of the recipe's own sampler."""
    static_shapes: ClassVar[bool] = True
    """Whether every step has tensors of the same shapes, as speed.capture and speed.compile need."""
    epoch_changes_host: ClassVar[bool] = False
    """Whether set_epoch changes Python values that forward reads: a captured step is then captured again for each
    epoch. Buffers changed in place need no new capture."""

    views: int = 1
    """V: augmented views of each image in a batch."""
    contrast_views: bool = False
    """Whether views.contrast makes all views but the first, which are then not classified; set before training."""
    teacher: Teacher | None = None
    """The trained net that it learns from, set before training."""
    queue: Queue | None
    """Keys of earlier steps."""
    momentum_net: MomentumNet | None
    """Moving average of the net."""
    class_weights: Tensor | None
    """(K,) of `config.weights`, set before training; None: all are 1."""
    net: Net
    """All that is trained. Accelerate wraps it for several processes."""

    def __init__(self, net: Net, config: BaseConfig) -> None:
        """config: the method's own.

        A subclass takes (net, counts, config), counts (K,) the training images of each class, and raises InputError if
        they do not fit each other.
        """
        super().__init__()
        self.net = net
        self.config: Any = config
        self.queue = self.momentum_net = None
        self.register_buffer("class_weights", None, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of a training step.

        batch: image (B, V, 3, H, W), eight-bit, and label (B,); with a second_sampler 2B rows; for mixed images also
        partner (B,), the partners' labels, and share (), the weight of the own labels. Returns loss (), the only value
        with a gradient, logits (B, K) or, view by view, (V * B, K), and any other scalars to log, detached.
        """
        raise NotImplementedError

    def pair_loss(self) -> tuple[float, Tensor | None]:
        """Temperature and class weights (K,), if any, of the loss over pairs with the queue, if any."""
        return self.config.temperature, None

    def fit_head(self, rows: Rows) -> None:
        """Fit the head before training; called for a method that fits_head.

        rows: features and labels of the training images, as they are and flipped.
        """

    def set_classes(self, names: Sequence[str]) -> None:
        """Called before training with the names of the K classes.

        Raises InputError (method.value) for weights of classes that do not exist.
        """
        if self.config.weights:
            self.class_weights = by_class(self.config.weights, names, "weights")

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, 0 <= epoch < epochs. See `epoch_changes_host`."""

    def after_step(self) -> None:
        """Called after each optimizer step, not after one that is skipped."""


def by_class(values: Mapping[str, float], names: Sequence[str], key: str) -> Tensor:
    """The values of a recipe's key as (K,) float32, 1 for classes that are not named.

    Raises InputError (method.value) for names that no class has, and for values that are not above 0.
    """
    found = torch.ones(len(names))
    try:
        numbers = numbers_of(values, names, "method.value")
    except InputError as error:
        raise InputError(error.code, f"method.{key}: {error}") from None
    for k, value in zip(numbers, values.values(), strict=True):
        if not 0 < value < math.inf:
            raise InputError("method.value", f"method.{key}: {names[k]!r} must have a number above 0, not {value:g}")
        found[k] = value
    return found


def with_parts(loss: Tensor, logits: Tensor, **parts: Tensor) -> dict[str, Tensor]:
    """What `forward` returns: the loss, the logits, and by name the scalars to log, detached."""
    return {"loss": loss, "logits": logits} | {name: value.detach() for name, value in parts.items()}


def stack_views(images: Tensor) -> Tensor:
    """Stack views view by view: (B, V, ...) -> (V * B, ...)."""
    return images.transpose(0, 1).flatten(0, 1)
