"""RSG against loops over one image, centre and pixel at a time; where it stands in a backbone; in runs."""

import pytest
import timm
import torch
import torch.nn.functional as F

from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.methods import RsgConfig, create_method
from rescom_timm.methods.rsg import Generator, last_stage
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.marks import slow
from tests.methods import reference
from tests.methods.stub import COUNTS, make
from tests.methods.test_distillation import resumed_as_whole, run
from tests.raises import raises
from tests.recipes import load_recipe

HEAD = torch.tensor([True, True, False, False])


def generator(**settings):
    torch.manual_seed(0)
    made = Generator(3, HEAD, RsgConfig(centers=2, pair_width=4, **settings)).double()
    with torch.no_grad():
        made.centers.normal_()
    return made


def maps_of(number):
    return torch.randn(number, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assigned(made, x, y):
    """gamma of one map: a list of its class's centres."""
    pooled = [x[c].mean() for c in range(3)]
    scores = [sum(pooled[c] * made.assign_weight[y, c, j] for c in range(3)) + made.assign_bias[y, j] for j in (0, 1)]
    return reference.softmax(scores)


def spread(made, x, y):
    """sum over centres of gamma |x - centre|^2."""
    squares = [sum((x[:, i, k] - made.centers[y, j]).square().sum() for i in (0, 1) for k in (0, 1)) for j in (0, 1)]
    return sum(g * s for g, s in zip(assigned(made, x, y), squares, strict=True))


def nearest(made, x, y):
    gamma = assigned(made, x, y)
    return made.centers[y, 0 if gamma[0] > gamma[1] else 1].detach()[:, None, None]


def same(made, one, other):
    """log-probabilities of the pair classifier: no, yes."""
    hidden = F.conv2d(torch.cat((one, other))[None], made.pair.mix.weight, made.pair.mix.bias).relu()
    hidden = F.conv2d(hidden, made.pair.look.weight, made.pair.look.bias, padding=1)[0]
    pooled = torch.stack([hidden[w].mean() for w in range(4)])
    return [torch.log(p) for p in reference.softmax(made.pair.decide.weight @ pooled + made.pair.decide.bias)]


def agree(made, mine, theirs, names):
    weights = [weight for name, weight in made.named_parameters() if name.startswith(names)]
    assert torch.allclose(mine, theirs, rtol=1e-10)
    gradients = (torch.autograd.grad(loss, weights) for loss in (mine, theirs))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_before_it_generates_centres_and_pair_classifier_learn():
    made, maps, labels = generator(), maps_of(6), torch.tensor([0, 1, 2, 0, 3, 2])
    found = made(maps, labels, False)
    y = labels.tolist()
    expected = reference.mean([spread(made, x, c) for x, c in zip(maps, y, strict=True)])
    expected = expected + reference.mean([-same(made, maps[i], maps[3 + i])[int(y[i] == y[3 + i])] for i in range(3)])
    agree(made, found.center_loss, expected, ("centers", "assign", "pair"))
    assert found.vector_loss == 0 and torch.equal(found.maps, maps) and torch.equal(found.labels, labels)


@pytest.mark.parametrize(
    ("labels", "strength", "heads", "tails"),
    [
        ([0, 2, 1, 0, 3, 1, 0], 1.0, [0, 2, 3, 5], [1, 4, 1, 4]),  # 5 head, 2 tail: two runs of two
        ([0, 2, 1, 0, 3, 1, 0], 0.5, [0, 2], [1, 4]),
        ([2, 3, 1, 0, 3, 2, 2], 1.0, [2, 3, 2, 3], [0, 1, 4, 5]),  # 2 head, 5 tail
        ([2, 3, 1, 0, 3, 2, 2], 0.1, [2, 3], [0, 1]),
    ],
)
def test_tail_maps_get_the_variation_of_head_maps(labels, strength, heads, tails):
    made, maps = generator(strength=strength), maps_of(7)
    found = made(maps, torch.tensor(labels), True)
    terms, new = [], []
    for h, t in zip(heads, tails, strict=True):
        variation = maps[h] - nearest(made, maps[h], labels[h])
        moved = F.conv2d(variation[None], made.transform.weight, made.transform.bias, padding=1)[0]
        own = maps[t] - nearest(made, maps[t], labels[t])
        term = -same(made, maps[h], moved)[0]
        for i in (0, 1):
            for k in (0, 1):
                cosine = moved[:, i, k] @ own[:, i, k] / (moved[:, i, k].norm() * own[:, i, k].norm())
                term = term + (moved[:, i, k].norm() - variation[:, i, k].norm()).abs() + (cosine - 1).abs()
        terms.append(term)
        new.append(maps[t] + moved)
    agree(made, found.vector_loss, reference.mean(terms), ("transform",))
    agree(
        made, found.center_loss, reference.mean([spread(made, x, c) for x, c in zip(maps, labels, strict=True)]),
        ("centers", "assign"),
    )  # fmt: skip
    assert torch.allclose(found.maps, torch.cat((maps, torch.stack(new))))
    assert found.labels.tolist() == labels + [labels[t] for t in tails]
    again = made(maps, torch.tensor(labels), True)
    (again.center_loss + again.vector_loss).backward()
    assert all(not weight.grad.any() for weight in made.pair.parameters()), "frozen once images are made"


@pytest.mark.parametrize("labels", [[0, 1, 1], [2, 3, 3]])
def test_a_batch_of_one_group_is_left_as_it_is(labels):
    made, maps = generator(), maps_of(3)
    found = made(maps, torch.tensor(labels), True)
    assert torch.equal(found.maps, maps) and found.vector_loss == 0
    found.center_loss.backward()
    assert all(weight.grad is not None for weight in made.parameters()), "processes wait for every gradient"


def make_rsg(**settings):
    torch.manual_seed(0)
    net = create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=4, dim=3))
    return create_method(net, COUNTS, RsgConfig(centers=2, pair_width=4, head_classes=0.5, **settings))


def data():
    images = torch.randint(0, 256, (6, 1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": images, "label": torch.tensor([0, 1, 2, 0, 3, 1])}


@pytest.mark.parametrize(("epoch", "made"), [(3, False), (4, True)])
@pytest.mark.parametrize("kind", ["ldam", "cross_entropy"])
def test_loss_is_that_of_all_rows_with_both_of_the_generator(epoch, made, kind):
    method = make_rsg(loss=kind, center_weight=0.3, vector_weight=0.2, generate_from=0.8, reweight_from=1.0).double()
    method.set_epoch(epoch, 5)
    method.net.eval()  # BatchNorm's batch statistics would move between the passes
    outputs = method(data())
    (_, logits, _), found = method.net(data()["image"][:, 0], data()["label"], made)
    assert outputs["logits"].shape == (6, 4) and len(logits) == (10 if made else 6)
    labels = found.labels.tolist()
    expected = (
        reference.ldam(logits / 30, labels, COUNTS, 0.5, 30.0)
        if kind == "ldam"
        else reference.cross_entropy(logits, labels)
    )
    expected = expected + 0.3 * found.center_loss + 0.2 * found.vector_loss
    assert torch.allclose(outputs["loss"], expected, rtol=1e-9)
    outputs["loss"].backward()
    assert method.net.encoder.conv1.weight.grad.any()
    assert method.net.generator.transform.weight.grad.any() == made
    assert method.net.generator.head.tolist() == [True, True, False, False]


def test_nothing_of_it_is_left_in_evaluation_and_export():
    method = make_rsg(loss="cross_entropy").eval()
    images = torch.rand(3, 3, 32, 32)
    plain = method.net.classifier(method.net.encoder(images))
    assert torch.equal(method.net(images).logits, plain) and torch.equal(method.net.classify(images), plain)
    assert torch.allclose(method.net.to_timm()(images), plain, atol=1e-5)
    method(data())
    assert not method.net.encoder.layer3._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet20_cifar", ("layer3", 32)), ("test_convnext", ("stages.3", 48)), ("test_efficientnet", ("blocks.4", 48))],
)
def test_it_stands_before_the_last_stage(name, expected):
    assert last_stage(timm.create_model(name, num_classes=0)) == expected


def test_a_backbone_without_stages_of_maps_is_refused():
    with raises("net.unsupported", "rsg"):
        last_stage(timm.create_model("test_vit", num_classes=0))
    other = timm.create_model("test_resnet", num_classes=0)
    other.output_fmt = "NHWC"
    with raises("net.unsupported", "rsg"):
        last_stage(other)
    with raises("net.unsupported", "rsg"):
        make(RsgConfig())


@pytest.mark.parametrize("kind", ["ldam", *slow("cross_entropy")])
@pytest.mark.slow
def test_a_run_is_resumed_and_exported(kind, tmp_path):
    folder = resumed_as_whole("digits_lt +rsg", tmp_path, f"method.loss={kind}", "method.generate_from=0.5")
    read, images = from_pretrained(folder), torch.rand(3, 3, 8, 8)
    assert read.net.generator.centers.any() and read.method().net is read.net
    own, plain = read.net.classify(images), timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    if kind == "cross_entropy":
        assert torch.allclose(plain(images), own, atol=1e-5)
    else:  # cosines, which a linear layer ranks alike
        assert torch.equal(plain(images).argsort(dim=1), own.argsort(dim=1))


@pytest.mark.slow
def test_it_trains_in_bfloat16(tmp_path):
    folder = run("digits_lt +rsg", tmp_path, "train.precision=bf16", "method.generate_from=0")
    assert "train/loss_vectors" in (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"centers": 0}, "centers"),
        ({"head_classes": 1.2}, "head_classes"),
        ({"strength": 1.5}, "strength"),
        ({"generate_from": -0.1}, "generate_from"),
        ({"vector_weight": -1.0}, "vector_weight"),
    ],
)
def test_impossible_settings_are_refused(settings, setting):
    with raises("method.value", setting):
        RsgConfig(**settings)


@pytest.mark.parametrize("word", ["speed.capture=true", "speed.compile=true"])
def test_batches_that_grow_are_not_captured(word):
    with raises("recipe.conflict", "rsg"):
        load_recipe("digits_lt +rsg", [word])
