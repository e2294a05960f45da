"""Comparing classifiers on the same images: McNemar's test, a paired bootstrap, Holm's correction. Percent throughout.

N images, K classes; of each system S seeds. `right` (S, N) bool: whether each seed labels each image right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import binomtest

from rescom_timm.metrics import CONFIDENCE, LIMITS, Limits, groups

DRAWS = 2000


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[float, int, int]:
    """Compute the exact two-sided p (McNemar 1947) of two systems, from which images each labels right, (N,).

    Returns p and the numbers of images that the first, and the second, alone labels right.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if not only_first + only_second:
        return 1.0, 0, 0
    return float(binomtest(only_first, only_first + only_second).pvalue), only_first, only_second


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): below alpha where the step-down test rejects."""
    adjusted, highest = [1.0] * len(p), 0.0
    for rank, place in enumerate(np.argsort(p, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


@dataclass(frozen=True)
class Difference:
    """Second minus first system in percent points, its 95% interval and two-sided p by the bootstrap."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Accuracies of each system (mean of its seeds) and differences of each to the first.

    By name: top1, mean_class, many, medium, few.
    """

    accuracies: list[dict[str, float]]
    intervals: list[dict[str, tuple[float, float]]]
    differences: list[dict[str, Difference]] = field(default_factory=list)
    """Of the second system, the third, ..."""
    tests: list[tuple[float, int, int] | None] = field(default_factory=list)
    """Likewise, `mcnemar` of the first system and this one; None where one of the two has several seeds."""
    adjusted: list[float] = field(default_factory=list)
    """Holm's over all systems, of the p of McNemar's test, or of the bootstrap of top1 where there is none."""


def compare(
    systems: Sequence[np.ndarray], labels: np.ndarray, counts: np.ndarray | None = None, limits: Limits = LIMITS,
    draws: int = DRAWS, seed: int = 0,
) -> Comparison:  # fmt: skip
    """Systems, right (S, N) each, on images of labels (N,); the first is the one that others are compared with.

    counts: (K,) training images, for the groups. Each replicate draws as many images of each class as there are, the
    same for every system, and of each system as many of its seeds as it has: it says what other images of these classes
    and other seeds would do.
    """
    order = np.argsort(labels, kind="stable")
    classes, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    stacks = [np.atleast_2d(right)[:, order].astype(np.float32) for right in systems]
    weights = _weights(classes, size, counts, limits)
    points = np.stack([_figures(stack.mean(axis=0), start, weights) for stack in stacks])  # (systems, figures)
    generator = np.random.default_rng(seed)
    drawn = np.empty((draws, *points.shape))
    first, each = np.repeat(start, size), np.repeat(size, size)
    for draw in range(draws):
        rows = first + (generator.random(len(first), dtype=np.float32) * each).astype(np.int64).clip(max=each - 1)
        for place, stack in enumerate(stacks):
            own = stack[0]
            if len(stack) > 1:
                own = stack[generator.integers(len(stack), size=len(stack))].mean(axis=0)
            drawn[draw, place] = _figures(own[rows], start, weights)
    names, ends = list(weights), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    bounds = np.quantile(drawn, ends, axis=0)
    differences, tests = [], []
    for place in range(1, len(stacks)):
        apart = drawn[:, place] - drawn[:, 0]
        low, high = np.quantile(apart, ends, axis=0)
        tail = np.minimum((apart <= 0).sum(axis=0), (apart >= 0).sum(axis=0))
        p = np.minimum(1, 2 * (1 + tail) / (1 + draws))
        value = points[place] - points[0]
        found = zip(names, value, low, high, p, strict=True)
        differences.append({name: Difference(*map(float, numbers)) for name, *numbers in found})
        single = len(stacks[0]) == len(stacks[place]) == 1
        tests.append(mcnemar(stacks[0][0] > 0, stacks[place][0] > 0) if single else None)
    p_values = [test[0] if test else one["top1"].p for test, one in zip(tests, differences, strict=True)]
    return Comparison(
        [dict(zip(names, map(float, row), strict=True)) for row in points],
        [
            {name: (float(a), float(b)) for name, a, b in zip(names, *rows, strict=True)}
            for rows in bounds.swapaxes(0, 1)
        ],
        differences,
        tests,
        holm(p_values),
    )


def _weights(
    classes: np.ndarray, size: np.ndarray, counts: np.ndarray | None, limits: Limits
) -> Mapping[str, np.ndarray]:
    """Figure -> what the sum of the right images of each class present counts for."""
    weights = {"top1": np.full(len(size), 1 / size.sum()), "mean_class": 1 / (size * len(size))}
    for name, members in groups(counts, limits).items() if counts is not None else ():
        inside = np.isin(classes, members.numpy())
        if inside.any():
            weights[name] = inside / size[inside].sum()
    return {name: 100 * weight for name, weight in weights.items()}


def _figures(right: np.ndarray, start: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """right: (N,) in order of classes, which begin at start. Returns a number for each of weights."""
    sums = np.add.reduceat(right, start)
    return np.array([weight @ sums for weight in weights.values()])
