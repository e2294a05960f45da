"""Accuracy with its interval, precision and the most frequent confusion of each class of an evaluation."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.analysis.run_files import Evaluation


@dataclass(frozen=True)
class Classes:
    """All (K,), by class number; in percent, NaN for 0 / 0, where nothing else is said."""

    tested: npt.NDArray[np.int64]
    """Test images."""
    correct: npt.NDArray[np.int64]
    """Of them, those predicted as the class."""
    accuracy: npt.NDArray[np.float64]
    """Their share: the class's recall."""
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    """Its 95% interval (Wilson)."""
    precision: npt.NDArray[np.float64]
    """Of the images predicted as the class, those of it."""
    f1: npt.NDArray[np.float64]
    """Harmonic mean of the two; 0 if no image of the class is right."""
    confused: npt.NDArray[np.int64]
    """The other class most often predicted for its images; -1 for none."""
    taken: npt.NDArray[np.int64]
    """Images predicted as that."""
    overall: float
    """Accuracy of all images."""

    @property
    def verdict(self) -> npt.NDArray[np.str_]:
        """(K,) "low" or "high" where the whole interval lies below or above the accuracy of all images, else ""."""
        return np.where(self.high < self.overall, "low", np.where(self.low > self.overall, "high", ""))

    @property
    def worst_first(self) -> npt.NDArray[np.int64]:
        """Class numbers (K,) by the upper end of the interval, the lowest first, classes not tested last."""
        return np.argsort(self.high, kind="stable")


def measure(evaluation: Evaluation) -> Classes:
    """Metrics of every class from labels and predictions (N,), in O(N + K)."""
    k, labels, predicted = evaluation.num_classes, evaluation.labels, evaluation.predicted
    images, right = evaluation.tested, evaluation.correct
    meant = np.bincount(predicted[predicted >= 0], minlength=k)
    low, high = metrics.wilson(right, images)
    with np.errstate(divide="ignore", invalid="ignore"):
        accuracy, precision = 100 * right / images, 100 * right / meant
        f1 = 200 * right / (images + meant)
    confused, taken = np.full(k, -1), np.zeros(k, dtype=np.int64)
    for label, other, count in reversed(confusions(evaluation)):  # the most frequent last
        confused[label], taken[label] = other, count
    overall = 100 * float(right.sum()) / len(labels)
    return Classes(
        images, right, accuracy, low, high, precision, np.where(images > 0, f1, np.nan), confused, taken, overall
    )


def confusions(evaluation: Evaluation) -> list[tuple[int, int, int]]:
    """(label, predicted, images) of every wrong pair that occurs, the most frequent first, then the last classes."""
    labels, predicted = evaluation.labels, evaluation.predicted
    wrong = (labels != predicted) & (predicted >= 0)
    pairs, count = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(count, kind="stable")[::-1]
    return [(int(pairs[0, i]), int(pairs[1, i]), int(count[i])) for i in order]


class Rarest(NamedTuple):
    """The tested classes of the rarest group that has any, in the order of Classes.worst_first."""

    group: str
    classes: npt.NDArray[np.int64]
    failing: int
    """So many of the first have their whole interval below the accuracy of all images."""


def rarest(evaluation: Evaluation, found: Classes) -> Rarest | None:
    """None if training counts are unknown."""
    if evaluation.counts is None:
        return None
    groups = evaluation.groups
    order = found.worst_first[found.tested[found.worst_first] > 0]
    group = style.present(groups[order])[-1]
    members = order[groups[order] == group]
    return Rarest(group, members, int((found.verdict[members] == "low").sum()))


def table(evaluation: Evaluation, found: Classes) -> style.Table:
    """One row per class, in the order of Classes.worst_first. None: not known, or no image to measure it on."""
    order = found.worst_first
    unknown = [None] * len(order)
    counts = unknown if evaluation.counts is None else evaluation.counts[order].tolist()
    groups = unknown if evaluation.counts is None else evaluation.groups[order].tolist()
    numbers = {
        "accuracy_percent": found.accuracy, "low_percent": found.low, "high_percent": found.high,
        "precision_percent": found.precision, "f1_percent": found.f1,
    }  # fmt: skip
    names = [*evaluation.class_names, None]  # of -1
    return {
        "run": [evaluation.run] * len(order),
        "evaluation": [evaluation.name] * len(order),
        "class": order.tolist(),
        "name": [names[k] for k in order],
        "training_images": counts,
        "group": groups,
        "test_images": found.tested[order].tolist(),
        "correct": found.correct[order].tolist(),
        **{name: [None if np.isnan(value) else float(value) for value in column[order]]
           for name, column in numbers.items()},
        "interval": found.verdict[order].tolist(),
        "taken_for": [names[k] for k in found.confused[order]],
        "taken_for_images": found.taken[order].tolist(),
    }  # fmt: skip
