"""Prediction sets that contain the true class with a stated probability.

Split conformal prediction with the least ambiguous sets (Sadinle, Lei & Wasserman 2019, arXiv 1609.00451): a class k is
in the set of x where 1 - p(k | x) <= q, and q is the ceil((n + 1) c)-th smallest of 1 - p(y_i | x_i) over n labelled
images that were not trained on. For images drawn as those were, whatever the model, P(y in the set) >= c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rescom_timm.errors import InputError
from rescom_timm.metrics import LIMITS, Limits, groups


@dataclass(frozen=True, eq=False)
class PredictionSets:
    """Thresholds of prediction sets for K classes."""

    coverage: float
    thresholds: Tensor
    """(K,): q of each class."""
    guarantee: str
    """The guarantee in words: the number of calibration images, and the groups without a guarantee."""

    def of(self, probabilities: Tensor) -> Tensor:
        """Which classes are in the sets, bool (N, K), for probabilities (N, K).

        The most probable class is always in, which only adds to the coverage.
        """
        inside = 1 - probabilities.double() <= self.thresholds.to(probabilities.device)
        return inside.scatter(1, probabilities.argmax(dim=1, keepdim=True), True)


def calibrated(
    probabilities: Tensor,
    labels: Tensor,
    coverage: float,
    counts: Sequence[int] | Tensor | None = None,
    limits: Limits = LIMITS,
) -> PredictionSets:
    """Prediction sets from the probabilities (N, K) and labels (N,) of images that the net was not trained on.

    counts: (K,) training images of each class, for a separate threshold of each group many, medium and few: the
    coverage then holds for the images of each group, whatever the groups' frequencies are later. A group with fewer
    than c / (1 - c) images takes the common threshold without a guarantee, which `guarantee` states. Raises InputError:
    predict.value for a coverage outside of (0, 1), predict.calibration for fewer than c / (1 - c) images in all.
    limits: of the groups.
    """
    if not 0 < coverage < 1:
        raise InputError("predict.value", f"coverage must be between 0 and 1, such as 0.9, not {coverage:g}")
    scores = (1 - probabilities.double()).gather(1, labels[:, None]).flatten()
    common = _threshold(scores, coverage)
    least = math.ceil(coverage / (1 - coverage) - 1e-9)
    if common is None:
        message = f"a coverage of {coverage:g} needs at least {least} labelled images; there are {len(scores)}"
        raise InputError("predict.calibration", message)
    thresholds = torch.full((probabilities.shape[1],), common, dtype=torch.float64)
    guarantee = f"coverage {coverage:g} over all images, calibrated on {len(scores)}"
    if counts is not None:
        parts = []
        for name, classes in groups(counts, limits).items():
            own = scores[torch.isin(labels, classes)]
            threshold = _threshold(own, coverage)
            if threshold is None:
                parts.append(f"{name} not guaranteed ({len(own)} images, {least} are needed)")
            else:
                thresholds[classes] = threshold
                parts.append(f"{name} on {len(own)}")
        guarantee = f"coverage {coverage:g} within each group: {', '.join(parts)}"
    return PredictionSets(coverage, thresholds, guarantee)


def _threshold(scores: Tensor, coverage: float) -> float | None:
    """The ceil((n + 1) c)-th smallest score, or None where there are too few."""
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return float(scores.sort().values[rank - 1]) if rank <= len(scores) else None
