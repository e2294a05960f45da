"""The paper's equations as plain loops over one query, one key, one class at a time, in float64.

Written from the equations alone; nothing of the package is used. Slow on purpose: this is what the package is
checked against. Vectors are 1-D float64 tensors, so that autograd gives the references' gradients too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def effective_number(count: int, beta: float) -> float:
    """E = (1 - beta^N) / (1 - beta) as the geometric sum that it is, which loses no digits near beta = 1."""
    return math.fsum(beta**j for j in range(count))


def class_weights(counts: Sequence[int], beta: float, normalized: bool) -> list[float]:
    """Eq. 2: 1 / E_k, or mean(E) / E_k."""
    effective = [effective_number(count, beta) for count in counts]
    scale = sum(effective) / len(effective) if normalized else 1.0
    return [scale / one for one in effective]


def balanced_softmax(logits: Tensor, labels: Sequence[int], counts: Sequence[int]) -> Tensor:
    """One view: mean over images of -log( N_y e^{s_y} / sum_k N_k e^{s_k} )."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits, labels, strict=True):
        denominator = sum(counts[k] * torch.exp(row[k]) for k in range(len(counts)))
        total = total - torch.log(counts[label] * torch.exp(row[label]) / denominator)
    return total / len(labels)


def siamese_balanced_softmax(views: Sequence[Tensor], labels: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Eq. 6: the mean of the views' Balanced Softmax losses."""
    return sum((balanced_softmax(view, labels, counts) for view in views), torch.zeros(())) / len(views)


def one_query(positives: Sequence[Tensor], negatives: Sequence[Tensor], tau: float, weight: float) -> Tensor:
    """Eqs. 3 and 5 for one query, given its similarities: -(w / |P|) sum_p log( e^{s_p/tau} / sum_m e^{s_m/tau} )."""
    total = torch.zeros((), dtype=torch.float64)
    if not positives:
        return total
    denominator = sum(torch.exp(s / tau) for s in [*positives, *negatives])
    for s in positives:
        total = total + torch.log(torch.exp(s / tau) / denominator)
    return -weight / len(positives) * total


def one_query_gradient(
    positives: Sequence[float], negatives: Sequence[float], tau: float, weight: float
) -> tuple[list[float], list[float]]:
    """Eq. 4, dL/ds of one query: (w / tau) (p_m - [m positive] / |P|), p the softmax over all of the query's pairs."""
    if not positives:
        return [], [0.0] * len(negatives)
    denominator = sum(math.exp(s / tau) for s in [*positives, *negatives])
    return (
        [weight / tau * (math.exp(s / tau) / denominator - 1 / len(positives)) for s in positives],
        [weight / tau * (math.exp(s / tau) / denominator) for s in negatives],
    )


@dataclass
class Rings:
    """K rings of Q slots, filled one key at a time; a slot is None until it is first filled."""

    classes: int
    size: int
    slots: list[list[Tensor | None]] = field(init=False)
    entered: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [[None] * self.size for _ in range(self.classes)]
        self.entered = [0] * self.classes

    def enqueue(self, keys: Tensor, labels: Sequence[int]) -> None:
        for key, label in zip(keys, labels, strict=True):
            self.slots[label][self.entered[label] % self.size] = key.detach().clone()
            self.entered[label] += 1

    def of(self, label: int) -> list[Tensor]:
        return [key for key in self.slots[label] if key is not None]


def mine(query: Tensor, label: int, rings: Rings, qp: int | None, qn: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Eq. 5's choice: similarities of the Qp least similar keys of the own class and of the Qn most similar keys of
    other classes. None keeps all, as in eq. 3."""
    own = [query.dot(key) for key in rings.of(label)]
    others = [query.dot(key) for k in range(rings.classes) if k != label for key in rings.of(k)]
    own.sort(key=Tensor.item)
    others.sort(key=Tensor.item, reverse=True)
    return own[:qp], others[:qn]


def paper(
    queries: Tensor, labels: Sequence[int], rings: Rings, qp: int | None, qn: int | None, tau: float,
    weights: Sequence[float],
) -> Tensor:  # fmt: skip
    """Mode `paper` (eq. 5, Algorithm 1; eq. 3 where nothing is mined): queue keys only, mean over the queries."""
    total = torch.zeros((), dtype=torch.float64)
    for query, label in zip(queries, labels, strict=True):
        positives, negatives = mine(query, label, rings, qp, qn)
        total = total + one_query(positives, negatives, tau, weights[label])
    return total / len(labels)


def released(
    views: Tensor, labels: Sequence[int], rings: Rings, qp: int | None, qn: int | None, tau: float,
    weights: Sequence[float],
) -> Tensor:  # fmt: skip
    """Mode `released`: both views are queries; all other views of the batch are pairs too, never mined."""
    total = torch.zeros((), dtype=torch.float64)
    for i, (query, label) in enumerate(zip(views, labels, strict=True)):
        positives, negatives = mine(query, label, rings, qp, qn)
        for j, (key, other) in enumerate(zip(views, labels, strict=True)):
            if i == j:
                continue
            (positives if label == other else negatives).append(query.dot(key))
        total = total + one_query(positives, negatives, tau, weights[label])
    return total / len(labels)
