"""Tables of images: CSV, TSV, JSON lines and Parquet with named columns, and text labels.

Columns are found by their names, or set. Whole numbers that are exactly 0 .. K - 1 are class numbers; anything else is
text, and the classes are its values in sorted order (by value if all are numbers).
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from pyarrow import ArrowException

from rescom_timm.class_names import as_spelled, distinct, nfc
from rescom_timm.data.bounds import MAX_COLUMNS, MAX_LINE, MAX_TEXT, check_lines, length_problem, read_columns
from rescom_timm.data.config import Columns
from rescom_timm.data.index_files import NoSplit, Rows, first_few, is_label
from rescom_timm.errors import InputError

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Endings of files that hold named columns."""

NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "image": (
        ("path", "file_path", "filepath", "image_path", "img_path"),
        ("file_name", "filename", "file", "image_file", "image_name", "img_name"),
        ("image", "img", "image_id", "id"),
    ),
    "label": (
        ("label", "labels", "class", "target", "category", "y"),
        ("class_name", "label_name", "category_name", "class_id", "label_id", "category_id"),
        ("species", "diagnosis", "dx"),
    ),
    "split": (("split", "subset", "set", "partition"),),
}
"""Of each kind, names that are taken for it; the first row of them that a table has decides."""

SAME = ({"train", "training"}, {"test", "testing"}, {"val", "valid", "validation", "dev"})
"""Values of a split column that mean the same."""


def is_table(path: str | Path) -> bool:
    """Whether a file is a table of named columns, by its ending."""
    return Path(path).suffix.lower() in TABLES


def read_table(
    path: Path,
    problems: list[str],
    columns: Columns,
    split: str | None,
    class_names: Sequence[str] | None,
    num_classes: int | None,
) -> Rows:
    """The rows of a table, those of `split` if it has a column of splits; problems are appended to `problems`.

    class_names: the allowed classes of text labels. num_classes without names: the labels are class numbers.
    """
    there, read = _opened(path)
    image = pick("image", columns.image, there)
    label = pick("label", columns.label, there)
    group = pick("group", columns.group, there) if columns.group else None
    part = pick("split", columns.split, there, needed=False)
    with _readable(path):
        frame = read(list(dict.fromkeys(filter(None, [image, label, group, part]))))
    codes, cells = pd.factorize(frame[label] if _is_text(frame[label]) else frame[label].map(_text))
    texts = [_text(cell) for cell in cells]  # the classes are those of all splits
    if part is not None and split is not None:
        values = frame[part].astype(str)
        splits = list(values.unique())
        chosen = values.isin([value for value in splits if _same(value, split)]).to_numpy()
        frame, codes = frame[chosen], codes[chosen]
        if frame.empty:
            raise NoSplit("data.split", f"{path}: column {part!r} has no split {split!r}, only {first_few(splits)}")
    numbers = frame.index.to_numpy(np.int64) + 1
    names = None if class_names is None else list(class_names)
    if class_names is None and num_classes is None:
        names = class_values(texts)
    known = {nfc(name): k for k, name in enumerate(names)} if names is not None else None
    numbered = False
    if known is not None and not any(name.isdigit() for name in known):  # numbers of named classes
        known |= {str(k): k for k in range(len(known))}
        numbered = all(texts[code].isdigit() for code in np.unique(codes))
    wrong = [length_problem("a label", text) or _wrong(text, label, known) for text in texts]
    labels = [
        -1 if bad else known[nfc(text)] if known is not None else int(text)
        for text, bad in zip(texts, wrong, strict=True)
    ]
    keys = frame[image].tolist()
    if not _is_text(frame[image]):
        keys = ["" if key is None or key != key else str(key) for key in keys]  # NaN: a number column with gaps
    good = np.array([0 < len(key) <= MAX_TEXT and not key.isspace() for key in keys], dtype=bool)
    good &= np.array([not bad for bad in wrong], dtype=bool)[codes]
    for row in np.flatnonzero(~good).tolist():
        key = keys[row]
        bad = length_problem("a path", key) or wrong[codes[row]] if key.strip() else f"column {image!r} is empty"
        problems.append(f"row {numbers[row]}: {bad}")
    rows = Rows("row", list(compress(keys, good.tolist())), np.array(labels, np.int64)[codes[good]], numbers[good])
    rows.class_names, rows.num_classes = None if numbered else names, len(names) if names is not None else None
    rows.header = {"columns": ", ".join(filter(None, [image, label, part, group]))}
    if part is not None and split is not None:
        rows.header["split"] = split
    if rows.class_names is not None:
        rows.header["labels"] = f"text of {label}, in sorted order"
    if group is not None:
        codes, cells = pd.factorize(frame[group].astype(str))
        groups = {nfc(value): k for k, value in enumerate(distinct(sorted(cells)))}
        rows.groups = np.array([groups[nfc(value)] for value in cells], dtype=np.int64)[codes]
    return rows


def _is_text(column: pd.Series) -> bool:
    return pd.api.types.infer_dtype(column, skipna=False) == "string"


def split_rows(path: Path, columns: Columns, without: Sequence[str]) -> dict[str, int]:
    """Rows of each split of a table except `without`; empty without a column of splits."""
    if not is_table(path):
        return {}
    there, read = _opened(path)
    part = pick("split", columns.split, there, needed=False)
    if part is None:
        return {}
    with _readable(path):
        values = Counter(read([part])[part].astype(str))
    return {value: count for value, count in values.items() if not any(_same(value, split) for split in without)}


def class_values(texts: Iterable[str]) -> list[str] | None:
    """Class names of text labels, in order; None if they are class numbers 0 .. K - 1."""
    values = {text for text in texts if text}
    if all(re.fullmatch(r"-?\d{1,15}", value) for value in values):
        numbers = sorted(values, key=int)
        return None if numbers == [str(k) for k in range(len(numbers))] else numbers
    return distinct(sorted(values))


def pick(kind: str, asked: str | None, there: Sequence[str], needed: bool = True) -> str | None:
    """The column of that kind. Raises InputError (data.column) if it is missing or ambiguous."""
    if asked is not None:
        asked = as_spelled([asked], there)[0]
        if asked not in there:
            raise InputError(
                "data.column", f"has no column {asked!r}: it has {', '.join(there)}; set data.{kind}_column"
            )
        return asked
    found = called(kind, there)
    if found is None and needed:
        raise InputError("data.column", f"has no {kind} column among {', '.join(there)}; set data.{kind}_column")
    return found


def called(kind: str, there: Sequence[str]) -> str | None:
    """The column whose name means image, label or split; None without one.

    Raises InputError (data.column) if it is ambiguous.
    """
    plain = [(re.sub(r"[\s-]+", "_", str(name).strip().lower()), name) for name in there]
    for names in NAMES[kind]:
        found = [own for name in names for form, own in plain if form == name]
        if len(found) > 1:
            raise InputError("data.column", f"has several {kind} columns: {', '.join(found)}; set data.{kind}_column")
        if found:
            return found[0]
    return None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a reader raises becomes an InputError (index.format) in one line."""
    try:
        yield
    except UnicodeDecodeError:
        raise InputError("index.format", "is not UTF-8 text: save it as UTF-8") from None
    except (
        ValueError,
        ArrowException,
        OSError,
        csv.Error,
        RecursionError,
        OverflowError,
        LookupError,
        TypeError,
    ) as error:
        what = str(error).strip() or type(error).__name__
        raise InputError("index.format", f"cannot be read as {path.suffix.lower()[1:]}: {what}") from None


def _opened(path: Path) -> tuple[list[str], Callable[[list[str]], pd.DataFrame]]:
    """Names of the columns, and what reads some of them, as text or as they are stored."""
    with _readable(path):
        if path.suffix.lower() == ".parquet":
            return list(pq.read_schema(path).names), partial(_parquet, path)
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            frame = _delimited(path)
            return list(frame.columns), frame.__getitem__
        names: dict[str, None] = {}
        for row in _objects(path):
            names |= dict.fromkeys(row)
            if len(names) > MAX_COLUMNS:
                raise InputError("index.format", f"its rows have more than {MAX_COLUMNS:,} different keys")
        return list(names), partial(_json_lines, path)


def _parquet(path: Path, columns: list[str]) -> pd.DataFrame:
    table = read_columns(path, columns)
    return pd.DataFrame({name: table.column(name).to_pandas().astype(object) for name in columns})


def _json_lines(path: Path, columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame([tuple(map(row.get, columns)) for row in _objects(path)], columns=columns, dtype=object)


def _encoding(path: Path) -> str:
    with path.open("rb") as start:
        return "utf-16" if start.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _delimited(path: Path) -> pd.DataFrame:
    """A CSV or TSV file, all of it text."""
    encoding = _encoding(path)
    with path.open(encoding=encoding, newline="") as file:
        header = file.readline(MAX_LINE)
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
    check_lines(path, 1 + header.count(separator))
    frame = pd.read_csv(
        path, sep=separator, dtype=object, keep_default_na=False, encoding=encoding, skipinitialspace=True
    )
    if not isinstance(frame.index, pd.RangeIndex):
        raise InputError("index.format", "rows have more cells than the header; quote text that holds the separator")
    return frame


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    check_lines(path)
    with path.open(encoding=_encoding(path), newline="\n") as lines:  # a text may hold U+2028
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(line, number)


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError("index.format", f"line {number}: {error}") from None
    if not isinstance(row, dict):
        raise InputError("index.format", f'line {number} is no object, such as {{"path": "1.jpg", "label": "cat"}}')
    return row


def _text(value: Any) -> str:
    """A label as text; empty without one. A whole number stored as 3.0 is 3."""
    if isinstance(value, list | tuple | set | dict | np.ndarray):
        return "\0several"
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _wrong(text: str, label: str | None, known: dict[str, int] | None) -> str:
    if text == "\0several":
        return f"column {label!r} holds several labels: images of several classes at once are not supported"
    if not text:
        return f"column {label!r} is empty"
    if known is not None and nfc(text) not in known:
        return f"label {text!r} is none of the classes: {first_few([name for name in known if not name.isdigit()])}"
    if known is None and not is_label(text):
        return f"label {text!r} is not a whole number from 0"
    return ""


def _same(value: str, split: str) -> bool:
    one, other = nfc(str(value)).strip().lower(), nfc(split).strip().lower()  # of an empty cell it is no text
    return one == other or any(one in names and other in names for names in SAME)
