"""GistNet against loops over one image, one class and one point of its constellation at a time."""

import pytest
import torch

from rescom_timm.methods import GistNetConfig, create_method
from rescom_timm.models.net import create_model
from tests.methods import reference
from tests.methods.stub import COUNTS, batch, make, train
from tests.methods.test_branches import same
from tests.raises import raises


def cosine(x, w):
    return (x @ w) / (x @ x).sqrt() / (w @ w).sqrt()


def scores(features, centres, structures, scale):
    """One row of logits for each feature vector."""
    rows = []
    for x in features:
        rows.append([scale * max([cosine(x, w)] + [cosine(x, w + u) for u in structures]) for w in centres])
    return rows


@pytest.mark.parametrize("epoch", [4, 5])
def test_gistnet_is_its_equation_before_and_after_structures_take_part(epoch):
    method = make(GistNetConfig(structures=3, weight=0.4, structures_from=0.5, scale=5.0))
    method.set_epoch(epoch, 10)
    method.eval()  # statistics that do not move between the passes; the classifier is in training
    head, data = method.net.classifier.train(), batch(views=1)
    with torch.no_grad():
        head.structures.normal_(std=float(head.weight.std()))
        head.even += 0.3 * torch.randn_like(head.even)
        head.scales += torch.tensor([1.0, -1.0])
    outputs = method(data)
    features = method.net.encoder(data["image"][:, 0])
    taking_part = head.structures if epoch == 5 else 0 * head.structures
    even = scores(features[:4], head.even, taking_part, head.scales[1])
    balanced = scores(features[4:], head.weight, taking_part.detach(), head.scales[0])
    assert torch.allclose(outputs["logits"], torch.stack([torch.stack(row) for row in even + balanced]))
    expected = reference.cross_entropy(even, data["label"][:4].tolist())
    expected = expected + 0.4 * reference.cross_entropy(balanced, data["label"][4:].tolist())
    same(method, outputs["loss"], expected)


def test_centres_of_the_class_balanced_draw_are_evaluated_with_the_structures():
    method = make(GistNetConfig(structures_from=0.0))
    method.set_epoch(0, 2)
    train(method, steps=3)
    net = method.eval().net
    head, images = net.classifier, batch(views=1)["image"][:, 0]
    rows = scores(net.encoder(images), head.weight, head.structures, head.scales[0])
    assert torch.allclose(net.classify(images), torch.stack([torch.stack(row) for row in rows]))
    assert not torch.equal(head.weight, head.even), "each draw has centres of its own"


def test_structures_learn_from_the_even_draw_alone_and_only_once_they_take_part():
    method = make(GistNetConfig(structures_from=0.5))
    head = method.net.classifier
    start = head.structures.detach().clone()
    assert torch.equal(head.weight, head.even) and 0.05 < start.std() / head.weight.detach().std() < 0.2
    method.set_epoch(0, 2)
    train(method)
    assert torch.equal(head.structures, start)
    method.set_epoch(1, 2)
    train(method)
    assert not torch.equal(head.structures, start)
    data = batch(views=1)
    (gradient,) = torch.autograd.grad(method(data)["logits"][4:].sum(), head.structures, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_a_constellation_is_no_plain_timm_model():
    with raises("net.export", "Constellation"):
        create_method(create_model("resnet8_cifar", 4), COUNTS, GistNetConfig()).net.to_timm()


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"structures": 0}, "structures"),
        ({"scale": 0.0}, "scale"),
        ({"structures_from": 1.5}, "structures_from"),
    ],
)
def test_impossible_settings_are_refused(settings, setting):
    with raises("method.value", setting):
        GistNetConfig(**settings)
