"""Runs from Python: train(...) -> Run, on shipped recipes and on data sets in memory."""

import inspect
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import rescom_timm
from rescom_timm import Run, train
from rescom_timm.api import train_recipe
from rescom_timm.config.loading import differences as recipe_differences
from rescom_timm.config.loading import load_dict
from rescom_timm.data.config import DataConfig
from rescom_timm.data.digits import digits
from rescom_timm.data.in_memory import in_memory
from rescom_timm.data.sources import load
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.engine.prepare import settled
from tests.raises import raises

ROOT = Path(__file__).parents[1]
SMALL = {
    "net": {"backbone": "resnet8_cifar", "projector": {"hidden": 16, "dim": 8}},
    "views": {"train": "crop(8,1) | flip", "eval": "none"},
    "method": {"queue": {"per_class": 4}, "positives": 1, "negatives": 20},
    "train": {"epochs": 1, "batch_size": 64},
    "speed": {"workers": 0},
    "track": {"log_with": []},
}


def pictures() -> datasets.DatasetDict:
    """The digits as a user's data: PIL images, shuffled, one split in another order than it was stored in."""
    parts = {name: digits(name).cast_column("image", datasets.Image()) for name in ("train", "test")}
    return datasets.DatasetDict({**parts, "train": parts["train"].shuffle(seed=3)})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        yield train(dataset=pictures(), output=tmp_path_factory.mktemp("runs"), name="mine", **SMALL)


def test_a_data_set_in_memory_is_trained_evaluated_and_predicted_on(run):
    assert run.folder.name == "mine" and repr(run) == f"Run({str(run.folder)!r})"
    assert run.recipe.data.source == "memory" and run.recipe.net.backbone == "resnet8_cifar"
    assert run.metrics[0]["epoch"] == 1 and run.metrics[0]["train/loss"] > 0
    figures = run.evaluate()
    told = json.loads((run.folder / "evaluation/test-last.json").read_text())
    assert figures == told["numbers"] and told["images"] == 500 and told["class_names"] == list("0123456789")
    images = [row["image"] for row in pictures()["test"].select(range(3))]
    found = run.predict(images, top_k=2)
    model, ours = run.model(), run.pretrained()
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2)
    logits = ours.net.classify(pixels)
    assert not model.training and [int(one.labels[0]) for one in found] == logits.argmax(dim=1).tolist()
    pixels = (pixels.float() / 255 - ours.net.mean) / ours.net.std
    assert torch.allclose(model(pixels), logits, atol=1e-4)


def test_labels_stay_with_their_images_where_rows_were_shuffled_before():
    shuffled = pictures()
    with in_memory(shuffled):
        data = load(DataConfig("memory"))
    assert data.train.labels.tolist() == shuffled["train"]["label"] != digits("train")["label"]
    first = data.train.dataset[0]["image"]["bytes"]
    assert first == shuffled["train"].cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]


def test_figures_are_drawn_and_what_is_missing_is_told(run):
    written = run.figures("curves", "queues")
    assert {path.name for path in written} >= {"curves.png", "curves.csv", "queues.png"}
    assert all(path.is_file() for path in written)
    with pytest.warns(UserWarning, match="robustness"):
        assert run.figures("robustness") == []
    with pytest.raises(ValueError) as caught:
        run.figures("curve")
    assert "curves" in str(caught.value)


def test_a_run_is_opened_again_with_its_data_and_not_without(run):
    again = Run(run.folder, dataset=pictures())
    assert again.evaluate() == run.evaluate()
    with raises("data.memory", "dataset="):
        Run(run.folder).evaluate()
    with raises("run.missing", run.folder / "none"):
        Run(run.folder / "none")
    with raises("run.missing", run.folder.parent):
        Run(run.folder.parent)


def test_it_goes_on_with_the_same_data_and_refuses_other(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    words = {**SMALL, "output": run.folder.parent, "name": "mine", "resume": True}
    before = run.metrics
    assert train(dataset=pictures(), **words).folder == run.folder
    assert Run(run.folder).metrics == before, "it was finished"
    other = pictures()
    other["train"] = other["train"].shuffle(seed=4)
    with raises("checkpoint.differs", "memory train"):
        train(dataset=other, **words)


def test_one_split_is_parted_and_told(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for whole in (digits("test"), datasets.DatasetDict({"all": digits("test")})):
        run = train(dataset=whole, output=tmp_path, **{**SMALL, "train": {"epochs": 0}})
        assert "has one split: a fifth of each class is kept for testing" in capsys.readouterr().out
        told = json.loads((run.folder / "environment.json").read_text())["data"]
        assert (told["train"]["rows"], told["test"]["rows"]) == (400, 100)
        assert (told["train"]["taken"], told["test"]["taken"]) == ("all but holdout(0.2)", "holdout(0.2)")


@pytest.mark.slow
def test_two_trainings_in_one_process_may_differ_in_precision(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    words = {**SMALL, "train": {"epochs": 1, "batch_size": 64, "precision": "bf16"}}
    other = train({"data": {"source": "digits"}}, output=tmp_path, **words)
    assert other.recipe.train.precision == "bf16"
    assert run.evaluate() == Run(run.folder, pictures()).evaluate()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"dataset": [1, 2]}, ["data.memory", "list"]),
        ({"dataset": {}}, ["data.memory"]),
        ({"dataset": {"train": 1}}, ["data.memory", "int"]),
        ({}, ["recipe.missing_key", "data"]),
        ({"recipe": "digit_lt"}, ["recipe.missing", "digits_lt"]),
        ({"recipe": "digits_lt", "train": {"epoch": 3}}, ["recipe.unknown_key", "train.epochs"]),
        ({"recipe": "digits_lt", "overrides": ["train.epochs"]}, ["recipe.override", "'train.epochs'"]),
        ({"recipe": "digits_lt", "trian": {"epochs": 3}}, ["recipe.unknown_key", "trian"]),
        ({"dataset": {"a": digits("test"), "b": digits("test")}}, ["data.split", "'train'", "a, b"]),
    ],
)
def test_what_cannot_be_trained_is_told(words, expected, alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(*expected):
        train(**words)
    assert not any(tmp_path.iterdir())


def test_sections_say_what_words_say(monkeypatch):
    seen = []
    monkeypatch.setattr("rescom_timm.api.train_recipe", lambda recipe, resume, **_: seen.append(recipe) or ROOT)
    monkeypatch.setattr("rescom_timm.api.Run", lambda *_: None)
    train("digits_lt", overrides=["optimizer.lr=0.3", "method.name=ldam", "method.views=2"])
    train("digits_lt", optimizer={"lr": np.float64(0.3)}, method={"views": 2, "name": "ldam"})
    train(seen[0])
    train(seen[0].to_dict())
    assert seen[0].method.name == "ldam" and seen[0].optimizer.lr == 0.3
    assert seen.count(seen[0]) == 4


def test_a_net_that_plain_timm_cannot_hold_is_read_otherwise(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text((run.folder / "recipe.yaml").read_text())
    with raises("run.export", tmp_path):
        Run(tmp_path).model()
    with pytest.raises(CheckpointError):
        Run(tmp_path, pictures()).evaluate()


def test_an_export_leaves_a_folder_of_other_files_alone(run, tmp_path):
    photos, text = tmp_path / "photos", tmp_path / "labels.csv"
    (photos / "cat").mkdir(parents=True)
    text.touch()
    for path in (photos, text):
        with raises("file.exists", path):
            run.export(path)
    assert [each.name for each in photos.iterdir()] == ["cat"]
    clone = tmp_path / "clone"
    (clone / ".git").mkdir(parents=True)
    (clone / "README.md").touch()
    for _ in range(2):  # an export is replaced
        assert (run.export(clone) / "rescom.json").is_file()


def test_fit_names_an_argument_that_it_lacks():
    with pytest.raises(TypeError, match=r"^fit\(\) .*'minute'"):
        rescom_timm.fit("photos", minute=1)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_fit_needs_a_positive_number_of_minutes(minutes):
    with raises("fit.minutes"):
        rescom_timm.fit("photos", minutes)


def test_every_public_name_is_documented_typed_and_there():
    for name in rescom_timm.__all__:
        thing = getattr(rescom_timm, name)
        assert name in dir(rescom_timm) and inspect.getdoc(thing), name
        members = (
            [thing] if inspect.isfunction(thing) else [f for _, f in inspect.getmembers(thing, inspect.isfunction)]
        )
        for function in members:
            if function.__name__.startswith("_") or not function.__module__.startswith("rescom_timm"):
                continue
            assert inspect.getdoc(function), f"{name}.{function.__name__}"
            signature = inspect.signature(function)
            assert signature.return_annotation is not inspect.Signature.empty, f"{name}.{function.__name__}"
    assert (ROOT / "rescom_timm/py.typed").is_file()


@pytest.mark.slow
def test_processes_of_a_notebook_train_together(tmp_path):
    """accelerate's launchers for notebooks hand the data set in memory to every process."""
    code = f"""
from accelerate import debug_launcher
import rescom_timm
from tests.test_api import SMALL, pictures

def cell(dataset):
    rescom_timm.train(dataset=dataset, output={str(tmp_path)!r}, name="two", **SMALL)

if __name__ == "__main__":
    debug_launcher(cell, (pictures(),), num_processes=2)
"""
    (tmp_path / "cell.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "cell.py")], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/environment.json").read_text())["processes"] == 2


class Photos(torch.utils.data.Dataset):
    """As people write them."""

    def __init__(self, part: str, transform: object = None) -> None:
        self.rows = pictures()[part]
        self.transform = transform
        self.classes = [f"digit {k}" for k in range(10)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[object, int]:
        row = self.rows[i]
        return row["image"], row["label"]


@pytest.mark.slow
def test_a_torch_data_set_trains_as_the_same_images_do_otherwise(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    parts = {"train": Photos("train"), "test": Photos("test")}
    own = train(dataset=parts, output=tmp_path, name="mine", **SMALL)
    drop = ("images_per_second", "seconds")
    ours, theirs = ([{k: v for k, v in line.items() if k not in drop} for line in one.metrics] for one in (own, run))
    assert ours == theirs, "the same order, the same views, the same losses"
    assert own.pretrained().class_names[3] == "digit 3"
    assert own.evaluate() == run.evaluate()
    again = train(dataset=parts, output=tmp_path, name="mine", resume=True, **SMALL)
    assert again.metrics == own.metrics
    with pytest.warns(UserWarning, match="robustness"):
        assert {path.suffix for path in own.figures("mistakes", "robustness")} == {".png", ".svg", ".csv"}


def test_a_torch_data_set_that_transforms_is_told_and_labels_must_be_numbers(tmp_path):
    transformed = in_memory(Photos("test", transform=lambda image: image))
    with pytest.warns(UserWarning, match="transform"), transformed:
        assert load(DataConfig("memory", test="holdout(0.2)")).counts.sum() == 400
    odd = Photos("test")
    odd.targets = ["a"] * 500
    with in_memory(odd), raises("data.labels"):
        load(DataConfig("memory", test="holdout(0.2)"))


def photographs(*shapes: tuple[int, int], classes: int = 4, count: int = 12) -> datasets.Dataset:
    """Noise of these sizes in turn."""
    dice = np.random.default_rng(0)
    images = [Image.fromarray(dice.integers(0, 256, (*shapes[k % len(shapes)], 3), np.uint8)) for k in range(count)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=classes))
    return datasets.Dataset.from_dict({"image": images, "label": [k % classes for k in range(count)]}, features)


@pytest.fixture
def tried(monkeypatch):
    """Recipes that `train` was left with, each built and tried on one step and one evaluation batch."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    recipes = []

    def dry(recipe, resume, **_):
        recipes.append(recipe)
        return train_recipe(recipe, dry_run=True)

    monkeypatch.setattr("rescom_timm.api.train_recipe", dry)
    monkeypatch.setattr("rescom_timm.api.Run", lambda *_: None)
    return recipes


PHOTOS = datasets.DatasetDict(train=photographs((90, 120), (100, 70), (80, 80)), test=photographs((75, 90), (120, 80)))
ICONS = datasets.DatasetDict(train=photographs((12, 12)), test=photographs((12, 12)))
LITTLE = {"train": {"epochs": 1, "batch_size": 2}, "speed": {"workers": 0}, "net": {"backbone": "test_resnet"}}


@pytest.mark.parametrize("method", ["cross_entropy", "focal"])
def test_without_a_recipe_photographs_are_trained_on_as_init_proposes(tried, method):
    train(dataset=PHOTOS, **LITTLE, **({} if method == "cross_entropy" else {"method": {"name": method}}))
    (made,) = tried
    assert made.method.name == method and made.views.train == "random_resized_crop(160) | flip"
    assert made.net.backbone == "test_resnet" and not made.net.pretrained and made.train.epochs == 1


def test_a_folder_that_datasets_has_read_is_trained_on(tried, tmp_path):
    """load_dataset("imagefolder") is a data set in memory like any other."""
    for name, part in PHOTOS.items():
        for number, row in enumerate(part):
            path = tmp_path / "photos" / name / f"class {row['label']}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    parts = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    train(dataset=parts, **LITTLE)
    assert len(tried) == 1


def test_without_a_recipe_small_images_keep_their_size(tried, capsys):
    parts = {**ICONS, "val": photographs((12, 12)), "more": photographs((12, 12))}
    train(dataset=parts, **{**LITTLE, "net": {}}, method={"queue": {"per_class": 3}, "positives": 3})
    (made,) = tried
    assert made.net.backbone == "resnet32_cifar" and "resize(12)" in made.views.eval
    method = made.method  # keys without a name are ResCom's
    assert (method.name, method.queue.per_class, method.positives, method.negatives) == ("rescom", 3, 3, "auto")
    assert made.data.validation == "split(val)" and "left out: the splits more" in capsys.readouterr().out
    train(dataset={name: ICONS[name] for name in ("train",)} | {"val": photographs((12, 12))}, **LITTLE)
    assert (tried[1].data.test, tried[1].data.validation) == ("holdout(0.2)", "split(val)")
    train(dataset={"train": ICONS["train"], "val": ICONS["test"]}, data={"test": "val"}, **LITTLE)
    assert (tried[2].data.test, tried[2].data.validation) == ("val", "none")


def test_a_recipe_is_kept_as_it_is(tried):
    train({"method": {"queue": {"per_class": 4}}}, dataset=ICONS, views={"train": "crop(12,2)"}, **LITTLE)
    assert tried[0].views.train == "crop(12,2)" and tried[0].views.eval == "none" and not tried[0].net.pretrained
    assert tried[0].method.name == "rescom" and tried[0].data.validation == "none"


def test_weights_that_cannot_be_fetched_say_what_to_do(tried, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with raises("net.weights", "tf_efficientnet_lite0.in1k", "net.pretrained=false"):
        train(dataset=PHOTOS, train=LITTLE["train"], speed=LITTLE["speed"])


@pytest.mark.parametrize(
    ("views", "named"),
    [
        ({"train": "random_resized_crop(32)", "eval": "none"}, ["views.eval", "memory test"]),
        ({"train": "flip", "eval": "upscale(32)"}, ["views.train", "memory train"]),
        ({"train": "crop(100)", "eval": "upscale(100)"}, ["views.train", "100"]),
    ],
)
def test_sizes_are_checked_before_a_step(tmp_path, monkeypatch, views, named):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with raises("image.size", *named):
        train({}, dataset=PHOTOS, views=views, output=tmp_path / "runs", **LITTLE)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("train_at", "eval_at"), [(32, 96), (96, 32), (32, 33)])
def test_training_and_evaluation_at_sizes_far_apart_are_reported(tried, train_at, eval_at):
    views = {"train": f"random_resized_crop({train_at})", "eval": f"upscale({eval_at})"}
    far = max(train_at, eval_at) > 1.5 * min(train_at, eval_at)
    with pytest.warns(UserWarning, match=f"{train_at} x {train_at}.*") if far else nullcontext():
        train({}, dataset=PHOTOS, views=views, **LITTLE)


def test_a_run_of_earlier_versions_keeps_its_qn(monkeypatch):
    made = load_dict({"data": {"source": "digits"}, "method": {"queue": {"per_class": 10}}})
    old = load_dict({"data": {"source": "digits"}, "method": {"queue": {"per_class": 10}, "negatives": 90}})
    with in_memory(None):
        data = load(DataConfig("digits"))
    assert settled(made, data, False).method.negatives == 36 and settled(old, data, False) == old
    monkeypatch.setattr("rescom_timm.engine.prepare.resumed", lambda recipe, resume: old if resume else None)
    assert settled(made, data, True) == old and settled(made, data, False).method.negatives == 36
    assert not recipe_differences(old.to_dict(), made.to_dict()), "a sweep knows its own cell again"
