"""Random cases for the tests of this folder: shapes by hypothesis, numbers by a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from rescom_timm.contrastive.queue import ClassBalancedQueue
from tests.contrastive.reference import Rings

# derandomize: a failure on one machine is a failure on every machine.
thrifty = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def unit(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


@dataclass
class Case:
    """N queries of K classes beside a class-balanced queue of Q keys each, partly filled, and its naive twin."""

    queries: Tensor
    labels: Tensor
    queue: ClassBalancedQueue
    rings: Rings
    qp: int
    qn: int
    tau: float
    weights: Tensor
    generator: torch.Generator

    @property
    def label_list(self) -> list[int]:
        return self.labels.tolist()

    @property
    def weight_list(self) -> list[float]:
        return self.weights.tolist()


def make_case(
    seed: int, classes: int, per_class: int, dim: int, rows: int, entered: int, qp: int, qn: int, tau: float
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    queue = ClassBalancedQueue(classes, per_class, dim).double()
    rings = Rings(classes, per_class)
    keys, key_labels = unit((entered, dim), generator), torch.randint(classes, (entered,), generator=generator)
    queue.enqueue(keys, key_labels)
    rings.enqueue(keys, key_labels.tolist())
    labels = torch.randint(classes, (rows,), generator=generator)
    weights = torch.rand(classes, generator=generator, dtype=torch.float64) * 3 + 0.01
    queries = unit((rows, dim), generator).requires_grad_()
    return Case(queries, labels, queue, rings, qp, qn, tau, weights, generator)


@st.composite
def cases(draw: st.DrawFn, min_rows: int = 1) -> Case:
    classes, per_class = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return make_case(
        seed=draw(st.integers(0, 2**31)),
        classes=classes,
        per_class=per_class,
        dim=draw(st.integers(2, 6)),
        rows=draw(st.integers(min_rows, 6)),
        entered=draw(st.integers(0, 3 * classes * per_class)),
        qp=draw(st.integers(0, per_class)),
        qn=draw(st.integers(0, (classes - 1) * per_class)),
        tau=draw(st.sampled_from([0.05, 0.2, 1.0])),
    )
