"""Confusion matrix: which classes are taken for which, from 2 classes to thousands.

Classes stand from most to fewest training images. More than `cells` of them are merged, neighbours within a group, into
blocks: a cell is then the share of the block's images that are predicted as any class of the other block.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from rescom_timm.figures import style
from rescom_timm.figures.folder import Evaluation

_NAMED, _NUMBERED = 40, 20  # up to so many classes the axes carry names, and the cells numbers


@dataclass(frozen=True)
class Confusion:
    """matrix (K, K) int64 [label, predicted] in the data set's class order; unpredicted (K,) images without a valid
    output; order (K,) class numbers as shown; groups (K,) names by class number, "" where counts are unknown."""

    title: str
    matrix: npt.NDArray[np.int64]
    unpredicted: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    groups: npt.NDArray[np.str_]
    class_names: tuple[str, ...]


def measure(evaluation: Evaluation) -> Confusion:
    """Counts the pairs (label, predicted) of an evaluation."""
    k, labels, predicted = evaluation.num_classes, evaluation.labels, evaluation.predicted
    seen = predicted >= 0
    matrix = np.bincount(labels[seen] * k + predicted[seen], minlength=k * k).reshape(k, k)
    known = evaluation.counts is not None
    return Confusion(
        evaluation.title,
        matrix,
        np.bincount(labels[~seen], minlength=k),
        style.by_count(evaluation.training_counts()) if known else np.arange(k),
        style.group_of(evaluation.training_counts()) if known else np.full(k, ""),
        tuple(evaluation.class_names),
    )


def table(confusion: Confusion) -> style.Table:
    """One row per pair that occurs; predicted -1 stands for images without a valid output."""
    label, predicted = confusion.matrix.nonzero()
    lost = confusion.unpredicted.nonzero()[0]
    names = np.asarray(confusion.class_names)
    return {
        "label": np.concatenate([label, lost]),
        "predicted": np.concatenate([predicted, np.full(len(lost), -1)]),
        "images": np.concatenate([confusion.matrix[label, predicted], confusion.unpredicted[lost]]),
        "label_name": [*names[label], *names[lost]],
        "predicted_name": [*names[predicted], *["none"] * len(lost)],
    }


def draw(confusion: Confusion, cells: int = 120) -> Figure:
    """The matrix in percent of each row's images and, where groups are known, the same by group beside it."""
    present = style.present(confusion.groups)
    figure = style.new_figure(10.6 if present else 7.6, 6.8)
    main, *side = figure.subplots(1, 2 if present else 1, width_ratios=[3.6, 1] if present else None, squeeze=False)[0]
    sizes = _block_sizes(confusion, cells)
    blocks = np.split(confusion.order, np.cumsum(sizes)[:-1])
    image = _heat(main, _shares(confusion, blocks))
    merged = f", a cell merges up to {sizes.max()} neighbours" if len(sizes) < len(confusion.order) else ""
    title = f"{style.plain(confusion.title, 60)}\n{len(confusion.order):,} classes{merged}"
    lost = int(confusion.unpredicted.sum())
    style.tidy(main, title + (f"; {lost} images without valid output" if lost else ""), "predicted", "label")
    bar = figure.colorbar(image, ax=main, shrink=0.7, pad=0.01, aspect=30)
    bar.set_label("percent of the row's images", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _ticks(main, confusion, sizes)
    if present:
        _by_group(side[0], confusion, present)
    return figure


def _block_sizes(confusion: Confusion, cells: int) -> npt.NDArray[np.int64]:
    """Classes in each block, in shown order; a block never crosses a group's border."""
    k = len(confusion.order)
    merge = -(-k // cells)
    names = confusion.groups[confusion.order]
    borders = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1), k]
    sizes = [
        len(part)
        for start, end in zip(borders[:-1], borders[1:], strict=True)
        for part in np.array_split(np.arange(start, end), -(-(end - start) // merge))
    ]
    return np.array(sizes)


def _shares(confusion: Confusion, blocks: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
    """Percent of the images of each row block that fall in each column block; NaN for a row without images."""
    order, starts = np.concatenate(blocks), np.cumsum([0, *map(len, blocks[:-1])])
    summed = confusion.matrix[np.ix_(order, order)]
    summed = np.add.reduceat(np.add.reduceat(summed, starts, axis=0), starts, axis=1)
    images = np.array([confusion.matrix[block].sum() + confusion.unpredicted[block].sum() for block in blocks])
    return np.where(images[:, None] > 0, 100 * summed / np.maximum(images, 1)[:, None], np.nan)


def _heat(axes: Axes, shares: npt.NDArray[np.float64]) -> AxesImage:
    # The square root keeps rare confusions visible beside the diagonal.
    axes.set_facecolor("#eeeeee")
    return axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")


def _numbers(axes: Axes, shares: npt.NDArray[np.float64], size: int, least: float = 0.5) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share >= least:
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=size,
                      color="white" if share > 35 else "black")  # fmt: skip


def _ticks(axes: Axes, confusion: Confusion, sizes: npt.NDArray[np.int64]) -> None:
    k, n = len(confusion.order), len(sizes)
    if k <= _NAMED and n == k:
        names = [style.plain(confusion.class_names[c], 22) for c in confusion.order]
        longest = max(map(len, names))
        axes.set_xticks(range(k), names, rotation=90 if k > _NUMBERED or longest > 3 else 0)
        axes.set_yticks(range(k), names)
        axes.tick_params(labelsize=8 if k <= _NUMBERED else 6, length=0)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    if k <= _NUMBERED:
        _numbers(axes, _shares(confusion, [np.array([c]) for c in confusion.order]), 8 if k <= 12 else 6)
    starts = np.cumsum([0, *sizes])
    names_shown = confusion.groups[confusion.order]
    for group in style.present(confusion.groups):
        inside = np.flatnonzero(names_shown == group)
        first, last = np.searchsorted(starts, [inside[0], inside[-1] + 1]) - 0.5
        axes.plot([first, last, last, first, first], [first, first, last, last, first],
                  color=style.GROUP_COLORS[group], linewidth=1.6, clip_on=False, zorder=4)  # fmt: skip
        if last < n - 0.5:
            axes.axhline(last, color=style.GREY, linewidth=0.5, linestyle=":")
            axes.axvline(last, color=style.GREY, linewidth=0.5, linestyle=":")
    axes.spines[:].set_visible(False)


def _by_group(axes: Axes, confusion: Confusion, present: list[str]) -> None:
    shares = _shares(confusion, [np.flatnonzero(confusion.groups == name) for name in present])
    _heat(axes, shares)
    _numbers(axes, shares, 10, least=0)
    style.tidy(axes, "by group, percent", "predicted", "label")
    axes.set_xticks(range(len(present)), present)
    axes.set_yticks(range(len(present)), present, rotation=90, va="center")
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        for tick in ticks:
            tick.set_color(style.GROUP_COLORS[tick.get_text()])
            tick.set_fontweight("bold")
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
