"""LoRA, AdaptFormer and the classifiers that go with them."""

import copy

import pytest
import timm
import torch
from torch import nn

from rescom_timm.models.classifiers import ClassifierConfig, Cosine, start_from_means
from rescom_timm.models.net import ProjectorConfig, create_model
from rescom_timm.models.trainable import digest
from rescom_timm.models.tuning import Adapter, TuningConfig, added, default_rank, tune, untuned
from tests.raises import raises

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = ProjectorConfig(hidden=8, dim=4)


def encoder(name: str = "test_vit", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options)


def moved(net: nn.Module) -> None:
    """Give what was added numbers that change the outputs."""
    with torch.no_grad():
        for weight in added(net):
            weight.add_(0.3 * torch.randn_like(weight))


@pytest.mark.parametrize("kind", ["lora", "adaptformer"])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "swin_tiny_patch4_window7_224.ms_in1k"])
def test_nothing_changes_at_first_and_only_what_was_added_trains(name: str, kind: str) -> None:
    options = (
        {"img_size": 64, "window_size": 2, "depths": (1, 1), "embed_dim": 24} if "swin" in name else {"img_size": 64}
    )
    net = encoder(name, **options)
    before, images = {key: value.clone() for key, value in net.state_dict().items()}, IMAGES
    expected = net.eval()(images)
    tune(net, TuningConfig(kind, rank=2), 10)
    assert torch.allclose(net.eval()(images), expected, atol=1e-5)
    own = {id(weight) for weight in added(net)}
    assert own and own == {id(weight) for weight in net.parameters() if weight.requires_grad}
    moved(net)
    assert not torch.equal(net(images), expected), "what was added has a say"
    net.zero_grad()
    net(images).square().sum().backward()
    assert all((weight.grad is not None) == (id(weight) in own) for weight in net.parameters())
    frozen = [weight for weight in net.parameters() if id(weight) not in own]
    kept = sorted(
        (tuple(value.shape), float(value.double().sum())) for value in before.values() if value.is_floating_point()
    )
    found = sorted((tuple(value.shape), float(value.double().sum())) for value in frozen)
    assert [one for one in kept if one in found] == found, "not a bit of the backbone has changed"


def test_an_adapter_is_what_the_paper_says() -> None:
    """s * up(relu(down(LayerNorm(x)))) beside the MLP, from the input of the block's second norm."""
    net = encoder(img_size=64)
    plain = copy.deepcopy(net)
    tune(net, TuningConfig("adaptformer", rank=3), 10)
    moved(net)
    x = torch.randn(2, 5, net.num_features)
    block, own = net.blocks[0], plain.blocks[0]
    part: Adapter = block.mlp.adapter
    y = x + own.attn(own.norm1(x))
    norm = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    norm = norm * part.norm.weight + part.norm.bias
    beside = (norm @ part.down.weight.T + part.down.bias).clamp(min=0) @ part.up.weight.T + part.up.bias
    expected = y + own.mlp(own.norm2(y)) + part.scale * beside
    assert torch.allclose(block.eval()(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("classes", "blocks", "rank"),
    [(100, 12, 4), (365, 12, 8), (1000, 12, 32), (8142, 12, 256), (10, 12, 1), (1000, 24, 16)],
)
def test_the_default_rank_is_lifts(classes: int, blocks: int, rank: int) -> None:
    assert default_rank(classes, blocks) == rank


@pytest.mark.parametrize("layers", [(), ("blocks.*.attn.qkv",)])
def test_lora_is_merged_into_plain_timm_with_equal_logits(layers: tuple[str, ...]) -> None:
    net = create_model("test_vit", 7, projector=SMALL, tuning=TuningConfig("lora", 2, layers), img_size=64).eval()
    assert net.tuning == TuningConfig("lora", 2, layers)
    moved(net.encoder)
    logits = net.classify(IMAGES)
    model = net.to_timm()
    assert type(model) is timm.models.VisionTransformer
    assert model.state_dict().keys() == timm.create_model("test_vit", num_classes=7, img_size=64).state_dict().keys()
    assert torch.allclose(model(IMAGES), logits, atol=1e-5)
    assert torch.equal(net.classify(IMAGES), logits), "the net itself is left as it was"
    wanted = 2 * sum("attn.qkv" in key for key in model.state_dict() if key.endswith("weight")) if layers else None
    assert wanted is None or len(list(added(net.encoder))) == wanted


def test_lora_of_a_convolutional_net_by_pattern() -> None:
    net = create_model("resnet18", 5, projector=SMALL, tuning=TuningConfig("lora", 2, ("layer4.*.conv2",))).eval()
    assert len(list(added(net.encoder))) == 4
    moved(net.encoder)
    assert torch.allclose(net.to_timm()(IMAGES), net.classify(IMAGES), atol=1e-4)


def test_adapters_are_refused_as_plain_timm() -> None:
    net = create_model("test_vit", 7, projector=SMALL, tuning=TuningConfig("adaptformer", 2))
    with raises("net.export"):
        net.to_timm()
    with raises("net.export"):
        untuned(net.encoder)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "class_token": False}], ids=str)
def test_prompts_are_vpts(options: dict, deep: bool) -> None:
    """Block by block: prompts behind the prefix, thrown away and replaced in each block (deep) or kept (shallow)."""
    net = encoder("test_vit", img_size=64, **options).eval()
    plain = copy.deepcopy(net)
    tune(net, TuningConfig("prompt", tokens=3, deep=deep), 10)
    given = list(added(net))
    assert len(given) == (len(net.blocks) if deep else 1) and all(one.shape == (3, 64) for one in given)
    assert max(float(one.detach().abs().max()) for one in given) <= (6 / (3 * 16 * 16 + 64)) ** 0.5
    moved(net)
    prefix = plain.num_prefix_tokens
    assert prefix == (0 if options else 1)
    x = plain.norm_pre(plain._pos_embed(plain.patch_embed(IMAGES)))
    p = None
    for i, block in enumerate(plain.blocks):
        p = given[i].expand(2, -1, -1) if deep or i == 0 else p
        y = block(torch.cat([x[:, :prefix], p, x[:, prefix:]], dim=1))
        x, p = torch.cat([y[:, :prefix], y[:, prefix + 3 :]], dim=1), y[:, prefix : prefix + 3]
    expected = plain.forward_head(plain.norm(x), pre_logits=True)
    assert torch.allclose(net(IMAGES), expected, atol=1e-5)
    net(IMAGES).square().sum().backward()
    assert all((one.grad is not None) == one.requires_grad for one in net.parameters())
    assert {id(one) for one in net.parameters() if one.requires_grad} == {id(one) for one in given}
    with raises("net.export"):
        untuned(net)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_cosine_classifier_in_plain_timm_ranks_the_same(kind: str) -> None:
    tuning = TuningConfig(kind, **({"rank": 2} if kind == "lora" else {}))
    net = create_model(
        "test_vit", 7, projector=SMALL, tuning=tuning, head=ClassifierConfig("cosine"), img_size=64
    ).eval()
    moved(net.encoder)
    images = torch.rand(30, 3, 64, 64)
    with torch.no_grad():
        own, features = net.classify(images), net(images).features
        plain = net.to_timm()(images)
    assert torch.equal(plain.argsort(dim=1), own.argsort(dim=1))
    factor = plain / own
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-3)
    ratio = features.norm(dim=1) / features.norm(dim=1).mean()
    assert torch.allclose(factor[:, 0] / factor[:, 0].mean(), ratio, rtol=1e-3)
    assert factor.min() > 0.8 and factor.max() < 1.25, "the norms of a ViT's features are nearly equal"


@pytest.mark.parametrize(
    ("backbone", "config", "code", "named"),
    [
        ("resnet18", TuningConfig("prompt"), "net.unsupported", "ResNet"),
        ("resnet18", TuningConfig("adaptformer"), "net.unsupported", "adaptformer"),
        ("resnet18", TuningConfig("lora"), "net.unsupported", "tuning.layers"),
        ("resnet18", TuningConfig("lora", layers=("layr4.*",)), "net.tuning", "layr4.*"),
        ("test_vit", TuningConfig("lora", 200), "net.tuning", "blocks.0.attn.qkv"),
        ("test_vit", TuningConfig("adaptformer", 200), "net.tuning", "64"),
        ("swinv2_tiny_window8_256", TuningConfig("adaptformer", 2), "net.unsupported", "lora"),
    ],
)
def test_what_cannot_be_tuned_so_is_refused(backbone: str, config: TuningConfig, code: str, named: str) -> None:
    with raises(code, named):
        tune(encoder(backbone), config, 10)


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("value", {"rank": 0}), ("value", {"rank": 5000}), ("value", {"name": "prompt", "tokens": 0}),
        ("conflict", {"name": "adaptformer", "layers": ("a",)}), ("conflict", {"name": "prompt", "rank": 2}),
        ("conflict", {"name": "lora", "tokens": 5}), ("conflict", {"deep": False}),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(code: str, settings: dict) -> None:
    with raises(f"recipe.{code}", *settings.keys() - {"name"}):
        TuningConfig(**settings)


def test_a_cosine_classifier_and_its_start_from_class_means() -> None:
    net = create_model("test_vit", 3, projector=SMALL, head=ClassifierConfig("cosine", 20.0)).eval()
    assert type(net.classifier) is Cosine and net.classifier.bias is None
    features, logits, _ = (value.detach() for value in net(IMAGES))
    for n in range(2):
        for k in range(3):
            w, x = net.classifier.weight[k].detach(), features[n]
            assert logits[n, k].item() == pytest.approx(20 * float(w @ x / w.norm() / x.norm()), abs=1e-4)
    sums = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    head = nn.Linear(2, 3)
    kept = head.weight[1].clone()
    start_from_means(head, sums)
    assert head.weight[0].tolist() == pytest.approx([0.6, 0.8]) and head.weight[2].tolist() == [0.0, -1.0]
    assert torch.equal(head.weight[1], kept) and head.bias.tolist() == [0.0, 0.0, 0.0]
    with raises("recipe.value", "scale"):
        ClassifierConfig(scale=0.0)


def test_a_digest_sees_names_types_shapes_and_numbers() -> None:
    base = {"a": torch.arange(6.0), "b": torch.ones(2)}
    others = [
        {"b": base["b"], "c": base["a"]}, {**base, "a": base["a"].view(2, 3)}, {**base, "a": base["a"].double()},
        {**base, "a": base["a"] + 1e-6},
    ]  # fmt: skip
    assert digest(dict(reversed(base.items()))) == digest(base)
    assert len({digest(base), *map(digest, others)}) == 5
