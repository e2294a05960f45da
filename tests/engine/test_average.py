"""Averaged weights (train.ema): against a loop over the steps, beside the raw ones, and in the export."""

import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import load_dict
from rescom_timm.engine import trainer as training
from rescom_timm.engine.evaluate import evaluate, evaluate_run
from rescom_timm.inference.export import export_run
from rescom_timm.io import read_json
from tests.engine.child import differences, figures, last, recipe, trainer_of
from tests.raises import raises


def averaged(tmp_path, **changes):
    ema = {"train__ema": {"decay": 0.9, "warmup": False}, "train__epochs": 2}
    return recipe(tmp_path, **{"method": {"name": "balanced_softmax"}, **ema, **changes})


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_that_of_the_steps(alone, tmp_path, warmup):
    trainer = trainer_of(averaged(tmp_path, train__ema={"decay": 0.6, "warmup": warmup}, train__epochs=1,
                                  schedule__warmup_epochs=0))  # fmt: skip
    mean, step = {}, 0
    update = trainer.step.update

    def noted(finite):
        nonlocal step
        done, step = update(finite), step + 1
        decay = 0.0 if step == 1 else min(0.6, 1 - step ** (-2 / 3)) if warmup else 0.6
        for name, value in trainer.net.state_dict().items():
            old = mean.get(name, value)
            mean[name] = decay * old + (1 - decay) * value if value.is_floating_point() else value.clone()
        return done

    trainer.step.update = noted
    trainer.open(resume=False)
    trainer.fit()
    trainer.close()
    told = trainer.average.module.state_dict()
    assert step == 11 and list(told) == list(mean)
    for name, value in mean.items():
        torch.testing.assert_close(told[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(told["classifier.weight"], trainer.net.classifier.weight)


def test_the_raw_weights_train_as_without_and_both_are_evaluated(alone, tmp_path):
    plain, tree = averaged(tmp_path / "a", train__ema=None), averaged(tmp_path / "b")
    train(load_dict(plain))
    folder = train(load_dict(tree))
    for without, line in zip(figures(plain), figures(tree), strict=True):
        assert without == {name: value for name, value in line.items() if "_ema/" not in name}
    assert differences(last(plain)[0], last(tree)[0]) == []
    final = figures(tree)[-1]
    for split in ("test", "validation"):
        raw, ema = (read_json(folder / f"evaluation/{split}-last{end}.json") for end in ("", "-ema"))
        assert (raw["checkpoint"], ema["checkpoint"]) == ("last", "last, averaged weights")
        assert raw["numbers"]["top1"] == final[f"{split}/top1"]
        assert ema["numbers"]["top1"] == final[f"{split}_ema/top1"]
    anew = evaluate_run(folder, weights="ema")
    assert anew[0] == "test-last-ema" and anew[2].compute()["top1"] == final["test_ema/top1"]
    confidence = [load_file(folder / f"evaluation/test-last{end}.safetensors")["confidence"] for end in ("", "-ema")]
    assert not torch.equal(*confidence)


def test_either_is_exported(alone, tmp_path):
    ema = {"decay": 0.9, "export": True}
    tree = averaged(tmp_path, train__ema=ema, data__validation="none", net__backbone="resnet20_cifar")
    folder = train(load_dict(tree))
    net, state = last(tree)
    assert read_json(folder / "model/rescom.json")["weights"] == "ema"
    raw = export_run(folder, tmp_path / "x", weights="raw")
    for made, weights in ((folder / "model", state["average"]), (raw, net)):
        model = timm.create_model(f"local-dir:{made}", pretrained=True)
        assert torch.equal(model.get_classifier().weight, weights["classifier.weight"])
    (tmp_path / "y").mkdir()
    other = averaged(tmp_path / "y", train__ema=None, train__epochs=1, schedule__warmup_epochs=0)
    with raises("checkpoint.average", "train.ema"):
        export_run(train(load_dict(other)), tmp_path / "z", weights="ema")


def test_the_best_checkpoint_has_the_average_of_its_own_step(alone, tmp_path):
    """Chosen by the raw weights: here the first epoch is."""
    scores = iter((30.0, 20.0, 10.0))

    def told(accelerator, net, loader, *more, **named):
        meter = evaluate(accelerator, net, loader, *more, **named)
        if len(loader.dataset) != 500 and any(weight.requires_grad for weight in net.parameters()):
            score = next(scores, 0.0)
            meter.compute = lambda: {"top1": score}
        return meter

    alone.setattr(training, "evaluate", told)
    folder = train(load_dict(averaged(tmp_path, train__epochs=3)))
    kept = read_json(folder / "evaluation/test-best-ema.json")
    assert kept["chosen"] == "epoch 1, best top1 on validation"
    assert evaluate_run(folder, "best", weights="ema")[0] == "test-best-ema"
    assert read_json(folder / "evaluation/test-best-ema.json") == kept


def test_only_trained_weights_are_kept_beside_a_frozen_backbone(alone, tmp_path):
    trainer = trainer_of(averaged(tmp_path, net__trainable=["none"], optimizer__weight_decay=0.0))
    shared = {name for name, ours in trainer.net.named_parameters()
              if ours.data_ptr() == trainer.average.module.get_parameter(name).data_ptr()}  # fmt: skip
    assert shared == {name for name, ours in trainer.net.named_parameters() if not ours.requires_grad} != set()
    before = {name: value.clone() for name, value in trainer.net.state_dict().items() if name in shared}
    trainer.open(resume=False)
    trainer.fit()
    trainer.close()
    assert all(torch.equal(trainer.net.state_dict()[name], value) for name, value in before.items())


def test_a_run_goes_on_with_the_bits_of_the_whole_one(alone, tmp_path):
    whole, cut = (averaged(tmp_path / name) for name in ("whole", "cut"))
    shutil.copytree(train(load_dict(whole)), tmp_path / "cut/run")
    shutil.rmtree(tmp_path / "cut/run/checkpoints/step-00000022")
    train(load_dict(cut), resume=True)
    assert differences(last(whole), last(cut)) == [] and figures(whole) == figures(cut)


@pytest.mark.parametrize(
    ("changes", "code", "keys"),
    [
        ({"speed__capture": True}, "recipe.conflict", ["speed.capture", "train.ema"]),
        ({"train__ema": {"decay": 1.0}}, "recipe.value", ["train.ema", "decay"]),
    ],
)
def test_what_cannot_be_averaged_is_an_error(tmp_path, changes, code, keys):
    with raises(code, *keys):
        load_dict(averaged(tmp_path, **changes))


@pytest.mark.parametrize("classifier", [{"init": "class_means"}, {"kind": "cosine", "init": "class_means"}])
@pytest.mark.parametrize("export", [False, True])
def test_an_average_starts_from_the_class_means_too(alone, tmp_path, classifier, export):
    """Before the first step the average is the net, whose classifier was drawn anew after the average was made."""
    net = {**recipe(tmp_path)["net"], "classifier": classifier}
    trainer = trainer_of(averaged(tmp_path, net=net, train__ema={"decay": 0.9, "export": export}))
    drawn = trainer.net.classifier.weight.clone()
    trainer.open(resume=False)
    trainer.close()
    assert not torch.equal(trainer.net.classifier.weight, drawn)
    assert differences(dict(trainer.average.module.state_dict()), dict(trainer.net.state_dict())) == []
