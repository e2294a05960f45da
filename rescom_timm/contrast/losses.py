"""Losses as pure functions, in the paper's symbols. Half-precision inputs are raised to float32, float64 stays.

Shapes: N queries, M pairs of each, K classes, N_k training images of class k.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rescom_timm.contrast.pairs import Pairs
from rescom_timm.contrast.queue import processes

WeightForm = Literal["normalized", "printed"]


def class_weights(counts: Tensor, beta: float, form: WeightForm = "normalized") -> Tensor:
    """Class weights w_k from the effective number of images E_k = (1 - beta^N_k) / (1 - beta) (paper eq. 2).

    counts: (K,) training images N_k, at least 1 each. beta: in [0, 1).
    form: "printed" is w_k = 1 / E_k; "normalized" is w_k = mean(E) / E_k, as trained by the authors, which keeps
    the loss on its scale whatever beta (beta = 0 gives ones in both).
    Returns (K,) float32. Raises ValueError for beta outside [0, 1), an unknown form or a class without images.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), not {beta}")
    if int(counts.min()) < 1:
        empty = (counts < 1).nonzero().flatten().tolist()
        raise ValueError(f"classes without a training image have no weight: {empty[:5]}; leave them out of the index")
    # expm1 and log1p in float64: at beta = .999999 a float32 power would keep two digits of 1 - beta^N.
    log_beta = torch.log1p(torch.tensor(beta - 1, dtype=torch.float64, device=counts.device))
    effective = torch.expm1(counts.double() * log_beta) / (beta - 1)
    if form == "normalized":
        return (effective.mean() / effective).float()
    if form == "printed":
        return effective.reciprocal().float()
    raise ValueError(f"unknown form of class weights {form!r}: normalized or printed")


def balanced_softmax(logits: Tensor, labels: Tensor, counts: Tensor, smoothing: float = 0.0) -> Tensor:
    """Balanced Softmax: cross-entropy of s + log N_k. Over the 2B stacked rows of two views it is Siamese Balanced
    Softmax (paper eq. 6).

    logits: (N, K). labels: (N,). counts: (K,) training images. smoothing: share of the target spread evenly over
    all classes. Returns a scalar, the mean.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits + counts.to(logits.dtype).log(), labels, label_smoothing=smoothing)


def check_temperature(temperature: float) -> None:
    """Raises ValueError for a temperature at which every softmax over similarities is one-hot or flat."""
    if not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"temperature must be in [0.001, 1000], not {temperature:g}")


def supcon(pairs: Pairs, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Class-balanced supervised contrastive loss (paper eqs. 3 and 5) over any pairs.

    L_i = -(w_i / |P_i|) * sum over positives p of log( exp(s_ip / tau) / sum over valid pairs m of exp(s_im / tau) )

    weights: (N,) the weight of each query's class, ones by default. Returns a scalar, the mean over all N queries.
    P_i are the valid positives of query i; a query that has none adds 0 and gets no gradient.
    """
    logits = at_least_float32(pairs.similarity) / temperature
    # The lowest finite number, not -inf: a row without any valid pair must give zeros, not NaN.
    logits = logits.masked_fill(~pairs.valid, torch.finfo(logits.dtype).min)
    positive = pairs.positive & pairs.valid
    number = positive.sum(dim=1)
    mean_positive = logits.masked_fill(~positive, 0).sum(dim=1) / number.clamp(min=1)
    loss = (logits.logsumexp(dim=1) - mean_positive).where(number > 0, 0)
    return (loss if weights is None else loss * weights).mean()


# ------------------------------------------------------------------------------ what ResCom is compared with: logits


def focal(logits: Tensor, labels: Tensor, gamma: float, weights: Tensor | None = None) -> Tensor:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5): -w_y (1 - p_y)^gamma log p_y, the mean over N.

    logits: (N, K). labels: (N,). weights: (K,) of the classes, ones by default. With gamma = 0 and
    w_k = K (1 / E_k) / sum(1 / E_j) it is the class-balanced loss (Cui et al. 2019, arXiv 1901.05555, eq. 8).
    """
    log_p = -F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    loss = -((-torch.expm1(log_p)) ** gamma) * log_p
    return (loss if weights is None else loss * weights.to(loss.dtype)[labels]).mean()


def logit_adjustment(logits: Tensor, labels: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    """Logit-adjusted cross-entropy (Menon et al. 2021, arXiv 2007.07314, eq. 10): that of s + tau log pi_k,
    pi_k = N_k / N. Returns a scalar, the mean over N."""
    logits = at_least_float32(logits)
    return F.cross_entropy(logits + tau * log_prior(counts).to(logits.dtype), labels)


def exact(counts: Tensor) -> Tensor:
    """Counts as float64, or as float32 on Apple's GPUs, which have no float64."""
    return counts.float() if counts.device.type == "mps" else counts.double()


def log_prior(counts: Tensor) -> Tensor:
    """log(N_k / N), (K,), in the precision of `exact`, of counts (K,)."""
    return (exact(counts) / counts.sum()).log()


def ldam_margins(counts: Tensor, largest: float = 0.5) -> Tensor:
    """Margins C / N_k^(1/4), (K,), with C such that the rarest class has the largest (Cao et al. 2019,
    arXiv 1906.07413, eq. 13)."""
    margins = counts.double() ** -0.25
    return (largest * margins / margins.max()).float()


def ldam(
    cosines: Tensor, labels: Tensor, margins: Tensor, scale: float = 30.0, weights: Tensor | None = None
) -> Tensor:
    """Label-distribution-aware margin loss (Cao et al. 2019, eq. 12): cross-entropy of s (z - Delta_y at the label).

    cosines: (N, K) of features and class vectors. margins: (K,). weights: (K,), for deferred re-weighting; the loss
    is then the weighted mean, as in the authors' training.
    """
    logits = scale * less_margins(cosines, labels, margins)
    return F.cross_entropy(logits, labels) if weights is None else weighted_cross_entropy(logits, labels, weights)


def less_margins(cosines: Tensor, labels: Tensor, margins: Tensor) -> Tensor:
    """z - Delta_y at the label, z elsewhere, (N, K), of cosines (N, K), labels (N,) and margins (K,)."""
    cosines = at_least_float32(cosines)
    return cosines - F.one_hot(labels, cosines.shape[1]) * margins.to(cosines.dtype)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum w_y CE / sum w_y, as `weighted_mean`. weights: (K,) of the classes."""
    logits = at_least_float32(logits)
    return weighted_mean(F.cross_entropy(logits, labels, reduction="none"), weights.to(logits.dtype)[labels])


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum w v / sum w over the batch of all processes: each one's share, times their number, so that their mean (which
    DistributedDataParallel takes) is that of one process with the whole batch. values, weights: of one shape."""
    total = weights.sum()
    if processes()[1] > 1:
        dist.all_reduce(total)
    return processes()[1] / total * (weights * values).sum()


def lader(logits: Tensor, labels: Tensor, counts: Tensor, regularization: float = 0.1) -> Tensor:
    """The regulariser of LADE (LADER, Hong et al. 2021, arXiv 2012.00321, eqs. 15 and 16), of a balanced target:

    sum_k pi_k [ -mean of f_k over the class's images + D_k + regularization * D_k^2 ],
    D_k = log( 1/N sum_i (1 / K) / pi_k * exp f_k(x_i) )

    logits: (N, K), the f. A class without an image in the batch has no first term. D_k is that of the authors'
    training, which shifts each class's scores by its own prior; importance weights of the images would have pi_(y_i).
    """
    logits = at_least_float32(logits)
    prior = log_prior(counts).to(logits.dtype)
    own = F.one_hot(labels, len(counts)).to(logits.dtype)
    first = (own * logits).sum(dim=0) / own.sum(dim=0).clamp(min=1)
    second = (logits - prior - math.log(len(counts))).logsumexp(dim=0) - math.log(len(labels))
    return (prior.exp() * (second - first + regularization * second**2)).sum()


def diversity(logits: Tensor, temperature: Tensor) -> Tensor:
    """How far experts are from their mean: sum over experts of T^2 KL(mean || expert), the mean over N, T the mean
    temperature (the diversity loss of RIDE, Wang et al. 2021, arXiv 2010.01809, against the mean expert as its authors
    train).

    logits: (E, N, K) of E experts; the mean expert gets no gradient. temperature: (K,) of each class.
    """
    logits = at_least_float32(logits)
    temperature = temperature.to(logits.dtype)
    log_p = (logits / temperature).log_softmax(dim=2)
    mean = (logits.mean(dim=0).detach() / temperature).softmax(dim=1)
    divergence = F.kl_div(log_p, mean.expand_as(log_p), reduction="sum") / logits.shape[1]
    return temperature.mean() ** 2 * divergence


def distillation(logits: Tensor, teacher: Tensor, temperature: float, power: float = 1.0) -> Tensor:
    """tau^2 KL(p || softmax(s / tau)), the mean over N, p_k ~ softmax(t / tau)_k^power (Hinton et al. 2015, arXiv
    1503.02531; the power: DiVE, He et al. 2021, arXiv 2103.15042).

    logits: (N, K) of the student, s. teacher: (N, K), t, which get no gradient. temperature: tau.
    """
    logits, teacher = at_least_float32(logits), at_least_float32(teacher.detach())
    p = (power / temperature * teacher).softmax(dim=1)
    return temperature**2 * F.kl_div((logits / temperature).log_softmax(dim=1), p, reduction="batchmean")


def label_aware_smoothing(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Label-aware smoothing (MiSLAS, Zhong et al. 2021, arXiv 2104.00466): cross-entropy with the target
    eps_y / K of every class and 1 - eps_y more at the label. smoothing: (K,), the eps of each class. This is the
    authors' training; their equation spreads eps_y over the K - 1 other classes."""
    log_p = at_least_float32(logits).log_softmax(dim=1)
    eps = smoothing.to(log_p.dtype)[labels]
    own = log_p.gather(1, labels[:, None]).squeeze(1)
    return -((1 - eps) * own + eps * log_p.mean(dim=1)).mean()


def smoothing_by_count(
    counts: Tensor, head: float, tail: float, form: Literal["concave", "linear", "convex"] = "concave"
) -> Tensor:
    """eps_k (K,) between `tail` for the rarest and `head` for the most frequent class, in the three forms of MiSLAS."""
    share = (counts.double() - counts.min()) / max(int(counts.max() - counts.min()), 1)
    if form == "concave":
        share = (share * math.pi / 2).sin()
    elif form == "convex":
        share = 1 + (1.5 * math.pi + share * math.pi / 2).sin()
    return (tail + (head - tail) * share).float()


def inverse_power_weights(counts: Tensor, power: float) -> Tensor:
    """w_k ~ pi_k^-power with mean 1, (K,): the generalised re-weighting of DisAlign (Zhang et al. 2021,
    arXiv 2103.16370, eq. 11)."""
    weights = (-power * log_prior(counts)).softmax(dim=0)
    return (len(counts) * weights).float()


# -------------------------------------------------------------------------- what ResCom is compared with: embeddings


def paco(
    centres: Tensor, labels: Tensor, pairs: Pairs, temperature: float, alpha: float, smoothing: float = 0.0
) -> Tensor:
    """Parametric contrastive loss (PaCo, Cui et al. 2021, arXiv 2107.12028, with its rebalanced centres): one softmax
    over the K class centres and all valid pairs,

    L_i = - sum_t w_t log p_it / sum_t w_t,   w = 1 for the own centre, alpha for every positive pair

    centres: (N, K) logits of the centres, with log pi_k added. pairs: (N, M). smoothing: of the centres' targets
    (GPaCo, arXiv 2209.12400). The division is the authors' training. Returns a scalar, the mean over N.
    """
    centres = at_least_float32(centres)
    logits = (at_least_float32(pairs.similarity) / temperature).to(centres.dtype)
    logits = logits.masked_fill(~pairs.valid, torch.finfo(logits.dtype).min)
    log_p = torch.cat((centres, logits), dim=1).log_softmax(dim=1)
    own = F.one_hot(labels, centres.shape[1]).to(log_p.dtype)
    own = own * (1 - smoothing) + (1 - own) * smoothing / (centres.shape[1] - 1)
    positive = alpha * (pairs.positive & pairs.valid).to(log_p.dtype)
    target = torch.cat((own, positive), dim=1)
    return -((target * log_p.masked_fill(target == 0, 0)).sum(dim=1) / target.sum(dim=1)).mean()


def prototype_contrast(embeddings: Tensor, labels: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Prototypical supervised contrastive loss (Hybrid-PSC, Wang et al. 2021, arXiv 2103.14267):
    -log( exp(z.p_y / tau) / sum over j != y of exp(z.p_j / tau) ), the mean over N.

    embeddings: (N, D) and prototypes: (K, D), unit vectors.
    """
    logits = at_least_float32(embeddings) @ prototypes.to(torch.promote_types(embeddings.dtype, torch.float32)).T
    logits = logits / temperature
    own = F.one_hot(labels, len(prototypes)).bool()
    others = logits.masked_fill(own, torch.finfo(logits.dtype).min)
    return (others.logsumexp(dim=1) - logits.gather(1, labels[:, None]).squeeze(1)).mean()


def robust_centroids(
    features: Tensor, labels: Tensor, centroids: Tensor, known: Tensor, epsilon: Tensor, temperature: float
) -> Tensor:
    """Distributional robustness loss (DRO-LT, Samuel & Chechik 2021, arXiv 2104.03066): for each
    class c of the batch, against all N features,

    -mean over its z of log( exp(-(|mu_c - z| + eps_c) / tau) / sum_z' exp(-(|mu_c - z'| + eps_c [z' of c]) / tau) ),

    the mean over the classes. features: (N, F). centroids: (K, F). known: (K,) bool, classes that have a centroid.
    epsilon: (K,) radius of each class's ball of uncertainty. Zero where no class of the batch is known. The authors'
    code hands unequal radii to the wrong images (in batch order to pairs in class order), which is not followed here.
    """
    features, centroids = at_least_float32(features), centroids.to(at_least_float32(features).dtype)
    squares = (centroids**2).sum(dim=1)[:, None] + (features**2).sum(dim=1) - 2 * centroids @ features.T
    distance = squares.clamp(min=1e-12).sqrt()
    own = labels[None, :] == torch.arange(len(centroids), device=labels.device)[:, None]
    log_p = (-(distance + epsilon.to(distance.dtype)[:, None] * own) / temperature).log_softmax(dim=1)
    present = own.any(dim=1) & known
    loss = -(log_p * own).sum(dim=1) / own.sum(dim=1).clamp(min=1)
    return loss.where(present, 0).sum() / present.sum().clamp(min=1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; wider types as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
