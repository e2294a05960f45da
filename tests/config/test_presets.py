"""Presets over recipes: what they set, in which order, and the names of 0.2.0."""

import pytest

from rescom_timm.__main__ import main
from rescom_timm.config.loading import load, load_dict, presets, shipped
from rescom_timm.config.recipe import RecipeError
from rescom_timm.io import read_yaml
from tests.raises import warns


def test_a_preset_goes_over_the_file_and_below_the_keys():
    recipe = load("digits_lt", ["+ldam", "method.margin=0.3", "train.epochs=40"])
    assert (recipe.name, recipe.method.name, recipe.method.margin, recipe.method.views) == (
        "digits_lt_ldam",
        "ldam",
        0.3,
        2,
    )
    assert recipe.train.epochs == 40 and recipe.net == load("digits_lt").net


def test_when_holds_for_a_file_and_for_those_that_are_based_on_it():
    assert load("digits_lt", ["+las"]).method.shift_bn is True
    for name in ("cifar10_lt_if100_r32", "cifar10_lt_if10_r32", "cifar100_lt_if50_r32"):
        recipe = load(name, ["+las"])
        assert (recipe.method.shift_bn, recipe.optimizer.weight_decay, recipe.schedule.milestones) == (False, 2e-4, ())
    assert load("cifar10_lt_if10_r32", ["+las"]).data.index == "exponential(10)"
    first = load("imagenet_lt_x50", ["+ssd_1"])
    assert (first.method.queue_size, first.train.epochs, first.net.backbone) == (115712, 135, "resnext50_32x4d")
    assert load("places_lt_dinov2_b14", ["+balanced_softmax"]).method.views == 1
    assert load("inat18_clip_b16", ["+lift_plus"]).train.epochs == 15


def test_presets_apply_from_left_to_right():
    both = load("digits_lt", ["+mixup", "+balanced_softmax"])
    assert (both.name, both.method.name, both.mix.mixup) == (
        "digits_lt_mixup_balanced_softmax",
        "balanced_softmax",
        0.2,
    )
    assert load("digits_lt", ["+balanced_softmax", "+mixup"]).method.name == "cross_entropy"


def test_a_preset_without_a_method_keeps_the_settings_of_rescom(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {source: digits}\nmethod: {contrast_weight: 0.1}\n")
    method = load(tmp_path / "mine.yaml", ["+table6_5_spm"]).method
    assert (method.name, method.contrast_weight, method.siamese) == ("rescom", 0.1, False)


@pytest.mark.parametrize("recipe", [path.stem for path in shipped()])
def test_every_preset_makes_a_recipe_of_every_file(recipe):
    for name in presets():
        try:
            made = load(recipe, [f"+{name}"])
        except RecipeError as error:  # a method that cannot take the file's net
            refused = str(error)
        else:
            assert made.name == f"{recipe}_{name}" and load_dict(made.to_dict()) == made
            continue
        assert "method" in refused or "net" in refused, (name, refused)


def test_names_of_020_load_with_a_notice():
    with warns("digits_lt +ldam", kind=FutureWarning):
        assert load("digits_lt_ldam") == load("digits_lt", ["+ldam"])
    with warns("imagenet_lt_clip_b16 +lift_plus", kind=FutureWarning):
        assert load("recipes/imagenet_lt_clip_b16_lift_plus.yaml").method.name == "balanced_softmax"


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["digits_lt", "+ldma"], "recipe.unknown_preset", "+ldam?"),
        (["digits_lt", "+train.epochs=3"], "recipe.override", ": train.epochs=3"),
        (["digits_lt", "+"], "recipe.unknown_preset", "+;"),
    ],
)
def test_a_wrong_preset_is_one_line(arguments, code, named, capsys):
    assert main(["train", *arguments, "--print"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error[{code}]: ") and named in error and error.count("\n") == 1


def test_the_resolved_recipe_is_printed(capsys):
    assert main(["recipes", "--show", "digits_lt", "+ldam", "seed=4"]) == 0
    printed = capsys.readouterr().out
    assert "name: ldam" in printed and "seed: 4" in printed
    assert main(["recipes", "+ldam"]) == 0 and "arXiv 1906.07413" in capsys.readouterr().out


@pytest.mark.parametrize("path", presets().values(), ids=lambda path: path.stem)
def test_every_preset_is_a_document(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and any(line.startswith("# Source ") for line in lines)
    assert set(read_yaml(path).get("when", {})) <= {recipe.stem for recipe in shipped()}
