"""Tables and lists of others: they name no file outside their folder, and decode to no more than their size allows."""

import base64
import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture

from rescom_timm.data import bounds
from rescom_timm.data.config import DataConfig
from rescom_timm.data.corruptions import _read_array
from rescom_timm.data.image_folders import below
from rescom_timm.data.index import read
from rescom_timm.data.own_files import within
from rescom_timm.data.sources import load
from rescom_timm.errors import code_of
from tests.raises import raises


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
    with raises("data.outside", "state.json"):
        opened(saved)


@pytest.mark.parametrize("name", ["../mine/train", "/", "train/../../mine/train"])
def test_a_dict_names_plain_splits_alone(saved, name):
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test", name]}))
    with raises("data.outside", repr(name)):
        opened(saved)
    with raises("data.outside", "data.source", "../mine/train"):
        opened(saved, train="../mine/train")
    with raises("data.outside", "data.source", "'/etc'"):
        opened(saved, validation="split(/etc)")
    DataConfig("digits", validation="index(../lists/val.txt)")


@pytest.mark.parametrize("name", ["train/data-00000-of-00001.arrow", "train/state.json", "train"])
def test_a_saved_data_set_links_to_nothing_outside(saved, tmp_path, name):
    (saved / name).rename(tmp_path / "moved")
    (saved / name).symlink_to(tmp_path / "mine" / name)
    with raises("data.outside", name):
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
    with raises("data.outside", "b.parquet"):
        within(snapshot, snapshot / "b.parquet")


def test_odd_states_are_refused(saved):
    state = json.loads((saved / "train/state.json").read_text())
    for change in (
        {"_fingerprint": "../../x"},
        {"_data_files": "x"},
        {"_data_files": [7]},
        {"_data_files": 2 * state["_data_files"]},
    ):
        (saved / "train/state.json").write_text(json.dumps(state | change))
        with raises("data.damaged", "state.json", *change):
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
    with raises("data.outside", "data.source"):
        opened(theirs)


@pytest.mark.parametrize(
    "place", ["local://{}", "file://{}", "zip://train.parquet::{}", "hf://datasets/me/mine/x.parquet"]
)
def test_a_card_names_plain_files_alone_from_within_the_folder_too(tmp_path, monkeypatch, place):
    """As an address, another file would pass for one below the working directory."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine.parquet"
    theirs.mkdir()
    table(8).to_parquet(mine)
    table().to_parquet(theirs / "test.parquet")
    files = [{"split": "train", "path": place.format(mine)}, {"split": "test", "path": "test.parquet"}]
    (theirs / "README.md").write_text("---\nconfigs:\n- {config_name: a, data_files: " + json.dumps(files) + "}\n---\n")
    monkeypatch.chdir(theirs)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, OSError)) as error:
        opened(theirs)
    if place.startswith("local"):
        assert code_of(error.value) == "data.outside" and "local://" in str(error.value)


@pytest.mark.parametrize(
    "inner", ["dataset_info: *a8", "configs: [{config_name: *a8}]", "dataset_info: {features: *a8}"]
)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_the_aliases_of_a_card_do_not_multiply(tmp_path, inner, name):
    table().to_parquet(tmp_path / "train.parquet")
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 20)}]" for i in range(1, 9)), inner]
    text = "\n".join(lines)
    (tmp_path / name).write_text(f"---\n{text}\n---\n" if name == "README.md" else text)
    with raises("data.damaged", str(tmp_path)):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "configs: [7]", "[" * 400, "configs: [{}]"])
def test_a_card_that_is_none_is_one_line(tmp_path, text):
    table().to_parquet(tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    with pytest.raises((ValueError, FileNotFoundError)):
        opened(tmp_path)


def test_loose_images_are_refused_before_they_are_unpacked(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    table().to_parquet(folder / "x.parquet")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a/0.png", png(0))
    (folder / "README.md").write_text("---\nconfigs: [{config_name: a, data_files: a.zip}]\n---\n")
    with raises("data.source", "rescom-timm init"):
        opened(folder)
    assert not [*(tmp_path / "cache").rglob("*.png")]


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
    with raises("data.outside", "train: row 0", str(theirs)):
        opened(theirs)
    save("images")
    assert opened(theirs).train.dataset[3]["image"]["path"] == str(theirs / "images/3.png")
    save(str(theirs / "images"))
    assert opened(theirs).train.dataset[3]["image"]["path"] == str(theirs / "images/3.png")


def test_own_images_anywhere_on_this_disk_are_read_where_their_folder_is_named(tmp_path):
    """As the refusals above say: of a table of `datasets` and of a list with absolute paths."""
    (tmp_path / "images").mkdir()
    (tmp_path / "tables").mkdir()
    places = [str(tmp_path / f"images/{i}.png") for i in range(6)]
    for i, place in enumerate(places):
        Picture.new("RGB", (8, 8), (i, 0, 0)).save(place)
    table(6, str(tmp_path / "images")).to_parquet(tmp_path / "tables/train.parquet")
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{place},{i % 2}\n" for i, place in enumerate(places)))
    with raises("data.outside", "data.source"):
        opened(tmp_path / "tables", test="holdout(0.4)")
    for name in ("a.csv", "tables/train.parquet"):
        data = load(
            DataConfig(str(tmp_path / "images"), index=str(tmp_path / name), test="holdout(0.4)"), tmp_path / "x"
        )
        assert len(data.train.labels) == 4 and data.train.dataset[0]["image"]["path"] in places
    assert below(Path("/"), ["/a/1.png"]) == ["a/1.png"]


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


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view(), pa.large_string(), pa.large_binary()], ids=str)
def test_a_list_of_any_kind_of_text_is_bounded(tmp_path, kind):
    """Those that cannot be read as a dictionary are refused: 3 GB of text in 7 KB."""
    columns = {"path": pa.array(map(str, range(3000))), "label": repeated(3000, 2**20)}
    stored = pa.schema([("path", pa.string()), ("label", kind)]).serialize().to_pybytes()
    whole = pa.table(columns)
    with pq.ParquetWriter(tmp_path / "a.parquet", whole.schema, compression="zstd", store_schema=False) as out:
        out.add_key_value_metadata({"ARROW:schema": base64.b64encode(stored).decode()})
        out.write_table(whole)
    _, problems = read(tmp_path / "a.parquet")
    assert len(problems) == 1 and ("1,048,576 bytes" in problems[0] or "save it as plain text" in problems[0])


def test_columns_count_together_for_the_rows_that_are_read_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "MAX_BATCH", 2**26)
    whole = pa.table({f"t{i}": repeated(100, 2**20) for i in range(8)})
    pq.write_table(whole, tmp_path / "a.parquet", compression="zstd")
    assert bounds.check_parquet(tmp_path / "a.parquet") <= 8


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
    with raises("data.bounds"):
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
    with raises("data.bounds", ".parquet"):
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
    with raises("data.bounds", "GiB"):
        bounds.check_arrow(tmp_path / "a.arrow")
    save(repeated(3000, 2**10))
    with raises("data.column", "'text'", "dictionary"):
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
    assert "501 x 502 cells" in read(tmp_path / "a.csv")[1][0]


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
    with raises("data.corrupted", str(path)):
        _read_array(path)


def rewritten(saved, whole, **info):
    """The training split of a saved data set with another table."""
    path = str(saved / "train/data-00000-of-00001.arrow")
    with pa.ipc.new_stream(path, whole.schema) as out:
        out.write_table(whole)
    known = json.loads((saved / "train/dataset_info.json").read_text())
    (saved / "train/dataset_info.json").write_text(json.dumps(known | info))


def test_offsets_of_a_saved_data_set_stay_in_its_buffers(saved):
    """Else memory beyond the file is read."""
    offsets = pa.py_buffer(np.array([0, 1, 2**29, 3, 4], np.int32).tobytes())
    images = pa.Array.from_buffers(pa.binary(), 4, [None, offsets, pa.py_buffer(b"xxxx")])
    both = pa.StructArray.from_arrays([images, pa.array(["a.png"] * 4)], names=["bytes", "path"])
    rewritten(saved, pa.table({"image": both, "label": pa.array([0, 1, 0, 1])}))
    with raises("data.damaged", "data-00000-of-00001.arrow"):
        opened(saved)


def test_a_saved_data_set_says_no_number_of_empty_rows(saved, monkeypatch):
    monkeypatch.setattr(bounds, "MAX_ROWS", 1000)
    nothing = pa.nulls(2000)
    both = pa.StructArray.from_arrays([nothing, nothing], names=["bytes", "path"])
    rewritten(saved, pa.table({"image": both, "label": nothing}), features=None)
    with raises("data.bounds", "1,000 rows"):
        opened(saved)


@pytest.mark.parametrize("features", [{"image": 7}, {"image": {"_type": "Nothing"}}, {"label": {"_type": "Value"}}, 7])
def test_features_that_are_none_are_one_line(saved, features):
    info = json.loads((saved / "train/dataset_info.json").read_text())
    (saved / "train/dataset_info.json").write_text(json.dumps(info | {"features": features}))
    with pytest.raises(ValueError):
        opened(saved)


@pytest.mark.parametrize("long", ["path", "class"])
def test_paths_and_classes_of_a_table_are_bounded(tmp_path, long):
    rows = [{"bytes": png(i), "path": "p" * 5000 if long == "path" else "p"} for i in range(4)]
    names = ClassLabel(names=["a" * 5000 if long == "class" else "a", "b"])
    whole = Dataset.from_dict({"image": rows, "label": [0, 1] * 2}, Features(image=Image(decode=False), label=names))
    DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "d")
    with raises("data.bounds", "4,096"):
        opened(tmp_path / "d")


def archive(path, members, opened=open):
    with opened(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as whole:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            whole.addfile(about, io.BytesIO(content))


def samples(**more):
    return {f"{i}.{end}": content for i in range(4)
            for end, content in {"png": png(i), "cls": b"%d" % (i % 2), **more}.items()}  # fmt: skip


def test_a_web_data_set_is_read(tmp_path):
    for split in ("train", "test"):
        archive(tmp_path / f"{split}.tar", samples())
    (tmp_path / "README.md").write_text(CARD_OF_TARS)
    table().to_parquet(tmp_path / "marks-a-folder-of-tables.parquet")
    assert len(opened(tmp_path, label_column="cls").train.labels) == 4


CARD_OF_TARS = """---
configs:
- config_name: a
  data_files: [{split: train, path: train.tar}, {split: test, path: test.tar}]
---
"""


@pytest.mark.parametrize("kind", ["gzip", "header", "member", "arrays", "sparse", "zip"])
def test_an_archive_decodes_to_no_more_than_its_size_allows(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(bounds, "MAX_DECODED", 2**20)
    path, zeros = tmp_path / "a.tar", bytes(2**23)
    if kind == "gzip":
        archive(path, samples(txt=zeros), gzip.open)
    elif kind == "header":
        with gzip.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as whole:
            about = tarfile.TarInfo("0.png")
            about.pax_headers = {"comment": "x" * 2**25}
            whole.addfile(about)
    elif kind in ("member", "arrays"):
        archive(path, samples(**{"txt.gz" if kind == "member" else "npz": gzip.compress(zeros)}))
    elif kind == "sparse":
        about = tarfile.TarInfo("0.png")
        about.type, about.size = tarfile.GNUTYPE_SPARSE, 512
        block = bytearray(about.tobuf(tarfile.GNU_FORMAT))
        block[483:495] = b"77777777777\0"
        block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:512]))
        path.write_bytes(bytes(block) + bytes(2048))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as whole:
            whole.writestr("0.png", zeros)
    with pytest.raises(ValueError):
        bounds.check_tar(path)
