"""Index files, the literature's draw, holdout, groups."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rescom_timm.data import index as rows
from rescom_timm.data import profiles
from rescom_timm.data.index import Index
from tests.raises import raises


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def an_index() -> Index:
    return Index(
        np.array([7, 3, 9]), np.array([0, 1, 0]), 2, {"source": "x/y", "split": "train", "rule": "all"}, ["a b", "é"]
    )


# ------------------------------------------------------------------------------------------------------------- files


def test_file_is_text_with_a_header(tmp_path: Path) -> None:
    an_index().save(tmp_path / "new" / "i.txt")
    assert (tmp_path / "new" / "i.txt").read_text(encoding="utf-8") == (
        "# rescom_timm index: 1\n# source: x/y\n# split: train\n# rule: all\n# rows: 3\n# classes: 2\n"
        "# class 0: 2 a b\n# class 1: 1 é\n# row label\n7 0\n3 1\n9 0\n"
    )
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["i.txt"]  # nothing aside is left


def test_rows_survive_a_round_trip(tmp_path: Path) -> None:
    an_index().save(tmp_path / "i.txt")
    again = Index.load(tmp_path / "i.txt")
    assert again.keys.dtype == again.labels.dtype == np.int64  # type: ignore[union-attr]
    assert list(again.keys) == [7, 3, 9] and again.labels.tolist() == [0, 1, 0]
    assert again.info == an_index().info and again.class_names == ["a b", "é"] and not again.by_path
    assert again.sha256 == an_index().sha256


path_text = st.text(st.characters(exclude_characters="\n\r", exclude_categories=("Cs",)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(path_text.filter(lambda p: not p.startswith("/")), unique=True, min_size=1, max_size=8), st.booleans())
def test_paths_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, paths: list[str], named: bool) -> None:
    labels = np.arange(len(paths))
    names = [f"class {k}" for k in labels] if named else None
    file = tmp_path_factory.mktemp("i") / "i.txt"
    Index(paths, labels, len(paths), class_names=names).save(file)
    again = Index.load(file)
    assert again.keys == paths and again.labels.tolist() == labels.tolist() and again.class_names == names


def test_sha256_is_of_the_lines_alone(tmp_path: Path) -> None:
    text = "a b/1.jpg 0\na/2.jpg 1\n"
    official = Index.load(write(tmp_path / "l.txt", text))
    assert official.sha256 == hashlib.sha256(text.encode()).hexdigest()
    official.save(tmp_path / "ours.txt")
    assert Index.load(tmp_path / "ours.txt").sha256 == official.sha256


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    an_index().save(tmp_path / "i.txt")
    before = (tmp_path / "i.txt").read_bytes()

    def lines(*_: object):
        yield "half a file"
        raise OSError("disk full")

    monkeypatch.setattr(Index, "_lines", lines)
    with pytest.raises(OSError, match="disk full"):
        an_index().save(tmp_path / "i.txt")
    assert (tmp_path / "i.txt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("index", "naming"),
    [
        (Index(["a\nb"], np.array([0]), 1), [r"'a\nb'"]),
        (Index(["a", "a\rb"], np.array([0, 0]), 1), [r"'a\rb'"]),
        (Index([0], np.array([0]), 1, {"a": "b\nc"}), [r"'b\nc'"]),  # type: ignore[arg-type]
        (Index([0], np.array([0]), 1, {"a:b": "c"}), ["'a:b'"]),  # type: ignore[arg-type]
        (Index([0], np.array([0]), 1, {"rows": "2"}), ["rows"]),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path: Path, index: Index, naming: list[str]) -> None:
    with raises("index.format", *naming):
        index.save(tmp_path / "i.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parts", "naming"),
    [
        (([1, 2], [0], 1), ["2 keys", "1 label "]),
        (([1], [3], 2), ["3", "2 classes"]),
        (([1], [-1], 2), ["-1", "2 classes"]),
        (([1], [0], 2, {}, ["a"]), ["1 class name ", "2 classes"]),
    ],
)
def test_parts_that_disagree(parts: tuple, naming: list[str]) -> None:
    with raises("index.format", *naming):
        Index(np.array(parts[0]), np.array(parts[1]), *parts[2:])


def test_official_list(tmp_path: Path) -> None:
    text = "\ufefftrain/zen garden/1 2.jpg 1\r\ntrain/a/#1.jpg 0\r\n\r\n"  # BOM, blanks, CRLF, a blank line at the end
    index = Index.load(write(tmp_path / "l.txt", text))
    assert index.keys == ["train/zen garden/1 2.jpg", "train/a/#1.jpg"] and index.labels.tolist() == [1, 0]
    assert index.by_path and index.num_classes == 2 and index.info == {}
    tabs = Index.load(write(tmp_path / "t.txt", "zen garden/1 2.jpg\t1\na/\t 3.jpg 0\n"))
    assert tabs.keys == ["zen garden/1 2.jpg", "a/\t 3.jpg"] and tabs.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.jpg 0\nb.jpg x\n", ["line 2: label 'x' is not a whole number"]),
        ("a.jpg 0\nb.jpg -1\n", ["line 2: label '-1'"]),
        ("a.jpg 0\nb.jpg 1.0\n", ["line 2: label '1.0'"]),
        ("a.jpg 0\nb.jpg 99999999999999999999\n", ["line 2: label '99999999999999999999'"]),
        ("a.jpg 0\nb.jpg ١\n", ["line 2: label"]),
        ("a.jpg 0\nb.jpg\tx\n", ["line 2: label 'x'"]),
        ("a.jpg 1\nb.jpg 2\n", ["1 of 3 classes have no image: 0; labels count from 0"]),
        ("a.jpg 0\nb.jpg 3\n", ["2 of 4 classes have no image: 1, 2"]),
        ("a.jpg 0\n1\n", ["line 2: a line reads 'path label'"]),
        ("a.jpg 0\n\nb.jpg 1\n", ["line 2 is empty"]),
        ("/a.jpg 0\n", ["line 1: '/a.jpg' is not a path relative"]),
        ("a.jpg 0\nb.jpg 2\n", ["1 of 3 classes have no image: 1"]),
        ("a.jpg 0\nb.jpg 1\na.jpg 0\n", ["line 3: 'a.jpg' is already in line 1"]),
        ("", ["holds no rows"]),
        ("x 1\ny q\nx 1\n", ["line 2", "line 3: 'x' is already in line 1", "1 of 2 classes have no image: 0"]),
    ],
)
def test_bad_lists_say_line_and_reason(tmp_path: Path, text: str, said: list[str]) -> None:
    index, problems = rows.read(write(tmp_path / "l.txt", text))
    assert index is None and len(problems) == len(said)
    for problem, words in zip(sorted(problems), sorted(said), strict=True):
        assert words in problem
    with raises("index.format", "l.txt"):
        Index.load(tmp_path / "l.txt")


HEADER = "# rescom_timm index: 1\n# rows: 2\n# classes: 2\n# class 0: 1\n# class 1: 1\n# row label\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER + "5 0\n", "2 rows, the file 1"),
        (HEADER + "5 0\n6 0\n", "class 0: the header has 1, the file 2 rows"),
        (HEADER + "5 0\n6 7\n", "line 8: label 7 is outside 0 .. 1"),
        (HEADER + "5 0\n5 1\n", "line 8: 5 is already in line 7"),
        (HEADER + "5 0\nx 1\n", "line 8: row 'x' is not a whole number"),
        (HEADER.replace("index: 1", "index: 9") + "5 0\n", "is of index format 9"),
        (HEADER.replace("# class 1: 1\n", "") + "5 0\n6 1\n", "no line 'class 1'"),
        (HEADER.replace("# rows: 2", "# rows: two") + "5 0\n6 1\n", "'rows: two' is not a whole number"),
        (HEADER.replace("# rows: 2", "# rows: 2\n# rows: 2") + "5 0\n6 1\n", "line 3: the header has 'rows' twice"),
        (HEADER.replace("# row label\n", "") + "5 0\n6 1\n", "line 6: a header line reads"),
        (HEADER.replace("# row label\n", ""), "no line '# row label'"),
        (HEADER.replace("classes: 2", "classes: 99999999999") + "5 0\n6 1\n", None),
    ],
)
def test_header_must_agree_with_the_rows(tmp_path: Path, text: str, said: str | None) -> None:
    index, problems = rows.read(write(tmp_path / "i.txt", text))
    if said is None:  # an absurd number asks for no memory
        assert (index is not None and index.num_classes == 2) or problems
        return
    assert index is None and any(said in problem for problem in problems)


def test_many_problems_are_counted_not_all_told(tmp_path: Path) -> None:
    with raises("index.format", "95") as error:
        Index.load(write(tmp_path / "l.txt", "".join(f"{i}.jpg x\n" for i in range(100))))
    assert len(str(error.value)) < 1000


def test_classes_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "l.txt", "a 0\nb 1\n")
    assert Index.load(file, num_classes=3, allow_empty=True).counts.tolist() == [1, 1, 0]
    with raises("index.format", "1 of 3", ": 2"):
        Index.load(file, num_classes=3)
    with raises("index.format", "line 2", "label 1", "0 .. 0"):
        Index.load(file, num_classes=1)
    an_index().save(tmp_path / "i.txt")
    with raises("index.format", "2 classes", "5 "):
        Index.load(tmp_path / "i.txt", num_classes=5)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with raises("file.missing", "none.txt"):
        Index.load(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a 0\n")
    with raises("index.format", "binary", "UTF-8"):
        Index.load(tmp_path / "binary")


def annotations() -> dict:
    return {
        "info": {"year": 2018},
        "images": [{"id": 10, "file_name": "x/a.jpg", "width": 3}, {"id": 11, "file_name": "x/b.jpg", "license": 2}],
        "annotations": [{"id": 1, "image_id": 11, "category_id": 0}, {"id": 2, "image_id": 10, "category_id": 1}],
        "categories": [{"id": 1, "name": "Bufo", "supercategory": "A"}, {"id": 0, "name": "Apis"}],
    }


def test_inaturalist_json(tmp_path: Path) -> None:
    index = Index.load(write(tmp_path / "train2018.json", "\n" + json.dumps(annotations())))
    assert index.keys == ["x/b.jpg", "x/a.jpg"] and index.labels.tolist() == [0, 1]
    assert index.class_names == ["Apis", "Bufo"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("annotations"), "'images' and 'annotations'"),
        (lambda a: a["annotations"].pop(), "1 image without an annotation: x/a.jpg"),
        (lambda a: a["annotations"][1].update(image_id=99), "annotation 2: its image 99 is not among the images"),
        (lambda a: a["annotations"][1].update(category_id=-1), "annotation 2: category_id -1"),
        (lambda a: a["annotations"][1].update(category_id="1"), "annotation 2: category_id '1'"),
        (
            lambda a: a["annotations"][1].update(category_id=1e20),
            "annotation 2: category_id 1e+20 is not a whole number",
        ),
        (
            lambda a: a["annotations"][1].update(category_id=True),
            "annotation 2: category_id True is not a whole number",
        ),
        (lambda a: a["annotations"][1].update(image_id=[10]), "annotation 2: its image [10] is not among the images"),
        (lambda a: a["images"][1].update(id=[10]), "1 of the 'images' have no 'id' or no 'file_name'"),
        (lambda a: a["images"][1].update(file_name=7), "1 of the 'images' have no 'id' or no 'file_name'"),
        (lambda a: a.update(images={"a": 1}), "'images' is not a list of objects"),
        (lambda a: a.update(annotations="text"), "'annotations' is not a list of objects"),
        (lambda a: a.update(categories=7), "'categories' is not a list of objects"),
        (lambda a: a["annotations"][1].update(category_id=5), "annotation 2: label 5 is outside 0 .. 1"),
        (lambda a: a["annotations"].append({"image_id": 10, "category_id": 1}), "3: 'x/a.jpg' is already"),
        (lambda a: a["images"][0].pop("file_name"), "1 of the 'images' have no 'id' or no 'file_name'"),
        (lambda a: a["categories"].append({"id": 2, "name": "Canis"}), "1 of 3 classes have no image: 2"),
    ],
)
def test_bad_inaturalist_json(tmp_path: Path, change, said: str) -> None:
    content = annotations()
    change(content)
    index, problems = rows.read(write(tmp_path / "a.json", json.dumps(content)))
    assert index is None and any(said in problem for problem in problems), problems


def test_text_that_is_no_json(tmp_path: Path) -> None:
    assert rows.read(write(tmp_path / "a.json", '{"images": [\n'))[1][0].startswith("line 2: is not JSON")


# ---------------------------------------------------------------------------------------------------- published lists


def test_places_lt(shared_lists: Path) -> None:
    index = Index.load(shared_lists / "Places_LT_train.txt")
    assert len(index) == 62_500 and index.num_classes == 365
    assert index.counts.max() == 4980 and index.counts.min() == 5 and index.imbalance == 996
    assert {name: len(c) for name, c in rows.groups(index.counts).items()} == {"many": 131, "medium": 163, "few": 71}
    official = hashlib.sha256((shared_lists / "Places_LT_train.txt").read_bytes()).hexdigest()
    assert index.sha256 == official
    val = Index.load(shared_lists / "Places_LT_val.txt")
    assert len(val) == 7300 and rows.overlap(index, val) == []


def test_other_published_lists(shared_lists: Path) -> None:
    counts = np.array(json.loads((shared_lists / "ImageNet_LT_train_class_counts.json").read_text()))
    assert [len(c) for c in rows.groups(counts).values()] == [385, 479, 136]
    assert len(Index.load(shared_lists / "ImageNet_LT_val.txt", num_classes=1000)) == 20_000
    assert len(Index.load(shared_lists / "iNaturalist18_val.txt", num_classes=8142)) == 24_426


# ------------------------------------------------------------------------------------------------------------ the draw


def reference_draw(labels: np.ndarray, factor: float) -> list[int]:
    """The literature's draw, as METHOD states it: the global legacy generator, one class after another."""
    state = np.random.get_state()
    np.random.seed(0)
    kept: list[int] = []
    classes = int(labels.max()) + 1
    biggest = len(labels) / classes
    for k in range(classes):
        mine = np.where(labels == k)[0]
        np.random.shuffle(mine)
        kept += mine[: int(biggest * (1 / factor) ** (k / (classes - 1.0)))].tolist()
    np.random.set_state(state)
    return kept


@pytest.mark.parametrize(
    ("classes", "per_class", "sizes"), [(10, 5000, (12_406, 13_996, 20_431)), (100, 500, (10_847, 12_608, 19_573))]
)
def test_exponential_is_the_literatures_draw(classes: int, per_class: int, sizes: tuple[int, ...]) -> None:
    labels = np.random.RandomState(5).permutation(np.repeat(np.arange(classes), per_class))
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    draws = [profiles.exponential(labels, classes, factor) for factor in (100, 50, 10)]
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]  # the global generator is left alone
    for kept, factor, size in zip(draws, (100, 50, 10), sizes, strict=True):
        assert len(kept) == size and (np.diff(kept) > 0).all() and kept.dtype == np.int64
        assert set(kept.tolist()) == set(reference_draw(labels, factor))
        counts = np.bincount(labels[kept])
        assert counts[0] == per_class and counts[-1] == per_class // factor
    assert set(draws[0]) < set(draws[1]) < set(draws[2])


def test_real_cifar10_draws(shared_cifar10: Path) -> None:
    from pyarrow import parquet

    file = next((shared_cifar10 / "plain_text").glob("train-*.parquet"))
    labels = parquet.read_table(file, columns=["label"])["label"].to_numpy()
    draws = [set(profiles.exponential(labels, 10, factor)) for factor in (100, 50, 10)]
    assert [len(d) for d in draws] == [12_406, 13_996, 20_431] and draws[0] < draws[1] < draws[2]


def test_step() -> None:
    labels = np.tile(np.arange(5), 40)
    assert np.bincount(labels[profiles.step(labels, 5, 10)]).tolist() == [40, 40, 4, 4, 4]


def test_unequal_classes_give_what_they_have() -> None:
    labels = np.repeat([0, 1, 2], [30, 100, 20])
    # n_max is 100: the profile asks for 100, 31 and 10
    assert np.bincount(labels[profiles.exponential(labels, 3, 10)]).tolist() == [30, 31, 10]


def test_another_seed_draws_others() -> None:
    labels = np.repeat([0, 1], 50)
    assert set(profiles.draw("exponential(10, seed=1)", labels, 2)) != set(profiles.draw("exponential(10)", labels, 2))
    assert set(profiles.draw("exponential(10, 0)", labels, 2)) == set(profiles.exponential(labels, 2, 10))
    assert len(profiles.exponential(labels, 2, 1)) == 100


def test_a_draw_leaves_no_class_empty() -> None:
    labels = np.repeat([0, 1], 50)
    with raises("data.empty_class", "class 1", "100"):
        profiles.exponential(labels, 2, 100)
    with raises("data.empty_class", "class 2"):
        profiles.step(labels, 3, 2)
    with raises("data.rule"):
        profiles.exponential(np.zeros(3, int), 1, 2)
    with raises("data.rule", "0.5"):
        profiles.exponential(labels, 2, 0.5)


@pytest.mark.parametrize(
    ("rule", "naming"),
    [
        ("exponental(100)", ["exponential(100)?"]),
        ("linear(3)", ["exponential(...), step(...)"]),
        *((rule, [repr(rule), "exponential(100)"]) for rule in ("exponential()", "exponential(1.2.3)", "all")),
        *((rule, [repr(rule), "1"]) for rule in ("exponential(0.5)", "exponential(1e999)")),
    ],
)
def test_bad_rules(rule: str, naming: list[str]) -> None:
    with raises("data.rule", *naming):
        profiles.parse_rule(rule)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.floats(0.01, 0.99))
def test_holdout(labels: list[int], fraction: float) -> None:
    array = np.array(labels)
    counts = np.bincount(array, minlength=7)
    expected = np.minimum((fraction * counts + 0.5).astype(int), np.maximum(counts - 1, 0))
    if not expected.sum():
        with raises("data.empty_class", "holdout("):
            profiles.holdout(array, fraction)
        return
    held = profiles.holdout(array, fraction)
    assert np.bincount(array[held], minlength=7).tolist() == expected.tolist()
    assert (np.diff(held) > 0).all() and held.tolist() == profiles.holdout(array, fraction).tolist()


def test_at_most() -> None:
    labels = np.repeat([0, 1, 2], [5, 2, 9])
    assert np.bincount(labels[profiles.at_most(labels, 4)]).tolist() == [4, 2, 4]


# ----------------------------------------------------------------------------------------------------------- describing


def test_groups_at_their_edges() -> None:
    groups = rows.groups(np.array([101, 100, 20, 19, 0]))
    assert {name: list(classes) for name, classes in groups.items()} == {"many": [0], "medium": [1, 2], "few": [3, 4]}


def test_imbalance_and_counts() -> None:
    assert rows.imbalance(np.array([100, 3, 8])) == pytest.approx(100 / 3)
    assert rows.imbalance(np.array([5, 0])) == float("inf")
    assert an_index().counts.tolist() == [2, 1] and an_index().imbalance == 2


def test_overlap() -> None:
    a, b = (Index(paths, np.zeros(2), 1) for paths in (["x", "y"], ["y", "z"]))
    assert rows.overlap(a, b) == ["y"]
    train, test = (Index([1, 2], np.zeros(2), 1, {"split": split}) for split in ("train", "test"))  # type: ignore[arg-type]
    assert rows.overlap(train, train) == [1, 2] and rows.overlap(train, test) == []
    for info in ({"split": "test"}, {"split": "train"}, {}):  # a path is the same file whatever split it stands in
        named = Index(["y", "z"], np.zeros(2), 1, info)  # type: ignore[arg-type]
        assert rows.overlap(Index(["x", "y"], np.zeros(2), 1, {"split": "train"}), named) == ["y"]
    with raises("index.kind"):
        rows.overlap(a, train)


def test_describe_shows_every_class_once() -> None:
    text = rows.describe(np.array([5, 500, 30]), lines=2)
    assert "535 rows, 3 classes, 500 to 5 a class, imbalance 100" in text
    assert "many: 1 class, 500 rows" in text and "few: 1 class, 5 rows" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["1-2", "3"]
    assert "inf" in rows.describe(np.array([3, 0]))


def test_a_bar_is_as_long_as_the_logarithm_of_its_classes_mean() -> None:
    lines = rows.describe(np.array([99, 9, 0]), lines=3, width=10).splitlines()[-3:]
    assert [line.count("█") for line in lines] == [10, 5, 0]  # log 100, log 10, log 1
    assert [line.count("█") for line in rows.describe(np.array([1, 1]), lines=2, width=7).splitlines()[-2:]] == [7, 7]


def test_lists_become_arrays() -> None:
    index = Index([3, 1], [0, 1], 2)  # type: ignore[arg-type]
    assert index.labels.dtype == index.keys.dtype == np.int64  # type: ignore[union-attr]


def test_take() -> None:
    taken = an_index().take(np.array([2, 0]), "two of them")
    assert list(taken.keys) == [9, 7] and taken.info["rule"] == "all, two of them" and taken.counts.tolist() == [2, 0]
    assert Index(["a", "b"], np.array([0, 1]), 2).take(np.array([1])).keys == ["b"]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000])
def test_malformed_json_is_one_error(tmp_path: Path, text: str) -> None:
    with raises("index.format", "train2018.json", "JSON"):
        Index.load(write(tmp_path / "train2018.json", text))


def test_a_run_of_one_class_has_one_rank_and_a_whole_number_no_fraction() -> None:
    *_, first, second = rows.describe(np.array([86, 5, 6]), lines=2).splitlines()
    assert first.split()[:2] == ["1-2", "46"] and second.split()[:2] == ["3", "5"]


def test_holdout_leaves_classes_of_five_at_least_so_many() -> None:
    labels = np.repeat(np.arange(5), [4, 5, 7, 8, 30])
    held = profiles.holdout(labels, 0.2, least=2)
    assert np.bincount(labels[held]).tolist() == [1, 2, 2, 2, 6]
    assert np.bincount(labels[profiles.holdout(labels, 0.2)]).tolist() == [1, 1, 1, 2, 6]
