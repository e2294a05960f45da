from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

from rescom_timm.config.loading import load
from rescom_timm.models.net import Net, NetConfig, ProjectorConfig, check_weights, create_model
from tests.raises import raises


class Tiny(nn.Module):
    """A stub encoder of a few weights."""

    head_hidden_size = 6
    pretrained_cfg: ClassVar = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 6)

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("depth", "weights"), [(8, 74_640), (20, 269_072), (32, 463_504), (44, 657_936), (56, 852_368)]
)
def test_cifar_resnets_are_in_timms_registry_with_the_literatures_size(depth, weights):
    encoder = timm.create_model(f"resnet{depth}_cifar", num_classes=0)
    assert sum(p.numel() for p in encoder.parameters()) == weights
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    stages = encoder.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(stage.shape[1:]) for stage in stages[1:4]] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth - 1 and all(m.kernel_size == (3, 3) for m in convolutions)


def test_zero_padding_shortcut_halves_the_map_and_doubles_the_channels():
    encoder = timm.create_model("resnet20_cifar", num_classes=0)
    x = torch.arange(16.0 * 4 * 4).view(1, 16, 4, 4)
    y = encoder.layer2[0].downsample(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_images_are_normalised_as_the_backbones_weights_want_them_unless_told_otherwise():
    net = create_model("resnet20_cifar", 4)
    assert torch.equal(net.mean.flatten(), torch.tensor([0.4914, 0.4822, 0.4465]))
    assert torch.equal(net.std.flatten(), torch.tensor([0.2023, 0.1994, 0.2010]))
    net = create_model("resnet20_cifar", 4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert torch.equal(net.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(net.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_one_forward_gives_features_logits_and_unit_embeddings():
    net = Net(Tiny(), 5, ProjectorConfig(hidden=7, dim=4))
    calls = []
    net.encoder.register_forward_hook(lambda *_: calls.append(1))
    features, logits, embeddings = net(torch.randn(3, 3, 8, 8))
    assert (features.shape, logits.shape, embeddings.shape) == ((3, 6), (3, 5), (3, 4))
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3), atol=1e-6)
    assert len(calls) == 1
    assert torch.equal(logits, net.classifier(features))


def test_eight_bit_images_are_normalised_and_floats_taken_as_they_are():
    net = Net(Tiny(), 5, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0)).eval()
    eight_bit = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25, 0.0]).view(1, 3, 1, 1), torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
    normalised = (eight_bit.double() / 255 - mean) / std
    assert torch.allclose(net.normalize(eight_bit), normalised.float(), atol=1e-6)
    assert torch.allclose(net.classify(eight_bit), net.classify(normalised.float()), atol=1e-5)
    assert torch.allclose(net.classify(eight_bit), net(eight_bit).logits)
    with torch.autocast("cpu", torch.bfloat16):  # the classifier of an evaluation keeps its digits
        features, logits = net(eight_bit)[:2], net.classify(eight_bit)
    assert features[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, net.classifier(features[0].float()))


def test_embeddings_of_a_half_precision_projector_are_float32():
    net = Net(Tiny(), 5).bfloat16().eval()
    outputs = net(torch.randn(3, 3, 8, 8).bfloat16())
    assert outputs.logits.dtype == torch.bfloat16 and outputs.embeddings.dtype == torch.float32


@pytest.mark.parametrize("name", ["resnet20_cifar", "mobilenetv3_small_050", "test_vit", "test_convnext"])
def test_exported_model_is_plain_timm_with_the_same_logits(name):
    net = create_model(name, 7)
    with torch.no_grad():
        for buffer in net.encoder.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    model = net.to_timm()
    images = torch.rand(2, *model.pretrained_cfg["input_size"])
    assert torch.allclose(model(images), net.eval().classify(images), rtol=1e-4, atol=1e-4)
    assert type(model).__module__.startswith(("timm.", "rescom_timm.models.cifar_resnet"))


def test_a_backbone_whose_own_head_differs_is_refused_at_export():
    with raises("net.export", "volo_d1_224"):
        create_model("volo_d1_224", 3).to_timm()
    with raises("net.export", "create_model"):
        Net(Tiny(), 3).to_timm()


def test_bad_names_and_sizes_are_refused_with_a_hint():
    with raises("net.backbone", "resnet23_cifar", "resnet32_cifar"):
        create_model("resnet23_cifar", 10)
    with raises("net.backbone", "net:", "resnet5000"):
        load("digits_lt", ["net.backbone=resnet5000"])
    with raises("recipe.value", "net.projector"):
        ProjectorConfig(dim=0)
    with raises("recipe.conflict", "weights_file", "pretrained"):
        NetConfig(weights_file="x.safetensors")


def test_local_weights_file_starts_the_encoder(tmp_path):
    from safetensors.torch import save_file

    source = timm.create_model("resnet20_cifar", num_classes=10)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    net = create_model("resnet20_cifar", 4, pretrained=True, weights_file=str(tmp_path / "w.safetensors"))
    assert torch.equal(net.encoder.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet18", {"drop_path_rate": 0.1, "global_pool": "max"}),
        ("vit_tiny_patch16_224", {"img_size": 32, "drop_path_rate": 0.1, "class_token": True}),
        ("convnext_atto", {"drop_path_rate": 0.1}),
        ("efficientnet_b0", {"drop_rate": 0.1, "drop_path_rate": 0.1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}),
        ("resnet20_cifar", {"drop_rate": 0.1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_of_the_backbones_class_are_passed_on(backbone, options):
    assert create_model(backbone, 3, **options).recreate == {"model_name": backbone, **options}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"drop_path_rat": 0.1}, ("resnet18", "'drop_path_rat'", "drop_path_rate?")),
        ({"nonsense": 1}, ("nonsense", "aa_layer, act_layer", "zero_init_last")),
        ({"checkpoint_path": "x"}, ["checkpoint_path"]),
        ({"pretrained_cfg": {"file": "x"}}, ["pretrained_cfg"]),
        ({"cache_dir": "x"}, ["cache_dir"]),
    ],
)
def test_other_arguments_of_timm_are_no_options(options, expected):
    with raises("net.options", *expected):
        create_model("resnet18", 3, **options)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("classifier.bias", torch.full((3,), torch.nan), "classifier.bias is not finite"),
        ("classifier.bias", torch.zeros(3, dtype=torch.int64), "classifier.bias holds int64"),
        ("classifier.bias", torch.zeros(4), "classifier.bias is (4,), not (3,)"),
        ("classifier.bias", None, "classifier.bias is missing"),
        ("other", torch.zeros(1), "other is not known"),
    ],
)
def test_weights_are_checked_by_name_shape_kind_and_value(name, value, expected):
    own = create_model("resnet20_cifar", 3).state_dict()
    check_weights(
        {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in own.items()}, own, ""
    )
    changed = {key: tensor for key, tensor in {**own, name: value}.items() if tensor is not None}
    with raises("net.mismatch", "the file", expected):
        check_weights(changed, own, "the file")
