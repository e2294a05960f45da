"""Linear heads over the features of a frozen net, fitted in seconds.

Shapes: M rows of F features, K classes. Rows come in chunks, so memory grows with K * F and not with M * K. Every head
is fitted over standardised features and folded into a plain linear layer over the features as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rescom_timm import losses

RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Of the mean loss + ridge / 2 |W|^2 over standardised features, the strongest first."""
TAUS = (1.0, 0.75, 1.25, 0.5, 1.5)
"""Of logit adjustment, the theoretical one first (Menon et al. 2021, eq. 9)."""
STEPS, TOLERANCE = 100, 1e-4
"""Most iterations of L-BFGS, and the largest gradient at its end: scikit-learn's."""


class Rows(Protocol):
    """Chunks of (features (m, F), labels (m,)), the same each time; `length` rows in all."""

    length: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class Head(NamedTuple):
    """A linear classifier: weight (K, F), bias (K,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (M, K) of features (M, F)."""
        return F.linear(features, self.weight.to(features), self.bias.to(features))

    def scaled(self, factor: float) -> Head:
        """With all logits times the factor, which changes no ranking."""
        return Head(self.weight * factor, self.bias * factor)

    def state(self) -> dict[str, Tensor]:
        """As the classifier of a net's weights, on the CPU."""
        return {"classifier.weight": self.weight.cpu(), "classifier.bias": self.bias.cpu()}


class Standard(NamedTuple):
    """Mean and deviation (F,) of each feature, float64."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features (M, F) of mean 0 and deviation 1."""
        return (features - self.mean.to(features)) / self.deviation.to(features)

    def folded(self, head: Head) -> Head:
        """The head over features as they are that equals `head` over standardised ones."""
        weight = head.weight.double() / self.deviation
        bias = head.bias.double() - weight @ self.mean
        return Head(weight.to(head.weight), bias.to(head.bias))

    def unfolded(self, head: Head) -> Head:
        """The opposite of `folded`."""
        weight = head.weight.double() * self.deviation
        bias = head.bias.double() + head.weight.double() @ self.mean
        return Head(weight.to(head.weight), bias.to(head.bias))


def standard(rows: Rows) -> Standard:
    """Mean and deviation of the rows; a feature that never changes has deviation 1."""
    mean = sum((features.double().sum(dim=0) for features, _ in rows), torch.zeros(())) / rows.length
    squares = ((features.double() - mean).square().sum(dim=0) for features, _ in rows)
    deviation = (sum(squares, torch.zeros(())) / rows.length).sqrt()
    return Standard(mean, torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.ones_like(deviation)))


def softmax_regression(
    rows: Rows, offset: Tensor, ridge: float, scale: Standard, start: Head | None = None, tolerance: float = TOLERANCE
) -> Head:
    """The head that minimises the mean of cross_entropy(W x + b + offset) + ridge / 2 |W|^2 over standardised x.

    offset: (K,) added to the logits in training alone: the log prior for Balanced Softmax (Ren et al. 2020, arXiv
    2007.10740, eq. 3), zeros for plain logistic regression. start: a head over standardised features to begin from.
    Returns a head over standardised features.
    """
    first, _ = next(iter(rows))
    width, classes = first.shape[1], len(offset)
    flat = first.new_zeros(classes * (width + 1))
    if start is not None:
        flat = torch.cat([start.weight.flatten(), start.bias])
    flat.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [flat],
        max_iter=STEPS,
        history_size=10,
        tolerance_grad=tolerance,
        tolerance_change=1e-5 * tolerance,
        line_search_fn="strong_wolfe",
    )
    offset = offset.to(first)

    @torch.no_grad()
    def loss() -> Tensor:
        weight, bias = flat[: classes * width].view(classes, width), flat[classes * width :]
        total, toward, shift, count = flat.new_zeros(()), ridge * weight, torch.zeros_like(bias), rows.length
        for features, labels in rows:
            x = scale(features)
            logs = F.linear(x, weight, bias + offset).log_softmax(dim=1)
            total += F.nll_loss(logs, labels, reduction="sum")
            slope = logs.exp_()
            slope[torch.arange(len(labels), device=labels.device), labels] -= 1
            toward.addmm_(slope.T, x, alpha=1 / count)
            shift += slope.sum(dim=0) / count
        flat.grad = torch.cat([toward.flatten(), shift])
        return total / count + ridge / 2 * weight.square().sum()

    optimizer.step(loss)
    found = flat.detach()
    return Head(found[: classes * width].view(classes, width).clone(), found[classes * width :].clone())


def class_means(rows: Rows, classes: int, scale: Standard) -> Head:
    """The nearest class mean by cosine, over standardised features.

    The cosine's division by the feature's length changes no ranking: its mean is put into the weights, so that logits
    are the cosines times 1 for a feature of mean length. Classes without rows have zeros.
    """
    sums: Tensor | None = None
    length = 0.0
    for features, labels in rows:
        x = scale(features)
        if sums is None:
            sums = torch.zeros(classes, x.shape[1], dtype=torch.float64, device=x.device)
        sums.index_add_(0, labels, x.double())
        length += float(x.norm(dim=1).sum())
    assert sums is not None
    weight = F.normalize(sums, dim=1) * rows.length / length
    first, _ = next(iter(rows))
    return Head(weight.to(first), first.new_zeros(classes))


def adjusted(head: Head, counts: Tensor, tau: float) -> Head:
    """Logit adjustment after the fit: b - tau log pi (Menon et al. 2021, arXiv 2007.07314, eq. 9)."""
    return Head(head.weight, head.bias - tau * losses.log_prior(counts).to(head.bias))


def temperature(logits: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0) -> float:
    """Return T by which logits (M, K) are divided so that their mean negative log-likelihood is least.

    Guo et al. 2017, arXiv 1706.04599. weights: (M,) of the rows; None: all alike. smoothing: of the labels. Within 0.01
    to 100.
    """
    logits = logits.double()
    own = (1 - smoothing) * logits.gather(1, labels[:, None])[:, 0] + smoothing * logits.mean(dim=1)
    share = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()

    def slope(log_factor: float) -> float:
        chance = (logits * math.exp(log_factor)).softmax(dim=1)
        return float((share * ((chance * logits).sum(dim=1) - own)).sum())

    low, high = -4.6, 4.6  # the loss is convex in the factor: its slope changes sign once
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


Fitted = Callable[[Rows, Tensor, Standard], Sequence[Head]]
"""From rows, class counts (K,) and their standard to heads over standardised features, one for each setting."""


def probes(rows: Rows, counts: Tensor, scale: Standard) -> list[Head]:
    """Balanced Softmax regression at each of RIDGES; each starts from the one before."""
    return _path(rows, losses.log_prior(counts), scale)


def logistic(rows: Rows, counts: Tensor, scale: Standard) -> list[Head]:
    """Logistic regression at each of RIDGES, adjusted by each of TAUS."""
    path = _path(rows, torch.zeros(len(counts)), scale)
    return [adjusted(head, counts, tau) for head in path for tau in TAUS]


def means(rows: Rows, counts: Tensor, scale: Standard) -> list[Head]:
    """Class means alone."""
    return [class_means(rows, len(counts), scale)]


def named(class_features: Tensor) -> Fitted:
    """Return a fit whose head takes cosines to class features (K, F), as of class names in CLIP's space.

    It has the cosine's division as in `class_means`; nothing is fitted. Its soup with the net trained from it is
    WiSE-FT.
    """

    def fit(rows: Rows, counts: Tensor, scale: Standard) -> list[Head]:
        length = sum(float(features.norm(dim=1).sum()) for features, _ in rows) / rows.length
        first, _ = next(iter(rows))
        weight = F.normalize(class_features.to(first), dim=1) / length
        return [scale.unfolded(Head(weight, weight.new_zeros(len(weight))))]

    return fit


def _path(rows: Rows, offset: Tensor, scale: Standard) -> list[Head]:
    found: list[Head] = []
    for ridge in RIDGES:
        found.append(softmax_regression(rows, offset, ridge, scale, found[-1] if found else None))
    return found


KINDS: dict[str, tuple[str, Fitted]] = {
    "probe": ("Balanced Softmax regression over the frozen net", probes),
    "class means": ("nearest mean of standardised features", means),
    "logistic regression": ("logistic regression with logit adjustment", logistic),
}
"""Heads over a frozen net, the simplest first: the probe is the default that others have to beat."""
