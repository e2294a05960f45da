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
    """Accuracy against confidence with 95% intervals (Wilson), above the number of images of each bin."""
    figure = style.new_figure(6.4, 6.4)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    bins = len(reliability.count)
    filled = reliability.count > 0
    count, accuracy, confidence = (
        column[filled] for column in (reliability.count, reliability.accuracy, reliability.confidence)
    )
    top.plot([0, 100], [0, 100], color=style.GREY, linestyle="--", linewidth=1, label="perfect calibration")
    low, high = metrics.wilson(accuracy * count / 100, count)
    thin = count < style.THIN
    for part, face, label in (
        (~thin, "#0072B2", "accuracy of the bin's images"),
        (thin, "white", f"below {style.THIN} images"),
    ):
        if part.any():
            ends = np.abs(np.stack([low, high]) - accuracy)[:, part]
            top.errorbar(confidence[part], accuracy[part], yerr=ends, fmt="o", color="#0072B2", markerfacecolor=face,
                         ecolor="#0072B2", elinewidth=1, capsize=2, label=label, clip_on=False)  # fmt: skip
    for x, y, text in ((97, 3, "probabilities too high"), (3, 97, "probabilities too low")):
        top.text(x, y, text, color=style.GREY, fontsize=9, ha="right" if x > 50 else "left", va="center")
    title = f"{style.plain(reliability.title, 60)}\nECE {reliability.ece:.2f} percent ({bins} bins)"
    style.tidy(top, title, "", "accuracy (percent)", "both")
    top.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.94))
    top.set(xlim=(0, 100), ylim=(0, 100))
    edges, width = np.linspace(0, 100, bins + 1)[:-1], 100 / bins
    bars = bottom.bar(edges, reliability.count, width=width, align="edge", color="#94a4a2", edgecolor="white")
    bottom.bar_label(bars, [f"{number:,.0f}" if number else "" for number in reliability.count], fontsize=7, padding=1)
    bottom.set_ylim(top=1.2 * reliability.count.max())
    total = f"images\n({int(reliability.count.sum()):,} in all)"
    style.tidy(bottom, "", "confidence of the predicted class (percent)", total, "y")
    return figure
