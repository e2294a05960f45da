"""Folders of image files, and lists of paths in them."""

import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, Value
from datasets.table import InMemoryTable

from rescom_timm.class_names import nfc, refuse_two_forms
from rescom_timm.data.config import DataConfig, index_path
from rescom_timm.data.index import Index
from rescom_timm.data.index_files import first_few
from rescom_timm.data.named_columns import is_table
from rescom_timm.data.profiles import RULES, draw, parse_call
from rescom_timm.data.splits import Part
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.text import counted

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".avif",
    ".jp2",
}  # fmt: skip


def holds_tables(folder: Path) -> bool:
    """Whether a folder holds parquet, arrow or save_to_disk files, by its first thousand files."""
    return any(path.endswith((".parquet", ".arrow")) for path in islice(files_under(folder), 1000))


class LeftOut:
    """Collects files and folders that are left out: called with (why, path) for each."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = {}

    def __call__(self, why: str, path: str) -> None:
        """Add a path and the reason, such as "are hidden"."""
        self.paths.setdefault(why, []).append(path)

    def say(self, root: Path, say: Callable[[str], object]) -> None:
        """Call `say` with a line for each reason, with the first few paths below the root."""
        for why, paths in self.paths.items():
            shown = [os.fsencode(os.path.relpath(path, root)).decode("utf-8", "backslashreplace") for path in paths[:4]]
            say(f"{len(paths):,} files or folders under {root} {why} and left out: {first_few(shown, 3)}")


def files_under(folder: str | Path, left_out: Callable[[str, str], object] = lambda why, path: None) -> Iterator[str]:
    """Paths of the files in and below a folder, without hidden ones, whose names begin with a dot.

    Links to folders are followed last, each real folder once. Raises OSError for a folder that cannot be listed.
    """
    seen: set[str] = set()
    todo, links = [str(folder)], list[str]()
    while todo or links:
        path = todo.pop() if todo else links.pop(0)
        real = os.path.realpath(path)
        if real in seen or f"{os.path.realpath(os.path.dirname(path))}/".startswith(f"{real}/"):
            left_out("are links to folders that are read already or that they are in", path)
            continue
        seen.add(real)
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            inner = f"{path}/{entry.name}"
            if entry.name.startswith("."):
                left_out("are hidden", inner)
            elif is_dangling(entry):
                left_out("are links to what is not there", inner)
            elif entry.is_dir():
                (links if entry.is_symlink() else todo).append(inner)
            else:
                yield inner


def is_dangling(entry: os.DirEntry[str]) -> bool:
    """Whether the entry is a link whose target does not exist, such as an unmounted disk, or a link to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def folder_part(
    config: DataConfig, root: Path, split: str, spec: str, like: Part | None = None, allow_empty: bool = False
) -> Part:
    """The images of a list over a folder.

    A list with a column of splits gives the rows of `split`; any other is a split of its own. like: the training part,
    whose classes a test list must have. Raises as `sources.load`.
    """
    path, lead = _list_of(config, root, split, spec, like)
    classes, names = (None, None) if like is None else (like.index.num_classes, like.index.class_names)
    if like is not None and like.from_folders and any(map(str.isdigit, names or ())):
        names = None  # numbers in the list are class numbers, as in training
    index = Index.load(
        path, classes, allow_empty or like is not None, columns=config.columns, split=split, class_names=names
    )
    if not isinstance(index.keys, list):
        raise InputError("index.kind", f"{path} has row numbers, and the folder of images {root} needs paths")
    if like is not None and spec == "all" and not lead and "split" not in index.info:
        raise InputError(
            "index.missing",
            f"{path} has no column of splits: set data.test_index to a list of test images, or data.test=holdout(0.2)",
        )
    keys = below(root, index.keys)
    disk = Disk(root)
    layout, paths = fit_layout(root, [lead + key for key in keys] if lead else keys, disk)
    whole = "\n".join(["", *paths])
    if (".." in whole or "\n/" in whole) and (
        out := [key for key in paths if key[:1] == "/" or ".." in key.split("/")]
    ):
        raise InputError(
            "data.outside",
            f"{path} names images outside {root}, which are not read, the first: {first_few(out, 3)}; set "
            "data.source to a folder that has them all",
        )
    there = paths if whole.isascii() else [disk.spelled(path) for path in paths]
    if missing := missing_files(root, there):
        raise MissingFileError(
            "index.images",
            f"{len(missing):,} of {len(paths):,} images of {path} are not under {root} (paths {layout}), the first: "
            f"{first_few(missing, 3)}",
        )
    if len(set(there)) < len(there):
        double = [key for key, number in Counter(there).items() if number > 1]
        raise InputError(
            "index.data",
            f"{path} has several rows of one image under {root} (paths {layout}), the first: "
            f"{first_few(double, 3)}; keep one of them, or set data.source to another folder",
        )
    if layout != LAYOUTS[0][0]:
        log.info("%s: paths are read %s", path, layout)
    index, from_folders = replace(index, keys=paths), like is None and index.class_names is None
    if like is None:
        index = replace(index, class_names=index.class_names or _folder_names(index))
        refuse_two_forms(index.class_names or (), str(path))
    else:
        index = _by_name(index, like, str(path))
    if parse_call(spec, RULES):
        drawn = draw(spec, index.labels, index.num_classes)
        index, there = index.take(drawn, spec), [there[i] for i in drawn]
    notes: dict[str, str | None] = {"rule": spec, "paths": layout}
    notes |= {key: index.info[key] for key in ("columns", "labels") if key in index.info}
    name = f"{root.resolve().name} {path.name if spec == 'all' else Path(spec).name}"
    rows, dataset = np.arange(len(index)), _files_dataset(root, there, index.labels)
    return Part(name, None, dataset, rows, index, notes, from_folders=from_folders)


METADATA = tuple(f"metadata{ending}" for ending in (".csv", ".tsv", ".jsonl"))
"""Lists within a folder, as `datasets` has them."""


def metadata_in(folder: Path) -> Path | None:
    """The metadata file of a folder of images; None without one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def list_within(root: Path, split: str) -> tuple[Path, str] | None:
    """The metadata file of a split's subfolder or of the folder itself, and the prefix of its paths.

    The prefix is the subfolder, ending in /, or empty. None without a metadata file.
    """
    for folder, lead in ((root / split, f"{split}/"), (root, "")):
        if path := metadata_in(folder):
            return path, lead
    return None


def _list_of(config: DataConfig, root: Path, split: str, spec: str, like: Part | None) -> tuple[Path, str]:
    """The list that `spec` means, and the prefix of its paths, ending in /."""
    drawn = spec == "all" or parse_call(spec, RULES) is not None
    if not drawn:
        return index_path(spec), ""
    if (found := list_within(root, split)) is not None:
        return found
    if spec == "all" and like is not None and is_table(config.index) and Path(config.index).expanduser().is_file():
        return index_path(config.index), ""  # one list of all splits
    key = "index" if like is None else "test_index"
    raise InputError(
        "index.missing",
        f"{root} is a folder of images, and {key} is {spec!r}: set {key} to a list, or run  rescom-timm init {root}",
    )


def below(root: Path, paths: Sequence[str]) -> list[str]:
    """Paths relative to the root, with / for a backslash."""
    whole = "\n".join(paths)
    if "\\" in whole and not os.path.isfile(root / paths[0]):  # names may hold a backslash
        paths, whole = [path.replace("\\", "/") for path in paths], whole.replace("\\", "/")
    leads = {os.path.join(place, "") for place in (str(root), str(root.resolve()), os.path.abspath(root))}
    if whole.isascii() and not any(lead in whole for lead in leads):
        return list(paths)

    def cut(path: str) -> str:
        """Without a lead, in the path's own Unicode form or composed."""
        for form in (str, nfc):
            for lead in leads:
                if form(path).startswith(form(lead)):
                    return form(path)[len(form(lead)) :]
        return path

    return [cut(path) for path in paths]


class Disk:
    """Paths below a folder in the Unicode form of the disk. Lists each folder at most once, and stats no file."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.folders: dict[str, str] = {"": ""}
        self.names: dict[str, tuple[set[str], dict[str, str]]] = {}

    def spelled(self, path: str) -> str:
        """The path as the disk spells it; unchanged if it is ASCII, or is not there in any form."""
        if path.isascii() or path.startswith("/") or ".." in path.split("/"):
            return path
        return self._below(*path.rpartition("/")[::2])

    def _below(self, folder: str, name: str) -> str:
        if folder not in self.folders:
            self.folders[folder] = self._below(*folder.rpartition("/")[::2])
        lead = self.folders[folder]
        if lead not in self.names:
            try:
                there = sorted(os.listdir(os.path.join(self.root, lead)))
            except (OSError, ValueError):  # not there, no folder, too long a name, one with a zero byte
                there = []
            self.names[lead] = set(there), {nfc(one): one for one in there}
        exact, forms = self.names[lead]
        return os.path.join(lead, name if name in exact else forms.get(nfc(name), name))


def _files_dataset(root: Path, paths: list[str], labels: np.ndarray) -> Dataset:
    """Paths and labels as a data set, in pieces and without Python objects: 437,513 rows in 30 MB."""
    image = Image(decode=False)
    pieces = []
    for start in range(0, len(paths), 65536):
        full = pc.binary_join_element_wise(f"{root}", pa.array(paths[start : start + 65536]), "/")
        pieces.append(pa.StructArray.from_arrays([pa.nulls(len(full), pa.binary()), full], ["bytes", "path"]))
    table = InMemoryTable(pa.table({"image": pa.chunked_array(pieces, image.pa_type), "label": labels}))
    info = datasets.DatasetInfo(features=Features(image=image, label=Value("int64")))
    # With no fingerprint given, datasets pickles the whole table to make one.
    return Dataset(table, info=info, fingerprint=uuid.uuid4().hex[:16])


def _without_lead(path: str) -> str:
    return path.partition("/")[2] or path


def _with_letters(path: str) -> str:
    """train/arena-hockey/1.jpg -> a/arena/hockey/1.jpg, as in Places365's data_256."""
    folder, _, name = _without_lead(path).rpartition("/")
    return f"{folder[:1]}/{folder.replace('-', '/')}/{name}"


def _without_letters(path: str) -> str:
    """data_256/a/arena/hockey/1.jpg -> arena-hockey/1.jpg, as in Places365's train and val."""
    folder, _, name = _without_lead(path).rpartition("/")
    return f"{folder.partition('/')[2].replace('/', '-')}/{name}"


LAYOUTS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("as listed", str),
    ("without their leading folder", _without_lead),
    ("as data_256/letter/class", lambda path: "data_256/" + _with_letters(path)),
    ("as letter/class", _with_letters),
    ("as val_256", lambda path: f"val_256/{path.rpartition('/')[2]}"),
    ("as train/class", lambda path: "train/" + _without_letters(path)),
    ("as class", _without_letters),
)
"""How a root may hold what a list names: with or without the leading folder, and Places365's two ways to unpack."""


def _layouts(depth: int) -> Iterator[tuple[str, Callable[[str], str]]]:
    yield from LAYOUTS
    for ending in (".jpg", ".png", ".jpeg", ".JPG", ".JPEG"):
        yield f"with {ending} added", lambda path, ending=ending: path + ending  # type: ignore[misc]
    for n in range(2, depth + 1):
        yield f"without their first {n} folders", lambda path, n=n: "/".join(path.split("/")[n:])  # type: ignore[misc]


def fit_layout(root: str | Path, paths: list[str], disk: Disk | None = None) -> tuple[str, list[str]]:
    """How the paths of a list are found under `root`: (description, paths under `root`).

    Decided once for a list, by the rule that finds most of a sample of 64.
    """
    disk = disk or Disk(root)
    sample = paths[:: max(len(paths) // 64, 1)]
    best, name, change = 0, *LAYOUTS[0]
    for other, rule in _layouts(min((path.count("/") for path in sample), default=0)):
        found = sum(os.path.isfile(os.path.join(root, disk.spelled(rule(path)))) for path in sample)
        if found > (best if (other, rule) in LAYOUTS else max(best, len(sample) // 2)):
            best, name, change = found, other, rule
        if best == len(sample):
            break
    return name, paths if change is str else [change(path) for path in paths]


def missing_files(root: str | Path, paths: Sequence[str]) -> list[str]:
    """Which of the paths are not under `root`, in their order. Lists each folder once, and stats no file."""
    there: set[str] = set()
    for folder in {path.rpartition("/")[0] for path in paths}:
        with suppress(OSError, ValueError):  # not there, no folder, too long a name, one with a zero byte
            lead = f"{folder}/" if folder else ""
            there.update(lead + name for name in os.listdir(os.path.join(root, folder)))
    return [path for path in paths if path not in there]


def class_folders(root: str | Path, say: Callable[[str], object] = log.warning) -> tuple[Index, list[str]]:
    """An index of a folder of class folders, and the files in these that are not images.

    Classes are numbered by sorted folder name, by value if all names are whole numbers (2 before 10). Folders whose
    names are equal after NFC are one class. say: called with a line for each reason why something is left out. Raises
    InputError (data.class_folders) for fewer than two class folders, an empty one or a dangling link.
    """
    root, left = Path(root), LeftOut()
    names = class_names_in(root, left)
    first: dict[str, str] = {}
    kinds = [first.setdefault(nfc(name), name) for name in names]  # of each folder its class
    classes = list(dict.fromkeys(kinds))
    if len(classes) < 2:
        raise InputError(
            "data.class_folders",
            f"{root} holds {counted(len(classes), 'class folder')}: put each class's images into its own folder",
        )
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for k, name in enumerate(classes):
        before = len(paths)
        folders = [folder for folder, kind in zip(names, kinds, strict=True) if kind == name]
        for path in sorted(path for folder in folders for path in files_under(root / folder, left)):
            relative = _utf8(Path(path).relative_to(root).as_posix(), root)
            if Path(path).suffix.lower() in IMAGE_SUFFIXES:
                paths.append(relative)
            else:
                others.append(relative)
                left("are no images", path)
        labels += [k] * (len(paths) - before)
        if len(paths) == before:
            raise InputError("data.class_folders", f"the class folder {root / name} holds no image: fill or remove it")
    if double := [name for name, kind in zip(names, kinds, strict=True) if name != kind]:
        say(f"{root}: class folders of the same name in another Unicode form are one class: {first_few(double, 3)}")
    if inner := sorted({folder for path in paths if "/" in (folder := path.rpartition("/")[0])}):
        say(f"{root}: images in subfolders have the class of the outer folder: {first_few(inner, 3)}")
    left.say(root, say)
    return Index(paths, np.array(labels), len(classes), {"source": str(root)}, classes), others


def class_names_in(root: Path, left_out: LeftOut) -> list[str]:
    """Names of the class folders in a folder, in the order of their class numbers.

    Without hidden folders and those that begin with two underscores. Raises InputError (data.class_folders) for a
    dangling link, which may be a class, and for one folder under two names.
    """
    names, real = [], dict[str, str]()
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith((".", "__")):
                left_out("are hidden" if entry.name[0] == "." else "are named with a leading __", entry.path)
            elif is_dangling(entry):
                raise InputError(
                    "data.class_folders",
                    f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there: mount its disk, or "
                    "remove the link",
                )
            elif entry.is_dir():
                names.append(entry.name)
                if (first := real.setdefault(os.path.realpath(entry.path), entry.name)) != entry.name:
                    raise InputError(
                        "data.class_folders",
                        f"{root} has one folder under two names, {first} and {entry.name}: remove the link",
                    )
            else:
                left_out("are in no class folder", entry.path)
    numbered = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbered else 0, name))


def _utf8(path: str, root: Path) -> str:
    """The path. Raises InputError (data.class_folders) if it is not UTF-8, which no list or table can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise InputError(
            "data.class_folders",
            f"{root}: the name of {shown} is not UTF-8: rename it (whole folders: convmv -r -f latin1 -t utf8 "
            "--notest)",
        ) from None
    return path


def _by_name(index: Index, like: Part, path: str) -> Index:
    """A list with its classes numbered as in training.

    By its own class names, else by class folders if both lists have each class in a folder of its own. Names that
    training takes from its folders and other names in the list may be the same classes. Raises InputError
    (data.classes).
    """
    names = like.index.class_names
    if index.class_names is None:
        own = _class_folders(like.index) if len(like.index) else names  # of a run only the names are known
        theirs = _class_folders(index)
        place = {nfc(name): k for k, name in enumerate(own or ())}
        if theirs and any(place.get(nfc(name), k) != k for k, name in enumerate(theirs)):
            index = replace(index, class_names=theirs).numbered_as(own, like.name, path)
    elif not like.from_folders or not {*map(nfc, names or ())}.isdisjoint(map(nfc, index.class_names)):
        index = index.numbered_as(names, like.name, path)
    if index.num_classes != like.index.num_classes:
        raise InputError(
            "index.data", f"{path} has {counted(index.num_classes, 'class')} instead of {like.index.num_classes}"
        )
    return replace(index, class_names=names or index.class_names)


def _class_folders(index: Index) -> list[str] | None:
    """The folder of each class, "" of one without images; None unless each class has a folder of its own."""
    parents = (str(key).rpartition("/")[0].rpartition("/")[2] for key in index.keys)
    pairs = set(zip(index.labels.tolist(), parents, strict=True))
    names = dict(pairs)
    if not len(pairs) == len(names) == len(set(names.values())) or "" in names.values():
        return None
    return [names.get(k, "") for k in range(index.num_classes)] if names else None


def _folder_names(index: Index) -> list[str] | None:
    """Class names from the folder of each class's first image; None if they are not distinct."""
    _, first = np.unique(index.labels, return_index=True)
    names = [str(index.keys[i]).rpartition("/")[0].rpartition("/")[2] for i in first]
    return names if all(names) and len(set(names)) == index.num_classes else None
