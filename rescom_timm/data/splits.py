"""An opened split, and the rows of it that are used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset

from rescom_timm.data.config import DataConfig as DataConfig  # where it was in 0.2.0
from rescom_timm.data.index import Index
from rescom_timm.errors import InputError
from rescom_timm.text import counted

D = TypeVar("D")


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
    notes: dict[str, str | None]  # for the provenance
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

    def provenance(self) -> dict[str, object]:
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
            f"{name}: {counted(len(bad), 'label')} outside 0 .. {classes - 1}, the first is {labels[bad[0]]} in row "
            f"{bad[0]}{hint}",
        )


def renumber(labels: np.ndarray, numbers: Sequence[int], name: str) -> np.ndarray:
    """Labels (N,) with each k replaced by numbers[k]; negative (hidden) labels stay.

    Raises InputError (data.labels) for a label without an entry in `numbers`.
    """
    check_range(np.maximum(labels, 0), len(numbers), name)
    return np.where(labels < 0, labels, np.asarray(numbers, dtype=np.int64)[np.maximum(labels, 0)])


def with_labels(dataset: D, labels: np.ndarray) -> D:
    """The data set with labels (N,) as its column "label"; one of pairs, which has no columns, unchanged."""
    if not isinstance(dataset, Dataset):
        return dataset
    others = dataset.select_columns([name for name in dataset.column_names if name != "label"])
    return cast(D, others.add_column("label", pa.array(labels)))  # type: ignore[arg-type]


def short_name(text: str) -> str:
    """The last part of a path on this disk; a Hub id or a rule unchanged."""
    return Path(text).expanduser().resolve().name if Path(text).expanduser().exists() else text
