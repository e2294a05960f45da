"""t-SNE of features or embeddings (paper, Fig. 6; van der Maaten & Hinton 2008), by scikit-learn."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.errors import InputError

_CLASSES = 10  # more classes than this are coloured by group


@dataclass(frozen=True)
class Tsne:
    """rows (P,) which inputs were taken; points (P, 2), their places; labels (P,); groups (K,) by class number."""

    title: str
    rows: npt.NDArray[np.int64]
    points: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.str_]
    class_names: tuple[str, ...]
    limits: metrics.Limits = metrics.LIMITS


def measure(
    features: Tensor,
    labels: Tensor,
    counts: npt.ArrayLike,
    class_names: tuple[str, ...] = (),
    most: int = 2000,
    perplexity: float = 30.0,
    seed: int = 0,
    title: str = "t-SNE",
    limits: metrics.Limits = metrics.LIMITS,
) -> Tsne:
    """Project up to `most` of the features (N, F), labels (N,), onto the plane; cosine distances, the same for a seed.

    Above `most`, as many of each class as possible are drawn at random. Raises InputError for fewer than 4 rows or
    values that are not finite.
    """
    from sklearn.manifold import TSNE  # slow to import

    if len(features) < 4 or len(features) != len(labels):
        raise InputError("plot.value", f"t-SNE needs 4 features with labels, not {len(features)} and {len(labels)}")
    classes = labels.cpu().numpy().astype(np.int64)
    rows = style.balanced(classes, most, seed)
    chosen = features.detach().double().cpu().numpy()[rows]
    if not np.isfinite(chosen).all():
        raise InputError("plot.value", "features are not finite: see the training loss")
    perplexity = min(perplexity, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(chosen)
    groups = metrics.group_of(counts, limits)
    names = class_names or tuple(map(str, range(len(groups))))
    return Tsne(title, rows, points, classes[rows], groups, names, limits)


def table(tsne: Tsne) -> style.Table:
    """One row per point."""
    x, y = tsne.points.T
    return {"row": tsne.rows, "x": x, "y": y, "class": tsne.labels, "group": tsne.groups[tsne.labels]}


def draw(tsne: Tsne, marks: Mapping[str, tuple[float, float]] = {}) -> Figure:
    """Marker by group; colour by class up to ten classes, else by group too. marks: name -> place of further images."""
    shown = np.unique(tsne.labels)
    by_class = len(shown) <= _CLASSES
    figure = style.new_figure(7.6, 5.6)
    axes = figure.subplots()
    handles, rules = [], style.group_labels(tsne.limits)
    for index, label in enumerate(shown if by_class else style.present(tsne.groups[shown])):
        group = str(tsne.groups[label]) if by_class else str(label)
        inside = tsne.labels == label if by_class else tsne.groups[tsne.labels] == label
        shade = style.color(index) if by_class else style.GROUP_COLORS[group]
        marker = style.GROUP_MARKERS[group]
        x, y = tsne.points[inside].T
        axes.scatter(x, y, s=14, color=shade, marker=marker, alpha=0.75, linewidths=0)
        text = f"{style.plain(tsne.class_names[label], 20)} ({group})" if by_class else rules[group]
        handles.append(Line2D([], [], linestyle="", color=shade, marker=marker, label=f"{text}: {inside.sum()}"))
    for name, place in marks.items():
        axes.scatter(*place, s=140, color="black", marker="*", edgecolors="white", linewidths=0.8)
        axes.annotate(style.plain(name, 24), place, (6, 6), textcoords="offset points", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    style.tidy(axes, f"{style.plain(tsne.title, 60)}\nt-SNE by cosine distance, {len(tsne.rows):,} points", "", "")
    axes.spines[:].set_visible(False)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure
