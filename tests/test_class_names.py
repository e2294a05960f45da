"""Class names of any two things that meet are compared by name: the right accuracy, or a refusal that names them."""

import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rescom_timm.analysis.opened_run import open_run
from rescom_timm.analysis.run_files import Missing, RunFolder
from rescom_timm.api import Run, train
from rescom_timm.class_names import numbers_in, rows_of
from rescom_timm.config.loading import load_dict
from rescom_timm.config.recipe import RecipeError
from rescom_timm.data.config import DataConfig
from rescom_timm.data.image_folders import class_folders
from rescom_timm.data.in_memory import in_memory
from rescom_timm.data.index import Index, overlap
from rescom_timm.data.sources import load
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import build_method, build_net, load_weights
from rescom_timm.hub.card import read_facts
from rescom_timm.inference.predict import predict
from rescom_timm.inference.teacher import first_weights
from rescom_timm.methods.distillation import Teacher
from tests.engine.child import Tiny
from tests.raises import raises

NAMES = ["cat", "dog", "emu", "fox"]
TURNED = ["fox", "emu", "cat", "dog"]
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
assert Tiny  # which registers the backbone


def split(names, each, seed, classes=NAMES, rename=None):
    """Images of a colour for each class of `classes`, their labels numbered as in names."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for name in classes:
        level = 40 + 60 * NAMES.index(name)
        for _ in range(each):
            noise = rng.integers(0, 40, (8, 8, 3))
            images.append(Image.fromarray((level + noise - 20).clip(0, 255).astype(np.uint8)))
            labels.append(names.index(name))
    order = rng.permutation(len(labels))
    columns = {"image": [images[i] for i in order], "label": [labels[i] for i in order]}
    shown = [(rename or {}).get(name, name) for name in names]
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=shown))
    return datasets.Dataset.from_dict(columns, kinds)


def parts(train=NAMES, test=NAMES, **options):
    return datasets.DatasetDict(train=split(train, 12, 0), test=split(test, 6, 1, **options))


def tree(source, output, **sections):
    return {
        "name": "run",
        "output": str(output),
        "data": {"source": str(source)},
        "views": {"train": "none", "eval": "none", "mean": [0.5] * 3, "std": [0.25] * 3},
        "net": {"backbone": "tiny_for_tests", "options": {"drop": 0.0}, "projector": {"hidden": 8, "dim": 4}},
        "method": {"name": "cross_entropy"},
        "optimizer": {"lr": 0.3},
        "train": {"epochs": 12, "batch_size": 16},
        "evaluation": {"every": 100},
        "speed": {"workers": 0},
        "track": {"log_with": []},
        **sections,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        yield tmp_path_factory.mktemp("names")


@pytest.fixture(scope="module")
def sources(place):
    """The same images, saved with their classes in other orders and under other names."""
    made = {
        "own": parts(),
        "test": parts(test=TURNED),
        "both": parts(TURNED, TURNED),
        "renamed": parts(rename={"fox": "wolf"}),
        "other": datasets.DatasetDict(train=split(NAMES, 12, 5), test=split(NAMES, 6, 6)),
    }
    made["odd"] = datasets.DatasetDict(
        {name: one.cast_column("label", datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])) for name, one in
         made["own"].items()}
    )  # fmt: skip
    for name, dataset in made.items():
        dataset.save_to_disk(place / name)
    return {name: place / name for name in made}


@pytest.fixture(scope="module")
def run(place, sources):
    found = train(tree(sources["own"], place / "runs"))
    assert figures(found.folder)["top1"] > 90, "it learns, so that an order mixed up is seen"
    return found


def figures(folder, name="test-last"):
    """Top-1, and the accuracy of each class by its name."""
    record = json.loads((Path(folder) / "evaluation" / f"{name}.json").read_text())
    return {
        "top1": record["numbers"]["top1"],
        **dict(zip(record["class_names"], record["per_class"]["accuracy"], strict=True)),
    }


def others(folder):
    return sorted(path.stem for path in (Path(folder) / "evaluation").glob("*-changed-*.json"))


# ---------------------------------------------------------------------------------------------------------- the place


@pytest.mark.parametrize(
    ("own", "theirs", "options", "expected"),
    [
        (NAMES, NAMES, {}, None),
        (NAMES, TURNED, {}, [3, 2, 0, 1]),
        (NAMES, ["emu", "cat"], {"lacking": True}, [2, 0]),
        (NAMES, ["cat", "dog"], {"lacking": True}, None),
        (NAMES, None, {}, None),
        (["0", "1", "2", "3"], TURNED, {}, None),
        (NAMES, ["0", "1"], {"lacking": True}, None),
        (["0", "1", "10", "2"], ["0", "1", "2", "10"], {}, [0, 1, 3, 2]),
        ([COMPOSED, "tea"], [DECOMPOSED, "tea"], {}, None),
        (["tea", COMPOSED], [DECOMPOSED, "tea"], {}, [1, 0]),
    ],
)
def test_numbers_by_name(own, theirs, options, expected, caplog):
    assert numbers_in(own, theirs, "here", "there", **options) == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (expected is not None)
    if expected is not None and not options:
        rows = rows_of(own, theirs, "here", "there")
        assert [unicodedata.normalize("NFC", theirs[row]) for row in rows] == own


@pytest.mark.parametrize(
    ("own", "theirs", "options", "naming"),
    [
        (NAMES, ["cat", "dog", "elk", "fox"], {}, ["'emu'", "'elk'"]),
        (NAMES, ["cat", "elk"], {"lacking": True}, [": elk", "cat, dog, emu"]),
        (NAMES, NAMES[:3], {}, ["'fox'"]),
        (NAMES, TURNED, {"ordered": True}, ["'fox'", "'cat'"]),
        (["a", "a", "b"], ["a", "b", "a"], {}, ["'a'"]),
    ],
)
def test_other_names_are_refused(own, theirs, options, naming):
    with raises("data.classes", "there", *naming) as raised:
        numbers_in(own, theirs, "here", "there", **options)
    assert str(raised.value).startswith("there") and "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------- splits


def labels_by_name(split, names):
    return [names[label] for label in split.labels]


def expected_names(dataset, names=NAMES):
    return [dataset.features["label"].names[label] for label in dataset["label"]]


def test_splits_of_a_data_set_are_matched_by_name(sources, caplog):
    data = load(DataConfig(str(sources["test"])))
    assert data.class_names == NAMES and "matched by class name" in caplog.text
    assert labels_by_name(data.test, NAMES) == expected_names(datasets.load_from_disk(sources["test"])["test"])
    assert [row["label"] for row in data.test.dataset] == data.test.labels.tolist()
    made = parts()
    made["validation"] = split(TURNED, 2, 7)
    with in_memory(made):
        data = load(DataConfig("memory", validation="split(validation)"))
    assert labels_by_name(data.validation, NAMES) == expected_names(made["validation"])
    made["test"] = split(["fox", "cat"], 3, 8, classes=["cat", "fox"])  # lacks two
    with in_memory(made):
        data = load(DataConfig("memory"))
    assert labels_by_name(data.test, NAMES) == expected_names(made["test"]) and len(data.counts) == 4


@pytest.mark.parametrize("which", ["test", "validation"])
def test_a_split_of_other_classes_is_refused(which):
    made = parts()
    made[which] = split(NAMES, 2, 3, rename={"fox": "wolf"})
    config = DataConfig("memory", validation="split(validation)" if which == "validation" else "none")
    with in_memory(made), raises("data.classes", "wolf", "cat"):
        load(config)


class Photos(torch.utils.data.Dataset):
    def __init__(self, classes):
        self.classes, self.targets = classes, [classes.index(name) for name in NAMES]

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return Image.new("RGB", (8, 8), (i, i, 0)), self.targets[i]


def test_torch_data_sets_are_matched_by_their_classes():
    with in_memory({"train": Photos(NAMES), "test": Photos(TURNED)}):
        assert load(DataConfig("memory")).test.labels.tolist() == [0, 1, 2, 3]


def images(root, paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path)
    return root


def listed(path, rows, names=None):
    keys, labels = [key for key, _ in rows], np.array([label for _, label in rows])
    Index(keys, labels, len(names) if names else int(labels.max()) + 1, class_names=names).save(path)
    if names is None:
        path.write_text("".join(f"{key} {label}\n" for key, label in rows))
    return str(path)


def test_lists_are_matched_by_the_names_in_their_headers_and_by_class_folders(tmp_path):
    root = images(tmp_path / "root", ["a/1.png", "b/2.png", "a/3.png", "b/4.png"])
    own = listed(tmp_path / "own.txt", [("a/1.png", 0), ("b/2.png", 1)], ["ant", "bee"])
    turned = listed(tmp_path / "turned.txt", [("a/3.png", 1), ("b/4.png", 0)], ["bee", "ant"])
    other = listed(tmp_path / "other.txt", [("a/3.png", 1), ("b/4.png", 0)], ["bee", "asp"])
    assert load(DataConfig(str(root), index=own, test_index=turned)).test.labels.tolist() == [0, 1]
    with raises("data.classes", "asp", "ant, bee"):
        load(DataConfig(str(root), index=own, test_index=other))
    plain = listed(tmp_path / "plain.txt", [("a/1.png", 0), ("b/2.png", 1)])
    mixed = listed(tmp_path / "mixed.txt", [("a/3.png", 1), ("b/4.png", 0)])
    assert load(DataConfig(str(root), index=plain, test_index=mixed)).test.labels.tolist() == [0, 1]


PATHS = [f"{name}/{n}.png" for n in (1, 2) for name in ("ant", "bee", "cow")]
OTHER = {"ant": 2, "bee": 0, "cow": 1}


@pytest.mark.parametrize("train_names", [["ant", "bee", "cow"], None])
@pytest.mark.parametrize(
    ("classes", "names", "ending"),
    [
        ("bee cow", None, ".txt"),
        ("ant bee cow", None, ".csv"),
        ("ant cow", ["cow", "ant"], ".txt"),
        ("cow bee", ["bee", "cow"], ".txt"),
        ("ant cow", {0: "cow", 2: "ant"}, ".json"),
        ("ant bee cow", {0: "bee", 1: "cow", 2: "ant"}, ".json"),
    ],
)
def test_a_list_may_lack_classes_and_number_the_others_otherwise(tmp_path, train_names, classes, names, ending):
    root = images(tmp_path / "root", PATHS)
    own = listed(tmp_path / "own.txt", [(path, n) for n, path in enumerate(PATHS[:3])], train_names)
    there = [path for path in PATHS[3:] if path.partition("/")[0] in classes.split()]
    number = {name: k for k, name in (names or {}).items()} if isinstance(names, dict) else OTHER
    number = {name: k for k, name in enumerate(names)} if isinstance(names, list) else number
    rows = [(path, number[path.partition("/")[0]]) for path in there]
    test = tmp_path / f"test{ending}"
    if ending == ".json":
        files = [{"id": n, "file_name": path} for n, (path, _) in enumerate(rows)]
        labels = [{"image_id": n, "category_id": label} for n, (_, label) in enumerate(rows)]
        kinds = [{"id": k, "name": name} for k, name in names.items()]
        test.write_text(json.dumps({"images": files, "annotations": labels, "categories": kinds}))
    elif ending == ".csv":
        test.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    else:
        listed(test, rows, names)
    data = load(DataConfig(str(root), index=own, test_index=str(test)))
    assert labels_by_name(data.test, ["ant", "bee", "cow"]) == [path.partition("/")[0] for path in there]
    assert data.class_names == ["ant", "bee", "cow"]


def test_folders_are_compared_only_where_they_are_classes(tmp_path):
    root = images(tmp_path / "root", [f"{fold}/{n}.png" for fold in "01" for n in range(3)])
    rows = ["1/0.png,0", "0/0.png,1", "1/1.png,1", "0/1.png,0"]  # of folds, the first images' in another order
    (tmp_path / "train.csv").write_text("path,label\n" + "\n".join(rows))
    (tmp_path / "test.csv").write_text("path,label\n1/2.png,0\n0/2.png,1\n")
    config = DataConfig(str(root), index=str(tmp_path / "train.csv"), test_index=str(tmp_path / "test.csv"))
    assert load(config).test.labels.tolist() == [0, 1]
    own = listed(tmp_path / "own.txt", [("0/0.png", 0), ("1/0.png", 1)])
    other = listed(tmp_path / "other.txt", [("0/1.png", 1), ("1/1.png", 0)], ["1", "2"])
    with raises("data.classes", ": 2"):
        load(DataConfig(str(root), index=own, test_index=other))


def numbered(values, kind):
    columns = {"image": [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(len(values))], "label": values}
    return datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image(), label=kind))


WHOLE, TEXT = datasets.Value("int64"), datasets.Value("string")
SORTED = sorted(map(str, range(11)))  # 0, 1, 10, 2 ...


@pytest.mark.parametrize(
    ("train_kind", "test_kind"), [(TEXT, WHOLE), (WHOLE, TEXT), (WHOLE, datasets.ClassLabel(names=SORTED))]
)
def test_numbers_and_texts_of_numbers_are_the_same_classes(train_kind, test_kind):
    values = list(range(11))
    train_values = [str(value) if train_kind == TEXT else value for value in values]
    test_values = [value if test_kind == WHOLE else str(value) for value in values[::-1]]
    with in_memory({"train": numbered(train_values, train_kind), "test": numbered(test_values, test_kind)}):
        data = load(DataConfig("memory"))
    assert labels_by_name(data.test, data.class_names) == [str(value) for value in values[::-1]]


def test_numbers_that_may_be_meant_either_way_are_refused():
    both = {"train": numbered(SORTED, datasets.ClassLabel(names=SORTED)), "test": numbered([3, 10], WHOLE)}
    with in_memory(both), raises("data.classes", "ClassLabel"):
        load(DataConfig("memory"))
    both = {"train": numbered(["5", "7"], TEXT), "test": numbered([0, 1], WHOLE)}
    with in_memory(both), raises("data.classes", "'0', '1'"):
        load(DataConfig("memory"))


def test_a_list_of_a_data_set_is_matched_by_name(sources, tmp_path):
    dataset = datasets.load_from_disk(sources["own"])["train"]
    labels = np.array([TURNED.index(NAMES[label]) for label in dataset["label"]])
    Index(np.arange(len(labels)), labels, 4, class_names=TURNED).save(tmp_path / "rows.txt")
    data = load(DataConfig(str(sources["own"]), index=str(tmp_path / "rows.txt")))
    assert data.class_names == NAMES and data.train.labels.tolist() == dataset["label"]
    friendly = ["Cat", "Dog", "Emu", "Fox"]  # other names of the same rows
    Index(np.arange(len(labels)), np.array(dataset["label"]), 4, class_names=friendly).save(tmp_path / "rows.txt")
    data = load(DataConfig(str(sources["test"]), index=str(tmp_path / "rows.txt")))
    assert data.class_names == friendly
    assert labels_by_name(data.test, NAMES) == expected_names(datasets.load_from_disk(sources["test"])["test"])


# ------------------------------------------------------------------------------------------------------------ Unicode


def test_two_forms_of_a_name_are_one_class_in_tables_and_folders(tmp_path):
    root = images(tmp_path / "root", [f"{n}.png" for n in range(6)])
    rows = [f"0.png,{COMPOSED}", f"1.png,{DECOMPOSED}", "2.png,tea"]
    (tmp_path / "a.csv").write_text("path,label\n" + "\n".join(rows))
    index = Index.load(tmp_path / "a.csv")
    assert index.labels.tolist() == [0, 0, 1] and index.num_classes == 2
    tests = [f"3.png,{DECOMPOSED}", "4.png,tea"]
    (tmp_path / "b.csv").write_text("path,label\n" + "\n".join(tests))
    (tmp_path / "c.csv").write_text("path,label\n" + "\n".join([f"0.png,{COMPOSED}", "2.png,tea"]))
    config = DataConfig(str(root), index=str(tmp_path / "c.csv"), test_index=str(tmp_path / "b.csv"))
    data = load(config)
    assert data.test.labels.tolist() == [0, 1] and data.class_names == [COMPOSED, "tea"]
    folders = images(tmp_path / "folders", [f"{COMPOSED}/1.png", f"{DECOMPOSED}/2.png", "tea/3.png"])
    index, _ = class_folders(folders)
    assert index.labels.tolist() == [0, 0, 1] and index.num_classes == 2
    frame = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (4, 4))] * 3, "label": [COMPOSED, DECOMPOSED, "tea"]},
        datasets.Features(image=datasets.Image(), label=datasets.Value("string")),
    )
    with in_memory({"train": frame, "test": frame.select([1])}):
        data = load(DataConfig("memory"))
    assert data.counts.tolist() == [2, 1] and data.test.labels.tolist() == [0]


@pytest.mark.parametrize("listed_as", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("stored_as", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("lead", ["", "top/"])
def test_paths_are_found_in_either_form(tmp_path, listed_as, stored_as, lead):
    root = images(
        tmp_path / "root", [f"{stored_as}/{stored_as}{n}.png" for n in range(2)] + [f"tea/{n}.png" for n in range(2)]
    )
    train_list = listed(tmp_path / "a.txt", [(f"{lead}{listed_as}/{listed_as}0.png", 0), (f"{lead}tea/0.png", 1)])
    test_list = listed(tmp_path / "b.txt", [(f"{lead}{listed_as}/{listed_as}1.png", 0), (f"{lead}tea/1.png", 1)])
    data = load(DataConfig(str(root), index=train_list, test_index=test_list))
    path = data.train.dataset[0]["image"]["path"]
    assert Path(path).is_file() and path == f"{root}/{stored_as}/{stored_as}0.png"
    assert (
        data.provenance["train"]["sha256"]
        == Index([f"{listed_as}/{listed_as}0.png", "tea/0.png"], np.array([0, 1]), 2).sha256
    )


def test_one_image_in_two_forms_stands_in_both_lists(tmp_path):
    both = [Index([f"{name}.png"], np.array([0]), 1) for name in (COMPOSED, DECOMPOSED)]
    assert overlap(*both) == [f"{COMPOSED}.png"]
    root = images(tmp_path / "root", [f"a/{COMPOSED}.png", "b/2.png"])
    own = listed(tmp_path / "a.txt", [(f"a/{COMPOSED}.png", 0), ("b/2.png", 1)])
    test = listed(tmp_path / "b.txt", [(f"a/{DECOMPOSED}.png", 0)])
    with raises("data.overlap", "1 image ", "train", "test"):
        load(DataConfig(str(root), index=own, test_index=test))


def test_named_labels_of_two_forms_are_refused():
    made = parts(rename={})
    kinds = datasets.ClassLabel(names=[COMPOSED, DECOMPOSED, "emu", "fox"])
    made = datasets.DatasetDict({name: one.cast_column("label", kinds) for name, one in made.items()})
    with in_memory(made), raises("data.classes", "u0301"):
        load(DataConfig("memory"))


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("which", ["test", "both"])
def test_another_source_is_evaluated_by_name_and_under_another_name(run, sources, which):
    own = figures(run.folder)
    before = (run.folder / "evaluation/test-last.json").read_bytes()
    run.evaluate(overrides=[f"data.source={sources[which]}"])
    assert (run.folder / "evaluation/test-last.json").read_bytes() == before
    records = {
        name: json.loads((run.folder / "evaluation" / f"{name}.json").read_text()) for name in others(run.folder)
    }
    name = next(name for name, one in records.items() if one["overrides"] == {"data.source": str(sources[which])})
    assert figures(run.folder, name) == own
    assert open_run(run.folder, overrides=[f"data.source={sources[which]}"]).data.class_names == NAMES


def test_another_source_of_other_classes_is_refused(run, sources):
    for which in ("odd", "renamed"):
        with raises("data.classes", "wolf" if which == "renamed" else "ant"):
            run.evaluate(overrides=[f"data.source={sources[which]}"])


def test_a_data_set_that_is_given_is_used(run, sources):
    own, before = figures(run.folder), (run.folder / "evaluation/test-last.json").read_bytes()
    wrong = split(NAMES, 6, 1)  # every image of the next class
    wrong = wrong.map(lambda row: {"label": (row["label"] + 1) % 4}, features=wrong.features)
    zero = Run(run.folder, dataset=datasets.DatasetDict(train=split(NAMES, 12, 0), test=wrong)).evaluate()
    assert zero["top1"] < 20
    turned = Run(run.folder, dataset=parts(TURNED, TURNED))
    assert turned.evaluate()["top1"] == own["top1"]
    assert turned._split("test")[1] == NAMES
    assert Run(run.folder, dataset=split(TURNED, 6, 1)).evaluate()["top1"] == own["top1"], "one split: all of it"
    assert run.evaluate(dataset={"test": split(TURNED, 6, 1)})["top1"] == own["top1"]
    with raises("data.classes", "wolf"):
        run.evaluate(dataset=split(NAMES, 2, 1, rename={"fox": "wolf"}))
    assert (run.folder / "evaluation/test-last.json").read_bytes() == before
    assert len({*others(run.folder)}) >= 3, "each data set has an evaluation of its own"
    assert run.evaluate()["top1"] == own["top1"]


def test_groups_are_those_of_the_classes_as_trained_on(run, sources, tmp_path):
    """Whatever the other data's training split has of each class."""
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    record = json.loads((copy / "classes.json").read_text())
    assert record["counts"] == [12, 12, 12, 12]
    turned = {"class_names": record["class_names"][::-1], "counts": [8, 30, 200, 12]}  # of fox, emu, dog, cat
    (copy / "classes.json").write_text(json.dumps({**record, **turned}))
    for dataset in (parts(TURNED, TURNED), split(TURNED, 6, 1)):
        found = Run(copy).evaluate(dataset=dataset)
        assert {"many", "medium", "few"} <= found.keys()
    counts = [json.loads((copy / f"evaluation/{name}.json").read_text())["per_class"]["count"] for name in others(copy)]
    assert [12, 200, 30, 8] in counts and all(one in ([12, 200, 30, 8], [12] * 4) for one in counts)


def test_splits_of_a_data_set_to_evaluate_on(run, sources):
    given = {"validation": split(TURNED, 4, 9), "test": split(TURNED, 6, 1)}  # none to train on
    own = figures(run.folder)
    assert run.evaluate(dataset=given)["top1"] == own["top1"]
    assert run.evaluate(dataset=given, split="validation")["top1"] > 90
    with raises("data.classes", "wolf"):
        run.evaluate(dataset={**given, "validation": split(NAMES, 2, 1, rename={"fox": "wolf"})})


def test_what_is_not_the_runs_own_is_not_taken_for_it(run, sources, place):
    run.evaluate(overrides=["data.test=train", "data.train=train"])
    shown = RunFolder(run.folder)
    assert shown.evaluation().name == "test-last" and "-changed-" in shown.evaluations()[-1]
    facts = read_facts(run.folder, run.folder / "model", "a/b")
    assert facts.evaluations and not any("-changed-" in name for name in facts.evaluations)
    copy = Path(shutil.copytree(run.folder, place / "copy"))
    for path in (copy / "evaluation").iterdir():
        if path.is_file() and "-changed-" not in path.name:
            path.unlink()
    with pytest.raises(Missing):
        RunFolder(copy).evaluation()


def test_a_source_that_has_changed_since_does_not_replace_the_evaluation(place, sources, tmp_path):
    parts().save_to_disk(tmp_path / "data")
    folder = train(tree(tmp_path / "data", tmp_path / "runs", train={"epochs": 0, "batch_size": 16})).folder
    before = (folder / "evaluation/test-last.json").read_bytes()
    other = datasets.load_from_disk(sources["other"])
    shutil.rmtree(tmp_path / "data")
    other.save_to_disk(tmp_path / "data")
    Run(folder).evaluate()
    assert (folder / "evaluation/test-last.json").read_bytes() == before and len(others(folder)) == 1


# ----------------------------------------------------------------------------------------------------- from, --resume


def started(place, source, run, tmp_path, classifier=None, **sections):
    made = tree(source, tmp_path, init_from=str(run), train={"epochs": 0, "batch_size": 16}, **sections)
    made["net"] = {**made["net"], "classifier": classifier or {}}
    return train(made).folder


@pytest.mark.parametrize("method", ["cross_entropy", "tau_norm", "lws"])
def test_a_run_starts_from_another_by_class_name(place, run, sources, tmp_path, method):
    """Of zero epochs: the classifier is that of the run, its rows in the order of the classes here."""
    folder = started(place, sources["both"], run.folder, tmp_path, method={"name": method})
    found = figures(folder)
    plain = figures(started(place, sources["own"], run.folder, tmp_path / "own", method={"name": method}))
    assert found == plain and list(found) == ["top1", *TURNED]
    assert found["top1"] > (40 if method == "tau_norm" else 80), "tau_norm leaves out the bias"


@pytest.mark.parametrize("source", ["{run}/checkpoints/{step}", "{run}/checkpoints/{step}/net.safetensors"])
def test_weights_of_other_classes_are_refused(place, run, sources, tmp_path, source):
    step = checkpoint.newest(run.folder / "checkpoints")[0].name
    with pytest.raises(RecipeError) as caught:
        started(place, sources["odd"], source.format(run=run.folder, step=step), tmp_path)
    assert "from" in str(caught.value) and any(name in str(caught.value) for name in ("'wolf'", "'ant'", "'emu'"))
    folder = started(place, sources["both"], source.format(run=run.folder, step=step), tmp_path / "turned")
    assert figures(folder)["top1"] == figures(run.folder)["top1"]


def test_a_classifier_that_is_replaced_is_no_difference_of_nets(place, run, sources, tmp_path, capsys):
    means = {"kind": "cosine", "init": "class_means"}
    folder = started(place, sources["odd"], run.folder, tmp_path / "means", means)  # of other classes too
    assert figures(folder)["top1"] > 80, "the means of the run's features tell the classes apart"
    cosine = started(place, sources["own"], run.folder, tmp_path / "cosine", {"kind": "cosine"})
    assert "has a linear classifier; the cosine one starts anew" in capsys.readouterr().out
    net = [checkpoint.newest(one / "checkpoints")[1] for one in (run.folder, cosine)]
    assert torch.equal(net[0]["encoder.body.0.weight"], net[1]["encoder.body.0.weight"])
    back = started(place, sources["own"], folder, tmp_path / "back", {"init": "class_means"})
    assert figures(back)["top1"] > 80
    linear = started(place, sources["own"], folder, tmp_path / "linear")
    assert "has a cosine classifier; the linear one starts anew" in capsys.readouterr().out
    assert linear.is_dir()


def test_a_run_is_not_resumed_with_other_names(place, sources, tmp_path):
    parts().save_to_disk(tmp_path / "data")
    made = tree(tmp_path / "data", tmp_path / "runs", train={"epochs": 1, "batch_size": 16})
    folder = train(made).folder
    before = (folder / "classes.json").read_bytes()
    for source in ("renamed", "both"):
        made["data"]["source"] = str(sources[source]) if source == "both" else str(tmp_path / "renamed")
        datasets.DatasetDict(
            {name: split(NAMES, 12 if name == "train" else 6, seed, rename={"fox": "wolf"}) for seed, name in
             enumerate(("train", "test"))}
        ).save_to_disk(tmp_path / "renamed")  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            train(made, resume=True)
        assert source == "both" or "'wolf'" in str(caught.value)
        assert (folder / "classes.json").read_bytes() == before
    _, net, state = checkpoint.newest(folder / "checkpoints")
    assert state.pop("class_names") == NAMES
    made["data"]["source"] = str(tmp_path / "renamed")
    for old in checkpoint.listed(folder / "checkpoints"):
        shutil.rmtree(old)
    checkpoint.save(folder / "checkpoints", state["progress"]["step"], net, state)  # as 0.2.0 has it
    with pytest.raises(RecipeError) as caught:
        train(made, resume=True)
    assert "'wolf'" in str(caught.value)
    made["data"]["source"] = str(tmp_path / "data")
    assert train(made, resume=True).folder == folder


def test_a_teacher_of_other_classes_is_refused(run, sources):
    made = load_dict(tree(sources["both"], "x", method={"name": "dive", "teacher": "t"}))
    net = run.pretrained().net
    for names in (NAMES, ["ant", *TURNED[1:]]):
        with pytest.raises(RecipeError) as caught:
            build_method(made, load(made.data), start=True, teacher=Teacher(net, names))
        assert "method.teacher" in str(caught.value) and ("'cat'" if names == NAMES else "'ant'") in str(caught.value)
    build_method(made, load(made.data), start=True, teacher=Teacher(net, TURNED))


def test_a_bare_file_of_weights_has_no_names(run, tmp_path):
    weights = checkpoint.newest(run.folder / "checkpoints")[1]
    save_file(weights, tmp_path / "w.safetensors")
    made = run.recipe
    net = build_net(made.net, made.views, 4)
    load_weights(net, tmp_path / "w.safetensors", TURNED)
    assert torch.equal(net.classifier.weight.detach(), weights["classifier.weight"])


def test_weights_of_the_hub_are_taken_by_name(run, tmp_path, monkeypatch):
    """As from=hf://owner/name reads them: the pushed export has the names."""
    monkeypatch.setattr("rescom_timm.inference.teacher.from_pretrained", lambda source: run.pretrained())
    made = replace(run.recipe, init_from="hf://me/x")
    net, pretrained = build_net(made.net, made.views, 4), run.pretrained()
    with first_weights(made) as first:
        load_weights(net, first[0], TURNED, first[1])
        rows = [pretrained.class_names.index(name) for name in TURNED]
        assert torch.equal(net.classifier.weight, pretrained.net.classifier.weight[rows]) and rows != [0, 1, 2, 3]
        with pytest.raises(RecipeError) as caught:
            load_weights(net, first[0], ["ant", *TURNED[1:]], first[1])
        assert "'ant'" in str(caught.value)


def test_predictions_are_scored_by_name_in_either_form(run):
    model = run.pretrained()
    model.class_names[:] = [COMPOSED, *NAMES[1:]]
    with in_memory(parts()):
        data = load(DataConfig("memory"))
    found = predict(model, data.test, class_names=[DECOMPOSED, *NAMES[1:]])
    right = [one.labels[0] == one.label for one in found]
    assert np.mean(right) > 0.8 and COMPOSED in {one.label for one in found}
