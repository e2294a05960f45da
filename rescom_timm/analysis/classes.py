"""Recall, precision and the most frequent confusion of each class of an evaluation."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rescom_timm.analysis.run_files import Evaluation


@dataclass(frozen=True)
class Classes:
    """All (K,), in percent; NaN for 0 / 0."""

    recall: npt.NDArray[np.float64]
    """Of the class's images, those predicted as it: its accuracy."""
    precision: npt.NDArray[np.float64]
    """Of the images predicted as the class, those of it."""
    f1: npt.NDArray[np.float64]
    """Harmonic mean of the two; 0 if no image of the class is right."""
    confused: npt.NDArray[np.int64]
    """The other class most often predicted for its images; -1 for none."""
    share: npt.NDArray[np.float64]
    """Of its images, those predicted as that."""


def measure(evaluation: Evaluation) -> Classes:
    """Metrics of every class from labels and predictions (N,), in O(N + K)."""
    k, labels, predicted = evaluation.num_classes, evaluation.labels, evaluation.predicted
    images, meant = np.bincount(labels, minlength=k), np.bincount(predicted[predicted >= 0], minlength=k)
    right = np.bincount(labels[labels == predicted], minlength=k)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall, precision = 100 * right / images, 100 * right / meant
        f1 = 200 * right / (images + meant)
    wrong = (labels != predicted) & (predicted >= 0)
    confused, share = np.full(k, -1), np.full(k, np.nan)
    pairs, count = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    for i in np.argsort(count, kind="stable"):  # the largest last; of equal ones the last class
        confused[pairs[0, i]], share[pairs[0, i]] = pairs[1, i], 100 * count[i] / images[pairs[0, i]]
    return Classes(recall, precision, np.where(images > 0, f1, np.nan), confused, share)
