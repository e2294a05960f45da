"""How often each class meets each other in contrastive pairs (paper, Fig. 1 centre).

In a batch of the data as it is, positives of class k number about N_k^2: the imbalance of pairs is the SQUARE of the
data's, gamma = (N_1 / N_K)^2. Against a class-balanced queue it is the data's own. Simulated, and by formula.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.errors import InputError
from rescom_timm.text import counted


@dataclass(frozen=True)
class PairFrequency:
    """Mean ordered pairs of a batch, [query's class, key's class], simulated and expected (C, C).

    counts: (C,) training images. classes: (C,) numbers of these classes in the data set, of num_classes.
    """

    title: str
    counts: npt.NDArray[np.int64]
    simulated: npt.NDArray[np.float64]
    expected: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    num_classes: int
    limits: metrics.Limits = metrics.LIMITS

    def imbalance(self, frequency: npt.NDArray[np.float64]) -> float:
        """Positive pairs of the most frequent class over those of the rarest; inf where that has none."""
        positive = np.diagonal(frequency)[metrics.by_count(self.counts)[[0, -1]]]
        return float(positive[0] / positive[1]) if positive[1] > 0 else np.inf


def expected(
    counts: npt.ArrayLike,
    batch: int,
    views: int = 1,
    slots: npt.ArrayLike | None = None,
    classes: npt.ArrayLike | None = None,
) -> npt.NDArray[np.float64]:
    """Mean pairs (C, C) of a batch drawn without replacement from counts (K,).

    classes: (C,), by default all K. With n_k the batch's images of class k, N images in all and V views of each, E[n_a
    n_b] = B (B-1) N_a (N_b - [a=b]) / (N (N-1)) + [a=b] B N_a / N. In the batch, each view with every view but itself:
    V^2 E[n_a n_b] - [a=b] V E[n_a]. With a queue of slots (K,) keys of each class: V E[n_a] slots_b.
    """
    n = np.asarray(counts, dtype=np.float64)
    total = n.sum()
    chosen = slice(None) if classes is None else np.asarray(classes)
    n = n[chosen]
    mean = batch * n / total
    if slots is not None:
        return views * np.outer(mean, np.asarray(slots, dtype=np.float64)[chosen])
    second = batch * (batch - 1) * (np.outer(n, n) - np.diag(n)) / (total * (total - 1)) + np.diag(mean)
    return views**2 * second - views * np.diag(mean)


def measure(
    counts: npt.ArrayLike,
    batch: int = 128,
    views: int = 1,
    slots: npt.ArrayLike | None = None,
    steps: int = 2000,
    seed: int = 0,
    title: str = "",
    most: int = 300,
    limits: metrics.Limits = metrics.LIMITS,
) -> PairFrequency:
    """Count the pairs of `steps` batches of `batch` images, drawn epoch by epoch in random order, as in training.

    views: of each image, all with all (1: different images only). slots (K,): filled queue keys of each class; pairs
    are then batch with queue. Of more than `most` classes as many are kept, evenly spaced from the most frequent to the
    rarest. Raises InputError for a batch larger than the data or slots of another length.
    """
    counts = np.asarray(counts, dtype=np.int64)
    total, k = int(counts.sum()), len(counts)
    if not 1 <= batch <= total or total < 2:
        raise InputError("plot.value", f"batch must be from 1 to the {total} images of the data, not {batch}")
    if slots is not None and np.shape(slots) != counts.shape:
        raise InputError("plot.value", f"slots must be one number per class ({k},), not {np.shape(slots)}")
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(k), counts)
    per_epoch = total // batch
    classes = np.sort(metrics.by_count(counts)[np.linspace(0, k - 1, min(k, most)).round().astype(np.int64)])
    drawn = np.empty((steps, len(classes)))
    for step in range(steps):
        if step % per_epoch == 0:
            order = generator.permutation(labels)
        start = step % per_epoch * batch
        drawn[step] = np.bincount(order[start : start + batch], minlength=k)[classes]
    if slots is None:
        simulated = views**2 * drawn.T @ drawn / steps - views * np.diag(drawn.mean(axis=0))
        where = "in the batch"
    else:
        simulated = views * np.outer(drawn.mean(axis=0), np.asarray(slots)[classes])
        where = "against the queue"
    title = title or f"{where}, {counted(batch, 'image')}, {counted(views, 'view')}"
    formula = expected(counts, batch, views, slots, classes)
    return PairFrequency(title, counts[classes], simulated, formula, classes, k, limits)


def table(pairs: PairFrequency) -> style.Table:
    """One row per ordered pair of classes."""
    query, key = np.indices(pairs.simulated.shape).reshape(2, -1)
    return {
        "query_class": pairs.classes[query],
        "key_class": pairs.classes[key],
        "simulated": pairs.simulated.ravel(),
        "expected": pairs.expected.ravel(),
    }


def draw(pairs: PairFrequency) -> Figure:
    """The frequency of every pair of classes, and the positives of each class: simulation over formula."""
    order, names = metrics.by_count(pairs.counts), metrics.group_of(pairs.counts, pairs.limits)
    figure = style.new_figure(11, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    shown = pairs.simulated[np.ix_(order, order)]
    positive = shown[shown > 0]
    image = left.imshow(
        np.where(shown > 0, shown, np.nan),
        cmap="cividis",
        norm=LogNorm(positive.min(), positive.max()) if len(positive) else None,
        interpolation="nearest",
    )
    left.set_facecolor("#eeeeee")
    some = f", {len(order)} of {pairs.num_classes:,} classes" if len(order) < pairs.num_classes else ""
    title = f"{style.plain(pairs.title, 60)}\nmean pairs of a batch, simulated{some}"
    style.tidy(left, title, "key's class, most to fewest images", "query's class")
    left.set_xticks([])
    left.set_yticks([])
    bar = figure.colorbar(image, ax=left, shrink=0.85)
    bar.set_label("mean pairs of a batch (log scale)", fontsize=8)
    bar.ax.tick_params(labelsize=8)

    x = np.arange(len(order))
    formula, found = np.diagonal(pairs.expected)[order], np.diagonal(pairs.simulated)[order]
    right.plot(x, np.where(formula > 0, formula, np.nan), color="black", linewidth=1, label="formula", zorder=3)
    for name in style.present(names):
        inside = (names[order] == name) & (found > 0)
        look = {"color": style.GROUP_COLORS[name], "marker": style.GROUP_MARKERS[name], "zorder": 2}
        size = max(6.0, min(36.0, 2000 / len(x)))
        right.scatter(
            x[inside], found[inside], s=size, label=f"simulated, {style.group_labels(pairs.limits)[name]}", **look
        )
    scaled = pairs.counts[order] / pairs.counts[order[0]] * max(formula[0], found[0])
    right.plot(x, scaled, color=style.GREY, linestyle="--", linewidth=1, label="training images (scaled)")
    right.set_yscale("log")
    style.tidy(right, _gamma(pairs), "classes, from most to fewest training images", "positive pairs of a batch", "y")
    right.xaxis.set_minor_locator(NullLocator())
    right.legend(frameon=False, fontsize=8)
    return figure


def _gamma(pairs: PairFrequency) -> str:
    ratio = int(pairs.counts.max()) / max(int(pairs.counts.min()), 1)
    simulated = pairs.imbalance(pairs.simulated)
    measured = f"{simulated:,.0f}" if np.isfinite(simulated) else "none seen of the rarest"
    return (
        f"gamma: simulated {measured}, formula {pairs.imbalance(pairs.expected):,.0f}\n"
        f"images $N_1/N_K$ = {ratio:,.0f}, squared {ratio**2:,.0f}"
    )
