"""Hybrid-PSC and DRO-LT against loops over one image and one class at a time."""

import pytest
import torch
import torch.nn.functional as F

from rescom_timm.losses import robust_centroids
from rescom_timm.methods import DroLtConfig, HybridPscConfig
from tests.methods import reference
from tests.methods.stub import COUNTS, batch, make, train
from tests.raises import raises


def check(method, expected, data):
    outputs = method(data)
    assert torch.allclose(outputs["loss"], expected, rtol=1e-6)
    weights = [p for p in method.net.parameters() if p.requires_grad]
    mine = torch.autograd.grad(outputs["loss"], weights)
    theirs = torch.autograd.grad(expected, weights)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(mine, theirs, strict=True))
    return outputs


@pytest.mark.parametrize(("epoch", "alpha"), [(0, 1.0), (5, 0.75), (9, 0.19)])
def test_hybrid_psc_goes_from_prototypes_to_the_classifier_on_a_parabola(epoch, alpha):
    method = make(HybridPscConfig(views=2, temperature=0.5))
    method.set_epoch(epoch, 10)
    data = batch()
    labels = data["label"].repeat(2).tolist()
    _, logits, embeddings = method.net(data["image"].transpose(0, 1).flatten(0, 1))
    vectors = F.normalize(method.net.prototypes[0], dim=1)
    contrast = reference.prototypes(embeddings, labels, vectors, 0.5)
    # Class-balanced batches in expectation: over the training images, the weights of each class sum to N / K.
    weights = [COUNTS.sum().item() / (len(COUNTS) * COUNTS[y].item()) for y in labels]
    terms = [-torch.log(reference.softmax(row)[y]) * w for row, y, w in zip(logits, labels, weights, strict=True)]
    check(method, alpha * contrast + (1 - alpha) * sum(terms) / len(terms), data)


def test_prototypes_and_radii_are_trained_as_part_of_the_net():
    for config, name in (
        (HybridPscConfig(), "prototypes.0"),
        (DroLtConfig(radius="learned", temperature=1.0), "epsilon.0"),
    ):
        method = make(config)
        before = method.net.state_dict()[name].clone()
        train(method, steps=3)
        assert not torch.equal(before, method.net.state_dict()[name])
    for radius in ("shared", "by_count"):
        assert "epsilon.0" not in [
            n for n, p in make(DroLtConfig(radius=radius)).net.named_parameters() if p.requires_grad
        ]
    by_count = make(DroLtConfig(radius="by_count", epsilon=2.0)).net.epsilon[0]
    assert torch.allclose(by_count, 2.0 / COUNTS.double().sqrt())


def test_dro_lt_is_its_equation_over_the_classes_that_have_a_centroid():
    method = make(DroLtConfig(views=2, weight=0.3, temperature=0.8, epsilon=0.5))
    method.centroids.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    method.known.copy_(torch.tensor([True, False, True, True]))
    data = batch()
    labels = data["label"].repeat(2).tolist()
    features, logits, _ = method.net(data["image"].transpose(0, 1).flatten(0, 1))
    centroids = {c: method.centroids[c].clone() for c in (0, 2, 3)}
    robust = reference.robust(features, labels, centroids, method.net.epsilon[0], 0.8)
    expected = 0.3 * reference.cross_entropy(logits, labels) + 0.7 * robust
    check(method, expected, data)
    assert method.known.all() or 1 not in labels


def test_centroids_move_by_the_number_of_images_seen():
    method = make(DroLtConfig(momentum=0.9))
    features = torch.tensor([[1.0] * 6, [3.0] * 6, [5.0] * 6], dtype=torch.float64)
    method.move_centroids(features, torch.tensor([0, 0, 2]))
    assert torch.equal(method.centroids[:, 0], torch.tensor([2.0, 0.0, 5.0, 0.0], dtype=torch.float64))
    assert method.known.tolist() == [True, False, True, False]
    method.move_centroids(features, torch.tensor([0, 0, 1]))
    assert torch.allclose(method.centroids[:, 0], torch.tensor([2.0, 5.0, 5.0, 0.0], dtype=torch.float64))
    method.move_centroids(features[2:].repeat(2, 1), torch.tensor([0, 0]))
    assert torch.allclose(method.centroids[0, 0], torch.tensor(0.81 * 2 + 0.19 * 5, dtype=torch.float64))
    assert torch.equal(method.centroids[3], torch.zeros(6, dtype=torch.float64))


def test_an_image_on_its_centroid_and_a_batch_without_centroids_have_finite_gradients():
    features = torch.ones(3, 4, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    for known in (torch.tensor([True, True]), torch.tensor([False, False])):
        loss = robust_centroids(features, labels, torch.ones(2, 4), known, torch.zeros(2), 0.07)
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.isfinite() and gradient.isfinite().all()
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("config", "settings", "setting"),
    [
        (HybridPscConfig, {"temperature": 0.0}, "temperature"),
        (DroLtConfig, {"temperature": 0.0}, "temperature"),
        (DroLtConfig, {"epsilon": -1.0}, "epsilon"),
        (DroLtConfig, {"weight": 1.1}, "weight"),
        (DroLtConfig, {"momentum": 1.0}, "momentum"),
    ],
)
def test_impossible_settings_are_refused(config, settings, setting):
    with raises("method.value", setting):
        config(**settings)
