"""Softmax losses over logits that know the class counts.

Shapes: N images, K classes, N_k training images of class k. Half-precision inputs are raised to float32, float64 stays.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rescom_timm.distributed import processes
from rescom_timm.losses.weights import at_least_float32, log_prior, vector_scale


def balanced_softmax(
    logits: Tensor, labels: Tensor, counts: Tensor, smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Balanced Softmax: cross-entropy of s + log N_k.

    logits: (N, K). labels: (N,). counts: (K,) training images. smoothing: share of the target spread evenly over all
    classes. Returns a scalar, the mean over N, or (N,) with reduction "none"; over the 2B rows of two views it is
    Siamese Balanced Softmax (paper eq. 6).
    """
    logits = at_least_float32(logits)
    logits = logits + counts.to(logits.dtype).log()
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)


def focal(
    logits: Tensor, labels: Tensor, gamma: float, weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5): -w_y (1 - p_y)^gamma log p_y.

    logits: (N, K). labels: (N,). weights: (K,) of the classes, ones by default. With gamma = 0 and
    w_k = K (1 / E_k) / sum(1 / E_j) it is the class-balanced loss (Cui et al. 2019, arXiv 1901.05555, eq. 8). Returns a
    scalar, the mean over N, or (N,) with reduction "none".
    """
    log_p = -F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    loss = -((-torch.expm1(log_p)) ** gamma) * log_p
    loss = loss if weights is None else loss * weights.to(loss.dtype)[labels]
    return loss.mean() if reduction == "mean" else loss


def logit_adjustment(
    logits: Tensor, labels: Tensor, counts: Tensor, tau: float = 1.0, gamma: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Logit-adjusted cross-entropy (Menon et al. 2021, arXiv 2007.07314, eq. 10): of s + tau log pi_k, pi_k = N_k / N.

    With gamma the VS loss (Kini et al. 2021, arXiv 2103.01550): of s_k / D_k + tau log pi_k, D_k = (N_max / N_k)^gamma.
    logits: (N, K). labels: (N,). counts: (K,). weights: (K,) of the classes; the loss is then the weighted mean, as
    `weighted_cross_entropy`. Returns a scalar, the mean over N.
    """
    logits = at_least_float32(logits)
    if gamma:
        logits = logits * vector_scale(counts, gamma).to(logits.dtype)
    logits = logits + tau * log_prior(counts).to(logits.dtype)
    return F.cross_entropy(logits, labels) if weights is None else weighted_cross_entropy(logits, labels, weights)


def ldam(
    cosines: Tensor, labels: Tensor, margins: Tensor, scale: float = 30.0, weights: Tensor | None = None
) -> Tensor:
    """Label-distribution-aware margin loss (Cao et al. 2019, eq. 12): cross-entropy of s (z - Delta_y at the label).

    cosines: (N, K) of features and class vectors. labels: (N,). margins: (K,). scale: s. weights: (K,), for deferred
    re-weighting; the loss is then the weighted mean, as in the authors' code. Returns a scalar.
    """
    logits = scale * less_margins(cosines, labels, margins)
    return F.cross_entropy(logits, labels) if weights is None else weighted_cross_entropy(logits, labels, weights)


def less_margins(cosines: Tensor, labels: Tensor, margins: Tensor) -> Tensor:
    """Cosines z - Delta_y at the label, z elsewhere, (N, K). cosines: (N, K). labels: (N,). margins: (K,)."""
    cosines = at_least_float32(cosines)
    return cosines - F.one_hot(labels, cosines.shape[1]) * margins.to(cosines.dtype)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean sum w_y CE / sum w_y, as `weighted_mean`. weights: (K,) of the classes."""
    logits = at_least_float32(logits)
    return weighted_mean(F.cross_entropy(logits, labels, reduction="none"), weights.to(logits.dtype)[labels])


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean sum w v / sum w over the batch of all processes. values, weights: of one shape.

    Returns each process's share times their number, so that the mean over processes (which DistributedDataParallel
    takes) is the value of one process with the whole batch.
    """
    total = weights.sum()
    if processes()[1] > 1:
        dist.all_reduce(total)
    return processes()[1] / total * (weights * values).sum()


def lader(logits: Tensor, labels: Tensor, counts: Tensor, regularization: float = 0.1) -> Tensor:
    """Regulariser of LADE (LADER, Hong et al. 2021, arXiv 2012.00321, eqs. 15 and 16), for a balanced target.

    sum_k pi_k [ -mean of f_k over the class's images + D_k + regularization * D_k^2 ], D_k = log( 1/N sum_i (1 / K) /
    pi_k * exp f_k(x_i) )

    logits: (N, K), the f. A class without an image in the batch has no first term. D_k is that of the authors' code,
    which shifts each class's scores by its own prior; importance weights of the images would have pi_(y_i).
    """
    logits = at_least_float32(logits)
    prior = log_prior(counts).to(logits.dtype)
    own = F.one_hot(labels, len(counts)).to(logits.dtype)
    first = (own * logits).sum(dim=0) / own.sum(dim=0).clamp(min=1)
    second = (logits - prior - math.log(len(counts))).logsumexp(dim=0) - math.log(len(labels))
    return (prior.exp() * (second - first + regularization * second**2)).sum()


def label_aware_smoothing(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Label-aware smoothing (MiSLAS, Zhong et al. 2021, arXiv 2104.00466), the mean over N.

    Cross-entropy with the target eps_y / K of every class and 1 - eps_y more at the label. smoothing: (K,), the eps of
    each class. This is the authors' code; their equation spreads eps_y over the K - 1 other classes.
    """
    log_p = at_least_float32(logits).log_softmax(dim=1)
    eps = smoothing.to(log_p.dtype)[labels]
    own = log_p.gather(1, labels[:, None]).squeeze(1)
    return -((1 - eps) * own + eps * log_p.mean(dim=1)).mean()
