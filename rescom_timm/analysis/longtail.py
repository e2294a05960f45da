"""The long tail: training images of each class above, its accuracy below."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.analysis.run_files import Evaluation
from rescom_timm.text import counted

_BARS = 60  # more classes than this are points


@dataclass(frozen=True)
class LongTail:
    """Classes (K,) from most to fewest training images.

    Number, name, training and test images, group, accuracy and its 95% interval in percent (NaN without test images).
    intervals: of the groups.
    """

    title: str
    classes: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    tested: npt.NDArray[np.int64]
    accuracy: npt.NDArray[np.float64]
    groups: npt.NDArray[np.str_]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    limits: metrics.Limits
    intervals: Mapping[str, Sequence[float]]


def measure(evaluation: Evaluation) -> LongTail:
    """Per-class accuracy and training counts. Raises Missing if the run has no counts."""
    counts, tested, correct = evaluation.training_counts(), evaluation.tested, evaluation.correct
    order = metrics.by_count(counts)
    low, high = metrics.wilson(correct, tested)
    accuracy = np.where(tested > 0, 100 * correct / np.maximum(tested, 1), np.nan)
    return LongTail(
        evaluation.title,
        order,
        tuple(evaluation.class_names[c] for c in order),
        counts[order],
        tested[order],
        accuracy[order],
        metrics.group_of(counts, evaluation.limits)[order],
        low[order],
        high[order],
        evaluation.limits,
        evaluation.intervals,
    )


def table(tail: LongTail) -> style.Table:
    """One row per class, from most to fewest training images."""
    return {
        "class": tail.classes,
        "name": tail.class_names,
        "training_images": tail.counts,
        "group": tail.groups,
        "test_images": tail.tested,
        "accuracy_percent": tail.accuracy,
        "low_percent": tail.low,
        "high_percent": tail.high,
    }


def draw(tail: LongTail) -> Figure:
    """Counts (logarithmic) above accuracy, one column per class, in the colours of the groups.

    Lines show the mean accuracy of each group, with its interval.
    """
    k = len(tail.classes)
    figure = style.new_figure(min(5 + 0.12 * k, 11), 6.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.4])
    colors = [style.GROUP_COLORS[name] for name in tail.groups]
    x = np.arange(k)
    style.columns(top, np.maximum(tail.counts, 0.5), tail.groups, base=0.1)
    top.set_yscale("log")
    top.set_ylim(bottom=max(0.5, 0.5 * tail.counts.min()))
    smallest = max(int(tail.counts.min()), 1)
    title = f"{style.plain(tail.title, 60)}\n{counted(k, 'class')}, imbalance {tail.counts.max() / smallest:,.0f}"
    style.tidy(top, title, "", "training images\n(log scale)", "y")
    style.group_legend(top, tail.groups, loc="upper right", limits=tail.limits)
    thin = tail.tested < style.THIN
    if k > _BARS:
        size, faces = max(2, min(14, 4000 / k)), ["none" if t else c for t, c in zip(thin, colors, strict=True)]
        bottom.scatter(x, tail.accuracy, s=size, facecolors=faces, edgecolors=colors, alpha=0.6, linewidths=0.6)
    else:
        style.columns(bottom, tail.accuracy, tail.groups, hollow=thin)
        ends = np.abs(np.stack([tail.low, tail.high]) - tail.accuracy)
        bottom.errorbar(x, tail.accuracy, yerr=ends, fmt="none", ecolor=style.GREY, elinewidth=0.8, capsize=2)
    _group_means(bottom, tail)
    bottom.set_ylim(-2 if k > _BARS else 0, 109)  # room for a mean's label
    bottom.set_yticks(range(0, 101, 20))
    bottom.set_xlim(-0.6, k - 0.4)
    some = f"; hollow: below {style.THIN} test images" if thin.any() else ""
    bars = "" if k > _BARS else "bars: 95% intervals"
    style.tidy(bottom, (bars + some).removeprefix("; "), "", "top-1 accuracy (percent)", "y")
    if k <= _BARS:
        names = [style.plain(name, 20) for name in tail.class_names]
        bottom.set_xticks(x, names, rotation=90 if k > 12 or max(map(len, names)) > 6 else 0)
        bottom.tick_params(axis="x", labelsize=8 if k <= 30 else 6, length=0)
    else:
        bottom.set_xlabel("classes, from most to fewest training images", fontsize=9)
    return figure


def _group_means(axes: Axes, tail: LongTail) -> None:
    """Mean over the images of each group, as a line across its classes with its value."""
    for name in style.present(tail.groups):
        inside = np.flatnonzero(tail.groups == name)
        seen = inside[tail.tested[inside] > 0]
        if not len(seen):
            continue
        mean = float(np.average(tail.accuracy[seen], weights=tail.tested[seen]))
        axes.plot([inside[0] - 0.5, inside[-1] + 0.5], [mean, mean], color="black", linewidth=1.2, linestyle="--")
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        at_edge = inside.mean() < 0.1 * len(tail.classes)  # a label in the middle would reach over the axis
        place = (inside[0] - 0.4, "left") if at_edge else (inside.mean(), "center")
        ends = f" ({metrics.span(tail.intervals[name])})" if name in tail.intervals else ""
        axes.annotate(f"{name} {mean:.1f}{ends}", (place[0], mean), (0, 4), textcoords="offset points", ha=place[1],
                      va="bottom", fontsize=8, fontweight="bold", bbox=box)  # fmt: skip
