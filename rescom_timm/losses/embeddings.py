"""Losses of embeddings against prototypes and centroids.

Shapes: N images, K classes, N_k training images of class k. Half-precision inputs are raised to float32, float64 stays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rescom_timm.errors import InputError
from rescom_timm.losses.weights import at_least_float32


def check_temperature(temperature: float) -> None:
    """Raises InputError for a temperature at which every softmax over similarities is one-hot or uniform."""
    if not 1e-3 <= temperature <= 1e3:
        raise InputError("method.value", f"temperature must be in [0.001, 1000], not {temperature:g}")


def prototype_contrast(embeddings: Tensor, labels: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Prototypical supervised contrastive loss (Hybrid-PSC, Wang et al. 2021, arXiv 2103.14267).

    -log( exp(z.p_y / tau) / sum over j != y of exp(z.p_j / tau) ), the mean over N.

    embeddings: (N, D) and prototypes: (K, D), unit vectors. labels: (N,). Returns a scalar.
    """
    logits = at_least_float32(embeddings) @ prototypes.to(torch.promote_types(embeddings.dtype, torch.float32)).T
    logits = logits / temperature
    own = F.one_hot(labels, len(prototypes)).bool()
    others = logits.masked_fill(own, torch.finfo(logits.dtype).min)
    return (others.logsumexp(dim=1) - logits.gather(1, labels[:, None]).squeeze(1)).mean()


def balanced_contrast(embeddings: Tensor, labels: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Compute the balanced contrastive loss (BCL, Zhu et al. 2022, arXiv 2207.09052).

    Keys are the other embeddings and a prototype of each class; a class in the denominator is the mean over its keys,
    of those that can be positives for the own class (class averaging), and no class is missing (class complement).

    L_i = mean over positives p of -log( exp(z_i.z_p / tau) / sum_j!=i exp(z_i.z_j / tau) / (c(j) - [j positive]) ),
    c(j) the keys of j's class, z_i among them.

    embeddings: (N, D) and prototypes: (K, D), unit vectors. labels: (N,). Returns a scalar, the mean over N.
    """
    embeddings = at_least_float32(embeddings)
    keys = torch.cat([embeddings, prototypes.to(embeddings.dtype)])
    key_labels = torch.cat([labels, torch.arange(len(prototypes), device=labels.device)])
    own = torch.eye(len(labels), len(keys), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == key_labels) & ~own
    number = (key_labels[:, None] == key_labels).sum(dim=1)
    logits = embeddings @ keys.T / temperature
    shared = (logits - (number - positive.to(logits.dtype)).log()).masked_fill(own, torch.finfo(logits.dtype).min)
    mean_positive = (logits * positive).sum(dim=1) / positive.sum(dim=1)
    return (shared.logsumexp(dim=1) - mean_positive).mean()


def robust_centroids(
    features: Tensor, labels: Tensor, centroids: Tensor, known: Tensor, epsilon: Tensor, temperature: float
) -> Tensor:
    """Distributional robustness loss (DRO-LT, Samuel & Chechik 2021, arXiv 2104.03066).

    For each class c of the batch, against all N features, then the mean over the classes:

    -mean over its z of log( exp(-(|mu_c - z| + eps_c) / tau) / sum_z' exp(-(|mu_c - z'| + eps_c [z' of c]) / tau) )

    features: (N, F). centroids: (K, F). known: (K,) bool, classes that have a centroid. epsilon: (K,) radius of each
    class's ball of uncertainty. Returns a scalar, 0 if no class of the batch is known. The authors' code assigns
    unequal radii to the wrong images (in batch order to pairs in class order); this does not.
    """
    features, centroids = at_least_float32(features), centroids.to(at_least_float32(features).dtype)
    squares = (centroids**2).sum(dim=1)[:, None] + (features**2).sum(dim=1) - 2 * centroids @ features.T
    distance = squares.clamp(min=1e-12).sqrt()
    own = labels[None, :] == torch.arange(len(centroids), device=labels.device)[:, None]
    log_p = (-(distance + epsilon.to(distance.dtype)[:, None] * own) / temperature).log_softmax(dim=1)
    present = own.any(dim=1) & known
    loss = -(log_p * own).sum(dim=1) / own.sum(dim=1).clamp(min=1)
    return loss.where(present, 0).sum() / present.sum().clamp(min=1)
