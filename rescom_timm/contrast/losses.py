"""Losses as pure functions, in the paper's symbols. Half-precision inputs are raised to float32, float64 stays.

Shapes: N queries, M pairs of each, K classes, N_k training images of class k.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rescom_timm.contrast.pairs import Pairs

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


def balanced_softmax(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Balanced Softmax: cross-entropy of s + log N_k. Over the 2B stacked rows of two views it is Siamese Balanced
    Softmax (paper eq. 6).

    logits: (N, K). labels: (N,). counts: (K,) training images. Returns a scalar, the mean.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits + counts.to(logits.dtype).log(), labels)


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


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; wider types as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
