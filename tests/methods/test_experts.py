"""Experts over small timm nets: where the backbone is cut, what is trained, what is evaluated."""

import pytest
import timm
import torch

from rescom_timm.config.recipe import OptimizerConfig
from rescom_timm.engine.build import build_optimizer
from rescom_timm.methods import ExpertsConfig, create_method
from rescom_timm.models.branched import cut
from rescom_timm.models.net import ProjectorConfig, create_model
from rescom_timm.models.trainable import set_trainable
from tests.methods import reference
from tests.methods.stub import COUNTS
from tests.raises import raises


def make(**settings):
    torch.manual_seed(0)
    net = create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=4, dim=3))
    return create_method(net, COUNTS, ExpertsConfig(branch="layer3", **settings))


def batch(size=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 1, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.randint(0, 4, (size,), generator=generator)}


@pytest.mark.parametrize(
    ("name", "branch"), [("resnet20_cifar", "layer2"), ("test_resnet", "layer3"), ("test_convnext", "stages.2")]
)
def test_stem_and_tail_are_the_backbone(name, branch):
    encoder = timm.create_model(name, num_classes=0).eval()
    stem, tail = cut(encoder, branch)
    images = torch.rand(2, *encoder.pretrained_cfg["input_size"])
    assert torch.allclose(tail.eval()(stem.eval().forward_features(images)), encoder(images), atol=1e-5)
    weights = [sum(p.numel() for p in part.parameters()) for part in (stem, tail, encoder)]
    assert weights[0] + weights[1] == weights[2] and min(weights) > 0


def test_a_backbone_that_is_no_chain_is_refused_and_its_children_are_named():
    with raises("net.branch", "layer9", "layer2"):
        cut(timm.create_model("resnet20_cifar", num_classes=0), "layer9")
    with raises("net.branch", "blocks.3"):
        cut(timm.create_model("test_vit", num_classes=0), "blocks.3")


@pytest.mark.parametrize(("epoch", "reweighted"), [(7, False), (8, True)])
def test_loss_is_ldam_of_each_expert_less_their_diversity(epoch, reweighted):
    method = make(
        experts=2, scale=5.0, margin=0.3, diversity=0.4, beta=0.9, temperature_by_count=0.2, reweight_from=0.8
    )
    method.set_epoch(epoch, 10)
    method.double()
    data = batch()
    labels = data["label"].tolist()
    method.net.eval()  # BatchNorm's batch statistics would move between the two passes
    experts = method.net(data["image"][:, 0]).experts
    weights = reference.balanced_weights(COUNTS, 0.9) if reweighted else None
    expected = sum(
        reference.ldam([[s / 5 for s in row] for row in own], labels, COUNTS, 0.3, 5.0, weights) for own in experts
    )
    raw = [0.2 * 4 * n / COUNTS.sum().item() + 0.8 for n in COUNTS.tolist()]
    temperature = [t / max(raw) for t in raw] if reweighted else [1.0] * 4
    assert torch.allclose(method(data)["diversity"], reference.diversity(experts, temperature), rtol=1e-5)
    expected = expected - 0.4 * reference.diversity(experts, temperature)
    assert torch.allclose(method(data)["loss"], expected, rtol=1e-5)


def test_every_expert_is_trained_and_their_mean_evaluated():
    method = make(experts=3)
    outputs = method(batch())
    outputs["loss"].backward()
    assert all(p.grad is not None for p in method.net.parameters() if p.requires_grad)
    assert not list(method.net.projector.parameters())
    method.eval()
    images = batch()["image"][:, 0]
    outputs = method.net(images)
    assert outputs.experts.shape == (3, 6, 4) and outputs.embeddings.shape == (6, 0)
    assert torch.allclose(method.net.classify(images), outputs.experts.mean(dim=0))
    assert (outputs.experts[0] - outputs.experts[1]).abs().max() > 1e-3


def test_fresh_experts_start_apart_and_copies_alike():
    for fresh in (True, False):
        net = make(experts=2, fresh=fresh).net
        first, second = (expert.layer3[0].conv1.weight for expert in net.experts)
        assert torch.equal(first, second) != fresh


def test_settings_of_the_backbone_hold_for_the_experts_own_parts():
    net = create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=4, dim=3))
    set_trainable(net.encoder, ["layer3.2.*"])
    with raises("net.trainable", "experts", "fresh"):
        create_method(net, COUNTS, ExpertsConfig(branch="layer3"))
    net.frozen_statistics = True
    method = create_method(net, COUNTS, ExpertsConfig(branch="layer3", fresh=False)).train()
    trained = {name for name, weight in method.net.experts.named_parameters() if weight.requires_grad}
    assert trained and all(".layer3.2." in name for name in trained)
    norms = [m for m in method.net.experts.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    rates = {}
    for group in build_optimizer(OptimizerConfig(lr=1.0, encoder_lr_scale=0.1), method.net).param_groups:
        rates |= {id(weight): group.get("lr_scale", 1.0) for weight in group["params"]}
    assert {rates[id(weight)] for weight in method.net.experts.parameters() if weight.requires_grad} == {0.1}
    assert {rates[id(weight)] for weight in method.net.classifier.parameters()} == {1.0}
    with raises("recipe.conflict", "optimizer.layer_decay"):
        build_optimizer(OptimizerConfig(layer_decay=0.5), method.net)


def test_experts_are_no_plain_timm_model():
    net = make().net
    assert (net.classifier.in_features, net.classifier.out_features) == (64, 4)
    with raises("net.export", "experts"):
        net.to_timm()


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"experts": 1}, "experts"),
        ({"diversity": -0.1}, "diversity"),
        ({"scale": 0.0}, "scale"),
        ({"beta": 1.0}, "beta"),
    ],
)
def test_impossible_settings_are_refused(settings, setting):
    with raises("method.value", setting):
        ExpertsConfig(**settings)
