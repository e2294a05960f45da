"""BBN and ResLT over small timm nets, against loops over one image and one class at a time."""

import pytest
import timm
import torch
from torch import nn

from rescom_timm.methods import BbnConfig, ResltConfig, create_method
from rescom_timm.models.branched import last_block
from rescom_timm.models.net import ProjectorConfig, create_model
from rescom_timm.models.trainable import set_trainable
from tests.methods import reference
from tests.methods.stub import COUNTS
from tests.raises import raises


def make(config, backbone="resnet20_cifar"):
    torch.manual_seed(0)
    net = create_model(backbone, 4, projector=ProjectorConfig(hidden=4, dim=3))
    return create_method(net, COUNTS, config)


def batch(size=8, views=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, views, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.arange(size) % 4}


def same(method, loss, expected, rtol=1e-9):
    """Two losses and their gradients in every trained weight."""
    assert torch.allclose(loss, expected, rtol=rtol)
    weights = [p for p in method.net.parameters() if p.requires_grad]
    mine = torch.autograd.grad(loss, weights)
    theirs = torch.autograd.grad(expected, weights, materialize_grads=True)
    assert all(torch.allclose(a, b, rtol=1e3 * rtol, atol=rtol / 10) for a, b in zip(mine, theirs, strict=True))


# --------------------------------------------------------------------------------------------------------------- BBN


@pytest.mark.parametrize(("epoch", "alpha"), [(0, 1.0), (5, 0.75), (9, 0.19)])
def test_bbn_mixes_features_and_losses_by_a_parabola(epoch, alpha):
    method = make(BbnConfig()).double()
    method.set_epoch(epoch, 10)
    data, net = batch(), method.net
    method.train()
    outputs = method(data)
    ends = []
    for half, end in ((data["image"][:4, 0], net.experts[0]), (data["image"][4:, 0], net.experts[1])):
        ends.append(end(net.encoder.forward_features(net.normalize(half))))
    rows = []
    for a, b in zip(*ends, strict=True):
        x = torch.stack([2 * alpha * f for f in a] + [2 * (1 - alpha) * f for f in b])
        rows.append([w @ x + c for w, c in zip(net.classifier.weight, net.classifier.bias, strict=True)])
    first, second = data["label"][:4].tolist(), data["label"][4:].tolist()
    expected = alpha * reference.cross_entropy(rows, first) + (1 - alpha) * reference.cross_entropy(rows, second)
    same(method, outputs["loss"], expected)
    logits = torch.stack([torch.stack(row) for row in rows])
    assert torch.allclose(outputs["logits"], torch.cat([logits, logits]))


def test_both_ends_of_bbn_see_an_image_in_evaluation():
    method = make(BbnConfig()).eval()
    net, images = method.net, batch()["image"][:, 0]
    stem = net.encoder.forward_features(net.normalize(images))
    both = torch.cat([end(stem) for end in net.experts], dim=1)
    assert both.shape == (8, 128) and torch.allclose(net(images).features, both)
    assert torch.allclose(net.classify(images), net.classifier(both))
    assert net(images).embeddings.shape == (8, 0)


def test_bbn_shares_all_but_the_last_block():
    for fresh in (True, False):
        net = make(BbnConfig(fresh=fresh)).net
        assert set(net.experts[0].state_dict()) == {n for n in net.experts[0].state_dict() if n.startswith("layer3.2.")}
        first, second = (end.layer3[2].conv1.weight for end in net.experts)
        assert torch.equal(first, second) != fresh
        plain = sum(p.numel() for p in create_model("resnet20_cifar", 4).encoder.parameters())
        end = sum(p.numel() for p in net.experts[1].parameters())
        assert sum(p.numel() for p in net.encoder.parameters()) + end == plain


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("resnet32_cifar", "layer3.4"),
        ("test_resnet", "layer4.0"),
        ("test_convnext", "stages.3.blocks.1"),
        ("test_efficientnet", "blocks.4.0"),
        ("regnety_002", "s4.b7"),
    ],
)
def test_the_last_block_is_the_last_child_of_the_last_stage(name, block):
    assert last_block(timm.create_model(name, num_classes=0)) == block


def test_bbn_refuses_what_cannot_be_cut_frozen_or_exported():
    with raises("net.branch", "blocks.5"):
        make(BbnConfig(branch="blocks.5"), "test_vit")
    with raises("net.branch", "layer9"):
        make(BbnConfig(branch="layer9"))
    net = create_model("resnet20_cifar", 4)
    set_trainable(net.encoder, ["norms"])
    with raises("net.trainable", "branches"):
        create_method(net, COUNTS, BbnConfig())
    with raises("net.export", "branches"):
        make(BbnConfig()).net.to_timm()


# ------------------------------------------------------------------------------------------------------------- ResLT


@pytest.mark.parametrize("views", [1, 2])
def test_reslt_is_its_equation(views):
    method = make(ResltConfig(views=views, beta=0.7, medium=0.75, tail=0.5)).double().train()
    data = batch(views=views)
    images = data["image"].transpose(0, 1).flatten(0, 1)
    labels = data["label"].repeat(views).tolist()
    outputs = method(data)
    net = method.net
    maps = net.encoder.forward_features(net.normalize(images))
    branches = []
    for norm in net.classifier.norms:
        mean, variance = maps.mean(dim=(0, 2, 3), keepdim=True), maps.var(dim=(0, 2, 3), correction=0, keepdim=True)
        moved = (maps - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        branches.append([net.classifier.weight @ x.mean(dim=(1, 2)) + net.classifier.bias for x in moved])
    summed = [sum(rows) for rows in zip(*branches, strict=True)]
    terms = []
    for rows, classes in zip(branches, ({0, 1, 2, 3}, {1, 2, 3}, {2, 3}), strict=True):
        terms += [-torch.log(reference.softmax(s)[y]) for s, y in zip(rows, labels, strict=True) if y in classes]
    expected = 0.3 * reference.cross_entropy(summed, labels) + 0.7 * reference.mean(terms)
    same(method, outputs["loss"], expected)
    assert torch.allclose(outputs["logits"], torch.stack(summed))
    assert set(outputs) == {"loss", "logits", "loss_fused", "loss_branches"}


def test_groups_of_reslt_are_the_rarest_classes_whatever_their_order():
    net = create_model("resnet8_cifar", 5)
    method = create_method(net, torch.tensor([5, 90, 1, 40, 40]), ResltConfig(medium=0.8, tail=0.2))
    assert method.taught.tolist() == [[1] * 5, [1, 0, 1, 1, 1], [0, 0, 1, 0, 0]]


def test_one_linear_layer_is_left_of_the_branches_of_reslt():
    method = make(ResltConfig())
    for seed in range(3):  # statistics that are not those of a new BatchNorm
        method.train()(batch(seed=seed))
    with torch.no_grad():
        for norm in method.net.classifier.norms:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    net, images = method.eval().net, batch()["image"][:, 0]
    branches = net(images).branches
    assert branches.shape == (3, 8, 4) and (branches[0] - branches[1]).abs().max() > 0.1
    assert torch.allclose(net.classify(images), branches.sum(dim=0), atol=1e-4)
    plain = net.to_timm()
    assert type(plain.fc) is nn.Linear
    assert torch.allclose(plain(net.normalize(images)), net.classify(images), atol=1e-4)


def test_reslt_refuses_a_backbone_without_a_map_that_is_averaged():
    for name in ("test_vit", "test_convnext"):  # tokens; a norm after the mean
        with raises("net.unsupported", "reslt"):
            make(ResltConfig(), name)
    make(ResltConfig(), "test_efficientnet")


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"beta": 1.1}, "beta"),
        ({"medium": -0.1}, "medium"),
        ({"tail": 0.9}, "tail"),
    ],
)
def test_impossible_settings_are_refused(settings, setting):
    with raises("method.value", setting):
        ResltConfig(**settings)
