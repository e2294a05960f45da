"""Gradient of the contrastive loss with respect to each pair's similarity, sorted by similarity.

Paper, eq. 4 and Fig. 1 right. Easy pairs, similar positives and dissimilar negatives, have almost no gradient.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rescom_timm.analysis import style
from rescom_timm.errors import InputError


@dataclass(frozen=True)
class Gradients:
    """Mean similarity and mean |gradient| of a pair, for positives and for negatives, and the number of pairs.

    Bins of equally many pairs, from hard to easy.
    """

    title: str
    positive_similarity: npt.NDArray[np.float64]
    positive_norm: npt.NDArray[np.float64]
    positive_pairs: int
    negative_similarity: npt.NDArray[np.float64]
    negative_norm: npt.NDArray[np.float64]
    negative_pairs: int


def pair_gradients(
    similarity: Tensor, positive: Tensor, valid: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """Gradient (N, M) of each query's loss with respect to its logits l = similarity / temperature (eq. 4).

    L = -(w / P) sum over the P positives p of log softmax(l)_p, softmax over all valid pairs, gives
    dL/dl_p = w (softmax_p - 1 / P) for a positive and dL/dl_n = w softmax_n for a negative. similarity (N, M) float,
    positive, valid (N, M) bool, weights w (N,). Zero for a pair that is not valid and for a query without positives.
    """
    if temperature <= 0:
        raise InputError("plot.value", f"temperature must be above 0, not {temperature}")
    positive = positive & valid
    has_positive = positive.any(dim=1, keepdim=True)
    logits = (similarity.double() / temperature).masked_fill(~valid, -torch.inf)
    softmax = logits.softmax(dim=1).nan_to_num()  # a row without valid pairs
    target = positive / positive.sum(dim=1, keepdim=True).clamp(min=1)
    gradient = (softmax - target) * has_positive
    return gradient if weights is None else gradient * weights.double()[:, None]


def measure(
    similarity: Tensor,
    positive: Tensor,
    valid: Tensor,
    temperature: float = 0.2,
    weights: Tensor | None = None,
    points: int = 50,
    title: str = "",
) -> Gradients:
    """Sorts the pairs of a batch (as in contrast.pairs.Pairs) from hard to easy and averages them in bins.

    Raises InputError if no query with positives has a positive or a negative pair.
    """
    gradient = pair_gradients(similarity, positive, valid, temperature, weights)
    counted = valid & (positive & valid).any(dim=1, keepdim=True)
    arrays: dict[str, npt.NDArray[np.float64]] = {}
    pairs: dict[str, int] = {}
    for name, kind, hard_first in (("positive", positive, 1), ("negative", ~positive, -1)):
        chosen = counted & kind
        if not chosen.any():
            raise InputError("plot.value", f"no valid pair is {name}")
        near, norm = similarity[chosen].double().cpu().numpy(), gradient[chosen].abs().cpu().numpy()
        order = np.argsort(hard_first * near, kind="stable")
        bins = np.array_split(order, min(points, len(order)))
        arrays[f"{name}_similarity"] = np.array([near[part].mean() for part in bins])
        arrays[f"{name}_norm"] = np.array([norm[part].mean() for part in bins])
        pairs[f"{name}_pairs"] = len(order)
    return Gradients(title or f"temperature {temperature:g}", **arrays, **pairs)  # type: ignore[arg-type]


def table(gradients: Gradients) -> style.Table:
    """One row per bin; rank_percent: middle of the bin, 0 hardest, 100 easiest."""
    sizes = len(gradients.positive_norm), len(gradients.negative_norm)
    return {
        "kind": ["positive"] * sizes[0] + ["negative"] * sizes[1],
        "rank_percent": np.concatenate([_rank(size) for size in sizes]),
        "similarity": np.concatenate([gradients.positive_similarity, gradients.negative_similarity]),
        "gradient_norm": np.concatenate([gradients.positive_norm, gradients.negative_norm]),
    }


def draw(gradients: Gradients) -> Figure:
    """Gradient norm over the rank from hard to easy, with the similarity below, for positives and negatives."""
    figure = style.new_figure(9, 5)
    panels = figure.subplots(2, 2, sharex=True, height_ratios=[1.6, 1])
    columns = (
        ("positive", "hardest = least similar", gradients.positive_similarity, gradients.positive_norm,
         gradients.positive_pairs),
        ("negative", "hardest = most similar", gradients.negative_similarity, gradients.negative_norm,
         gradients.negative_pairs),
    )  # fmt: skip
    for index, (name, hard, similarity, norm, pairs) in enumerate(columns):
        (top, bottom), rank = panels[:, index], _rank(len(norm))
        shade = ("#0072B2", "#D55E00")[index]
        top.plot(rank, norm, color=shade, marker="o", markersize=3, linewidth=1.2)
        top.set_ylim(bottom=0)
        style.tidy(top, f"{pairs:,} {name} pairs ({hard})", "", "mean |dL / d logit|" if index == 0 else "", "y")
        bottom.plot(rank, similarity, color=shade, linewidth=1.2)
        bottom.set_ylim(-1.05, 1.05)
        style.tidy(bottom, "", "rank, hard to easy (percent of pairs)", "mean similarity" if index == 0 else "", "y")
    figure.suptitle(style.plain(gradients.title, 80), fontsize=10, x=0.01, ha="left")
    return figure


def _rank(size: int) -> npt.NDArray[np.float64]:
    return 100 * (np.arange(size) + 0.5) / size
