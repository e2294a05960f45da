"""An opened split, and the rows of it that are used."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from rescom_timm.data.benchmarks import data_path, get_hint
from rescom_timm.data.index import Index
from rescom_timm.data.named_columns import Columns
from rescom_timm.data.profiles import RULES, parse_call, parse_rule
from rescom_timm.errors import InputError, MissingFileError

VALIDATION = ("holdout", "unused", "split", "index")


@dataclass(frozen=True)
class DataConfig:
    """Training, validation and test data. Raises InputError (data.rule, data.outside, recipe.conflict)."""

    source: str
    """"digits", a Hub id, a folder of parquet, arrow or save_to_disk, or an image root where index lists paths.
    "memory" is the data set that was given in Python."""
    train: str = "train"
    """Name of the split to train on."""
    test: str = "test"
    """Name of the split to test on; without one, "holdout(0.2)": that fraction of each class's training rows; "none":
    nothing is tested."""
    index: str = "all"
    """Training rows: "all", "exponential(100)", "step(100)", an index file, official list or iNaturalist JSON."""
    test_index: str = "all"
    """Test rows, likewise."""
    validation: str = "none"
    """"none"; "holdout(0.1)": that fraction of each class's training rows; "unused(50)": rows per class of the split
    that the index leaves out; "split(NAME)": another split; "index(FILE)": rows of the training split or image root."""
    image_column: str | None = None
    """Of a data set or a list with named columns. None: found by its feature type, or by its name."""
    label_column: str | None = None
    """Likewise."""
    split_column: str | None = None
    """Of a list with named columns: whose values are train, test ... None: split, subset, set or partition, if any."""
    group_column: str | None = None
    """What a hold-out must not divide: patient, camera, burst. None: single images."""
    subset: str | None = None
    """Configuration of a Hub data set that has several."""

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("data.source", "data.source is empty: name a Hub data set, a local folder, or digits")
        other = self.validation[6:-1] if self.validation.startswith("split(") else ""
        for split in (self.train, self.test, other):
            if Path(split).is_absolute() or ".." in re.split(r"[/\\]", split):
                raise InputError(
                    "data.outside", f"split {split!r} leads out of data.source: use a split or a folder in it"
                )
        for rule in (self.index, self.test_index):
            if parse_call(rule, RULES):
                parse_rule(rule)
        if self.test == "none" and self.test_index != "all":
            raise ValueError("test none, and test_index names test rows: say one of them")
        if call := parse_call(self.test, ("holdout",)):
            _check_part(self.test, call[1])
            if self.test_index != "all":
                raise InputError("recipe.conflict", f"test {self.test} excludes test_index: set only one of them")
        if self.validation == "none":
            return
        name, argument = parse_call(self.validation, VALIDATION) or ("", "")
        if not name:
            raise InputError(
                "data.rule", f"validation {self.validation!r} is neither none nor {', '.join(VALIDATION)} (...)"
            )
        if name == "holdout":
            _check_part(self.validation, argument)
        if name == "unused" and not (argument.isdigit() and int(argument) > 0):
            raise InputError(
                "data.rule", f"{self.validation}: needs a whole number of rows per class, such as unused(50)"
            )
        if not argument:
            raise InputError("data.rule", f"{self.validation}: nothing is named between the brackets")

    @property
    def columns(self) -> Columns:
        """Names of the columns of a table."""
        return Columns(self.image_column, self.label_column, self.split_column, self.group_column)


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
class Part:
    """An opened split or list, and the rows of it that are used."""

    name: str
    split_name: str | None  # None for a list over an image root
    dataset: Dataset  # the whole split or list
    rows: np.ndarray  # (N,) of dataset
    index: Index  # of these rows
    notes: dict[str, Any]  # for the provenance
    all_labels: np.ndarray | None = None  # of the whole split, for "unused"
    source_names: list[str] | None = None  # of the classes in the data set, where a list has names of its own
    from_folders: bool = False  # the class names are those of the first images' folders, for want of others

    def take(self, positions: np.ndarray, rule: str) -> "Part":
        """The rows at these positions of the part. rule: how they were chosen."""
        notes = {**self.notes, "taken": "; ".join(filter(None, [self.notes.get("taken"), rule]))}
        return replace(self, rows=self.rows[positions], index=self.index.take(positions), notes=notes)

    def split(self) -> Split:
        """The rows, with their images."""
        whole = np.array_equal(self.rows, np.arange(len(self.dataset)))
        return Split(self.name, self.dataset if whole else self.dataset.select(self.rows), self.index.labels, self.rows)

    def provenance(self) -> dict[str, Any]:
        """Name, rule, rows, imbalance and sha256 of the index, as plain JSON."""
        finite = self.index.counts.min() > 0
        return {
            "name": self.name,
            "split": self.split_name,
            **self.notes,
            "rows": len(self.index),
            "imbalance": round(self.index.imbalance, 4) if finite else None,
            "sha256": self.index.sha256,
        }


Opened = Callable[..., Part]
"""(split, index, like=None, allow_empty=False); like: the training part, whose classes a test list must be of."""


def check_range(labels: np.ndarray, classes: int, name: str) -> None:
    """Raise InputError (data.labels) if a label is outside 0 .. classes - 1."""
    if (bad := np.flatnonzero((labels < 0) | (labels >= classes))).size:
        hint = "; this split hides its labels, take another" if labels[bad[0]] == -1 else ""
        raise InputError(
            "data.labels",
            f"{name}: {len(bad):,} labels are outside 0 .. {classes - 1}, the first is {labels[bad[0]]} in row "
            f"{bad[0]}{hint}",
        )


def renumber(labels: np.ndarray, numbers: Sequence[int], name: str) -> np.ndarray:
    """Labels (N,) with each k replaced by numbers[k]; negative (hidden) labels stay.

    Raises InputError (data.labels) for a label without an entry in `numbers`.
    """
    check_range(np.maximum(labels, 0), len(numbers), name)
    return np.where(labels < 0, labels, np.asarray(numbers, dtype=np.int64)[np.maximum(labels, 0)])


def with_labels(dataset: Any, labels: np.ndarray) -> Any:
    """The data set with labels (N,) as its column "label"; one of pairs, which has no columns, unchanged."""
    if not isinstance(dataset, Dataset):
        return dataset
    dataset = dataset.remove_columns("label") if "label" in dataset.column_names else dataset
    return dataset.add_column("label", pa.array(labels))  # type: ignore[arg-type]


def index_path(spec: str) -> Path:
    """The path of an index file. Raises MissingFileError."""
    path = data_path(spec)
    if not path.is_file() and (hint := get_hint(spec)):
        raise MissingFileError("data.missing", f"{spec} does not exist{hint}")
    if not path.is_file():
        raise MissingFileError(
            "file.missing", f"no index {spec!r}: use all, a rule such as exponential(100), or a file"
        )
    return path


def _check_part(rule: str, argument: str) -> None:
    try:
        valid = 0 < float(argument) < 1
    except ValueError:
        valid = False
    if not valid:
        raise InputError("data.rule", f"{rule}: needs a fraction between 0 and 1, such as holdout(0.1)")


def short_name(text: str) -> str:
    """The last part of a path on this disk; a Hub id or a rule unchanged."""
    return Path(text).expanduser().resolve().name if Path(text).expanduser().exists() else text
