"""How similar the positives of head, medium and tail classes are (paper, Fig. 5)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.errors import InputError


@dataclass(frozen=True)
class Similarity:
    """Distribution of similarities by group: percent of its pairs in each bin (bins,), median, number of pairs.

    edges: (bins + 1,).
    """

    title: str
    edges: npt.NDArray[np.float64]
    share: dict[str, npt.NDArray[np.float64]]
    median: dict[str, float]
    pairs: dict[str, int]
    limits: metrics.Limits = metrics.LIMITS


def measure(
    similarity: Tensor,
    positive: Tensor,
    valid: Tensor,
    labels: Tensor,
    counts: npt.ArrayLike,
    bins: int = 50,
    title: str = "positive pairs",
    limits: metrics.Limits = metrics.LIMITS,
) -> Similarity:
    """Distribution of the positives' similarity by the group of the query's class.

    similarity, positive, valid: (N, M) as in contrastive.pairs.Pairs. labels: (N,) of the queries. counts: (K,)
    training images. Raises InputError if no positive pair is valid.
    """
    groups = metrics.group_of(counts, limits)[labels.cpu().numpy()]
    chosen = (positive & valid).cpu().numpy()
    values = similarity.detach().double().cpu().numpy()
    found = {name: values[groups == name][chosen[groups == name]] for name in style.present(groups)}
    found = {name: near for name, near in found.items() if len(near)}
    if not found:
        raise InputError("plot.value", "no valid pair is positive")
    # A trained net's positives all lie near 1: the bins begin at the least similar pair.
    lowest = min(float(near.min()) for near in found.values())
    edges = np.linspace(max(-1, np.floor(10 * min(lowest, 0.9)) / 10), 1, bins + 1)
    share = {name: 100 * np.histogram(near.clip(edges[0], 1), edges)[0] / len(near) for name, near in found.items()}
    return Similarity(
        title,
        edges,
        share,
        {name: float(np.median(near)) for name, near in found.items()},
        {name: len(near) for name, near in found.items()},
        limits,
    )


def table(similarity: Similarity) -> style.Table:
    """One row per bin, one column per group."""
    columns = {f"{name}_percent": share for name, share in similarity.share.items()}
    return {"from": similarity.edges[:-1], "to": similarity.edges[1:], **columns}


def draw(similarity: Similarity) -> Figure:
    """One outline per group, with its median."""
    figure = style.new_figure(6.5, 4.2)
    axes = figure.subplots()
    for name, share in similarity.share.items():
        shade, median = style.GROUP_COLORS[name], similarity.median[name]
        label = f"{style.group_labels(similarity.limits)[name]}: {similarity.pairs[name]:,} pairs, median {median:.3f}"
        axes.stairs(share, similarity.edges, color=shade, fill=True, alpha=0.25)
        axes.stairs(share, similarity.edges, color=shade, linewidth=1.4, label=label)
        axes.axvline(median, color=shade, linestyle="--", linewidth=1)
    axes.set_xlim(similarity.edges[0], 1)
    axes.set_ylim(bottom=0)
    style.tidy(axes, style.plain(similarity.title, 80), "similarity of a positive pair (cosine)",
               "share of the group's pairs (percent)", "y")  # fmt: skip
    # Under the axes: no place inside is free for every distribution.
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    return figure
