"""Images of the worst rare classes, and the findings beside the pages, from a folder of images and an evaluation."""

import csv
import json
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rescom_timm.analysis import classes, examples, pages, report
from rescom_timm.analysis.run_files import Missing, RunFolder
from rescom_timm.data.index import Index
from rescom_timm.data.sources import load
from rescom_timm.engine.evaluate import digest_of
from rescom_timm.metrics import Meter
from tests.engine.made_up_run import recipe
from tests.raises import raises

NAMES = ["cat", "dog", "=emu", "<b>fox"]
COUNTS = [25, 21, 3, 2]
TEST = {"cat": 6, "dog": 6, "=emu": 5, "<b>fox": 4}
PREDICTED = [0, 0, 0, 0, 0, 1, *[1] * 6, 0, 0, 1, 2, 2, 3, 3, 3, -1]
"""Of emus one each of three, five in all, is right; a fox has no valid output."""


def save_images(root: Path, split: str, numbers: dict[str, int], suffix: str = ".png") -> Index:
    """Images root/split/k/i.png of one colour each, and their list."""
    names, labels = [], []
    for k, number in enumerate(numbers.values()):
        for i in range(number):
            names.append(f"{split}/{k} & {i}{suffix}")
            labels.append(k)
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20), (60 * k, 10 * i, 200)).save(root / names[-1], "png")
    return Index(names, np.array(labels), len(NAMES), {}, NAMES)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder, root = tmp_path / "run", tmp_path / "images"
    (folder / "evaluation").mkdir(parents=True)
    data = {"source": str(root)}
    for split, numbers in (("train", dict(zip(NAMES, COUNTS, strict=True))), ("test", TEST)):
        save_images(root, split, numbers).save(folder / f"{split}.txt")
        data["index" if split == "train" else "test_index"] = str(folder / f"{split}.txt")
    made = recipe(data=data)
    (folder / "recipe.yaml").write_text(made.to_yaml())
    split = load(made.data).test
    assert split is not None
    logits = torch.full((len(PREDICTED), len(NAMES)), float("nan"))
    for i, k in enumerate(PREDICTED):
        if k >= 0:
            logits[i] = 0.1 * (i + 1) * torch.eye(len(NAMES))[k]
    meter = Meter(len(NAMES), COUNTS)
    meter.update(logits, torch.from_numpy(split.labels))
    about = {"class_names": NAMES, "data": digest_of(split), "chosen": "the last epoch"}
    (folder / "evaluation" / "test-last.json").write_text(json.dumps(about | meter.record()))
    save_file(meter.predictions(), folder / "evaluation" / "test-last.safetensors")
    return folder


def shown(run: Path, *overrides: str) -> list[examples.ClassExamples]:
    return report.find([RunFolder(run)], overrides=overrides).examples


def test_the_worst_rare_classes_have_wrong_and_right_images(run: Path) -> None:
    emu, fox = shown(run)
    assert (emu.name, fox.name) == ("=emu", "<b>fox"), "2 of 5 and 3 of 4: classes of few, the surest failure first"
    assert emu.about == "3 training images, 2 of 5 test images right (11-77%); taken for cat (2), dog (1)"
    assert fox.about == "2 training images, 3 of 4 test images right (30-96%)", "no valid output is no class"
    assert [one.taken_for for one in emu.images] == ["dog", "cat", "cat", "=emu", "=emu"], "by confidence, wrong first"
    assert [one.right for one in emu.images] == [False] * 3 + [True] * 2
    assert [Path(one.image).name for one in emu.images] == [f"2 & {i}.png" for i in (2, 1, 0, 4, 3)]
    assert [one.taken_for for one in fox.images] == ["no valid output", *["<b>fox"] * 3]
    address = urlparse(emu.images[0].thumbnail.address)
    assert address.scheme == "file" and unquote(address.path) == emu.images[0].image


def test_the_page_shows_them_escaped_and_opens_their_files(run: Path) -> None:
    text = report.page([RunFolder(run)], drawn=[])
    assert text.count("data:image/jpeg;base64,") == 9 and text.count('href="file:///') == 9
    assert "2%20%26%202.png" in text and "2 &amp; 2.png" in text and "<b>" not in text
    assert text.index("Conclusions") < text.index("Worst rare classes") < text.index(">Groups</h2>")


def test_a_file_that_a_browser_would_run_is_not_linked(tmp_path: Path) -> None:
    for suffix in (".html", ".svg", ".png"):
        save_images(tmp_path, "x", {"cat": 1}, suffix)
        stored = {"bytes": None, "path": str(tmp_path / "x" / f"0 & 0{suffix}")}
        one = pages.thumbnail(stored, 0, recipe().loader.reading, "cat")
        assert one.jpeg and bool(one.address) == (suffix == ".png")
    assert pages.address_of({"bytes": b"x", "path": stored["path"]}) == "", "the bytes of a table are another image"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert pages.thumbnail({"bytes": None, "path": str(broken)}, 0, recipe().loader.reading, "cat") == ("cat", "", "")


@pytest.mark.parametrize("fault", ["missing", "changed", "recipe"])
def test_without_its_images_the_report_still_comes(run: Path, fault: str) -> None:
    images = run.parent / "images"
    if fault == "missing":
        images.rename(run.parent / "moved")
    elif fault == "changed":
        Image.new("RGB", (40, 20), "white").save(images / "test" / "0 & 0.png")
    else:
        (run / "recipe.yaml").unlink()
    folder = RunFolder(run)
    with raises("plot.images", kind=Missing):
        examples.split_of(folder, folder.evaluation())
    text = report.page([folder], drawn=[])
    assert "No images of the worst classes: " in text and ">Classes</h2>" in text and "image/jpeg" not in text
    if fault == "missing":
        assert len(shown(run, f"data.source={run.parent / 'moved'}")) == 2, "key=value says where they are"


def test_findings_are_written_as_csv_and_json(run: Path, tmp_path: Path) -> None:
    written = report.write([RunFolder(run)], tmp_path / "report.html", drawn=[])
    assert [path.name for path in written] == ["report.html", "report-findings.csv", "report-findings.json"]
    with open(written[1], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows][:2] == ["'=emu", "<b>fox"], "the surest failures first, and no formulas"
    emu = {"training_images": "3", "group": "few", "test_images": "5", "correct": "2", "accuracy_percent": "40.0",
           "taken_for": "cat", "taken_for_images": "2", "interval": ""}  # fmt: skip
    assert {key: rows[0][key] for key in emu} == emu
    record = json.loads(written[2].read_text())
    assert record["runs"][0]["conclusions"] and record["runs"][0]["confusions"][0]["images"] == 2
    first = record["worst_classes"][0]
    assert first["name"] == "=emu" and first["images"][0].keys() == {"image", "row", "taken_for", "confidence", "right"}


def test_verdicts_of_intervals() -> None:
    found = classes.Classes(
        np.array([40, 40, 4, 0]), np.array([39, 10, 0, 0]), *(np.full(4, np.nan) for _ in range(5)),
        np.full(4, -1), np.zeros(4, int), 58.0,
    )  # fmt: skip
    low, high = np.array([87.0, 14, 0, np.nan]), np.array([99.0, 40, 49, np.nan])
    found = classes.Classes(**{**vars(found), "low": low, "high": high})
    assert found.verdict.tolist() == ["high", "low", "low", ""] and found.worst_first.tolist() == [1, 2, 0, 3]
