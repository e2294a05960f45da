"""Tables of a folder or of the Hub, read only from their own files and within bounds.

A saved data set, the card of a data set and a table name files. Their author may name any file of this machine, so
every name must stay within the folder, or the repository, that was asked for.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import datasets.load
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from rescom_timm.data.bounds import RATIO, check_arrow, check_parquet, check_tar, limit, shown
from rescom_timm.data.index_files import first_few
from rescom_timm.errors import CodedError, InputError
from rescom_timm.io import read_json, regular_size
from rescom_timm.text import counted

BUILDERS = ("parquet", "arrow", "webdataset", "cache")
"""Kinds of files of `datasets` that hold images, and its own cache."""
MAX_NODES = 10**6
"""Values of a data set's card, with what its aliases repeat."""
LOOSE = (
    "{} is a repository of loose image files, which would be numbered in string order and scanned at every start: "
    "download it and run  rescom-timm init FOLDER"
)


def within(folder: str | Path, path: str | Path) -> None:
    """Raise InputError (data.outside) if a path, with links resolved, leads out of a folder.

    Links of the Hub's cache, whose snapshots link to blobs beside them, are allowed.
    """
    root, real = os.path.realpath(folder), os.path.realpath(path)
    roots = [root]
    for parent in (Path(root), *Path(root).parents):
        if parent.name == "snapshots":
            roots.append(str(parent.parent / "blobs"))
    if not any(real == one or real.startswith(os.path.join(one, "")) for one in roots):
        raise InputError(
            "data.outside",
            f"{path} leads out of {folder}, and files outside are not read: move the file into the folder, or set "
            "data.source to the folder that has it",
        )


def plain_name(name: object, file: Path) -> str:
    """A file name that another file contains. Raises InputError (data.outside) if it has a folder in it."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise InputError("data.outside", f"{file} names {name!r}, which is no plain name of a file in its folder")
    return name


def saved_splits(folder: Path) -> list[str] | None:
    """Names of the splits of a saved DatasetDict; None if the folder is not one."""
    path = folder / "dataset_dict.json"
    if not path.is_file():
        return None
    names = read_json(path).get("splits")
    if not isinstance(names, list):
        raise InputError("data.damaged", f"{path} has no list of splits")
    return [plain_name(name, path) for name in names]


def load_saved(folder: Path, root: Path | None = None) -> Dataset:
    """A split that Dataset.save_to_disk wrote. root: the folder that was asked for, which must contain it.

    Raises InputError: data.outside if its files name or link to others, data.damaged, data.bounds.
    """
    root = root or folder
    state = read_json(folder / "state.json")
    read_json(folder / "dataset_info.json")
    for name in ("state.json", "dataset_info.json"):
        within(root, folder / name)
    if not re.fullmatch(r"[\w-]{1,100}", str(state.get("_fingerprint", ""))):
        raise InputError("data.damaged", f"{folder}/state.json: _fingerprint must be letters and digits")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise InputError("data.damaged", f"{folder}/state.json has no list _data_files")
    if len({str(file.get("filename")) for file in files}) < len(files):
        raise InputError("data.damaged", f"{folder}/state.json names a file of _data_files twice")
    for file in files:
        path = folder / plain_name(file.get("filename"), folder / "state.json")
        within(root, path)
        _checked(path, check_arrow)
    with _readable(str(folder)):
        return Dataset.load_from_disk(str(folder)).with_format(None)


def load_files(source: str, local: bool, subset: str | None, split: str, revision: str | None = None) -> Dataset:
    """As datasets.load_dataset(source, subset, split=split, revision=revision): a folder if `local`, else the Hub.

    Raises what that raises, and InputError: data.outside if the card of the data set names other files, data.damaged,
    data.bounds. DatasetNotFoundError also where only the cached copy of a local folder has the name of the Hub's.
    """
    with _readable(source), _builders_checked(source, local), _cards_bounded():
        try:
            found: Dataset = datasets.load_dataset(source, subset, split=split, revision=revision)  # type: ignore
        except DatasetGenerationError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise InputError(_code(cause), f"{source} cannot be read: {str(cause) or type(cause).__name__}") from error
    if not local and any(len(Path(file["filename"]).parent.name) == LOCAL_HASH for file in found.cache_files):
        # datasets files both under the folder's name, and takes the newest where the Hub has none.
        raise DatasetNotFoundError("the cache of that name is of a local folder")
    return found


LOCAL_HASH = 16
"""Digits in the name of the cache folder of local files; a Hub data set's is its commit, of 40."""


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Whatever `datasets` raises for unexpected contents becomes an InputError (data.damaged) in one line."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        ImportError,
        RecursionError,
        NotImplementedError,
        tarfile.TarError,
        zipfile.BadZipFile,
        yaml.YAMLError,
        pa.ArrowException,
    ) as error:
        what = shown(" ".join(str(error).split()))
        raise InputError("data.damaged", f"{source} cannot be read: {type(error).__name__}: {what}") from error


@contextmanager
def _cards_bounded() -> Iterator[None]:
    """Within the block, YAML whose aliases expand to more than MAX_NODES values raises yaml.YAMLError early."""
    original = yaml.SafeLoader.get_single_node

    def bounded(self: Any) -> Any:
        node = original(self)
        if _nodes(node, {}) > MAX_NODES:
            raise yaml.YAMLError("its aliases make it too long")
        return node

    yaml.SafeLoader.get_single_node = bounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        yaml.SafeLoader.get_single_node = original  # type: ignore[method-assign]


def _nodes(node: Any, known: dict[int, int]) -> int:
    """Nodes of a YAML tree with aliases expanded."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # of one that holds itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts)
    return known[id(node)]


@contextmanager
def _builders_checked(source: str, local: bool) -> Iterator[None]:
    """Within the block, load_dataset checks the files that it has found before it reads them.

    This is between two steps of that function.
    """
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
    if kind == "imagefolder":
        raise InputError("data.source", LOOSE.format(source))
    if kind not in BUILDERS:
        raise InputError("data.source", f"{source} holds {kind} files; only {', '.join(BUILDERS[:3])} files are read")
    for path in (path for paths in (builder.config.data_files or {}).values() for path in paths):
        if local and ("://" in str(path) or "::" in str(path)):
            raise InputError(
                "data.outside", f"the card of {source} names {shown(path)}, which is not a file of that folder"
            )
        if local:
            within(source, path)
        elif not str(path).startswith(f"hf://datasets/{source}@"):
            raise InputError(
                "data.outside", f"the card of {source} names {path}, which is not a file of that repository"
            )
    if kind in ("parquet", "arrow"):
        _bound(builder, kind)
    if kind == "webdataset":
        _bound_archives(builder)


def _bound(builder: Any, kind: str) -> None:
    """Check a builder's files before they are decoded, and count their decoded bytes."""
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
                raise InputError(
                    "data.bounds", f"{first_few(sorted(set(paths)), 1)} decodes to over {RATIO} times its size"
                )
            yield key, table

    builder._generate_tables = bounded


def _bound_archives(builder: Any) -> None:
    """Check a builder's archives after the download, before any is opened."""
    generators = builder._split_generators

    def bounded(downloads: Any) -> Any:
        download = downloads.download

        def checked(places: Any) -> Any:
            found = download(places)
            for path in {str(path) for paths in found.values() for path in paths}:
                _checked(path, check_tar)
            return found

        downloads.download = checked
        return generators(downloads)

    builder._split_generators = bounded


def _checked(path: str | Path, check: Any) -> Any:
    try:
        regular_size(path)
        return check(path)
    except (pa.ArrowException, OSError, ValueError, IndexError, struct.error) as error:
        raise InputError(_code(error), f"{path} cannot be read: {error}") from None


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, CodedError) else "data.damaged"


def own_images(dataset: Dataset, images: pa.ChunkedArray, folder: Path | None, name: str) -> Dataset:
    """The data set with the paths of its images below `folder`. images: its column "image", {"bytes", "path"}.

    Rows without bytes name an image file, absolute or relative to the folder (or to the working directory). Raises
    InputError (data.outside) for a file outside of the folder and, for a table of the Hub (folder None), for any: it
    would be a file of this machine.
    """
    own, paths = pc.struct_field(images, "bytes"), pc.struct_field(images, "path")
    named = pc.fill_null(pc.and_(pc.is_null(own), pc.is_valid(paths)), False)
    if not own.null_count or not (number := pc.sum(named).as_py() or 0):
        return dataset
    if folder is None:
        raise InputError(
            "data.outside",
            f"{name}: only the path of an image in {counted(number, 'row')}, which is not read: it would be a file of "
            "this machine; download the data set and set data.source to its folder",
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
            raise InputError(
                "data.outside",
                f"{name}: row {row} names {shown(path)}, an image outside {folder}, which is not read: set "
                "data.source to the folder of images and data.index to this table's .parquet file",
            )
        written[row] = full
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = pa.StructArray.from_arrays(
        [pc.cast(own, pa.binary()).combine_chunks(), pa.array(written, pa.string())], fields=list(kind)
    )
    table = dataset.remove_columns("image").add_column("image", column)  # type: ignore[arg-type]
    return table.cast_column("image", datasets.Image(decode=False))
