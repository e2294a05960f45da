"""The doctor finds what was put into a made-up data set, and nothing else."""

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from rescom_timm.analysis.doctor_page import COLUMNS, GROUPS_SHOWN, as_text, page, write
from rescom_timm.data.doctor import (
    Examined,
    Finding,
    disputed,
    exact_duplicates,
    examine,
    findings,
    near_duplicates,
)
from rescom_timm.data.splits import Split
from tests.data.test_decoding import png

NAMES = ["cat", "dog", "Dog ", "<b>&eel"]


def scene(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A picture with large and small structure, in colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.fromarray((0.9 * np.asarray(coarse) + rng.integers(0, 25, (height, width, 3))).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "png", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def split_of(name: str, rows: list[tuple[str, bytes, int]]) -> Split:
    images = [{"bytes": content, "path": path} for path, content, _ in rows]
    features = Features(image=ImageFeature(decode=False), label=Value("int64"))
    labels = np.array([label for _, _, label in rows], dtype=np.int64)
    dataset = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return Split(name, dataset, labels, np.arange(len(rows)))


@pytest.fixture(scope="module")
def images() -> Examined:
    train = [(f"good{k}.png", encoded(scene(k)), k % 2) for k in range(12)]
    train += [
        ("twice.png", encoded(scene(0)), 0),  # good0 again
        ("torn.png", encoded(scene(3)), 0),  # good3, of class 1, under another label
        ("tiny.png", encoded(scene(50, 12, 12)), 1),
        ("flat.png", encoded(Image.new("RGB", (96, 80), (9, 90, 200))), 1),
        ("grey.png", encoded(scene(51).convert("L")), 1),
        ("long.png", encoded(scene(52, 400, 80)), 1),
        ("broken.png", encoded(scene(53))[:200], 1),
    ]
    train += [(f"rare{k}.png", encoded(scene(60 + k)), 2) for k in range(2)]
    train += [(f"other{k}.png", encoded(scene(70 + k)), 3) for k in range(6)]
    test = [("test0.png", encoded(scene(80)), 0), ("test1.png", encoded(scene(81)), 1)]
    test += [
        ("leak.jpg", encoded(scene(5), "jpeg", quality=60), 1),  # good5 compressed
        ("same.bmp", encoded(scene(4), "bmp"), 0),  # good4 in another format
    ]
    return examine({"train": split_of("a train", train), "test": split_of("a test", test)})


def named(images: Examined, finding: Finding) -> list[list[str]]:
    return [[images.name[i] for i in group] for group in finding.groups]


def test_it_finds_what_is_there_and_nothing_else(images: Examined) -> None:
    counts = np.bincount(images.label[images.split == "train"], minlength=4)
    found = {finding.key: finding for finding in findings(images, NAMES, counts)}
    assert {key: named(images, finding) for key, finding in found.items() if finding.groups} == {
        "broken": [["broken.png"]],
        "exact_leak": [["good4.png", "same.bmp"]],
        "exact_label": [["good3.png", "torn.png"]],
        "exact_twice": [["good0.png", "twice.png"]],
        "near_leak": [["good5.png", "leak.jpg"]],
        "tiny": [["tiny.png"]],
        "flat": [["flat.png"]],
        "gray": [["grey.png"]],
        "shape": [["long.png"]],
    }
    assert {key: finding.lines for key, finding in found.items() if finding.lines} == {
        "small": ("Dog : 2 training images",),
        "absent_test": ("Dog ", "<b>&eel"),
        "names": ("'dog', 'Dog '",),
    }


def test_a_good_data_set_has_no_finding() -> None:
    rows = [(f"{k}.png", encoded(scene(k)), k % 2) for k in range(12)]
    images = examine(
        {"train": split_of("a", rows), "test": split_of("b", [(f"t{k}", encoded(scene(90 + k)), k) for k in (0, 1)])}
    )
    assert findings(images, ["a", "b"], np.array([6, 6])) == []
    assert as_text(images, [], ["a", "b"]) == "nothing found"


def test_near_duplicates_are_those_of_every_pair() -> None:
    """Against all pairs of naive loops, on hashes of which many are near."""
    rng = np.random.default_rng(1)
    hashed = rng.random((12, 64)) < 0.5
    hashed = np.concatenate([hashed, *[hashed ^ (rng.random((12, 64)) < share) for share in (0.02, 0.06, 0.1)]])
    count = len(hashed)
    nothing = np.zeros((count, 16, 16), np.uint8)
    images = Examined(
        {}, np.array(["train"] * count), np.arange(count), np.zeros(count, int), [""] * count, np.ones((count, 2), int),
        np.array([b""] * count, dtype=object), hashed, nothing, np.zeros(count, bool), np.zeros(count, bool), {},
    )  # fmt: skip
    near = {(a, b) for a in range(count) for b in range(a + 1, count) if (hashed[a] != hashed[b]).sum() <= 4}
    reached = {k: {k} for k in range(count)}
    for a, b in sorted(near):
        union = reached[a] | reached[b]
        for k in union:
            reached[k] = union
    expected = {tuple(sorted(group)) for group in reached.values() if len(group) > 1}
    assert len(expected) > 5
    assert {tuple(sorted(group)) for group in near_duplicates(images)} == expected
    assert exact_duplicates(images) == []


def test_the_page_opens_offline_is_bounded_and_escapes(images: Examined) -> None:
    many = Finding("many", "T <i>", "A & B", [[0]] * (GROUPS_SHOWN + 7), ("line <script>",))
    text = page(images, [many, Finding("one", "O", "B", [[18], [30]])], NAMES, "data <x>")
    assert text.count("data:image/jpeg;base64,") == GROUPS_SHOWN + 1, "a broken image has a caption alone"
    assert "and 7 more." in text and "<script>" not in text and "T <i>" not in text and "data <x>" not in text
    assert "http" not in text and 'src="data:' in text
    assert "&lt;b&gt;&amp;eel" in page(images, [Finding("one", "O", "B", [[22]])], NAMES, "t")


def test_findings_as_csv_and_json(images: Examined, tmp_path: Path) -> None:
    found = [
        Finding("twice", "Twice", "A", [[0, 12], [30]], notes=("=1+1", "odd")),
        Finding("broken", "Unreadable", "B", [[18]]),
        Finding("names", "Names", "C", [], ("'cat', 'Cat'",)),
    ]
    paths = write(tmp_path / "d.html", images, found, NAMES, "t")
    assert [path.name for path in paths] == ["d.html", "d-findings.csv", "d-findings.json"]
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["0", "0", "1", "0", "0"] and tuple(rows[0]) == COLUMNS
    assert [rows[0][key] for key in ("finding", "split", "row", "image", "note")] == [
        "twice", "train", "0", "good0.png", "'=1+1",
    ]  # fmt: skip
    assert images.broken[18] == rows[3]["note"] and (rows[4]["image"], rows[4]["note"]) == ("", "'cat', 'Cat'")
    record = json.loads(paths[2].read_text())["findings"]
    assert [one["count"] for one in record] == [2, 1, 1] and record[0]["rows"][0]["note"] == "=1+1"
    (empty,) = write(tmp_path / "e.html", images, [], NAMES, "t")[1:2]
    assert empty.read_text().strip() == ",".join(COLUMNS)


def test_labels_that_a_net_contradicts() -> None:
    """A hand-made case: class means .8, .7 and .9; image 5, labelled 0, has .85 for class 1."""
    probabilities = np.array(
        [[0.9, 0.1, 0.0], [0.9, 0.05, 0.05], [0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.05, 0.05, 0.9], [0.1, 0.85, 0.05]]
    )
    labels = np.array([0, 0, 1, 1, 2, 0])
    assert disputed(labels, probabilities, least=1) == [(5, 1)]
    assert disputed(labels[:5], probabilities[:5], least=1) == []
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 10, 2000)
    said = np.where(rng.random(2000) < 0.05, rng.integers(0, 10, 2000), truth)
    logits = rng.normal(size=(2000, 10)) + 5 * np.eye(10)[truth]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = {i for i, _ in disputed(said, shares)}
    wrong = set(np.flatnonzero(said != truth).tolist())
    assert len(found & wrong) > 0.7 * len(wrong) and len(found & wrong) > 0.8 * len(found)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], alone: pytest.MonkeyPatch) -> None:
    from rescom_timm.__main__ import main

    output = tmp_path / "d.html"
    assert main(["doctor", "digits_lt", "-o", str(output)]) == 0
    assert "Classes with fewer than five training images: 2" in capsys.readouterr().out
    assert "<h1>What may be wrong with digits_lt</h1>" in output.read_text()
    assert main(["doctor", "digits_lr"]) == 1
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(("held_out", "expected"), [(9, []), (10, [(20, 1)]), (2, [])])
def test_a_class_of_few_held_out_images_accuses_nobody(held_out: int, expected: list[tuple[int, int]]) -> None:
    """Image 20, labelled 0, of which the net gives .8 to class 1, that has so many images of its own."""
    labels = np.array([0] * 21 + [1] * held_out)
    probabilities = np.where(labels[:, None] == np.arange(2), 0.7, 0.3)
    probabilities[20] = 0.2, 0.8
    assert disputed(labels, probabilities) == expected
    assert disputed(labels, probabilities, least=1) == [(20, 1)]


def test_disputed_labels_are_named_once_with_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    from rescom_timm.cli.doctor import suspects

    parts = {
        name: split_of(name, [(f"{name}{k}.png", encoded(scene(100 + k)), int(k >= 6)) for k in range(12)])
        for name in ("train", "test", "validation")
    }
    images = examine(parts)

    class Opened:
        def look(self, split: Split) -> SimpleNamespace:
            logits = torch.full((12, 2), -1.0)
            logits[torch.arange(12), torch.from_numpy(split.labels)] = 1.0
            if split.name == "test":
                logits[0] = torch.tensor([-2.0, 2.0])
            return SimpleNamespace(labels=torch.from_numpy(split.labels), logits=logits)

    monkeypatch.setattr("rescom_timm.analysis.opened_run.open_run", lambda run, overrides: Opened())
    data = SimpleNamespace(class_names=["cat", "dog"])
    (found,) = suspects(Path("run"), [], images, data)  # type: ignore[arg-type]
    assert named(images, found) == [["test0.png"]] and "disagrees" in found.title and "wrong" not in found.title
    text = as_text(images, [found], ["cat", "dog"])
    assert text.count("test0.png") == 1 and "dog 0.98, cat 0.02" in text
    html = page(images, [found], ["cat", "dog"], "t")
    assert html.count("<figcaption>test test0.png") == 1 and "dog 0.98, cat 0.02" in html


def test_class_names_of_two_unicode_forms_look_alike(images: Examined) -> None:
    names = ["caf\u00e9", "Cafe\u0301", "tea", "cafe\u0301"]
    (found,) = [finding for finding in findings(images, names, np.full(4, 9)) if finding.key == "names"]
    assert found.lines == (r"'caf\xe9', 'Cafe\u0301', 'cafe\u0301'",)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_images_of_12_of_16_bits_are_named_as_that(colour: int, channels: int) -> None:
    rng, rows = np.random.default_rng(0), []
    for n in range(3):
        levels = rng.integers(0, 4096, (40, 40, channels))
        levels[..., 3:] = 65535
        filtered = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
        rows.append((f"{n}.png", png(40, 16, filtered, colour, 40), n % 2))
    found = {
        one.key: one for one in findings(examine({"train": split_of("train", rows)}), ["a", "b"], np.array([9, 9]))
    }
    assert found["dim"].count == 3 and "4,096" in found["dim"].title and "flat" not in found


def test_hashes_are_those_of_imagehash_and_exact_duplicates_have_equal_pixels() -> None:
    imagehash = pytest.importorskip("imagehash")
    pictures = [scene(k, 96 + 9 * k, 80) for k in range(6)]
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    photograph = coarse.resize((700, 500), Image.Resampling.BICUBIC)
    changed = photograph.copy()
    changed.putpixel((300, 200), (1, 2, 3))
    large = [photograph, changed, photograph]
    rows = [(f"{k}.png", encoded(image), 0) for k, image in enumerate([*pictures, *large])]
    images = examine({"train": split_of("a", rows)})
    for image, hashed in zip(pictures, images.hashed, strict=False):
        assert (imagehash.phash(image).hash.flatten() == hashed).all()
    for image, hashed in zip(large, images.hashed[6:], strict=True):  # hashed from block means
        assert (imagehash.phash(image).hash.flatten() != hashed).sum() <= 4
    assert exact_duplicates(images) == [[6, 8]] and near_duplicates(images, [[6, 8]]) == [[6, 7]]
