"""RSG: images of rare classes made in front of a backbone's last stage, from how images of frequent classes vary
(Wang et al. 2021, CVPR, "RSG: A Simple but Effective Module for Learning Imbalanced Datasets").

It works in training alone: the net that is evaluated and exported is the plain one. Shapes: B images, M made ones, K
classes, J centres of each class; maps are (B, C, H, W).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rescom_timm.losses import at_least_float32, ldam, ldam_margins
from rescom_timm.methods.base import BaseConfig, Method
from rescom_timm.methods.baselines import balanced_weights, replace_classifier
from rescom_timm.methods.bounds import A_FEW, BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, check
from rescom_timm.models.classifiers import Cosine, full_precision
from rescom_timm.models.net import Net, Outputs


@dataclass(frozen=True)
class RsgConfig(BaseConfig):
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
    """Fraction of the epochs after which images are made; before, only centres and pair classifier learn."""
    strength: float = 1.0
    """Made images of a batch as a share of the larger of its two groups, head and tail."""
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
        return self.loss == "cross_entropy" or self.reweight_from == 1 or self.beta == 0  # never weighted


class Made(NamedTuple):
    """maps (B + M, C, H, W) and labels (B + M,), the batch's own first; the losses L_CESC and L_MV."""

    maps: Tensor
    labels: Tensor
    center_loss: Tensor
    vector_loss: Tensor


def of_classes(weight: Tensor, labels: Tensor) -> Tensor:
    """weight[labels], whose gradient is summed in one order: that of an index is not, on several threads."""
    return F.embedding(labels, weight.flatten(1)).unflatten(1, weight.shape[1:])


class PairClassifier(nn.Module):
    """Whether two maps are of one class, logits (B, 2) of no and yes."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * channels, width, 1)
        self.look = nn.Conv2d(width, width, 3, padding=1)
        self.decide = nn.Linear(width, 2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        hidden = self.look(self.mix(torch.cat((one, other), dim=1)).relu())
        return self.decide(hidden.mean(dim=(2, 3)))


class Generator(nn.Module):
    """Centres of each class, a pair classifier, and the transformation T of a variation: all of RSG's weights.

    Every weight has a gradient in every step, if only zero, for processes that train together wait for each."""

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
        """maps: (B, C, H, W), which get a gradient through what comes after alone. labels: (B,)."""
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
        """gamma (B, J): how much a map belongs to each centre of its class."""
        scores = torch.einsum("bc,bcj->bj", maps.mean(dim=(2, 3)), of_classes(self.assign_weight, labels))
        return (scores + of_classes(self.assign_bias, labels)).softmax(dim=1)

    def distances(self, maps: Tensor, labels: Tensor, gamma: Tensor) -> Tensor:
        """sum over centres of gamma |map - centre|^2 over all pixels and channels, the mean over B. The distance to a
        centre is that of the map's mean pixel, and how far its pixels are from that."""
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
        """(heads, tails), (M,) rows of the batch each: whose variation goes to whom. The smaller group is paired with
        as many runs of its own length as strength gives of the larger, one at least."""
        is_head = self.head[labels]
        heads, tails = is_head.nonzero().flatten(), (~is_head).nonzero().flatten()
        few, many = (tails, heads) if len(heads) >= len(tails) else (heads, tails)
        if not len(few):
            return few, few
        runs = max(int(len(many) * self.config.strength / len(few)), 1)
        few, many = few.repeat(runs), many[: runs * len(few)]
        return (many, few) if len(heads) >= len(tails) else (few, many)

    def vectors(self, heads: Tensor, offsets: Tensor, moved: Tensor, tails: Tensor) -> Tensor:
        """L_MV: the transformed variation is not of the head's class, as long at each pixel as it was, and in the
        direction in which the tail map is from its own centre. offsets, moved, tails: (M, C, H, W) v, T(v) and the tail
        maps' own variation; the mean over M of sums over pixels."""
        frozen = {name: weight.detach() for name, weight in self.pair.named_parameters()}
        told = functional_call(self.pair, frozen, (heads, moved))
        other = F.cross_entropy(told, torch.zeros(len(told), dtype=torch.long, device=told.device))
        length = (moved.norm(dim=1) - offsets.norm(dim=1)).abs()
        direction = 1 - F.cosine_similarity(moved, tails, dim=1)
        return other + (length + direction).sum(dim=(1, 2)).mean()


class RsgNet(Net):
    """A net with a generator that adds to the input of its last stage, where labels are given."""

    def __init__(self, net: Net, stage: str, generator: Generator) -> None:
        """Takes over the net's parts. stage: the name of the encoder's last stage."""
        nn.Module.__init__(self)
        self.encoder, self.classifier, self.projector = net.encoder, net.classifier, net.projector
        self.recreate, self.tuning, self.head = net.recreate, net.tuning, net.head
        self.frozen_statistics = net.frozen_statistics
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(net, name), persistent=False)
        self.stage, self.generator = stage, generator

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor | None = None, generate: bool = False
    ) -> Outputs | tuple[Outputs, Made]:
        """With labels (B,), also what the generator made; outputs are then of B + M rows."""
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
    """The name of a timm backbone's last stage and the channels of the maps that it takes. Raises ValueError where
    there is no stage with weights over maps of (channels, height, width)."""
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
        raise ValueError(
            "rsg adds to the feature maps before a backbone's last stage, and this one has no stage that takes maps of "
            "(channels, height, width): use a ResNet, a ConvNeXt or another convolutional net in stages"
        )
    return name, seen[0][1]


class Rsg(Method):
    net: RsgNet
    epoch_changes_host = True
    static_shapes = False  # batches grow by the images that are made
    counts: Tensor
    margins: Tensor
    weights: Tensor

    def __init__(self, net: Net, counts: Tensor, config: RsgConfig) -> None:
        """counts: (K,) training images of each class. Raises ValueError where the backbone has no last stage of maps.

        As the authors train, but for L_MV's vectors, which are those of a pixel's channels here (theirs are cut out of
        the flattened map), and for weight decay, which moves T and the pair classifier also where they do not train."""
        stage, channels = last_stage(net.encoder)
        net.drop_projector()
        if config.loss == "ldam":
            replace_classifier(net, Cosine(net.classifier.in_features, len(counts), config.scale))
        head = torch.zeros(len(counts), dtype=torch.bool)
        head[counts.argsort(descending=True, stable=True)[: max(int(len(counts) * config.head_classes), 1)]] = True
        super().__init__(RsgNet(net, stage, Generator(channels, head, config)), config)
        self.reweighted = self.generate = False
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("margins", ldam_margins(counts, config.margin), persistent=False)
        self.register_buffer("weights", balanced_weights(counts, config.beta), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch: images are made, and classes weighted, after their fractions of the run."""
        self.generate = epoch >= self.config.generate_from * epochs
        self.reweighted = epoch >= self.config.reweight_from * epochs

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: image (B, 1, 3, H, W), label (B,). Returns loss (scalar), logits (B, K) and the loss's parts."""
        config, labels = self.config, batch["label"]
        (_, logits, _), made = self.net(batch["image"][:, 0], labels, self.generate)
        if config.loss == "ldam":
            weights = self.weights if self.reweighted else None
            classification = ldam(logits / config.scale, made.labels, self.margins, config.scale, weights)
        else:
            classification = F.cross_entropy(at_least_float32(logits), made.labels)
        return {
            "loss": classification + config.center_weight * made.center_loss + config.vector_weight * made.vector_loss,
            "logits": logits[: len(labels)],
            "loss_classification": classification.detach(),
            "loss_centers": made.center_loss.detach(),
            "loss_vectors": made.vector_loss.detach(),
        }
