"""Runs of BCL, ProCo and views.contrast: resumed bit for bit, exported and read back; what is refused."""

import shutil
import signal

import pytest
import torch
from accelerate.utils import DistributedType

from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import load, load_dict
from rescom_timm.engine.launch import refuse_what_cannot_be_sharded
from rescom_timm.inference.pretrained import from_pretrained
from tests.engine.child import Launch, differences, figures, last, recipe, run, trainer_of
from tests.engine.test_trainer import way
from tests.raises import raises

CONTRAST = {"views__contrast": "random_resized_crop(8,0.5) | jitter(0.4,0.4,0.4,0.1,0.8)", "train__epochs": 2}


@pytest.mark.parametrize("method", [{"name": "proco"}, {"name": "bcl"}, {"name": "rescom", "prototypes": True}])
def test_a_run_goes_on_with_the_bits_of_the_whole_one_and_is_exported(alone, tmp_path, method):
    own = {"queue": {"per_class": 4}, "negatives": 20, "contrast_schedule": "cosine"}
    method = method | (own if method["name"] == "rescom" else {})
    changes = CONTRAST | {"method": method, "evaluation__every": 2, "data__validation": "none"}
    if method["name"] == "bcl":
        changes["net__classifier"] = {"kind": "cosine", "scale": 30.0}
    whole, cut = (recipe(tmp_path / name, **changes) for name in ("whole", "cut"))
    folder = train(load_dict(whole))
    shutil.copytree(folder, tmp_path / "cut/run")
    newest = sorted((tmp_path / "cut/run/checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    for name in ("evaluation", "model"):
        shutil.rmtree(tmp_path / "cut/run" / name, ignore_errors=True)
    train(load_dict(cut), resume=True)
    assert differences(last(whole), last(cut)) == []
    told = [line for line in figures(whole) if "train/loss" in line][-1]
    assert {"train/loss_contrast", "train/loss_contrast_chance", "train/loss_classification"} <= set(told)
    net = from_pretrained(folder).net
    saved = last(whole)[0]
    assert torch.equal(net.classifier.weight, saved["classifier.weight"])
    assert net.classify(torch.rand(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_proco_with_sharp_steps_in_two_processes_is_killed_and_resumed(tmp_path):
    """Both distributions are the same in each process; a step of two passes enters a batch once."""
    changes = CONTRAST | {
        "method": {"name": "proco"}, "optimizer": {"lr": 0.05, "sam": {"rho": 0.2}}, "train__accumulate": 2,
    }  # fmt: skip
    whole, cut = (recipe(tmp_path / name, **changes) for name in ("whole", "cut"))
    run(whole, 2)
    assert Launch(cut, 2, fault=("signal_at_pass", signal.SIGTERM, 21, 1)).wait() == [143, 143]
    assert -9 in Launch(cut, 2, resume=True, fault=("signal_at_pass", signal.SIGKILL, 13)).wait()
    run(cut, 2, resume=True)
    assert differences(last(whole), last(cut)) == []
    own = [rank["buffers"] for rank in last(whole)[1]["ranks"]]
    assert torch.equal(own[0]["means"], own[1]["means"]) and own[0]["numbers"].sum() > 0


def test_what_does_not_go_together_is_refused(alone, tmp_path):
    for key in ("loader.device_views", "speed.resident"):
        with raises("recipe.conflict", "views.contrast", key):
            load("digits_lt", ["views.contrast=digits", f"{key}=true"])
    with raises("recipe.conflict", "views.contrast", "ldam"):
        load("digits_lt", ["+ldam", "views.contrast=digits"])
    with raises("recipe.views", "flipp"):
        load("digits_lt", ["views.contrast=flipp"])
    with raises("image.size", "views.contrast"):
        trainer_of(recipe(tmp_path, views__contrast="upscale(16)"))
    for method in ({"name": "bcl"}, {"name": "rescom", "queue": {"per_class": 4}, "negatives": 20, "prototypes": True}):
        made = load_dict(recipe(tmp_path, method=method))
        with raises("train.distributed", "net.class_projector"):
            refuse_what_cannot_be_sharded(way(DistributedType.FSDP, True), made, trainer_of(made.to_dict()).method)
