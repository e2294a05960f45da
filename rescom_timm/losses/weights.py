"""Functions of the class counts: weights, priors, margins and smoothing of each class.

Shapes: N images, K classes, N_k training images of class k. Half-precision inputs are raised to float32, float64 stays.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rescom_timm.errors import InputError

WeightForm = Literal["normalized", "printed"]


def class_weights(counts: Tensor, beta: float, form: WeightForm = "normalized") -> Tensor:
    """Class weights w_k from the effective number of images E_k = (1 - beta^N_k) / (1 - beta) (paper eq. 2).

    counts: (K,) training images N_k, at least 1 each. beta: in [0, 1). form: "printed" is w_k = 1 / E_k; "normalized"
    is w_k = mean(E) / E_k, as in the authors' code, which keeps the scale of the loss for every beta (beta = 0 gives
    ones in both). Returns (K,) float32. Raises InputError for beta outside [0, 1), an unknown form or a class without
    images.
    """
    if not 0 <= beta < 1:
        raise InputError("method.value", f"beta must be in [0, 1), not {beta}")
    if int(counts.min()) < 1:
        empty = (counts < 1).nonzero().flatten().tolist()
        raise InputError("data.empty_class", f"classes {empty[:5]} have no training image: leave them out of the index")
    # expm1 and log1p in float64: at beta = .999999 a float32 power would keep two digits of 1 - beta^N.
    log_beta = torch.log1p(torch.tensor(beta - 1, dtype=torch.float64, device=counts.device))
    effective = torch.expm1(counts.double() * log_beta) / (beta - 1)
    if form == "normalized":
        return (effective.mean() / effective).float()
    if form == "printed":
        return effective.reciprocal().float()
    raise InputError("method.value", f"form of class weights must be normalized or printed, not {form!r}")


def exact(counts: Tensor) -> Tensor:
    """Counts as float64, or as float32 on Apple's GPUs, which have no float64."""
    return counts.float() if counts.device.type == "mps" else counts.double()


def log_prior(counts: Tensor) -> Tensor:
    """Logarithm of the class prior, log(N_k / N), (K,), in the precision of `exact`. counts: (K,)."""
    return (exact(counts) / counts.sum()).log()


def vector_scale(counts: Tensor, gamma: float) -> Tensor:
    """(N_k / N_max)^gamma, (K,), by which the VS loss multiplies logits (Kini et al. 2021, arXiv 2103.01550)."""
    return (exact(counts) / counts.max()) ** gamma


def inverse_power_weights(counts: Tensor, power: float) -> Tensor:
    """Re-weighting w_k ~ pi_k^-power with mean 1, (K,) (DisAlign, Zhang et al. 2021, arXiv 2103.16370, eq. 11)."""
    weights = (-power * log_prior(counts)).softmax(dim=0)
    return (len(counts) * weights).float()


def ldam_margins(counts: Tensor, largest: float = 0.5) -> Tensor:
    """Margins C / N_k^(1/4), (K,), `largest` for the rarest class (Cao et al. 2019, arXiv 1906.07413, eq. 13)."""
    margins = counts.double() ** -0.25
    return (largest * margins / margins.max()).float()


def smoothing_by_count(
    counts: Tensor, head: float, tail: float, form: Literal["concave", "linear", "convex"] = "concave"
) -> Tensor:
    """Smoothing eps_k (K,) from `tail` for the rarest to `head` for the most frequent class (MiSLAS's three forms)."""
    share = (counts.double() - counts.min()) / max(int(counts.max() - counts.min()), 1)
    if form == "concave":
        share = (share * math.pi / 2).sin()
    elif form == "convex":
        share = 1 + (1.5 * math.pi + share * math.pi / 2).sin()
    return (tail + (head - tail) * share).float()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Raise float16 and bfloat16 to float32; wider types stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
