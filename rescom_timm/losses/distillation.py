"""Losses between nets: a teacher and a student, or several experts.

Shapes: N images, K classes, N_k training images of class k. Half-precision inputs are raised to float32, float64 stays.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rescom_timm.losses.weights import at_least_float32


def diversity(logits: Tensor, temperature: Tensor) -> Tensor:
    """Distance of experts from their mean: sum over experts of T^2 KL(mean || expert), the mean over N.

    T is the mean temperature. The diversity loss of RIDE (Wang et al. 2021, arXiv 2010.01809), against the mean expert
    as in the authors' code.

    logits: (E, N, K) of E experts; the mean expert gets no gradient. temperature: (K,) of each class. Returns a scalar.
    """
    logits = at_least_float32(logits)
    temperature = temperature.to(logits.dtype)
    log_p = (logits / temperature).log_softmax(dim=2)
    mean = (logits.mean(dim=0).detach() / temperature).softmax(dim=1)
    divergence = F.kl_div(log_p, mean.expand_as(log_p), reduction="sum") / logits.shape[1]
    return temperature.mean() ** 2 * divergence


def distillation(logits: Tensor, teacher: Tensor, temperature: float, power: float = 1.0) -> Tensor:
    """tau^2 KL(p || softmax(s / tau)), the mean over N, with p_k ~ softmax(t / tau)_k^power.

    Hinton et al. 2015, arXiv 1503.02531; the power: DiVE, He et al. 2021, arXiv 2103.15042.

    logits: (N, K) of the student, s. teacher: (N, K), t, which get no gradient. temperature: tau. Returns a scalar.
    """
    logits, teacher = at_least_float32(logits), at_least_float32(teacher.detach())
    p = (power / temperature * teacher).softmax(dim=1)
    return temperature**2 * F.kl_div((logits / temperature).log_softmax(dim=1), p, reduction="batchmean")
