"""Logits of embeddings under a von Mises-Fisher distribution of each class (ProCo, Du et al. 2024, arXiv 2403.06726).

Shapes: N embeddings of width D, K classes. Half-precision inputs are raised to float32, float64 stays.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rescom_timm.losses import weights

LARGEST_KAPPA = 1e5
ORDER, TERMS = 64, 6
"""From this order on, the uniform expansion of the Bessel function with so many terms has 11 digits or more."""


def concentration(means: Tensor) -> Tensor:
    """kappa_k = D R / (1 - R^2), R = |m_k|, at most 1e5, as it is where R is 1 or above by rounding.

    means: (K, D), of unit vectors. Returns (K,).
    """
    length = means.norm(dim=1)
    kappa = means.shape[1] * length / (1 - length**2)
    return kappa.where((kappa >= 0) & (kappa <= LARGEST_KAPPA), LARGEST_KAPPA)


def expected_contrast(embeddings: Tensor, means: Tensor, temperature: float) -> Tensor:
    """Compute log E exp(z.v / tau) over the v of each class, (N, K).

    It is C(|kappa_k mu_k + z / tau|) - C(kappa_k), with C(x) = log I_nu(x) - nu log x, nu = D / 2 - 1.

    embeddings: (N, D) unit vectors, z, D >= 2. means: (K, D), without a gradient, |m| <= 1. Found in float64.
    """
    kappa, mu = concentration(weights.exact(means)), F.normalize(means, dim=1)
    embeddings = weights.at_least_float32(embeddings)
    cosine = weights.exact(embeddings @ mu.to(embeddings.dtype).T)
    squares = kappa**2 + (2 / temperature) * kappa * cosine + temperature**-2  # of |kappa mu + z / tau|
    order = means.shape[1] / 2 - 1
    logits = log_normalizer(squares.clamp(min=1e-12).sqrt(), order) - log_normalizer(kappa, order)
    return logits.to(embeddings.dtype)


def log_normalizer(x: Tensor, order: float) -> Tensor:
    """Compute C(x) = log I_nu(x) - nu log x, nu = order >= 0, for x >= 0 of any size, elementwise.

    x: float64 (float32 where the device has no other). Once differentiable: dC/dx = I_(nu+1)(x) / I_nu(x).
    """
    return _LogNormalizer.apply(x, order)


class _LogNormalizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: float) -> Tensor:  # type: ignore[override]
        steps = max(0, math.ceil(ORDER - order))
        above = order + steps
        value = _expansion(x, above)
        slope = (_expansion(x, above + 1) - value).exp()  # I_(n+1) / (x I_n), of n = above
        for step in range(steps):
            slope = 1 / (2 * (above - step) + x**2 * slope)  # of the order below
            value = value - slope.log()
        ctx.save_for_backward(x * slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None


def _expansion(x: Tensor, order: float) -> Tensor:
    """C(x) by the uniform expansion of I_nu (DLMF 10.41.3)."""
    root = (1 + (x / order) ** 2).sqrt()
    p = 1 / root
    total = torch.zeros_like(x)
    for k in reversed(range(TERMS)):
        value = torch.zeros_like(x)
        for coefficient in reversed(POLYNOMIALS[k]):
            value = value * p + coefficient
        total = total / order + value
    return order * (root - (1 + root).log() - math.log(order)) - 0.5 * (2 * math.pi * order * root).log() + total.log()


def _polynomials(terms: int) -> list[list[float]]:
    """U_0 to U_(terms-1) (DLMF 10.41.9), each as the coefficients of 1, p, p^2 ..."""
    found = [[Fraction(1)]]
    for _ in range(terms - 1):
        u = found[-1]
        following = [Fraction(0)] * (len(u) + 3)
        for n, c in enumerate(u):  # U' = p^2 (1 - p^2) U'_k / 2 + integral of (1 - 5 t^2) U_k / 8
            following[n + 1] += c * n / 2 + c / (8 * (n + 1))
            following[n + 3] -= c * n / 2 + 5 * c / (8 * (n + 3))
        found.append(following)
    return [[float(c) for c in polynomial] for polynomial in found]


POLYNOMIALS = _polynomials(TERMS)
