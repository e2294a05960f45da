"""Methods that use no embeddings have no projector; checkpoints and exports of 0.2.0, which hold one, are read all the
same."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load_dict
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import build_net, load_weights
from rescom_timm.engine.evaluate import evaluate_run
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.io import read_json, write_json
from rescom_timm.methods import METHODS, create_method
from rescom_timm.models.classifiers import Cosine
from rescom_timm.models.net import ProjectorConfig, create_model
from rescom_timm.models.trainable import count_weights
from tests.engine.child import differences, figures, last, recipe
from tests.faults.fault import hashed
from tests.methods.stub import COUNTS
from tests.raises import raises

PLAIN = {"data__validation": "none", "train__epochs": 2, "train__batch_size": 64, "checkpoint__keep": 5}


def made(name, projector=True):
    torch.manual_seed(0)
    width = ProjectorConfig(hidden=8, dim=5)
    net = create_model("resnet8_cifar", len(COUNTS), projector=width if projector else None)
    size = {"negatives": 8} if name == "rescom" else {"queue_size": 16} if name in ("moco", "paco") else {}
    return create_method(net, COUNTS, METHODS[name][0](**size))


@pytest.mark.parametrize("name", METHODS)
def test_a_net_has_a_projector_where_its_method_uses_it(name):
    net = made(name).net
    there = [key for key in net.state_dict() if key.startswith("projector.")]
    embeds = METHODS[name][1].embeds
    assert bool(there) == embeds == (name in ("rescom", "moco", "paco", "hybrid_psc", "bcl", "proco"))
    if name == "cross_entropy":
        assert count_weights(net)["trained"] == count_weights(net)["all"], "100% of full fine-tuning"
    images = torch.zeros(2, 3, 32, 32)
    embeddings = net.eval()(images).embeddings
    assert embeddings.shape == (2, 5 if embeds else 0) and embeddings.dtype == torch.float32
    if embeds:
        with raises("net.projector"):
            made(name, projector=False)


@pytest.mark.parametrize("name", ["ldam", "experts", "reslt"])
def test_random_draws_are_those_of_0_2_0(name):
    """Which drew a projector for every method, before the classifiers that methods have of their own."""
    method = made(name)
    torch.manual_seed(0)
    net = create_model("resnet8_cifar", len(COUNTS), projector=ProjectorConfig(hidden=8, dim=5))
    assert net.projector[0].weight.shape == (8, 64)
    if name == "ldam":
        assert torch.equal(method.net.classifier.weight, net.classifier.weight)
        Cosine(64, len(COUNTS))
    else:
        assert not torch.equal(net.classifier.weight, torch.zeros(4, 64))
        create_method(net, COUNTS, METHODS[name][0]())
    after = torch.rand(1)
    made(name)
    assert torch.equal(torch.rand(1), after)


def as_of_0_2_0(place, file, **details):
    """The file of weights in a checkpoint's or an export's folder with a projector that nothing uses."""
    dice = torch.Generator().manual_seed(7)
    projector = {
        "projector.0.weight": torch.randn(16, 16, generator=dice), "projector.0.bias": torch.randn(16, generator=dice),
        "projector.1.weight": torch.ones(16), "projector.1.bias": torch.zeros(16),
        "projector.1.running_mean": torch.zeros(16), "projector.1.running_var": torch.ones(16),
        "projector.1.num_batches_tracked": torch.tensor(3), "projector.3.weight": torch.randn(8, 16, generator=dice),
        "projector.3.bias": torch.randn(8, generator=dice),
    }  # fmt: skip
    save_file({**load_file(place / file), **projector}, place / file, {"format": "pt"})
    if details:
        write_json(place / "rescom.json", {**read_json(place / "rescom.json"), **details})
    hashed(place.name)(place.parent)
    return projector


@pytest.mark.parametrize("name", ["balanced_softmax", "causal_norm", "dro_lt"])
def test_runs_and_exports_of_0_2_0_are_read_evaluated_and_resumed_bit_equal(alone, tmp_path, name):
    whole, parts = (recipe(tmp_path / part, **PLAIN, method={"name": name}) for part in ("whole", "parts"))
    folder = train_recipe(load_dict(whole))
    old = shutil.copytree(folder, tmp_path / "parts/run")
    first, second = checkpoint.listed(old / "checkpoints")
    as_of_0_2_0(second, "net.safetensors")
    before = evaluate_run(folder)[2].compute()
    assert evaluate_run(old)[2].compute() == before
    as_of_0_2_0(old / "model", "rescom.safetensors", projector={"hidden": 16, "dim": 8})
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        new = from_pretrained(folder / "model").net
        logits = new.classify(images)
        assert not any(key.startswith("projector.") for key in new.state_dict())
        assert torch.equal(from_pretrained(old / "model").net.classify(images), logits)
        fresh = from_pretrained(old / "model", num_classes=3).net
        assert fresh.classify(images).shape == (3, 3) and fresh(images).embeddings.shape == (3, 8)
    shutil.rmtree(second)
    as_of_0_2_0(first, "net.safetensors")
    train_recipe(load_dict(parts), resume=True)
    assert differences(last(whole), last(parts)) == [] and figures(whole) == figures(parts)


def test_a_run_without_a_projector_starts_one_that_has_and_one_of_0_2_0_brings_its_own(alone, tmp_path):
    folder = train_recipe(load_dict(recipe(tmp_path, **PLAIN, method={"name": "cross_entropy"})))
    target = load_dict(recipe(tmp_path))
    net = build_net(target.net, target.views, 10)
    drawn = net.projector[0].weight.clone()
    load_weights(net, folder)
    saved = checkpoint.newest(folder / "checkpoints")[1]
    assert torch.equal(net.projector[0].weight, drawn)
    assert torch.equal(net.classifier.weight, saved["classifier.weight"])
    projector = as_of_0_2_0(checkpoint.listed(folder / "checkpoints")[-1], "net.safetensors")
    load_weights(net, folder)
    assert torch.equal(net.projector[0].weight, projector["projector.0.weight"])
    net.drop_projector()
    load_weights(net, folder)  # of a method that has none
    assert not list(net.projector.parameters())
