"""BCL and ProCo against loops written from their equations, the Bessel functions against SciPy's, and what the first
view and the others are for where views.contrast makes the others."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import ive

from rescom_timm.losses import balanced_contrast, expected_contrast
from rescom_timm.losses.von_mises_fisher import concentration, log_normalizer
from rescom_timm.methods import BclConfig, MocoConfig, PacoConfig, ProcoConfig, RescomConfig, create_method
from rescom_timm.methods.rescom import QueueConfig
from tests.methods.stub import COUNTS, batch, make, make_net, train

UNIT = {"dtype": torch.float64}


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **UNIT), dim=-1)


# ------------------------------------------------------------------------------------------------------------- BCL


def naive_bcl(z, labels, prototypes, tau):
    keys = [*zip(z, labels.tolist(), strict=True), *zip(prototypes, range(len(prototypes)), strict=True)]
    number = [sum(c == k for _, c in keys) for k in range(len(prototypes))]
    losses = []
    for i, (query, y) in enumerate(zip(z, labels.tolist(), strict=True)):
        bottom, positives = 0.0, []
        for j, (key, c) in enumerate(keys):
            if j == i:
                continue
            exp = torch.exp(query @ key / tau)
            bottom = bottom + exp / (number[c] - (c == y))
            positives += [exp] if c == y else []
        losses.append(sum(-torch.log(exp / bottom) for exp in positives) / len(positives))
    return sum(losses) / len(losses)


def test_balanced_contrast_is_the_equation_with_its_gradient():
    z, prototypes = units(10, 6).requires_grad_(), units(4, 6, seed=1).requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1, 0, 2])  # no image of class 3
    ours, theirs = balanced_contrast(z, labels, prototypes, 0.2), naive_bcl(z, labels, prototypes, 0.2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for one, other in zip(*(torch.autograd.grad(loss, (z, prototypes)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    same = torch.ones(10, 6, **UNIT) / 6**0.5
    assert balanced_contrast(same, labels, same[:4], 0.2).item() == pytest.approx(math.log(4)), "its chance level"


def test_bcl_classifies_view_1_and_compares_the_others_with_prototypes_of_the_classifier():
    method, data = make(BclConfig(contrast_weight=0.4, temperature=0.3)), batch(views=3)
    net, y = method.net, data["label"]
    _, logits, z = net(data["image"].transpose(0, 1).flatten(0, 1))
    mlp = net.class_projector
    rows = net.classifier.weight @ mlp[0].weight.T + mlp[0].bias
    rows = (rows - rows.mean(dim=0)) / (rows.var(dim=0, unbiased=False) + mlp[1].eps).sqrt()
    rows = rows.relu() @ mlp[3].weight.T + mlp[3].bias
    prototypes = rows / rows.norm(dim=1, keepdim=True)
    expected = F.cross_entropy(logits[:8] + COUNTS.double().log(), y)
    expected = expected + 0.4 * naive_bcl(z[8:], y.repeat(2), prototypes, 0.3)
    outputs = method(data)
    assert outputs["loss"].item() == pytest.approx(expected.item(), rel=1e-9) and outputs["logits"].shape == (8, 4)
    assert outputs["loss_contrast_chance"].item() == pytest.approx(math.log(4))
    before = {name: value.clone() for name, value in net.named_parameters()}
    train(method)
    assert all(not torch.equal(value, before[name]) for name, value in net.named_parameters() if "0.bias" not in name)


# ----------------------------------------------------------------------------------------------------------- ProCo


@pytest.mark.parametrize("dim", [2, 5, 8, 128, 256, 1024])
def test_the_normalizer_is_that_of_the_bessel_function(dim):
    x = torch.tensor([0.0, 1e-6, 0.1, 1.0, 20.0, 63.0, 300.0, 1e4, 1e5], requires_grad=True, **UNIT)
    order = dim / 2 - 1
    value = log_normalizer(x, order)
    (slope,) = torch.autograd.grad(value.sum(), x)
    at = x.detach().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected, ratio = np.log(ive(order, at)) + at - order * np.log(at), ive(order + 1, at) / ive(order, at)
    there = (ive(order, at) > 1e-280) & (ive(order + 1, at) > 1e-280) & (at > 0)
    np.testing.assert_allclose(value.detach().numpy()[there], expected[there], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(slope.numpy()[there], ratio[there], rtol=1e-10)
    assert there.sum() >= 3
    assert value[0].item() == pytest.approx(-order * math.log(2) - math.lgamma(order + 1), rel=1e-12, abs=1e-12)
    assert slope[0] == 0


def test_a_concentration_is_bounded_where_the_mean_has_length_one():
    means = torch.tensor([[0.5, 0.0], [1.0, 0.0], [1.0 + 1e-9, 0.0], [0.0, 0.0]], **UNIT)
    assert concentration(means).tolist() == pytest.approx([2 * 0.5 / 0.75, 1e5, 1e5, 0.0])


def naive_expected(z, means, tau):
    rows = []
    nu = z.shape[1] / 2 - 1
    for query in z:
        row = []
        for mean in means:
            length = mean.norm()
            kappa = len(mean) * length / (1 - length**2)
            kappa = kappa if 0 < kappa < 1e5 else torch.tensor(1e5, **UNIT)  # one image: R is 1, but for rounding
            x = (kappa * mean / length + query / tau).norm().item()
            c = [math.log(ive(nu, a)) + a - nu * math.log(a) for a in (x, kappa.item())]
            row.append(c[0] - c[1])
        rows.append(row)
    return torch.tensor(rows, **UNIT)


def test_expected_contrast_is_the_equation_with_its_gradient():
    z, means = units(5, 8).requires_grad_(), units(4, 8, seed=1) * torch.tensor([[0.1], [0.5], [0.9], [0.97]], **UNIT)
    ours = expected_contrast(z, means, 0.2)
    torch.testing.assert_close(ours, naive_expected(z.detach(), means, 0.2), rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(lambda free: expected_contrast(F.normalize(free, dim=1), means, 0.2), z)
    many = F.normalize(torch.randn(200000, 8, generator=torch.Generator().manual_seed(0), **UNIT), dim=1)
    flat = torch.exp(many @ z[0].detach() / 0.2).mean().log()  # of a class spread over the whole sphere
    assert expected_contrast(z[:1], means[:1] * 1e-9, 0.2).item() == pytest.approx(flat.item(), abs=0.02)


def test_proco_is_its_loss_with_running_means_of_two_epochs():
    method = make(ProcoConfig(contrast_weight=0.7, temperature=0.25))
    net, seen = method.net, {}
    for epoch in range(3):
        method.set_epoch(epoch, 3)
        fresh = method.means[1].clone()
        torch.testing.assert_close(fresh.norm(dim=1), torch.full((4,), 0.9, **UNIT), rtol=1e-6, atol=0)
        for step in range(2):
            data = batch(views=3, seed=10 * epoch + step)
            data["label"] = data["label"].clamp(max=2)  # class 3 is never seen
            y = data["label"]
            _, logits, z = net(data["image"].transpose(0, 1).flatten(0, 1))
            outputs, parts = method(data), []
            for view in z[8:].chunk(2):
                for one, label in zip(view.detach(), y.tolist(), strict=True):
                    seen.setdefault((epoch, label), []).append(one)
                means = []
                for k in range(4):
                    own = [one for e in (epoch - 1, epoch) for one in seen.get((e, k), [])]
                    means.append(torch.stack(own).mean(dim=0) if own else method.means[0, k])
                row = naive_expected(view.detach(), means, 0.25)
                parts.append(F.cross_entropy(row + (COUNTS.double() / COUNTS.sum()).log(), y))
            torch.testing.assert_close(torch.stack(means)[:3], method.means[0, :3], rtol=1e-10, atol=1e-12)
            expected = F.cross_entropy(logits[:8] + COUNTS.double().log(), y) + 0.7 * (parts[0] + parts[1]) / 2
            assert outputs["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
            prior = COUNTS.double() / COUNTS.sum()
            assert outputs["loss_contrast_chance"].item() == pytest.approx(-prior[y].log().mean().item())
        assert torch.equal(method.means[1, 3], fresh[3])
        method.set_epoch(epoch, 3)  # as where a run resumes within the epoch: nothing is exchanged
        assert method.numbers[1, :3].sum() == 32


def test_the_embeddings_of_a_collapsed_net_are_at_the_chance_of_proco():
    method = make(ProcoConfig())
    method.set_epoch(0, 1)
    z = units(1, 5).expand(8, -1)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    method.see(z, y)
    logits = expected_contrast(z, method.means[0], 0.1)
    loss = F.cross_entropy(logits + COUNTS.double().log(), y)
    chance = F.cross_entropy(COUNTS.double().log().expand(8, -1), y)
    assert loss.item() == pytest.approx(chance.item(), rel=1e-6)


# -------------------------------------------------------------------------------------------------- views.contrast


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_with_views_contrast_rescom_classifies_view_1_alone_and_view_2_enters_the_queue(mode):
    data, config = batch(), RescomConfig(mode=mode, negatives=4)
    plain, method = make(config), make(config)
    method.contrast_views = True
    one, two = plain(data), method(data)
    assert one["loss_contrast"] == two["loss_contrast"]
    assert two["logits"].shape == (8, 4) and torch.equal(two["logits"], one["logits"][:8])
    expected = F.cross_entropy(two["logits"] + COUNTS.double().log(), data["label"])
    assert two["loss_classification"].item() == pytest.approx(expected.item())
    z2 = method.net(data["image"].transpose(0, 1).flatten(0, 1)).embeddings[8:]
    held = method.queue.keys[method.queue.valid]
    assert all((z2 - key).abs().sum(dim=1).min() < 1e-9 for key in held) and len(held)


def test_lambda_falls_to_0_as_a_cosine():
    data, config = batch(), RescomConfig(negatives=4, contrast_weight=0.4, contrast_schedule="cosine")
    for epoch, share in ((0, 1.0), (5, 0.5), (9, (1 + math.cos(0.9 * math.pi)) / 2)):
        method = make(config)
        method.set_epoch(epoch, 10)
        outputs = method(data)
        expected = outputs["loss_classification"] + 0.4 * share * outputs["loss_contrast"]
        assert outputs["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("kind", ["class_balanced", "fifo"])
def test_prototypes_are_keys_of_every_query(mode, kind):
    config = RescomConfig(
        mode=mode, prototypes=True, beta=0.0, queue=QueueConfig(kind=kind, per_class=2), positives=None, negatives=None
    )
    method, data = make(config), batch()
    method(data)
    y, net = data["label"], method.net
    held, held_labels = method.queue.keys[method.queue.valid].clone(), method.queue.labels[method.queue.valid].clone()
    z = net(data["image"].transpose(0, 1).flatten(0, 1)).embeddings
    centres = net.class_projector(net.classifier.weight)
    queries, labels = (z[:8], y) if mode == "paper" else (z, y.repeat(2))
    own = (z[:0], y[:0]) if mode == "paper" else (z, y.repeat(2))
    keys, key_labels = torch.cat([own[0], held, centres]), torch.cat([own[1], held_labels, torch.arange(4)])
    terms, chance = [], []
    for i, (query, label) in enumerate(zip(queries, labels, strict=True)):
        pairs = [j for j in range(len(keys)) if mode == "paper" or j != i]
        logits = torch.stack([query @ keys[j] / 0.2 for j in pairs])
        positive = key_labels[pairs] == label
        terms.append(-logits.log_softmax(dim=0)[positive].mean())
        chance.append(math.log(len(pairs)))
    outputs = method(data)
    assert outputs["loss_contrast"].item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-9)
    assert outputs["loss_contrast_chance"].item() == pytest.approx(sum(chance) / len(chance), rel=1e-6)


@pytest.mark.parametrize("config", [PacoConfig(queue_size=16), PacoConfig(queue_size=16, momentum=None)])
def test_paco_logs_the_contrast_of_its_pairs_and_its_chance(config):
    method = make(config)
    outputs = method(batch())
    pairs = 15  # the queue is empty: all other views of the batch
    assert outputs["loss_contrast_chance"].item() == pytest.approx(math.log(pairs))
    with torch.no_grad():
        for parameter in [*method.net.projector.parameters()]:
            parameter.zero_()  # one point
        method.net.projector[-1].bias.fill_(1.0)
        if method.momentum_net is not None:
            method.momentum_net.copy.load_state_dict(method.net.state_dict())
    method.queue.valid.fill_(False)
    outputs = method(batch())
    assert outputs["loss_contrast"].item() == pytest.approx(math.log(pairs))
    assert not outputs["loss_contrast"].requires_grad


def test_moco_takes_views_of_another_policy():
    assert make(MocoConfig(queue_size=8)).contrasts and not make(PacoConfig(queue_size=8)).contrasts


def test_a_net_without_a_projector_is_refused():
    net = make_net()
    net.drop_projector()
    for config in (BclConfig(), ProcoConfig(), RescomConfig(prototypes=True)):
        with pytest.raises(ValueError):
            create_method(net, COUNTS, config)
