"""Each class of an evaluation: how often it is right, how often it is meant, and what it is taken for."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rescom_timm.analysis.run_files import Evaluation


@dataclass(frozen=True)
class Classes:
    """All (K,), in percent; NaN where there is nothing to divide by."""

    recall: npt.NDArray[np.float64]
    """Of the class's images, those labelled so: its accuracy."""
    precision: npt.NDArray[np.float64]
    """Of the images labelled so, those of the class."""
    f1: npt.NDArray[np.float64]
    """Harmonic mean of the two; 0 where no image of the class is right."""
    confused: npt.NDArray[np.int64]
    """The other class that its images are most often taken for; -1 for none."""
    share: npt.NDArray[np.float64]
    """Of its images, those taken for that."""


def measure(evaluation: Evaluation) -> Classes:
    """Figures of every class from labels and predictions (N,), in O(N + K)."""
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
