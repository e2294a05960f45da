"""Losses on the logits against loops over one image and one class at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from rescom_timm import losses
from rescom_timm.methods import (
    METHODS,
    CausalNormConfig,
    ClassBalancedConfig,
    FocalConfig,
    LadeConfig,
    LdamConfig,
    LogitAdjustmentConfig,
    LosConfig,
    create_method,
)
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.methods import reference
from tests.methods.stub import COUNTS, batch, make, make_net, train
from tests.raises import raises


def logits_of(method, data):
    return method.net(data["image"].transpose(0, 1).flatten(0, 1)).logits


def check(method, expected, data):
    """The loss and its gradient in every trained weight."""
    outputs = method(data)
    assert torch.allclose(outputs["loss"], expected, rtol=1e-6)
    weights = [p for p in method.net.parameters() if p.requires_grad]
    mine = torch.autograd.grad(outputs["loss"], weights)
    theirs = torch.autograd.grad(expected, weights)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("views", [1, 2])
def test_losses_on_logits_are_their_equations(views):
    data = batch(views=views)
    labels = data["label"].repeat(views).tolist()
    ones = [1.0] * 4
    for config, loss in (
        (FocalConfig(views=views, gamma=2.0), lambda s: reference.focal(s, labels, 2.0, ones)),
        (FocalConfig(views=views, gamma=0.0), lambda s: reference.cross_entropy(s, labels)),
        (
            ClassBalancedConfig(views=views, beta=0.9, gamma=1.0),
            lambda s: reference.focal(s, labels, 1.0, reference.balanced_weights(COUNTS, 0.9)),
        ),
        (LogitAdjustmentConfig(views=views, tau=1.5), lambda s: reference.adjusted(s, labels, COUNTS, 1.5)),
        (
            LadeConfig(views=views, alpha=0.3, regularization=0.2),
            lambda s: reference.adjusted(s, labels, COUNTS, 1.0) + 0.3 * reference.lader(s, labels, COUNTS, 0.2),
        ),
    ):
        method = make(config)
        assert method.views == views
        check(method, loss(logits_of(method, data)), data)


def test_ldam_is_its_equation_before_and_after_deferred_reweighting():
    data = batch(views=1)
    labels = data["label"].tolist()
    method = make(LdamConfig(margin=0.4, scale=8.0, reweight_from=0.5, beta=0.9))
    weights = reference.balanced_weights(COUNTS, 0.9)
    for epoch, expected in ((0, None), (4, None), (5, weights), (9, weights)):
        method.set_epoch(epoch, 10)
        features, w = method.net(data["image"][:, 0]).features, method.net.classifier.weight
        cosines = [[f @ k / f.norm() / k.norm() for k in w] for f in features]
        check(method, reference.ldam(cosines, labels, COUNTS, 0.4, 8.0, expected), data)
    never = make(LdamConfig(reweight_from=1.0))
    never.set_epoch(9, 10)
    assert not never.reweighted


@pytest.mark.parametrize("views", [1, 2])
def test_the_loss_of_mixed_images_is_that_of_both_labels_by_their_shares(views):
    data = batch(views=views)
    share, ones = 0.3, [1.0] * 4
    data |= {"partner": data["label"].flip(0), "share": torch.tensor(share)}
    own, partners = (data[name].repeat(views).tolist() for name in ("label", "partner"))
    for config, loss in (
        (FocalConfig(views=views, gamma=2.0), lambda s, labels: reference.focal(s, labels, 2.0, ones)),
        (LogitAdjustmentConfig(views=views), lambda s, labels: reference.adjusted(s, labels, COUNTS, 1.0)),
    ):
        method = make(config)
        logits = logits_of(method, data)
        check(method, share * loss(logits, own) + (1 - share) * loss(logits, partners), data)
    method = make(FocalConfig(views=views, gamma=0.0))  # cross-entropy: that of the soft target
    target = share * F.one_hot(torch.tensor(own), 4) + (1 - share) * F.one_hot(torch.tensor(partners), 4)
    check(method, F.cross_entropy(logits_of(method, data), target.double()), data)


def test_only_losses_of_single_images_are_mixed():
    able = {name for name, (_, method) in METHODS.items() if method.per_image}
    assert not able & {"rescom", "moco", "paco", "hybrid_psc", "dro_lt", "experts", "lade"}
    assert {"cross_entropy", "balanced_softmax", "focal", "class_balanced", "ldam", "logit_adjustment", "las"} <= able


def test_half_precision_logits_are_raised_and_large_ones_stay_finite():
    logits = torch.tensor([[90.0, -90.0, 0.0, 0.0], [0.0, 0.0, 300.0, 1.0]], requires_grad=True)
    labels = torch.tensor([1, 2])
    margins = losses.ldam_margins(COUNTS)
    for loss in (
        losses.focal(logits, labels, 2.0),
        losses.focal(logits.bfloat16(), labels, 0.0),
        losses.logit_adjustment(logits, labels, COUNTS, 1.0),
        losses.lader(logits, labels, COUNTS),
        losses.ldam(logits.half(), labels, margins),
        losses.label_aware_smoothing(logits, labels, torch.full((4,), 0.1)),
        losses.diversity(torch.stack([logits, -logits]), torch.ones(4)),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.dtype == torch.float32 and loss.isfinite() and gradient.isfinite().all()


def test_rarer_classes_have_larger_margins_and_weights():
    margins = losses.ldam_margins(COUNTS, 0.5)
    assert margins[-1] == 0.5 and (margins.diff() > 0).all()
    assert torch.allclose(margins[0], torch.tensor(0.5 * (3 / 50) ** 0.25))
    weights = losses.inverse_power_weights(COUNTS, 1.0)
    assert torch.allclose(weights * COUNTS, (weights * COUNTS)[0].expand(4)) and torch.allclose(
        weights.mean(), torch.tensor(1.0)
    )


def test_post_hoc_adjustment_trains_plain_cross_entropy_and_is_in_what_classify_gives():
    data = batch(views=1)
    method = make(LogitAdjustmentConfig(form="post_hoc", tau=2.0))
    check(method, reference.cross_entropy(logits_of(method, data), data["label"].tolist()), data)
    method.eval()
    net = method.net
    scores = F.linear(net.encoder(data["image"][:, 0]), net.classifier.weight, net.classifier.bias)
    prior = COUNTS.double() / COUNTS.sum()
    assert torch.allclose(net.classify(data["image"][:, 0]), scores - 2.0 * prior.log(), atol=1e-6)
    assert set(net.classifier.state_dict()) == {"weight", "bias"}


def causal_logits(x, weight, config, d=None):
    """Eqs. 7 and 8, head by head."""
    size = len(x) // config.heads
    total = [0.0] * len(weight)
    for h in range(config.heads):
        part = slice(h * size, (h + 1) * size)
        for k, w in enumerate(weight):
            wn = w[part] / (w[part].norm() + config.gamma)
            value = wn @ x[part] / x[part].norm()
            if d is not None:
                direction = d[part] / d[part].norm()
                value = value - config.alpha * (x[part] @ direction / x[part].norm()) * (wn @ direction)
            total[k] = total[k] + config.tau / config.heads * value
    return torch.stack(total)


def test_causal_norm_trains_the_normalised_classifier_and_removes_the_mean_feature_at_inference():
    config = CausalNormConfig(heads=2, tau=4.0, gamma=0.1, alpha=0.7, momentum=0.5)
    method = make(config)
    data = batch(views=1)
    features = method.net(data["image"][:, 0]).features
    rows = [causal_logits(x, method.net.classifier.weight, config) for x in features]
    method.net.classifier.seen.zero_()
    check(method, reference.cross_entropy(rows, data["label"].tolist()), data)
    assert not method.net.classifier.mean.any()
    # Two passes of one step count as one step: mu * mean + the sum of the passes' mean features.
    method.net.classifier.mean.fill_(1.0)
    method(data)
    method.after_step()
    expected = 0.5 + 2 * features.detach().mean(dim=0)
    assert torch.allclose(method.net.classifier.mean, expected)
    method.eval()
    x = method.net.encoder(data["image"][:, 0])
    rows = torch.stack([causal_logits(row, method.net.classifier.weight, config, expected) for row in x])
    assert torch.allclose(method.net.classify(data["image"][:, 0]), rows)
    assert "classifier.mean" in method.net.state_dict()


def test_an_untrained_causal_norm_is_the_normalised_classifier():
    method = make(CausalNormConfig()).eval()
    images = batch(views=1)["image"][:, 0]
    expected = [causal_logits(x, method.net.classifier.weight, method.config) for x in method.net.encoder(images)]
    assert torch.allclose(method.net.classify(images), torch.stack(expected))


def test_classifiers_that_are_linear_in_evaluation_are_exported_and_the_others_refused():
    from rescom_timm.methods import create_method

    def net():
        return create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=4, dim=3))

    adjusted = create_method(net(), COUNTS, LogitAdjustmentConfig(form="post_hoc")).net.eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(adjusted.to_timm()(images), adjusted.classify(images), atol=1e-5)
    cosine = create_method(net(), COUNTS, LdamConfig()).net.eval()  # ranked alike: each image by one factor
    factors = cosine.to_timm()(images) / cosine.classify(images)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-3) and bool((factors > 0).all())
    with raises("net.export", "CausalNorm"):
        create_method(net(), COUNTS, CausalNormConfig()).net.to_timm()


@pytest.mark.parametrize(
    ("config", "settings", "setting"),
    [
        (FocalConfig, {"gamma": 0.5}, "gamma"),
        (FocalConfig, {"gamma": -1.0}, "gamma"),
        (ClassBalancedConfig, {"beta": 1.0}, "beta"),
        (LdamConfig, {"scale": 0.0}, "scale"),
        (LdamConfig, {"reweight_from": 1.5}, "reweight_from"),
        (LogitAdjustmentConfig, {"tau": -1.0}, "tau"),
        (LadeConfig, {"alpha": -0.1}, "alpha"),
        (CausalNormConfig, {"heads": 0}, "heads"),
    ],
)
def test_impossible_settings_are_refused(config, settings, setting):
    with raises("method.value", setting):
        config(**settings)


def test_features_that_cannot_be_cut_into_heads_are_refused():
    with raises("method.value", "heads", 6, 4):
        make(CausalNormConfig(heads=4))


def test_training_lowers_the_loss():
    for config in (
        FocalConfig(),
        ClassBalancedConfig(),
        LdamConfig(scale=4.0),
        LadeConfig(),
        CausalNormConfig(tau=4.0),
    ):
        method = make(config)
        losses = [train(method, steps=1)["loss"].item() for _ in range(20)]  # always the same batch
        assert losses[-1] < 0.8 * losses[0], config


def test_the_vs_loss_and_its_second_phase():
    """Against loops: s_k / D_k + tau log pi_k, then weights pi_k^-nu over s + tau' log pi, divided by their sum."""
    data = batch(views=1)
    labels = data["label"].tolist()
    method = make(LogitAdjustmentConfig(gamma=0.3, tau=1.2, reweight_from=0.8, nu=0.5, tau_late=0.7))
    total, largest = float(COUNTS.sum()), float(COUNTS.max())
    for epoch in (0, 7, 8, 9):
        method.set_epoch(epoch, 10)
        terms, shares = [], []
        for row, y in zip(logits_of(method, data), labels, strict=True):
            late = epoch >= 8
            moved = [
                (s if late else s / (largest / n) ** 0.3) + (0.7 if late else 1.2) * math.log(n / total)
                for s, n in zip(row, COUNTS.tolist(), strict=True)
            ]
            shares.append((COUNTS[y].item() / total) ** -0.5 if late else 1.0)
            terms.append(-shares[-1] * torch.log(reference.softmax(moved)[y]))
        check(method, sum(terms) / sum(shares), data)


def test_without_gamma_and_a_second_phase_it_is_logit_adjustment_bit_for_bit():
    data = batch(views=1)
    plain, late = make(LogitAdjustmentConfig()), make(LogitAdjustmentConfig(reweight_from=0.5))
    for method in (plain, late):
        method.set_epoch(0, 10)
    logits = plain.net(data["image"][:, 0]).logits
    expected = F.cross_entropy(logits + losses.log_prior(COUNTS), data["label"])
    assert torch.equal(plain(data)["loss"], expected) and torch.equal(late(data)["loss"], expected)
    with raises("recipe.conflict", "post_hoc"):
        LogitAdjustmentConfig(form="post_hoc", gamma=0.1)


def test_label_over_smoothing_trains_the_classifier_it_starts_from():
    net = make_net()
    before = net.classifier.weight.detach().clone()
    method = create_method(net, COUNTS, LosConfig(label_smoothing=0.9))
    assert torch.equal(method.net.classifier.weight, before)
    assert [n for n, p in method.net.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    data = batch(views=1)
    log_p = logits_of(method, data).log_softmax(dim=1)
    terms = [-(0.1 * row[y] + 0.9 * row.mean()) for row, y in zip(log_p, data["label"].tolist(), strict=True)]
    check(method, sum(terms) / len(terms), data)
