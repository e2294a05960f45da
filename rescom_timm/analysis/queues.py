"""How many keys each class has in queues of several kinds (paper, Fig. 3)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.errors import InputError


@dataclass(frozen=True)
class Slots:
    """slots: kind -> (K,) keys held of each class; counts (K,) training images; both in the data set's class order."""

    slots: dict[str, npt.NDArray[np.int64]]
    counts: npt.NDArray[np.int64]
    limits: metrics.Limits = metrics.LIMITS


def measure(kinds: Mapping[str, Tensor], counts: npt.ArrayLike, limits: metrics.Limits = metrics.LIMITS) -> Slots:
    """Counts the classes of the held keys: kind -> labels (S,) of its FILLED slots (`queue.labels[queue.valid]`).

    Raises InputError for a label outside the counts' classes.
    """
    counts = np.asarray(counts, dtype=np.int64)
    found = {name: np.bincount(labels.cpu().numpy(), minlength=len(counts)) for name, labels in kinds.items()}
    for name, slots in found.items():
        if len(slots) > len(counts):
            raise InputError("plot.value", f"queue {name} has class {len(slots) - 1} of {len(counts)} classes")
    return Slots(found, counts, limits)


def table(slots: Slots) -> style.Table:
    """One row per class, from most to fewest training images."""
    order = metrics.by_count(slots.counts)
    columns = {f"slots_{name}": found[order] for name, found in slots.slots.items()}
    return {"class": order, "training_images": slots.counts[order], **columns}


def draw(slots: Slots) -> Figure:
    """One panel per kind of queue, classes from most to fewest training images, coloured by group."""
    order = metrics.by_count(slots.counts)
    groups = metrics.group_of(slots.counts, slots.limits)
    n = len(slots.slots)
    figure = style.new_figure(3.6 * n + 0.4, 3.6)
    panels = figure.subplots(1, n, sharey=True, squeeze=False)[0]
    for index, (panel, (name, found)) in enumerate(zip(panels, slots.slots.items(), strict=True)):
        style.columns(panel, found[order], groups[order])
        each = f"{found.min():,} to {found.max():,}" if found.min() < found.max() else f"{found.max():,}"
        title = f"{style.plain(name)}\n{found.sum():,} keys, {each} a class"
        style.tidy(panel, title, "classes, most to fewest images", "" if index else "keys of the class", "y")
        panel.set_xticks([])
    style.group_legend(figure, groups, loc="outside lower center", columns=3, limits=slots.limits)
    return figure
