"""Folds, scores and the rule, against naive loops."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from rescom_timm.engine.features import Features
from rescom_timm.fitting import choice
from rescom_timm.fitting.candidates import Candidate, decide
from rescom_timm.fitting.choice import Scored
from rescom_timm.methods import heads


def scored(predicted: list[int], labels: list[int], classes: int = 3) -> Scored:
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()
    return choice.scored(logits.split(7), torch.tensor(labels))


def test_mean_over_classes_is_balanced_accuracy():
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 3, 60).tolist(), random.integers(0, 3, 60).tolist()
    found = scored(predicted, labels)
    assert found.mean_class == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    low, high = found.interval()
    assert low < found.mean_class < high


def test_many_logits_are_sampled(monkeypatch):
    """The choice is by all images; the temperature and the loss are by an even sample."""
    torch.manual_seed(0)
    labels = torch.arange(600) % 5
    logits = 3 * torch.nn.functional.one_hot(labels, 5) + 2 * torch.randn(600, 5)
    whole = choice.scored([logits], labels)
    monkeypatch.setattr(choice, "HELD", 1000)
    part = choice.scored(logits.split(100), labels)
    assert whole.logits.shape == (600, 5) and part.logits.shape == (204, 5)
    assert part.mean_class == whole.mean_class and part.interval() == whole.interval()
    assert choice.temperature_of(part) == pytest.approx(choice.temperature_of(whole), rel=0.2)
    assert part.loss() == pytest.approx(whole.loss(), rel=0.2)


def test_error_of_a_difference_is_that_of_repeated_draws():
    """Images drawn again and again within each class, from two classifiers' outcomes."""
    random = np.random.default_rng(1)
    counts = (40, 20, 10)
    labels = np.repeat(np.arange(3), counts)
    a, b = random.random(70) < 0.8, random.random(70) < 0.7
    ours = choice.error_of_difference(*(scored(np.where(x, labels, (labels + 1) % 3).tolist(), labels) for x in (a, b)))
    means = []
    for _ in range(4000):
        parts = [random.choice(np.flatnonzero(labels == k), n) for k, n in enumerate(counts)]
        means.append(np.mean([100 * (a[part].mean() - b[part].mean()) for part in parts]))
    assert ours == pytest.approx(np.std(means), rel=0.25)


def test_repeats_count_an_image_once():
    labels = [0, 0, 0, 1, 1, 1]
    a, b = scored([0, 0, 1, 1, 1, 0], labels), scored([0, 1, 1, 1, 0, 0], labels)
    twice = [choice.joined([x, x], 2) for x in (a, b)]
    free = (len(labels) - 2) / (2 * len(labels) - 2) * 2  # pooled variance: degrees of freedom
    assert choice.error_of_difference(*twice) == pytest.approx(choice.error_of_difference(a, b) * free**0.5)
    assert twice[0].interval() == a.interval()


def test_the_simplest_within_an_error_is_chosen():
    labels = [k for k in range(3) for _ in range(10)]
    wrong = [1 if i == 0 else label for i, label in enumerate(labels)]
    bad = [0] * 30
    one, best, worst = scored(wrong, labels), scored(labels, labels), scored(bad, labels)
    assert choice.choose([one, best, worst]) == (0, 1), "one image of thirty is within an error"
    assert choice.choose([worst, best, one]) == (1, 1)


def test_enough_images_are_five_of_each_class():
    assert choice.decides(np.repeat(np.arange(3), 5), 3)
    assert not choice.decides(np.repeat(np.arange(3), 5), 4) and not choice.decides(np.array([0] * 9 + [1] * 4), 2)


def test_folds_keep_single_images_and_train_every_class():
    labels = np.repeat(np.arange(5), [23, 7, 3, 2, 1])
    found = list(choice.folds(labels, 5, 2, seed=3))
    assert [sorted(np.concatenate([train, scored])) == list(range(36)) for train, scored in found] == [True] * 10
    times = np.bincount(np.concatenate([scored for _, scored in found]), minlength=36)
    assert times.tolist() == [2] * 35 + [0]
    assert all(set(labels[train]) == set(range(5)) for train, _ in found)
    for _, rows in found[:5]:
        assert 4 <= (labels[rows] == 0).sum() <= 5 and (labels[rows] == 2).sum() <= 1
    again = list(choice.folds(labels, 5, 2, seed=3))
    assert all(
        np.array_equal(a, b) for one, other in zip(found, again, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_cross_validation_is_a_loop_over_folds():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [20, 10, 4])
    values = (random.normal(size=(3, 5))[labels] + random.normal(size=(34, 5)))[:, None].astype(np.float32)
    features = Features(values, labels)
    (found,) = choice.cross_validated(features, heads.means, 3, repeats=1, parts=3)
    expected = []
    for train, rows in choice.folds(labels, 3, 1, 0):
        scale = heads.standard(features.rows(train))
        head = heads.class_means(features.rows(train), 3, scale)
        expected.append(head(scale(torch.from_numpy(values[rows, 0]))))
    torch.testing.assert_close(found.logits, torch.cat(expected))
    assert len(choice.cross_validated(features, heads.probes, 3, repeats=1, parts=2)) == len(heads.RIDGES)


def test_what_has_many_settings_must_be_clearly_better():
    """Of two candidates alike, one of 30 settings is not chosen before one that comes later."""
    labels = [k for k in range(3) for _ in range(10)]
    poor, alike = scored([0] * 30, labels), scored(labels, labels)
    found = [Candidate("probe", "", "linear", {}, poor), Candidate("many", "", "linear", {}, alike, tried=30)]
    assert decide(found, True)[0] == 1
    assert decide([*found, Candidate("soup", "", "linear", {}, alike)], True)[0] == 2
