"""Where images and labels come from: one `load(config)` for every kind of source.

A source is "digits" (embedded, no network), a Hub id, a local folder of parquet or arrow files or of `save_to_disk`, or
a folder of images whose rows a list names. Each becomes a `datasets.Dataset` with the columns "image" (undecoded:
{"bytes", "path"}) and "label". Images are decoded later, and never by the slow `imagefolder`.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset

from rescom_timm.class_names import numbers_in
from rescom_timm.data.benchmarks import data_path
from rescom_timm.data.config import MEMORY, VALIDATION, DataConfig, refuse_missing
from rescom_timm.data.image_folders import class_folders, folder_part, holds_tables, list_within
from rescom_timm.data.index import Index, common_paths
from rescom_timm.data.index_files import first_few
from rescom_timm.data.profiles import at_most, holdout, parse_call
from rescom_timm.data.splits import Opened, Part, Split, renumber, with_labels
from rescom_timm.data.tables import cache_folder, open_table, table_part
from rescom_timm.errors import InputError
from rescom_timm.hub_client import hub_id
from rescom_timm.text import counted

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Data:
    """Images, labels and classes of a run."""

    train: Split
    test: Split | None
    validation: Split | None
    counts: np.ndarray
    """(K,) int64: rows of each class that are really trained on."""
    class_names: list[str]
    provenance: dict[str, Any]
    """Plain JSON: source, and of each split its rule, rows, imbalance, sha256 of its index ..."""

    def summary(self) -> str:
        """Number of training images and class sizes, for people."""
        counts = self.counts
        images = f"{counted(len(self.train.labels), 'image')}, {counted(len(counts), 'class')}"
        return f"{self.train.name}: {images} of {counts.max():,} to {counts.min():,}"


def load(config: DataConfig, cache: str | Path | None = None) -> Data:
    """Open a source. cache: folder where drawn indexes are kept as text (None: the user's cache folder).

    Raises MissingFileError for missing files, folders and data sets, and InputError (areas data, index, recipe) if
    labels, index, columns, splits or classes disagree.
    """
    opened = _opener(config, cache)
    train = opened(config.train, config.index)
    num_classes, like = train.index.num_classes, train
    parts = {"train": train}
    if parse_call(config.test, ("holdout",)):
        parts["test"], train = _held_out(train, config.test)
    elif config.test != "none":
        parts["test"] = opened(config.test, config.test_index, like)
    parts["train"] = train
    if config.validation != "none":
        parts["validation"], parts["train"] = _validation(config, train, opened)
    for a, b in (("train", "test"), ("train", "validation"), ("validation", "test")):
        if a in parts and b in parts:
            _refuse_overlap(a, parts[a], b, parts[b])
    index = parts["train"].index
    if (empty := np.flatnonzero(index.counts == 0)).size:
        raise InputError(
            "data.empty_class",
            f"{len(empty):,} of {num_classes:,} classes have no training image in {train.name}: "
            f"{first_few(empty.tolist())}; Balanced Softmax and the queue need at least one per class",
        )
    return Data(
        train=parts["train"].split(),
        test=parts["test"].split() if "test" in parts else None,
        validation=parts["validation"].split() if "validation" in parts else None,
        counts=index.counts,
        class_names=index.names,
        provenance={"source": config.source, "num_classes": num_classes}
        | {name: part.provenance() for name, part in parts.items()},
    )


def numbered_as(data: Data, names: Sequence[str] | None, here: str) -> Data:
    """The data with its classes numbered as in `names`, those of `here`; unchanged if one side has no names.

    Raises InputError (data.classes) if the names differ.
    """
    numbers = numbers_in(names, data.class_names, here, data.train.name)
    if numbers is None:
        return data

    def again(split: Split) -> Split:
        labels = renumber(split.labels, numbers, split.name)
        return replace(split, labels=labels, dataset=with_labels(split.dataset, labels))

    counts = np.empty_like(data.counts)
    counts[numbers] = data.counts
    return replace(
        data, train=again(data.train), test=None if data.test is None else again(data.test), counts=counts,
        validation=None if data.validation is None else again(data.validation), class_names=list(names or ()),
        provenance={**data.provenance, "numbering": f"as in {here}, by class name"},
    )  # fmt: skip


def test_alone(
    config: DataConfig, class_names: Sequence[str], counts: np.ndarray, cache: str | Path | None = None
) -> Data:
    """The whole of `config.test`, and the split that `config.validation` names, without training images.

    In the classes (K,) of a trained run, which had `counts` (K,) images of each. The test split also takes the place of
    the training split. Raises as `load`.
    """
    nothing = Index(np.arange(0), np.arange(0), len(counts), class_names=list(class_names))
    like = Part("the run", None, Dataset.from_dict({}), np.arange(0), nothing, {})
    opened = _opener(config, cache)
    parts = {"test": opened(config.test, config.test_index, like)}
    if config.validation.startswith("split("):
        parts["validation"] = _validation(config, like, opened)[0]
        _refuse_overlap("validation", parts["validation"], "test", parts["test"])
    found = {name: part.split() for name, part in parts.items()}
    provenance = {"source": config.source, "num_classes": len(counts)}
    provenance |= {name: part.provenance() for name, part in parts.items()}
    return Data(found["test"], found["test"], found.get("validation"), counts, list(class_names), provenance)


def training_index(config: DataConfig, cache: str | Path | None = None, allow_empty: bool = False) -> Index:
    """The index of `config.index`, checked against its source, before validation rows are taken.

    allow_empty: classes may be without rows, as in test lists. Raises as `load`.
    """
    return _opener(config, cache)(config.train, config.index, allow_empty=allow_empty).index


def training_split(config: DataConfig, cache: str | Path | None = None, allow_empty: bool = False) -> Split:
    """The rows of ``training_index``, to read their images."""
    return _opener(config, cache)(config.train, config.index, allow_empty=allow_empty).split()


def labelled(config: DataConfig, cache: str | Path | None = None) -> tuple[Split, list[str] | None]:
    """The rows of `training_index` and their class names (None if only numbers), to score predictions.

    Of a folder without a list: the images of its class folders, or of those of its subfolder `config.train`.
    """
    root = data_path(config.source)  # no folder where it is an id of the Hub
    with TemporaryDirectory() as place:
        if (
            config.index == "all"
            and root.is_dir()
            and not holds_tables(root)
            and list_within(root, config.train) is None
        ):
            root = root / config.train if (root / config.train).is_dir() else root
            class_folders(root)[0].save(f"{place}/{root.resolve().name}.txt")
            config = replace(config, source=str(root), index=f"{place}/{root.resolve().name}.txt")
        part = _opener(config, cache)(config.train, config.index, allow_empty=True)
    return part.split(), part.index.class_names


def _opener(config: DataConfig, cache: str | Path | None) -> Opened:
    """The function that opens a split or list of this source: tables of rows, or a folder of image files."""
    folder = data_path(config.source)
    named = config.source in ("digits", MEMORY)
    repo = None if named else hub_id(config.source, alone=True)
    refuse_missing(config, lists=repo is not None)  # seconds before the Hub is asked
    if not named and repo is None and not holds_tables(folder):
        return functools.partial(folder_part, config, folder)
    # one reading of a split for several parts
    tables = functools.cache(functools.partial(open_table, config, None if repo else folder))
    return functools.partial(table_part, config, tables, Path(cache) if cache else cache_folder())


def _validation(config: DataConfig, train: Part, opened: Opened) -> tuple[Part, Part]:
    """The validation part, and the training part without it."""
    name, argument = parse_call(config.validation, VALIDATION) or ("", "")
    if name == "split":
        return opened(argument, "all", train), train
    if name == "index":
        return opened(config.train, argument, train), train
    rule = config.validation
    if name == "holdout":
        return _held_out(train, rule)
    return _unused(train, int(argument), rule), train


def _held_out(train: Part, rule: str) -> tuple[Part, Part]:
    """(the hold-out of each class, training without it)."""
    _, fraction = parse_call(rule, ("holdout",)) or ("", "")
    held = holdout(train.index.labels, float(fraction), groups=train.index.groups)
    kept = np.delete(np.arange(len(train.rows)), held)
    return replace(train.take(held, rule), name=f"{train.name}, {rule}"), train.take(kept, f"all but {rule}")


def _unused(train: Part, number: int, rule: str) -> Part:
    """At most `number` rows per class of the split that the index leaves out."""
    if train.all_labels is None:
        raise InputError(
            "recipe.conflict",
            f"validation {rule}: a list of images has no unused rows; use holdout(0.1) or index(FILE)",
        )
    rest = np.setdiff1d(np.arange(len(train.all_labels)), train.rows)
    if not rest.size:
        raise InputError(
            "recipe.conflict", f"validation {rule}: the index leaves no row of {train.name} unused; use holdout(0.1)"
        )
    rows = rest[at_most(train.all_labels[rest], number)]
    index = replace(train.index, keys=rows, labels=train.all_labels[rows])
    if (short := np.flatnonzero(index.counts < number)).size:
        log.warning(
            "validation %s: %d of %d classes have fewer unused rows than that (class %s): their validation rows are "
            "fewer, and none where the index takes the whole class",
            *(rule, len(short), index.num_classes, first_few([f"{k}: {index.counts[k]}" for k in short])),
        )
    return replace(train, name=f"{train.name}, {rule}", rows=rows, index=index, notes={**train.notes, "taken": rule})


def _files(part: Part) -> set[str]:
    """Paths of the images of a part on this disk."""
    paths = part.dataset.data.column("image").combine_chunks().field("path")
    return set(paths.take(part.rows).to_pylist())


def _refuse_overlap(a: str, first: Part, b: str, second: Part) -> None:
    shared: Sequence[Any] = []
    if isinstance(first.index.keys, list) and isinstance(second.index.keys, list):
        shared = sorted(common_paths(second.index.keys, first.index.keys))
        if shared and not _files(first).intersection(_files(second)):
            shared = []  # folders of one name in two Unicode forms hold other files
    elif first.split_name is not None and first.split_name == second.split_name:
        shared = np.intersect1d(first.rows, second.rows).tolist()
    if shared:
        raise InputError(
            "data.overlap",
            f"{counted(len(shared), 'image')} in both {a} ({first.name}) and {b} ({second.name}), the first: "
            f"{first_few(shared)}; remove them from one",
        )
