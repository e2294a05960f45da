"""Second stages: what they train, what they leave exactly as it was, and what is evaluated."""

import pytest
import torch
import torch.nn.functional as F

from rescom_timm import losses
from rescom_timm.methods import (
    METHODS,
    CrtConfig,
    DisAlignConfig,
    LasConfig,
    LwsConfig,
    TauNormConfig,
    create_method,
)
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.methods import reference
from tests.methods.stub import COUNTS, batch, make, make_net, train
from tests.raises import raises

STATISTICS = {"encoder.bn.running_mean", "encoder.bn.running_var", "encoder.bn.num_batches_tracked"}


def stack(rows):
    """(N, K) of lists of scalars."""
    return torch.stack([torch.stack(row) for row in rows])


def changed(method, steps=3):
    """Names of what training moves, weights and statistics."""
    before = {name: value.clone() for name, value in method.net.state_dict().items()}
    train(method, steps)
    return {name for name, value in method.net.state_dict().items() if not torch.equal(before[name], value)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CrtConfig(), {"classifier.weight", "classifier.bias"}),
        (LwsConfig(), {"classifier.class_scale"}),
        (LasConfig(shift_bn=False), {"classifier.weight", "classifier.bias", "classifier.class_scale"}),
        (LasConfig(), {"classifier.weight", "classifier.bias", "classifier.class_scale"} | STATISTICS),
        (
            DisAlignConfig(),
            {
                "classifier.class_gain",
                "classifier.class_shift",
                "classifier.confidence.weight",
                "classifier.confidence.bias",
            },
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_training_moves_the_named_parts_and_nothing_else(config, expected):
    method = make(config)
    assert set(changed(method)) == expected


def test_encoder_is_in_evaluation_mode_while_training_also_after_an_evaluation():
    method = make(CrtConfig())
    for _ in range(2):
        method.train()
        assert method.training and method.net.classifier.training
        assert not any(module.training for module in method.net.encoder.modules())
        method.net.eval()
        method.net.train()  # as an evaluation within the run does
    las = make(LasConfig())
    las.train()
    assert not las.net.encoder.training and las.net.encoder.bn.training
    las.eval()
    assert not las.net.encoder.bn.training


def test_crt_starts_from_a_new_classifier_and_the_others_from_the_trained_one():
    trained = make_net().classifier.weight
    assert not torch.equal(make(CrtConfig()).net.classifier.weight, trained)
    assert not torch.equal(make(LasConfig(retain=False)).net.classifier.weight, trained)
    images = batch(views=1)["image"][:, 0]
    expected = make_net().eval().classify(images)
    for config in (LwsConfig(), LasConfig(), DisAlignConfig(), TauNormConfig(tau=0.0)):
        method = make(config).eval()
        assert torch.equal(method.net.classifier.weight, trained)
        shift = make_net().classifier.bias if config.name == "tau_norm" else 0.0  # its logits have no bias
        gain = 1.0
        if config.name == "disalign":  # alpha starts at 2, so that an image's scores are scaled alike
            sums = 0.1 * method.net.encoder(images).sum(dim=1, keepdim=True)
            gain = 1 + (sums + method.net.classifier.confidence.bias).sigmoid()
        assert torch.allclose(method.net.classify(images) + shift, gain * expected)


def test_lws_las_and_tau_norm_are_their_equations():
    images = batch(views=1)["image"][:, 0]
    for config in (LwsConfig(), LasConfig()):
        method = make(config)
        train(method)
        method.eval()
        head, features = method.net.classifier, method.net.encoder(images)
        rows = [[head.class_scale[k] * (x @ head.weight[k] + head.bias[k]) for k in range(4)] for x in features]
        assert torch.allclose(method.net.classify(images), stack(rows))
    method = make(TauNormConfig(tau=0.6)).eval()
    w, features = method.net.classifier.weight, method.net.encoder(images)
    rows = [[x @ w[k] / w[k].norm() ** 0.6 for k in range(4)] for x in features]
    assert torch.allclose(method.net.classify(images), stack(rows))


def test_disalign_is_its_equation():
    method = make(DisAlignConfig(power=1.2))
    train(method)
    method.eval()
    data = batch(views=1)
    head, features = method.net.classifier, method.net.encoder(data["image"][:, 0])
    rows = []
    for x in features:
        s = [x @ head.weight[k] + head.bias[k] for k in range(4)]
        sigma = 1 / (1 + torch.exp(-(x @ head.confidence.weight[0] + head.confidence.bias[0])))
        alpha = [1 + head.class_gain[k] for k in range(4)]
        rows.append([sigma * (alpha[k] * s[k] + head.class_shift[k]) + (1 - sigma) * s[k] for k in range(4)])
    assert torch.allclose(method.net.classify(data["image"][:, 0]), stack(rows))
    weights = [(COUNTS.sum() / n).item() ** 1.2 for n in COUNTS]
    labels = data["label"].tolist()
    terms = [-torch.log(reference.softmax(row)[y]) * weights[y] for row, y in zip(rows, labels, strict=True)]
    assert torch.allclose(method(data)["loss"], sum(terms) / sum(weights[y] for y in labels), rtol=1e-6)


@pytest.mark.parametrize("form", ["concave", "linear", "convex"])
def test_label_aware_smoothing_is_its_equation(form):
    import math

    most, least = 50, 3
    share = {
        "concave": lambda t: math.sin(t * math.pi / 2),
        "linear": lambda t: t,
        "convex": lambda t: 1 + math.sin(1.5 * math.pi + t * math.pi / 2),
    }[form]
    eps = [0.1 + 0.3 * share((n - least) / (most - least)) for n in COUNTS.tolist()]
    smoothing = losses.smoothing_by_count(COUNTS, 0.4, 0.1, form)
    assert (
        torch.allclose(smoothing, torch.tensor(eps))
        and smoothing[0] == 0.4
        and torch.allclose(smoothing[3], torch.tensor(0.1))
    )
    method = make(LasConfig(head=0.4, tail=0.1, form=form)).eval()
    data = batch(views=1)
    outputs = method(data)
    expected = reference.smoothed(outputs["logits"], data["label"].tolist(), eps)
    assert torch.allclose(outputs["loss"], expected, rtol=1e-6)


def test_classes_of_equal_counts_get_the_tails_smoothing():
    assert torch.equal(losses.smoothing_by_count(torch.tensor([7, 7]), 0.3, 0.1), torch.full((2,), 0.1))


@pytest.mark.parametrize(
    "config", [CrtConfig(), LwsConfig(), LasConfig(), TauNormConfig()], ids=lambda config: config.name
)
def test_linear_second_stages_are_exported_as_plain_timm_with_the_same_logits(config):
    net = create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=4, dim=3))
    method = create_method(net, COUNTS, config)
    with torch.no_grad():
        for p in method.net.classifier.parameters():
            p.add_(0.1 * torch.rand_like(p))
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(net.to_timm()(images), net.eval().classify(images), atol=1e-5)


def test_disalign_is_refused_at_export():
    net = create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=4, dim=3))
    with raises("net.export", "Aligned"):
        create_method(net, COUNTS, DisAlignConfig()).net.to_timm()


def test_cross_entropy_is_the_loss_of_crt():
    method = make(CrtConfig()).eval()
    data = batch(views=1)
    outputs = method(data)
    assert torch.allclose(outputs["loss"], F.cross_entropy(outputs["logits"], data["label"]))
    assert {name for name, (_, own) in METHODS.items() if own.second_stage} == {
        "crt",
        "lws",
        "tau_norm",
        "las",
        "los",
        "disalign",
        "probe",
    }


@pytest.mark.parametrize(
    ("config", "settings", "setting"),
    [
        (TauNormConfig, {"tau": -0.1}, "tau"),
        (LasConfig, {"head": 1.0}, "head"),
        (LasConfig, {"head": 0.1, "tail": 0.2}, "0.2"),
        (DisAlignConfig, {"power": -1.0}, "power"),
    ],
)
def test_impossible_settings_are_refused(config, settings, setting):
    with raises("method.value", setting):
        config(**settings)
