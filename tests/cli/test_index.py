"""rescom-timm index ... and rescom-timm init, run as users run them."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from rescom_timm.__main__ import main
from rescom_timm.api import train_recipe
from rescom_timm.class_names import nfc
from rescom_timm.config import loading as recipe
from rescom_timm.data.digits import digits
from rescom_timm.data.index import Index
from rescom_timm.data.sources import load
from tests.raises import exits

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)

    def go(*words: object) -> tuple[int, str]:
        code = main([str(word) for word in words])
        out = capsys.readouterr()
        return code, out.out + out.err

    return go


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the measured step of `init`, which takes seconds; see test_init.py."""
    monkeypatch.setattr("rescom_timm.cli.parts.init.training_time", lambda recipe, wanted: "not measured")


def write(path: str, text: str) -> str:
    Path(path).write_text(text, encoding="utf-8")
    return path


def photos(root: Path, counts: dict[str, int], side: int = 96) -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            out = io.BytesIO()
            Image.new("RGB", (side + 8, side), (i, 0, 0)).save(out, "png")
            (root / name / f"{i:03d}.png").write_bytes(out.getvalue())


def test_make_from_a_data_set(run: Run) -> None:
    code, said = run("index", "make", "digits", "exponential(20)", "-o", "d.txt")
    index = Index.load("d.txt")
    assert code == 0 and f"d.txt: {len(index):,} rows of 10 classes, sha256 {index.sha256}" in said
    assert index.info == {"source": "digits", "split": "train", "rule": "exponential(20)"}
    assert index.counts[0] > 100 and index.counts[9] == 6
    assert run("index", "check", "d.txt", "--source", "digits")[0] == 0


def test_make_from_labels_or_a_list(run: Run) -> None:
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(100), 500))
    write("labels.txt", "\n".join(map(str, labels)))
    for factor, size in ((100, 10_847), (50, 12_608), (10, 19_573)):
        rule = f"exponential({factor})"
        assert run("index", "make", "uoft-cs/cifar100", rule, "--labels", "labels.txt", "-o", "c.txt")[0] == 0
        assert len(Index.load("c.txt")) == size and Index.load("c.txt").info["source"] == "uoft-cs/cifar100"
    write("list.txt", "".join(f"c{i % 2}/{i}.jpg {i % 2}\n" for i in range(40)))
    assert run("index", "make", "list.txt", "step(4)", "-o", "l.txt")[0] == 0
    assert Index.load("l.txt").counts.tolist() == [20, 5] and Index.load("l.txt").by_path
    write("labels.txt", "0 1 x")
    code, said = run("index", "make", "a/b", "step(2)", "--labels", "labels.txt", "-o", "n.txt")
    assert code == 1 and "label number 3, 'x'" in said and not Path("n.txt").exists()


def test_make_refuses_a_mistyped_rule(run: Run) -> None:
    code, said = run("index", "make", "digits", "exponental(20)", "-o", "d.txt")
    assert code == 1 and "did you mean exponential(20)?" in said and not Path("d.txt").exists()


def test_convert(run: Run) -> None:
    content = {
        "images": [{"id": 3, "file_name": "a/x.jpg"}, {"id": 4, "file_name": "b/y.jpg"}],
        "annotations": [{"image_id": 4, "category_id": 1}, {"image_id": 3, "category_id": 0}],
    }
    write("train2018.json", json.dumps(content))
    assert run("index", "convert", "train2018.json", "-o", "t.txt")[0] == 0
    assert Index.load("t.txt").keys == ["b/y.jpg", "a/x.jpg"]
    assert Index.load("t.txt").info["rule"] == "converted from train2018.json"
    write("names.txt", "Apis mellifera\nBufo bufo\n")
    write("list.txt", "q/1.jpg 0\nq/2.jpg 1\n")
    assert run("index", "convert", "list.txt", "-o", "t.txt", "--names", "names.txt")[0] == 0
    assert Index.load("t.txt").class_names == ["Apis mellifera", "Bufo bufo"]
    write("names.txt", "Apis mellifera\n")
    assert "1 class name for 2 classes" in run("index", "convert", "list.txt", "-o", "t.txt", "--names", "names.txt")[1]


def test_check_says_everything(run: Run) -> None:
    write("bad.txt", "a/1.jpg 0\na/1.jpg 0\nb/2.jpg two\n\nc/3.jpg 7\n")
    code, said = run("index", "check", "bad.txt", "--classes", 4)
    assert code == 3 and said.count("bad.txt: ") == 5
    for words in (
        "line 2: 'a/1.jpg' is already in line 1",
        "line 3: label 'two'",
        "line 4 is empty",
        "line 5: label 7 is outside 0 .. 3",
        "3 of 4 classes have no image: 1, 2, 3",
    ):
        assert words in said
    assert "and 3 more errors" in run("index", "check", "bad.txt", "--classes", 4, "--lines", 2)[1]
    assert run("index", "check", "absent.txt") == (1, "error[file.missing]: no index file absent.txt\n")


def test_check_against_images_and_data(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p", {"a": 2, "b": 1}, side=4)
    write("good.txt", "a/000.png 0\na/001.png 0\nb/000.png 1\n")
    assert run("index", "check", "good.txt", "--source", "p")[0] == 0
    write("less.txt", "a/000.png 0\na/009.png 0\nb/000.png 1\n")
    code, said = run("index", "check", "less.txt", "--source", "p")
    assert code == 3 and "1 of 3 images of less.txt are not under p" in said and "a/009.png" in said
    write("test.txt", "b/000.png 1\n")
    assert run("index", "check", "test.txt", "--source", "p")[0] == 3
    assert run("index", "check", "test.txt", "--source", "p", "--allow-empty")[0] == 0
    Index(np.arange(10), np.roll(np.arange(10), 1), 10).save("rows.txt")
    code, said = run("index", "check", "rows.txt", "--source", "digits")
    assert code == 3 and "disagree on" in said


def test_check_decodes_the_images(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    photos(tmp_path / "p", {"a": 3, "b": 2}, side=8)
    write("l.txt", "a/000.png 0\na/001.png 0\na/002.png 0\nb/000.png 1\nb/001.png 1\n")
    assert "2 classes, images not checked, sha256" in run("index", "check", "l.txt")[1]
    code, said = run("index", "check", "l.txt", "--source", "p", "--decode")
    assert code == 0 and "2 classes, all images decoded, sha256" in said
    for name, content in (
        ("a/001", b""),
        ("a/002", b"some text"),
        ("b/000", (tmp_path / "p/b/000.png").read_bytes()[:50]),
    ):
        (tmp_path / "p" / f"{name}.png").write_bytes(content)
    assert "images found but not decoded" in run("index", "check", "l.txt", "--source", "p")[1]
    code, said = run("index", "check", "l.txt", "--source", "p", "--decode")
    assert code == 3 and said.count("l.txt: cannot read the image of row") == 3 and "good" not in said
    assert "row 1 (p/a/001.png)" in said and "row 2 (p/a/002.png)" in said and "row 3 (p/b/000.png)" in said
    with exits(2):
        run("index", "check", "l.txt", "--decode")
    assert "--source" in capsys.readouterr().err
    assert (
        "all images decoded"
        in run("index", "make", "digits", "step(2)", "-o", "d.txt")[1]
        + run("index", "check", "d.txt", "--source", "digits", "--decode")[1]
    )


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    write(str(tmp_path / "l.txt"), "".join(f"a/{i}.jpg {i % 2}\n" for i in range(40)))
    command = [sys.executable, "-m", "rescom_timm", "index", "describe", str(tmp_path / "l.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_describe(run: Run, tmp_path: Path) -> None:
    write("l.txt", "".join(f"a/{i}.jpg 0\n" for i in range(120)) + "b/1.jpg 1\n")
    code, said = run("index", "describe", "l.txt", "--png", "tail.png")
    assert code == 0 and "121 rows, 2 classes, 120 to 1 a class, imbalance 120" in said
    assert f"sha256: {Index.load('l.txt').sha256}" in said and "many: 1 class, 120 rows" in said
    with Image.open("tail.png") as picture:
        assert picture.size == (1200, 600) and len(picture.convert("RGB").getcolors(10**6) or []) > 10


def test_published_lists(run: Run, shared_lists: Path) -> None:
    code, said = run("index", "describe", shared_lists / "Places_LT_train.txt")
    assert code == 0 and "62,500 rows, 365 classes, 4,980 to 5 a class, imbalance 996" in said
    for group in ("many: 131 classes", "medium: 163 classes", "few: 71 classes"):
        assert group in said
    said = run("index", "describe", shared_lists / "ImageNet_LT_train_class_counts.json")[1]
    for group in ("115,846 rows", "many: 385 classes", "medium: 479 classes", "few: 136 classes"):
        assert group in said
    assert run("index", "check", shared_lists / "Places_LT_train.txt", "--classes", 365)[0] == 0
    both = (shared_lists / "Places_LT_train.txt", shared_lists / "Places_LT_val.txt")
    assert run("index", "overlap", *both)[0] == 0


def test_overlap(run: Run) -> None:
    write("a.txt", "x/1.jpg 0\nx/2.jpg 0\n")
    write("b.txt", "x/2.jpg 0\nx/3.jpg 0\n")
    code, said = run("index", "overlap", "a.txt", "b.txt")
    assert code == 3 and said == "1 images are in both a.txt and b.txt\nx/2.jpg\n"


def test_init_from_class_folders(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "my photos", {"10": 30, "9": 12, "2": 5})
    write("my photos/9/readme.txt", "x")
    code, said = run("init", "my photos", "-o", "mine.yaml")
    assert code == 0 and "my photos are no images and left out: 9/readme.txt" in said
    made = recipe.load("mine.yaml")
    data = load(made.data)
    assert data.class_names == ["2", "9", "10"]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 6]  # a fifth, of five images or more at least two
    assert data.validation is not None and len(data.validation.rows) == 3
    assert data.counts.tolist() == [3, 9, 22] and made.method.name == "balanced_softmax"
    assert made.evaluation.select == "mean_class" and "rescom-timm fit" in said
    assert made.net.pretrained and made.net.classifier.init == "class_means"
    text = Path("mine.yaml").read_text()
    assert "34 training images of 3 classes, 22 to 3 a class" in text
    reasons = [line for line in said.splitlines() if line.startswith(("net: ", "size: ", "head: ", "method: "))]
    assert len(reasons) == 4 and all(f"# {line}" in text for line in reasons)
    assert "test: 2 of 3 classes have fewer than 5 images" in said and "validation: 1 of 3 classes" in said
    before = text
    code, said = run("init", "my photos", "-o", "mine.yaml")
    assert code == 1 and "mine.yaml, mine_train.txt, mine_test.txt would be overwritten" in said
    assert Path("mine.yaml").read_text() == before
    assert run("init", "my photos", "-o", "mine.yaml", "--force", "--imbalance", 4)[0] == 0
    assert Index.load("mine_train.txt").info["rule"].endswith("exponential(4) by count")


@pytest.mark.parametrize("tuning", ["lora", "adaptformer", "prompt"])
def test_init_for_few_weights_over_a_frozen_vit(run: Run, tmp_path: Path, tuning: str) -> None:
    photos(tmp_path / "p", {"a": 20, "b": 16})
    assert run("init", "p", "-o", "p.yaml", "--tune", tuning)[0] == 0
    made = recipe.load("p.yaml")
    assert made.net.tuning.name == tuning and made.net.pretrained and made.net.backbone.startswith("vit_")
    assert made.net.classifier.init == "class_means" and made.train.epochs == 10
    assert made.method.name == "cross_entropy" and "less than 2% of the weights" in Path("p.yaml").read_text()
    words = ["net.backbone=test_vit", "net.options={img_size: 224}", "net.pretrained=false", "net.projector.hidden=8"]
    train_recipe(recipe.load("p.yaml", [*words, "speed.workers=0", "train.batch_size=4"]), dry_run=True)


def test_init_leaves_hidden_files_out_and_asks_for_no_larger_batch_than_there_are_images(
    run: Run, tmp_path: Path
) -> None:
    photos(tmp_path / "p", {"a": 20, "b": 16})
    for hidden in ("a/._000.png", "b/.cache/000.png", ".thumbnails/000.png"):
        (tmp_path / "p" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "p" / hidden).write_bytes(b"no image")
    code, said = run("init", "p", "-o", "p.yaml")
    assert code == 0 and "no images" not in said
    made = recipe.load("p.yaml")
    assert load(made.data).counts.tolist() == [14, 12] and made.train.batch_size == 16
    assert not any("/." in key for key in Index.load("p_train.txt").keys)


def test_init_writes_nothing_where_it_fails(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p", {"a": 6, "b": 6})
    for broken in (tmp_path / "p" / "a").iterdir():
        broken.write_bytes(broken.read_bytes()[:60])
    code, said = run("init", "p", "-o", "p.yaml")
    assert (
        code == 1 and f"({broken.parent}/000.png)" in said and "6 images cannot be read; repair or remove them" in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["p"], "nothing is written, so a repeat is not refused"
    shutil.rmtree(broken.parent)
    photos(tmp_path / "p", {"a": 6})
    assert run("init", "p", "-o", "p.yaml")[0] == 0


def test_init_keeps_the_frequent_classes_frequent(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p" / "train", {"cat": 5, "cow": 13, "dog": 24})
    photos(tmp_path / "p" / "test", {"cat": 1, "dog": 1})
    assert run("init", "p", "-o", "p.yaml", "--imbalance", 4, "--validation", "none")[0] == 0
    assert Index.load("p_train.txt").counts.tolist() == [5, 12, 24]
    code, said = run("init", "p", "-o", "q.yaml", "--imbalance", 30)
    assert code == 1 and "leaves class 0 without a row (24 rows at most, over 30)" in said


def test_a_made_recipe_runs_from_anywhere(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    photos(home / "photos", {"a": 6, "b": 6})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    code, said = run("init", "photos", "-o", "~/my recipes/p.yaml")
    assert code == 0 and f"rescom-timm train '{home}/my recipes/p.yaml'" in said and not Path("~").exists()
    text = Path("my recipes/p.yaml").read_text() + Path("my recipes/p_train.txt").read_text()
    assert str(home) not in text and "~/photos" in text
    monkeypatch.chdir(tmp_path)
    made = recipe.load(home / "my recipes" / "p.yaml")
    assert made.data.index == "~/my recipes/p_train.txt" and load(made.data).counts.tolist() == [4, 4]


def test_init_from_train_and_val_folders(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p" / "train", {"cat": 6, "dog": 4}, side=32)
    photos(tmp_path / "p" / "val", {"cat": 2, "dog": 2}, side=32)
    assert run("init", "p", "-o", "p.yaml", "--validation", "none")[0] == 0
    made = recipe.load("p.yaml")
    data = load(made.data)
    assert data.counts.tolist() == [6, 4] and len(data.test.rows) == 4 and data.validation is None
    assert Index.load("p_test.txt").keys[0] == "val/cat/000.png" and made.net.backbone == "resnet32_cifar"
    photos(tmp_path / "p" / "val", {"cow": 1})
    code, said = run("init", "p", "-o", "q.yaml")
    assert code == 1 and "p/val has classes that train lacks: cow" in said and not Path("q.yaml").exists()


def test_init_from_train_val_and_test_folders(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p" / "train", {"cat": 6, "cow": 5, "dog": 4})
    photos(tmp_path / "p" / "val", {"cow": 1, "dog": 2})
    photos(tmp_path / "p" / "test", {"cat": 2, "dog": 2})
    assert run("init", "p", "-o", "p.yaml")[0] == 0
    data = load(recipe.load("p.yaml").data)
    assert data.validation is not None and np.bincount(data.validation.labels).tolist() == [0, 1, 2]
    assert data.counts.tolist() == [6, 5, 4] and np.bincount(data.test.labels).tolist() == [2, 0, 2]
    assert Index.load("p_validation.txt", allow_empty=True).keys[0] == "val/cow/000.png"
    assert run("init", "p", "-o", "q.yaml", "--validation", "none")[0] == 0
    assert load(recipe.load("q.yaml").data).validation is None and not Path("q_validation.txt").exists()


def test_init_from_a_data_set(run: Run, tmp_path: Path) -> None:
    assert run("init", "digits", "-o", "d.yaml", "--imbalance", 20, "--validation", "unused(20)")[0] == 0
    made = recipe.load("d.yaml")
    assert made.data.source == "digits" and made.data.index == f"{tmp_path}/d_train.txt"
    assert made.data.test_index == "all"
    data = load(made.data)
    assert data.counts.tolist() == Index.load("d_train.txt").counts.tolist() and len(data.test.rows) == 500
    assert not Path("d_test.txt").exists()
    assert run("init", "digits", "-o", "e.yaml", "--test-split", "train")[0] == 0  # a fifth of train for testing
    part = load(recipe.load("e.yaml").data)
    assert part.provenance["test"]["split"] == "train" and 255 < len(part.test.rows) < 265


def test_init_of_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "holds 0 class folders" in run("init", "none", "-o", "n.yaml")[1]
    assert "no folder" in run("init", "./absent", "-o", "n.yaml")[1]
    assert not list(tmp_path.glob("n*.*"))


def listed(root: Path, count: int = 12, **columns: object) -> pd.DataFrame:
    """Images of three classes below root, and the table of them."""
    photos(root, {"x": count})
    names = [f"x/{k:03}.png" for k in range(count)]
    return pd.DataFrame({"image": names, "species": list("abc") * (count // 3), **columns})


@pytest.mark.parametrize("place", ["said", "in the folder"])
def test_init_of_a_folder_with_a_list(run: Run, tmp_path: Path, place: str) -> None:
    table = listed(tmp_path / "p")
    table.to_csv(tmp_path / ("l.csv" if place == "said" else "p/metadata.csv"), index=False)
    code, said = run("init", "p", "-o", "p.yaml", *(["--list", "l.csv"] if place == "said" else []))
    assert code == 0 and "columns image, species; 3 classes in sorted order" in said, said
    data = load(recipe.load(tmp_path / "p.yaml").data)
    assert data.class_names == ["a", "b", "c"] and len(data.test.labels) == 3
    assert data.validation is None and "no class is large enough for validation images" in said


@pytest.mark.parametrize("labels", ["abc", "012"], ids=["names", "numbers"])
def test_init_of_split_folders_with_a_list_each(run: Run, tmp_path: Path, labels: str) -> None:
    for split, of in (("train", list(labels) * 10), ("val", list(labels[1:]) * 3)):  # val lacks the first class
        photos(tmp_path / "p", {split: len(of)})
        table = pd.DataFrame({"file_name": [f"{k:03}.png" for k in range(len(of))], "label": of})
        table.to_csv(tmp_path / "p" / split / "metadata.csv", index=False)
    code, said = run("init", "p", "-o", "p.yaml")
    assert code == 0, said
    data = load(recipe.load(tmp_path / "p.yaml").data)
    assert data.test.labels.tolist() == [1, 2] * 3 and data.test.dataset[0]["image"]["path"].endswith("p/val/000.png")
    assert data.counts.tolist() == [9, 9, 9] and data.validation is not None
    shutil.rmtree(tmp_path / "p/val")
    assert run("init", "p", "-o", "q.yaml")[0] == 0
    assert [len(Index.load(tmp_path / f"q_{part}.txt")) for part in ("train", "test")] == [24, 6]


def test_init_keeps_the_splits_of_a_list_and_groups_together(run: Run, tmp_path: Path) -> None:
    table = listed(tmp_path / "p", split=["train"] * 6 + ["val"] * 3 + ["test"] * 3)
    table.to_json(tmp_path / "l.jsonl", orient="records", lines=True)
    code, said = run("init", "p", "-o", "p.yaml", "--list", "l.jsonl")
    assert code == 0, said
    counts = {part: len(Index.load(tmp_path / f"p_{part}.txt")) for part in ("train", "validation", "test")}
    assert counts == {"train": 6, "validation": 3, "test": 3}
    assert load(recipe.load(tmp_path / "p.yaml").data).validation is not None
    patients = [f"p{k // 2}" for k in range(60)]
    listed(tmp_path / "q", 60, patient=patients).to_csv(tmp_path / "g.csv", index=False)
    code, said = run("init", "q", "-o", "g.yaml", "--list", "g.csv", "--group-column", "patient")
    assert code == 0, said
    sides = []
    for part in ("train", "validation", "test"):
        keys = Index.load(tmp_path / f"g_{part}.txt", allow_empty=True).keys
        sides.append({patients[int(Path(str(key)).stem)] for key in keys})
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == 30


def test_init_names_all_broken_images_at_once_and_leaves_them_out(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p", {"a": 12, "b": 12})
    bad = [f"a/{k:03}" for k in (0, 3, 5, 7, 9, 11)] + ["b/001"]  # of all three parts
    for k, name in enumerate(bad):
        path = tmp_path / "p" / f"{name}.png"
        path.write_bytes((b"", b"some text", path.read_bytes()[:50])[k % 3])
    code, said = run("init", "p", "-o", "p.yaml")
    assert code == 1 and "7 images cannot be read" in said and all(f"{name}.png" in said for name in bad), said
    assert "--leave-out" in said and not (tmp_path / "p.yaml").exists()
    code, said = run("init", "p", "-o", "p.yaml", "--leave-out")
    assert code == 0 and "left out in all" in said, said
    indexes = [Index.load(tmp_path / f"p_{part}.txt") for part in ("train", "test")]
    assert sum(map(len, indexes)) == 17
    kept = {str(key) for index in indexes for key in index.keys}
    assert not kept & {f"{name}.png" for name in bad}
    told = ", ".join(index.info.get("left out", "") for index in indexes)
    assert all(f"{name}.png" in told for name in bad), "the lists say what they lack"


def test_check_writes_the_list_without_broken_images(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p", {"a": 3, "b": 3})
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{k}/00{i}.png,{k}\n" for k in "ab" for i in range(3)))
    (tmp_path / "p/a/001.png").write_bytes(b"")
    assert run("index", "check", "l.csv", "--source", "p", "-o", "good.txt")[0] == 0
    good = Index.load(tmp_path / "good.txt")
    assert len(good) == 5 and good.info["left out"] == "a/001.png" and good.class_names == ["a", "b"]


def test_init_of_a_data_set_without_a_test_split_parts_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    digits("train").select(range(200)).to_parquet(tmp_path / "d/train-00000-of-00001.parquet")
    code, said = run("init", "d", "-o", "d.yaml")
    assert code == 0 and "no split 'test': a fifth of each class is kept for testing" in said, said
    data = load(recipe.load(tmp_path / "d.yaml").data)
    assert len(data.test.labels) == pytest.approx(40, abs=4)


@pytest.mark.parametrize(
    ("sides", "backbone"),
    [
        ({"a": (40, 48), "b": (12, 300), "c": (12, 300), "d": (12, 300)}, "tf_efficientnet_lite0.in1k"),  # icons first
        ({"a": (12, 300), "b": (12, 300), "c": (12, 300), "d": (40, 48)}, "tf_efficientnet_lite0.in1k"),  # icons last
        ({"a": (40, 300), "b": (12, 48), "c": (12, 48), "d": (60, 48)}, "resnet32_cifar"),  # photographs first
    ],
)
def test_init_judges_the_size_of_images_by_all_classes(
    run: Run, tmp_path: Path, sides: dict[str, tuple[int, int]], backbone: str
) -> None:
    for name, (count, side) in sides.items():
        photos(tmp_path / "p", {name: count}, side)
    code, said = run("init", "p", "-o", "p.yaml")
    made = recipe.load("p.yaml")
    assert code == 0 and made.net.backbone == backbone, said
    assert "shorter sides have 48 to 300 pixels" in Path("p.yaml").read_text()
    assert ("48" in made.views.eval) == (backbone == "resnet32_cifar")


def test_init_follows_links_and_names_everything_that_it_leaves_out(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p", {"cat": 6, "dog": 6})
    photos(tmp_path / "disk", {"more": 4, "more/deep": 2, "cow": 5})
    (tmp_path / "p/cow").symlink_to("../disk/cow")  # a class
    (tmp_path / "p/cat/more").symlink_to(tmp_path / "disk/more")  # a folder below a class
    (tmp_path / "p/cat/again").symlink_to(tmp_path / "disk/more")
    (tmp_path / "disk/more/deep/up").symlink_to("..")
    (tmp_path / "p/dog/all").symlink_to("../..")  # p itself is within
    (tmp_path / "p/dog/gone").symlink_to("/none/dogs")
    (tmp_path / "p/__MACOSX").mkdir()
    for name in ("p/loose.png", "p/dog/notes.txt", "p/dog/.DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    code, said = run("init", "p", "-o", "p.yaml")
    counts = sum(Index.load(f"p_{part}.txt").counts for part in ("train", "test"))
    assert code == 0 and counts.tolist() == [12, 5, 6], said
    told = {line.partition(" and left out: ")[2] for line in said.splitlines() if "left out" in line}
    assert told == {
        "cat/more, cat/again/deep/up, dog/all", "dog/gone", "__MACOSX", "loose.png", "dog/notes.txt", "dog/.DS_Store",
    }, said  # fmt: skip
    (tmp_path / "p/eel").symlink_to("/none/eel")
    code, said = run("init", "p", "-o", "q.yaml")
    assert code == 1 and "p/eel is a link to /none/eel, which is not there: mount its disk" in said


@pytest.mark.parametrize(
    ("folders", "link", "to"), [("a b", "c", "a"), ("train/a train/b", "test", "train"), ("a b train/c", "b2", "b")]
)
def test_init_refuses_a_folder_under_two_names(run: Run, tmp_path: Path, folders: str, link: str, to: str) -> None:
    for folder in folders.split():
        (tmp_path / "in" / folder).mkdir(parents=True)
        for n in range(4):
            Image.new("RGB", (40, 40), (n, 0, 0)).save(tmp_path / "in" / folder / f"{n}.png")
    (tmp_path / "in" / link).symlink_to(to)
    code, error = run("init", str(tmp_path / "in"), "-o", str(tmp_path / "my.yaml"))
    assert code == 1 and "under two names" in error and to in error and not (tmp_path / "my.yaml").exists()


def test_init_names_folders_and_rows_that_it_does_not_read(run: Run, tmp_path: Path) -> None:
    for split in ("train", "test", "val", "validation", "extra"):
        photos(tmp_path / "p" / split, {"cat": 5, "dog": 5})
    code, said = run("init", "p", "-o", "p.yaml")
    assert code == 0 and "p are in no folder that is read and left out: extra, val" in said, said
    code, said = run("init", "p", "-o", "q.yaml", "--validation", "none")
    assert code == 0 and "left out: extra, val, validation" in said, said
    table = listed(tmp_path / "q", 24, split=["train"] * 15 + ["val"] * 3 + ["unlabelled"] * 6)[:22]
    table.to_csv(tmp_path / "l.csv", index=False)
    code, said = run("init", "q", "-o", "l.yaml", "--list", "l.csv")
    assert code == 0 and "4 rows of split 'unlabelled' are left out" in said, said
    assert (
        "/q are images of no row in use and left out: x/015.png" in said
        or "/q are images of no row in use and left out: x/018.png" in said
    ), said
    assert len(Index.load("l_validation.txt")) == 3, "rows of validation are used, though there are none of test"
    (tmp_path / "p/test").rename(tmp_path / "elsewhere")
    (tmp_path / "p/test").symlink_to("nowhere")
    assert "p/test is a link to nowhere, which is not there" in run("init", "p", "-o", "r.yaml")[1]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "p", {"cat": 5, "dog": 5, "dog/more": 5})
    scan = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", refusing)
    code, said = run("init", "p", "-o", "p.yaml")
    assert code == 1 and "p/dog/more" in said and "Permission denied" in said


NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_folders_and_lists_meet_whatever_the_unicode_form_of_their_names(run: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p/train", {NFD: 6, "tea": 6})
    photos(tmp_path / "p/test", {NFC: 3, "tea": 1})
    code, said = run("init", "p", "-o", "p.yaml", "--validation", "none")
    assert code == 0, said
    data = load(recipe.load("p.yaml").data)
    assert data.class_names == [NFD, "tea"] and data.test.labels.tolist() == [0, 0, 0, 1]
    photos(tmp_path / "q", {NFD: 6, "tea": 6})
    (tmp_path / "q/tea/000.png").rename(tmp_path / f"q/tea/{NFC}.png")
    rows = [f"x/{NFC}/{k:03}.png,{NFC}" for k in range(6)] + [f"x/tea/{NFD}.png,tea"]
    write("l.csv", "\n".join(["path,label", *rows, *(f"x/tea/{k:03}.png,tea" for k in range(1, 6))]))
    code, said = run("init", "q", "-o", "q.yaml", "--list", "l.csv")
    assert code == 0 and "left out" not in said, said
    assert {nfc(str(key)) for part in ("train", "test") for key in Index.load(f"q_{part}.txt").keys} == {
        *(f"{NFC}/{k:03}.png" for k in range(6)), *(f"tea/{k:03}.png" for k in range(1, 6)), f"tea/{NFC}.png",
    }  # fmt: skip
    assert load(recipe.load("q.yaml").data).class_names == [NFC, "tea"]
    write("a.txt", f"{NFC}/1.png 0\n")
    write("b.txt", f"{NFD}/1.png 0\n{NFD}/2.png 0\n")
    assert run("index", "overlap", "a.txt", "b.txt")[0] == 3
    photos(tmp_path / "r", {NFD: 6, "tea": 6, NFC: 5})
    code, said = run("init", "r", "-o", "r.yaml")
    assert code == 0 and "another Unicode form are one class" in said, said
    assert sum(Index.load(f"r_{part}.txt").counts for part in ("train", "test")).tolist() == [11, 6]


@pytest.mark.parametrize("each", [2, 3, 4])
def test_init_holds_nothing_out_of_classes_of_a_few_images(run: Run, tmp_path: Path, each: int) -> None:
    labels = np.repeat(np.arange(30), each)
    images = [{"bytes": digits("train")[0]["image"]["bytes"], "path": None}] * len(labels)
    features = digits("train").features | {"label": Value("int64")}
    whole = Dataset.from_dict({"image": images, "label": labels}, features=Features(features))
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        whole.to_parquet(tmp_path / f"d/{split}-00000-of-00001.parquet")
    code, said = run("init", "d", "-o", "d.yaml")
    assert code == 0 and "no class is large enough for validation images" in said, said
    made = recipe.load("d.yaml")
    assert made.data.validation == "none" and load(made.data).counts.tolist() == [each] * 30
    (tmp_path / "d/test-00000-of-00001.parquet").unlink()
    code, said = run("init", "d", "-o", "e.yaml")
    assert "holdout(0.1)" not in said
    assert code == (1 if each < 3 else 0) and ("no class has three images" in said) == (each < 3), said
