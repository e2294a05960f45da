"""Data sets in memory: `data.source: memory` inside an `in_memory` block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

import numpy as np
from datasets import Dataset, DatasetDict

from rescom_timm.data.index_files import NoSplit
from rescom_timm.errors import InputError

InMemory: TypeAlias = Dataset | DatasetDict | Mapping[str, Any] | Sequence[Any]
"""A datasets.Dataset, a map-style torch Dataset of (image, label), or a mapping of split names to such."""
_there: ContextVar[Mapping[str, Any] | None] = ContextVar("in_memory", default=None)


class Pairs(Protocol):
    """A map-style data set of (image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: int, /) -> tuple[Any, Any]: ...


class PairDataset:
    """A map-style data set of (image, label), with the methods of datasets.Dataset that are used.

    Rows are {"image": image}; images are PIL images or 8-bit arrays, before any transform to tensors.
    """

    def __init__(self, source: Pairs, rows: np.ndarray | None = None) -> None:
        self.source = source
        self.rows = np.arange(len(source)) if rows is None else rows
        self._labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if isinstance(key, slice):
            return {"image": [self.source[int(row)][0] for row in self.rows[key]]}
        return {"image": self.source[int(self.rows[key])][0]}

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def select(self, positions: Sequence[int] | np.ndarray) -> PairDataset:
        """The rows at these positions."""
        return PairDataset(self.source, self.rows[np.asarray(positions)])

    def select_columns(self, name: str) -> PairDataset:
        """Itself: a row has only an image."""
        return self

    def labels(self) -> np.ndarray:
        """Labels (N,) int64, from the attribute `targets` or `labels`, else from every item.

        Raises InputError (data.labels) unless they are whole numbers.
        """
        if self._labels is not None:
            return self._labels
        given = next((getattr(self.source, name) for name in ("targets", "labels") if hasattr(self.source, name)), None)
        if given is None:
            given = [self.source[i][1] for i in range(len(self.source))]
        found = np.asarray(given)
        if found.ndim != 1 or len(found) != len(self.source) or found.dtype.kind not in "iu":
            raise InputError("data.labels", "the data set's labels must be whole numbers, one of each image")
        self._labels = found.astype(np.int64)
        return self._labels

    def class_names(self) -> list[str] | None:
        """The attribute `classes`, if it is a list of names."""
        names = getattr(self.source, "classes", None)
        return [str(name) for name in names] if isinstance(names, list | tuple) and names else None


@contextmanager
def in_memory(dataset: InMemory | None) -> Iterator[None]:
    """While the block runs, the source "memory" is this data set, or mapping of splits; a single one is "train".

    None changes nothing. Raises InputError (data.memory) for anything else, and for a split without a length.
    """
    if dataset is None:
        yield
        return
    splits = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    if not splits:
        raise InputError("data.memory", f"{_WANTED}, not an empty one")
    token = _there.set({str(name): _split(part) for name, part in splits.items()})
    try:
        yield
    finally:
        _there.reset(token)


_WANTED = "dataset is a datasets.Dataset or a torch Dataset of (image, label), or a mapping of splits to such"


def _split(part: Any) -> Dataset | PairDataset:
    if isinstance(part, Dataset):
        return part
    if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")) or isinstance(
        part, str | list | tuple | np.ndarray
    ):
        raise InputError("data.memory", f"{_WANTED}, not {type(part).__name__}")
    if getattr(part, "transform", None) is not None or getattr(part, "transforms", None) is not None:
        warnings.warn(
            "the data set has a transform of its own, which is done before the recipe's views; where it is random, a "
            "resumed run is not the uninterrupted one",
            stacklevel=4,
        )
    return PairDataset(part)


def memory_split(name: str) -> Dataset | PairDataset:
    """A split of the data set in memory. Raises InputError: data.memory without one, data.split without that split."""
    splits = _there.get()
    if splits is None:
        raise InputError(
            "data.memory",
            "data.source is memory, a data set in Python: use rescom_timm.Run(folder, dataset=...), or "
            "data.source=PATH for the same data on disk",
        )
    if name not in splits:
        raise NoSplit(
            "data.split", f"the data set in memory has no split {name!r}, only {', '.join(splits)}: set data.test"
        )
    return splits[name]
