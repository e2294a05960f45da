"""Tables and lists of others: they name no file outside their folder, and decode to no more than their size allows."""

import io
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture

from rescom_timm.data import bounds
from rescom_timm.data.corruptions import _read_array
from rescom_timm.data.index import read
from rescom_timm.data.own_files import within
from rescom_timm.data.sources import load
from rescom_timm.data.splits import DataConfig


def png(number):
    stream = io.BytesIO()
    Picture.new("RGB", (8, 8), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def table(number=6, path=None):
    """Rows of two classes; with `path`, of images that are named."""
    rows = [{"bytes": None if path else png(i), "path": path and f"{path}/{i}.png"} for i in range(number)]
    features = Features(image=Image(decode=False), label=ClassLabel(names=["a", "b"]))
    return Dataset.from_dict({"image": rows, "label": [i % 2 for i in range(number)]}, features=features)


@pytest.fixture
def saved(tmp_path):
    """A data set of somebody else, and a private one beside it."""
    DatasetDict(train=table(), test=table(4)).save_to_disk(tmp_path / "theirs")
    DatasetDict(train=table(8), test=table(8)).save_to_disk(tmp_path / "mine")
    return tmp_path / "theirs"


def opened(folder, **others):
    return load(DataConfig(str(folder), **others), folder.parent / "index")


def test_a_saved_data_set_is_read(saved, tmp_path):
    assert len(opened(saved).train.labels) == 6
    (tmp_path / "link").symlink_to(saved)
    assert len(opened(tmp_path / "link").train.labels) == 6


@pytest.mark.parametrize("name", ["absolute", "../../mine/train/data-00000-of-00001.arrow", "a/b.arrow", 7, "..", ""])
def test_a_state_names_plain_files_alone(saved, tmp_path, name):
    name = str(tmp_path / "mine/train/data-00000-of-00001.arrow") if name == "absolute" else name
    state = json.loads((saved / "train/state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (saved / "train/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="no plain name"):
        opened(saved)


@pytest.mark.parametrize("name", ["../mine/train", "/", "train/../../mine/train"])
def test_a_dict_names_plain_splits_alone(saved, name):
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test", name]}))
    with pytest.raises(ValueError, match="no plain name"):
        opened(saved)
    with pytest.raises(ValueError, match="leads out of data.source"):
        opened(saved, train="../mine/train")
    with pytest.raises(ValueError, match="leads out of data.source"):
        opened(saved, validation="split(/etc)")
    DataConfig("digits", validation="index(../lists/val.txt)")


@pytest.mark.parametrize("name", ["train/data-00000-of-00001.arrow", "train/state.json", "train"])
def test_a_saved_data_set_links_to_nothing_outside(saved, tmp_path, name):
    (saved / name).rename(tmp_path / "moved")
    (saved / name).symlink_to(tmp_path / "mine" / name)
    with pytest.raises(ValueError, match="leads out of"):
        opened(saved)


def test_links_of_the_hubs_cache_stay_inside(tmp_path):
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("x")
    (snapshot / "a.parquet").symlink_to("../../blobs/1")
    within(snapshot, snapshot / "a.parquet")
    (tmp_path / "refs").write_text("x")
    (snapshot / "b.parquet").symlink_to("../../refs")
    with pytest.raises(ValueError, match="leads out of"):
        within(snapshot, snapshot / "b.parquet")


def test_odd_states_are_refused(saved):
    state = json.loads((saved / "train/state.json").read_text())
    for change in ({"_fingerprint": "../../x"}, {"_data_files": "x"}, {"_data_files": [7]}):
        (saved / "train/state.json").write_text(json.dumps(state | change))
        with pytest.raises(ValueError, match="_fingerprint|_data_files"):
            opened(saved)


@pytest.mark.parametrize("where", ["card", "yaml", "link"])
def test_a_folder_of_parquet_names_no_file_outside(tmp_path, where):
    theirs, mine = tmp_path / "theirs", tmp_path / "mine.parquet"
    theirs.mkdir()
    table().to_parquet(mine)
    table().to_parquet(theirs / "test.parquet")
    if where == "link":
        (theirs / "train.parquet").symlink_to(mine)
    else:
        files = [{"split": "train", "path": str(mine)}, {"split": "test", "path": "test.parquet"}]
        text = "configs:\n- config_name: default\n  data_files: " + json.dumps(files)
        card = f"---\n{text}\n---\n"
        (theirs / ("README.md" if where == "card" else ".huggingface.yaml")).write_text(
            card if where == "card" else text
        )
    with pytest.raises(ValueError, match="leads out of"):
        opened(theirs)


@pytest.mark.parametrize("path", ["{root}/mine", "../mine", "{root}/theirs/../mine"])
def test_a_table_names_images_of_its_folder_alone(tmp_path, path):
    for folder in ("theirs/images", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(6):
            (tmp_path / folder / f"{i}.png").write_bytes(png(i))
    theirs = tmp_path / "theirs"

    def save(place):
        for split in ("train", "test"):
            whole = table(6, place)
            pq.write_table(whole.data.table.replace_schema_metadata({}), theirs / f"{split}.parquet")

    save(path.format(root=tmp_path))
    with pytest.raises(ValueError, match="names an image outside"):
        opened(theirs)
    save("images")
    assert opened(theirs).train.dataset[3]["image"]["path"] == str(theirs / "images/3.png")
    save(str(theirs / "images"))
    assert opened(theirs).train.dataset[3]["image"]["path"] == str(theirs / "images/3.png")


# ---------------------------------------------------------------------------------------------- small files, large rows


def repeated(number, size):
    """`number` rows of one text, of which a Parquet file holds one copy."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * number, pa.int32()), pa.array(["a" * size]))


def test_a_short_parquet_list_stands_for_no_gigabytes(tmp_path):
    """A file under 1 KiB, whose paths are 30 GB of text."""
    for name in ("path", "label"):
        columns = {"path": pa.array(map(str, range(30_000))), "label": pa.array([0, 1] * 15_000)}
        pq.write_table(pa.table(columns | {name: repeated(30_000, 2**20)}), tmp_path / "a.parquet", compression="zstd")
        _, problems = read(tmp_path / "a.parquet")
        assert len(problems) == 1 and "1,048,576 bytes" in problems[0]


@pytest.mark.parametrize("kind", ["texts", "lists", "compressed", "rows"])
def test_what_a_parquet_file_decodes_to_is_bounded_by_its_size(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(bounds, "MAX_DECODED", 2**20)
    path, number = tmp_path / "a.parquet", 3000
    column = {
        "texts": lambda: repeated(number, 2**12),
        "lists": lambda: pa.ListArray.from_arrays(
            pa.array(np.arange(number + 1) * 10, pa.int32()), repeated(30_000, 99)
        ),
        "compressed": lambda: pa.array(["a" * 2**11] * number),
        "rows": lambda: pa.array(np.zeros(number * 100, np.int64)),
    }[kind]()
    pq.write_table(
        pa.table({"path": column}), path, compression="zstd", use_dictionary=kind != "compressed",
    )  # fmt: skip
    with pytest.raises(ValueError, match="decodes to more than|several values"):
        bounds.check_parquet(path) and bounds.read_columns(path, ["path"])


def test_a_folder_of_tables_fills_no_disk(tmp_path, monkeypatch):
    """`datasets` writes what it decodes to its cache."""
    monkeypatch.setattr(bounds, "MAX_DECODED", 2**20)
    (tmp_path / "d").mkdir()
    image = png(0)
    images = pa.StructArray.from_arrays([pa.array([image] * 4), pa.array(["0.png"] * 4)], names=["bytes", "path"])
    for split in ("train", "test"):
        long = pa.DictionaryArray.from_arrays(pa.array([0] * 4, pa.int32()), pa.array(["a" * 2**20]))
        whole = pa.table({"image": images, "label": [0, 1, 0, 1], "text": long})
        pq.write_table(whole, tmp_path / "d" / f"{split}.parquet", compression="zstd")
    with pytest.raises(ValueError, match="decodes to more than"):
        opened(tmp_path / "d")


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_what_an_arrow_file_decodes_to_is_bounded_by_its_size(tmp_path, monkeypatch, new):
    monkeypatch.setattr(bounds, "MAX_DECODED", 2**20)

    def save(values, compression=None):
        whole = pa.table({"text": values})
        with new(
            str(tmp_path / "a.arrow"), whole.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
        ) as out:
            out.write_table(whole)

    save(pa.array(["a" * 2**12] * 2000))
    bounds.check_arrow(tmp_path / "a.arrow")
    save(pa.array(["a" * 100] * 10), "zstd")
    bounds.check_arrow(tmp_path / "a.arrow")
    save(pa.array(["a" * 2**12] * 2000), "zstd")
    with pytest.raises(ValueError, match="decodes to more than"):
        bounds.check_arrow(tmp_path / "a.arrow")
    save(repeated(3000, 2**10))
    with pytest.raises(ValueError, match="is of type dictionary"):
        bounds.check_arrow(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt", "a.json"])
@pytest.mark.parametrize("long", [5000, 3 * 2**20])
def test_long_texts_are_refused_in_a_short_message(tmp_path, name, long):
    """Such as a field of 200 MB."""
    path = "x" * long
    annotations = {
        "images": [{"id": 1, "file_name": path}],
        "annotations": [{"image_id": 1, "category_id": 0}],
    }
    text = {
        "a.csv": f"path,label\n{path},0\ny,1\n",
        "a.tsv": f"path\tlabel\ny\t{path}\n",
        "a.jsonl": json.dumps({"path": path, "label": 0}),
        "a.txt": f"{path} 0\ny 1\n",
        "a.json": json.dumps(annotations),
    }[name]
    (tmp_path / name).write_text(text)
    _, problems = read(tmp_path / name)
    assert problems and all(len(problem) < 500 for problem in problems)
    assert "at most 4,096" in problems[0] or "longer than" in problems[0]


def test_rows_make_no_more_cells_than_their_size_allows(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("path,label" + ",x" * 5000 + "\n1,0\n")
    assert "columns" in read(tmp_path / "a.csv")[1][0]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({f"k{i}": 0}) + "\n" for i in range(1100)))
    assert "different keys" in read(tmp_path / "a.jsonl")[1][0]
    monkeypatch.setattr(bounds, "MAX_DECODED", 0)
    (tmp_path / "a.csv").write_text("path,label" + ",x" * 500 + "\n" + "1\n" * 500)
    assert "most of its cells are empty" in read(tmp_path / "a.csv")[1][0]


def test_a_list_of_mistakes_ends(tmp_path):
    (tmp_path / "a.txt").write_text("x 0\n" * (bounds.MAX_PROBLEMS + 10))
    assert len(read(tmp_path / "a.txt")[1]) == bounds.MAX_PROBLEMS


def test_an_array_is_as_large_as_its_file(tmp_path):
    path = tmp_path / "labels.npy"
    np.save(path, np.arange(4))
    assert _read_array(path).tolist() == [0, 1, 2, 3]
    path.write_bytes(path.read_bytes().replace(b"(4,)", b"(4" + b"0" * 9 + b",)"))
    with pytest.raises(ValueError):
        _read_array(path)
    np.savez(tmp_path / "a.npz", x=np.arange(4))
    os.replace(tmp_path / "a.npz", path)
    with pytest.raises(ValueError, match="archive"):
        _read_array(path)
