"""`fit` as a whole, on photographs that a random net tells apart."""

import itertools
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file

import rescom_timm
from rescom_timm.__main__ import main
from rescom_timm.config.loading import load
from rescom_timm.config.recipe import NetConfig, OptimizerConfig
from rescom_timm.data.sources import load as load_data
from rescom_timm.engine.build import build_net
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.engine.run_folder import locked
from rescom_timm.errors import InputError
from rescom_timm.fitting import plan, source, steps, training
from rescom_timm.fitting import record as fit_record
from rescom_timm.fitting.plan import FitOptions, Pace, Training
from rescom_timm.models.text_features import save_class_features
from tests.fitting.made_up import NET, photographs
from tests.raises import raises

HOW = {"backbone": NET, "weights_file": "none", "size": 16, "device": "cpu"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, alone):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photos"), [20, 12, 8, 3])


def planned(monkeypatch, *trainings):
    monkeypatch.setattr(plan, "trainings", lambda *_: list(trainings))


def record(run):
    return json.loads((run.folder / "fit/fit.json").read_text())


def test_a_probe_is_a_run_like_any_other(photos, tmp_path, monkeypatch):
    planned(monkeypatch)
    run = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    found = record(run)
    assert found["finished"] and found["chosen"] == "probe" and found["plan"] == []
    assert [row["by"] for row in found["table"]] == ["validation"] * 3
    kept = json.loads((run.folder / "evaluation/test-last.json").read_text())
    assert kept["images"] == 16 and kept["chosen"].startswith("chosen by fit: probe")
    assert run.evaluate()["mean_class"] > 60
    assert json.loads((run.folder / "evaluation/test-last.json").read_text())["chosen"] == kept["chosen"]
    image = photos / "test/a/0.png"
    (told,) = run.predict([image])
    model = timm.create_model(f"local-dir:{run.folder / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    logits = model(transform(Image.open(image))[None])
    assert rescom_timm.from_pretrained(run.folder).class_names[int(logits.argmax())] == told.labels[0]
    assert run.figures("confusion", "report")
    assert kept["chosen"] in (run.folder / "figures/report.html").read_text()
    assert "probe" in (run.folder / "fit/report.html").read_text()
    again = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    assert again.folder == run.folder, "a finished fit is left as it is"


def test_training_gives_soups_and_a_refitted_head(photos, tmp_path, monkeypatch, capsys):
    planned(monkeypatch, Training("linear", 1), Training("cosine", 1))
    monkeypatch.setattr(training, "FALL", 100.0)
    words = [
        "--backbone",
        NET,
        "--weights-file",
        "none",
        "--size",
        "16",
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "run"),
    ]
    assert main(["fit", str(photos), *words]) == 0
    out = capsys.readouterr().out
    names = [row["name"] for row in record(rescom_timm.Run(tmp_path / "run"))["table"]]
    for start in ("the probe", "class means"):
        soups = [f"soup {share} from {start}" for share in ("0.5", "0.25", "0.75")]
        assert {*soups, f"trained from {start}"} < set(names) and all(name in out for name in names)
    assert sum(name.startswith("re-fitted") for name in names) == 2
    assert (tmp_path / "run/fit/linear/recipe.yaml").is_file()
    means = load_file(tmp_path / "run/fit/cosine-start.safetensors")["classifier.weight"]
    torch.testing.assert_close(means.norm(dim=1), torch.ones(len(means)))


def test_class_names_give_a_head_to_train_from(photos, tmp_path, monkeypatch):
    """A stub of a text tower whose features are the means of the images' features."""
    planned(monkeypatch, Training("linear", 1))
    monkeypatch.setattr(training, "FALL", 100.0)
    set_seed(0)
    net = rescom_timm.create_model(NET, 4)
    images = [Image.open(photos / f"train/{name}/0.png").resize((16, 16)) for name in "abcd"]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    with torch.no_grad():
        save_class_features(
            tmp_path / "names.safetensors", net.eval().encoder(net.normalize(pixels)), "abcd", "stub", []
        )
    run = rescom_timm.fit(photos, 100, **HOW, class_features=tmp_path / "names.safetensors", output=tmp_path / "run")
    names = [row["name"] for row in record(run)["table"]]
    assert names[:2] == ["probe", "class names"] and any(name.startswith("soup 0.5 from") for name in names)
    with raises("fit.weights", "--class-features"):
        rescom_timm.fit(photos, 100, **HOW, class_features=photos / "train/a/0.png", output=tmp_path / "other")


def test_few_validation_images_choose_nothing(tmp_path, monkeypatch):
    """Heads are cross-validated, and the soup from class means is taken unless it fell far."""
    photos = photographs(tmp_path / "photos", [12, 6, 3], validation=2)
    monkeypatch.setitem(plan.MOST, "cosine", 1)
    monkeypatch.setattr(training, "FALL", 100.0)
    run = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    found = record(run)
    assert found["plan"] == [{"kind": "cosine", "epochs": 1}]
    assert found["chosen"] == "soup 0.5 from class means" and "fewer than 5" in found["why"]
    assert [row["by"] for row in found["table"]] == ["cross-validation"] * 3 + ["validation"]
    assert not any("re-fitted" in row["name"] for row in found["table"])


def test_a_diverging_candidate_is_left_out(photos, tmp_path, monkeypatch):
    planned(monkeypatch, Training("linear", 3))
    monkeypatch.setitem(training.RATES, "linear", 50.0)
    run = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    found = record(run)
    assert "diverged" in found["trained"]["linear"]["why"] and found["chosen"] in (
        "probe",
        "class means",
        "logistic regression",
    )
    assert json.loads((run.folder / "fit/linear/metrics.jsonl").read_text().splitlines()[-1])["epoch"] < 3


def test_unreadable_images_of_every_split_end_it_before_it_begins(tmp_path, monkeypatch):
    """All are named, the folder of the run is gone, and after the repair the same command works."""
    photos, run = photographs(tmp_path / "photos", [12, 6, 6]), tmp_path / "run"
    planned(monkeypatch)
    broken = [photos / name for name in ("train/a/0.png", "test/b/1.png", "val/c/2.png")]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"bad")
    with raises("image.unreadable", "3 images") as caught:
        rescom_timm.fit(photos, 100, **HOW, output=run)
    assert all(str(path) in str(caught.value) for path in broken) and not run.exists()
    for path, content in zip(broken, whole, strict=True):
        path.write_bytes(content)
    assert record(rescom_timm.fit(photos, 100, **HOW, output=run))["finished"]


def test_a_fit_that_cannot_begin_leaves_nothing(tmp_path):
    with raises("fit.argument", "--size"):
        rescom_timm.fit(tmp_path, 1, **HOW | {"size": 0})
    photographs(tmp_path / "one", [3])
    with pytest.raises(InputError):
        rescom_timm.fit(tmp_path / "one", 1, **HOW, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_budget_holds():
    pace, images, reserve = (
        Pace(forward=0.01, step=0.03),
        {"train": 1000, "validation": 200, "test": 500},
        plan.Reserve(7),
    )
    epoch = 1000 * 0.03 + 200 * 0.01
    assert plan.trainings(7 + 0.9 * epoch, pace, images, reserve) == []
    assert plan.trainings(7 + 3.2 * epoch, pace, images, reserve) == [Training("cosine", 3)]
    tight = plan.Reserve(7, options=epoch)
    assert plan.trainings(7 + 1.1 * epoch, pace, images, tight) == [Training("cosine", 1)]
    assert plan.trainings(7 + 2.1 * epoch, pace, images, tight) == [Training("cosine", 1)]
    assert plan.trainings(7 + 3.2 * epoch, pace, images, reserve, kinds=["linear"]) == [Training("linear", 3)]
    assert plan.trainings(7 + 40 * epoch, pace, images, reserve, kinds=["cosine"]) == [Training("cosine", 30)]
    assert plan.trainings(7 + 6.4 * epoch, pace, images, reserve, times=2) == [Training("cosine", 3)]
    assert plan.trainings(7 + 6.4 * epoch, pace, images, reserve, workers=3) == [
        Training("linear", 6),
        Training("cosine", 6),
    ]
    assert plan.trainings(20 * epoch + 7, pace, images, reserve) == [Training("linear", 10), Training("cosine", 10)]
    assert plan.trainings(999 * epoch, pace, images, reserve) == [Training("linear", 20), Training("cosine", 30)]
    costly = plan.Reserve(7, 0.5 * epoch, epoch)
    assert plan.trainings(7 + 12.2 * epoch, pace, images, costly) == [Training("cosine", 10)]


def test_what_a_budget_holds_of_the_frozen_net():
    """Flipped images are left out first, then logistic regression, then images of frequent classes."""
    pace, train, validation = Pace(1.0, 0, 1 / plan.PASSES), np.array([100, 20, 3]), np.array([10, 10, 2])
    needed = [2 * 123 + 22 + 2 * 2 * 123, 123 + 22 + 2 * 123, 123 + 22 + 123]
    expected = [plan.Frozen(), plan.Frozen(1), plan.Frozen(1, False)]
    for seconds, choice in zip(needed, expected, strict=True):
        assert plan.frozen(seconds, pace, train, validation, 1) == choice
        assert plan.frozen_seconds(choice, pace, train, validation, 1) == seconds
        assert plan.frozen(seconds - 1, pace, train, validation, 1) != choice
    sample = plan.frozen(150, pace, train, validation, 1)
    assert sample == plan.Frozen(1, False, 41) and 2 * (41 + 20 + 3) + 22 == 150
    assert plan.frozen(1e9, pace, train, validation, 5) == plan.Frozen()
    assert plan.frozen(2 * (5 + 5 + 3) + 5 + 5 + 1, pace, train, validation, 1) is None


def test_a_small_budget_fits_heads_on_a_sample(photos, tmp_path, monkeypatch):
    """Rare classes stay whole, and what is left out is in the report; going on decides nothing anew."""
    paces = iter([Pace(1000.0, 1.0, 0.0), Pace(100.0, 1.0, 0.0)])  # seconds an image; 6,000 in all
    monkeypatch.setattr(steps, "measured", lambda *_: next(paces))
    planned(monkeypatch)
    with raises("fit.minutes", "--minutes", "--size"):
        rescom_timm.fit(photos, 99, **HOW, output=tmp_path / "run")
    run = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    found = record(run)
    assert found["frozen"] == {"versions": 1, "logistic": False, "at_most": 6} and found["evaluated"] == ["test"]
    features = [np.load(path).shape for path in (tmp_path / "cache").rglob("*.npy")]
    assert sorted(shape[:2] for shape in features) == [(4 * 5, 1), (6 + 6 + 6 + 3, 1)]
    assert [path.stem for path in (run.folder / "evaluation").glob("*.json")] == ["test-last"]
    assert len(found["left_out"]) == 5 and "at most 6" in (run.folder / "fit/report.html").read_text()
    (run.folder / "fit/fit.json").write_text(json.dumps(found | {"finished": False}))
    again = record(rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run"))
    assert again["table"] == found["table"] and again["left_out"] == found["left_out"]


def test_what_no_longer_fits_is_left_out(photos, tmp_path, monkeypatch):
    """A slower machine than measured: the training ends after an epoch, and only the first soup is scored."""
    planned(monkeypatch, Training("linear", 3))
    monkeypatch.setattr(training, "FALL", 100.0)
    late, saved = [0.0], training.Watcher.saved
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(fit_record, "time", clock)
    monkeypatch.setattr(training.Watcher, "saved", lambda *words: (late.append(late.pop() + 7000), saved(*words)))
    run = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    found = record(run)
    assert found["trained"]["linear"]["used"] and "1 of 3" in found["trained"]["linear"]["why"]
    assert [row["name"] for row in found["table"]][3:] == ["soup 0.5 from the probe"]
    assert len(found["dropped"]) == 4 and found["finished"]
    assert (run.folder / "evaluation/test-last.json").is_file()


def test_measuring_leaves_the_net_as_it_is(photos, tmp_path):
    base = source.read(FitOptions(str(photos)), tmp_path)
    base = replace(base, views=replace(base.views, eval="resize(18) | center_crop(16)"), net=NetConfig(NET))
    net = build_net(base.net, base.views, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trial = training.training_recipe(base, "linear", 1, 43, tmp_path / "start", False)
    pace = training.measured(new_accelerator("no"), net, trial, load_data(base.data))
    assert pace.forward > 0 and pace.step > 0
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())


def test_bad_input(photos, tmp_path, monkeypatch):
    with raises("fit.minutes", "--minutes", "--size"):
        rescom_timm.fit(photos, 1e-6, **HOW, output=tmp_path / "a")
    with raises("fit.weights", "nowhere.safetensors"):
        rescom_timm.fit(photos, 100, **{**HOW, "weights_file": tmp_path / "nowhere.safetensors"}, output=tmp_path / "b")
    with raises("fit.argument", "data.source"):
        rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "c", overrides=["data.source=x"])
    (tmp_path / "busy/fit").mkdir(parents=True)
    with locked(tmp_path / "busy/fit"), raises("run.locked", os.getpid(), "-o", "--join", kind=CheckpointError):
        rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "busy")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with raises("file.exists", "full"):
        rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "full")


@pytest.mark.parametrize("finished", [True, False])
def test_another_command_or_other_images_are_refused(tmp_path, monkeypatch, finished):
    photos = photographs(tmp_path / "photos", [8, 6])
    planned(monkeypatch)
    run = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    state = record(run)
    (run.folder / "fit/fit.json").write_text(json.dumps(state | {"finished": finished}))
    for option, value in (("minutes", 2), ("size", 18), ("backbone", "resnet18")):
        with raises("fit.other_run", option):
            rescom_timm.fit(photos, **{"minutes": 100, **HOW, option: value}, output=tmp_path / "run")
    image = photos / "train/a/0.png"
    aside = shutil.move(image, tmp_path / "aside.png")
    with raises("fit.changed", "1 removed", image):
        rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    shutil.copy(aside, image)
    with raises("fit.changed", "1 replaced", image):
        rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    image.unlink()
    shutil.move(aside, image)
    assert rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run").folder == run.folder
    shutil.copy(image, photos / "test/b/new.png")
    with raises("fit.changed", "1 added", "test/b/new.png"):
        rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")


def test_a_data_set_in_memory(tmp_path, monkeypatch):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    monkeypatch.chdir(tmp_path)
    planned(monkeypatch)
    images = [Image.fromarray(np.full((18, 18, 3), 60 * k + i % 30, np.uint8)) for k in range(3) for i in range(15)]
    dataset = Dataset.from_dict(
        {"image": images, "label": [k for k in range(3) for _ in range(15)]},
        features=Features({"image": ImageFeature(), "label": Value("int64")}),
    )
    run = rescom_timm.fit(dataset, 100, **HOW)
    assert run.folder.name == "memory" and run.evaluate()["top1"] > 50


def test_sources(photos, tmp_path):
    """A recipe keeps its data, mean and loader; a list is read beside its images."""
    recipe = source.read(FitOptions("digits_lt", overrides=("data.index=step(10)",)), tmp_path)
    assert recipe.data.index == "step(10)" and recipe.data.validation == "holdout(0.1)"
    assert recipe.optimizer == OptimizerConfig() and recipe.views.mean == load("digits_lt").views.mean
    assert source.is_recipe("digits_lt") and not source.is_recipe(str(photos))
    (tmp_path / "list.csv").write_text("image,label\n" + "".join(f"{k}.png,{k % 2}\n" for k in range(8)))
    for k in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
    own = source.read(FitOptions(str(tmp_path / "list.csv")), tmp_path)
    assert own.data.source == str(tmp_path) and own.loader.exif and own.data.index == str(tmp_path / "train.txt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        source.read(FitOptions("./nowhere"), tmp_path)


@pytest.mark.slow
def test_a_fit_that_is_interrupted_goes_on_to_the_same_end(photos, tmp_path, monkeypatch):
    """Interrupted before a head, in two trainings, before a soup is scored and while a head is re-fitted: each time the
    best so far is a run, the time adds up, and choice and weights are those of an uninterrupted fit."""
    planned(monkeypatch, Training("linear", 3), Training("cosine", 2))
    monkeypatch.setattr(training, "FALL", 100.0)
    monkeypatch.setattr(training, "BATCH", 8)  # to be stopped within an epoch
    whole = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "whole")

    def interrupt(owner, name, stop, calls):
        original, count = getattr(owner, name), itertools.count(1)

        def counted(*words, **named):
            if next(count) in calls:
                print("interrupted:", name)
                stop()
            return original(*words, **named)

        monkeypatch.setattr(owner, name, counted)

    def ctrl_c():
        raise KeyboardInterrupt

    interrupt(steps, "features_of", ctrl_c, {1, 9})
    interrupt(training.Watcher, "evaluated", lambda: os.kill(os.getpid(), signal.SIGINT), {2, 4})
    interrupt(steps, "read_logits", ctrl_c, {2})
    with pytest.raises(KeyboardInterrupt):
        rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    seconds = []
    for finished in (False, False, False, False, True):
        run = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
        found = record(run)
        seconds.append(found["seconds"])
        assert found["finished"] == finished, found
        assert run.predict([photos / "test/a/0.png"])[0].labels
        assert (run.folder / "evaluation/test-last.json").is_file() == finished, "test images are for the end"
    assert seconds == sorted(seconds)
    ours, theirs = record(run), record(whole)
    assert [row["mean_class"] for row in ours["table"]] == [row["mean_class"] for row in theirs["table"]]
    assert ours["chosen"] == theirs["chosen"]
    one, other = (load_file(r.folder / "fit/chosen.safetensors") for r in (run, whole))
    assert all(one[name].equal(other[name]) for name in other)


def test_validation_images_are_fitted_too_where_asked(photos, tmp_path, monkeypatch):
    planned(monkeypatch)
    rescom_timm.fit(photos, 100, **HOW, use_validation=True, output=tmp_path / "run")
    lines = (tmp_path / "run/fit/all.txt").read_text().splitlines()
    assert sum(not line.startswith("#") for line in lines) == 63


@pytest.mark.slow
def test_a_chosen_soup_is_trained_again_on_validation_images_too(photos, tmp_path, monkeypatch):
    planned(monkeypatch, Training("linear", 1))
    monkeypatch.setattr(training, "FALL", 100.0)
    monkeypatch.setattr(steps, "decide", lambda candidates, _: (3, "a soup"))
    run = rescom_timm.fit(photos, 100, **HOW, use_validation=True, output=tmp_path / "soup")
    metrics = (tmp_path / "soup/fit/all/linear/metrics.jsonl").read_text()
    assert metrics and record(run)["chosen"] == "soup 0.5 from the probe"
