"""ELF over small timm nets, against loops over one exit and one image at a time."""

import pytest
import torch

from rescom_timm.methods import ElfConfig, create_method
from rescom_timm.methods.elf import still_in
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.methods import reference
from tests.methods.stub import COUNTS
from tests.methods.test_branches import batch, make, same
from tests.raises import raises


def probability(row, y):
    return float(reference.softmax(row)[y].detach())


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("epoch", "reweighted"), [(7, False), (8, True)])
def test_images_add_ldam_up_to_the_exit_by_which_they_leave(epoch, reweighted, views):
    config = ElfConfig(views=views, exits=2, threshold=0.4, scale=5.0, margin=0.3, beta=0.9)
    method = make(config).double()
    method.set_epoch(epoch, 10)
    method.net.eval()  # statistics that do not move between the passes
    data = batch(size=16, views=views)
    labels = data["label"].repeat(views).tolist()
    outputs = method(data)
    exits = method.net(data["image"].transpose(0, 1).flatten(0, 1)).exits
    weights = reference.balanced_weights(COUNTS, 0.9) if reweighted else [1.0] * 4
    margins = [0.3 * (3 / n) ** 0.25 for n in COUNTS.tolist()]
    total, last = 0.0, 0
    for i, y in enumerate(labels):
        for e in range(3):
            row = exits[e][i]
            moved = [s - 5.0 * margins[k] if k == y else s for k, s in enumerate(row)]
            total = total + weights[y] * -torch.log(reference.softmax(moved)[y])
            last += e == 2
            if int(row.argmax()) == y and probability(row, y) >= 0.4:
                break
    assert 0 < last < len(labels), "some leave early, some do not"
    same(method, outputs["loss"], total / sum(weights[y] for y in labels), rtol=1e-6)  # margins are float32
    assert torch.allclose(outputs["stayed"], torch.tensor(100 * last / len(labels)).double())
    assert not outputs["stayed"].requires_grad and not outputs["flops_saved"].requires_grad


def test_an_image_is_classified_by_the_first_exit_that_is_sure():
    method = make(ElfConfig(scale=8.0)).eval()
    data = batch(size=16)
    images = data["image"][:, 0]
    with torch.no_grad():
        threshold = float(method.net(images).exits[0].softmax(dim=1).amax(dim=1).median())
        method.net.threshold = threshold
        outputs = method.net(images)
    left, spared = [], 0.0
    for i in range(16):
        sure = [float(torch.tensor(reference.softmax(exit_[i])).max()) >= threshold for exit_ in outputs.exits]
        left.append(sure.index(True) if True in sure else 2)
        assert torch.equal(outputs.logits[i], outputs.exits[left[-1]][i])
        spared += 1 - float(method.net.costs[left[-1]])
    assert len(set(left)) > 1
    assert torch.equal(method.net.classify(images), outputs.logits)
    assert torch.allclose(method(data)["flops_saved"], torch.tensor(100 * spared / 16))


def test_wrong_or_unsure_images_stay_and_those_that_left_never_come_back():
    sure, wrong, unsure = [9.0, 0, 0, 0], [0, 9.0, 0, 0], [0.1, 0, 0, 0]
    exits = torch.tensor([[sure, wrong, unsure], [wrong, sure, unsure], [sure, sure, sure]])
    assert still_in(exits, torch.zeros(3, dtype=torch.long), 0.9).tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    net = make(ElfConfig(threshold=0.9)).net
    assert net.left(exits).tolist() == [0, 0, 2], "in evaluation nobody knows what is wrong"
    assert net.left(exits[[2, 1, 0]]).tolist() == [0, 0, 0] and net.left(exits[[0, 0, 0]]).tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("name", "stages", "widths"),
    [
        ("resnet20_cifar", [1, 2], [16, 32]),
        ("resnet18", [2, 3], [128, 256]),
        ("test_convnext", [1, 2], [32, 48]),
        ("test_vit", [3, 4], [64, 64]),
        ("test_efficientnet", [2, 3], [32, 48]),
    ],
)
def test_exits_are_behind_the_stages_before_the_last(name, stages, widths):
    net = make(ElfConfig(), name).net
    assert net.stages == stages and [head.in_features for head in net.exits] == widths
    costs = net.costs.tolist()
    assert 0 < costs[0] < costs[1] < costs[2] == 1
    images = torch.rand(2, *net.encoder.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.allclose(net.eval()(images).features, net.encoder(images), atol=1e-5)


def test_costs_are_the_operations_of_the_layers_so_far():
    """A CIFAR ResNet-20 in convolutions of 3 x 3: the first one, and three stages of six, each of as many
    multiplications but the first of stages 2 and 3, which has half as many input channels."""
    first, one = 3 * 16, 16 * 16
    stages = [6 * one, 5.5 * one, 5.5 * one]
    parts = [(first + sum(stages[:n])) / (first + sum(stages)) for n in (1, 2, 3)]
    assert torch.allclose(make(ElfConfig()).net.costs, torch.tensor(parts))


def test_every_exit_is_trained():
    method = make(ElfConfig(exits=1))
    method(batch())["loss"].backward()
    assert all(p.grad is not None for p in method.net.parameters() if p.requires_grad)


def test_elf_refuses_what_has_no_stages_and_is_no_plain_timm_model():
    with raises("method.value", "exits", 3, 4):
        make(ElfConfig(exits=4))
    net = create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=4, dim=3))
    net.encoder.forward_intermediates = None
    with raises("net.unsupported", "elf"):
        create_method(net, COUNTS, ElfConfig())
    with raises("net.export"):
        make(ElfConfig()).net.to_timm()
    for settings in ({"exits": 0}, {"threshold": 1.1}):
        with raises("method.value", *settings):
            ElfConfig(**settings)
