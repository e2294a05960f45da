"""Second stages: a trained net with a frozen encoder whose classifier is trained again or rescaled.

The recipe names the run to start from (`from=RUN`). Shapes: N images, K classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rescom_timm import losses
from rescom_timm.errors import InputError
from rescom_timm.methods.base import BaseConfig
from rescom_timm.methods.baselines import Classification, replace_classifier
from rescom_timm.methods.bounds import BELOW_ONE, NOT_NEGATIVE, POSITIVE, check
from rescom_timm.methods.heads import Rows, adjusted, class_means, softmax_regression, standard
from rescom_timm.models.classifiers import linear
from rescom_timm.models.net import Net


@dataclass(frozen=True)
class CrtConfig(BaseConfig):
    """Classifier re-training (cRT, Kang et al. 2020, arXiv 1910.09217); with loader.sampler=class_balanced."""

    name: Literal["crt"] = "crt"
    views: Literal[1] = 1

    long_tailed: ClassVar[bool] = True


@dataclass(frozen=True)
class LwsConfig(BaseConfig):
    """Learnable weight scaling (LWS, Kang et al. 2020, eq. 4); with loader.sampler=class_balanced."""

    name: Literal["lws"] = "lws"
    views: Literal[1] = 1

    long_tailed: ClassVar[bool] = True


@dataclass(frozen=True)
class TauNormConfig(BaseConfig):
    """Tau-normalised classifier (Kang et al. 2020, eq. 3): w_k / |w_k|^tau, no bias. Nothing to train: epochs 0."""

    name: Literal["tau_norm"] = "tau_norm"
    views: Literal[1] = 1
    tau: float = 0.7
    """0 leaves the class vectors as they are, 1 gives them length 1."""

    def __post_init__(self) -> None:
        check(self, tau=NOT_NEGATIVE)

    @property
    def long_tailed(self) -> bool:
        """True if nothing is normalised."""
        return self.tau == 0


@dataclass(frozen=True)
class LasConfig(BaseConfig):
    """Second stage of MiSLAS (Zhong et al. 2021, arXiv 2104.00466); with loader.sampler=class_balanced.

    Label-aware smoothing, learned scale, shifted BatchNorm statistics.
    """

    name: Literal["las"] = "las"
    views: Literal[1] = 1
    head: float = 0.3
    """eps of the most frequent class."""
    tail: float = 0.0
    """eps of the rarest class."""
    form: Literal["concave", "linear", "convex"] = "concave"
    """How eps goes from tail to head with N_k."""
    retain: bool = True
    """Start from the trained class vectors or from new ones."""
    shift_bn: bool = True
    """BatchNorm's running statistics follow the class-balanced batches; its weights stay."""

    def __post_init__(self) -> None:
        if not 0 <= self.tail <= self.head < 1:
            raise InputError("method.value", f"0 <= tail <= head < 1 is needed: tail {self.tail:g}, head {self.head:g}")

    long_tailed: ClassVar[bool] = True


@dataclass(frozen=True)
class LosConfig(BaseConfig):
    """Label over-smoothing (LOS, Sun et al. 2025, ICLR).

    The trained classifier goes on with targets that are almost even, under which the frequencies of the classes no
    longer count.
    """

    name: Literal["los"] = "los"
    views: Literal[1] = 1
    label_smoothing: float = 0.98
    """Share of the target spread evenly over all classes."""

    def __post_init__(self) -> None:
        check(self, label_smoothing=BELOW_ONE)

    @property
    def long_tailed(self) -> bool:
        """True if labels are not smoothed."""
        return self.label_smoothing == 0


@dataclass(frozen=True)
class DisAlignConfig(BaseConfig):
    """Distribution alignment (Zhang et al. 2021, arXiv 2103.16370, eqs. 4 to 11)."""

    name: Literal["disalign"] = "disalign"
    views: Literal[1] = 1
    power: float = 1.5
    """rho: classes are weighted by pi_k^-rho."""

    def __post_init__(self) -> None:
        check(self, power=NOT_NEGATIVE)

    @property
    def long_tailed(self) -> bool:
        """True if classes are not weighted."""
        return self.power == 0


@dataclass(frozen=True)
class ProbeConfig(BaseConfig):
    """A head fitted over the features of the frozen net before training, with nothing left to train: epochs 0."""

    name: Literal["probe"] = "probe"
    views: Literal[1] = 1
    head: Literal["balanced_softmax", "logistic", "class_means"] = "balanced_softmax"
    """Balanced Softmax regression; logistic regression, adjusted afterwards by tau; means of standardised features."""
    ridge: float = 0.1
    """Of the mean loss + ridge / 2 |W|^2, over standardised features."""
    tau: float = 1.0
    """Of the adjustment of logistic regression."""

    def __post_init__(self) -> None:
        check(self, ridge=POSITIVE, tau=NOT_NEGATIVE)

    @property
    def long_tailed(self) -> bool:
        """True if the head is logistic regression without adjustment."""
        return self.head == "logistic" and self.tau == 0


SecondStageConfig = CrtConfig | LwsConfig | TauNormConfig | LasConfig | LosConfig | DisAlignConfig | ProbeConfig


# ------------------------------------------------------------------------------------------------------- classifiers


class Scaled(nn.Linear):
    """Linear classifier with a learned scale of each class: diag(scale) (W x + b)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.class_scale = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K)."""
        return super().forward(x) * self.class_scale

    def as_linear(self) -> nn.Linear:
        """A linear layer of the same logits."""
        return linear(self.weight * self.class_scale[:, None], self.bias * self.class_scale)


class TauNormalized(nn.Linear):
    """Logits x . w_k / |w_k|^tau."""

    def __init__(self, in_features: int, out_features: int, tau: float) -> None:
        super().__init__(in_features, out_features)
        self.tau = tau

    def normalized(self) -> Tensor:
        """Class vectors w_k / |w_k|^tau, (K, F)."""
        return self.weight / self.weight.norm(dim=1, keepdim=True) ** self.tau

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K)."""
        return F.linear(x, self.normalized())

    def as_linear(self) -> nn.Linear:
        """A linear layer of the same logits."""
        return linear(self.normalized(), torch.zeros_like(self.bias))


class Aligned(nn.Linear):
    """Logits sigma(x) (alpha_k s_k + beta_k) + (1 - sigma(x)) s_k (DisAlign, eqs. 4 to 6).

    sigma(x) is the sigmoid of a linear function of x; s are the scores of the linear classifier whose weights it takes
    over.

    As in the authors' code, class_gain is alpha - 1, so that weight decay pulls it to the plain classifier, and starts
    at 1, the weights of sigma at 0.1; scores are then scaled by 1 + sigma(x), which changes no prediction.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.class_gain = nn.Parameter(torch.ones(out_features))
        self.class_shift = nn.Parameter(torch.zeros(out_features))
        self.confidence = nn.Linear(in_features, 1)
        nn.init.constant_(self.confidence.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K)."""
        scores = super().forward(x)
        sigma = self.confidence(x).sigmoid()
        return (1 + sigma * self.class_gain) * scores + sigma * self.class_shift


# ----------------------------------------------------------------------------------------------------------- methods


class SecondStage(Classification):
    """Base class: a frozen encoder, of which only the statistics of the modules in `shifted` change."""

    second_stage = True

    def __init__(self, net: Net, counts: Tensor, config: SecondStageConfig) -> None:
        super().__init__(net, counts, config)
        net.encoder.requires_grad_(False)
        self.frozen = (net.encoder,)  # tuples, because the modules are the net's
        self.shifted: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> SecondStage:
        """Training mode everywhere but in the encoder (no dropout, no batch statistics)."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        for module in self.shifted:
            module.train(mode)
        return self

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(losses.at_least_float32(logits), labels)


class Crt(SecondStage):
    """A new linear classifier."""

    new_classifier = True

    def __init__(self, net: Net, counts: Tensor, config: CrtConfig) -> None:
        super().__init__(net, counts, config)
        net.classifier.reset_parameters()


class Lws(SecondStage):
    """The trained classifier with a learned scale of each class."""

    def __init__(self, net: Net, counts: Tensor, config: LwsConfig) -> None:
        super().__init__(net, counts, config)
        head = Scaled(net.classifier.in_features, len(counts))
        replace_classifier(net, head)
        head.weight.requires_grad_(False)
        head.bias.requires_grad_(False)


class TauNorm(SecondStage):
    """The trained classifier, tau-normalised."""

    def __init__(self, net: Net, counts: Tensor, config: TauNormConfig) -> None:
        super().__init__(net, counts, config)
        head = TauNormalized(net.classifier.in_features, len(counts), config.tau)
        replace_classifier(net, head)
        head.bias.requires_grad_(False)


class Las(SecondStage):
    """Label-aware smoothing over a scaled classifier."""

    smoothing: Tensor

    def __init__(self, net: Net, counts: Tensor, config: LasConfig) -> None:
        super().__init__(net, counts, config)
        if not config.retain:
            net.classifier.reset_parameters()
        replace_classifier(net, Scaled(net.classifier.in_features, len(counts)))
        smoothing = losses.smoothing_by_count(counts, config.head, config.tail, config.form)
        self.register_buffer("smoothing", smoothing, persistent=False)
        if config.shift_bn:
            self.shifted = tuple(m for m in net.encoder.modules() if isinstance(m, _BatchNorm))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Label-aware smoothing."""
        return losses.label_aware_smoothing(logits, labels, self.smoothing)


class Los(SecondStage):
    """The trained classifier, trained further with over-smoothed labels."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with smoothed labels."""
        smoothing = self.config.label_smoothing
        return F.cross_entropy(losses.at_least_float32(logits), labels, label_smoothing=smoothing)


class DisAlign(SecondStage):
    """The trained classifier, aligned by weighted cross-entropy."""

    weights: Tensor

    def __init__(self, net: Net, counts: Tensor, config: DisAlignConfig) -> None:
        super().__init__(net, counts, config)
        head = Aligned(net.classifier.in_features, len(counts))
        replace_classifier(net, head)
        head.weight.requires_grad_(False)
        head.bias.requires_grad_(False)
        self.register_buffer("weights", losses.inverse_power_weights(counts, config.power), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy weighted by inverse powers of the class prior."""
        return losses.weighted_cross_entropy(logits, labels, self.weights)


class Probe(SecondStage):
    """A new linear classifier, fitted to the features of the training images before training."""

    new_classifier = True
    fits_head = True

    def fit_head(self, rows: Rows) -> None:
        """rows: features and labels of the training images."""
        config, counts = self.config, self.counts.cpu()
        scale = standard(rows)
        if config.head == "class_means":
            head = class_means(rows, len(counts), scale)
        elif config.head == "logistic":
            plain = softmax_regression(rows, torch.zeros(len(counts)), config.ridge, scale)
            head = adjusted(plain, counts, config.tau)
        else:
            head = softmax_regression(rows, losses.log_prior(counts), config.ridge, scale)
        weight, bias = scale.folded(head)
        self.net.classifier.load_state_dict({"weight": weight, "bias": bias})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Balanced Softmax."""
        return losses.balanced_softmax(logits, labels, self.counts)
