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

import difflib
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rescom_timm.files import write_text

_FORMAT = "# rescom_timm index: "
_VERSION = "1"
_COLUMNS = {"# row label": False, "# path label": True}  # the header's last line -> are the keys paths?
_RESERVED = re.compile(r"rows|classes|class \d+|rescom_timm index")
MAX_CLASSES = 10_000_000  # a label above this is a slip of the pen, and would ask for gigabytes of counts


@dataclass(frozen=True, eq=False)
class Index:
    """Rows of a data set and their labels.

    Raises ValueError where the parts disagree (lengths, labels outside 0 .. num_classes - 1, number of names).
    """

    keys: np.ndarray | list[str]
    """(N,) int64 row numbers of the source's split, or N paths relative to an image root."""
    labels: np.ndarray
    """(N,) int64."""
    num_classes: int
    info: dict[str, str] = field(default_factory=dict)
    """What the header says besides: source, split, rule ..."""
    class_names: list[str] | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "labels", np.asarray(self.labels, dtype=np.int64).reshape(-1))
        if not (isinstance(self.keys, list) and isinstance(next(iter(self.keys), ""), str)):
            set_(self, "keys", np.asarray(self.keys, dtype=np.int64).reshape(-1))
        if len(self.keys) != len(self.labels):
            raise ValueError(f"an index needs a label for each key: {len(self.keys)} keys, {len(self.labels)} labels")
        if len(self.labels) and not (self.labels.min() >= 0 and self.labels.max() < self.num_classes):
            raise ValueError(
                f"labels from {self.labels.min()} to {self.labels.max()} do not fit {self.num_classes} classes"
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def by_path(self) -> bool:
        """True where the keys are paths, False where they are row numbers."""
        return isinstance(self.keys, list)

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
        """Digest of the lines ``key label`` alone, whatever the header says.

        For an official list with blanks and plain line ends this is what ``sha256sum`` prints of the file.
        """
        digest = hashlib.sha256()
        for start in range(0, len(self), 65536):
            digest.update("".join(self._lines(start, start + 65536)).encode())
        return digest.hexdigest()

    def take(self, positions: np.ndarray, rule: str = "") -> "Index":
        """The rows at these positions (M,) of the index. ``rule`` is added to what the header says of its making."""
        keys = self.keys
        info = {**self.info, "rule": ", ".join(filter(None, [self.info.get("rule"), rule]))} if rule else self.info
        chosen = [keys[i] for i in positions] if isinstance(keys, list) else keys[positions]
        return replace(self, keys=chosen, labels=self.labels[positions], info=info)

    def _lines(self, start: int, stop: int) -> Iterator[str]:
        keys = self.keys[start:stop]
        pairs = zip(keys if isinstance(keys, list) else keys.tolist(), self.labels[start:stop].tolist(), strict=True)
        return (f"{key} {label}\n" for key, label in pairs)

    def save(self, path: str | Path) -> None:
        """Write the text file, aside and then renamed: a reader sees the old file or the whole new one.

        Raises ValueError for what could not be read back: line breaks, or a header key that the format uses itself.
        """
        names = self.class_names or [""] * self.num_classes
        header = {**self.info, "rows": str(len(self)), "classes": str(self.num_classes)}
        for k, (count, name) in enumerate(zip(self.counts, names, strict=True)):
            header[f"class {k}"] = f"{count} {name}".rstrip()
        for key, value in header.items():
            if "\n" in key + value or "\r" in key + value or ":" in key:
                raise ValueError(f"an index header cannot hold {key!r}: {value!r} (a line break, or ':' in the key)")
        if taken := [key for key in self.info if _RESERVED.fullmatch(key)]:
            raise ValueError(f"the index header writes {', '.join(taken)} itself: choose other keys for info")
        if isinstance(self.keys, list) and (bad := next((k for k in self.keys if "\n" in k or "\r" in k), None)):
            raise ValueError(f"an index cannot hold the path {bad!r}: it has a line break")
        top = [_FORMAT + _VERSION, *(f"# {key}: {value}" for key, value in header.items())]
        top.append("# path label" if self.by_path else "# row label")
        write_text(path, chain((line + "\n" for line in top), self._lines(0, len(self))))

    @classmethod
    def load(cls, path: str | Path, num_classes: int | None = None, allow_empty: bool = False) -> "Index":
        """Read an index file, an official list or an iNaturalist JSON; strict. Arguments as for ``read``.

        Raises FileNotFoundError, or ValueError that lists what is wrong and in which lines.
        """
        index, problems = read(path, num_classes, allow_empty)
        if index is None:
            more = f"; and {len(problems) - 5:,} more problems" if len(problems) > 5 else ""
            raise ValueError(f"{path}: {'; '.join(problems[:5])}{more}")
        return index


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class _Rows:
    """What a file holds, before it is judged. ``places``: line (or annotation) number of each row."""

    unit: str
    keys: "list[str] | array[int]" = field(default_factory=list)
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    places: "array[int]" = field(default_factory=lambda: array("q"))
    header: dict[str, str] = field(default_factory=dict)
    class_names: list[str] | None = None
    num_classes: int | None = None


def read(path: str | Path, num_classes: int | None = None, allow_empty: bool = False) -> tuple[Index | None, list[str]]:
    """Read a file and say everything that is wrong with it.

    ``num_classes`` is the number of classes that the labels must fit (None: the header's, or largest label + 1).
    ``allow_empty`` lets classes be without images, as test and validation lists may be.
    Returns the index and no problems, or None and the problems, each a sentence that begins with its line.
    Raises FileNotFoundError where there is no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no index file {path}")
    problems: list[str] = []
    try:
        rows = _read_json(path, problems) if path.suffix.lower() == ".json" else _read_lines(path, problems)
    except UnicodeDecodeError as error:
        return None, [f"is not UTF-8 text ({error.reason} at byte {error.start})"]
    if not rows.labels:
        return None, problems or ["holds no rows"]
    labels = np.frombuffer(rows.labels, dtype=np.int64)
    classes = _judge_classes(rows, labels, num_classes, allow_empty, problems)
    _judge_duplicates(rows, problems)
    if problems:
        return None, problems
    keys = rows.keys if isinstance(rows.keys, list) else np.frombuffer(rows.keys, dtype=np.int64)
    info = {key: value for key, value in rows.header.items() if not _RESERVED.fullmatch(key)}
    return Index(keys, labels, classes, info, rows.class_names), []


def _read_lines(path: Path, problems: list[str]) -> _Rows:
    rows = _Rows("line")
    blank = 0
    with open(path, encoding="utf-8-sig") as file:
        by_path: bool | None = True
        ours = file.readline().startswith(_FORMAT.rstrip())
        file.seek(0)
        lines = iter(enumerate(file, 1))
        if ours:
            by_path = _read_header(lines, rows, problems)
        if by_path is None:
            return rows
        rows.keys = [] if by_path else array("q")
        for number, line in lines:
            text = line.rstrip("\n")
            key, _, label = text.rpartition("\t" if "\t" in text.rpartition(" ")[2] else " ")
            if not key and not label.strip():
                blank = blank or number  # blank lines are fine at the end of the file only
                continue
            if blank:
                problems.append(f"line {blank} is empty")
                blank = 0
            if wrong := _wrong(key, label, by_path):
                problems.append(f"line {number}: {wrong}")
                continue
            rows.keys.append(key if by_path else int(key))  # type: ignore[arg-type]
            rows.labels.append(int(label))
            rows.places.append(number)
    return rows


def _wrong(key: str, label: str, by_path: bool) -> str:
    """What is wrong with one line, or the empty string."""
    if not _is_label(label):
        return f"label {label!r} is not a whole number from 0"
    if not key:
        return (
            f"a line reads '{'path' if by_path else 'row'} label', with a blank or a tab between; this one is {label!r}"
        )
    if by_path and key.startswith("/"):
        return f"{key!r} is not a path relative to the image root"
    if not by_path and not (key.isascii() and key.isdigit() and len(key) < 19):
        return f"row {key!r} is not a whole number from 0"
    return ""


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < len(str(MAX_CLASSES))


def _read_header(lines: Iterator[tuple[int, str]], rows: _Rows, problems: list[str]) -> bool | None:
    """Read up to the line that names the columns; returns whether the keys are paths, None where it is spoilt."""
    for number, line in lines:
        line = line.rstrip("\n")
        if line in _COLUMNS:
            _read_class_lines(rows, problems)
            return _COLUMNS[line]
        key, colon, value = line.removeprefix("# ").partition(":")
        if not line.startswith("# ") or not colon:
            problems.append(f"line {number}: a header line reads '# key: value', this one {line!r}")
            return None
        if key in rows.header:
            problems.append(f"line {number}: the header has {key!r} twice")
        rows.header[key] = value.strip()
        if number == 1 and rows.header[key] != _VERSION:
            problems.append(f"is of index format {value.strip()}; this rescom_timm reads format {_VERSION}")
            return None
    problems.append("has no line '# row label' or '# path label' after the header")
    return None


def _read_class_lines(rows: _Rows, problems: list[str]) -> None:
    """Take number and names of the classes from the header."""
    header = rows.header
    for key in ("rows", "classes"):
        if not header.get(key, "").isdigit():
            problems.append(f"the header's '{key}: {header.get(key, '')}' is not a whole number")
    if not _is_label(header.get("classes", "")):
        return
    rows.num_classes = int(header["classes"])
    names = []
    for k in range(rows.num_classes):
        if f"class {k}" not in header:
            problems.append(f"the header says {rows.num_classes} classes and has no line 'class {k}'")
            return
        names.append(header[f"class {k}"].partition(" ")[2])
    rows.class_names = names if any(names) else None


def _read_json(path: Path, problems: list[str]) -> _Rows:
    """iNaturalist's (and COCO's) annotations: images, annotations and, where given, categories."""
    rows = _Rows("annotation")
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_slim)
    except json.JSONDecodeError as error:
        problems.append(f"line {error.lineno}: is not JSON ({error.msg})")
        return rows
    except RecursionError:
        problems.append("is JSON nested too deep: iNaturalist's files are flat")
        return rows
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        problems.append(f"is not JSON ({error})")
        return rows
    if not isinstance(content, dict) or not content.get("images") or not content.get("annotations"):
        problems.append("is JSON without 'images' and 'annotations': iNaturalist's train and val files have both")
        return rows
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key, []), list | None):
            problems.append(f"{key!r} is not a list of objects, as iNaturalist's is")
            return rows
    files, bad = _pairs(content["images"])
    if bad:
        problems.append(f"{bad:,} of the 'images' have no 'id' or no 'file_name'")
    seen = set()
    for number, annotation in enumerate(content["annotations"], 1):
        image, label = annotation if isinstance(annotation, tuple) else (None, None)
        if not isinstance(image, int | str) or image not in files:
            problems.append(f"annotation {number}: its image {image!r} is not among the images")
        elif type(label) is not int or not 0 <= label < MAX_CLASSES:
            problems.append(f"annotation {number}: category_id {label!r} is not a whole number from 0")
        else:
            seen.add(image)
            rows.keys.append(files[image])
            rows.labels.append(label)
            rows.places.append(number)
    if without := [name for image, name in files.items() if image not in seen]:
        problems.append(f"{len(without):,} images have no annotation: {_first(without)}")
    names, _ = _pairs(content.get("categories") or [])
    if names and all(type(k) is int and 0 <= k < MAX_CLASSES for k in names):
        rows.num_classes = max(names) + 1
        if len(names) == rows.num_classes:
            rows.class_names = [str(names[k]) for k in range(rows.num_classes)]
    return rows


def _slim(node: dict[str, Any]) -> Any:
    """Keep of each JSON object the two fields in use, as it is parsed: iNat18's file has 437,513 of each kind."""
    for key, value in (("id", "file_name"), ("image_id", "category_id"), ("id", "name")):
        if key in node and value in node:
            return node[key], node[value]
    return node


def _pairs(nodes: Sequence[Any]) -> tuple[dict[Any, Any], int]:
    """The nodes as id -> name, and how many are none: ids are numbers or text, names text."""
    pairs = [node for node in nodes if isinstance(node, tuple)]
    good = {key: name for key, name in pairs if isinstance(key, int | str) and isinstance(name, str)}
    return good, len(nodes) - sum(isinstance(key, int | str) and isinstance(name, str) for key, name in pairs)


def _judge_classes(
    rows: _Rows, labels: np.ndarray, num_classes: int | None, allow_empty: bool, problems: list[str]
) -> int:
    """Labels against the number of classes, header against the rows. Returns the number of classes."""
    header = rows.header
    if num_classes is not None and rows.num_classes not in (None, num_classes):
        problems.append(f"is of {rows.num_classes} classes where {num_classes} are expected")
    known = rows.num_classes if num_classes is None else num_classes
    classes = int(labels.max()) + 1 if known is None else known
    outside = np.flatnonzero(labels >= classes)
    for i in outside[:20]:
        problems.append(f"{rows.unit} {rows.places[i]}: label {labels[i]} is outside 0 .. {classes - 1}")
    if len(outside) > 20:
        problems.append(f"{len(outside) - 20:,} more labels are outside 0 .. {classes - 1}")
    counts = np.bincount(labels[labels < classes], minlength=classes)
    if not allow_empty and (empty := np.flatnonzero(counts == 0)).size:
        hint = "; labels count from 0" if empty.tolist() == [0] else ""
        problems.append(f"{len(empty):,} of {classes:,} classes have no image: {_first(empty.tolist())}{hint}")
    if header.get("rows", "").isdigit() and int(header["rows"]) != len(labels):
        problems.append(f"the header says {header['rows']} rows, the file has {len(labels)}")
    for k in range(classes if header else 0):
        said = header.get(f"class {k}", str(counts[k])).partition(" ")[0]
        if said != str(counts[k]):
            problems.append(f"the header says {said} rows of class {k}, the file has {counts[k]}")
    return classes


def _judge_duplicates(rows: _Rows, problems: list[str]) -> None:
    if len(set(rows.keys)) == len(rows.keys):
        return
    first: dict[Any, int] = {}
    for key, place in zip(rows.keys, rows.places, strict=True):
        if key in first:
            problems.append(f"{rows.unit} {place}: {key!r} stands already in {rows.unit} {first[key]}")
        else:
            first[key] = place


def _first(things: Sequence[Any], n: int = 5) -> str:
    return ", ".join(map(str, things[:n])) + (" ..." if len(things) > n else "")


# ---------------------------------------------------------------------------------------------------------------------
# Long-tail profiles


def exponential(
    labels: np.ndarray, num_classes: int, imbalance: float, seed: int = 0, by_count: bool = False
) -> np.ndarray:
    """The literature's long-tailed draw (Cui et al. 2019, Cao et al. 2019): class k keeps n_max * IF^(-k / (K-1)) rows.

    ``labels`` (N,) of the whole split; ``imbalance`` is IF, the largest class over the smallest. n_max is the size of
    the largest class; where a class has fewer rows than its place in the profile asks for, all of them are taken.
    ``by_count``: k is the class's place by count, the most frequent first, instead of its number, for classes of
    different sizes; equal ones keep their order.
    Returns the rows kept, ascending, (M,) int64. One random stream, RandomState(seed), shuffles the classes one after
    another, so that draws of different IF are nested, and those of CIFAR with seed 0 are the literature's own.
    Raises ValueError where a class would be left without a row.
    """
    counts = _counts(labels, num_classes, imbalance)
    places = np.argsort(np.argsort(-counts, kind="stable")).tolist() if by_count else range(num_classes)
    sizes = [int(counts.max() * (1 / imbalance) ** (k / (num_classes - 1))) for k in places]
    return _draw(labels, sizes, imbalance, seed)


def step(labels: np.ndarray, num_classes: int, imbalance: float, seed: int = 0) -> np.ndarray:
    """The step profile (Cao et al. 2019): the first half of the classes keep n_max rows, the others n_max / IF.

    Arguments, result and errors as for ``exponential``.
    """
    counts = _counts(labels, num_classes, imbalance)
    head = num_classes // 2
    sizes = [int(counts.max() * (1.0 if k < head else 1 / imbalance)) for k in range(num_classes)]
    return _draw(labels, sizes, imbalance, seed)


RULES = {"exponential": exponential, "step": step}


def draw(rule: str, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Rows that a rule such as "exponential(100)", "step(50)" or "exponential(100, seed=1)" keeps."""
    name, factor, seed = parse_rule(rule)
    return RULES[name](labels, num_classes, factor, seed)


def parse_rule(rule: str) -> tuple[str, float, int]:
    """Name, imbalance and seed of a rule. Raises ValueError for what is no rule."""
    name, argument = parse_call(rule, RULES) or ("", "")
    match = re.fullmatch(r"([\d.eE+]+)(?:,\s*(?:seed\s*=\s*)?(\d+))?", argument.strip())
    try:
        factor, seed = float(match[1]), int(match[2] or 0)  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"{rule!r} is no long-tail rule: write exponential(100) or step(100)") from None
    if not 1 <= factor < float("inf"):
        raise ValueError(f"{rule!r}: the imbalance is the largest class over the smallest, a number from 1")
    return name, factor, seed


def parse_call(text: str, names: Iterable[str]) -> tuple[str, str] | None:
    """("holdout", "0.1") of "holdout(0.1)"; None where the text has no such form.

    Raises ValueError, with the nearest right name, where the name is none of ``names``.
    """
    match = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", text)
    if not match:
        return None
    names = list(names)
    if match[1] not in names:
        near = difflib.get_close_matches(match[1], names, 1)
        hint = f"did you mean {near[0]}({match[2]})?" if near else f"there are {', '.join(n + '(...)' for n in names)}"
        raise ValueError(f"there is no rule {text!r}: {hint}")
    return match[1], match[2].strip()


def _counts(labels: np.ndarray, num_classes: int, imbalance: float) -> np.ndarray:
    if num_classes < 2:
        raise ValueError("a long-tail profile needs at least two classes")
    if not imbalance >= 1:
        raise ValueError(f"an imbalance of {imbalance} is none: it is the largest class over the smallest, from 1")
    return np.bincount(labels, minlength=num_classes)


def _draw(labels: np.ndarray, sizes: list[int], imbalance: float, seed: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    kept = []
    for k, size in enumerate(sizes):
        rows = np.flatnonzero(labels == k).astype(np.int64)
        if size < 1 or not rows.size:
            reason = "it has none to draw from" if not rows.size else f"{max(sizes)} rows at most, over {imbalance:g}"
            raise ValueError(f"an imbalance of {imbalance:g} leaves class {k} without a row ({reason})")
        random.shuffle(rows)
        kept.append(rows[:size])
    return np.sort(np.concatenate(kept))


def holdout(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Positions to hold out, ascending: of each class the nearest whole number to its fraction, never its last row.

    ``labels`` (N,) of the training rows, 0 < fraction < 1. Drawn with RandomState(seed), classes in ascending order.
    Raises ValueError where nothing would be held out.
    """
    return _per_class(labels, lambda n: min(int(fraction * n + 0.5), n - 1), seed, f"holdout({fraction:g})")


def at_most(labels: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """Positions of ``number`` rows of each class, or of all it has, ascending. Drawn as in ``holdout``."""
    return _per_class(labels, lambda n: min(number, n), seed, f"{number} rows a class")


def _per_class(labels: np.ndarray, size: Callable[[int], int], seed: int, rule: str) -> np.ndarray:
    random = np.random.RandomState(seed)
    order = np.argsort(labels, kind="stable")
    by_class = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    chosen = np.sort(np.concatenate([random.permutation(rows)[: size(len(rows))] for rows in by_class]))
    if not chosen.size:
        raise ValueError(
            f"{rule} takes no row at all: the classes are too small for it; take a larger part, or validation none"
        )
    return chosen.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Describing


def groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Classes by training images (Liu et al. 2019): many > 100, medium 20 to 100, few < 20. ``counts`` (K,)."""
    counts = np.asarray(counts)
    few, many = counts < 20, counts > 100
    return {"many": np.flatnonzero(many), "medium": np.flatnonzero(~many & ~few), "few": np.flatnonzero(few)}


def imbalance(counts: np.ndarray) -> float:
    """Largest count over the smallest; infinite where a class has none."""
    return float(counts.max() / counts.min()) if counts.min() else float("inf")


def overlap(first: Index, second: Index) -> list[Any]:
    """Keys that stand in both indexes, ascending: a test set that was trained on.

    Row numbers of different splits name different rows. Raises ValueError for rows against paths.
    """
    if first.by_path != second.by_path:
        raise ValueError("row numbers and paths cannot be compared: both indexes must be of one kind")
    if not first.by_path and first.info.get("split") != second.info.get("split"):
        return []
    if isinstance(first.keys, list):
        return sorted(set(first.keys).intersection(second.keys))
    return np.intersect1d(first.keys, second.keys).tolist()


def describe(counts: np.ndarray, lines: int = 20, width: int = 50) -> str:
    """Counts, groups and the long tail as text. ``counts`` (K,).

    A bar is the mean count, on a logarithmic scale, of one of at most ``lines`` runs of classes, largest first.
    """
    ordered = np.sort(counts)[::-1]
    told = [
        f"{counts.sum():,} rows, {len(counts):,} classes, {ordered[0]:,} to {ordered[-1]:,} a class, "
        f"imbalance {imbalance(counts):.4g}"
    ]
    for name, classes in groups(counts).items():
        told.append(f"{name:>6}: {len(classes):,} classes, {counts[classes].sum():,} rows")
    start = 1
    for run in np.array_split(ordered, min(lines, len(ordered))):
        bar = "█" * round(width * np.log1p(run.mean()) / max(np.log1p(ordered[0]), 1e-9))
        ranks = f"{start}-{start + len(run) - 1}" if len(run) > 1 else f"{start}"
        mean = f"{run.mean():,.1f}".removesuffix(".0")
        told.append(f"{ranks:>13}{mean:>9} {bar}".rstrip())
        start += len(run)
    return "\n".join(told)
