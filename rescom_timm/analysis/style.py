"""Style of all plots, and how they are saved: colours, groups, `save`.

Figures are built on matplotlib.figure.Figure, which needs no backend and leaves pyplot and rcParams alone.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL.Image import Image
from PIL.Image import open as open_image

from rescom_timm import metrics
from rescom_timm.errors import InputError
from rescom_timm.io import atomic_path, errors_named, write_csv
from rescom_timm.text import counted, escape_controls

Table = Mapping[str, Sequence[object] | npt.NDArray]

# Blue, orange and purple of Okabe & Ito (2008), distinct with every common colour blindness and in grey.
GROUP_COLORS = {"many": "#0072B2", "medium": "#E69F00", "few": "#CC79A7"}
GROUP_MARKERS = {"many": "o", "medium": "^", "few": "s"}
# Petroff (2021, arXiv 2107.02270): ten colours chosen for colour-blind readers, the ninth, a second grey, darkened.
# Runs and classes take them in turn.
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#33343a", "#92dadd")
LINES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
GREY = "#555555"
Place = Literal["upper right", "outside lower left", "outside lower center"]
THIN = 10
"""An accuracy over fewer test images is drawn hollow."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches with constrained layout."""
    return Figure(figsize=(width, height), layout="constrained")


def color(index: int) -> str:
    """The colour of the index-th run or class."""
    return COLORS[index % len(COLORS)]


def line(index: int) -> Literal["-", "--", "-.", ":"]:
    """The line style of the index-th run, so that a line under another one still shows through its gaps."""
    return LINES[index % len(LINES)]


def plain(text: object, longest: int = 28) -> str:
    """Text from outside, made safe for matplotlib: one line, cut in the middle, no mathematics."""
    line = escape_controls(" ".join(str(text).split()))
    if len(line) > longest:
        head = (longest - 1) // 2
        line = line[: longest - 1 - head] + "\N{HORIZONTAL ELLIPSIS}" + line[-head:]
    line = line.replace("$", r"\$")
    return " " + line[1:] if line.startswith("_") else line  # a legend hides labels that begin with _


def group_labels(limits: metrics.Limits = metrics.LIMITS) -> dict[str, str]:
    """The groups with their rule, for a legend."""
    low, high = limits
    return {"many": f"many (> {high})", "medium": f"medium ({low} to {high})", "few": f"few (< {low})"}


def balanced(labels: npt.ArrayLike, most: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Up to `most` positions in labels (N,), rising, drawn in turn from every class: one of each, then a second ..."""
    labels = np.asarray(labels, dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = np.argsort(labels[shuffled], kind="stable")
    ordered = labels[shuffled][by_class]
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return np.sort(shuffled[np.argsort(turn, kind="stable")][:most])


def present(names: npt.NDArray[np.str_]) -> list[str]:
    """The groups that occur, always in the order many, medium, few."""
    return [name for name in metrics.GROUPS if name in names]


def group_legend(
    where: Axes | Figure, names: npt.NDArray[np.str_], loc: Place, columns: int = 1,
    limits: metrics.Limits = metrics.LIMITS,
) -> None:  # fmt: skip
    """A legend of the groups that occur, with their rule and the number of their classes."""
    sizes = {name: int((names == name).sum()) for name in present(names)}
    rules = group_labels(limits)
    patches = [
        Patch(color=GROUP_COLORS[name], label=f"{rules[name]}: {counted(size, 'class')}")
        for name, size in sizes.items()
    ]
    where.legend(handles=patches, frameon=False, fontsize=8, loc=loc, ncols=columns)


def columns(
    axes: Axes, heights: npt.NDArray, names: npt.NDArray[np.str_], base: float = 0,
    hollow: npt.NDArray[np.bool_] | None = None,
) -> None:  # fmt: skip
    """Heights (K,) of classes in order of their counts, in the colours of their groups (K,).

    Bars, those of `hollow` (K,) as outlines; above 60 classes one outline per group, which stays small for thousands.
    """
    if len(heights) <= 60:
        colors = [GROUP_COLORS[name] for name in names]
        faces = colors if hollow is None else ["white" if h else c for h, c in zip(hollow, colors, strict=True)]
        axes.bar(np.arange(len(heights)), heights, width=0.85, color=faces, edgecolor=colors)
        return
    for name in present(names):
        inside = np.flatnonzero(names == name)
        edges = np.arange(inside[0], inside[-1] + 2) - 0.5
        axes.stairs(heights[inside], edges, baseline=base, fill=True, color=GROUP_COLORS[name])


def tidy(axes: Axes, title: str = "", x: str = "", y: str = "", grid: Literal["", "x", "y", "both"] = "") -> None:
    """Title, axis labels with units, no box; grid: "", "x", "y" or "both"."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)


def write(
    figure: Figure, to: Path | BinaryIO, dpi: int, format: str | None = None, metadata: Mapping[str, None] | None = None
) -> None:
    """One picture, cropped to what is drawn: square pictures leave the layout margins."""
    figure.savefig(to, dpi=dpi, bbox_inches="tight", pad_inches=0.1, format=format, metadata=metadata)
    figure.set_layout_engine("none")  # keep the layout: computing it again for each format takes most of the time


def picture(figure: Figure, dpi: int = 100) -> Image:
    """The same as an RGB image in memory."""
    file = BytesIO()
    write(figure, file, dpi, format="png")
    return open_image(file).convert("RGB")


def save(figure: Figure, table: Table, stem: str | Path, dpi: int = 150) -> list[Path]:
    """Writes stem.png, stem.svg and stem.csv (the numbers, one row per entry); makes the folder.

    Raises InputError if the table's columns differ in length.
    """
    stem = Path(stem)
    columns = {name: np.asarray(values).tolist() for name, values in table.items()}
    if len({len(values) for values in columns.values()}) > 1:
        lengths = {name: len(values) for name, values in columns.items()}
        raise InputError("plot.value", f"the columns of {stem.name}.csv differ in length: {lengths}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg", ".csv")]
    for path, metadata in ((paths[0], None), (paths[1], {"Date": None})):
        with errors_named(path), atomic_path(path) as beside:
            write(figure, beside, dpi, path.suffix[1:], metadata)
    write_csv(paths[2], columns)
    return paths
