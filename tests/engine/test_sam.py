"""Sharpness-aware steps: against loops written from the equation, in every way that a step is made."""

import copy
import itertools
import math
import shutil
import signal

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn

from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import load_dict
from rescom_timm.engine.launch import refuse_what_cannot_be_sharded
from rescom_timm.engine.sam import SamStep, climb
from tests.engine.child import Launch, differences, last, recipe, run, trainer_of
from tests.engine.test_trainer import way
from tests.raises import raises

PLAIN = {"train__epochs": 1, "schedule__warmup_epochs": 0, "net__options": {"drop": 0.0}}
KILL, TERM = signal.SIGKILL, signal.SIGTERM


def weights(values, gradients):
    made = [nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in values]
    for weight, gradient in zip(made, gradients, strict=True):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
    return made


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_the_climb_is_the_equation_whatever_the_scale_of_the_loss(scale):
    values, gradients = [[3.0, -1.0], [0.0]], [[2.0, -1.0], [2.0]]  # |g| = 3
    made = weights(values, [[scale * g for g in row] for row in gradients])
    climb(made, torch.tensor(0.6))
    assert made[0].tolist() == pytest.approx([3.4, -1.2]) and made[1].tolist() == pytest.approx([0.4])

    made = weights(values, [[scale * g for g in row] for row in gradients])
    climb(made, torch.tensor(0.6), adaptive=True)
    sizes, flat = [3.01, 1.01, 0.01], [2.0, -1.0, 2.0]
    norm = math.sqrt(sum((t * g) ** 2 for t, g in zip(sizes, flat, strict=True)))
    e = [0.6 * t * t * g / norm for t, g in zip(sizes, flat, strict=True)]
    assert made[0].tolist() == pytest.approx([3 + e[0], -1 + e[1]]) and made[1].tolist() == pytest.approx([e[2]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    made = weights([[3.0, -1.0], [0.5]], [[bad, 1.0], [1.0]])
    climb(made, torch.tensor(0.6))
    assert made[0].tolist() == [3.0, -1.0] and made[1].tolist() == [0.5]


def naive(net, optimizer, passes, rho, adaptive, clip):
    """A step of SAM over a net and its passes, each a list of (images, labels, counts); returns nothing."""

    def gradients():
        net.zero_grad()
        for images, labels, counts in passes:
            logits = net(images.flatten(0, 1)).logits + counts.to(torch.float64).log()
            (nn.functional.cross_entropy(logits, labels) / len(passes)).backward()
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    g = gradients()
    sizes = {name: p.detach().abs() + 0.01 if adaptive else 1.0 for name, p in net.named_parameters()}
    norm = sum(((sizes[name] * value) ** 2).sum() for name, value in g.items()).sqrt()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for name, p in net.named_parameters():
            p += rho * sizes[name] ** 2 * g[name] / norm
    gradients()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(before[name])
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "sam", "accumulate", "clip"),
    [
        ("sgd", {"rho": 0.5}, 1, None),
        ("adamw", {"rho": 2.0, "adaptive": True}, 2, None),
        ("sgd", {"rho": 0.0625, "rho_late": 1.0}, 2, 0.1),
    ],
)
def test_steps_are_those_of_a_naive_loop(alone, tmp_path, optimizer, sam, accumulate, clip):
    options = {"drop": 0.0, "norm": optimizer == "sgd"}  # before BatchNorm a bias has a gradient of rounding alone
    tree = recipe(
        tmp_path, train__epochs=5, method={"name": "balanced_softmax"}, train__accumulate=accumulate,
        net__options=options, optimizer={"name": optimizer, "lr": 0.05, "sam": sam, "clip_norm": clip},
    )  # fmt: skip
    trainer = trainer_of(tree)
    trainer.method.double()
    net = copy.deepcopy(trainer.net)
    named = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    own = named(net.parameters(), 0.05, weight_decay=5e-4, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.05
    batches = iter(trainer.completed(trainer.loader))
    for epoch in (0, 3, 4):  # the last of five is late
        trainer.step.start_epoch(epoch)
        net.train()
        passes = []
        for number in range(1, accumulate + 1):
            batch = next(batches)
            passes.append((batch["image"], batch["label"], trainer.method.counts))
            trainer.step(batch, last=number == accumulate)
        assert trainer.step.finish(finite=True)
        rho = sam.get("rho_late", sam["rho"]) if epoch == 4 else sam["rho"]
        naive(net, own, passes, rho, sam.get("adaptive", False), clip)
    for (name, ours), theirs in zip(trainer.net.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_enters_the_queue_once_and_moves_batchnorm_once(alone, tmp_path, accumulate):
    """Buffers after a step of SAM are those after a plain step, bit for bit; the pass that is logged is the first."""
    told = []
    for sam in (None, {"rho": 0.5}):
        trainer = trainer_of(recipe(tmp_path, **PLAIN, train__accumulate=accumulate, optimizer={"lr": 0.1, "sam": sam}))
        trainer.step.start_epoch(0)
        batches = itertools.islice(trainer.completed(trainer.loader), accumulate)
        losses = [trainer.step(batch, last=n == accumulate)["loss"] for n, batch in enumerate(batches, start=1)]
        trainer.step.finish(finite=True)
        told.append((losses, dict(trainer.method.named_buffers()), trainer.net.classifier.weight.detach()))
    (plain, buffers, one), (sharp, its, other) = told
    assert differences(plain, sharp) == [] and differences(buffers, its) == []
    assert trainer.method.queue.valid.any() and not torch.equal(one, other)


def test_rho_of_zero_is_the_plain_step(alone, tmp_path):
    nets = []
    for sam in (None, {"rho": 0.0}):
        tree = recipe(tmp_path / str(sam is None), **PLAIN, optimizer={"lr": 0.1, "sam": sam})
        train(load_dict(tree))
        nets.append(last(tree)[0])
    assert differences(*nets) == []


@pytest.mark.parametrize("scale", [1024.0, 2.0**127])
def test_with_a_scaled_loss(alone, tmp_path, scale):
    """The scaler that fp16 has: the same step at another scale, and a step that overflows is skipped whole."""
    told = []
    for one in (1.0, scale):
        trainer = trainer_of(recipe(tmp_path, **PLAIN, optimizer={"lr": 0.1, "sam": {"rho": 0.5}, "clip_norm": 1.0}))
        scaler = torch.amp.GradScaler("cpu", init_scale=one)
        trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
        trainer.accelerator.state._mixed_precision = "fp16"  # the net is wrapped already, and stays in float32
        made = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
        trainer.step.optimizer, trainer.accelerator._optimizers = made, [made]
        before = trainer.net.classifier.weight.detach().clone()
        trainer.step.start_epoch(0)
        trainer.step(next(iter(trainer.completed(trainer.loader))), last=True)
        trainer.step.finish(finite=True)
        told.append((trainer.net.classifier.weight.detach(), scaler.get_scale()))
    if scale == 1024:
        torch.testing.assert_close(told[0][0], told[1][0], rtol=1e-5, atol=1e-7)
        assert not torch.equal(told[0][0], before)
    else:
        assert torch.equal(told[1][0], before) and told[1][1] == scale / 2


def test_a_captured_run_is_the_plain_one_and_resumes_with_its_bits(alone, tmp_path):
    changes = {"optimizer": {"lr": 0.1, "sam": {"rho": 0.1, "rho_late": 0.3}}, "net__options": {"drop": 0.0}}
    changes |= {"train__epochs": 2, "evaluation__every": 2, "data__validation": "none"}
    plain, whole, cut = (
        recipe(tmp_path / name, **changes, speed__capture=name != "plain") for name in ("plain", "whole", "cut")
    )
    for tree in (plain, whole, cut):
        train(load_dict(tree))
    for newer in sorted((tmp_path / "cut/run/checkpoints").iterdir())[1:]:
        shutil.rmtree(newer)
    train(load_dict(cut), resume=True)
    assert differences(last(whole), last(cut)) == []
    first = last(plain)[0], last(whole)[0]
    torch.testing.assert_close(*first, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_stopped_in_an_epoch_and_resumed_it_is_the_whole_run_in_two_processes(tmp_path):
    """Averaged weights, a queue, dropout and BatchNorm of each process; both passes average their gradients."""
    changes = {
        "optimizer": {"lr": 0.05, "sam": {"rho": 0.2, "rho_late": 0.4}, "clip_norm": 1.0}, "train__accumulate": 2,
        "train__epochs": 2, "train__ema": {"decay": 0.9}, "train__nonfinite": "skip",
    }  # fmt: skip
    whole, cut = (recipe(tmp_path / name, **changes) for name in ("whole", "cut"))
    run(whole, 2)
    assert Launch(cut, 2, fault=("signal_at_pass", TERM, 21, 1)).wait() == [143, 143]
    assert -9 in Launch(cut, 2, resume=True, fault=("signal_at_pass", KILL, 13)).wait()
    run(cut, 2, resume=True)
    assert differences(last(whole), last(cut)) == []


@pytest.mark.slow
def test_one_process_and_two_are_the_same(tmp_path):
    """Where no layer sees the other images."""
    changes = {"optimizer": {"lr": 0.05, "sam": {"rho": 0.5}}, "method": {"name": "balanced_softmax"}}
    options = PLAIN | {"net__options": {"drop": 0.0, "norm": False}}
    one, two = (recipe(tmp_path / str(n), **changes, **options) for n in (1, 2))
    run(one, 1)
    run(two, 2)
    torch.testing.assert_close(last(one)[0], last(two)[0], rtol=1e-4, atol=1e-6)


def test_what_does_not_go_with_it_is_refused(alone, tmp_path):
    made = load_dict(recipe(tmp_path, optimizer={"lr": 0.1, "sam": {}}))
    assert made.optimizer.sam.rho == 0.1 and isinstance(trainer_of(made.to_dict()).step, SamStep)
    inside = nn.Module()
    inside.fits_head = False
    inside.net = nn.Linear(1, 1)
    with raises("train.distributed", "optimizer.sam"):
        refuse_what_cannot_be_sharded(way(DistributedType.FSDP, True), made, inside)
    for code, changes, key in (
        ("recipe.value", {"optimizer__sam": {"rho": -1}}, "rho"),
        ("recipe.value", {"optimizer__sam": {"rho_late": -1}}, "rho_late"),
        ("recipe.conflict", {"optimizer__sam": {}, "speed__compile": "max-autotune"}, "speed.compile"),
    ):
        with raises(code, key):
            load_dict(recipe(tmp_path, **changes))
