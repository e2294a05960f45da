"""Lists as people write them: every way to say the same forty images gives the same index."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rescom_timm.data import profiles
from rescom_timm.data.config import Columns, DataConfig
from rescom_timm.data.index import Index, read
from rescom_timm.data.sources import load
from tests.raises import raises

NAMES = ["cat", "dog", "eel, small"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve images in two folders."""
    for k in range(12):
        path = tmp_path / "photos" / f"f{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 20 * k, np.uint8)).save(path)
    return tmp_path / "photos"


def frame(**columns: object) -> pd.DataFrame:
    paths = [f"f{k % 2}/{k}.png" for k in range(12)]
    return pd.DataFrame({"image": paths, "label": [NAMES[k % 3] for k in range(12)], **columns})


def split_of(root: Path, table: Path, **settings: object) -> tuple[list[str], list[int], list[str]]:
    config = DataConfig(str(root), index=str(table), test="holdout(0.25)", **settings)  # type: ignore[arg-type]
    data = load(config)
    train, test = data.train.dataset, data.test.dataset
    pairs = sorted(
        (value["path"].removeprefix(f"{root}/"), label)
        for part in (train, test)
        for value, label in zip(part["image"], part["label"], strict=True)
    )
    return [path for path, _ in pairs], [label for _, label in pairs], data.class_names


def written(tmp_path: Path, kind: str) -> Path:
    table, path = frame(), tmp_path / f"list.{kind.partition('-')[0]}"
    if kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "csv-index":  # as pandas writes it when nobody says index=False
        table.to_csv(path)
    elif kind == "csv-semicolon":
        table.to_csv(path, index=False, sep=";")
    elif kind == "csv-crlf-bom":
        path.write_bytes(b"\xef\xbb\xbf" + table.to_csv(index=False, lineterminator="\r\n").encode())
    elif kind == "csv-utf16":
        path.write_text(table.to_csv(index=False), encoding="utf-16")
    elif kind == "csv-quotes":
        table.to_csv(path, index=False, quoting=1)
    elif kind == "tsv":
        table.to_csv(path, index=False, sep="\t")
    elif kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        table.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize(
    "kind",
    ["csv", "csv-index", "csv-semicolon", "csv-crlf-bom", "csv-utf16", "csv-quotes", "tsv", "jsonl", "parquet"],
)
def test_every_way_to_write_a_table_is_read(root: Path, tmp_path: Path, kind: str) -> None:
    paths, labels, names = split_of(root, written(tmp_path, kind))
    assert names == NAMES, "the classes of text labels are in sorted order"
    known = dict(zip(frame()["image"], frame()["label"], strict=True))
    assert [NAMES[k] for k in labels] == [known[path] for path in paths] and len(paths) == 12


@pytest.mark.parametrize(
    "change",
    [
        lambda root, path: f"{root}/{path}",
        lambda root, path: path.replace("/", "\\"),
        lambda root, path: f"/kaggle/input/x/{path}",
        lambda root, path: path.removesuffix(".png"),
        lambda root, path: f"photos/{path}",
    ],
    ids=["absolute", "backslash", "another machine's", "no ending", "with the root's name"],
)
def test_paths_of_other_places_are_found_under_the_root(root: Path, tmp_path: Path, change) -> None:
    table = frame()
    expected = split_of(root, written(tmp_path, "csv"))
    table["image"] = [change(root, path) for path in table["image"]]
    table.to_csv(tmp_path / "list.csv", index=False)
    assert split_of(root, tmp_path / "list.csv") == expected


def test_paths_that_would_become_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in/1.png")
    (tmp_path / "list.csv").write_text("path,label\n/x/a/b/1.png,0\n/x/c/d/1.png,1\n")
    with raises("index.data", str(tmp_path / "in"), "first 4 folders", "1.png"):
        load(DataConfig(str(tmp_path / "in"), index=str(tmp_path / "list.csv"), test="holdout(0.5)"))


def test_one_table_holds_all_splits(root: Path, tmp_path: Path) -> None:
    parts = ["Train"] * 6 + ["valid"] * 3 + ["test"] * 3
    frame(Subset=parts).to_csv(tmp_path / "all.csv", index=False)
    config = DataConfig(str(root), index=str(tmp_path / "all.csv"), validation="split(val)")
    data = load(config)
    assert data.validation is not None
    for part, numbers in ((data.train, range(6)), (data.validation, range(6, 9)), (data.test, range(9, 12))):
        assert [row["image"]["path"] for row in part.dataset] == [f"{root}/f{k % 2}/{k}.png" for k in numbers]
        assert part.labels.tolist() == [k % 3 for k in numbers]
    told = data.provenance["train"]
    assert told["columns"] == "image, label, Subset" and told["labels"] == "text of label, in sorted order"
    frame().to_csv(tmp_path / "all.csv", index=False)
    with raises("index.missing", "all.csv", "data.test=holdout(0.2)"):
        load(config)


def test_a_test_list_has_the_classes_of_training(root: Path, tmp_path: Path) -> None:
    frame().iloc[:9].to_csv(tmp_path / "train.csv", index=False)
    frame().iloc[9:10].to_csv(tmp_path / "test.csv", index=False)  # only the first class
    config = DataConfig(str(root), index=str(tmp_path / "train.csv"), test_index=str(tmp_path / "test.csv"))
    data = load(config)
    assert data.test.labels.tolist() == [0] and data.class_names == NAMES
    frame(label=["cow"] * 12).iloc[9:].to_csv(tmp_path / "test.csv", index=False)
    with raises("index.format", "row 1", "'cow'", "cat, dog, eel, small"):
        load(config)
    numbers = frame(label=[k % 3 for k in range(12)])
    numbers.iloc[:9].to_csv(tmp_path / "train.csv", index=False)
    numbers.iloc[10:].to_csv(tmp_path / "test.csv", index=False)  # class numbers stay what they are
    assert load(config).test.labels.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_metadata_is_read_as_datasets_reads_it(root: Path, name: str) -> None:
    table = frame().rename(columns={"image": "file_name"})
    if name.endswith("csv"):
        table.to_csv(root / name, index=False)
    else:
        table.to_json(root / name, orient="records", lines=True)
    data = load(DataConfig(str(root), test="holdout(0.25)"))
    assert data.counts.sum() == 9 and data.class_names == NAMES
    assert load(DataConfig(str(root), index="exponential(2)", test="holdout(0.25)")).counts.tolist() == [3, 1, 1]


def test_each_split_may_have_its_folder_and_metadata(root: Path) -> None:
    for part, rows in (("train", frame().iloc[:9]), ("test", frame().iloc[9:])):
        for path in rows["image"]:
            (root / part / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).rename(root / part / path)
        rows.rename(columns={"image": "file_name"}).to_csv(root / part / "metadata.csv", index=False)
    data = load(DataConfig(str(root)))
    assert data.test.labels.tolist() == [0, 1, 2] and data.counts.tolist() == [3, 3, 3]
    assert data.test.dataset[0]["image"]["path"] == f"{root}/test/f1/9.png"


def test_labels_that_are_numbers_but_no_class_numbers_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "file,class\n" + "".join(f"{k}.png,{label}\n" for k, label in enumerate(["10", "2", "2", "7"]))
    )
    index = Index.load(tmp_path / "a.csv")
    assert index.class_names == ["2", "7", "10"] and index.labels.tolist() == [2, 0, 0, 1]


def test_whole_numbers_stored_with_a_point_are_whole(tmp_path: Path) -> None:
    pd.DataFrame({"path": ["a", "b", "c"], "label": [0.0, 1.0, 1.0]}).to_parquet(tmp_path / "a.parquet")
    index = Index.load(tmp_path / "a.parquet")
    assert index.class_names is None and index.labels.tolist() == [0, 1, 1]
    pd.DataFrame({"path": ["a", "b"], "label": [False, True]}).to_parquet(tmp_path / "a.parquet")
    assert Index.load(tmp_path / "a.parquet").class_names == ["False", "True"]


@pytest.mark.parametrize(
    ("name", "text", "naming"),
    [
        ("a.csv", "", ["csv"]),
        ("a.csv", "x,z\n1,2\n", ["x, z", "data.image_column"]),
        ("a.csv", "path,z\n1,2\n", ["path, z", "data.label_column"]),
        ("a.csv", "path,file_path,label\n", ["path, file_path", "data.image_column"]),
        ("a.csv", "path,class,target\n1,2,3\n", ["class, target", "data.label_column"]),
        ("a.csv", "path,label\n", ["rows"]),
        ("a.csv", "path,label\n1.png,a\n2.png,\n", ["row 2", "'label'"]),
        ("a.csv", "path,label\n1.png,a\n,b\n", ["row 2", "'path'"]),
        ("a.csv", "path,label\n1.png,a\n1.png,b\n", ["row 2", "'1.png'", "row 1"]),
        ("a.csv", "path,label\n1.png,a,b,c\n2.png,a\n", ["csv"]),
        ("a.jsonl", '{"path": "1", "label": 0}\n{"path"\n', ["jsonl", "line 2"]),
        ("a.jsonl", '{"path": "1", "label": [0, 2]}\n', ["row 1", "'label'"]),
        ("a.jsonl", '{"path": 1, "label": 0}\n{"path": NaN, "label": 1}\n', ["row 2", "'path'"]),
        ("a.jsonl", "[" * 5000, ["jsonl"]),
        ("a.parquet", "no parquet", ["parquet"]),
    ],
)
def test_malformed_tables_are_refused(tmp_path: Path, name: str, text: str, naming: list[str]) -> None:
    (tmp_path / name).write_text(text)
    with raises("index.format", name, *naming):
        Index.load(tmp_path / name)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\n" + ",\n" * 3 + "1.png,\n")
    _, problems = read(tmp_path / "a.csv")
    assert len(problems) == 4
    (tmp_path / "a.csv").write_bytes("path,label\nä.png,é\n".encode("latin1"))
    assert read(tmp_path / "a.csv")[1] == ["is not UTF-8 text: save it as UTF-8"]


def test_columns_may_be_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("dx,where,path,who\nm,1.png,x,p1\nn,2.png,x,p1\nm,3.png,x,p2\n")
    index = Index.load(tmp_path / "a.csv", columns=Columns("where", "dx", group="who"))
    assert index.keys == ["1.png", "2.png", "3.png"] and index.class_names == ["m", "n"]
    assert index.groups is not None and index.groups.tolist() == [0, 0, 1]
    with raises("index.format", "'wher'", "dx, where, path, who", "data.image_column"):
        Index.load(tmp_path / "a.csv", columns=Columns("wher", "dx"))


def test_no_group_stands_on_two_sides(root: Path, tmp_path: Path) -> None:
    patients = [f"p{k // 2}" for k in range(12)]
    frame(patient=patients).to_csv(tmp_path / "list.csv", index=False)
    config = DataConfig(
        str(root),
        index=str(tmp_path / "list.csv"),
        test="holdout(0.3)",
        validation="holdout(0.2)",
        group_column="patient",
    )
    data = load(config)
    assert data.validation is not None
    sides = [
        {patients[int(row["image"]["path"].split("/")[-1][:-4])] for row in part.dataset}
        for part in (data.train, data.validation, data.test)
    ]
    assert all(sides) and len(set.union(*sides)) == sum(map(len, sides)) == 6
    assert data.counts.min() > 0, "every class keeps a training image"


def test_holding_out_groups_comes_near_the_fraction_of_each_class() -> None:
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 5, 2000), rng.integers(0, 400, 2000)
    held = profiles.holdout(labels, 0.2, groups=groups)
    assert not set(groups[held]) & set(np.delete(groups, held))
    share = np.bincount(labels[held]) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.05
    assert np.array_equal(held, profiles.holdout(labels, 0.2, groups=groups))
    with raises("data.empty_class", "holdout(0.5)"):
        profiles.holdout(np.array([0, 0, 1, 1]), 0.5, groups=np.array([0, 0, 1, 1]))


def test_a_line_of_json_may_hold_what_other_texts_break_lines_at(tmp_path: Path) -> None:
    names = ["a\u2028b", "c\x85d"]
    lines = [f'{{"path": "{k}.png", "label": "{name}"}}' for k, name in enumerate(names)]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    index = Index.load(tmp_path / "a.jsonl")
    assert index.class_names == names and index.labels.tolist() == [0, 1]
