"""Data sets in memory, as a source: `data.source: memory` while a block of `in_memory` runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from datasets import Dataset, DatasetDict

MEMORY = "memory"
"""The source's name in a recipe."""
InMemory: TypeAlias = Dataset | DatasetDict | Mapping[str, Dataset]
_there: ContextVar[Mapping[str, Dataset] | None] = ContextVar("in_memory", default=None)


@contextmanager
def in_memory(dataset: InMemory | None) -> Iterator[None]:
    """While the block runs, the source "memory" is this data set: a DatasetDict with its splits, or one Dataset, which
    is its split "train". None changes nothing. Raises ValueError for anything else."""
    if dataset is None:
        yield
        return
    splits = {"train": dataset} if isinstance(dataset, Dataset) else dataset
    parts = list(splits.values()) if isinstance(splits, Mapping) else [splits]
    odd = [type(part).__name__ for part in parts if not isinstance(part, Dataset)]
    if odd or not parts:
        raise ValueError(f"dataset is a datasets.Dataset, or a DatasetDict of them, not {(odd or ['an empty one'])[0]}")
    token = _there.set(splits)
    try:
        yield
    finally:
        _there.reset(token)


def memory_split(name: str) -> Dataset:
    """A split of the data set in memory. Raises ValueError where there is none, or not of that name."""
    splits = _there.get()
    if splits is None:
        raise ValueError(
            "data.source is memory: the images were a data set in memory. Give it again in Python, "
            "rescom_timm.Run(folder, dataset=...), or name the same data elsewhere: data.source=PATH"
        )
    if name not in splits:
        raise ValueError(f"the data set in memory has no split {name!r}, only {', '.join(splits)}: say data.test=NAME")
    return splits[name]
