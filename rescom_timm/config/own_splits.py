"""Default training, validation and test splits of your own images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rescom_timm.class_names import nfc, numbers_in
from rescom_timm.config.secrets import without_home
from rescom_timm.data import profiles
from rescom_timm.data.config import DataConfig
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
from rescom_timm.data.index_files import NoSplit
from rescom_timm.data.named_columns import split_rows
from rescom_timm.data.sources import training_index
from rescom_timm.errors import InputError


@dataclass(frozen=True)
class OwnImages:
    """A folder of class folders, one with a list, or a local or Hub data set."""

    source: str
    split: str = "train"
    test_split: str = "test"
    subset: str | None = None
    list: str | None = None
    """Paths and labels of a folder's images."""
    validation: str | None = None
    """data.validation; None: the folder val where there is one, else holdout(0.1)."""
    imbalance: float | None = None
    """To which the training images are cut."""
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None

    def config(self, split: str, index: str = "all") -> DataConfig:
        """The data section of one split."""
        return DataConfig(
            self.source, subset=self.subset, train=split, index=index, image_column=self.image_column,
            label_column=self.label_column, split_column=self.split_column, group_column=self.group_column,
        )  # fmt: skip


def place(path: str | Path) -> str:
    """The path such that it is right from every working directory: absolute, or below the home folder as ~/..."""
    return without_home(os.path.abspath(os.path.expanduser(path)))


def with_lists(config: DataConfig, lists: dict[str, str]) -> DataConfig:
    """The data section with the files of written lists: train, validation, test."""
    if "validation" in lists:
        config = replace(config, validation=f"index({lists['validation']})")
    return replace(config, index=lists.get("train", config.index), test_index=lists.get("test", config.test_index))


def saved_lists(indexes: Mapping[str, Index], config: DataConfig, folder: str | Path, prefix: str = "") -> DataConfig:
    """Write the index files FOLDER/<prefix>PART.txt; returns the data section that uses them."""
    files = {part: Path(folder) / f"{prefix}{part}.txt" for part in indexes}
    for part, path in files.items():
        indexes[part].save(path)
    return with_lists(config, {part: place(path) for part, path in files.items()})


def parts(own: OwnImages) -> tuple[dict[str, Index], DataConfig]:
    """The index files to write and the data section that uses them."""
    root = Path(own.source).expanduser()
    if root.is_dir() and not holds_tables(root):
        config = DataConfig(own.source, validation=own.validation or "none")
        nested = metadata_in(root / "train") is not None
        if listed := own.list or (None if nested else metadata_in(root)):
            parts = _listed(own, own.config("train", str(listed)))
        else:
            parts = _folders(own, root, listed=nested)
        if listed or nested:
            _say_unlisted(root, parts)
    else:
        if own.list:
            raise InputError(
                "usage.arguments", "--list names images of a folder, but SOURCE is a data set with labels of its own"
            )
        config = replace(own.config(own.split), test=own.test_split)
        whole = training_index(config)
        if own.test_split != own.split:
            try:
                training_index(replace(config, train=own.test_split), allow_empty=True)
                train = _cut(whole, own.imbalance)
                config = replace(config, validation=own.validation or _validation_split(config) or _validation(train))
                return ({"train": train} if own.imbalance else {}), config
            except NoSplit:
                print(f"no split {own.test_split!r}: a fifth of each class is kept for testing")
                config = replace(config, test=own.split)
        parts = _part(whole, own.validation)
    parts["train"] = _cut(parts["train"], own.imbalance)
    if "validation" not in parts:
        config = replace(config, validation=own.validation or _validation(parts["train"]))
    return parts, config


def _validation(train: Index) -> str:
    """data.validation where it is not said: a tenth of each class, of which one must have five images."""
    if train.counts.max() >= 5:
        return "holdout(0.1)"
    print("no class is large enough for validation images: the last epoch is what counts (data.validation: none)")
    return "none"


def _validation_split(config: DataConfig) -> str:
    """data.validation of a data set that has a split of that name; "" where it has none."""
    with suppress(NoSplit):
        training_index(replace(config, train="validation"), allow_empty=True)
        print("validation images: the split 'validation'")
        return "split(validation)"
    return ""


def _say_unlisted(root: Path, parts: Mapping[str, Index]) -> None:
    """Name the images in the folder that are in none of the lists."""
    listed = {nfc(f"{root}/{key}") for index in parts.values() for key in index.keys}
    left = LeftOut()
    for path in sorted(files_under(root, left)):
        if nfc(path) not in listed and Path(path).suffix.lower() in IMAGE_SUFFIXES:
            left("are images of no row in use", path)
    left.say(root, print)


def _folders(own: OwnImages, root: Path, listed: bool) -> dict[str, Index]:
    """The parts that a folder has as subfolders, of class folders or with metadata; else a fifth for testing."""

    def there(split: str) -> bool:
        return metadata_in(root / split) is not None if listed else (root / split).is_dir()

    def read(split: str) -> Index:
        if listed:
            return training_index(own.config(split), allow_empty=split != "train")
        return _under(root, root / split)

    left = LeftOut()
    names = class_names_in(root, left)  # refuses links to what is not there
    folders = [split for split in ("test", "val", "validation") if there(split)]
    if not folders or not there("train"):
        return _part(_told(read("train")) if listed else _under(root, root), own.validation)
    train = _told(read("train"))
    parts = ["test", "validation"] if own.validation is None else ["test"]
    for name in names:
        if name not in ("train", *folders[: len(parts)]):
            left("are in no folder that is read", f"{root}/{name}")
    left.say(root, print)
    return {"train": train, **{p: _as_in(train, read(at), root / at) for p, at in zip(parts, folders, strict=False)}}


def _listed(own: OwnImages, config: DataConfig) -> dict[str, Index]:
    """The parts of a list: those of its column of splits, else a fifth of each class for testing."""
    found: dict[str, Index] = {}
    train = training_index(config)
    if train.by_path and "split" not in train.info:
        return _part(_told(train), own.validation)
    for part in ("test", "validation"):
        with suppress(NoSplit):
            found[part] = training_index(replace(config, train=part), allow_empty=True)
    used = ("train", *found)
    for name, count in split_rows(Path(config.index).expanduser(), config.columns, used).items():
        print(f"{count:,} rows of split {name!r} are left out: those of train, test and validation are read")
    found = {part: _like(train, index) for part, index in found.items()}
    if "test" not in found:
        return {**_part(_told(train), "list" if found else own.validation), **found}
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
    """A fifth of each class for testing; of rows with groups, which a recipe cannot hold out, a tenth to validate."""
    if whole.groups is None and whole.counts.max() < 3:
        raise InputError(
            "data.split",
            "no class has three images or more, so none can be held out for testing: add a folder or a split `test`",
        )
    parts = dict(zip(("train", "test"), _part_test(whole), strict=True))
    if whole.groups is not None and validation is None:
        parts["train"], parts["validation"] = _part_test(parts["train"], 0.1, "validation")
    return parts


def _under(root: Path, folder: Path) -> Index:
    """The class folders of ``folder`` as paths under ``root``; files that are no images are named and left out."""
    index, _ = class_folders(folder, print)
    lead = "" if folder == root else folder.name + "/"
    info = {"source": place(root), "split": folder.name, "rule": "all images of the class folders"}
    return replace(index, keys=[lead + str(key) for key in index.keys], info=info)


def _as_in(train: Index, part: Index, folder: Path) -> Index:
    """The part with its classes numbered as those of training, of which it may lack some."""
    numbers = numbers_in(train.names, part.names, "train", str(folder), lacking=True)
    labels = part.labels if numbers is None else np.array(numbers)[part.labels]
    return replace(part, labels=labels, num_classes=train.num_classes, class_names=train.class_names)


def _part_test(whole: Index, fraction: float = 0.2, name: str = "test") -> tuple[Index, Index]:
    """The rest, with an image of each class at least, and a drawn part of each (two test images of five or more)."""
    held = profiles.holdout(whole.labels, fraction, groups=whole.groups, least=2 if name == "test" else 0)
    kept = np.delete(np.arange(len(whole)), held)
    return whole.take(kept, f"all but a {name} part of {fraction:g}"), whole.take(held, f"{name} part of {fraction:g}")


def _cut(index: Index, factor: float | None) -> Index:
    if factor is None:
        return index
    kept = profiles.exponential(index.labels, index.num_classes, factor, by_count=True)
    return index.take(kept, f"exponential({factor:g}) by count")
