"""Runs compared image by image: which are paired, which are seeds of one recipe, what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from rescom_timm.analysis import compare
from rescom_timm.analysis.run_files import RunFolder
from rescom_timm.cli import compare as command
from rescom_timm.paired import mcnemar
from tests.analysis.made_up import add_evaluation
from tests.raises import raises

COUNTS = [300, 150, 50, 25, 8, 4]
NAMES = ["cat", "dog", "emu", "fox", "gnu", "hen"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one recipe, and one of another."""
    found = []
    for name, seed, method, skill in (("a", 0, "rescom", 0.4), ("a-2", 1, "rescom", 0.4), ("b", 0, "ldam", 1.2)):
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        recipe = {"name": name, "seed": seed, "data": {"source": "digits"}, "method": {"name": method}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        add_evaluation(folder, COUNTS, NAMES, per_class=15, seed=len(found), skill=skill)
        found.append(folder)
    return found


def answers(runs: list[Path]) -> list[compare.Answers]:
    return [compare.read(path) for path in runs]


def test_seeds_of_a_recipe_are_averaged(runs: list[Path]) -> None:
    found = compare.measure(answers(runs), draws=200)
    assert found.names == ("a (2 seeds)", "b") and found.seeds == (2, 1) and (found.images, found.classes) == (90, 6)
    right = [RunFolder(path).evaluation().numbers for path in runs]
    for figure in ("top1", "many", "medium", "few", "mean_class"):
        first = np.mean([right[0][figure], right[1][figure]])
        assert found.found.accuracies[0][figure] == pytest.approx(first)
        assert found.found.differences[0][figure].value == pytest.approx(right[2][figure] - first)
    assert found.found.tests == [None] and "over seeds and images" in compare.text(found)
    twice = compare.measure(answers([runs[0], runs[0]]), draws=50)
    assert twice.seeds == (1, 1), "the same seed is no second sample"
    assert twice.found.tests == [(1.0, 0, 0)]


def test_tables_of_predictions_are_paired_by_image(runs: list[Path], tmp_path: Path) -> None:
    run = RunFolder(runs[2]).evaluation()
    rows = [
        (f"{k}.png", NAMES[label], NAMES[predicted])
        for k, (label, predicted) in enumerate(zip(run.labels, run.predicted, strict=True))
    ]
    paths = []
    for name, order in (("one", rows), ("other", rows[::-1])):
        paths.append(tmp_path / f"{name}.csv")
        with paths[-1].open("w", newline="") as file:
            csv.writer(file).writerows([("image", "true_label", "label_1"), *order])
    one, other = answers(paths)
    assert (compare.aligned(one, other) == one.right).all() and not (other.right == one.right).all()
    moved = replace(one, images=[f"/data/set/{image}" for image in one.images or ()])
    assert (compare.aligned(moved, other) == one.right).all()
    elsewhere = replace(one, images=["new.png", *(one.images or ())[1:]])
    with raises("run.rows", "one", "other"):
        compare.aligned(elsewhere, other)
    mixed = compare.measure([compare.read(runs[0]), one], draws=50)
    assert mixed.found.tests[0] == mcnemar(compare.read(runs[0]).right, one.right)
    assert set(mixed.found.accuracies[0]) == {"top1", "mean_class", "many", "medium", "few"}


def test_other_images_are_refused(runs: list[Path], tmp_path: Path) -> None:
    first, second = answers([runs[0], runs[2]])
    fewer = replace(second, labels=second.labels[1:], right=second.right[1:])
    others = replace(second, labels=[*second.labels[:-1], "cat"])
    elsewhere = replace(second, digest="abc")
    for wrong, naming in ((fewer, "89"), (others, "1 "), (elsewhere, "b")):
        with raises("run.rows", "a", naming):
            compare.measure([replace(first, digest="def"), wrong])
    with raises("run.evaluation", "--checkpoint best", kind=FileNotFoundError):
        compare.read(runs[0], checkpoint="best")
    table = tmp_path / "t.csv"
    table.write_text("image,label_1,true_label\n1.png,cat,\n")
    with raises("run.evaluation", table, "true_label"):
        compare.read(table)
    table.write_text("name\n1.png\n")
    with raises("run.evaluation", "image, label_1, true_label"):
        compare.read(table)


def test_the_command_prints_and_writes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*map(str, runs), "-o", str(tmp_path / "x"), "--json", str(tmp_path / "x.json")]
    assert command.main(words) == 0
    told = capsys.readouterr().out
    assert "a (2 seeds)" in told and "difference" in told and "90 images of 6 classes" in told
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["a (2 seeds)"] * 5 + ["b"] * 5
    (top,) = [row for row in rows if row["run"] == "b" and row["figure"] == "top1"]
    assert float(top["difference_low"]) <= float(top["difference"]) <= float(top["difference_high"])
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["images"], written["checkpoint"], [one["seeds"] for one in written["systems"]]) == (
        90,
        "last",
        [2, 1],
    )
    (against,) = written["comparisons"]
    assert (against["name"], against["to"], against["mcnemar"]) == ("b", "a (2 seeds)", None)
    assert against["differences"]["top1"]["value"] == pytest.approx(float(top["difference"]))
    assert against["holm_p"] == pytest.approx(float(top["holm_p"]))
    assert (tmp_path / "x.png").is_file() and (tmp_path / "x.svg").is_file()
    assert command.main([str(runs[0]), str(runs[1]), "-o", str(tmp_path / "y")]) == 1
    assert command.main([str(runs[0]), str(runs[2]), "--split", "validation", "-o", str(tmp_path / "y")]) == 1
    assert "error[run.evaluation]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([str(runs[0])])
    assert command.main([str(runs[0]), str(runs[2]), "-o", str(tmp_path / "y"), "--json", str(tmp_path)]) == 1
    assert "error[file.kind]" in capsys.readouterr().err and not (tmp_path / "y.csv").exists()
