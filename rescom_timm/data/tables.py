"""Tables of images: the Hub, parquet, arrow, save_to_disk and the embedded digits."""

import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rescom_timm.class_names import as_spelled, distinct, first_names, nfc, numbers_in, other_numbers, refuse_two_forms
from rescom_timm.data.bounds import MAX_TEXT, length_problem
from rescom_timm.data.config import MEMORY, DataConfig, index_path
from rescom_timm.data.digits import digits
from rescom_timm.data.in_memory import PairDataset, memory_split
from rescom_timm.data.index import Index
from rescom_timm.data.index_files import NoSplit, first_few
from rescom_timm.data.named_columns import called
from rescom_timm.data.own_files import LOOSE, load_files, load_saved, own_images, saved_splits
from rescom_timm.data.profiles import RULES, draw, parse_call
from rescom_timm.data.splits import Part, check_range, renumber, short_name, with_labels
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.hub_client import hub_id, missing, online
from rescom_timm.text import counted

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Table:
    dataset: Dataset  # "image" and, if there is one, "label"
    labels: np.ndarray | None
    class_names: list[str] | None
    texts: list[str] | None = None  # the labels, if they are not class numbers
    groups: np.ndarray | None = None


def table_part(
    config: DataConfig,
    tables: Callable[[str], _Table],
    cache: Path,
    split: str,
    spec: str,
    like: Part | None = None,
    allow_empty: bool = False,
) -> Part:
    """A split of a table, or the rows of it that an index names.

    like: the training part, whose classes the rows must have. Raises as `sources.load`.
    """
    table = tables(split)
    labels, names, dataset = table.labels, table.class_names, table.dataset
    name = f"{short_name(config.source)} {split}"
    if like is not None:
        known, texts = like.source_names or like.index.class_names, table.texts
        numbers = numbers_in(known or like.index.names, None if texts else names, like.name, name, lacking=True)
        if names is None and labels is not None and other_numbers(known) and labels.min(initial=0) >= 0:
            if isinstance(getattr(like.dataset, "features", {}).get("label"), ClassLabel):
                raise InputError(
                    "data.classes",
                    f"{name} has plain numbers as labels, {like.name} other numbers as class names "
                    f"({first_names(known or ())}): cast its label column to the same ClassLabel",
                )
            log.warning("%s has numbers as labels, which are taken as the class names of %s", name, like.name)
            texts = labels.astype(str).tolist()
        if texts is not None:
            labels = _as_classes(texts, known or like.index.names, name, like.name)
        elif numbers is not None and labels is not None:
            labels = renumber(labels, numbers, name)
        if labels is not None and labels is not table.labels:
            dataset = with_labels(dataset, labels)
        names = known or names
    elif names is not None:
        refuse_two_forms(names, name)
    info = {"source": config.source, "split": split, "rule": spec}
    notes: dict[str, Any] = {"rule": spec}
    if dataset is not table.dataset:
        notes["numbering"] = "by class name"
    classes = like.index.num_classes if like is not None else (len(names) if names else None)
    if spec == "all" or parse_call(spec, RULES):
        if labels is None:
            raise InputError("data.column", f"{name} has no label column: set label_column=, or index= to a list")
        classes = classes or int(labels.max()) + 1
        check_range(labels, classes, name)
        rows = np.arange(len(labels)) if spec == "all" else draw(spec, labels, classes)
        index = Index(rows, labels[rows], classes, info, names)
        if spec != "all":
            notes["index_file"] = _keep(index, labels, cache)
    else:
        index = Index.load(
            index_path(spec), classes, allow_empty or like is not None, columns=config.columns, split=split,
            class_names=names,
        )  # fmt: skip
        index = _by_name(index, names, None if labels is not None or like is None else like, spec, name)
        if index.num_classes != (classes or index.num_classes):
            raise InputError(
                "index.data", f"{spec} is of {counted(index.num_classes, 'class')}, not of {classes} as expected"
            )
        rows = _join(dataset, index.keys, spec, name) if isinstance(index.keys, list) else index.keys
        if rows.max() >= len(dataset):
            raise InputError(
                "index.data", f"{spec} has row {rows.max()}, and {name} has {counted(len(dataset), 'row')}, from 0"
            )
        if labels is None:  # the list knows the labels, the data set only the files
            whole = np.full(len(dataset), -1)
            whole[rows] = index.labels
            dataset = dataset.add_column("label", pa.array(whole))  # type: ignore[arg-type]
        else:
            _check_same(labels[rows], index.labels, rows, spec, name)
        index = replace(index, keys=rows, class_names=index.class_names or names)
    name = name if spec == "all" else f"{name}, {short_name(spec)}"
    return Part(name, split, dataset, rows, index, notes, labels, table.class_names if like is None else None)


def _by_name(index: Index, names: list[str] | None, like: Part | None, spec: str, name: str) -> Index:
    """A list with its classes numbered as in `names`, those of its data set `name`.

    If the names differ, each label is compared with the data set's later. like: the training part, if the data set has
    no labels.
    """
    if like is not None:
        return index.numbered_as(like.index.class_names, like.name, spec)
    known = {*map(nfc, names or ())}
    return index.numbered_as(names, name, spec) if known.issuperset(map(nfc, index.class_names or ())) else index


def open_table(config: DataConfig, folder: Path | None, split: str) -> _Table:
    """A split of a source. folder: of a local source; None for the Hub."""
    if config.source == MEMORY:
        dataset = memory_split(split)
        if isinstance(dataset, PairDataset):
            if config.group_column is not None:
                raise InputError("data.column", "data.group_column: a data set of (image, label) has no columns")
            return _Table(dataset, dataset.labels(), dataset.class_names())  # type: ignore[arg-type]
    else:
        dataset = digits(split) if config.source == "digits" else _open(config, folder, split)
        if dataset.info.builder_name == "imagefolder":
            raise InputError("data.source", LOOSE.format(config.source))
    image, label = _columns(dataset.features, config)
    groups = None
    if config.group_column is not None:
        group = str(_pick("group", config.group_column, [], dataset.features, config.source))
        _refuse_long(_column(dataset, group), f"{config.source} {split}: column {group!r}")
        values = [str(value) for value in _column(dataset, group).to_pandas()]
        groups = _as_classes(values, distinct(sorted(set(values))), "", "")
    dataset = dataset.select_columns([image] + ([label] if label else []))
    dataset = dataset.rename_columns({image: "image"} | ({label: "label"} if label else {}))
    dataset = dataset.cast_column("image", Image(decode=False))
    if config.source not in ("digits", MEMORY):
        images = pa.chunked_array(_column(dataset, "image").chunks)
        _refuse_long(pc.struct_field(images, "path"), f"{config.source} {split}: the path of an image")
        dataset = own_images(dataset, images, folder, f"{config.source} {split}")
    if label is None:
        return _Table(dataset, None, None, groups=groups)
    column = _column(dataset, "label")
    if column.null_count:
        raise InputError(
            "data.labels", f"{config.source} {split}: no label in {counted(column.null_count, 'row')} of {label!r}"
        )
    feature = dataset.features["label"]
    names = list(feature.names) if isinstance(feature, ClassLabel) and feature.names else None
    if wrong := next(filter(None, (length_problem("a class name", name) for name in names or ())), ""):
        raise InputError("data.bounds", f"{config.source} {split} has {wrong}")
    if names is not None or "int" in feature.dtype:
        return _Table(dataset, column.to_numpy().astype(np.int64), names, groups=groups)
    _refuse_long(column, f"{config.source} {split}: column {label!r}")
    texts = [str(value) for value in column.to_pylist()]
    names = distinct(sorted(set(texts)))
    labels = _as_classes(texts, names, f"{config.source} {split}", "")
    return _Table(with_labels(dataset, labels), labels, names, texts, groups)


def _refuse_long(column: pa.ChunkedArray, name: str) -> None:
    """Raise InputError (data.bounds) for a text above MAX_TEXT bytes in a column."""
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if is_text and (longest := pc.max(pc.binary_length(column)).as_py() or 0) > MAX_TEXT:
        raise InputError("data.bounds", f"{name} holds a text of {longest:,} bytes; at most {MAX_TEXT:,} are read")


def _as_classes(texts: list[str], names: Sequence[str], there: str, here: str) -> np.ndarray:
    """Text labels of `there` as numbers of the classes `names` of `here`. Raises InputError (data.classes)."""
    values = sorted(set(texts))
    known = {nfc(text): k for k, text in enumerate(names)}
    if odd := [text for text in values if nfc(text) not in known]:
        raise InputError(
            "data.classes",
            f"{there} has labels that training lacks: {first_names(odd)}; {here} has {first_names(names)}",
        )
    numbers = {text: known[nfc(text)] for text in values}
    return np.array([numbers[text] for text in texts], dtype=np.int64)


def _column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """A whole column; dataset[name] takes 3,000 times as long."""
    if dataset._indices is None:
        return dataset.data.column(name)
    return dataset.select_columns(name).with_format("arrow")[:].column(name)  # rows chosen or shuffled before


def _open(config: DataConfig, folder: Path | None, split: str) -> Dataset:
    """A split of a Hub data set or of a local folder."""
    source = config.source
    try:
        if folder is not None and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
            splits = saved_splits(folder)
            if splits is None:
                raise InputError("data.split", f"{source} is a saved data set without splits: save a DatasetDict")
            if split not in splits:
                raise ValueError(f"Unknown split {split!r}. Should be one of {splits}.")
            return load_saved(folder / split, folder)
        if folder is not None and (folder / split / "state.json").is_file():
            return load_saved(folder / split, folder)
        if folder is not None:
            return load_files(str(folder.resolve()), True, config.subset, split)
        name, _, revision = str(hub_id(source, alone=True)).partition("@")
        with online():
            return load_files(name, False, config.subset, split, revision or None)
    except (ConnectionError, HfHubHTTPError) as error:
        raise MissingFileError(
            "hub.unreachable",
            f"no folder {source!r}, and the Hub cannot be reached for a data set of that name, which is not cached "
            f"({first_line(error)}): correct data.source, set it to a local folder, or load it once with a network",
        ) from None
    except DatasetNotFoundError as error:
        raise MissingFileError(
            "hub.not_found",
            f"no data set {source!r} on the Hub, unless it needs  hf auth login  and consent, and no such folder "
            f"({first_line(error)}): correct data.source, or set it to a local folder",
        ) from None
    except RuntimeError as error:  # a script, which datasets no longer runs
        raise InputError("data.source", f"{source} is not read: {first_line(error)}") from None
    except HFValidationError:
        raise missing(source) from None
    except ValueError as error:
        if "Unknown split" in str(error):
            has = str(error).partition("one of ")[2].rstrip(".")
            raise NoSplit(
                "data.split",
                f"{source} has no split {split!r}, only {has}: set data.train and data.test, or data.test=holdout(0.2)",
            ) from None
        raise


def _columns(features: Features, config: DataConfig) -> tuple[str, str | None]:
    """Names of the image column and of the label column, None without labels."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    image = _pick("image", config.image_column, images, features, config.source)
    if image is None:
        raise InputError(
            "data.column", f"{config.source} has no image column among {', '.join(features)}: set image_column="
        )
    others = {name: feature for name, feature in features.items() if name != image}
    kinds = {name: getattr(feature, "dtype", "") for name, feature in others.items() if isinstance(feature, Value)}
    labels = [name for name, feature in others.items() if isinstance(feature, ClassLabel)]
    labels = labels or [name for name in (called("label", list(others)),) if name is not None]
    labels = labels or [name for name, kind in kinds.items() if re.match("u?int", kind)]
    labels = labels or [name for name, kind in kinds.items() if kind == "bool"]
    label = _pick("label", config.label_column, labels, features, config.source)
    feature = features[label] if label else None
    if (
        feature is None
        or isinstance(feature, ClassLabel)
        or re.match("u?int|bool|(large_)?string", getattr(feature, "dtype", None) or "")
    ):
        return image, label
    if isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence"):
        raise InputError(
            "data.column",
            f"{config.source}: label column {label!r} has several labels per image, which is not supported: set "
            "label_column= to one with a single class",
        )
    raise InputError("data.column", f"{config.source}: label column {label!r} has no classes: cast it to ClassLabel")


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _pick(kind: str, asked: str | None, found: list[str], features: Features, source: str) -> str | None:
    if asked is not None:
        asked = as_spelled([asked], list(features))[0]
        if asked not in features:
            near = get_close_matches(asked, features, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(features)}"
            raise InputError("data.column", f"{source} has no column {asked!r}: {hint}")
        return asked
    if len(found) > 1:
        raise InputError(
            "data.column",
            f"{source} has several {kind} columns: {', '.join(found)}; choose one, such as {kind}_column={found[0]}",
        )
    return found[0] if found else None


def _join(dataset: Dataset, paths: list[str], spec: str, name: str) -> np.ndarray:
    """Rows (N,) int64 of a data set whose images have these file names.

    Whole paths are compared, else base names, else base names as ImageNet has them on the Hub, where
    n01440764_10026.JPEG is called n01440764_10026_n01440764.JPEG.
    """
    have = pc.struct_field(pa.chunked_array(_column(dataset, "image").chunks), "path").combine_chunks()
    if have.null_count == len(have):
        raise InputError("index.kind", f"{spec} lists file names, which {name} does not have: use row numbers")
    want = pa.array(paths, have.type)
    rows = pc.index_in(want, value_set=have)
    base_name = functools.partial(pc.replace_substring_regex, pattern="^.*/", replacement="")
    for form in (functools.partial(pc.utf8_normalize, form="NFC"), base_name):
        if rows.null_count:
            have, want = form(have), form(want)
            rows = pc.index_in(want, value_set=have)
    if rows.null_count:
        plain = pc.replace_substring_regex(have, pattern=r"_n\d{8}(\.\w+)$", replacement=r"\1")
        if (again := pc.index_in(want, value_set=plain)).null_count < rows.null_count:
            rows, have = again, plain
    if rows.null_count:
        missing = [paths[i] for i in np.flatnonzero(rows.is_null())[:3]]
        raise MissingFileError(
            "index.images",
            f"{rows.null_count:,} of {len(paths):,} files of {spec} are not in {name}, the first: {first_few(missing)}",
        )
    if pc.sum(pc.is_in(have, value_set=want)).as_py() > len(paths) or pc.count_distinct(rows).as_py() < len(paths):
        raise InputError("index.data", f"file names of {spec} match several rows of {name}: use a folder of images")
    return rows.to_numpy().astype(np.int64)


def cache_folder() -> Path:
    """Where drawn indexes are kept: $XDG_CACHE_HOME or ~/.cache, then rescom_timm/index."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rescom_timm" / "index"


def _keep(index: Index, labels: np.ndarray, cache: Path) -> str | None:
    """Save a drawn index once, for people to read; each run draws anew, so an old file cannot mislead.

    The name contains a digest of the labels that it was drawn from.
    """
    digest = hashlib.sha256(labels.tobytes()).hexdigest()[:12]
    stem = "-".join(index.info[key] for key in ("source", "split", "rule"))
    path = cache / f"{re.sub(r'[^A-Za-z0-9.]+', '-', stem).strip('-.')[-150:]}-{digest}.txt"
    try:
        if not path.exists():
            index.save(path)
            log.info("drawn index kept in %s", path)
    except OSError as error:
        log.warning("the drawn index could not be kept in %s (%s); training goes on", path, error)
        return None
    return str(path)


def _check_same(there: np.ndarray, here: np.ndarray, rows: np.ndarray, spec: str, name: str) -> None:
    if (bad := np.flatnonzero(there != here)).size:
        i = bad[0]
        raise InputError(
            "index.data",
            f"{spec} and {name} disagree on {len(bad):,} of {len(here):,} labels, first in row {rows[i]}: {here[i]} in "
            f"the index, {there[i]} in the data set; check data set, split and label column",
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
