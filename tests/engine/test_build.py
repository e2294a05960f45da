"""From a recipe's settings to the objects that obey them: net, optimizer, schedule."""

import math

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from rescom_timm.config.loading import load_dict
from rescom_timm.config.recipe import OptimizerConfig, ScheduleConfig
from rescom_timm.data.config import ViewsConfig
from rescom_timm.engine import prepare
from rescom_timm.engine.build import build_net, build_optimizer, build_schedule, prefers_channels_last
from rescom_timm.models.net import NetConfig, create_model

STATES = (None, True, False)
"""Values of speed.channels_last."""


@pytest.fixture
def vit():
    return build_net(NetConfig("test_vit"), ViewsConfig(), 10)


def settings(optimizer, net):
    """Of every weight, by name: those of its group."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


def test_the_net_starts_from_the_weights_and_sees_through_the_views_of_its_recipe(tmp_path):
    weights = timm.create_model("test_resnet").state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    config = NetConfig("test_resnet", pretrained=True, weights_file=str(tmp_path / "weights.safetensors"))
    views = ViewsConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    for name, value in build_net(config, views, 10).encoder.state_dict().items():
        assert torch.equal(value, weights[name]), name
    net = build_net(config.untrained(), views, 10)
    assert not torch.equal(net.encoder.conv1[0].weight, weights["conv1.0.weight"])
    assert net.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert net.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_stay_where_they_are_frozen(frozen):
    net = build_net(NetConfig("resnet20_cifar", frozen_statistics=frozen), ViewsConfig(), 10).train()
    before = net.encoder.bn1.running_mean.clone()
    net(torch.rand(4, 3, 8, 8))
    assert torch.equal(net.encoder.bn1.running_mean, before) == frozen


def test_sgd_decays_every_weight_and_is_without_nesterov_unless_asked(vit):
    (group,) = build_optimizer(OptimizerConfig(), vit).param_groups
    assert len(group["params"]) == len(list(vit.parameters()))
    assert {key: group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False,
    }  # fmt: skip
    assert build_optimizer(OptimizerConfig(nesterov=True), vit).param_groups[0]["nesterov"]


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("everything", [True, False])
def test_norms_biases_and_what_timm_spares_are_decayed_only_where_asked(vit, everything, layer_decay):
    config = OptimizerConfig("adamw", weight_decay=0.1, decay_norm_and_bias=everything, layer_decay=layer_decay)
    found = settings(build_optimizer(config, vit), vit)
    assert vit.encoder.no_weight_decay() >= {"pos_embed", "cls_token"}
    for name, parameter in vit.named_parameters():
        spared = parameter.ndim == 1 or name.removeprefix("encoder.") in vit.encoder.no_weight_decay()
        assert found[name]["weight_decay"] == (0.1 if everything or not spared else 0), name


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_the_encoder_and_its_lower_layers_learn_slower_than_the_heads(vit, layer_decay):
    config = OptimizerConfig(lr=2.0, encoder_lr_scale=0.1, layer_decay=layer_decay)
    optimizer = build_optimizer(config, vit)
    build_schedule(ScheduleConfig("constant"), optimizer, config.lr, 10).step(0)
    found = settings(optimizer, vit)
    assert {group["lr"] for name, group in found.items() if not name.startswith("encoder.")} == {2.0}
    depth = len(vit.encoder.blocks)
    layers = ["patch_embed.proj.weight", *(f"blocks.{i}.attn.qkv.weight" for i in range(depth)), "norm.weight"]
    told = [found[f"encoder.{name}"]["lr"] for name in layers]
    above = [*range(depth, -1, -1), 0]  # the last norm is of the last block
    assert told == pytest.approx([0.2 * (layer_decay or 1) ** n for n in above])


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_cosine_falls_from_the_end_of_the_warm_up_to_the_end_of_training(vit, warmup):
    lr, final, epochs = 0.4, 0.01, 20
    optimizer = build_optimizer(OptimizerConfig(lr=lr), vit)
    schedule = build_schedule(ScheduleConfig("cosine", warmup, final=final), optimizer, lr, epochs)
    top = max(warmup - 1, 0)
    for epoch in range(epochs):
        schedule.step(epoch)
        cosine = (1 + math.cos(math.pi * (epoch - top) / (epochs - top))) / 2
        expected = lr * (epoch + 1) / warmup if epoch < warmup else lr * (final + (1 - final) * cosine)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), f"epoch {epoch}"


@pytest.mark.parametrize(
    ("config", "curve"),
    [
        (ScheduleConfig("cosine", 2, final=0.01, by="update"), lambda x: 0.01 + 0.99 * (1 + math.cos(math.pi * x)) / 2),
        (ScheduleConfig("steps", 2, milestones=(3, 4), by="update"), None),
        (ScheduleConfig("constant", 2, by="update"), lambda x: 1.0),
    ],
)
def test_by_updates_the_same_curve_moves_at_each_step(vit, config, curve):
    """5 epochs of 7 steps; warm-up ends with the last step of its epochs."""
    lr, epochs, updates = 0.4, 5, 7
    optimizer = build_optimizer(OptimizerConfig(lr=lr), vit)
    schedule = build_schedule(config, optimizer, lr, epochs, updates)
    top = 2 * updates - 1
    for step in range(epochs * updates):
        schedule.step(step // updates)  # does nothing
        schedule.step_update(step)
        steps = 0.1 ** sum(step >= milestone * updates for milestone in (3, 4))
        after = curve((step - top) / (epochs * updates - top)) if curve else steps
        expected = lr * min((step + 1) / (2 * updates), after if step > top else 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), f"step {step}"


def test_by_epochs_updates_change_nothing(vit):
    optimizer = build_optimizer(OptimizerConfig(lr=0.4), vit)
    schedule = build_schedule(ScheduleConfig("cosine"), optimizer, 0.4, 5, 7)
    schedule.step(3)
    before = optimizer.param_groups[0]["lr"]
    schedule.step_update(34)
    assert optimizer.param_groups[0]["lr"] == before < 0.2


@pytest.mark.parametrize(
    ("name", "convolves"),
    [("resnet8_cifar", True), ("test_convnext", True), ("test_efficientnet", True), ("test_vit", False)],
)
def test_channels_last_is_for_convolutions_on_a_cpu_and_in_mixed_precision(name, convolves):
    net = create_model(name, 3, projector=None)
    for device, precision, fast in [("cpu", "no", True), ("cuda", "bf16", True), ("cuda", "no", False)]:
        assert prefers_channels_last(net, torch.device(device), precision) == (fast and convolves)


def test_memory_format_is_settled_once_for_a_run(monkeypatch):
    """null: as in the run that is resumed, which is contiguous if its recipe does not say; else as the recipe says."""

    def settled(recipe, resume=False):
        return prepare.with_memory_format(recipe, net, Accelerator(cpu=True), resume).speed.channels_last

    net = create_model("resnet8_cifar", 3, projector=None)
    recipes = {said: load_dict({"data": {"source": "digits"}, "speed": {"channels_last": said}}) for said in STATES}
    assert [settled(recipes[said]) for said in STATES] == [True, True, False]
    for said in STATES:
        monkeypatch.setattr(prepare, "resumed", lambda recipe, resume, run=recipes[said]: run if resume else None)
        assert settled(recipes[None], resume=True) is bool(said)
        assert settled(recipes[True], resume=True) is True
