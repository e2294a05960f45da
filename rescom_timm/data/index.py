"""Which rows of a data set are trained on: index files, long-tail profiles, class counts.

An index file is text that a person can read and diff::

    # rescom_timm index: 1
    # source: uoft-cs/cifar10
    # split: train
    # rule: exponential(100)
    # rows: 12406
    # classes: 10
    # class 0: 5000 airplane
    ...
    # row label
    29 0

The last header line names the columns: ``row label`` (row numbers of the split) or ``path label`` (paths under an
image root), with a blank or a tab between. The reader also takes the official lists as published (``relative/path
label`` a line, no header) and iNaturalist's annotations (a ``.json`` file). In this file N counts rows and K counts
classes.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rescom_timm.class_names import nfc, numbers_in
from rescom_timm.data.config import Columns
from rescom_timm.data.index_files import FORMAT, RESERVED, VERSION, Rows, read_rows
from rescom_timm.data.named_columns import is_table, read_table
from rescom_timm.errors import InputError
from rescom_timm.io import write_text
from rescom_timm.metrics import GROUPS, groups
from rescom_timm.text import check_name, counted


@dataclass(frozen=True, eq=False)
class Index:
    """Rows of a data set and their labels.

    Raises InputError (index.format) if the parts disagree: lengths, labels outside 0 .. num_classes - 1, number of
    names.
    """

    keys: np.ndarray | list[str]
    """(N,) int64 row numbers of the source's split, or N paths relative to an image root."""
    labels: np.ndarray
    """(N,) int64."""
    num_classes: int
    info: dict[str, str] = field(default_factory=dict)
    """Other header lines: source, split, rule ..."""
    class_names: list[str] | None = None
    groups: np.ndarray | None = None
    """(N,) int64: rows of one number stay together where some are held out (a patient, a camera, a burst)."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "labels", np.asarray(self.labels, dtype=np.int64).reshape(-1))
        if not (isinstance(self.keys, list) and isinstance(next(iter(self.keys), ""), str)):
            set_(self, "keys", np.asarray(self.keys, dtype=np.int64).reshape(-1))
        if len(self.keys) != len(self.labels):
            raise InputError(
                "index.format",
                f"an index needs a label per key, not {counted(len(self.labels), 'label')} for "
                f"{counted(len(self.keys), 'key')}",
            )
        if len(self.labels) and not (self.labels.min() >= 0 and self.labels.max() < self.num_classes):
            raise InputError(
                "index.format",
                f"labels from {self.labels.min()} to {self.labels.max()} do not fit "
                f"{counted(self.num_classes, 'class')}",
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise InputError(
                "index.format",
                f"{counted(len(self.class_names), 'class name')} for {counted(self.num_classes, 'class')}",
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def by_path(self) -> bool:
        """True where the keys are paths, False where they are row numbers."""
        return isinstance(self.keys, list)

    @property
    def names(self) -> list[str]:
        """Class names (K,); their numbers without names."""
        return self.class_names or [str(k) for k in range(self.num_classes)]

    @property
    def counts(self) -> np.ndarray:
        """Rows of each class, (K,) int64."""
        return np.bincount(self.labels, minlength=self.num_classes).astype(np.int64)

    @property
    def imbalance(self) -> float:
        """Rows of the largest class over those of the smallest."""
        return imbalance(self.counts)

    @property
    def sha256(self) -> str:
        """Digest of the lines `key label`, without the header.

        For an official list with blanks and plain line ends this is what ``sha256sum`` prints of the file.
        """
        digest = hashlib.sha256()
        for lines in self._lines():
            digest.update(lines.encode())
        return digest.hexdigest()

    def take(self, positions: np.ndarray, rule: str = "") -> "Index":
        """The rows at these positions (M,). rule: added to the rule in the header."""
        keys = self.keys
        info = {**self.info, "rule": ", ".join(filter(None, [self.info.get("rule"), rule]))} if rule else self.info
        chosen = [keys[i] for i in positions] if isinstance(keys, list) else keys[positions]
        groups = None if self.groups is None else self.groups[positions]
        return replace(self, keys=chosen, labels=self.labels[positions], info=info, groups=groups)

    def numbered_as(self, names: Sequence[str] | None, here: str, there: str) -> "Index":
        """The index with its classes numbered as in `names`; unchanged if it or `names` has none.

        The index (`there`) may lack some of `names` (of `here`); a class without a name, "", is one that it lacks.
        Raises InputError (data.classes) if the names differ.
        """
        if not names or not self.class_names:
            return self
        own = [k for k, name in enumerate(self.class_names) if name or "" in names]
        numbers = numbers_in(names, [self.class_names[k] for k in own], here, there, lacking=True)
        info, places = self.info, np.arange(self.num_classes)
        if numbers is not None or own != list(range(len(own))):
            info, places = {**info, "numbering": "by class name"}, np.full(self.num_classes, -1)
            places[own] = range(len(own)) if numbers is None else numbers
        return replace(self, labels=places[self.labels], num_classes=len(names), class_names=list(names), info=info)

    def _lines(self) -> Iterator[str]:
        """The lines `key label`, many at a time."""
        for start in range(0, len(self), 65536):
            keys, labels = (pa.array(part[start : start + 65536]) for part in (self.keys, self.labels))
            lines = pc.binary_join_element_wise(keys.cast(pa.string()), labels.cast(pa.string()), " ").to_pylist()
            yield "\n".join([*lines, ""])

    def save(self, path: str | Path) -> None:
        """Write the text file atomically.

        Raises InputError (index.format) for text that could not be read back (line breaks, reserved header keys) and
        for a class name with control or direction characters.
        """
        names = self.class_names or [""] * self.num_classes
        header = {**self.info, "rows": str(len(self)), "classes": str(self.num_classes)}
        for k, (count, name) in enumerate(zip(self.counts, names, strict=True)):
            check_name(name, "a class name")
            header[f"class {k}"] = f"{count} {name}".rstrip()
        for key, value in header.items():
            if "\n" in key + value or "\r" in key + value or ":" in key:
                raise InputError("index.format", f"an index header cannot hold {key!r}: {value!r}")
        if taken := [key for key in self.info if RESERVED.fullmatch(key)]:
            raise InputError("index.format", f"the index header has its own {', '.join(taken)}: use other keys in info")
        if isinstance(self.keys, list) and (bad := next((k for k in self.keys if "\n" in k or "\r" in k), None)):
            raise InputError("index.format", f"an index cannot hold the path {bad!r}: it has a line break")
        top = [FORMAT + VERSION, *(f"# {key}: {value}" for key, value in header.items())]
        top.append("# path label" if self.by_path else "# row label")
        write_text(path, chain((line + "\n" for line in top), self._lines()))

    @classmethod
    def load(
        cls,
        path: str | Path,
        num_classes: int | None = None,
        allow_empty: bool = False,
        columns: Columns = Columns(),
        split: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "Index":
        """Read an index file, an official list, iNaturalist JSON or a table; strict. Arguments as in `read`.

        Raises MissingFileError (file.missing), or InputError (index.format) with the problems and their lines.
        """
        index, problems = read(path, num_classes, allow_empty, columns, split, class_names)
        if index is None:
            more = f"; and {counted(len(problems) - 5, 'more problem')}" if len(problems) > 5 else ""
            raise InputError("index.format", f"{path}: {'; '.join(problems[:5])}{more}")
        return index


def read(
    path: str | Path,
    num_classes: int | None = None,
    allow_empty: bool = False,
    columns: Columns = Columns(),
    split: str | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[Index | None, list[str]]:
    """Read a file and list all its problems: (index, no problems) or (None, problems).

    num_classes: the number of classes (None: the header's, or largest label + 1). allow_empty: classes may be without
    images, as in test and validation lists. class_names: the allowed classes; a list with names of its own may lack
    some, for `Index.numbered_as`. columns, split: of a table with named columns (CSV, TSV, JSON lines, Parquet), which
    columns and which of its splits are used. A problem is a sentence that begins with its line. Raises
    MissingFileError.
    """
    table: Callable[[Path, list[str]], Rows] | None = None
    if is_table(path):
        table = partial(read_table, columns=columns, split=split, class_names=class_names, num_classes=num_classes)
    by_name = allow_empty and class_names is not None
    rows, problems = read_rows(Path(path).expanduser(), num_classes, allow_empty, table, by_name)
    if rows is None:
        return None, problems
    info = {key: value for key, value in rows.header.items() if not RESERVED.fullmatch(key)}
    return Index(rows.keys, rows.labels, rows.classes, info, rows.class_names, rows.groups), []  # type: ignore[arg-type]


def imbalance(counts: np.ndarray) -> float:
    """Largest count over the smallest; infinite where a class has none."""
    return float(counts.max() / counts.min()) if counts.min() else float("inf")


def common_paths(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """Paths of the first that are also in the second, in any Unicode form."""
    there = set(map(nfc, second))
    return {path for path in first if nfc(path) in there}


def overlap(first: Index, second: Index) -> list[str] | list[int]:
    """Keys that are in both indexes, ascending: test images that were trained on.

    Row numbers of different splits name different rows. Raises InputError (index.kind) for rows against paths.
    """
    if first.by_path != second.by_path:
        raise InputError("index.kind", "row numbers and paths cannot be compared: both indexes must be of one kind")
    if not first.by_path and first.info.get("split") != second.info.get("split"):
        return []
    if isinstance(first.keys, list) and isinstance(second.keys, list):
        return sorted(common_paths(first.keys, second.keys))
    return np.intersect1d(first.keys, second.keys).tolist()


def describe(counts: np.ndarray, lines: int = 20, width: int = 50) -> str:
    """Counts (K,), groups and the long tail as text.

    A bar is the mean count, on a logarithmic scale, of one of at most `lines` runs of classes, largest first.
    """
    ordered = np.sort(counts)[::-1]
    text = [
        f"{counted(counts.sum(), 'row')}, {counted(len(counts), 'class')}, "
        f"{ordered[0]:,} to {ordered[-1]:,} a class, imbalance {imbalance(counts):.4g}"
    ]
    found = groups(counts)
    for name in GROUPS:
        rows = counts[found[name].numpy()] if name in found else counts[:0]
        text.append(f"{name:>6}: {counted(len(rows), 'class')}, {counted(rows.sum(), 'row')}")
    start = 1
    for run in np.array_split(ordered, min(lines, len(ordered))):
        bar = "█" * round(width * np.log1p(run.mean()) / max(np.log1p(ordered[0]), 1e-9))
        ranks = f"{start}-{start + len(run) - 1}" if len(run) > 1 else f"{start}"
        mean = f"{run.mean():,.1f}".removesuffix(".0")
        text.append(f"{ranks:>13}{mean:>9} {bar}".rstrip())
        start += len(run)
    return "\n".join(text)
