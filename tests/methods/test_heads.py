"""Heads against scikit-learn and closed forms."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from rescom_timm.engine.features import Features
from rescom_timm.methods import heads
from rescom_timm.methods.heads import Head


@pytest.fixture(scope="module")
def features() -> Features:
    """(90, 2, 6) of 4 classes of 40, 30, 15 and 5 images, of features of unlike scales."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [40, 30, 15, 5])
    centres = random.normal(size=(4, 6))
    values = centres[labels][:, None] + random.normal(size=(90, 2, 6))
    return Features(values * [1, 5, 0.1, 2, 1, 1] + 3, labels)


def test_standard_is_scikit_learns(features):
    values = features.values.reshape(-1, 6)
    found, theirs = heads.standard(features.rows()), StandardScaler().fit(values)
    np.testing.assert_allclose(found.mean, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(found.deviation, theirs.scale_, rtol=1e-12)


def test_a_constant_feature_keeps_its_scale():
    values = np.concatenate([np.ones((5, 1, 1)), np.arange(5.0).reshape(5, 1, 1)], axis=2)
    assert heads.standard(Features(values, np.zeros(5, int)).rows()).deviation.tolist() == [1.0, 2.0**0.5]


@pytest.mark.parametrize("chunk", [4096, 7])
def test_regression_is_scikit_learns(features, monkeypatch, chunk):
    """ridge is 1 / (C M): their sum of losses + |W|^2 / 2C over M is ours."""
    monkeypatch.setattr("rescom_timm.engine.features.CHUNK", chunk)
    rows = features.rows()
    scale = heads.standard(rows)
    found = heads.softmax_regression(rows, torch.zeros(4), 0.05, scale, tolerance=1e-9)
    values = scale(torch.from_numpy(features.values.reshape(-1, 6))).numpy()
    theirs = LogisticRegression(C=1 / (0.05 * 180), tol=1e-10, max_iter=1000).fit(values, features.labels.repeat(2))
    np.testing.assert_allclose(found.weight, theirs.coef_, atol=2e-5)
    shift = found.bias.numpy() - theirs.intercept_  # free up to a constant
    np.testing.assert_allclose(shift, shift.mean(), atol=2e-5)


def test_balanced_softmax_regression_is_at_a_minimum(features):
    """The gradient of the loss as it is written, by autograd."""
    rows, counts = features.rows(), torch.tensor([40, 30, 15, 5])
    prior = (counts / 90).log().double()
    scale = heads.standard(rows)
    found = heads.softmax_regression(rows, prior, 0.01, scale, tolerance=1e-9)
    weight, bias = (value.clone().requires_grad_() for value in found)
    values, labels = next(iter(rows))
    values = scale(values)
    loss = torch.nn.functional.cross_entropy(values @ weight.T + bias + prior, labels) + 0.005 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-5 and bias.grad.abs().max() < 1e-5


def test_a_path_ends_where_a_cold_start_does(features):
    rows, counts = features.rows(), torch.tensor([40, 30, 15, 5])
    scale = heads.standard(rows)
    prior = (counts / 90).log()
    warm = heads.softmax_regression(rows, prior, 1e-2, scale, heads.probes(rows, counts, scale)[0], tolerance=1e-9)
    cold = heads.softmax_regression(rows, prior, 1e-2, scale, tolerance=1e-9)
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-4, rtol=1e-4)


def test_class_means_rank_by_cosine(features):
    rows = features.rows(versions=1)
    scale = heads.standard(rows)
    values, labels = next(iter(rows))
    standardised = scale(values)
    means = torch.stack([standardised[labels == label].mean(dim=0) for label in range(4)])
    cosines = torch.nn.functional.cosine_similarity(standardised[:, None], means[None], dim=2)
    logits = heads.class_means(rows, 4, scale)(standardised)
    assert logits.argmax(dim=1).equal(cosines.argmax(dim=1))
    torch.testing.assert_close(
        logits, cosines * standardised.norm(dim=1, keepdim=True) / standardised.norm(dim=1).mean()
    )


def test_class_features_rank_by_cosine(features):
    rows = features.rows(versions=1)
    scale = heads.standard(rows)
    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (head,) = heads.named(vectors)(rows, torch.ones(4), scale)
    values, _ = next(iter(rows))
    cosines = torch.nn.functional.cosine_similarity(values[:, None], vectors[None], dim=2)
    torch.testing.assert_close(
        scale.folded(head)(values), cosines * values.norm(dim=1, keepdim=True) / values.norm(dim=1).mean()
    )


def test_folding_and_adjustment_are_exact(features):
    rows = features.rows()
    scale = heads.standard(rows)
    head = Head(torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    values, _ = next(iter(rows))
    torch.testing.assert_close(scale.folded(head)(values), head(scale(values)))
    torch.testing.assert_close(scale.unfolded(scale.folded(head))(values), head(values))
    counts = torch.tensor([40, 30, 15, 5])
    torch.testing.assert_close(
        heads.adjusted(head, counts, 1.5)(values), head(values) - 1.5 * (counts.double() / 90).log()
    )


def test_temperature_is_the_least_loss():
    """Against a grid; confident logits that are right half of the time need a large one."""
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(200, 5, generator=generator)
    labels = torch.where(torch.rand(200, generator=generator) < 0.5, logits.argmax(dim=1), torch.randint(5, (200,)))
    found = heads.temperature(logits, labels)
    grid = torch.linspace(0.5, 40, 4000)
    losses = [torch.nn.functional.cross_entropy(logits / t, labels) for t in grid]
    assert found == pytest.approx(float(grid[int(torch.stack(losses).argmin())]), rel=0.01) and found > 3
    smooth = [torch.nn.functional.cross_entropy(logits / t, labels, label_smoothing=0.1) for t in grid]
    found = heads.temperature(logits, labels, smoothing=0.1)
    assert found == pytest.approx(float(grid[int(torch.stack(smooth).argmin())]), rel=0.01)
