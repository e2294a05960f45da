"""Every kind of source, opened; everything that may disagree, refused with its reason."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage

from rescom_timm.data import image_folders, tables
from rescom_timm.data.config import DataConfig
from rescom_timm.data.image_folders import class_folders, fit_layout, holds_tables, missing_files
from rescom_timm.data.index import Index
from rescom_timm.data.sources import Data, load, training_index
from rescom_timm.inference.images import _files
from tests.raises import raises


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "hf"))


def png(value: int) -> bytes:
    out = io.BytesIO()
    PillowImage.new("RGB", (4, 4), (value, 0, 0)).save(out, "png")
    return out.getvalue()


def red(row: dict) -> int:
    image = PillowImage.open(io.BytesIO(row["image"]["bytes"]))
    return image.getpixel((0, 0))[0]  # type: ignore[index,return-value]


NAMES = ["ant", "bee", "cow"]


def table(
    labels: list[int], shift: int = 0, label: str = "label", image: str = "img", paths: bool = False, **more: list
) -> Dataset:
    """One row for each label; the image's red is its row number plus shift."""
    images = [{"bytes": png(i + shift), "path": f"f/{i + shift}.png" if paths else None} for i in range(len(labels))]
    features = {image: Image(), label: ClassLabel(names=NAMES), **{k: ClassLabel(names=NAMES) for k in more}}
    return Dataset.from_dict({image: images, label: labels, **more}, features=Features(features))


TRAIN, TEST = [0, 1, 2] * 10, [0, 1, 2] * 2


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """As on the Hub: a folder of parquet files named by split."""
    folder = tmp_path / "toy" / "data"
    folder.mkdir(parents=True)
    table(TRAIN, paths=True).to_parquet(folder / "train-00000-of-00001.parquet")
    table(TEST, shift=100, paths=True).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder.parent


def check_split(data: Data, expected_rows: list[int], shift: int = 0) -> None:
    """Rows, labels and images of the training split all name the same things."""
    split = data.train
    assert split.rows.tolist() == expected_rows and split.rows.dtype == split.labels.dtype == np.int64
    assert split.dataset.column_names == ["image", "label"] and len(split.dataset) == len(expected_rows)
    assert not split.dataset.features["image"].decode
    for i, row in enumerate(split.dataset):
        assert red(row) == split.rows[i] + shift and row["label"] == split.labels[i]


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_split_is_fixed_and_complete() -> None:
    data = load(DataConfig("digits"))
    assert data.counts.sum() == 1297 and np.bincount(data.test.labels).tolist() == [50] * 10
    assert data.counts.min() == 124 and data.counts.max() == 133
    assert data.class_names == list("0123456789")
    images = {split: {row["image"]["path"] for row in getattr(data, split).dataset} for split in ("train", "test")}
    assert len(images["train"] | images["test"]) == 1797 and not images["train"] & images["test"]
    again = load(DataConfig("digits"))
    assert again.train.dataset[5] == data.train.dataset[5] and again.provenance == data.provenance


def test_digits_rows_never_change_between_versions() -> None:
    """Written down once: figures are only comparable over the same images."""
    data = load(DataConfig("digits", validation="holdout(0.1)"))
    assert {name: data.provenance[name]["sha256"][:16] for name in ("train", "validation", "test")} == {
        "train": "7a3449effc429558",
        "validation": "2090c7c0f3091642",
        "test": "2eac91192db97542",
    }


def test_digits_images_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for row in load(DataConfig("digits")).test.dataset.select([0, 17, 499]):
        number = int(row["image"]["path"][6:10])
        pixels = np.asarray(PillowImage.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels[..., 0], np.round(digits.images[number] * 255 / 16))
        assert row["label"] == digits.target[number]


def test_digits_long_tailed() -> None:
    data = load(DataConfig("digits", index="exponential(50)"))
    assert data.counts[0] > 100 and data.counts[-1] == 2 and (np.diff(data.counts) < 0).all()
    assert data.counts.tolist() == np.bincount(data.train.labels).tolist()
    assert data.provenance["train"]["imbalance"] == data.counts[0] / 2


def test_digits_knows_two_splits() -> None:
    with raises("data.split", "digits", "'val'", "'train'", "'test'"):
        load(DataConfig("digits", test="val"))


# ------------------------------------------------------------------------------------------------------------- tables


def test_parquet_folder(parquet: Path) -> None:
    data = load(DataConfig(str(parquet)))
    check_split(data, list(range(30)))
    assert data.class_names == NAMES and data.counts.tolist() == [10, 10, 10]
    assert (data.train.name, data.test.name, data.validation) == ("toy train", "toy test", None)
    assert red(data.test.dataset[4]) == 104 and data.test.rows.tolist() == list(range(6))
    json.dumps(data.provenance, allow_nan=False)
    assert data.provenance["train"]["rows"] == 30 and data.provenance["num_classes"] == 3


def save_dict(folder: Path) -> None:
    DatasetDict(train=table(TRAIN), test=table(TEST, 100)).save_to_disk(folder)


def save_each(folder: Path) -> None:
    table(TRAIN).save_to_disk(folder / "train")
    table(TEST, 100).save_to_disk(folder / "test")


def save_arrow(folder: Path) -> None:
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir()
    for split, whole in {"train": table(TRAIN), "test": table(TEST, 100)}.items():
        writer = ArrowWriter(path=str(folder / f"{split}.arrow"), features=whole.features)
        for row in whole.cast_column("img", Image(decode=False)):
            writer.write(row)
        writer.finalize()


def save_plain_parquet(folder: Path) -> None:
    """Without the features that datasets writes into the schema: bytes and path, integer labels."""
    import pyarrow.parquet as pq

    folder.mkdir()
    for split, whole in {"train": table(TRAIN), "test": table(TEST, 100)}.items():
        pq.write_table(whole.data.table.replace_schema_metadata({}), folder / f"{split}.parquet")


@pytest.mark.parametrize("save", [save_dict, save_each, save_arrow, save_plain_parquet])
def test_other_local_folders(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path / "toy")
    data = load(DataConfig(str(tmp_path / "toy"), index="exponential(5)"))
    assert data.counts.tolist() == [10, 4, 2]
    check_split(data, data.train.rows.tolist())
    assert len(data.test.rows) == 6


def test_split_that_is_not_there(parquet: Path, tmp_path: Path) -> None:
    for source, save in ((parquet, None), (tmp_path / "saved", save_dict)):
        if save:
            save(source)
        with raises("data.split", "'val'", "train", "test"):
            load(DataConfig(str(source), test="val"))
    table(TRAIN).save_to_disk(tmp_path / "single")
    with raises("data.split", "single"):
        load(DataConfig(str(tmp_path / "single")))


def test_no_such_folder(tmp_path: Path) -> None:
    with raises("file.missing", "nowhere"):
        load(DataConfig(str(tmp_path / "nowhere")))


@pytest.mark.parametrize("source", ["my photos", "photos/cats/", "a/b/c", "a--b"])
def test_a_folder_of_another_working_directory(source: str) -> None:
    with raises("file.missing", f" {source} "):
        load(DataConfig(source))


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with raises("hub.unreachable", "'nobody/nothing'", "data.source", "OfflineModeIsEnabled"):
        load(DataConfig("nobody/nothing"))


@pytest.mark.filterwarnings("ignore")
def test_a_removed_folder_is_not_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets caches a local folder under its last name, where it also looks for a Hub data set of that name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "photographs"
    folder.mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        Dataset.from_dict({"image": [png(1), png(2)], "label": [0, 1]}, features).to_parquet(
            folder / f"{split}.parquet"
        )
    load(DataConfig(str(folder)))
    with raises("hub.not_found", "photographs"):
        load(DataConfig("photographs"))


def test_gated_or_mistyped_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with raises("hub.not_found", "'a/b'", "hf auth login"):
        load(DataConfig("a/b"))


# ------------------------------------------------------------------------------------------------------------ columns


def served(monkeypatch: pytest.MonkeyPatch, train: Dataset, test: Dataset | None = None) -> None:
    """Let the Hub answer with these splits."""
    splits = {"train": train, "test": test if test is not None else train.select(range(0))}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: splits[split])


def test_two_label_columns_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    train = table(TRAIN, label="fine_label", coarse_label=[0] * 30)
    test = table(TEST, label="fine_label", coarse_label=[1] * 6)
    served(monkeypatch, train, test)
    with raises("data.column", "fine_label, coarse_label", "label_column=fine_label"):
        load(DataConfig("x/y"))
    assert load(DataConfig("x/y", label_column="fine_label")).counts.tolist() == [10, 10, 10]
    with raises("data.column", "'fine_lable'", "fine_label?"):
        load(DataConfig("x/y", label_column="fine_lable"))
    with raises("data.column", "'img'", "ClassLabel"):
        load(DataConfig("x/y", label_column="img"))


def test_image_column(monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, table(TRAIN).remove_columns("img"), table(TEST))
    with raises("data.column", "label", "image_column="):
        load(DataConfig("x/y"))
    both = table(TRAIN).add_column("other", [{"bytes": png(1), "path": None}] * 30)
    served(monkeypatch, both, table(TEST))
    with raises("data.column", "img, other", "image_column=img"):
        load(DataConfig("x/y"))


def test_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, table(TRAIN).remove_columns("label"))
    with raises("data.column", "label_column=", "index="):
        load(DataConfig("x/y"))


def test_hidden_and_missing_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, table(TRAIN), table([0, -1, -1]))
    with raises("data.labels", "x/y test", "0 .. 2", "-1 in row 1"):
        load(DataConfig("x/y"))
    plain = Dataset.from_dict({"img": [{"bytes": png(0), "path": None}] * 2, "label": [0, None]})
    served(monkeypatch, plain)
    with raises("data.labels", "1 row ", "'label'"):
        load(DataConfig("x/y"))


def test_image_repository_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    train = table(TRAIN)
    train.info.builder_name = "imagefolder"
    served(monkeypatch, train)
    with raises("data.source", "x/y", "rescom-timm init"):
        load(DataConfig("x/y"))


def test_a_class_without_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, table([0, 0, 2]), table(TEST))
    with raises("data.empty_class", "1 of 3", "x/y train", ": 1"):
        load(DataConfig("x/y"))


# ------------------------------------------------------------------------------------------------------------ indexes


def test_drawn_index_is_kept_as_text(parquet: Path, tmp_path: Path) -> None:
    config = DataConfig(str(parquet), index="exponential(5)")
    data = load(config, tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    assert str(file) == data.provenance["train"]["index_file"]
    kept = Index.load(file)
    assert kept.sha256 == data.provenance["train"]["sha256"] and kept.class_names == NAMES
    assert kept.info == {"source": str(parquet), "split": "train", "rule": "exponential(5)"}
    again = load(DataConfig(str(parquet), index=str(file)))  # the file serves as an index
    assert again.train.rows.tolist() == data.train.rows.tolist()
    file.write_text("spoilt")  # and is never read back unasked
    assert load(config, tmp_path / "kept").train.rows.tolist() == data.train.rows.tolist()


def test_cache_folder(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(DataConfig(str(parquet), index="step(5)"))
    assert len(list((tmp_path / "xdg" / "rescom_timm" / "index").glob("*toy-train-step-5*.txt"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert tables.cache_folder() == Path("/home/someone/.cache/rescom_timm/index")


def test_training_goes_on_where_nothing_can_be_kept(
    parquet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "blocked").write_text("a file, not a folder")
    data = load(DataConfig(str(parquet), index="exponential(5)"), tmp_path / "blocked")
    assert data.counts.tolist() == [10, 4, 2] and data.provenance["train"]["index_file"] is None
    assert "could not be kept" in caplog.text


def test_index_must_agree_with_the_data(parquet: Path, tmp_path: Path) -> None:
    def run(keys: list[int], labels: list[int], classes: int = 3) -> Data:
        Index(np.array(keys), np.array(labels), classes).save(tmp_path / "i.txt")
        return load(DataConfig(str(parquet), index=str(tmp_path / "i.txt")))

    data = run([4, 0, 8], [1, 0, 2])
    check_split(data, [4, 0, 8])  # the order of the file
    assert data.train.name == "toy train, i.txt"
    with raises("index.data", "2 of 3", "row 4: 0", "1 in the data set"):
        run([4, 0, 8], [0, 1, 2])
    with raises("index.data", "row 30", "30 rows"):
        run([4, 0, 30], [1, 0, 0 + 2])
    with raises("index.format", "4 classes", "3 "):
        run([4, 0, 8, 3], [1, 0, 2, 3], 4)
    with raises("file.missing", "'exponental'"):
        load(DataConfig(str(parquet), index="exponental"))


@pytest.mark.parametrize(
    ("change", "code", "naming"),
    [
        ({"index": "exponental(100)"}, "data.rule", ["'exponental(100)'", "exponential(100)?"]),
        ({"test_index": "step(x)"}, "data.rule", ["'step(x)'"]),
        ({"validation": "holdout"}, "data.rule", ["'holdout'", "none", "unused"]),
        ({"validation": "hold_out(0.1)"}, "data.rule", ["holdout(0.1)?"]),
        ({"validation": "holdout(1)"}, "data.rule", ["holdout(1)", "holdout(0.1)"]),
        ({"validation": "holdout(nan)"}, "data.rule", ["holdout(nan)"]),
        ({"validation": "unused(0)"}, "data.rule", ["unused(0)", "unused(50)"]),
        ({"validation": "unused(1.5)"}, "data.rule", ["unused(1.5)"]),
        ({"validation": "split()"}, "data.rule", ["split()"]),
        ({"source": ""}, "data.source", ["data.source"]),
        ({"test": "holdout(0.2)", "test_index": "l.txt"}, "recipe.conflict", ["test_index", "holdout(0.2)"]),
    ],
)
def test_impossible_configs(change: dict, code: str, naming: list[str]) -> None:
    with raises(code, *naming):
        DataConfig(**{"source": "digits", **change})


# --------------------------------------------------------------------------------------------------------- validation


def test_holdout(parquet: Path) -> None:
    data = load(DataConfig(str(parquet), index="exponential(5)", validation="holdout(0.3)"))
    assert data.validation is not None
    assert data.counts.tolist() == [7, 3, 1] and np.bincount(data.validation.labels).tolist() == [3, 1, 1]
    assert not set(data.train.rows) & set(data.validation.rows)
    check_split(data, data.train.rows.tolist())
    whole = load(DataConfig(str(parquet), index="exponential(5)"))
    assert set(data.train.rows) | set(data.validation.rows) == set(whole.train.rows)
    assert data.validation.name == "toy train, exponential(5), holdout(0.3)"
    assert (
        data.provenance["train"]["rows"] == 11
        and data.provenance["train"]["sha256"] != (whole.provenance["train"]["sha256"])
    )


def test_unused(parquet: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load(DataConfig(str(parquet), index="exponential(5)", validation="unused(4)"))
    assert data.validation is not None
    assert data.counts.tolist() == [10, 4, 2]  # training is left as drawn
    assert np.bincount(data.validation.labels).tolist() == [0, 4, 4]  # the head class is used up
    assert "1 of 3 classes have fewer unused rows than that (class 0: 0)" in caplog.text
    assert not set(data.train.rows) & set(data.validation.rows)
    assert all(TRAIN[row] == label for row, label in zip(data.validation.rows, data.validation.labels, strict=True))
    with raises("recipe.conflict", "unused(4)", "toy train"):
        load(DataConfig(str(parquet), validation="unused(4)"))


def test_validation_from_a_split_or_a_file(parquet: Path, tmp_path: Path) -> None:
    table([2, 1], 200).to_parquet(parquet / "data" / "validation-00000-of-00001.parquet")
    data = load(DataConfig(str(parquet), validation="split(validation)"))
    assert data.validation is not None and red(data.validation.dataset[0]) == 200 and len(data.train.rows) == 30
    for name, rows in {"train": [0, 1, 2], "val": [3, 4]}.items():  # of class 0, 1 (, 2)
        Index(np.array(rows), np.array([TRAIN[r] for r in rows]), 3).save(tmp_path / f"{name}.txt")
    config = {"source": str(parquet), "index": str(tmp_path / "train.txt")}
    data = load(DataConfig(**config, validation=f"index({tmp_path / 'val.txt'})"))
    assert data.validation is not None and data.validation.rows.tolist() == [3, 4]
    with raises("data.overlap", "3 images", "train", "validation", "0, 1, 2"):
        load(DataConfig(**config, validation=f"index({tmp_path / 'train.txt'})"))


def test_testing_on_training_images_is_refused(parquet: Path) -> None:
    with raises("data.overlap", "30 images", "train (toy train)", "test"):
        load(DataConfig(str(parquet), test="train"))


def test_choosing_the_best_checkpoint_on_test_images_is_refused(parquet: Path) -> None:
    with raises("data.overlap", "6 images", "validation (toy test)", "test (toy test)"):
        load(DataConfig(str(parquet), validation="split(test)"))


# --------------------------------------------------------------------------------------------------------- image roots


def files(root: Path, paths: list[str]) -> None:
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(i))


def write_list(path: Path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


LISTED = ["train/a b/1 1.png", "train/c/2.png", "train/c/3.png"]


@pytest.fixture
def root(tmp_path: Path) -> DataConfig:
    files(tmp_path / "root", [*LISTED, "val/c/2.png", "val/a b/9.png"])
    return DataConfig(
        str(tmp_path / "root"),
        index=write_list(tmp_path / "train.txt", [f"{LISTED[0]} 0", f"{LISTED[1]} 1", f"{LISTED[2]} 1"]),
        test_index=write_list(tmp_path / "val.txt", ["val/c/2.png 1", "val/a b/9.png 0"]),
    )


def test_image_root(root: DataConfig) -> None:
    data = load(root)
    assert data.class_names == ["a b", "c"] and data.counts.tolist() == [1, 2]
    assert data.train.dataset[0] == {"image": {"bytes": None, "path": f"{root.source}/train/a b/1 1.png"}, "label": 0}
    assert data.train.rows.tolist() == [0, 1, 2] and data.test.labels.tolist() == [1, 0]
    assert data.train.dataset.features == Features(image=Image(decode=False), label=Value("int64"))
    assert data.test.name == "root val.txt" and data.provenance["train"]["paths"] == "as listed"
    decoded = data.train.dataset.cast_column("image", Image())[1]["image"]
    assert decoded.getpixel((0, 0)) == (1, 0, 0)


def test_root_may_lack_the_leading_folder(root: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(f"{root.source}/train", index=root.index, test_index=root.test_index)
    with caplog.at_level(logging.INFO), raises("index.images", "1 of 2", "val.txt"):
        load(config)  # val/c/2.png is not train/c/2.png
    assert "paths are read without their leading folder" in caplog.text


def test_the_same_file_by_two_layouts_is_an_overlap(root: DataConfig, tmp_path: Path) -> None:
    same = write_list(tmp_path / "same.txt", ["val/c/2.png 1"])  # under root/train this is train/c/2.png
    with raises("data.overlap", "1 image ", "train", "test", ": c/2.png"):
        load(DataConfig(f"{root.source}/train", index=root.index, test_index=same))


STANDARD = ["train/arena-hockey/1.jpg", "train/zen_garden/2.jpg"]
LETTERS = ["data_256/a/arena/hockey/1.jpg", "data_256/z/zen_garden/2.jpg"]


@pytest.mark.parametrize("listed", [STANDARD, LETTERS])
@pytest.mark.parametrize("unpacked", [STANDARD, LETTERS])
@pytest.mark.parametrize("inside", [False, True])
def test_places_two_folder_layouts(tmp_path: Path, listed: list[str], unpacked: list[str], inside: bool) -> None:
    files(tmp_path, unpacked)
    root = tmp_path / unpacked[0].partition("/")[0] if inside else tmp_path
    way, paths = fit_layout(root, listed)
    assert way == "as listed" if listed == unpacked and not inside else way != "as listed"
    assert [root / p for p in paths] == [tmp_path / p for p in unpacked] and missing_files(root, paths) == []


def test_missing_images_are_counted_and_named(root: DataConfig, tmp_path: Path) -> None:
    (Path(root.source) / LISTED[0]).unlink()
    with raises("index.images", "1 of 3", "train.txt", "train/a b/1 1.png"):
        load(root)
    paths = ["x/1", "train/c/2.png", "train/c/2.png/y", "train/c/4.png"]
    assert missing_files(root.source, paths) == ["x/1", "train/c/2.png/y", "train/c/4.png"]
    with raises("index.images", "3 of 3", "as listed"):
        load(DataConfig(str(tmp_path / "root" / "val" / "c"), index=root.index, test_index=root.test_index))


def test_a_root_needs_lists(root: DataConfig, tmp_path: Path) -> None:
    with raises("index.missing", "index is 'all'", f"rescom-timm init {root.source}"):
        load(DataConfig(root.source))
    with raises("index.missing", "test_index is 'all'"):
        load(DataConfig(root.source, index=root.index))
    Index(np.array([0]), np.array([0]), 1).save(tmp_path / "rows.txt")
    with raises("index.kind", "rows.txt", root.source):
        load(DataConfig(root.source, index=str(tmp_path / "rows.txt")))
    with raises("recipe.conflict", "unused(3)", "holdout(0.1)"):
        load(DataConfig(root.source, index=root.index, test_index=root.test_index, validation="unused(3)"))
    bad = write_list(tmp_path / "bad.txt", ["val/c/2.png 2"])
    with raises("index.format", "bad.txt", "line 1", "0 .. 1"):
        load(DataConfig(root.source, index=root.index, test_index=bad))


def test_root_with_validation(root: DataConfig) -> None:
    data = load(DataConfig(root.source, index=root.index, test_index=root.test_index, validation="holdout(0.5)"))
    assert data.validation is not None and data.counts.tolist() == [1, 1]
    assert data.validation.labels.tolist() == [1] and len(data.validation.dataset) == 1
    assert data.train.dataset[1]["image"]["path"] != data.validation.dataset[0]["image"]["path"]


def test_inaturalist_json_over_a_root(tmp_path: Path) -> None:
    files(tmp_path / "inat", ["train_val2018/A/0/x.jpg", "train_val2018/B/1/y.jpg", "train_val2018/B/1/z.jpg"])
    names = ("A/0/x.jpg", "B/1/y.jpg", "B/1/z.jpg")
    images = [{"id": i, "file_name": f"train_val2018/{name}"} for i, name in enumerate(names)]
    for name, chosen in {"train": [0, 1], "val": [2]}.items():
        content = {
            "images": [images[i] for i in chosen],
            "annotations": [{"id": i, "image_id": i, "category_id": min(i, 1)} for i in chosen],
            "categories": [{"id": 0, "name": "Apis mellifera"}, {"id": 1, "name": "Bufo bufo"}],
        }
        (tmp_path / f"{name}2018.json").write_text(json.dumps(content))
    data = load(
        DataConfig(str(tmp_path / "inat"), index=f"{tmp_path}/train2018.json", test_index=f"{tmp_path}/val2018.json")
    )
    assert data.class_names == ["Apis mellifera", "Bufo bufo"] and data.counts.tolist() == [1, 1]
    assert data.test.labels.tolist() == [1]


# ------------------------------------------------------------------------------ lists joined to a data set by file name


def named(names: list[str | None], labels: list[int] | None) -> Dataset:
    images = [{"bytes": png(i), "path": name} for i, name in enumerate(names)]
    columns: dict = {"image": images} | ({"label": labels} if labels else {})
    features: dict = {"image": Image()} | ({"label": ClassLabel(names=NAMES)} if labels else {})
    return Dataset.from_dict(columns, features=Features(features))


@pytest.mark.parametrize(
    "names",
    [
        ["n3_0.JPEG", "n1_7.JPEG", "n1_8.JPEG", "n2_5.JPEG"],
        ["train/c/n3_0.JPEG", "train/a/n1_7.JPEG", "train/a/n1_8.JPEG", "train/b/n2_5.JPEG"],
        ["n3_0_n00000003.JPEG", "n1_7_n00000001.JPEG", "n1_8_n00000001.JPEG", "n2_5_n00000002.JPEG"],
    ],
)
def test_list_joined_by_file_name(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, named(names, [2, 0, 0, 1]), table(TEST, image="image"))
    listed = write_list(tmp_path / "l.txt", ["train/a/n1_8.JPEG 0", "train/b/n2_5.JPEG 1", "train/c/n3_0.JPEG 2"])
    data = load(DataConfig("x/imagenet", index=listed))
    check_split(data, [2, 3, 0])
    assert data.train.labels.tolist() == [0, 1, 2]
    wrong = write_list(tmp_path / "w.txt", ["train/a/n1_8.JPEG 1", "train/b/n2_5.JPEG 0", "train/c/n3_0.JPEG 2"])
    with raises("index.data", "2 of 3"):
        load(DataConfig("x/imagenet", index=wrong))
    unused = load(DataConfig("x/imagenet", index=listed, validation="unused(1)"))
    assert unused.validation is not None and unused.validation.rows.tolist() == [1]


def test_list_gives_labels_to_a_data_set_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, named(["a.jpg", "b.jpg", "c.jpg"], None), named(["d.jpg"], None))
    config = DataConfig(
        "x/y",
        index=write_list(tmp_path / "l.txt", ["q/c.jpg 0", "q/a.jpg 1"]),
        test_index=write_list(tmp_path / "t.txt", ["q/d.jpg 1"]),
    )
    data = load(config)
    check_split(data, [2, 0])
    assert data.test.dataset[0]["label"] == 1 and data.class_names == ["0", "1"]


def test_joins_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = write_list(tmp_path / "l.txt", ["q/a.jpg 0", "q/z.jpg 1", "q/y.jpg 2"])
    served(monkeypatch, named(["a.jpg", "b.jpg"], [0, 1]))
    with raises("index.images", "2 of 3", "x/y train", "q/z.jpg, q/y"):
        load(DataConfig("x/y", index=listed))
    served(monkeypatch, named([None, None], [0, 1]))
    with raises("index.kind", "x/y train"):
        load(DataConfig("x/y", index=listed))
    served(monkeypatch, named(["p/a.jpg", "r/a.jpg", "q/z.jpg", "q/y.jpg"], [0, 0, 1, 2]))
    with raises("index.data", "l.txt", "x/y train"):
        load(DataConfig("x/y", index=listed))
    doubled = write_list(tmp_path / "d.txt", ["q/a.jpg 0", "p/a.jpg 0", "q/z.jpg 1", "q/y.jpg 2"])
    served(monkeypatch, named(["a.jpg", "z.jpg", "y.jpg"], [0, 1, 2]))
    with raises("index.data", "d.txt", "x/y train"):
        load(DataConfig("x/y", index=doubled))


# -------------------------------------------------------------------------------------------------------- class folders


def test_class_folders(tmp_path: Path) -> None:
    files(tmp_path, ["10/a.png", "2/b.PNG", "2/deep/c.jpeg", ".git/d.png", "__MACOSX/e.png"])
    files(tmp_path, ["10/._a.png", "2/deep/.thumbs/c.jpeg", "2/.DS_Store", ".cache/old.parquet"])  # hidden ones
    assert not holds_tables(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in _files(tmp_path / "2")] == ["2/b.PNG", "2/deep/c.jpeg"]
    (tmp_path / "2" / "notes.txt").write_text("x")
    index, others = class_folders(tmp_path)
    assert index.class_names == ["2", "10"]  # by value, not as text
    assert index.keys == ["2/b.PNG", "2/deep/c.jpeg", "10/a.png"] and index.labels.tolist() == [0, 0, 1]
    assert others == ["2/notes.txt"]
    files(tmp_path, ["b/x.png", "A/x.png"])
    assert class_folders(tmp_path)[0].class_names == ["10", "2", "A", "b"]


def test_images_in_subfolders_have_the_class_of_the_outer_folder_and_this_is_said(tmp_path: Path) -> None:
    for name in ("animals/crab/a", "animals/ibis/a", "things/a"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.png").write_bytes(png(0))
    said: list[str] = []
    index, _ = class_folders(tmp_path, said.append)
    assert index.class_names == ["animals", "things"] and index.labels.tolist() == [0, 0, 1]
    assert len(said) == 1 and "animals/crab" in said[0] and "animals/ibis" in said[0]


def test_class_folders_that_are_none(tmp_path: Path) -> None:
    files(tmp_path, ["one/a.png"])
    with raises("data.class_folders", "1 class"):
        class_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    with raises("data.class_folders", "empty"):
        class_folders(tmp_path)


# ------------------------------------------------------------------------------------------------------ real and large


def test_real_cifar10(shared_cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the user's own cache: 114 MB are unpacked once
    data = load(DataConfig(str(shared_cifar10), index="exponential(100)"))
    assert len(data.train.rows) == 12_406 and len(data.test.rows) == 10_000
    assert data.counts.max() == 5000 and data.counts.min() == 50 and data.class_names[9] == "truck"
    index = training_index(DataConfig(str(shared_cifar10), index="exponential(10)"))
    assert len(index) == 20_431 and set(data.train.rows) < set(np.asarray(index.keys))


def measure(folder: Path, counts: list[int]) -> tuple[float, float, float]:
    """Make a tree of empty files with these class counts and open it: seconds, MB added, and MB added at the peak."""
    random = np.random.RandomState(0)
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for k, count in enumerate(counts):
        place = f"train_val2018/{('Plantae', 'Insecta', 'Aves')[k % 3]}/{k}"
        (folder / place).mkdir(parents=True)
        for i in range(count + 1):
            path = f"{place}/{random.bytes(16).hex()}.jpg"
            open(folder / path, "w").close()
            lists["train" if i < count else "test"].append(f"{path} {k}\n")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("".join(random.permutation(lines)))
    code = f"""
import time
import torch, datasets
from rescom_timm.data.config import DataConfig
from rescom_timm.data.sources import load
def memory(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
before, start = memory("VmRSS"), time.perf_counter()
data = load(DataConfig({str(folder)!r}, index={str(folder / "train.txt")!r}, test_index={str(folder / "test.txt")!r}))
print(time.perf_counter() - start, memory("VmRSS") - before, memory("VmHWM") - before, len(data.train.rows))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, added, peak, n = map(float, done.stdout.split())
    assert n == sum(counts)
    return seconds, added, peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_inaturalist_size_opens_in_seconds(tmp_path: Path, shared_lists: Path) -> None:
    counts = json.loads((shared_lists / "iNaturalist18_train_class_counts.json").read_text())
    seconds, added, peak = measure(tmp_path, counts)
    print(f"{sum(counts):,} rows: {seconds:.1f} s, {added:.0f} MB added, {peak:.0f} MB at the peak")
    assert seconds < 30 and added < 200 and peak < 200


def test_a_long_list_adds_little_memory_and_time() -> None:
    """The part of the above that is ours, without a disk: 437,513 lines become a data set."""
    paths = [f"train_val2018/Plantae/{i % 8142}/{i:032x}.jpg" for i in range(437_513)]
    before, start = pa.total_allocated_bytes(), time.perf_counter()
    dataset = image_folders._files_dataset(Path("/root"), paths, np.arange(437_513) % 8142)
    assert time.perf_counter() - start < 20
    assert dataset[437_512]["image"]["path"] == f"/root/{paths[-1]}" and dataset[437_512]["label"] == 437_512 % 8142
    assert (pa.total_allocated_bytes() - before) / 2**20 < 50


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        PillowImage.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    shutil.copy(tmp_path / "cat/0.png", os.path.join(os.fsencode(tmp_path), b"cat", b"\xff1.png"))
    with raises("data.class_folders", r"cat/\xff1.png", "UTF-8"):
        class_folders(tmp_path)
