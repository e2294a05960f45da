"""Contact sheet: what the net really sees, many images in each of their augmented views."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.errors import InputError
from rescom_timm.text import counted


@dataclass(frozen=True)
class ContactSheet:
    """images (N, V, H, W, 3) uint8; labels (N,); counts (K,) training images; class_names (K)."""

    title: str
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    limits: metrics.Limits = metrics.LIMITS


def measure(
    images: Tensor,
    labels: Tensor,
    counts: npt.ArrayLike,
    class_names: Sequence[str] = (),
    most: int = 24,
    title: str = "augmented views",
    limits: metrics.Limits = metrics.LIMITS,
) -> ContactSheet:
    """The first `most` of images uint8 (N, V, 3, H, W), as loaders batch them, or (N, 3, H, W); labels (N,).

    Raises InputError for another shape or type: normalised images cannot be shown.
    """
    images = images[:, None] if images.ndim == 4 else images
    if images.ndim != 5 or images.shape[2] != 3 or str(images.dtype) != "torch.uint8" or len(labels) != len(images):
        raise InputError("plot.value", f"images must be uint8 (N, V, 3, H, W) and labels (N,), not {images.dtype} "
                         f"{tuple(images.shape)} and {tuple(labels.shape)}")  # fmt: skip
    counts = np.asarray(counts, dtype=np.int64)
    pixels = images[:most].permute(0, 1, 3, 4, 2).cpu().numpy()
    names = tuple(class_names) or tuple(map(str, range(len(counts))))
    return ContactSheet(title, pixels, labels[:most].cpu().numpy().astype(np.int64), counts, names, limits)


def table(views: ContactSheet) -> style.Table:
    """One row per image: place on the sheet, class, name, training images of the class."""
    return {
        "image": np.arange(len(views.labels)),
        "class": views.labels,
        "name": [views.class_names[label] for label in views.labels],
        "training_images": views.counts[views.labels],
    }


def draw(views: ContactSheet) -> Figure:
    """Tiles of V views side by side, class and training images as captions in the group's colour."""
    n, v, height, width, _ = views.images.shape
    columns = max(1, min(n, 12 // v))
    rows = -(-n // columns)
    tile = 1.15  # inches of one view
    figure = style.new_figure(columns * (v * tile + 0.2), rows * (tile * height / width + 0.4) + 0.75)
    figure.get_layout_engine().set(w_pad=0.08)  # type: ignore[union-attr, call-arg]
    groups = metrics.group_of(views.counts, views.limits)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, image, label in zip(panels, views.images, views.labels, strict=False):
        panel.imshow(np.concatenate(list(image), axis=1), interpolation="nearest")
        for border in range(1, v):
            panel.axvline(border * width - 0.5, color="white", linewidth=2)
        panel.axhline(height - 0.5, color=style.GROUP_COLORS[groups[label]], linewidth=4, clip_on=False)
        name = style.plain(views.class_names[label], 15 * v)
        panel.set_title(f"{name}: {counted(views.counts[label], 'image')}", fontsize=8, pad=3, loc="left")
    figure.suptitle(
        f"{style.plain(views.title, 80)}: {counted(n, 'image')}, {counted(v, 'view')} of each",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    style.group_legend(figure, groups, loc="outside lower left", columns=3, limits=views.limits)
    return figure
