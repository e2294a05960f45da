"""MoCo + Balanced Softmax, PaCo and GPaCo against loops; the momentum encoder against its recurrence."""

import pytest
import torch
import torch.nn.functional as F

from rescom_timm.methods import MocoConfig, PacoConfig
from tests.methods import reference
from tests.methods.stub import COUNTS, batch, make, make_net, train
from tests.raises import raises


def filled(method, number, seed=3):
    """`number` keys into the queue; returns them and their labels."""
    generator = torch.Generator().manual_seed(seed)
    keys = F.normalize(torch.randn(number, 5, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.arange(number) % 4
    method.queue.enqueue(keys, labels)
    return keys, labels


def keys_of(method, data):
    """Of the second views, by a net in training that has the momentum encoder's weights."""
    net = make_net()
    net.load_state_dict(method.momentum_net.copy.state_dict())
    return net.train()(data["image"][:, 1]).embeddings.detach()


def check(method, expected, data):
    outputs = method(data)
    assert torch.allclose(outputs["loss"], expected, rtol=1e-7)
    weights = [p for p in method.net.parameters() if p.requires_grad]
    mine = torch.autograd.grad(outputs["loss"], weights)
    theirs = torch.autograd.grad(expected, weights)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-10) for a, b in zip(mine, theirs, strict=True))
    return outputs


def test_moco_contrasts_an_image_with_its_other_view_and_the_whole_queue():
    method = make(MocoConfig(queue_size=6, contrast_weight=0.7, temperature=0.3))
    held, _ = filled(method, 5)
    data = batch()
    with torch.no_grad():
        for p in method.momentum_net.parameters():
            p.add_(0.1)
    keys = keys_of(method, data)
    _, logits, queries = method.net(data["image"][:, 0])
    expected = reference.adjusted(logits, data["label"].tolist(), COUNTS, 1.0)
    expected = expected + 0.7 * reference.contrast(queries, keys, list(held), 0.3)
    outputs = check(method, expected, data)
    assert outputs["logits"].shape == (8, 4)
    # The momentum encoder's keys entered, the first of them over the only free slot and then over the oldest keys.
    assert torch.allclose(method.queue.keys[[5, 0, 1]].double(), keys[[6, 7, 2]], atol=1e-6)


def test_moco_of_ssd_has_cross_entropy_and_no_negatives_of_the_own_class():
    config = MocoConfig(
        queue_size=6, contrast_weight=1.0, temperature=0.3, classification="cross_entropy", same_class_negatives=False
    )
    method = make(config)
    held, classes = filled(method, 5)
    data = batch()
    keys = keys_of(method, data)
    _, logits, queries = method.net(data["image"][:, 0])
    expected = reference.cross_entropy(logits, data["label"].tolist())
    terms = []
    for q, k, y in zip(queries, keys, data["label"].tolist(), strict=True):
        others = [key for key, c in zip(held, classes.tolist(), strict=True) if c != y]
        terms.append(reference.contrast([q], [k], others, 0.3))
    check(method, expected + reference.mean(terms), data)


def test_the_momentum_encoder_follows_once_an_optimizer_step_and_gets_no_gradient():
    method = make(MocoConfig(momentum=0.9, queue_size=8))
    expected = [p.detach().clone() for p in method.net.parameters()]
    for _ in range(3):
        train(method, steps=1)
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, method.net.parameters(), strict=True)]
    own = list(method.momentum_net.parameters())
    assert all(torch.allclose(a, b) for a, b in zip(own, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(own, method.net.parameters(), strict=True) if b.grad is not None)
    assert not any(p.requires_grad for p in own)
    # Passes whose gradients are accumulated do not move it.
    before = [p.clone() for p in own]
    for seed in range(3):
        method(batch(seed=seed))["loss"].backward()
    assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True))


def test_momentum_encoder_and_queue_are_saved_beside_the_net():
    method = train_some(MocoConfig(momentum=0.5, queue_size=8))
    state = {name: value for name, value in method.state_dict().items() if not name.startswith("net.")}
    assert {"queue.keys", "momentum_net.copy.encoder.linear.weight"} <= set(state)
    other = make(MocoConfig(momentum=0.5, queue_size=8), seed=9)
    other.load_state_dict(state, strict=False)
    other.net.load_state_dict(method.net.state_dict())
    assert torch.equal(method(batch(seed=7))["loss"], other(batch(seed=7))["loss"])


def train_some(config):
    method = make(config)
    train(method)
    return method


def test_paco_is_its_equation_with_momentum_keys():
    config = PacoConfig(alpha=0.3, temperature=0.4, momentum=0.9, queue_size=10)
    method = make(config)
    held, held_labels = filled(method, 7)
    data = batch()
    y = data["label"].tolist()
    keys = keys_of(method, data)
    _, logits, queries = method.net(data["image"][:, 0])
    centres = logits + (COUNTS.double() / COUNTS.sum()).log()
    candidates = [*queries, *keys, *held]
    expected = reference.paco(
        centres, queries, y, candidates, [*y, *y, *held_labels.tolist()], list(range(8)), 0.4, 0.3, 0.0
    )
    outputs = check(method, expected, data)
    assert outputs["logits"].shape == (8, 4)
    assert torch.allclose(method.queue.keys[7:10].double(), keys[:3], atol=1e-6)


def test_gpaco_is_its_equation_without_momentum_encoder():
    method = make(PacoConfig(alpha=0.2, temperature=0.4, momentum=None, smoothing=0.1, queue_size=20))
    held, held_labels = filled(method, 7)
    assert method.momentum_net is None
    data = batch()
    y = data["label"].repeat(2).tolist()
    _, logits, queries = method.net(data["image"].transpose(0, 1).flatten(0, 1))
    centres = logits + (COUNTS.double() / COUNTS.sum()).log()
    expected = reference.paco(
        centres, queries, y, [*queries, *held], [*y, *held_labels.tolist()], list(range(16)), 0.4, 0.2, 0.1
    )
    outputs = check(method, expected, data)
    assert outputs["logits"].shape == (16, 4)
    assert torch.allclose(method.queue.keys[7:15].double(), queries[8:], atol=1e-6)


def test_an_empty_queue_gives_finite_losses():
    for config in (MocoConfig(queue_size=4), PacoConfig(queue_size=4), PacoConfig(momentum=None, queue_size=4)):
        method = make(config)
        outputs = method(batch())
        outputs["loss"].backward()
        assert outputs["loss"].isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.net.parameters())


@pytest.mark.parametrize(
    ("config", "settings", "setting"),
    [
        (MocoConfig, {"momentum": 1.0}, "momentum"),
        (MocoConfig, {"queue_size": 0}, "queue_size"),
        (MocoConfig, {"temperature": 0.0}, "temperature"),
        (MocoConfig, {"contrast_weight": -0.1}, "contrast_weight"),
        (PacoConfig, {"alpha": -0.1}, "alpha"),
        (PacoConfig, {"smoothing": 1.0}, "smoothing"),
    ],
)
def test_impossible_settings_are_refused(config, settings, setting):
    with raises("method.value", setting):
        config(**settings)
