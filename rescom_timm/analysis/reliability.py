"""Reliability diagram: is a confidence of 80 percent right in 80 percent of the images? (Guo et al. 2017)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.analysis.run_files import Evaluation


@dataclass(frozen=True)
class Reliability:
    """Per bin (bins,): count of images, mean confidence and accuracy in percent; ece in percent."""

    title: str
    count: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    ece: float


def measure(evaluation: Evaluation, bins: int = 15) -> Reliability:
    """Bins an evaluation's confidences; the same bins and ECE as metrics.Meter's."""
    confidence = torch.from_numpy(evaluation.confidence)
    correct = torch.from_numpy(evaluation.predicted == evaluation.labels)
    binned = {name: values.numpy() for name, values in metrics.calibration(confidence, correct, bins).items()}
    return Reliability(evaluation.title, **binned, ece=metrics.expected_calibration_error(confidence, correct, bins))


def table(reliability: Reliability) -> style.Table:
    """One row per bin."""
    edges = np.linspace(0, 100, len(reliability.count) + 1)
    return {
        "above_percent": edges[:-1],
        "up_to_percent": edges[1:],
        "images": reliability.count.astype(np.int64),
        "mean_confidence_percent": reliability.confidence,
        "accuracy_percent": reliability.accuracy,
    }


def draw(reliability: Reliability) -> Figure:
    """Accuracy against confidence with the gap to the diagonal, over a histogram of the confidences."""
    figure = style.new_figure(5.4, 6.0)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    bins = len(reliability.count)
    edges, width = np.linspace(0, 100, bins + 1)[:-1], 100 / bins
    filled = reliability.count > 0
    x, accuracy, confidence = edges[filled], reliability.accuracy[filled], reliability.confidence[filled]
    options = {"width": width, "align": "edge", "linewidth": 0.6}
    top.bar(x, accuracy, color="#0072B2", edgecolor="white", label="accuracy", **options)
    for over, hatch, colour, label in (
        (confidence > accuracy, "////", "#D55E00", "mean confidence above accuracy"),
        (confidence <= accuracy, "....", "#009E73", "mean confidence below accuracy"),
    ):
        if over.any():
            top.bar(x[over], (confidence - accuracy)[over], bottom=accuracy[over], facecolor="none", edgecolor=colour,
                    hatch=hatch, label=label, **options)  # fmt: skip
    top.plot([0, 100], [0, 100], color="black", linestyle="--", linewidth=1.2, zorder=3, label="perfect calibration")
    title = f"{style.plain(reliability.title, 60)}\nECE {reliability.ece:.2f} percent ({bins} bins)"
    style.tidy(top, title, "", "accuracy (percent)", "y")
    top.legend(frameon=False, fontsize=8, loc="upper left")
    top.set(xlim=(0, 100), ylim=(0, 100))
    total = reliability.count.sum()
    bottom.bar(edges, 100 * reliability.count / total, color="#94a4a2", edgecolor="white", **options)
    share = f"share of {int(total):,}\nimages (percent)"
    style.tidy(bottom, "", "confidence of the predicted class (percent)", share, "y")
    return figure
