"""Reading index files, official lists and iNaturalist JSON; all problems of a file are reported at once."""

import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rescom_timm.data.bounds import Problems, check_lines, check_size, length_problem, shown
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.text import counted

FORMAT = "# rescom_timm index: "
VERSION = "1"
COLUMNS = {"# row label": False, "# path label": True}  # the header's last line -> are the keys paths?
RESERVED = re.compile(r"rows|classes|class \d+|rescom_timm index")
MAX_CLASSES = 10_000_000  # a label above this is a typing mistake, and would ask for gigabytes of counts


class NoSplit(InputError):
    """The data set or list has no split of that name (data.split)."""


@dataclass
class Rows:
    """The rows of a file. `places`: line (or annotation) number of each row."""

    unit: str
    keys: "list[str] | array[int]" = field(default_factory=list)
    labels: Any = field(default_factory=lambda: array("q"))
    places: Any = field(default_factory=lambda: array("q"))
    header: dict[str, str] = field(default_factory=dict)
    class_names: list[str] | None = None
    num_classes: int | None = None
    """From the header."""
    groups: np.ndarray | None = None
    """What must stay together in a hold-out: a number for each row."""
    classes: int = 0
    """What it is taken as."""


def read_rows(
    path: Path,
    num_classes: int | None,
    allow_empty: bool,
    table: Callable[[Path, list[str]], Rows] | None = None,
    by_name: bool = False,
) -> tuple[Rows | None, list[str]]:
    """(rows, no problems) of a file, or (None, its problems); see `index.read`.

    table: reads a table of named columns. by_name: a file with class names has its own number of classes. Raises
    MissingFileError, and NoSplit for a table.
    """
    if not path.is_file():
        raise MissingFileError("file.missing", f"no index file {path}")
    problems = Problems()
    try:
        rows = (table or (_read_json if path.suffix.lower() == ".json" else _read_lines))(path, problems)
    except UnicodeDecodeError as error:
        return None, [f"is not UTF-8 text ({error.reason} at byte {error.start})"]
    except NoSplit:
        raise
    except InputError as error:
        problems.append(str(error))
        return None, problems
    if not len(rows.labels):
        return None, problems or ["holds no rows"]
    if by_name and rows.class_names is not None:
        num_classes = None
    rows.classes = _judge_classes(rows, np.asarray(rows.labels), num_classes, allow_empty, problems)
    _judge_duplicates(rows, problems)
    return (None, problems) if problems else (rows, [])


def _read_lines(path: Path, problems: list[str]) -> Rows:
    rows = Rows("line")
    check_lines(path)
    blank = 0
    with open(path, encoding="utf-8-sig") as file:
        by_path: bool | None = True
        ours = file.readline().startswith(FORMAT.rstrip())
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
    """The problem of a line, or the empty string."""
    if not is_label(label):
        return f"label {label!r} is not a whole number from 0"
    if by_path and (wrong := length_problem("a path", key)):
        return wrong
    if not key:
        return (
            f"a line reads '{'path' if by_path else 'row'} label', with a blank or a tab between; this one is {label!r}"
        )
    if by_path and key.startswith("/"):
        return f"{key!r} is not a path relative to the image root"
    if not by_path and not is_count(key):
        return f"row {key!r} is not a whole number from 0"
    return ""


def is_count(text: str, digits: int = 18) -> bool:
    """Whether a text is a whole number from 0 in ASCII digits."""
    return text.isascii() and text.isdigit() and len(text) <= digits


def is_label(text: str) -> bool:
    """Whether a text is a label below MAX_CLASSES."""
    return is_count(text, len(str(MAX_CLASSES)) - 1)


def _read_header(lines: Iterator[tuple[int, str]], rows: Rows, problems: list[str]) -> bool | None:
    """Read up to the line that names the columns: whether the keys are paths, None if it is malformed."""
    for number, line in lines:
        line = line.rstrip("\n")
        if line in COLUMNS:
            _read_class_lines(rows, problems)
            return COLUMNS[line]
        key, colon, value = line.removeprefix("# ").partition(":")
        if not line.startswith("# ") or not colon:
            problems.append(f"line {number}: a header line reads '# key: value', this one {line!r}")
            return None
        if wrong := length_problem("a header line", line):
            problems.append(f"line {number}: {wrong}")
            return None
        if key in rows.header:
            problems.append(f"line {number}: the header has {key!r} twice")
        rows.header[key] = value.strip()
        if number == 1 and rows.header[key] != VERSION:
            problems.append(f"is of index format {value.strip()}; this rescom_timm reads format {VERSION}")
            return None
    problems.append("has no line '# row label' or '# path label' after the header")
    return None


def _read_class_lines(rows: Rows, problems: list[str]) -> None:
    """Read number and names of the classes from the header."""
    header = rows.header
    for key in ("rows", "classes"):
        if not is_count(header.get(key, "")):
            problems.append(f"the header's '{key}: {header.get(key, '')}' is not a whole number")
    if not is_label(header.get("classes", "")):
        if header.get("classes", "").isdigit():
            problems.append(f"the header has {header['classes']} classes; at most {MAX_CLASSES - 1:,} are read")
        return
    rows.num_classes = int(header["classes"])
    names = []
    for k in range(rows.num_classes):
        if f"class {k}" not in header:
            problems.append(f"the header has {counted(rows.num_classes, 'class')} and no line 'class {k}'")
            return
        names.append(header[f"class {k}"].partition(" ")[2])
    rows.class_names = names if any(names) else None


def _read_json(path: Path, problems: list[str]) -> Rows:
    """Annotations of iNaturalist (and COCO): images, annotations and optional categories."""
    rows = Rows("annotation")
    check_size(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_slim)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise InputError("index.format", f"{line}is not JSON, or nested too deep ({error})") from None
    if not isinstance(content, dict) or not content.get("images") or not content.get("annotations"):
        raise InputError("index.format", "has no 'images' and 'annotations', as iNaturalist's JSON files have")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key, []), list | None):
            raise InputError("index.format", f"{key!r} is not a list of objects, as in iNaturalist's JSON files")
    files, bad = _pairs(content["images"])
    if bad:
        problems.append(f"{bad:,} of the 'images' have no 'id' or no 'file_name'")
    names, _ = _pairs(content.get("categories") or [])
    for what, texts in (("a file_name", files.values()), ("a name of a category", names.values())):
        if wrong := next(filter(None, (length_problem(what, text) for text in texts)), ""):
            raise InputError("index.format", f"holds {wrong}")
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
        problems.append(f"{counted(len(without), 'image')} without an annotation: {first_few(without)}")
    if names and all(type(k) is int and 0 <= k < MAX_CLASSES for k in names):
        rows.num_classes = max(names) + 1
        if names.keys() >= set(rows.labels):
            rows.class_names = [str(names.get(k, "")) for k in range(rows.num_classes)]
    return rows


def _slim(node: dict[str, Any]) -> Any:
    """Keep the two used fields of each JSON object while parsing: iNat18's file has 437,513 of each kind."""
    for key, value in (("id", "file_name"), ("image_id", "category_id"), ("id", "name")):
        if key in node and value in node:
            return node[key], node[value]
    return node


def _pairs(nodes: Sequence[Any]) -> tuple[dict[Any, Any], int]:
    """The nodes as id -> name, and the number of malformed ones: ids are numbers or text, names text."""
    pairs = [node for node in nodes if isinstance(node, tuple)]
    good = {key: name for key, name in pairs if isinstance(key, int | str) and isinstance(name, str)}
    return good, len(nodes) - sum(isinstance(key, int | str) and isinstance(name, str) for key, name in pairs)


def _judge_classes(
    rows: Rows, labels: np.ndarray, num_classes: int | None, allow_empty: bool, problems: list[str]
) -> int:
    """Check labels against the number of classes, and the header against the rows. Returns that number."""
    header = rows.header
    if num_classes is not None and rows.num_classes not in (None, num_classes):
        problems.append(f"is of {counted(rows.num_classes or 0, 'class')}, not of {num_classes} as expected")
    known = rows.num_classes if num_classes is None else num_classes
    classes = int(labels.max()) + 1 if known is None else known
    outside = np.flatnonzero(labels >= classes)
    for i in outside[:20]:
        problems.append(f"{rows.unit} {rows.places[i]}: label {labels[i]} is outside 0 .. {classes - 1}")
    if len(outside) > 20:
        problems.append(f"{counted(len(outside) - 20, 'more label')} outside 0 .. {classes - 1}")
    counts = np.bincount(labels[labels < classes], minlength=classes)
    if not allow_empty and (empty := np.flatnonzero(counts == 0)).size:
        hint = "; labels count from 0" if empty.tolist() == [0] else ""
        problems.append(f"{len(empty):,} of {classes:,} classes have no image: {first_few(empty.tolist())}{hint}")
    if is_count(header.get("rows", "")) and int(header["rows"]) != len(labels):
        problems.append(f"the header has {counted(int(header['rows']), 'row')}, the file {len(labels):,}")
    for k in range(classes if header else 0):
        count = header.get(f"class {k}", str(counts[k])).partition(" ")[0]
        if count != str(counts[k]):
            problems.append(f"class {k}: the header has {count}, the file {counted(counts[k], 'row')}")
    return classes


def _judge_duplicates(rows: Rows, problems: list[str]) -> None:
    if len(set(rows.keys)) == len(rows.keys):
        return
    first: dict[Any, int] = {}
    for key, place in zip(rows.keys, rows.places, strict=True):
        if key in first:
            problems.append(f"{rows.unit} {place}: {key!r} is already in {rows.unit} {first[key]}")
        else:
            first[key] = place


def first_few(things: Sequence[object], n: int = 5) -> str:
    """The first n things for a message, each shortened."""
    return ", ".join(map(shown, things[:n])) + (" ..." if len(things) > n else "")
