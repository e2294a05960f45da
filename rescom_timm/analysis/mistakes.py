"""Galleries of mistakes: the most confident ones, and those of the rarest classes.

N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rescom_timm.analysis import style
from rescom_timm.analysis.run_files import Missing


@dataclass(frozen=True)
class Gallery:
    """Rows of tiles; images uint8 (H, W, 3) of any size."""

    title: str
    headings: tuple[str, ...]
    """Of each row, or empty."""
    rows: tuple[tuple["Tile", ...], ...]


@dataclass(frozen=True)
class Tile:
    """One image of a gallery."""

    image: npt.NDArray[np.uint8]
    caption: str
    row: int
    """Of the split that the image is from; -1 for a training image."""
    label: str
    predicted: str
    confidence: float
    """Of the prediction, in percent; NaN for a training image."""


class Judged(NamedTuple):
    """Labels, predictions (-1: no valid output) and their probability, (N,) each."""

    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.floating]


def most_confident(judged: Judged, most: int) -> npt.NDArray:
    """Positions (M,) of the wrong predictions with the highest probability, the highest first."""
    wrong = np.flatnonzero((judged.predicted != judged.labels) & (judged.predicted >= 0))
    return wrong[np.argsort(-judged.confidence[wrong], kind="stable")][:most]


def of_class(judged: Judged, label: int, most: int) -> npt.NDArray:
    """Positions of the most confident mistakes on images of a class."""
    own = np.flatnonzero(judged.labels == label)
    return own[most_confident(Judged(judged.labels[own], judged.predicted[own], judged.confidence[own]), most)]


def tile(image: npt.NDArray[np.uint8], row: int, judged: Judged, i: int, names: Sequence[str]) -> Tile:
    """Of the image at position i."""
    label, predicted, share = int(judged.labels[i]), int(judged.predicted[i]), 100 * float(judged.confidence[i])
    caption = f"{style.plain(names[label], 18)}\n-> {style.plain(names[predicted], 18)} {share:.0f}%"
    return Tile(image, caption, row, names[label], names[predicted], share)


def grid(title: str, tiles: Sequence[Tile], columns: int = 6) -> Gallery:
    """Raises Missing if there is no tile."""
    if not tiles:
        raise Missing("plot.no_mistakes", "the net made no mistakes")
    rows = tuple(tuple(tiles[start : start + columns]) for start in range(0, len(tiles), columns))
    return Gallery(title, (), rows)


def table(gallery: Gallery) -> style.Table:
    """One row per tile."""
    tiles = [tile for row in gallery.rows for tile in row]
    return {
        "row": [tile.row for tile in tiles],
        "label": [tile.label for tile in tiles],
        "predicted": [tile.predicted for tile in tiles],
        "confidence_percent": [tile.confidence for tile in tiles],
    }


def draw(gallery: Gallery) -> Figure:
    """Tiles of one size, captions above; where rows have headings, they stand at the left."""
    columns = max(map(len, gallery.rows))
    figure = style.new_figure(1.5 * columns + (1.6 if gallery.headings else 0.2), 1.75 * len(gallery.rows) + 0.5)
    panels = figure.subplots(len(gallery.rows), columns, squeeze=False)
    for i, (row, places) in enumerate(zip(gallery.rows, panels, strict=True)):
        for axes in places:
            axes.set_axis_off()
        for axes, one in zip(places, row, strict=False):
            _show(axes, one)
        if gallery.headings:
            places[0].text(-0.1, 0.5, gallery.headings[i], transform=places[0].transAxes, ha="right", va="center",
                           fontsize=8)  # fmt: skip
    figure.suptitle(gallery.title, fontsize=10, x=0.01, ha="left")
    return figure


def _show(axes: Axes, one: Tile) -> None:
    axes.imshow(one.image, interpolation="nearest" if max(one.image.shape) < 64 else "antialiased")
    axes.set_title(one.caption, fontsize=7, pad=2)
