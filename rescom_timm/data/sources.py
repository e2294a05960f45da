"""Where images and labels come from: one ``load(config)`` for every kind of source.

A source is "digits" (embedded, no network), a Hub id, a local folder of parquet or arrow files or of ``save_to_disk``,
or a folder of images whose rows a list names. Each becomes a ``datasets.Dataset`` with the columns "image" (undecoded:
{"bytes", "path"}) and "label". Images are decoded later, and never by the slow ``imagefolder``.
"""

import functools
import hashlib
import io
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets.exceptions import DatasetNotFoundError
from datasets.table import InMemoryTable
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rescom_timm.data.index import RULES, Index, at_most, draw, holdout, parse_call, parse_rule

log = logging.getLogger(__name__)
VALIDATION = ("holdout", "unused", "split", "index")
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .avif .jp2".split())


@dataclass(frozen=True)
class DataConfig:
    """What to train and test on. Raises ValueError for a rule that cannot be."""

    source: str
    """"digits", a Hub id, a folder of parquet, arrow or save_to_disk, or an image root where index lists paths."""
    train: str = "train"
    """Name of the split to train on."""
    test: str = "test"
    """Name of the split to test on."""
    index: str = "all"
    """Training rows: "all", "exponential(100)", "step(100)", an index file, official list or iNaturalist JSON."""
    test_index: str = "all"
    """Test rows, likewise."""
    validation: str = "none"
    """"none"; "holdout(0.1)": that part of each class's training rows; "unused(50)": rows a class of the training split
    that the index leaves out; "split(NAME)": another split; "index(FILE)": rows of the training split or image root."""
    image_column: str | None = None
    """None: found by its feature type."""
    label_column: str | None = None
    """None: found by its feature type."""
    subset: str | None = None
    """Configuration of a Hub data set that has several."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("data.source is empty: name a Hub data set, a local folder, or digits")
        for rule in (self.index, self.test_index):
            if parse_call(rule, RULES):
                parse_rule(rule)
        if self.validation == "none":
            return
        name, argument = parse_call(self.validation, VALIDATION) or ("", "")
        if not name:
            raise ValueError(f"validation {self.validation!r} is neither none nor one of {', '.join(VALIDATION)} (...)")
        if name == "holdout" and not (_is_number(argument) and 0 < float(argument) < 1):
            raise ValueError(f"{self.validation}: a part between 0 and 1 is held out, such as holdout(0.1)")
        if name == "unused" and not (argument.isdigit() and int(argument) > 0):
            raise ValueError(f"{self.validation}: a whole number of rows a class is taken, such as unused(50)")
        if not argument:
            raise ValueError(f"{self.validation}: nothing is named between the brackets")


@dataclass(frozen=True, eq=False)
class Split:
    """Rows to train or evaluate on."""

    name: str
    """For people, such as "uoft-cs/cifar10 test"."""
    dataset: Dataset
    """Exactly these rows: "image" undecoded, "label"."""
    labels: np.ndarray
    """(N,) int64."""
    rows: np.ndarray
    """(N,) int64: row numbers in the source's split, or in the list, from 0."""


@dataclass(frozen=True, eq=False)
class Data:
    """Everything that a run needs to know of its images."""

    train: Split
    test: Split
    validation: Split | None
    counts: np.ndarray
    """(K,) int64: rows of each class that are really trained on."""
    class_names: list[str]
    provenance: dict[str, Any]
    """Plain JSON: source, and of each split its rule, rows, imbalance, sha256 of its index ..."""


def load(config: DataConfig, cache: str | Path | None = None) -> Data:
    """Open a source. ``cache``: folder where drawn indexes are kept as text (None: the user's cache folder).

    Raises FileNotFoundError for files, folders and data sets that are not there or cannot be reached, and ValueError
    for anything that disagrees: labels with the index, columns, splits, training with test.
    """
    opened = _opener(config, cache)
    train = opened(config.train, config.index)
    num_classes = train.index.num_classes
    parts = {"train": train, "test": opened(config.test, config.test_index, num_classes)}
    if config.validation != "none":
        parts["validation"], parts["train"] = _validation(config, train, opened)
    for a, b in (("train", "test"), ("train", "validation"), ("validation", "test")):
        if a in parts and b in parts:
            _refuse_overlap(a, parts[a], b, parts[b])
    index = parts["train"].index
    if (empty := np.flatnonzero(index.counts == 0)).size:
        raise ValueError(
            f"{len(empty)} of {num_classes} classes have no training image in {train.name}: {_first(empty.tolist())}; "
            "Balanced Softmax and the queue need at least one of each"
        )
    return Data(
        train=parts["train"].split(),
        test=parts["test"].split(),
        validation=parts["validation"].split() if "validation" in parts else None,
        counts=index.counts,
        class_names=index.class_names or [str(k) for k in range(num_classes)],
        provenance={"source": config.source, "num_classes": num_classes}
        | {name: part.provenance() for name, part in parts.items()},
    )


def training_index(config: DataConfig, cache: str | Path | None = None, allow_empty: bool = False) -> Index:
    """The index that ``config.index`` asks for, checked against its source, before validation rows are taken.

    ``allow_empty`` lets classes be without rows, as in test lists. Raises as ``load`` does.
    """
    return _opener(config, cache)(config.train, config.index, allow_empty=allow_empty).index


def training_split(config: DataConfig, cache: str | Path | None = None, allow_empty: bool = False) -> Split:
    """The rows of ``training_index``, to read their images."""
    return _opener(config, cache)(config.train, config.index, allow_empty=allow_empty).split()


@dataclass(frozen=True, eq=False)
class _Part:
    """An opened split or list, and the rows of it that are used."""

    name: str
    split_name: str | None  # None for a list over an image root
    dataset: Dataset  # the whole split or list
    rows: np.ndarray  # (N,) of dataset
    index: Index  # of these rows
    notes: dict[str, Any]  # for the provenance
    all_labels: np.ndarray | None = None  # of the whole split, for "unused"

    def take(self, positions: np.ndarray, rule: str) -> "_Part":
        """The rows at these positions of the part; ``rule`` tells how they were chosen."""
        notes = {**self.notes, "taken": rule}
        return replace(self, rows=self.rows[positions], index=self.index.take(positions), notes=notes)

    def split(self) -> Split:
        whole = np.array_equal(self.rows, np.arange(len(self.dataset)))
        return Split(self.name, self.dataset if whole else self.dataset.select(self.rows), self.index.labels, self.rows)

    def provenance(self) -> dict[str, Any]:
        finite = self.index.counts.min() > 0
        return {
            "name": self.name,
            "split": self.split_name,
            **self.notes,
            "rows": len(self.index),
            "imbalance": round(self.index.imbalance, 4) if finite else None,
            "sha256": self.index.sha256,
        }


_Opened = Callable[..., _Part]  # (split, index, num_classes=None, allow_empty=False)


def _opener(config: DataConfig, cache: str | Path | None) -> _Opened:
    """How this source opens a split or a list: tables of rows, or a root of image files."""
    folder = Path(config.source).expanduser()
    looks_local = config.source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source)
    if config.source != "digits" and folder.is_dir() and not holds_tables(folder):
        return functools.partial(_root_part, folder)
    if looks_local and not folder.is_dir():
        raise _no_source(config.source)
    tables = functools.cache(functools.partial(_table, config, folder))  # one reading of a split for several parts
    return functools.partial(_table_part, config, tables, Path(cache) if cache else cache_folder())


def _validation(config: DataConfig, train: _Part, opened: _Opened) -> tuple[_Part, _Part]:
    """The validation part, and the training part without it."""
    name, argument = parse_call(config.validation, VALIDATION) or ("", "")
    if name == "split":
        return opened(argument, "all", train.index.num_classes), train
    if name == "index":
        return opened(config.train, argument, train.index.num_classes), train
    rule = config.validation
    if name == "holdout":
        held = holdout(train.index.labels, float(argument))
        kept = np.delete(np.arange(len(train.rows)), held)
        validation, train = train.take(held, rule), train.take(kept, f"all but {rule}")
        return replace(validation, name=f"{train.name}, {rule}"), train
    return _unused(train, int(argument), rule), train


def _unused(train: _Part, number: int, rule: str) -> _Part:
    """Rows a class of the split that the index leaves out: as many as there are, at most ``number``."""
    if train.all_labels is None:
        raise ValueError(
            f"validation {rule}: a list over a folder of images has no unused rows; use holdout(0.1) or index(FILE)"
        )
    rest = np.setdiff1d(np.arange(len(train.all_labels)), train.rows)
    if not rest.size:
        raise ValueError(f"validation {rule}: the index leaves no row of {train.name} unused; use holdout(0.1)")
    rows = rest[at_most(train.all_labels[rest], number)]
    index = replace(train.index, keys=rows, labels=train.all_labels[rows])
    if (short := np.flatnonzero(index.counts < number)).size:
        log.warning(
            "validation %s: %d of %d classes have fewer unused rows than that (class %s): their validation rows are "
            "fewer, and none where the index takes the whole class",
            *(rule, len(short), index.num_classes, _first([f"{k}: {index.counts[k]}" for k in short])),
        )
    return replace(train, name=f"{train.name}, {rule}", rows=rows, index=index, notes={**train.notes, "taken": rule})


def _refuse_overlap(a: str, first: _Part, b: str, second: _Part) -> None:
    shared: Sequence[Any] = []
    if isinstance(first.index.keys, list) and isinstance(second.index.keys, list):
        shared = sorted(set(second.index.keys).intersection(first.index.keys))
    elif first.split_name is not None and first.split_name == second.split_name:
        shared = np.intersect1d(first.rows, second.rows).tolist()
    if shared:
        raise ValueError(
            f"{len(shared):,} images stand both in {a} ({first.name}) and {b} ({second.name}), the first: "
            f"{_first(shared)}; an accuracy on images of the other split would say nothing"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Tables: the Hub, parquet, arrow, save_to_disk, digits


@dataclass(frozen=True, eq=False)
class _Table:
    dataset: Dataset  # "image" and, where there is one, "label"
    labels: np.ndarray | None
    class_names: list[str] | None


def _table_part(
    config: DataConfig,
    tables: Callable[[str], _Table],
    cache: Path,
    split: str,
    spec: str,
    num_classes: int | None = None,
    allow_empty: bool = False,
) -> _Part:
    table = tables(split)
    labels, names = table.labels, table.class_names
    name = f"{_short(config.source)} {split}"
    info = {"source": config.source, "split": split, "rule": spec}
    notes: dict[str, Any] = {"rule": spec}
    classes = num_classes or (len(names) if names else None)
    dataset = table.dataset
    if spec == "all" or parse_call(spec, RULES):
        labels = _needed(labels, name)
        classes = classes or int(labels.max()) + 1
        _check_range(labels, classes, name)
        rows = np.arange(len(labels)) if spec == "all" else draw(spec, labels, classes)
        index = Index(rows, labels[rows], classes, info, names)
        if spec != "all":
            notes["index_file"] = _keep(index, labels, cache)
    else:
        index = Index.load(_index_file(spec), classes, allow_empty or num_classes is not None)
        rows = _join(dataset, index.keys, spec, name) if isinstance(index.keys, list) else index.keys
        if rows.max() >= len(dataset):
            raise ValueError(f"{spec} names row {rows.max()}, and {name} has {len(dataset):,} rows, from 0")
        if labels is None:  # the list knows the labels, the data set only the files
            whole = np.full(len(dataset), -1)
            whole[rows] = index.labels
            dataset = dataset.add_column("label", pa.array(whole))  # type: ignore[arg-type]
        else:
            _check_same(labels[rows], index.labels, rows, spec, name)
        index = replace(index, keys=rows, class_names=index.class_names or names)
    return _Part(name if spec == "all" else f"{name}, {_short(spec)}", split, dataset, rows, index, notes, labels)


def _table(config: DataConfig, folder: Path, split: str) -> _Table:
    dataset = _digits(split) if config.source == "digits" else _open(config, folder, split)
    if dataset.info.builder_name == "imagefolder":
        raise ValueError(
            f"{config.source} is a repository of loose image files, which would be numbered in string order and "
            "scanned at every start: download it and run  tools/index.py init FOLDER"
        )
    image, label = _columns(dataset.features, config)
    dataset = dataset.select_columns([image] + ([label] if label else []))
    dataset = dataset.rename_columns({image: "image"} | ({label: "label"} if label else {}))
    dataset = dataset.cast_column("image", Image(decode=False))
    if label is None:
        return _Table(dataset, None, None)
    column = dataset.data.column("label")  # a lazy ds["label"] takes 3,000 times as long
    if column.null_count or len(column) != len(dataset):
        raise ValueError(f"{config.source} {split}: {column.null_count} rows of {label!r} have no label")
    feature = dataset.features["label"]
    return _Table(
        dataset,
        column.to_numpy().astype(np.int64),
        list(feature.names) if isinstance(feature, ClassLabel) and feature.names else None,
    )


def _open(config: DataConfig, folder: Path, split: str) -> Dataset:
    """A split of a Hub data set or of a local folder."""
    source = config.source
    local = folder.is_dir()
    try:
        if local and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
            found: Any = datasets.load_from_disk(str(folder))
            if not isinstance(found, DatasetDict):
                raise ValueError(f"{source} is one saved data set without splits: save a DatasetDict of train and test")
            if split not in found:
                raise ValueError(f"Unknown split {split!r}. Should be one of {list(found)}.")
            return found[split]
        if local and (folder / split / "state.json").is_file():
            return datasets.load_from_disk(str(folder / split))  # type: ignore[return-value]
        return datasets.load_dataset(str(folder.resolve()) if local else source, config.subset, split=split)
    except (ConnectionError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"the Hub cannot be reached for {source!r} and this machine's cache does not hold it: set data.source to a "
            f"local folder of its parquet files, or load it once with a network ({_line(error)})"
        ) from None
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"no data set {source!r} on the Hub, or one that asks for  hf auth login  and consent to its terms, and no "
            f"such folder here; set data.source to its right name or to a local folder ({_line(error)})"
        ) from None
    except HFValidationError:
        raise _no_source(source) from None
    except ValueError as error:
        if "Unknown split" in str(error):
            has = str(error).partition("one of ")[2].rstrip(".")
            raise ValueError(f"{source} has no split {split!r}, only {has}: set data.train and data.test") from None
        raise


def _no_source(source: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"no folder {source} here (relative paths are relative to the working directory), and it is no id of the Hub, "
        "such as owner/name"
    )


def _columns(features: Features, config: DataConfig) -> tuple[str, str | None]:
    """Names of the image column and of the label column, None where there is no label."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [n for n, f in features.items() if isinstance(f, Value) and re.match("u?int", f.dtype)]
    image = _pick("image", config.image_column, images, features, config.source)
    if image is None:
        raise ValueError(f"{config.source} has no column of images among {', '.join(features)}: set image_column=")
    label = _pick("label", config.label_column, labels, features, config.source)
    feature = features[label] if label else None
    if feature and not isinstance(feature, ClassLabel) and "int" not in getattr(feature, "dtype", ""):
        raise ValueError(f"label column {label!r} of {config.source} holds no whole numbers: cast it to ClassLabel")
    return image, label


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _pick(kind: str, asked: str | None, found: list[str], features: Features, source: str) -> str | None:
    if asked is not None:
        if asked not in features:
            near = get_close_matches(asked, features, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(features)}"
            raise ValueError(f"{source} has no column {asked!r}: {hint}")
        return asked
    if len(found) > 1:
        raise ValueError(
            f"{source} has {len(found)} columns that could be the {kind}: {', '.join(found)}; "
            f"choose one, such as {kind}_column={found[0]}"
        )
    return found[0] if found else None


def _digits(split: str) -> Dataset:
    """scikit-learn's digits, 1,797 grey 8 x 8 images, as PNG.

    Of each class, in file order, the images number 0, 3, 6 ... 147 are the test split (50 a class, spread over all
    writers) and the others the train split (124 to 133 a class).
    """
    import PIL.Image
    from sklearn.datasets import load_digits  # imported here: it takes a second

    if split not in ("train", "test"):
        raise ValueError(f"digits has no split {split!r}, only 'train' and 'test'")
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    rank = np.empty_like(labels)  # the how-manieth image of its class
    for k in range(10):
        rank[labels == k] = np.arange((labels == k).sum())
    is_test = (rank % 3 == 0) & (rank < 150)
    rows = np.flatnonzero(is_test if split == "test" else ~is_test)
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # levels 0 .. 16
    images = []
    for row in rows:
        png = io.BytesIO()
        PIL.Image.fromarray(grey[row]).save(png, "png")
        images.append({"bytes": png.getvalue(), "path": f"digit_{row:04d}.png"})
    features = Features(image=Image(decode=False), label=ClassLabel(names=list("0123456789")))
    return Dataset.from_dict({"image": images, "label": labels[rows]}, features=features)


def _join(dataset: Dataset, paths: list[str], spec: str, name: str) -> np.ndarray:
    """Rows of a data set whose images' file names are these paths; (N,) int64.

    Compared are whole paths, else base names, else base names as ImageNet has them on the Hub, where
    n01440764_10026.JPEG is called n01440764_10026_n01440764.JPEG.
    """
    have = pc.struct_field(pa.chunked_array(dataset.data.column("image").chunks), "path").combine_chunks()
    if have.null_count == len(have):
        raise ValueError(f"{spec} lists file names, but the rows of {name} carry none: use an index of row numbers")
    want = pa.array(paths, have.type)
    rows = pc.index_in(want, value_set=have)
    if rows.null_count:
        have, want = (pc.replace_substring_regex(x, pattern="^.*/", replacement="") for x in (have, want))
        rows = pc.index_in(want, value_set=have)
    if rows.null_count:
        plain = pc.replace_substring_regex(have, pattern=r"_n\d{8}(\.\w+)$", replacement=r"\1")
        if (again := pc.index_in(want, value_set=plain)).null_count < rows.null_count:
            rows, have = again, plain
    if rows.null_count:
        missing = [paths[i] for i in np.flatnonzero(rows.is_null())[:3]]
        raise FileNotFoundError(
            f"{rows.null_count:,} of {len(paths):,} files of {spec} are not in {name}, the first: {_first(missing)}"
        )
    if pc.sum(pc.is_in(have, value_set=want)).as_py() > len(paths) or pc.count_distinct(rows).as_py() < len(paths):
        raise ValueError(f"file names of {spec} stand for several rows of {name}: use a folder of images as source")
    return rows.to_numpy().astype(np.int64)


def cache_folder() -> Path:
    """Where drawn indexes are kept: $XDG_CACHE_HOME or ~/.cache, then rescom_timm/index."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rescom_timm" / "index"


def _keep(index: Index, labels: np.ndarray, cache: Path) -> str | None:
    """Save a drawn index, once, for people to read; it is drawn anew each time, so a stale file cannot mislead.

    The name holds a digest of the labels that it was drawn from.
    """
    digest = hashlib.sha256(labels.tobytes()).hexdigest()[:12]
    stem = "-".join(index.info[key] for key in ("source", "split", "rule"))
    path = cache / f"{re.sub(r'[^A-Za-z0-9.]+', '-', stem).strip('-.')[-150:]}-{digest}.txt"
    try:
        if not path.exists():
            index.save(path)
            log.info("drawn index kept in %s", path)
    except OSError as error:
        log.warning("the drawn index could not be kept in %s (%s); training goes on", path, error)
        return None
    return str(path)


def _needed(labels: np.ndarray | None, name: str) -> np.ndarray:
    if labels is None:
        raise ValueError(f"{name} has no column of labels: set label_column=, or index= to a list with labels")
    return labels


def _check_range(labels: np.ndarray, classes: int, name: str) -> None:
    if (bad := np.flatnonzero((labels < 0) | (labels >= classes))).size:
        hint = "; this split hides its labels, take another" if labels[bad[0]] == -1 else ""
        raise ValueError(
            f"{name}: {len(bad):,} labels are outside 0 .. {classes - 1}, the first is {labels[bad[0]]} in row "
            f"{bad[0]}{hint}"
        )


def _check_same(there: np.ndarray, here: np.ndarray, rows: np.ndarray, spec: str, name: str) -> None:
    if (bad := np.flatnonzero(there != here)).size:
        i = bad[0]
        raise ValueError(
            f"{spec} and {name} disagree on {len(bad):,} of {len(here):,} labels, first in row {rows[i]}: {here[i]} in "
            f"the index, {there[i]} in the data set; was it made for another data set, split or label column?"
        )


# ---------------------------------------------------------------------------------------------------------------------
# A root of image files, and lists of paths under it


def holds_tables(folder: Path) -> bool:
    """True for a folder of parquet, arrow or save_to_disk. Looks at no more than the first thousand files."""
    return any(path.endswith((".parquet", ".arrow")) for path in islice(files_under(folder), 1000))


def files_under(folder: str | Path) -> Iterator[str]:
    """Paths of the files in and below a folder, but for hidden ones: in their name or a folder's a dot comes first."""
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (f"{path}/{name}" for name in files if not name.startswith("."))


def _root_part(root: Path, split: str, spec: str, num_classes: int | None = None, allow_empty: bool = False) -> _Part:
    """A list over an image root. ``split`` is not used: each list is a split of its own."""
    if spec == "all" or parse_call(spec, RULES):
        key = "index" if num_classes is None else "test_index"
        raise ValueError(
            f"{root} is a folder of images, and {key} is {spec!r}: set {key} to a list of 'path label' lines, or make "
            f"one with  tools/index.py init {root}"
        )
    index = Index.load(_index_file(spec), num_classes, allow_empty or num_classes is not None)
    if not isinstance(index.keys, list):
        raise ValueError(f"{spec} holds row numbers, and {root} is a folder of images: it needs a list of paths")
    layout, paths = fit_layout(root, index.keys)
    if missing := missing_files(root, paths):
        raise FileNotFoundError(
            f"{len(missing):,} of {len(paths):,} images of {spec} are not under {root} (paths {layout}), the first: "
            f"{_first(missing, 3)}"
        )
    if layout != LAYOUTS[0][0]:
        log.info("%s: paths are read %s", spec, layout)
    index = replace(index, keys=paths, class_names=index.class_names or _folder_names(index))
    notes = {"rule": spec, "paths": layout}
    name = f"{root.resolve().name} {Path(spec).name}"
    return _Part(name, None, _files_dataset(root, paths, index.labels), np.arange(len(index)), index, notes)


def _files_dataset(root: Path, paths: list[str], labels: np.ndarray) -> Dataset:
    """Paths and labels as a data set, in pieces and without a detour over Python objects: 437,513 rows in 30 MB."""
    image = Image(decode=False)
    pieces = []
    for start in range(0, len(paths), 65536):
        full = pc.binary_join_element_wise(f"{root}", pa.array(paths[start : start + 65536]), "/")
        pieces.append(pa.StructArray.from_arrays([pa.nulls(len(full), pa.binary()), full], ["bytes", "path"]))
    table = InMemoryTable(pa.table({"image": pa.chunked_array(pieces, image.pa_type), "label": labels}))
    info = datasets.DatasetInfo(features=Features(image=image, label=Value("int64")))
    # With no fingerprint given, datasets pickles the whole table to make one.
    return Dataset(table, info=info, fingerprint=uuid.uuid4().hex[:16])


def _without_lead(path: str) -> str:
    return path.partition("/")[2] or path


def _with_letters(path: str) -> str:
    """train/arena-hockey/1.jpg -> a/arena/hockey/1.jpg, as in Places365's data_256."""
    folder, _, name = _without_lead(path).rpartition("/")
    return f"{folder[:1]}/{folder.replace('-', '/')}/{name}"


def _without_letters(path: str) -> str:
    """data_256/a/arena/hockey/1.jpg -> arena-hockey/1.jpg, as in Places365's train and val."""
    folder, _, name = _without_lead(path).rpartition("/")
    return f"{folder.partition('/')[2].replace('/', '-')}/{name}"


LAYOUTS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("as listed", str),
    ("without their leading folder", _without_lead),
    ("as data_256/letter/class", lambda path: "data_256/" + _with_letters(path)),
    ("as letter/class", _with_letters),
    ("as train/class", lambda path: "train/" + _without_letters(path)),
    ("as class", _without_letters),
)
"""How a root may hold what a list names: with or without the leading folder, and Places365's two ways to unpack."""


def fit_layout(root: str | Path, paths: list[str]) -> tuple[str, list[str]]:
    """Decide, once for a list, how its paths are found under ``root``: the way that finds most of a sample of 64.

    Returns the way in words, and the paths as they stand under ``root``.
    """
    sample = paths[:: max(len(paths) // 64, 1)]
    best, name, change = 0, *LAYOUTS[0]
    for other, rule in LAYOUTS:
        found = sum(os.path.isfile(os.path.join(root, rule(path))) for path in sample)
        if found > best:
            best, name, change = found, other, rule
        if best == len(sample):
            break
    return name, paths if change is str else [change(path) for path in paths]


def missing_files(root: str | Path, paths: Sequence[str]) -> list[str]:
    """Which of the paths are not under ``root``, in their order. Lists each folder once, and stats no file."""
    folders: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        folders.setdefault(path.rpartition("/")[0], []).append(i)
    missing = []
    for folder, members in folders.items():
        try:
            names = set(os.listdir(os.path.join(root, folder)))
        except (FileNotFoundError, NotADirectoryError):
            names = set()
        missing += [i for i in members if paths[i].rpartition("/")[2] not in names]
    return [paths[i] for i in sorted(missing)]


def class_folders(root: str | Path) -> tuple[Index, list[str]]:
    """An index of a folder of class folders, and the files in it that are no images. Hidden files count as neither.

    Classes are numbered by sorted folder name, by value where all names are whole numbers (2 before 10).
    Raises ValueError where there are fewer than two class folders, or one without an image.
    """
    root = Path(root)
    names = [e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith((".", "__"))]
    numbered = all(name.isdecimal() for name in names)
    names.sort(key=lambda name: (int(name) if numbered else 0, name))
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for k, name in enumerate(names):
        before = len(paths)
        for path in sorted(files_under(root / name)):
            relative = _utf8(Path(path).relative_to(root).as_posix(), root)
            (paths if Path(path).suffix.lower() in IMAGE_SUFFIXES else others).append(relative)
        labels += [k] * (len(paths) - before)
        if len(paths) == before:
            raise ValueError(f"the class folder {root / name} holds no image: fill it or take it away")
    if len(names) < 2:
        raise ValueError(f"{root} holds {len(names)} class folders: put each class's images in a folder of its own")
    return Index(paths, np.array(labels), len(names), {"source": str(root)}, names), others


def _utf8(path: str, root: Path) -> str:
    """The path. Raises ValueError where its bytes are no UTF-8, which no list and no table can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ValueError(
            f"{root}: the name of {shown} is not UTF-8: rename it (convmv -r -f latin1 -t utf8 --notest does it for a "
            "whole folder)"
        ) from None
    return path


def _folder_names(index: Index) -> list[str] | None:
    """Names of the classes by the folder of each one's first image, where they tell the classes apart."""
    _, first = np.unique(index.labels, return_index=True)
    names = [str(index.keys[i]).rpartition("/")[0].rpartition("/")[2] for i in first]
    return names if all(names) and len(set(names)) == index.num_classes else None


def _index_file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no index {spec!r}: it is all, a rule such as exponential(100), or a file")
    return path


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def _short(text: str) -> str:
    """The last part of a path on this disk; a Hub id or a rule as it is."""
    return Path(text).expanduser().resolve().name if Path(text).expanduser().exists() else text


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _first(things: Sequence[Any], n: int = 5) -> str:
    return ", ".join(map(str, things[:n])) + (" ..." if len(things) > n else "")
