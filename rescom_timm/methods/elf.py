"""ELF: early exits by which easy images leave, so that hard ones dominate the loss of later layers.

Duggal et al. 2020, arXiv 2006.11979. Shapes: B images of V views, N of a forward pass, E exits (the last is the net's
end), K classes, F features. Built from the paper's abstract, as no code of the authors is known: the position of the
exits, their layers, the threshold and the sum of the exits' losses are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.errors import InputError
from rescom_timm.losses import less_margins, weighted_mean
from rescom_timm.methods.base import stack_views
from rescom_timm.methods.bounds import A_FEW, BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, check
from rescom_timm.methods.deferred import Deferred, DeferredConfig
from rescom_timm.models.branched import Remade, agrees
from rescom_timm.models.classifiers import Cosine
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class ElfConfig(DeferredConfig):
    """Early exits with LDAM.

    In training an image leaves at the first exit that is right and above the threshold, and adds the LDAM loss of that
    exit and of all before it; in evaluation the first exit above the threshold classifies it.
    """

    name: Literal["elf"] = "elf"
    views: Literal[1, 2] = 1
    exits: int = 2
    """Early exits, one behind each of so many stages before the last: the mean of the stage's map, a cosine classifier.
    Of a ResNet-32 behind layer1 and layer2, of a ResNet-50 behind layer2 and layer3."""
    threshold: float = 0.9
    """Probability of the likeliest class from which an exit is sure enough."""
    margin: float = 0.5
    scale: float = 30.0
    reweight_from: float = 0.8
    """Fraction of the epochs after which classes are weighted; 1: never."""
    beta: float = 0.9999

    def __post_init__(self) -> None:
        check(self, exits=A_FEW, threshold=PART, margin=NOT_NEGATIVE, scale=POSITIVE)
        check(self, reweight_from=PART, beta=BELOW_ONE)


class ElfOutputs(NamedTuple):
    """Features (N, F) of the net's end, logits (N, K) of the exit where each image leaves, and of each exit."""

    features: Tensor
    logits: Tensor
    embeddings: Tensor
    exits: Tensor


class ElfNet(Remade):
    """A Net with classifiers after earlier stages too. All exits are computed for all images of a batch."""

    costs: Tensor

    def __init__(self, net: Net, config: ElfConfig) -> None:
        """Raises InputError for a backbone with too few stages, or of which timm gives no feature maps."""
        super().__init__(net)
        stages = len(getattr(net.encoder, "feature_info", ()))
        if not agrees(net.encoder, lambda images: self._run(images, [0])[0]):
            raise InputError(
                "net.unsupported",
                "method elf needs the backbone's stages (timm's forward_intermediates): use a ResNet, a ConvNeXt or a "
                "ViT",
            )
        if config.exits >= stages:
            raise InputError("method.value", f"exits must be at most {stages - 1}: the backbone has {stages} stages")
        self.stages = list(range(stages - 1 - config.exits, stages - 1))
        self.threshold = config.threshold
        widths, costs = self._measure()
        classes, width = net.classifier.out_features, net.classifier.in_features
        self.exits = nn.ModuleList(Cosine(own, classes, config.scale) for own in widths)
        self.classifier = Cosine(width, classes, config.scale)
        self.register_buffer("costs", torch.tensor([*costs, 1.0]), persistent=False)

    @torch.no_grad()
    def _measure(self) -> tuple[list[int], list[float]]:
        """Channels of each early exit's map, and the fraction of the encoder's operations up to it."""
        from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

        encoder: Any = self.encoder
        images, training = torch.zeros(1, *encoder.pretrained_cfg["input_size"]), encoder.training
        encoder.eval()
        widths, operations = [], []
        for until in [*([stage] for stage in self.stages), None]:
            with FlopCounterMode(display=False) as counter:
                if until is None:
                    encoder(images)
                else:
                    early = {"stop_early": True, "intermediates_only": True}
                    widths.append(encoder.forward_intermediates(images, indices=until, **early)[0].shape[1])
            operations.append(counter.get_total_flops())
        encoder.train(training)
        return widths, [one / operations[-1] for one in operations[:-1]]

    def _run(self, images: Tensor, stages: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Features (N, F) and the maps (N, C, H, W) of these stages."""
        encoder: Any = self.encoder
        end, maps = encoder.forward_intermediates(images, indices=stages)
        return encoder.forward_head(end, pre_logits=True), maps

    def forward(self, images: Tensor) -> ElfOutputs:  # type: ignore[override]
        """Outputs of images (N, 3, H, W)."""
        features, maps = self._run(self.normalize(images), self.stages)
        early = [head(own.mean(dim=(2, 3))) for head, own in zip(self.exits, maps, strict=True)]
        exits = torch.stack([*early, self.classifier(features)])
        chosen = self.left(exits)[None, :, None].expand(1, -1, exits.shape[2])
        embeddings = self.projector(features)
        return ElfOutputs(features, exits.gather(0, chosen)[0], embeddings, exits)

    def left(self, exits: Tensor) -> Tensor:
        """The exit (N,) by which each image leaves in evaluation. exits: (E, N, K) logits."""
        sure = (exits.softmax(dim=2).amax(dim=2) >= self.threshold).to(exits.dtype)
        sure[-1] = 1
        return sure.argmax(dim=0)

    def classify(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self(images).logits

    def to_timm(self) -> nn.Module:
        """Raises InputError."""
        raise InputError("net.export", "a net with early exits is not a plain timm model, so it cannot be exported")


class Elf(Deferred):
    """Sum of the LDAM losses of all exits that an image reaches."""

    net: ElfNet

    def __init__(self, net: Net, counts: Tensor, config: ElfConfig) -> None:
        """counts: (K,) training images of each class. Raises InputError if the backbone has no such stages."""
        super().__init__(ElfNet(net, config), config)
        self.plain = (self.net,)  # a tuple: the net as it is under what is wrapped around it
        self.views = config.views
        self.add_margins(counts)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar), logits (V * B, K), stayed and flops_saved. batch: image (B, V, 3, H, W), label (B,).

        stayed: percent of images that reach the net's end in training. flops_saved: percent of the encoder's operations
        that early exits would save in evaluation.
        """
        outputs = self.net(stack_views(batch["image"]))
        labels, config = batch["label"].repeat(self.views), self.config
        stayed = still_in(outputs.exits, labels, config.threshold)
        cosines = [less_margins(own / config.scale, labels, self.margins) for own in outputs.exits]
        each = torch.stack([F.cross_entropy(config.scale * own, labels, reduction="none") for own in cosines])
        weights = self.weights.to(each.dtype)[labels] if self.reweighted else torch.ones_like(each[0])
        costs = self.plain[0].costs[self.plain[0].left(outputs.exits)]
        return {
            "loss": weighted_mean((stayed * each).sum(dim=0), weights),
            "logits": outputs.logits,
            "stayed": 100 * stayed[-1].mean(),
            "flops_saved": 100 * (1 - costs.mean()),
        }


@torch.no_grad()
def still_in(exits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """1 for the exits that an image reaches, (E, N): no exit before was right and above the threshold.

    exits: (E, N, K) logits. labels: (N,).
    """
    confidence, predicted = exits.softmax(dim=2).max(dim=2)
    leaves = (predicted == labels) & (confidence >= threshold)
    stays = (~leaves[:-1]).to(exits.dtype).cumprod(dim=0)
    return torch.cat([torch.ones_like(stays[:1]), stays])
