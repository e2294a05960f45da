"""Class weights and focal's alpha by name: against loops over the rows, through recipes, and unknown names."""

import pytest
import torch
import torch.nn.functional as F

from rescom_timm.config.loading import load_dict
from rescom_timm.data.sources import load
from rescom_timm.engine.build import build_method
from rescom_timm.losses import lader
from rescom_timm.methods import create_method
from rescom_timm.methods.baselines import (
    BalancedSoftmaxConfig,
    CausalNormConfig,
    ClassBalancedConfig,
    CrossEntropyConfig,
    FocalConfig,
    LadeConfig,
    LdamConfig,
    LogitAdjustmentConfig,
)
from rescom_timm.methods.rescom import QueueConfig, RescomConfig
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.raises import raises

NAMES = ["cat", "dog", "emu", "3"]
COUNTS = torch.tensor([60, 20, 8, 4])
WEIGHTS = {"emu": 10.0, "3": 0.5}
VECTOR = torch.tensor([1, 1, 10, 0.5])


def made(config, names=NAMES):
    torch.manual_seed(0)
    method = create_method(create_model("resnet8_cifar", 4, projector=ProjectorConfig(8, 4)), COUNTS, config)
    method.set_classes(names)
    return method


def rows(seed=0, n=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 4, (n,), generator=generator)


@pytest.mark.parametrize(
    "config",
    [
        CrossEntropyConfig(weights=WEIGHTS, label_smoothing=0.1),
        BalancedSoftmaxConfig(weights=WEIGHTS),
        FocalConfig(weights=WEIGHTS),
        FocalConfig(weights=WEIGHTS, alpha={"cat": 0.3}),
        LogitAdjustmentConfig(weights=WEIGHTS),
        LogitAdjustmentConfig(weights=WEIGHTS, form="post_hoc"),
        ClassBalancedConfig(weights=WEIGHTS, gamma=2.0),
        LdamConfig(weights=WEIGHTS),
        LadeConfig(weights=WEIGHTS, alpha=0.0),
        CausalNormConfig(weights=WEIGHTS),
    ],
    ids=lambda config: config.name,
)
def test_the_loss_is_the_weighted_mean_of_the_rows(config):
    method, (logits, labels) = made(config), rows()
    plain = made(type(config)(**{k: v for k, v in vars(config).items() if k != "weights"}))
    assert plain.class_weights is None
    each = torch.stack([plain.weighted(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    weights = VECTOR[labels]
    torch.testing.assert_close(method.weighted(logits, labels), (weights * each).sum() / weights.sum())
    batch = {"image": torch.randint(0, 255, (6, 1, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(6) % 4}
    assert not torch.isclose(method(batch)["loss"], plain(batch)["loss"])


def test_rescom_weighs_balanced_softmax_alone():
    queue = QueueConfig(per_class=2)
    method, (logits, labels) = made(RescomConfig(weights=WEIGHTS, queue=queue)), rows()
    weights = VECTOR[labels]
    each = F.cross_entropy(logits + COUNTS.log(), labels, reduction="none")
    torch.testing.assert_close(method.classification(logits, labels), (weights * each).sum() / weights.sum())
    batch = {"image": torch.randint(0, 255, (6, 2, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(6) % 4}
    found, plain = method(batch), made(RescomConfig(queue=queue))(batch)
    assert not torch.isclose(found["loss_classification"], plain["loss_classification"])
    torch.testing.assert_close(found["loss_contrast"], plain["loss_contrast"])


def test_alpha_is_not_normalised():
    logits, labels = rows()
    plain = made(FocalConfig()).weighted(logits, labels)
    torch.testing.assert_close(made(FocalConfig(alpha=0.25)).weighted(logits, labels), 0.25 * plain)
    found = made(FocalConfig(alpha={"dog": 3.0})).weighted(logits, labels)
    p = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    expected = (torch.tensor([1.0, 3, 1, 1])[labels] * (1 - p) ** 2 * -p.log()).mean()
    torch.testing.assert_close(found, expected)


def test_the_second_phase_keeps_both_weights():
    config = LogitAdjustmentConfig(weights=WEIGHTS, reweight_from=0.5, nu=0.3)
    method, (logits, labels) = made(config), rows()
    method.set_epoch(5, 10)
    pi = COUNTS / COUNTS.sum()
    weights = (VECTOR * pi**-0.3)[labels]
    each = F.cross_entropy(logits + pi.log(), labels, reduction="none")
    torch.testing.assert_close(method.weighted(logits, labels), (weights * each).sum() / weights.sum())


def test_ldam_multiplies_both_weights_late():
    method, (logits, labels) = made(LdamConfig(weights=WEIGHTS)), rows()
    method.set_epoch(9, 10)
    weights = (VECTOR * method.weights)[labels]
    margins = F.one_hot(labels, 4) * method.margins * method.config.scale
    each = F.cross_entropy(logits - margins, labels, reduction="none")
    torch.testing.assert_close(method.weighted(logits, labels), (weights * each).sum() / weights.sum())


def test_lade_does_not_weigh_its_regulariser():
    logits, labels = rows()
    parts = [made(LadeConfig(weights=WEIGHTS, alpha=alpha)).weighted(logits, labels) for alpha in (0.0, 1.0)]
    torch.testing.assert_close(parts[1] - parts[0], lader(logits, labels, COUNTS))


def recipe(*overrides, **method):
    return load_dict(
        {"data": {"source": "digits"}, "net": {"backbone": "resnet8_cifar"}, "method": method}, "recipe", overrides
    )


def test_recipes_name_classes_also_by_numbers():
    for loaded in (
        recipe(name="balanced_softmax", weights={3: 10}),
        recipe("method.weights={3: 10}", name="balanced_softmax"),
        recipe("method.weights.3=10", name="balanced_softmax"),
    ):
        assert loaded.method.weights == {"3": 10.0}
        assert load_dict(loaded.to_dict()).method == loaded.method
        method = build_method(loaded, load(loaded.data))
        assert method.class_weights.tolist() == [10.0 if k == 3 else 1.0 for k in range(10)]


@pytest.mark.parametrize(
    ("method", "naming"),
    [
        ({"name": "cross_entropy", "weights": {"33": 2}}, ["'33'", "'3'"]),
        ({"name": "rescom", "weights": {"defect": 2}}, ["'defect'"]),
        ({"name": "focal", "alpha": {"defect": 2}}, ["alpha", "'defect'"]),
        ({"name": "cross_entropy", "weights": {"3": 0}}, ["'3'", 0]),
        ({"name": "cross_entropy", "weights": {"3": -1}}, ["'3'", -1]),
    ],
)
def test_weights_that_cannot_be(method, naming):
    loaded = recipe(**method)
    with raises("method.value", *naming):
        build_method(loaded, load(loaded.data))


def test_methods_without_weights_refuse_them():
    with raises("recipe.unknown_key", "weights", "method crt", "focal", "ldam"):
        recipe(name="crt", weights={"3": 2})
    with raises("recipe.unknown_key", "method.gamma", "focal"):
        recipe(name="lade", gamma=2)
    with raises("method.value", "alpha"):
        recipe(name="focal", alpha=0.0)
