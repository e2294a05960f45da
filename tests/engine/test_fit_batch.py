"""train.fit_batch: the passes of a step are as few as fit, in all processes, and nothing else changes."""

import shutil

import pytest
import torch

from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import load, load_dict
from rescom_timm.config.recipe import RecipeError
from rescom_timm.models.net import Net
from tests.engine.child import differences, figures, last, recipe, run
from tests.raises import raises


def fitting(tmp_path, **changes):
    method = {"name": "balanced_softmax", "views": 2}
    return recipe(tmp_path, **{"method": method, "train__epochs": 2, "train__fit_batch": True, **changes})


def found(tree):
    saved = load(f"{tree['output']}/run/recipe.yaml").train
    return saved.accumulate, saved.fit_batch


def limit(monkeypatch, views, tried=None):
    forward = Net.forward

    def limited(self, images):
        if tried is not None:
            tried.append(len(images))
        if len(images) > views:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, images)

    monkeypatch.setattr(Net, "forward", limited)


@pytest.mark.slow
def test_the_largest_that_fits_trains_as_if_it_had_been_said(alone, tmp_path, capsys):
    told = fitting(tmp_path / "told", train__fit_batch=False, train__accumulate=4)
    train(load_dict(told))
    tree, tried = fitting(tmp_path / "found"), []
    with alone.context() as patch:
        limit(patch, 20, tried)  # of 2 x 32 views
        train(load_dict(tree))
    assert tried[:4] == [64, 32, 16, 16] and found(tree) == (4, False)
    assert "8 images of a process fit its memory: train.accumulate=4, and BatchNorm sees 8" in capsys.readouterr().out
    assert differences(last(told), last(tree)) == [] and figures(told) == figures(tree)


def test_all_that_fits_at_once_is_one_pass_and_what_was_said_is_the_least(alone, tmp_path, capsys):
    for folder, accumulate in (("a", 1), ("b", 2)):
        tree = fitting(tmp_path / folder, train__epochs=0, train__accumulate=accumulate)
        train(load_dict(tree))
        assert found(tree) == (accumulate, False)


@pytest.mark.slow
def test_a_run_goes_on_with_the_passes_that_it_has(alone, tmp_path):
    """With the recipe that it was started by, on a machine of more memory, and to the same bits."""
    whole, cut = (fitting(tmp_path / name) for name in ("whole", "cut"))
    with alone.context() as patch:
        limit(patch, 20)
        shutil.copytree(train(load_dict(whole)), tmp_path / "cut/run")
    shutil.rmtree(tmp_path / "cut/run/checkpoints/step-00000022")
    train(load_dict(cut), resume=True)
    assert found(cut) == (4, False)
    assert differences(last(whole), last(cut)) == [] and figures(whole) == figures(cut)


def test_the_process_of_the_least_memory_decides_for_all(tmp_path):
    tree = fitting(tmp_path, train__epochs=1, schedule__warmup_epochs=0)
    run(tree, ranks=2, fault=("little_memory", 10, 1))  # of 2 x 16 views in each
    assert found(tree) == (4, False)


def test_a_net_of_which_no_image_fits_is_told_in_one_line(alone, tmp_path):
    limit(alone, 1)
    with raises("train.memory", "train.fit_batch", kind=RecipeError):
        train(load_dict(fitting(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_other_errors_of_the_trial_are_told_as_they_are(alone, tmp_path):
    def broken(self, images):
        raise RuntimeError("another")

    alone.setattr(Net, "forward", broken)
    with pytest.raises(RuntimeError, match=r"^another$"):
        train(load_dict(fitting(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"method": {}}, ["train.fit_batch", "rescom", "train.accumulate"]),
        ({"speed__capture": True}, ["speed.capture", "train.fit_batch"]),
        ({"speed__compile": "reduce-overhead"}, ["speed.compile", "train.accumulate"]),
    ],
)
def test_what_cannot_be_fitted_is_an_error(tmp_path, changes, keys):
    with pytest.raises(RecipeError) as caught:
        load_dict(fitting(tmp_path, **changes))
    assert all(key in str(caught.value) for key in keys)
