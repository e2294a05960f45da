"""Evaluation: every image once, on any number of processes; what is written and printed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load_dict
from rescom_timm.data.config import ViewsConfig
from rescom_timm.data.decoding import decode
from rescom_timm.data.sources import load
from rescom_timm.data.transforms import parse
from rescom_timm.engine import checkpoint
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.engine.evaluate import evaluate_run, five_crops, table, table_of
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.metrics import Meter, span
from tests.engine.child import differences, recipe, run
from tests.raises import raises


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def finished(request, tmp_path_factory):
    """(recipe, folder) of a run; its test split has 500 images, which no batch of 64 divides."""
    tree = recipe(tmp_path_factory.mktemp("run"), train__epochs=2, evaluation__batch_size=64)
    run(tree, ranks=request.param)
    return load_dict(tree), Path(tree["output"]) / "run"


@pytest.mark.parametrize(("split", "images"), [("test", 500), ("validation", 90)])
def test_every_image_is_evaluated_once_in_order(finished, split, images):
    made, folder = finished
    data = load(made.data)
    part = getattr(data, split)
    found = load_file(folder / "evaluation" / f"{split}-last.safetensors")
    assert found["labels"].tolist() == part.labels.tolist()
    assert found["predicted"].shape == found["confidence"].shape == (images,)
    record = json.loads((folder / "evaluation" / f"{split}-last.json").read_text())
    assert record["images"] == images and record["split"] == part.name and record["checkpoint"] == "last"
    assert "not selected" in record["chosen"]
    assert record["per_class"]["count"] == data.counts.tolist()
    assert record["sizes"]["top1"] == {"images": images, "classes": 10} and record["group_limits"] == [20, 100]
    for kind in ("intervals", "image_intervals"):
        assert all(low <= record["numbers"][name] <= high for name, (low, high) in record[kind].items())
        assert set(record[kind]) == set(record["numbers"]) - {"ece"}
    right, counts = (found["predicted"] == found["labels"]).numpy(), data.counts[part.labels]
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    told = {"top1": right.mean(), **{name: right[inside].mean() for name, inside in groups.items()}}
    assert {name: record["numbers"][name] for name in told} == pytest.approx({k: 100 * v for k, v in told.items()})


def test_it_is_the_saved_net_that_was_evaluated(finished):
    """The predictions on disk are those of the checkpoint's weights, its agreed BatchNorm statistics included."""
    from rescom_timm.data.loaders import eval_loader
    from rescom_timm.engine.build import build_method

    made, folder = finished
    data = load(made.data)
    method = build_method(made, data)
    method.net.load_state_dict(checkpoint.newest(folder / "checkpoints")[1])
    method.net.eval()
    with torch.no_grad():
        logits = torch.cat([method.net.classify(b["image"]) for b in eval_loader(data.test, made.views, 250)])
    found = load_file(folder / "evaluation" / "test-last.safetensors")
    assert (logits.argmax(dim=1) == found["predicted"]).float().mean() > 0.995  # ties of rounding aside
    np.testing.assert_allclose(logits.softmax(dim=1).amax(dim=1), found["confidence"], rtol=1e-4)


def copied(folder, tmp_path):
    """A run's folder without its evaluations."""
    return Path(shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_saved_run_is_evaluated_as_its_training_did(finished, alone, tmp_path, split):
    folder = copied(finished[1], tmp_path)
    name, title, meter = evaluate_run(folder, split=split)
    assert name == f"{split}-last"
    then, now = (json.loads((run / "evaluation" / f"{name}.json").read_text()) for run in (finished[1], folder))
    assert title.startswith(f"{then['split']}, {then['images']} images, checkpoint last: after epoch 2, not selected")
    assert now["per_class"]["count"] == then["per_class"]["count"] and now["class_names"] == then["class_names"]
    assert now["numbers"] == meter.compute() and now["numbers"].keys() == then["numbers"].keys()
    assert now["numbers"]["top1"] == pytest.approx(then["numbers"]["top1"], abs=1.2)  # a tie of rounding aside
    then, now = (load_file(run / "evaluation" / f"{name}.safetensors") for run in (finished[1], folder))
    assert torch.equal(now["labels"], then["labels"])
    np.testing.assert_allclose(now["confidence"], then["confidence"], rtol=1e-4)


def test_best_is_the_checkpoint_that_the_newest_one_names(finished, alone, tmp_path):
    folder = copied(finished[1], tmp_path)
    first, second = checkpoint.listed(folder / "checkpoints")
    net, state = checkpoint.load(second)
    state["progress"] |= {"best_checkpoint": first.name, "best_epoch": 1}
    shutil.rmtree(second)
    checkpoint.save(folder / "checkpoints", 22, net, state)
    name, title, _ = evaluate_run(folder, "best")
    assert name == "test-best" and title.endswith("checkpoint best: epoch 1, best top1 on validation")
    names = (name, evaluate_run(folder, str(first))[0], evaluate_run(folder)[0])
    best, same, last = (load_file(folder / "evaluation" / f"{name}.safetensors") for name in names)
    assert differences(best, same) == []
    assert not torch.equal(best["confidence"], last["confidence"])


def test_table_lines_up_with_long_names_and_gaps():
    text = table({"test": {"top1": 12.345, "medium_mean_class": 1.0}, "validation": {"top1": 100.0}}).splitlines()
    assert len({len(line) for line in text}) == 1
    assert text[0].split() == ["top1", "medium_mean_class"]
    assert text[1].split() == ["test", "12.35", "1.00"] or text[1].split() == ["test", "12.34", "1.00"]
    assert text[2].split() == ["validation", "100.00", "-"]


def test_intervals_images_and_classes_stand_below_the_figures():
    meter = Meter(4, [200, 150, 5, 4], limits=(10, 100))
    meter.update(torch.eye(4)[[0] * 6 + [1] * 5 + [2, 2, 0, 3]], torch.tensor([0] * 6 + [1] * 5 + [2] * 4))
    for title, place in (("test", 1), ("a very long split, 15 images, checkpoint last", 2)):
        head, *lines = table_of({title: meter}).splitlines()
        lines = lines[place - 1 :]
        names = head.split()
        assert names[:2] == ["top1", "many"] and len({len(line) for line in (head, *lines)}) == 1
        assert lines[0].split()[-len(names) :][:2] == ["86.67", "100.00"]
        found = {line.split()[0]: line.split()[1:] for line in lines[1:]}
        assert list(found) == ["95%", "images", "classes"]
        few = names.index("few")
        assert (found["images"][few], found["classes"][few]) == ("4", "1")
        assert found["95%"][1] == span(meter.intervals()["many"]) == "74-100"
        assert found["95%"][names.index("ece")] == "-"


def test_what_is_evaluated_otherwise_does_not_pass_for_the_runs_own(finished, alone, tmp_path):
    folder = Path(shutil.copytree(finished[1], tmp_path / "run"))
    own = (folder / "evaluation" / "test-last.json").read_bytes()
    name, title, _ = evaluate_run(folder, overrides=["data.index=all", "evaluation.batch_size=100"])
    assert name.startswith("test-last-changed-") and title.endswith("not selected; evaluated with data.index=all")
    record = json.loads((folder / "evaluation" / f"{name}.json").read_text())
    assert record["overrides"] == {"data.index": "all"}
    assert (folder / "evaluation" / "test-last.json").read_bytes() == own
    assert evaluate_run(folder, overrides=["evaluation.batch_size=100"])[0] == "test-last"  # which changes nothing


def test_another_net_than_the_checkpoints_is_told(finished, alone):
    with pytest.raises(CheckpointError):
        evaluate_run(finished[1], overrides=["net.backbone=resnet8_cifar"])


def test_long_names_stand_above_their_figures_so_that_the_table_fits_a_terminal():
    rows = {f"{'a very long split' * 4} {n}": {"top1": 12.5, "mean_class": 1.0} for n in (1, 2)}
    text = table(rows).splitlines()
    assert text[0].split() == ["top1", "mean_class"] and text[1::2] == list(rows)
    assert all(line.split() == ["12.50", "1.00"] and len(line) == len(text[0]) for line in text[2::2])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("eval224", "resize(248,bilinear) | corner_crop(224,3)"),
        ("resize(256,bicubic) | center_crop(224)", "resize(248,bicubic) | corner_crop(224,3)"),
        ("resize(96) | center_crop(96)", "resize(106,bilinear) | corner_crop(96,3)"),
        ("resize(72,bicubic) | center_crop(64)", "resize(71,bicubic) | corner_crop(64,3)"),
        ("resize(8) | center_crop(8)", "resize(9,bilinear) | corner_crop(8,3)"),
        ("resize(438) | center_crop(384)", "resize(425,bilinear) | corner_crop(384,3)"),
        ("center_crop(2)", "resize(3,bilinear) | corner_crop(2,3)"),
    ],
)
def test_five_crops_are_lifts(policy, expected):
    found = five_crops(policy)
    assert (
        len(found) == 5
        and found[3] == expected
        and found[4].endswith(policy.split(" | ")[-1].replace("eval224", "center_crop(224)"))
    )
    with raises("recipe.conflict", "center_crop", "'none'"):
        five_crops("none")


def test_five_crops_are_the_corners_and_the_middle_of_one_image():
    pixels = np.arange(40 * 56 * 3).reshape(40, 56, 3).astype(np.uint8)
    image = Image.fromarray(pixels)
    crops = [np.asarray(parse(f"corner_crop(32,{corner})").augment(image)) for corner in range(4)]
    expected = [pixels[:32, :32], pixels[:32, 24:], pixels[8:, :32], pixels[8:, 24:]]
    assert all(np.array_equal(one, other) for one, other in zip(crops, expected, strict=True))
    with pytest.raises(ValueError, match="40 x 30"):
        parse("corner_crop(32,0)").augment(image.resize((40, 30)))
    with pytest.raises(ValueError, match="corner"):
        parse("corner_crop(32,4)")


def test_the_mean_of_five_crops_stands_beside_the_single_one(alone, tmp_path):
    tree = recipe(tmp_path, train__epochs=1, schedule__warmup_epochs=0)
    tree["views"]["eval"] = "resize(8) | center_crop(8)"
    folder = train_recipe(load_dict(tree))
    before = (folder / "evaluation/test-last.json").read_text()
    name, title, meter = evaluate_run(folder, crops=True)
    assert name == "test-last-five-crops" and title.endswith("; mean of five crops")
    assert (folder / "evaluation/test-last.json").read_text() == before
    views, sums = ViewsConfig(eval="resize(8) | center_crop(8)"), 0
    net = from_pretrained(folder, None).net
    test = load(load_dict(tree).data).test
    for policy in five_crops(views.eval):
        images = [parse(policy).augment(decode(row["image"])) for row in test.dataset]
        stack = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        sums = sums + net.classify(stack).detach()
    assert meter.compute()["top1"] == pytest.approx(100 * (sums.argmax(1).numpy() == test.labels).mean())
