"""Paired comparisons: against closed forms, naive loops and simulated coverage."""

import math

import numpy as np
import pytest

from rescom_timm.paired import compare, holm, mcnemar


def test_mcnemar_is_the_exact_binomial_test() -> None:
    first = np.array([True] * 9 + [False] * 3 + [True] * 5)
    second = np.array([False] * 9 + [True] * 3 + [True] * 5)
    p, only_first, only_second = mcnemar(first, second)
    assert (only_first, only_second) == (9, 3)
    assert p == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)
    assert mcnemar(first, first) == (1.0, 0, 0)


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def test_accuracies_and_differences_are_those_of_the_images() -> None:
    labels = np.array([0, 1, 1, 1, 2, 2])
    first = np.array([[1, 1, 1, 0, 0, 1]], bool)
    second = np.array([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], bool)
    found = compare([first, second], labels, np.array([200, 50, 5, 9]), draws=200)
    assert found.accuracies[0] == pytest.approx(
        {"top1": 400 / 6, "mean_class": 100 * (1 + 2 / 3 + 1 / 2) / 3, "many": 100, "medium": 200 / 3, "few": 50}
    )
    assert found.accuracies[1]["medium"] == pytest.approx(100 * 2.5 / 3)
    assert found.differences[0]["few"].value == pytest.approx(50)
    assert found.tests == [None], "two seeds against one"
    assert found.adjusted == [found.differences[0]["top1"].p]
    same = compare([first, first], labels, draws=50)
    assert same.tests == [(1.0, 0, 0)] and same.differences[0]["top1"].p == 1
    assert set(compare([first], labels).accuracies[0]) == {"top1", "mean_class"}


def test_the_bootstrap_agrees_with_resampling_one_by_one() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), [3, 40, 9, 12, 20, 16])
    first, second = generator.random((2, 2, 100)) < np.array([0.6, 0.75])[:, None, None]
    found = compare([first, second], labels, draws=3000).differences[0]["mean_class"]
    slow = []
    for _ in range(600):
        rows = [generator.choice(np.flatnonzero(labels == k), (labels == k).sum()) for k in range(6)]
        one, other = (s[generator.integers(2, size=2)] for s in (first, second))
        slow.append(100 * np.mean([other[:, r].mean() - one[:, r].mean() for r in rows]))
    np.testing.assert_allclose((found.low, found.high), np.quantile(slow, [0.025, 0.975]), atol=2.5)


def test_intervals_of_differences_cover_the_truth_and_p_is_uniform_below_it() -> None:
    generator, held, small = np.random.default_rng(1), 0, 0
    labels = np.repeat(np.arange(5), 30)
    for seed in range(120):
        easy = generator.random(150)  # images that both find hard
        first, second = easy + 0.3 * generator.random(150) < 0.7, easy + 0.3 * generator.random(150) < 0.7
        one = compare([first, second], labels, draws=200, seed=seed).differences[0]["top1"]
        held += one.low <= 0 <= one.high
        small += one.p < 0.05
    assert held / 120 >= 0.9 and small / 120 <= 0.1
