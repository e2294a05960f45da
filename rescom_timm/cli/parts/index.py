"""What the actions of `index` do. Each takes parsed options and returns an exit code."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rescom_timm.data import index as rows
from rescom_timm.data import profiles
from rescom_timm.data.broken import unreadable
from rescom_timm.data.config import Columns, DataConfig
from rescom_timm.data.index import Index
from rescom_timm.data.index_files import MAX_CLASSES, is_label
from rescom_timm.data.progress import image_bar
from rescom_timm.data.sources import training_index, training_split
from rescom_timm.data.splits import Split
from rescom_timm.errors import InputError
from rescom_timm.io import atomic_path, errors_named, read_json, read_text


def make(options: argparse.Namespace) -> int:
    """Draw a long-tailed index from a data set, a list, or a file of labels (one a line)."""
    name, factor, seed = profiles.parse_rule(options.rule)
    info = {"source": options.source, "split": options.split, "rule": options.rule}
    if options.labels:
        whole = _label_file(options.labels, info)
    elif Path(options.source).is_file():
        whole = replace(Index.load(options.source), info={"source": Path(options.source).name, "rule": options.rule})
    else:
        config = _config(options, options.split)
        whole = replace(training_index(config), info=info)
    kept = profiles.RULES[name](whole.labels, whole.num_classes, factor, seed)
    return _save(whole.take(kept), options)


def convert(options: argparse.Namespace) -> int:
    """Convert an official list or an iNaturalist JSON to an index."""
    index = Index.load(options.file, options.classes, options.allow_empty)
    names = index.class_names
    if options.names:
        names = read_text(options.names).splitlines()
    info = {"rule": f"converted from {Path(options.file).name}", **index.info}
    return _save(replace(index, class_names=names, info=info), options)


def check(options: argparse.Namespace) -> int:
    """List every error in an index; with --source, also in the images or the data set."""
    index, problems = rows.read(options.file, options.classes, options.allow_empty, _columns(options), options.split)
    images = "images not checked"
    if index and options.source:
        images = "images found but not decoded"
        try:
            split = training_split(_config(options, options.split, options.file), allow_empty=options.allow_empty)
        except (ValueError, FileNotFoundError) as error:
            problems = [str(error)]
        else:
            if options.decode or options.output:
                found = broken_images(split)
                images, problems = "all images decoded", list(found.values())
                if options.output:
                    broken = {int(split.rows[position]): reason for position, reason in found.items()}
                    return _save(without(index, broken), options)
    for problem in problems[: options.lines]:
        print(f"{options.file}: {problem}")
    if len(problems) > options.lines:
        print(f"{options.file}: and {len(problems) - options.lines:,} more errors")
    if index and not problems:
        size = f"{len(index):,} rows of {index.num_classes:,} classes"
        print(f"{options.file}: good, {size}, {images}, sha256 {index.sha256}")
    return 3 if problems else 0


def broken_images(split: Split) -> dict[int, str]:
    """Position -> error of every image that cannot be decoded."""
    with image_bar(len(split.rows), split.name) as bar:
        return dict(unreadable(split, progress=bar.update))


def without(index: Index, broken: Mapping[int, str]) -> Index:
    """The index without these rows (for a list: counted from 0), which its header then names."""
    if not broken:
        return index
    rows_of = np.arange(len(index)) if isinstance(index.keys, list) else index.keys
    out = np.isin(rows_of, list(broken))
    kept = index.take(np.flatnonzero(~out), f"without {len(broken)} that cannot be read")
    lost = [str(index.keys[k]) for k in np.flatnonzero(out)]
    named = ", ".join([*filter(None, [index.info.get("left out")]), *lost[:20]]) + (" ..." if len(lost) > 20 else "")
    for reason in list(broken.values())[:5]:
        print(f"left out: {reason}")
    print(f"left out in all: {len(broken):,} images that cannot be read")
    return replace(kept, info={**kept.info, "left out": named})


def describe(options: argparse.Namespace) -> int:
    """Counts, groups, imbalance, digest and long tail of an index, of a list, or of a JSON list of class counts."""
    if (counts := _counts_file(options.file)) is None:
        index = Index.load(options.file, options.classes, allow_empty=True)
        counts = index.counts
        for key, value in [*index.info.items(), ("keys", "paths" if index.by_path else "row numbers")]:
            print(f"{key}: {value}")
        print(f"sha256: {index.sha256}")
    print(rows.describe(counts))
    if options.png:
        _picture(counts, Path(options.file).stem, options.png)
        print(options.png)
    return 0


def overlap(options: argparse.Namespace) -> int:
    """List the images that are in both of two indexes."""
    first, second = (Index.load(file, allow_empty=True) for file in (options.file, options.other))
    shared = rows.overlap(first, second)
    print(f"{len(shared):,} images are in both {options.file} and {options.other}")
    print(*shared[: options.lines], sep="\n", end="\n" if shared else "")
    return 3 if shared else 0


def _config(options: argparse.Namespace, split: str, index: str = "all") -> DataConfig:
    return DataConfig(options.source, subset=options.subset, train=split, index=index, **_column_settings(options))


def _column_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {f"{kind}_column": getattr(options, f"{kind}_column", None) for kind in ("image", "label", "split", "group")}


def _columns(options: argparse.Namespace) -> Columns:
    return DataConfig("any", **_column_settings(options)).columns


def _label_file(path: str, info: dict[str, str]) -> Index:
    texts = read_text(path).split()
    if not texts:
        raise InputError("index.format", f"{path} has no labels: write one whole number from 0 per line")
    for number, text in enumerate(texts, 1):
        if not is_label(text):
            most = f"{MAX_CLASSES - 1:,}"
            raise InputError(
                "index.format", f"{path}: label number {number}, {text!r}, is not a whole number from 0 to {most}"
            )
    labels = np.array(texts, dtype=np.int64)
    return Index(np.arange(len(labels)), labels, int(labels.max()) + 1, info)


def _counts_file(path: str) -> np.ndarray | None:
    if Path(path).suffix != ".json":
        return None
    content = read_json(path, object)
    is_counts = isinstance(content, list) and content and all(isinstance(n, int) and n >= 0 for n in content)
    if is_counts and not any(content):
        raise InputError("index.format", f"{path} has only class counts of 0")
    return np.array(content, dtype=np.int64) if is_counts else None


def _save(index: Index, options: argparse.Namespace) -> int:
    index.save(options.output)
    print(f"{options.output}: {len(index):,} rows of {index.num_classes:,} classes, sha256 {index.sha256}")
    return 0


def _picture(counts: np.ndarray, title: str, path: str) -> None:
    from rescom_timm import metrics
    from rescom_timm.analysis import style

    ordered = np.sort(counts)[::-1].copy()  # torch does not accept a reversed view
    names = metrics.group_of(ordered)
    figure = style.new_figure(8, 4)
    axes = figure.subplots()
    axes.bar(np.arange(len(ordered)), ordered, width=1.0, color=[style.GROUP_COLORS[name] for name in names])
    axes.set_yscale("log")
    style.group_legend(axes, names, loc="upper right")
    title = f"{style.plain(title, 60)}: {counts.sum():,} rows, imbalance {rows.imbalance(counts):.4g}"
    style.tidy(axes, title, "classes, largest first", "training images (log scale)", "y")
    with errors_named(path), atomic_path(path) as new:
        figure.savefig(new, dpi=150, format=Path(path).suffix[1:] or "png")
