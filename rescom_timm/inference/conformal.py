"""Prediction sets that contain the true class with a stated probability.

Split conformal prediction with the least ambiguous sets (Sadinle, Lei & Wasserman 2019, arXiv 1609.00451): a class k is
in the set of x where 1 - p(k | x) <= q, and q is the ceil((n + 1) c)-th smallest of 1 - p(y_i | x_i) over n labelled
images that were not trained on. For images drawn as those were, whatever the model, P(y in the set) >= c.

Prevalence-adjusted sets (PAS) have the score -p(y | x) / pi_y in place of 1 - p(y | x), where pi are the class
frequencies of those images and p = softmax(s / T + log pi) (Ding et al. 2025, arXiv 2507.06867): the same guarantee
over all images, and a larger coverage of rare classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rescom_timm.errors import InputError
from rescom_timm.metrics import LIMITS, Limits, groups

Kind = Literal["marginal", "prevalence"]
COVERAGES = (0.8, 0.9, 0.95, 0.99)
"""Coverages of the sets that an export keeps."""


@dataclass(frozen=True, eq=False)
class PredictionSets:
    """Thresholds of prediction sets for K classes."""

    coverage: float
    thresholds: Tensor
    """(K,): q of each class."""
    guarantee: str
    """The guarantee in words: the number of calibration images, and the groups without a guarantee."""
    prior: Tensor | None = None
    """(K,): pi of prevalence-adjusted sets; None: ones."""
    temperature: float = 1.0
    shift: Tensor | None = None
    """(K,): the probabilities are softmax(s / temperature + shift) of the net's logits s, whatever prior and
    temperature predict has; None: those of predict."""

    def of_logits(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """`of` the net's logits (N, K), or of the probabilities (N, K) of predict."""
        if self.shift is None:
            return self.of(probabilities)
        return self.of((logits / self.temperature + self.shift.to(logits)).softmax(dim=1))

    def of(self, probabilities: Tensor) -> Tensor:
        """Which classes are in the sets, bool (N, K), for probabilities (N, K).

        The class of the best score, the most probable one or the largest p / pi, is always in, which only adds to the
        coverage.
        """
        probabilities = probabilities.double()
        inside = 1 - probabilities <= self.thresholds.to(probabilities.device)
        score = probabilities if self.prior is None else probabilities / self.prior.to(probabilities)
        return inside.scatter(1, score.argmax(dim=1, keepdim=True), True)


def calibrated(
    probabilities: Tensor,
    labels: Tensor,
    coverage: float,
    counts: Sequence[int] | Tensor | None = None,
    limits: Limits = LIMITS,
    prior: Tensor | None = None,
) -> PredictionSets:
    """Prediction sets from the probabilities (N, K) and labels (N,) of images that the net was not trained on.

    counts: (K,) training images of each class, for a separate threshold of each group many, medium and few: the
    coverage then holds for the images of each group, whatever the groups' frequencies are later. A group with fewer
    than c / (1 - c) images takes the common threshold without a guarantee, which `guarantee` states. Raises InputError:
    predict.value for a coverage outside of (0, 1), predict.calibration for fewer than c / (1 - c) images in all.
    limits: of the groups. prior: (K,) the class frequencies that the probabilities are for: prevalence-adjusted sets.
    """
    if not 0 < coverage < 1:
        raise InputError("predict.value", f"coverage must be between 0 and 1, such as 0.9, not {coverage:g}")
    pi = torch.ones(probabilities.shape[1], dtype=torch.float64) if prior is None else prior.double().clamp(min=1e-12)
    scores = -probabilities.double().gather(1, labels[:, None]).flatten() / pi[labels]
    common, least = order_statistic(scores, coverage), needed(coverage)
    if common is None:
        message = f"a coverage of {coverage:g} needs at least {least} labelled images; there are {len(scores)}"
        raise InputError("predict.calibration", message)
    sets = with_threshold(coverage, common, pi, len(scores))
    if counts is not None:
        thresholds, parts = sets.thresholds, []
        for name, classes in groups(counts, limits).items():
            own = scores[torch.isin(labels, classes)]
            threshold = order_statistic(own, coverage)
            if threshold is None:
                parts.append(f"{name} not guaranteed ({len(own)} images, {least} are needed)")
            else:
                thresholds[classes] = 1 + threshold * pi[classes]
                parts.append(f"{name} on {len(own)}")
        guarantee = f"coverage {coverage:g} within each group: {', '.join(parts)}"
        return PredictionSets(coverage, thresholds, guarantee, sets.prior)
    return sets


def with_threshold(coverage: float, threshold: float, prior: Tensor, images: int) -> PredictionSets:
    """Sets of one threshold of the score -p / prior, from so many images. prior: (K,), ones for marginal sets."""
    guarantee = f"coverage {coverage:g} over all images, calibrated on {images}"
    return PredictionSets(coverage, 1 + threshold * prior, guarantee, prior)


def order_statistic(scores: Tensor, coverage: float) -> float | None:
    """The ceil((n + 1) c)-th smallest of n scores, or None where there are too few."""
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return float(scores.sort().values[rank - 1]) if rank <= len(scores) else None


def needed(coverage: float) -> int:
    """Images from which on `order_statistic` has a value."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def population(labels: Tensor, classes: int) -> Tensor:
    """Class frequencies (K,) float64 behind labels (N,), each class counted once more, so that none is 0."""
    counted = torch.bincount(labels, minlength=classes).double() + 1
    return counted / counted.sum()
