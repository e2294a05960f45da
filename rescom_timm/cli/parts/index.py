"""Index files: what the verbs init, make, convert, check, describe and overlap do. Each takes its words, parsed, and
returns an exit code."""

import argparse
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rescom_timm.class_names import nfc, numbers_in
from rescom_timm.config.own_data import recipe_for
from rescom_timm.config.secrets import without_home
from rescom_timm.data import index as rows
from rescom_timm.data import profiles
from rescom_timm.data.broken import unreadable
from rescom_timm.data.image_folders import (
    IMAGE_SUFFIXES,
    LeftOut,
    class_folders,
    class_names_in,
    files_under,
    holds_tables,
    metadata_in,
)
from rescom_timm.data.index import Index
from rescom_timm.data.index_files import MAX_CLASSES, is_label
from rescom_timm.data.named_columns import Columns, split_rows
from rescom_timm.data.progress import image_bar
from rescom_timm.data.sources import Data, load, training_index, training_split
from rescom_timm.data.splits import DataConfig, Split
from rescom_timm.data.tables import NoSplit
from rescom_timm.hub_client import hub_id, missing
from rescom_timm.io import atomic_path, errors_named, read_json, read_text, write_text


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
    """Bring an official list or an iNaturalist JSON into this package's format."""
    index = Index.load(options.file, options.classes, options.allow_empty)
    names = index.class_names
    if options.names:
        names = read_text(options.names).splitlines()
    info = {"rule": f"converted from {Path(options.file).name}", **index.info}
    return _save(replace(index, class_names=names, info=info), options)


def check(options: argparse.Namespace) -> int:
    """Say everything that is wrong with an index; with --source, also against the images or the data set."""
    index, problems = rows.read(options.file, options.classes, options.allow_empty, _columns(options), options.split)
    images = "its images not looked for"
    if index and options.source:
        images = "its images there, but not decoded"
        try:
            split = training_split(_config(options, options.split, options.file), allow_empty=options.allow_empty)
        except (ValueError, FileNotFoundError) as error:
            problems = [str(error)]
        else:
            if options.decode or options.output:
                found = _broken(split)
                images, problems = "all its images decoded", list(found.values())
                if options.output:
                    broken = {int(split.rows[position]): told for position, told in found.items()}
                    return _save(_without(index, broken), options)
    for problem in problems[: options.lines]:
        print(f"{options.file}: {problem}")
    if len(problems) > options.lines:
        print(f"{options.file}: and {len(problems) - options.lines:,} more problems")
    if index and not problems:
        told = f"{len(index):,} rows of {index.num_classes:,} classes, {images}, sha256 {index.sha256}"
        print(f"{options.file}: good, {told}")
    return 3 if problems else 0


def _broken(split: Split) -> dict[int, str]:
    """What is wrong with each image that cannot be decoded, by its position, found in one pass."""
    with image_bar(len(split.rows), split.name) as bar:
        return dict(unreadable(split, progress=bar.update))


def _without(index: Index, broken: Mapping[int, str]) -> Index:
    """The index without these rows (of a list: counted from 0 in it), named in its header."""
    if not broken:
        return index
    rows_of = np.arange(len(index)) if isinstance(index.keys, list) else index.keys
    out = np.isin(rows_of, list(broken))
    kept = index.take(np.flatnonzero(~out), f"without {len(broken)} that cannot be read")
    lost = [str(index.keys[k]) for k in np.flatnonzero(out)]
    named = ", ".join([*filter(None, [index.info.get("left out")]), *lost[:20]]) + (" ..." if len(lost) > 20 else "")
    for problem in list(broken.values())[:5]:
        print(f"left out: {problem}")
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
    """Say which images stand in both of two indexes."""
    first, second = (Index.load(file, allow_empty=True) for file in (options.file, options.other))
    shared = rows.overlap(first, second)
    print(f"{len(shared):,} images stand in both {options.file} and {options.other}")
    print(*shared[: options.lines], sep="\n", end="\n" if shared else "")
    return 3 if shared else 0


def init(options: argparse.Namespace) -> int:
    """Write a recipe for one's own images: class folders, a folder with a list, or a local or Hub data set."""
    recipe = Path(options.output)
    lists = {part: recipe.with_name(f"{recipe.stem}_{part}.txt") for part in ("train", "test", "validation")}
    if taken := [str(path) for path in (recipe, *lists.values()) if path.exists()]:
        if not options.force:
            raise ValueError(f"{', '.join(taken)} would be overwritten: choose another -o, or say --force")
    if options.source != "digits" and hub_id(options.source, alone=True) is None:
        if not Path(options.source).expanduser().exists():
            raise missing(options.source)
        options.source = _place(options.source)
    indexes, config = _parts(options)
    with TemporaryDirectory() as folder:  # all is tried before anything is written where the user sees it

        def tried() -> Data:
            for part, index in indexes.items():
                index.save(Path(folder) / lists[part].name)
            return load(_with_lists(config, {part: f"{folder}/{lists[part].name}" for part in indexes}))

        data = tried()
        splits = {"train": data.train, "test": data.test, "validation": data.validation}
        broken = {part: _broken(split) for part, split in splits.items() if split is not None}
        if any(broken.values()):
            told = [problem for found in broken.values() for problem in found.values()]
            if not options.leave_out or not indexes:
                how = "repair or remove them" + (", or say --leave-out" if indexes else "")
                raise ValueError(f"{len(told):,} images cannot be read; {how}:\n  " + "\n  ".join(told[:50]))
            lost: dict[str, dict[int, str]] = {part: {} for part in indexes}
            for part, found in broken.items():  # validation rows may be some of the training list's
                numbers = {int(splits[part].rows[k]): problem for k, problem in found.items()}  # type: ignore[union-attr]
                lost[part if part in indexes else "train"] |= numbers
            indexes = {part: _without(index, lost[part]) for part, index in indexes.items()}
            data = tried()
        config = _with_lists(config, {part: _place(lists[part]) for part in indexes})
        text = recipe_for(data, config, options.source, options.tune)
    for part, index in indexes.items():
        index.save(lists[part])
        print(f"{lists[part]}: {len(index):,} rows of {index.num_classes:,} classes")
    write_text(recipe, text)
    print(rows.describe(data.counts))
    print(f"{recipe}: train with  rescom-timm train {shlex.quote(str(recipe))}")
    return 0


def _place(path: str | Path) -> str:
    """The path such that it is right from every working directory: absolute, or below the home folder as ~/..."""
    return without_home(os.path.abspath(os.path.expanduser(path)))


def _with_lists(config: DataConfig, lists: dict[str, str]) -> DataConfig:
    if "validation" in lists:
        config = replace(config, validation=f"index({lists['validation']})")
    return replace(config, index=lists.get("train", config.index), test_index=lists.get("test", config.test_index))


def _parts(options: argparse.Namespace) -> tuple[dict[str, Index], DataConfig]:
    """The index files to write and the data section that uses them."""
    root = Path(options.source).expanduser()
    if root.is_dir() and not holds_tables(root):
        config = DataConfig(options.source, validation=options.validation or "none")
        nested = metadata_in(root / "train") is not None
        if listed := options.list or (None if nested else metadata_in(root)):
            parts = _listed(options, _config(options, "train", str(listed)))
        else:
            parts = _folders(options, root, listed=nested)
        if listed or nested:
            _say_unlisted(root, parts)
    else:
        if options.list:
            raise ValueError("--list names images of a folder, and SOURCE is a data set that has its own labels")
        config = replace(_config(options, options.split), test=options.test_split)
        whole = training_index(config)
        if options.test_split != options.split:
            try:
                training_index(replace(config, train=options.test_split), allow_empty=True)
                train = _cut(whole, options.imbalance)
                config = replace(config, validation=options.validation or _validation(train))
                return ({"train": train} if options.imbalance else {}), config
            except NoSplit:
                print(f"no split {options.test_split!r}: a fifth of each class is kept for testing")
                config = replace(config, test=options.split)
        parts = _part(whole, options.validation)
    parts["train"] = _cut(parts["train"], options.imbalance)
    if "validation" not in parts:
        config = replace(config, validation=options.validation or _validation(parts["train"]))
    return parts, config


def _validation(train: Index) -> str:
    """data.validation where it is not said: a tenth of each class, of which one must have five images."""
    if train.counts.max() >= 5:
        return "holdout(0.1)"
    print("no class is large enough for validation images: the last epoch is what counts (data.validation: none)")
    return "none"


def _say_unlisted(root: Path, parts: Mapping[str, Index]) -> None:
    """Name the images in the folder that are in none of the lists."""
    listed = {nfc(f"{root}/{key}") for index in parts.values() for key in index.keys}
    left = LeftOut()
    for path in sorted(files_under(root, left)):
        if nfc(path) not in listed and Path(path).suffix.lower() in IMAGE_SUFFIXES:
            left("are images of no row in use", path)
    left.say(root, print)


def _folders(options: argparse.Namespace, root: Path, listed: bool) -> dict[str, Index]:
    """The parts that a folder has as subfolders, each of class folders or, if listed, with its metadata; else a fifth
    of each class for testing."""

    def there(split: str) -> bool:
        return metadata_in(root / split) is not None if listed else (root / split).is_dir()

    def read(split: str) -> Index:
        if listed:
            return training_index(_config(options, split), allow_empty=split != "train")
        return _under(root, root / split)

    left = LeftOut()
    names = class_names_in(root, left)  # refuses links to what is not there
    folders = [split for split in ("test", "val", "validation") if there(split)]
    if not folders or not there("train"):
        return _part(_told(read("train")) if listed else _under(root, root), options.validation)
    train = _told(read("train"))
    parts = ["test", "validation"] if options.validation is None else ["test"]
    for name in names:
        if name not in ("train", *folders[: len(parts)]):
            left("are in no folder that is read", f"{root}/{name}")
    left.say(root, print)
    return {"train": train, **{p: _as_in(train, read(at), root / at) for p, at in zip(parts, folders, strict=False)}}


def _listed(options: argparse.Namespace, config: DataConfig) -> dict[str, Index]:
    """The parts of a list: those of its column of splits, else a fifth of each class for testing."""
    found: dict[str, Index] = {}
    train = training_index(config)
    if train.by_path and "split" not in train.info:
        return _part(_told(train), options.validation)
    for part in ("test", "validation"):
        try:
            found[part] = training_index(replace(config, train=part), allow_empty=True)
        except ValueError as error:
            if f"no row of split '{part}'" not in str(error):
                raise
    used = ("train", *found)
    for name, count in split_rows(Path(config.index).expanduser(), config.columns, used).items():
        print(f"{count:,} rows of split {name!r} are left out: those of train, test and validation are read")
    found = {part: _like(train, index) for part, index in found.items()}
    if "test" not in found:
        return {**_part(_told(train), "list" if found else options.validation), **found}
    return {"train": _told(train), **found}


def _told(index: Index) -> Index:
    """The index, after saying how its table was read."""
    if "columns" in index.info:
        classes = "classes in sorted order" if "labels" in index.info else "class numbers"
        print(f"columns {index.info['columns']}; {index.num_classes:,} {classes}")
    return index


def _like(train: Index, part: Index) -> Index:
    return replace(part, num_classes=train.num_classes, class_names=train.class_names)


def _part(whole: Index, validation: str | None) -> dict[str, Index]:
    """A fifth of each class for testing; where rows stay together by group, a tenth of the rest for validation too,
    which the recipe could not hold out without knowing the groups."""
    if whole.groups is None and whole.counts.max() < 3:
        raise ValueError(
            "no class has three images or more, so that none can be kept for testing: give test images of their own, "
            "in a folder or a split test"
        )
    parts = dict(zip(("train", "test"), _part_test(whole), strict=True))
    if whole.groups is not None and validation is None:
        parts["train"], parts["validation"] = _part_test(parts["train"], 0.1, "validation")
    return parts


def _under(root: Path, folder: Path) -> Index:
    """The class folders of ``folder`` as paths under ``root``; files that are no images are named and left out."""
    index, _ = class_folders(folder, print)
    lead = "" if folder == root else folder.name + "/"
    info = {"source": _place(root), "split": folder.name, "rule": "all images of the class folders"}
    return replace(index, keys=[lead + str(key) for key in index.keys], info=info)


def _as_in(train: Index, part: Index, folder: Path) -> Index:
    """The part with its classes numbered as those of training, of which it may lack some."""
    numbers = numbers_in(train.names, part.names, "train", str(folder), lacking=True)
    labels = part.labels if numbers is None else np.array(numbers)[part.labels]
    return replace(part, labels=labels, num_classes=train.num_classes, class_names=train.class_names)


def _part_test(whole: Index, fraction: float = 0.2, name: str = "test") -> tuple[Index, Index]:
    """A part of each class, drawn with a fixed seed; a class keeps at least one training image."""
    held = profiles.holdout(whole.labels, fraction, groups=whole.groups)
    kept = np.delete(np.arange(len(whole)), held)
    return whole.take(kept, f"all but a {name} part of {fraction:g}"), whole.take(held, f"{name} part of {fraction:g}")


def _cut(index: Index, factor: float | None) -> Index:
    if factor is None:
        return index
    kept = profiles.exponential(index.labels, index.num_classes, factor, by_count=True)
    return index.take(kept, f"exponential({factor:g}) by count")


def _config(options: argparse.Namespace, split: str, index: str = "all") -> DataConfig:
    return DataConfig(options.source, subset=options.subset, train=split, index=index, **_column_settings(options))


def _column_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {f"{kind}_column": getattr(options, f"{kind}_column", None) for kind in ("image", "label", "split", "group")}


def _columns(options: argparse.Namespace) -> Columns:
    return DataConfig("any", **_column_settings(options)).columns


def _label_file(path: str, info: dict[str, str]) -> Index:
    words = read_text(path).split()
    if not words:
        raise ValueError(f"{path} holds no labels: it is one whole number from 0 a line")
    for number, word in enumerate(words, 1):
        if not is_label(word):
            most = f"{MAX_CLASSES - 1:,}"
            raise ValueError(f"{path}: label number {number}, {word!r}, is not a whole number from 0 to {most}")
    labels = np.array(words, dtype=np.int64)
    return Index(np.arange(len(labels)), labels, int(labels.max()) + 1, info)


def _counts_file(path: str) -> np.ndarray | None:
    if Path(path).suffix != ".json":
        return None
    content = read_json(path, object)
    is_counts = isinstance(content, list) and content and all(isinstance(n, int) and n >= 0 for n in content)
    if is_counts and not any(content):
        raise ValueError(f"{path} holds class counts of 0 alone")
    return np.array(content, dtype=np.int64) if is_counts else None


def _save(index: Index, options: argparse.Namespace) -> int:
    index.save(options.output)
    print(f"{options.output}: {len(index):,} rows of {index.num_classes:,} classes, sha256 {index.sha256}")
    return 0


def _picture(counts: np.ndarray, title: str, path: str) -> None:
    from rescom_timm.analysis import style

    ordered = np.sort(counts)[::-1].copy()  # torch takes no reversed view
    names = style.group_of(ordered)
    figure = style.new_figure(8, 4)
    axes = figure.subplots()
    axes.bar(np.arange(len(ordered)), ordered, width=1.0, color=[style.GROUP_COLORS[name] for name in names])
    axes.set_yscale("log")
    style.group_legend(axes, names, loc="upper right")
    title = f"{style.plain(title, 60)}: {counts.sum():,} rows, imbalance {rows.imbalance(counts):.4g}"
    style.tidy(axes, title, "classes, largest first", "training images (log scale)", "y")
    with errors_named(path), atomic_path(path) as beside:
        figure.savefig(beside, dpi=150, format=Path(path).suffix[1:] or "png")
