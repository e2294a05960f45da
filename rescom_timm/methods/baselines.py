"""Baselines: the same net, loop and views as ResCom, with a loss on the logits alone.

Shapes: B images of V views, N = V * B, K classes, F features. A classifier that is more than a linear layer replaces
`net.classifier`, so that evaluation, checkpoints and DistributedDataParallel see it; if it is linear in evaluation,
`as_linear` returns that layer, and the net can still be exported as a plain timm model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm import losses
from rescom_timm.errors import InputError
from rescom_timm.methods.base import BaseConfig, ByClass, Method, by_class, stack_views
from rescom_timm.methods.bounds import A_FEW, BELOW_ONE, FOCUS, NOT_NEGATIVE, PART, POSITIVE, check
from rescom_timm.methods.deferred import Deferred, DeferredConfig, balanced_weights
from rescom_timm.models.classifiers import Cosine, full_precision, linear
from rescom_timm.models.net import Net

Views = Literal[1, 2]


@dataclass(frozen=True)
class CrossEntropyConfig(BaseConfig):
    """Cross-entropy, with label smoothing if asked for."""

    name: Literal["cross_entropy"] = "cross_entropy"
    views: Views = 1
    """Augmented views of each image in a batch; 2 costs as much as ResCom."""
    label_smoothing: float = 0.0
    weights: ByClass = field(default_factory=dict)
    """Weights of classes by name, 1 for the others. The loss is the weighted mean, sum(w_y L) / sum(w_y)."""

    def __post_init__(self) -> None:
        check(self, label_smoothing=BELOW_ONE)

    long_tailed: ClassVar[bool] = True


@dataclass(frozen=True)
class BalancedSoftmaxConfig(BaseConfig):
    """Balanced Softmax (Ren et al. 2020, arXiv 2007.10740)."""

    name: Literal["balanced_softmax"] = "balanced_softmax"
    views: Views = 1
    """Augmented views of each image in a batch; 2 is Siamese Balanced Softmax (eq. 6)."""
    label_smoothing: float = 0.0
    weights: ByClass = field(default_factory=dict)
    """Weights of classes by name, 1 for the others. The loss is the weighted mean, sum(w_y L) / sum(w_y)."""

    def __post_init__(self) -> None:
        check(self, label_smoothing=BELOW_ONE)


@dataclass(frozen=True)
class FocalConfig(BaseConfig):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5)."""

    name: Literal["focal"] = "focal"
    views: Views = 1
    gamma: float = 2.0
    """Power of 1 - p_y; 0 is cross-entropy."""
    alpha: float | ByClass = 1.0
    """alpha_y: one factor of the loss, or one by class name, 1 for the others. Unlike weights it is not normalised."""
    weights: ByClass = field(default_factory=dict)
    """Weights of classes by name, 1 for the others. The loss is the weighted mean, sum(w_y L) / sum(w_y)."""

    def __post_init__(self) -> None:
        check(self, gamma=FOCUS)
        if isinstance(self.alpha, float | int):
            check(self, alpha=POSITIVE)

    long_tailed: ClassVar[bool] = True


@dataclass(frozen=True)
class ClassBalancedConfig(BaseConfig):
    """Class-balanced loss (Cui et al. 2019, arXiv 1901.05555, eq. 6): weights 1 / E_k that sum to K."""

    name: Literal["class_balanced"] = "class_balanced"
    views: Views = 1
    beta: float = 0.9999
    """Of the effective number of images E_k."""
    gamma: float = 0.0
    """Of the focal loss that is weighted, over the softmax; 0 is cross-entropy. The authors' focal loss sums over
    the K sigmoids instead, which needs a classifier that starts at their prior; it is not here."""
    weights: ByClass = field(default_factory=dict)
    """Weights v of classes by name, 1 for the others. The loss is sum(v_y w_y L) / sum(v_y), with w_k of E_k."""

    def __post_init__(self) -> None:
        check(self, beta=BELOW_ONE, gamma=FOCUS)

    @property
    def long_tailed(self) -> bool:
        """True if all weights are equal."""
        return self.beta == 0


@dataclass(frozen=True)
class LdamConfig(DeferredConfig):
    """LDAM with deferred re-weighting (Cao et al. 2019, arXiv 1906.07413, eqs. 12 and 13, algorithm 1)."""

    name: Literal["ldam"] = "ldam"
    views: Views = 1
    margin: float = 0.5
    """Margin of the rarest class."""
    scale: float = 30.0
    """s, by which cosines are multiplied."""
    reweight_from: float = 0.8
    """Fraction of the epochs after which classes are weighted; 1: never. The authors: epoch 160 of 200."""
    beta: float = 0.9999
    """Of the effective number of images in those weights."""
    weights: ByClass = field(default_factory=dict)
    """Weights of classes by name, as of cross_entropy; from `reweight_from` on they multiply those of E_k."""

    def __post_init__(self) -> None:
        check(self, margin=NOT_NEGATIVE, scale=POSITIVE, reweight_from=PART, beta=BELOW_ONE)


@dataclass(frozen=True)
class LogitAdjustmentConfig(BaseConfig):
    """Logit adjustment (Menon et al. 2021, arXiv 2007.07314).

    With gamma it is the VS loss (Kini et al. 2021, arXiv 2103.01550); with a second phase, ADRW and TLA over it (Wang
    et al. 2023, arXiv 2310.04752).
    """

    name: Literal["logit_adjustment"] = "logit_adjustment"
    views: Views = 1
    form: Literal["loss", "post_hoc"] = "loss"
    """loss: cross-entropy of s + tau log pi (eq. 10). post_hoc: plain cross-entropy, evaluated as s - tau log pi
    (eq. 9); with from=RUN and train.epochs=0 it adjusts a run that was trained by cross-entropy."""
    tau: float = 1.0
    gamma: float = 0.0
    """Of the VS loss: logits are divided by (N_max / N_k)^gamma; 0 leaves them."""
    reweight_from: float = 1.0
    """Fraction of the epochs before the second phase, in which classes are weighted by pi_k^-nu (deferred re-weighting,
    ADRW), gamma is 0 and tau is tau_late (TLA); 1: there is none. The authors: 0.8."""
    nu: float = 0.0
    tau_late: float | None = None
    """null: tau."""
    weights: ByClass = field(default_factory=dict)
    """Weights of classes by name, as of cross_entropy; in the second phase they multiply its own."""

    def __post_init__(self) -> None:
        check(self, tau=NOT_NEGATIVE, gamma=NOT_NEGATIVE, reweight_from=PART, nu=NOT_NEGATIVE, tau_late=NOT_NEGATIVE)
        if self.form == "post_hoc" and (self.gamma or self.reweight_from < 1):
            raise InputError("recipe.conflict", "form: post_hoc supports neither gamma nor reweight_from")

    @property
    def long_tailed(self) -> bool:
        """True if neither phase adjusts anything at the end."""
        late = self.tau if self.reweight_from == 1 or self.tau_late is None else self.tau_late
        return late == 0 and (self.reweight_from == 1 or self.nu == 0)


@dataclass(frozen=True)
class LadeConfig(BaseConfig):
    """LADE (Hong et al. 2021, arXiv 2012.00321, eqs. 15 to 20): Balanced Softmax + alpha * LADER."""

    name: Literal["lade"] = "lade"
    label_smoothing: ClassVar[float] = 0.0
    views: Views = 1
    alpha: float = 0.1
    regularization: float = 0.1
    """lambda of eq. 15. The authors': 0.01 for CIFAR-100-LT, 0.1 for Places-LT, 0.5 for ImageNet-LT."""
    weights: ByClass = field(default_factory=dict)
    """Weights of classes by name, 1 for the others: sum(w_y L) / sum(w_y) + alpha * LADER, L of Balanced Softmax."""

    def __post_init__(self) -> None:
        check(self, alpha=NOT_NEGATIVE, regularization=NOT_NEGATIVE)


@dataclass(frozen=True)
class CausalNormConfig(BaseConfig):
    """De-confounded training, total direct effect at inference (Tang et al. 2020, arXiv 2009.12991, eqs. 7 and 8)."""

    name: Literal["causal_norm"] = "causal_norm"
    label_smoothing: ClassVar[float] = 0.0
    views: Views = 1
    heads: int = 2
    """Equal parts into which features and class vectors are cut."""
    tau: float = 16.0
    gamma: float = 0.03125
    alpha: float = 1.0
    """How much of the effect along the mean feature is removed at inference; 0 leaves the normalised classifier."""
    momentum: float = 0.9
    """Of the mean feature: that of the optimizer. Constant, as the authors' for CIFAR; for larger data sets theirs
    comes nearer to 1 as the learning rate falls, which mostly scales the mean, of which only the direction counts."""
    weights: ByClass = field(default_factory=dict)
    """Weights of classes by name, 1 for the others. The loss is the weighted mean, sum(w_y L) / sum(w_y)."""

    def __post_init__(self) -> None:
        check(self, heads=A_FEW, tau=POSITIVE, gamma=NOT_NEGATIVE, alpha=NOT_NEGATIVE)
        check(self, momentum=BELOW_ONE)


# ------------------------------------------------------------------------------------------------------- classifiers


def replace_classifier(net: Net, head: nn.Linear) -> None:
    """Replace the net's classifier by `head`, which takes over the weights of the same names."""
    head.load_state_dict(net.classifier.state_dict(), strict=False)
    net.classifier = head.to(net.classifier.weight)


class Adjusted(nn.Linear):
    """A linear classifier whose logits in evaluation are s - tau log pi (Menon et al. 2021, eq. 9)."""

    adjustment: Tensor

    def __init__(self, in_features: int, adjustment: Tensor) -> None:
        """adjustment: (K,) tau log pi."""
        super().__init__(in_features, len(adjustment))
        self.register_buffer("adjustment", adjustment.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K)."""
        logits = super().forward(x)
        return logits if self.training else logits - self.adjustment

    def as_linear(self) -> nn.Linear:
        """A linear layer of the same logits in evaluation."""
        return linear(self.weight, self.bias - self.adjustment)


class CausalNorm(nn.Linear):
    """Normalised classifier of several heads; in evaluation without the effect of the mean training feature d.

    y_k = tau / H sum over heads of w_k.x / ((|w_k| + gamma) |x|)                                  (training, eq. 7)
        - alpha cos(x, d) w_k.d / ((|w_k| + gamma) |d|)                                          (evaluation, eq. 8)
    """

    mean: Tensor
    seen: Tensor

    def __init__(self, in_features: int, out_features: int, config: CausalNormConfig) -> None:
        """Raises InputError if config.heads does not divide the features."""
        if in_features % config.heads:
            raise InputError("method.value", f"heads ({config.heads}) must divide the {in_features} features")
        super().__init__(in_features, out_features, bias=False)
        self.config = config
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("seen", torch.zeros(in_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K)."""
        config = self.config
        with full_precision(x):
            x = losses.at_least_float32(x)
            if self.training:
                self.seen += x.detach().mean(dim=0)
            w = self.weight.unflatten(1, (config.heads, -1))  # (K, H, F / H)
            w = w / (w.norm(dim=2, keepdim=True) + config.gamma)
            x = F.normalize(x.unflatten(1, (config.heads, -1)), dim=2)  # (N, H, F / H)
            if not self.training:
                d = F.normalize(self.mean.unflatten(0, (config.heads, -1)), dim=1)
                x = x - config.alpha * (x * d).sum(dim=2, keepdim=True) * d
            return config.tau / config.heads * torch.einsum("nhf,khf->nk", x, w)

    @torch.no_grad()
    def step(self) -> None:
        """Update the mean feature, once an optimizer step, like that step's momentum."""
        self.mean.mul_(self.config.momentum).add_(self.seen)
        self.seen.zero_()


# ----------------------------------------------------------------------------------------------------------- methods


class Classification(Method):
    """A net trained by a loss on its logits alone (`loss`), without a projector."""

    counts: Tensor
    per_image = True

    def __init__(self, net: Net, counts: Tensor, config: BaseConfig) -> None:
        """counts: (K,) training images of each class. config: the method's own."""
        net.drop_projector()
        super().__init__(net, config)
        self.views = self.config.views
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss (scalar) and logits (V * B, K).

        batch: image (B, V, 3, H, W), label (B,); for mixed images also partner (B,), the partners' labels, and share, a
        scalar, the weight of the own labels.
        """
        _, logits, _ = self.net(stack_views(batch["image"]))
        loss = self.weighted(logits, batch["label"].repeat(self.views))
        if "partner" in batch:
            share = batch["share"]
            loss = share * loss + (1 - share) * self.weighted(logits, batch["partner"].repeat(self.views))
        return {"loss": loss, "logits": logits}

    def weighted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, or its mean with the class weights, if there are any."""
        if self.class_weights is None:
            return self.loss(logits, labels)
        rows = self.loss(logits, labels, reduction="none")  # type: ignore[call-arg]
        return losses.weighted_mean(rows, self.class_weights[labels])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits: (N, K). labels: (N,). Returns a scalar, the mean over N.

        A method whose config has `weights` takes reduction="none" too, for the losses of the rows, (N,).
        """
        raise NotImplementedError


class CrossEntropy(Classification):
    """Cross-entropy."""

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy with label smoothing."""
        smoothing = self.config.label_smoothing
        logits = losses.at_least_float32(logits)
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)


class BalancedSoftmax(Classification):
    """Balanced Softmax, over two views Siamese Balanced Softmax."""

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of s + log N_k."""
        return losses.balanced_softmax(logits, labels, self.counts, self.config.label_smoothing, reduction)


class Focal(Classification):
    """Focal loss."""

    alpha: Tensor | None

    def __init__(self, net: Net, counts: Tensor, config: FocalConfig) -> None:
        super().__init__(net, counts, config)
        self.register_buffer("alpha", None, persistent=False)

    def set_classes(self, names: Sequence[str]) -> None:
        """Called before training: alpha of each class."""
        super().set_classes(names)
        given = self.config.alpha
        if given != 1:
            given = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
            self.alpha = by_class(given, names, "alpha")

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Focal loss with the factors alpha."""
        return losses.focal(logits, labels, self.config.gamma, self.alpha, reduction)


class ClassBalanced(Classification):
    """Class-balanced loss."""

    weights: Tensor

    def __init__(self, net: Net, counts: Tensor, config: ClassBalancedConfig) -> None:
        super().__init__(net, counts, config)
        self.register_buffer("weights", balanced_weights(counts, config.beta), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Focal loss with weights from the effective number of images."""
        return losses.focal(logits, labels, self.config.gamma, self.weights, reduction)


class Ldam(Classification, Deferred):
    """LDAM over a cosine classifier, with deferred re-weighting."""

    def __init__(self, net: Net, counts: Tensor, config: LdamConfig) -> None:
        super().__init__(net, counts, config)
        replace_classifier(net, Cosine(net.classifier.in_features, len(counts), config.scale))
        self.add_margins(counts)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """LDAM, weighted by class names, and from `reweight_from` on by their frequencies."""
        scale = self.config.scale
        return losses.ldam(logits / scale, labels, self.margins, scale, self.current_weights)

    weighted = loss  # it has the weights itself


class LogitAdjustment(Classification):
    """Logit adjustment, in the loss or after training, and the VS loss."""

    weights: Tensor
    late: Tensor

    def __init__(self, net: Net, counts: Tensor, config: LogitAdjustmentConfig) -> None:
        super().__init__(net, counts, config)
        if config.form == "post_hoc":
            adjustment = config.tau * losses.log_prior(counts)
            replace_classifier(net, Adjusted(net.classifier.in_features, adjustment))
        self.register_buffer("weights", losses.inverse_power_weights(counts, config.nu), persistent=False)
        self.register_buffer("late", torch.tensor(False), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch: the second phase starts after its fraction of the run."""
        self.late.fill_(epoch >= self.config.reweight_from * epochs)

    def set_classes(self, names: Sequence[str]) -> None:
        """Called before training: class weights apply in the second phase too."""
        super().set_classes(names)
        if self.class_weights is not None:
            self.weights = self.weights * self.class_weights.to(self.weights.device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of s_k / D_k + tau log pi_k, or of s in the form post_hoc."""
        config, weights = self.config, self.class_weights
        if config.form == "post_hoc":
            return losses.logit_adjustment(logits, labels, self.counts, 0.0, weights=weights)
        first = losses.logit_adjustment(logits, labels, self.counts, config.tau, config.gamma, weights)
        if config.reweight_from == 1:
            return first
        tau = config.tau if config.tau_late is None else config.tau_late
        second = losses.logit_adjustment(logits, labels, self.counts, tau, weights=self.weights)
        return torch.where(self.late, second, first)  # no host synchronisation

    weighted = loss  # it has the weights itself


class Lade(BalancedSoftmax):
    """LADE."""

    per_image = False  # the regularizer is of the batch

    def weighted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Balanced Softmax, with the class weights if there are any, + alpha * LADER."""
        regularizer = losses.lader(logits, labels, self.counts, self.config.regularization)
        return super().weighted(logits, labels) + self.config.alpha * regularizer


class CausalNormalized(CrossEntropy):
    """Cross-entropy over the classifier CausalNorm."""

    def __init__(self, net: Net, counts: Tensor, config: CausalNormConfig) -> None:
        super().__init__(net, counts, config)
        self.head = (CausalNorm(net.classifier.in_features, len(counts), config),)  # a tuple: it is the net's module
        replace_classifier(net, self.head[0])

    def after_step(self) -> None:
        """Update the mean feature."""
        self.head[0].step()
