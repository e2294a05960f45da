"""Confusion matrix: which classes are taken for which, from 2 classes to thousands.

Classes stand from most to fewest training images. More than `cells` of them are merged, neighbours within a group, into
blocks: a cell is then the share of the block's images that are predicted as any class of the other block.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from rescom_timm.analysis import style
from rescom_timm.analysis.run_files import Evaluation
from rescom_timm.text import counted

_NAMED, _NUMBERED = 40, 20  # up to so many classes the axes carry names, and the cells counts


def measure(evaluation: Evaluation) -> Evaluation:
    """Its pairs (label, predicted) are what is drawn."""
    return evaluation


def shares(
    found: Evaluation, blocks: Sequence[npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """How many images of each block of classes are predicted as each block, and their percent of the row's images.

    NaN percent for a block without images. A block is an array of class numbers; every class is in one. Images without
    a valid output are missing in the rows.
    """
    n, block_of = len(blocks), np.empty(found.num_classes, dtype=np.int64)
    for index, block in enumerate(blocks):
        block_of[block] = index
    row, seen = block_of[found.labels], found.predicted >= 0
    pairs = np.bincount(row[seen] * n + block_of[found.predicted[seen]], minlength=n * n).reshape(n, n)
    images = np.bincount(row, minlength=n)[:, None]
    return pairs, np.where(images > 0, 100 * pairs / np.maximum(images, 1), np.nan)


def table(found: Evaluation) -> style.Table:
    """One row per pair that occurs; predicted -1 stands for images without a valid output."""
    pairs, images = np.unique(np.stack([found.labels, found.predicted]), axis=1, return_counts=True)
    names = np.asarray([*found.class_names, "none"])  # -1 is the last
    return {
        "label": pairs[0],
        "predicted": pairs[1],
        "images": images,
        "label_name": names[pairs[0]],
        "predicted_name": names[pairs[1]],
    }


def draw(found: Evaluation, cells: int = 120) -> Figure:
    """The matrix, coloured by the percent of each row's images, with counts in the cells of few classes.

    If groups are known, the same by group of the predicted class beside it, which is not the accuracy of a group: it
    counts right and wrong predictions of a class of the group.
    """
    present = style.present(found.groups)
    figure = style.new_figure(11 if present else 8, 6.8)
    main, *side = figure.subplots(1, 2 if present else 1, width_ratios=[3.2, 1] if present else None, squeeze=False)[0]
    sizes = _block_sizes(found, cells)
    blocks = np.split(found.order, np.cumsum(sizes)[:-1])
    images, percent = shares(found, blocks)
    image = _heat(main, percent)
    if len(sizes) == found.num_classes <= _NUMBERED:
        _numbers(main, images, percent, 8 if len(sizes) <= 12 else 6)
    merged = f", a cell merges up to {sizes.max()} neighbours" if len(sizes) < found.num_classes else ""
    title = f"{style.plain(found.title, 60)}\n{counted(found.num_classes, 'class')}{merged}"
    lost = int((found.predicted < 0).sum())
    style.tidy(main, title + (f"; {counted(lost, 'image')} without valid output" if lost else ""), "predicted", "label")
    bar = figure.colorbar(image, ax=main, shrink=0.7, pad=0.01, aspect=30)
    bar.set_label("percent of the row's images", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _ticks(main, found, sizes)
    if present:
        _by_group(side[0], found, present)
    return figure


def _block_sizes(found: Evaluation, cells: int) -> npt.NDArray[np.int64]:
    """Classes in each block, in shown order; a block never crosses a group's border."""
    k = found.num_classes
    merge = -(-k // cells)
    names = found.groups[found.order]
    borders = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1), k]
    sizes = [
        len(part)
        for start, end in pairwise(borders)
        for part in np.array_split(np.arange(start, end), -(-(end - start) // merge))
    ]
    return np.array(sizes)


def _heat(axes: Axes, percent: npt.NDArray[np.float64]) -> AxesImage:
    # The square root keeps rare confusions visible beside the diagonal.
    axes.set_facecolor("#eeeeee")
    return axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")


def _numbers(axes: Axes, images: npt.NDArray[np.int64], percent: npt.NDArray[np.float64], size: int) -> None:
    """The number of images of each cell."""
    for (row, column), number in np.ndenumerate(images):
        if number:
            axes.text(column, row, f"{number:,}", ha="center", va="center", fontsize=size,
                      color="white" if percent[row, column] > 35 else "black")  # fmt: skip


def _ticks(axes: Axes, found: Evaluation, sizes: npt.NDArray[np.int64]) -> None:
    k, n = found.num_classes, len(sizes)
    if k <= _NAMED and n == k:
        names = [style.plain(found.class_names[c], 22) for c in found.order]
        longest = max(map(len, names))
        axes.set_xticks(range(k), names, rotation=90 if k > _NUMBERED or longest > 3 else 0)
        axes.set_yticks(range(k), names)
        axes.tick_params(labelsize=8 if k <= _NUMBERED else 6, length=0)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    starts = np.cumsum([0, *sizes])
    names_shown = found.groups[found.order]
    for group in style.present(found.groups):
        inside = np.flatnonzero(names_shown == group)
        first, last = np.searchsorted(starts, [inside[0], inside[-1] + 1]) - 0.5
        axes.plot([first, last, last, first, first], [first, first, last, last, first],
                  color=style.GROUP_COLORS[group], linewidth=1.6, clip_on=False, zorder=4)  # fmt: skip
        if last < n - 0.5:
            axes.axhline(last, color=style.GREY, linewidth=0.5, linestyle=":")
            axes.axvline(last, color=style.GREY, linewidth=0.5, linestyle=":")
    axes.spines[:].set_visible(False)


def _by_group(axes: Axes, found: Evaluation, present: list[str]) -> None:
    images, percent = shares(found, [np.flatnonzero(found.groups == name) for name in present])
    _heat(axes, percent)
    _numbers(axes, images, percent, 10)
    style.tidy(axes, "group of the predicted class,\nright or wrong (images)", "predicted", "label")
    axes.set_xticks(range(len(present)), present)
    axes.set_yticks(range(len(present)), present, rotation=90, va="center")
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        for tick in ticks:
            tick.set_color(style.GROUP_COLORS[tick.get_text()])
            tick.set_fontweight("bold")
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
