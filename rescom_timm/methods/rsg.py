"""RSG: generates features of rare classes before a backbone's last stage, from the variation of frequent classes.

Wang et al. 2021, CVPR, "RSG: A Simple but Effective Module for Learning Imbalanced Datasets". It works in training
alone: evaluation and export use the plain net. Shapes: B images, M generated ones, K classes, J centres of each class;
maps are (B, C, H, W).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rescom_timm.errors import InputError
from rescom_timm.losses import at_least_float32, ldam
from rescom_timm.methods.base import with_parts
from rescom_timm.methods.baselines import replace_classifier
from rescom_timm.methods.bounds import A_FEW, BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, check
from rescom_timm.methods.deferred import Deferred, DeferredConfig
from rescom_timm.models.branched import Remade
from rescom_timm.models.classifiers import Cosine, full_precision
from rescom_timm.models.net import Net, Outputs


@dataclass(frozen=True)
class RsgConfig(DeferredConfig):
    """RSG beside LDAM with deferred re-weighting, as in its tables, or beside plain cross-entropy."""

    name: Literal["rsg"] = "rsg"
    views: Literal[1] = 1
    loss: Literal["ldam", "cross_entropy"] = "ldam"
    """cross_entropy keeps the linear classifier, with which the net is exported as a plain timm model."""
    centers: int = 15
    """J."""
    head_classes: float = 0.2
    """Share of the classes, the most frequent ones, whose variation is transferred to all others."""
    generate_from: float = 0.8
    """Fraction of the epochs after which images are generated; before, only centres and pair classifier learn."""
    strength: float = 1.0
    """Generated images of a batch as a fraction of the larger of its two groups, head and tail."""
    pair_width: int = 256
    """Channels in the pair classifier."""
    center_weight: float = 0.1
    """lambda_1, of L_CESC."""
    vector_weight: float = 0.01
    """lambda_2, of L_MV."""
    margin: float = 0.5
    scale: float = 30.0
    reweight_from: float = 0.8
    """Fraction of the epochs after which LDAM weights the classes; 1: never."""
    beta: float = 0.9999

    def __post_init__(self) -> None:
        check(self, centers=A_FEW, head_classes=PART, generate_from=PART, strength=PART)
        check(self, pair_width=A_FEW, center_weight=NOT_NEGATIVE, vector_weight=NOT_NEGATIVE)
        check(self, margin=NOT_NEGATIVE, scale=POSITIVE, reweight_from=PART, beta=BELOW_ONE)

    @property
    def long_tailed(self) -> bool:
        """True with plain cross-entropy, or if classes are never weighted."""
        return self.loss == "cross_entropy" or super().long_tailed


class Made(NamedTuple):
    """Maps (B + M, C, H, W) and labels (B + M,), the batch's own first; the losses L_CESC and L_MV."""

    maps: Tensor
    labels: Tensor
    center_loss: Tensor
    vector_loss: Tensor


def of_classes(weight: Tensor, labels: Tensor) -> Tensor:
    """weight[labels], with a deterministic gradient: that of an index depends on the order of threads."""
    return F.embedding(labels, weight.flatten(1)).unflatten(1, weight.shape[1:])


class PairClassifier(nn.Module):
    """Whether two maps are of one class: logits (B, 2) of no and yes."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * channels, width, 1)
        self.look = nn.Conv2d(width, width, 3, padding=1)
        self.decide = nn.Linear(width, 2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Logits (B, 2) of two batches of maps (B, C, H, W)."""
        hidden = self.look(self.mix(torch.cat((one, other), dim=1)).relu())
        return self.decide(hidden.mean(dim=(2, 3)))


class Generator(nn.Module):
    """Centres of each class, a pair classifier, and the transformation T of a variation: all weights of RSG.

    Every weight has a gradient in every step, zero if unused, as DistributedDataParallel expects.
    """

    head: Tensor

    def __init__(self, channels: int, head: Tensor, config: RsgConfig) -> None:
        """channels: C. head: (K,) bool, the classes whose variation is transferred."""
        super().__init__()
        self.config = config
        classes = len(head)
        self.centers = nn.Parameter(torch.zeros(classes, config.centers, channels))
        self.assign_weight = nn.Parameter(torch.randn(classes, channels, config.centers))
        self.assign_bias = nn.Parameter(torch.ones(classes, config.centers))
        self.transform = nn.Conv2d(channels, channels, 3, padding=1)
        self.pair = PairClassifier(channels, config.pair_width)
        self.register_buffer("head", head, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.pair.decide.weight)
        nn.init.zeros_(self.pair.decide.bias)

    def forward(self, maps: Tensor, labels: Tensor, generate: bool) -> Made:
        """The batch with generated maps. maps: (B, C, H, W), whose gradient is that of later layers. labels: (B,)."""
        with full_precision(maps):
            fixed = at_least_float32(maps.detach())
            gamma = self.assign(fixed, labels)
            center_loss = self.distances(fixed, labels, gamma)
            idle = 0 * sum(weight.sum() for part in (self.transform, self.pair) for weight in part.parameters())
            if not generate:
                return Made(maps, labels, center_loss + self.pairs(fixed, labels) + idle, torch.zeros_like(center_loss))
            heads, tails = self.choose(labels)
            if not len(heads):
                return Made(maps, labels, center_loss + idle, torch.zeros_like(center_loss))
            best = self.centers.detach()[labels, gamma.argmax(dim=1)][:, :, None, None]
            offsets = fixed - best
            moved = self.transform(offsets[heads])
            vector_loss = self.vectors(fixed[heads], offsets[heads], moved, offsets[tails])
            new = (fixed[tails] + moved).to(maps.dtype)
            return Made(torch.cat((maps, new)), torch.cat((labels, labels[tails])), center_loss + idle, vector_loss)

    def assign(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Assignment gamma (B, J) of each map to the centres of its class."""
        scores = torch.einsum("bc,bcj->bj", maps.mean(dim=(2, 3)), of_classes(self.assign_weight, labels))
        return (scores + of_classes(self.assign_bias, labels)).softmax(dim=1)

    def distances(self, maps: Tensor, labels: Tensor, gamma: Tensor) -> Tensor:
        """Loss L_CESC: sum over centres of gamma |map - centre|^2 over all pixels and channels, the mean over B.

        The distance to a centre is that of the map's mean pixel plus the spread of its pixels around that.
        """
        mean = maps.mean(dim=(2, 3))
        spread = (maps - mean[:, :, None, None]).square().sum(dim=(1, 2, 3))
        far = (mean[:, None] - of_classes(self.centers, labels)).square().sum(dim=2) * maps[0, 0].numel()
        return (gamma * (spread[:, None] + far)).sum(dim=1).mean()

    def pairs(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the pair classifier: the first half of the batch against the second."""
        half = len(maps) // 2
        if not half:
            return maps.new_zeros(())
        same = (labels[:half] == labels[half : 2 * half]).long()
        return F.cross_entropy(self.pair(maps[:half], maps[half : 2 * half]), same)

    def choose(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (heads, tails), (M,) each, of the batch: the variation of a head is added to a tail.

        The smaller group is repeated as often as `strength` of the larger has its length, at least once.
        """
        is_head = self.head[labels]
        heads, tails = is_head.nonzero().flatten(), (~is_head).nonzero().flatten()
        few, many = (tails, heads) if len(heads) >= len(tails) else (heads, tails)
        if not len(few):
            return few, few
        runs = max(int(len(many) * self.config.strength / len(few)), 1)
        few, many = few.repeat(runs), many[: runs * len(few)]
        return (many, few) if len(heads) >= len(tails) else (few, many)

    def vectors(self, heads: Tensor, offsets: Tensor, moved: Tensor, tails: Tensor) -> Tensor:
        """Loss L_MV of transformed variations.

        They should not be of the head's class, should keep their length at each pixel, and should point to where the
        tail map lies from its own centre. offsets, moved, tails: (M, C, H, W) v, T(v) and the tail maps' own variation.
        Returns the mean over M of sums over pixels.
        """
        frozen = {name: weight.detach() for name, weight in self.pair.named_parameters()}
        logits = functional_call(self.pair, frozen, (heads, moved))
        other = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        length = (moved.norm(dim=1) - offsets.norm(dim=1)).abs()
        direction = 1 - F.cosine_similarity(moved, tails, dim=1)
        return other + (length + direction).sum(dim=(1, 2)).mean()


class RsgNet(Remade):
    """A net with a generator that extends the input of its last stage, if labels are given."""

    def __init__(self, net: Net, stage: str, generator: Generator) -> None:
        """Takes over the net's parts. stage: the name of the encoder's last stage."""
        super().__init__(net)
        self.stage, self.generator = stage, generator

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor | None = None, generate: bool = False
    ) -> Outputs | tuple[Outputs, Made]:
        """Outputs of images (N, 3, H, W); with labels (B,), of B + M rows and with the generator's maps."""
        if labels is None:
            return super().forward(images)
        made: list[Made] = []

        def before(stage: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            made.append(self.generator(inputs[0], labels, generate))
            return (made[0].maps,)

        handle = self.encoder.get_submodule(self.stage).register_forward_pre_hook(before)
        try:
            outputs = super().forward(images)
        finally:
            handle.remove()
        return outputs, made[0]


def last_stage(encoder: nn.Module) -> tuple[str, int]:
    """Name of a timm backbone's last stage and channels of its input.

    Raises InputError if there is no stage with weights over maps of (channels, height, width).
    """
    info = getattr(encoder, "feature_info", None)
    name = info[-1]["module"] if info else ""
    seen: list[tuple[int, ...]] = []
    watched = copy.deepcopy(encoder).eval()
    try:
        stage = watched.get_submodule(name)
        if name and any(weight.ndim == 4 for weight in stage.parameters()):
            stage.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
            size = watched.pretrained_cfg["input_size"]  # type: ignore[index]
            with torch.no_grad():
                watched(torch.zeros(1, *size, dtype=next(watched.parameters()).dtype))
    except (AttributeError, TypeError):
        seen = []
    if len(seen) != 1 or len(seen[0]) != 4 or getattr(encoder, "output_fmt", "NCHW") not in ("NCHW", None):
        raise InputError(
            "net.unsupported",
            "method rsg needs a backbone whose last stage takes maps of (channels, height, width): use a ResNet, a "
            "ConvNeXt or another convolutional net in stages",
        )
    return name, seen[0][1]


class Rsg(Deferred):
    """LDAM or cross-entropy of real and generated images, and the two losses of the generator.

    As in the authors' code, except that L_MV's vectors are those of a pixel's channels (theirs are cut out of the
    flattened map), and that weight decay moves T and the pair classifier also while they do not train.
    """

    net: RsgNet
    static_shapes = False  # batches grow by the generated images
    counts: Tensor

    def __init__(self, net: Net, counts: Tensor, config: RsgConfig) -> None:
        """counts: (K,) training images of each class. Raises InputError if the backbone has no last stage of maps."""
        stage, channels = last_stage(net.encoder)
        net.drop_projector()
        if config.loss == "ldam":
            replace_classifier(net, Cosine(net.classifier.in_features, len(counts), config.scale))
        head = torch.zeros(len(counts), dtype=torch.bool)
        head[counts.argsort(descending=True, stable=True)[: max(int(len(counts) * config.head_classes), 1)]] = True
        super().__init__(RsgNet(net, stage, Generator(channels, head, config)), config)
        self.generate = False
        self.register_buffer("counts", counts, persistent=False)
        self.add_margins(counts)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Start generating and re-weighting after their fractions of the epochs."""
        super().set_epoch(epoch, epochs)
        self.generate = epoch >= self.config.generate_from * epochs

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (B, K) and the loss's parts. batch: image (B, 1, 3, H, W), label (B,)."""
        config, labels = self.config, batch["label"]
        (_, logits, _), made = self.net(batch["image"][:, 0], labels, self.generate)
        if config.loss == "ldam":
            scale = config.scale
            classification = ldam(logits / scale, made.labels, self.margins, scale, self.current_weights)
        else:
            classification = F.cross_entropy(at_least_float32(logits), made.labels)
        centers, vectors = made.center_loss, made.vector_loss
        loss = classification + config.center_weight * centers + config.vector_weight * vectors
        parts = {"loss_classification": classification, "loss_centers": centers, "loss_vectors": vectors}
        return with_parts(loss, logits[: len(labels)], **parts)
