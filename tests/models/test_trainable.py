import pytest
import timm
import torch

from rescom_timm.models.net import create_model
from rescom_timm.models.trainable import count_weights, set_trainable
from tests.raises import raises


def share(net):
    counted = count_weights(net)
    return counted["trained"] / counted["all"]


def trained(encoder):
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


def test_places_policy_trains_the_last_bottleneck_and_the_norms():
    encoder = timm.create_model("test_resnet", num_classes=0)
    names = {name for name, _ in encoder.named_parameters()}
    last = "layer4.0."
    set_trainable(encoder, ("last_block", "norms"))
    assert {n for n in names if n.startswith(last)} <= trained(encoder)
    others = {n for n in trained(encoder) if not n.startswith(last)}
    assert others and all(dict(encoder.named_parameters())[n].ndim == 1 for n in others)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_resnet"])
def test_last_block_is_a_small_part_with_a_matrix(name):
    encoder = timm.create_model(name, num_classes=0)
    set_trainable(encoder, ("last_block",))
    assert any(p.ndim > 1 and p.requires_grad for p in encoder.parameters())
    assert 0 < share(encoder) < 0.8


def test_what_follows_the_last_block_trains_with_it():
    encoder = timm.create_model("test_convnext", num_classes=0)
    set_trainable(encoder, ("last_block",))
    others = {n for n in trained(encoder) if not n.startswith("stages.3.blocks.1.")}
    assert others == {"head.norm.weight", "head.norm.bias"} < trained(encoder)


def test_words_and_patterns():
    net = create_model("test_resnet", 4)
    set_trainable(net.encoder, ("all",))
    assert share(net) == 1
    set_trainable(net.encoder, ("none",))
    assert trained(net.encoder) == set() and 0 < share(net) < 1
    set_trainable(net.encoder, ("layer2.*",))
    assert trained(net.encoder) and all(n.startswith("layer2.") for n in trained(net.encoder))
    with raises("net.trainable", "layer9.*"):
        set_trainable(net.encoder, ("layer9.*",))


def test_frozen_statistics_stay_while_weights_train():
    net = create_model("test_resnet", 4)
    net.frozen_statistics = True
    net.train()
    before = {n: b.clone() for n, b in net.encoder.named_buffers()}
    net(torch.rand(4, 3, 64, 64)).logits.sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in net.encoder.named_buffers())
    assert net.projector.training and all(p.grad is not None for p in net.encoder.parameters())
