"""Methods over a stub net: which queries, pairs and keys each mode uses, and what its loss is made of."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rescom_timm import create_model
from rescom_timm.losses import class_weights
from rescom_timm.methods import (
    METHODS,
    BalancedSoftmaxConfig,
    CrossEntropyConfig,
    RescomConfig,
    create_method,
)
from rescom_timm.methods.distillation import Teacher
from rescom_timm.methods.rescom import QueueConfig
from rescom_timm.models.net import Net, ProjectorConfig
from tests.raises import raises

COUNTS = torch.tensor([50, 20, 8, 3])


class Encoder(nn.Module):
    head_hidden_size = 6

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 6)

    def forward(self, x):
        return self.linear(x.flatten(1))


def make(config, dim=5):
    torch.manual_seed(0)
    net = Net(Encoder(), len(COUNTS), ProjectorConfig(hidden=8, dim=dim)).double()
    return create_method(net, COUNTS, config)


def batch(size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    return {"image": images, "label": torch.randint(0, len(COUNTS), (size,), generator=generator)}


def siamese_balanced_softmax(logits, labels):
    """Eq. 6 by hand: the mean of the two views' cross-entropies of s + log N_k."""
    views = logits.chunk(2)
    return sum(F.cross_entropy(view + COUNTS.double().log(), labels) for view in views) / 2


def naive_contrast(queries, labels, keys, key_labels, own, config, weights):
    """Eq. 5 by loops: queries against mined `keys`; `own` are in-batch pairs, never mined, of the released mode."""
    total = queries.new_zeros(())
    for i, (z, y) in enumerate(zip(queries, labels, strict=True)):
        positive = sorted(z @ k for k, c in zip(keys, key_labels, strict=True) if c == y)[: config.positives]
        negative = sorted((z @ k for k, c in zip(keys, key_labels, strict=True) if c != y), reverse=True)
        negative = negative[: config.negatives]
        positive = positive + [z @ k for j, (k, c) in enumerate(zip(*own, strict=True)) if j != i and c == y]
        negative = negative + [z @ k for j, (k, c) in enumerate(zip(*own, strict=True)) if j != i and c != y]
        bottom = sum(torch.exp(s / config.temperature) for s in positive + negative)
        terms = [torch.log(torch.exp(s / config.temperature) / bottom) for s in positive]
        total = total - weights[y] * sum(terms) / len(terms)
    return total / len(queries)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_rescom_is_eq_5_and_eq_6_with_the_modes_queries_pairs_and_keys(mode):
    config = RescomConfig(mode=mode, beta=0.9, queue=QueueConfig(per_class=3), positives=2, negatives=5)
    method = make(config).double()
    keys = F.normalize(torch.randn(40, 5, dtype=torch.float64), dim=1)
    key_labels = torch.arange(40) % 4
    method.queue.enqueue(keys, key_labels)
    data = batch()
    y = data["label"]
    held, held_labels = method.queue.keys.clone(), method.queue.labels.clone()
    _, logits, z = method.net(data["image"].transpose(0, 1).flatten(0, 1))
    z1, z2 = z.chunk(2)
    weights = class_weights(COUNTS, 0.9).double()
    if mode == "paper":
        contrast = naive_contrast(z1, y, held, held_labels, (z1[:0], y[:0]), config, weights)
    else:
        contrast = naive_contrast(z, y.repeat(2), held, held_labels, (z, y.repeat(2)), config, weights)
    expected = siamese_balanced_softmax(logits, y) + 0.5 * contrast

    outputs = method(data)
    assert torch.allclose(outputs["loss"], expected, rtol=1e-9)
    assert outputs["logits"].shape == (16, 4)
    mine = torch.autograd.grad(outputs["loss"], list(method.net.parameters()))
    theirs = torch.autograd.grad(expected, list(method.net.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(mine, theirs, strict=True))
    entered = z2 if mode == "paper" else z1
    for label in y.unique():
        last = entered[y == label][-3:]
        slots = method.queue.keys.view(4, 3, 5)[label]
        assert all((slots - key).abs().sum(dim=1).min() < 1e-9 for key in last)


def test_a_query_whose_class_has_no_key_yet_costs_nothing_in_paper_mode():
    method = make(RescomConfig(mode="paper", negatives=4)).double()
    outputs = method(batch())
    assert outputs["loss_contrast"] == 0
    outputs["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
    assert all(p.grad is None or not p.grad.any() for p in method.net.projector.parameters())
    assert method(batch())["loss_contrast"] > 0


def test_switches_of_the_ablations():
    data = batch()
    one_view = make(RescomConfig(siamese=False, contrast_weight=0.0, negatives=4)).double()
    logits = one_view.net(data["image"][:, 0]).logits
    outputs = one_view(data)
    # BatchNorm stands in the projector only, so the logits of one view do not depend on the other.
    assert torch.allclose(outputs["loss"], F.cross_entropy(logits + COUNTS.double().log(), data["label"]))
    for kind, slots in (("fifo", 16), ("reversed", 16), ("class_balanced", 16)):
        method = make(RescomConfig(queue=QueueConfig(kind=kind), positives=2, negatives=5)).double()
        assert abs(len(method.queue.keys) - slots) <= 2
        assert method(data)["loss"].isfinite() and method(data)["loss"].isfinite()


def test_baselines_are_the_losses_of_their_names():
    data = batch()
    for views in (1, 2):
        cut = {"image": data["image"][:, :views], "label": data["label"]}
        labels = data["label"].repeat(views)
        plain = make(CrossEntropyConfig(views=views, label_smoothing=0.1))
        outputs = plain(cut)
        expected = F.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)
        assert torch.allclose(outputs["loss"], expected, rtol=1e-5)
        balanced = make(BalancedSoftmaxConfig(views=views))
        outputs = balanced(cut)
        expected = F.cross_entropy(outputs["logits"] + COUNTS.double().log(), labels)
        assert torch.allclose(outputs["loss"], expected)
        assert not list(balanced.net.projector.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"beta": 1.0},
        {"negatives": 0},
        {"contrast_weight": -1.0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with raises("method.value", *settings):
        RescomConfig(**settings)


def test_more_negatives_than_the_queue_holds_are_refused():
    with raises("queue.mined", "Qp = 5", "Q = 4"):
        RescomConfig(positives=5)
    with raises("queue.mined", "Qn = 13", "Q = 12"):
        make(RescomConfig(negatives=13))
    with raises("method.value", "per_class"):
        QueueConfig(per_class=0)


def test_every_method_of_the_table_is_named_by_its_config():
    assert {config().name for config, _ in METHODS.values()} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_only_a_method_that_says_so_changes_on_the_host_by_epoch(name):
    """A captured step reads buffers anew, and numbers and flags of the host not."""
    net = create_model("resnet8_cifar", len(COUNTS), projector=ProjectorConfig(hidden=8, dim=5))
    size = {"negatives": 8} if name == "rescom" else {"queue_size": 16} if name in ("moco", "paco") else {}
    method = create_method(net, COUNTS, METHODS[name][0](**size))

    def host():
        return {key: value for key, value in vars(method).items() if isinstance(value, bool | int | float)}

    buffers = {key: value.data_ptr() for key, value in method.named_buffers()}
    method.set_epoch(0, 10)
    before = host()
    method.set_epoch(9, 10)
    assert (before != host()) == method.epoch_changes_host
    assert {key: value.data_ptr() for key, value in method.named_buffers()} == buffers, "changed in place"


class NoFloat64(TorchDispatchMode):
    """Fails where a tensor of float64 is made, as Apple's GPUs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            assert not (torch.is_tensor(one) and one.dtype == torch.float64), func
        return out


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("changes", [{}, {"form": "post_hoc"}], ids=["", "post_hoc"])
def test_a_step_and_its_buffers_need_no_float64(name, changes, monkeypatch):
    if changes and name != "logit_adjustment":
        pytest.skip("another method's option")
    monkeypatch.setattr("rescom_timm.losses.weights.exact", torch.Tensor.float)  # as for counts on such a device
    size = {"negatives": 8} if name == "rescom" else {"queue_size": 16} if name == "moco" else {}
    net = create_model("resnet8_cifar", len(COUNTS), projector=ProjectorConfig(hidden=8, dim=5))
    size |= {"generate_from": 0.0} if name == "rsg" else {}
    method = create_method(net, COUNTS, METHODS[name][0](**size, **changes)).train()
    if method.needs_teacher:
        method.teacher = Teacher(create_model("resnet8_cifar", len(COUNTS)))
    assert [key for key, value in method.named_buffers() if value.dtype == torch.float64] == []
    method.set_epoch(0, 2)
    images = torch.randint(0, 256, (8, method.views, 3, 32, 32), dtype=torch.uint8)
    with NoFloat64():
        loss = method({"image": images, "label": torch.arange(8) % len(COUNTS)})["loss"]
        if loss.requires_grad:
            loss.backward()
        method.after_step()


@pytest.mark.parametrize(
    ("config", "settings", "bound"),
    [
        (RescomConfig, {"beta": 1.0}, "in [0, 1)"),
        (RescomConfig, {"contrast_weight": -0.5}, "at least 0"),
        (RescomConfig, {"positives": 0}, "at least 1"),
        (CrossEntropyConfig, {"label_smoothing": 1.0}, "in [0, 1)"),
    ],
)
def test_a_setting_out_of_its_bounds_is_named_with_its_value(config, settings, bound):
    ((name, value),) = settings.items()
    with raises("method.value", name, bound, f"not {value:g}"):
        config(**settings)


def test_every_method_refuses_negative_numbers_by_name():
    for config, _ in METHODS.values():
        for field in dataclasses.fields(config):
            if isinstance(field.default, float):
                with raises("method.value", field.name):
                    config(**{field.name: -1.0})


def test_what_leaves_the_class_frequencies_in_the_logits():
    """By its classification loss; a new method has to say it too."""
    plain = {"cross_entropy", "focal", "dro_lt", "crt", "lws", "las"}  # the second stages: but for their sampler
    for name, (config, _) in METHODS.items():
        assert config().long_tailed == (name in plain), name
    for name, changes in {
        "moco": {"classification": "cross_entropy"}, "rsg": {"loss": "cross_entropy"}, "class_balanced": {"beta": 0.0},
        "ldam": {"reweight_from": 1.0}, "experts": {"beta": 0.0}, "elf": {"reweight_from": 1.0},
        "logit_adjustment": {"tau": 0.0}, "tau_norm": {"tau": 0.0}, "disalign": {"power": 0.0},
    }.items():  # fmt: skip
        assert METHODS[name][0](**changes).long_tailed, name


@pytest.mark.parametrize(
    ("classes", "per_class", "expected"), [(40, 4, 62), (100, 10, 396), (1000, 4, 500), (2, 4, 2), (3, 1, 1), (2, 1, 1)]
)
def test_qn_follows_from_k_and_q_where_it_is_not_said(classes: int, per_class: int, expected: int) -> None:
    config = RescomConfig(queue=QueueConfig(per_class=per_class))
    assert config.negatives == "auto" and config.for_classes(classes).negatives == expected
    for said in (None, 1):
        assert RescomConfig(negatives=said).for_classes(classes).negatives == said
    with raises("queue.mined", "queue.per_class"):
        RescomConfig(negatives=4 * classes).for_classes(classes)
