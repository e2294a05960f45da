"""Tables of a folder or of the Hub, read from their own files alone and within bounds.

A saved data set, the card of a data set and a table name files. Whoever wrote them may name any file of this machine:
every name has to stay within the folder, or the repository, that was asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import datasets.load
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from rescom_timm.data.bounds import RATIO, check_arrow, check_parquet, limit
from rescom_timm.data.index_files import first_few
from rescom_timm.io import read_json, regular_size

BUILDERS = ("parquet", "arrow", "webdataset", "imagefolder", "cache")
"""Kinds of files of `datasets` that hold images (imagefolder is refused later, with advice), and its own cache."""


def within(folder: str | Path, path: str | Path) -> None:
    """Raises ValueError where a path, with all links followed, leads out of a folder. Links of the Hub's cache, whose
    snapshots link to files beside them, stay inside."""
    root, real = os.path.realpath(folder), os.path.realpath(path)
    roots = [root]
    for parent in (Path(root), *Path(root).parents):
        if parent.name == "snapshots":
            roots.append(str(parent.parent / "blobs"))
    if not any(real == one or real.startswith(os.path.join(one, "")) for one in roots):
        raise ValueError(
            f"{path} leads out of {folder}, and nothing outside of it is read: put the file itself into the folder, or "
            "name the folder that holds it as data.source"
        )


def plain_name(name: Any, file: Path) -> str:
    """The name of a file or folder that stands in another file. Raises ValueError for one with a folder in it."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise ValueError(f"{file} names {name!r}, which is no plain name of a file in its folder")
    return name


def saved_splits(folder: Path) -> list[str] | None:
    """Names of the splits of a saved DatasetDict; None where a folder is none. Raises ValueError for other names."""
    path = folder / "dataset_dict.json"
    if not path.is_file():
        return None
    names = read_json(path).get("splits")
    if not isinstance(names, list):
        raise ValueError(f"{path} has no list of splits")
    return [plain_name(name, path) for name in names]


def load_saved(folder: Path, root: Path | None = None) -> Dataset:
    """A split that Dataset.save_to_disk wrote. root: the folder that was asked for, which it must lie in. Raises
    ValueError where its files name or link to others, or decode to more than is read."""
    root = root or folder
    state = read_json(folder / "state.json")
    read_json(folder / "dataset_info.json")
    for name in ("state.json", "dataset_info.json"):
        within(root, folder / name)
    if not re.fullmatch(r"[\w-]{1,100}", str(state.get("_fingerprint", ""))):
        raise ValueError(f"{folder}/state.json: _fingerprint must be letters and digits")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise ValueError(f"{folder}/state.json has no list _data_files")
    for file in files:
        path = folder / plain_name(file.get("filename"), folder / "state.json")
        within(root, path)
        _checked(path, check_arrow)
    return Dataset.load_from_disk(str(folder)).with_format(None)


def load_files(source: str, local: bool, subset: str | None, split: str, revision: str | None = None) -> Dataset:
    """As datasets.load_dataset(source, subset, split=split, revision=revision): of a folder where `local`, else of the
    Hub.

    Raises what that raises, and ValueError where the card of the data set names files elsewhere, or files decode to
    more than is read.
    """
    with _builders_checked(source, local):
        try:
            return datasets.load_dataset(source, subset, split=split, revision=revision)  # type: ignore[return-value]
        except DatasetGenerationError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise ValueError(f"{source} cannot be read: {str(cause) or type(cause).__name__}") from error


@contextmanager
def _builders_checked(source: str, local: bool) -> Iterator[None]:
    """Within the block, load_dataset checks the files that it has found before it reads them, which is between two
    steps of that function."""
    original = datasets.load.load_dataset_builder

    def checked(*arguments: Any, **named: Any) -> Any:
        builder = original(*arguments, **named)
        _check_builder(builder, source, local)
        return builder

    datasets.load.load_dataset_builder = checked
    try:
        yield
    finally:
        datasets.load.load_dataset_builder = original


def _check_builder(builder: Any, source: str, local: bool) -> None:
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in BUILDERS:
        raise ValueError(f"{source} holds {kind} files, not images: {', '.join(BUILDERS[:3])} files are read")
    for path in (path for paths in (builder.config.data_files or {}).values() for path in paths):
        if local:
            within(source, path)
        elif not str(path).startswith(f"hf://datasets/{source}@"):
            raise ValueError(f"the card of {source} names {path}, which is no file of that repository and is not read")
    if kind in ("parquet", "arrow"):
        _bound(builder, kind)


def _bound(builder: Any, kind: str) -> None:
    """Check a builder's files before they are decoded, and count what they decode to."""
    generate = builder._generate_tables

    def bounded(files: Sequence[Any], **others: Any) -> Iterator[tuple[Any, pa.Table]]:
        paths = [str(file) for file in files]
        for path in set(paths):
            if kind == "arrow":
                _checked(path, check_arrow)
            else:
                rows = _checked(path, check_parquet)
                builder.config.batch_size = min(rows, builder.config.batch_size or rows)
        left = limit(sum(map(os.path.getsize, set(paths))))
        for key, table in generate(files=files, **others):
            left -= table.nbytes
            if left < 0:
                raise ValueError(f"{first_few(sorted(set(paths)), 1)} decodes to more than {RATIO} times its size")
            yield key, table

    builder._generate_tables = bounded


def _checked(path: str | Path, check: Any) -> Any:
    try:
        regular_size(path)
        return check(path)
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def own_images(dataset: Dataset, images: pa.ChunkedArray, folder: Path | None, name: str) -> Dataset:
    """The data set with the paths of its images below `folder`. images: its column "image", records of bytes and path.

    Rows without bytes name an image file, absolute or relative to the folder (or to the working directory). Raises
    ValueError for one outside of the folder, and, for a table of the Hub (folder None), for any: it would be a file of
    this machine.
    """
    own, paths = pc.struct_field(images, "bytes"), pc.struct_field(images, "path")
    named = pc.fill_null(pc.and_(pc.is_null(own), pc.is_valid(paths)), False)
    if not own.null_count or not (number := pc.sum(named).as_py() or 0):
        return dataset
    if folder is None:
        raise ValueError(
            f"{name}: {number:,} rows have no image but the path of one, which is not followed: it would be a file of "
            "this machine; download the data set and name its folder as data.source"
        )
    roots = {os.path.abspath(folder), os.path.realpath(folder)}
    written = paths.to_pylist()
    chosen = named.to_pylist()
    first = next(path for path, is_named in zip(written, chosen, strict=True) if is_named)
    base = folder if not os.path.isfile(first) or os.path.isfile(folder / first) else Path()
    for row, path in enumerate(written):
        if not chosen[row]:
            continue
        full = os.path.normpath(os.path.abspath(os.path.join(base, path)))
        if not any(full.startswith(os.path.join(root, "")) for root in roots):
            raise ValueError(
                f"{name}: row {row} names an image outside {folder}, {path[:300]}; nothing outside of it is read: name "
                "the folder of images as data.source and this table as data.index"
            )
        written[row] = full
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = pa.StructArray.from_arrays(
        [pc.cast(own, pa.binary()).combine_chunks(), pa.array(written, pa.string())], fields=list(kind)
    )
    table = dataset.remove_columns("image").add_column("image", column)  # type: ignore[arg-type]
    return table.cast_column("image", datasets.Image(decode=False))
