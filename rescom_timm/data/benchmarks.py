"""The data of the shipped recipes: where it is published, how large it is, where a recipe looks for it.

Recipes look for images in ./data and for lists in ./lists, or in the same two folders below RESCOM_DATA. What a recipe
saves keeps "./data/...", so that a run can resume on a machine with another RESCOM_DATA.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LISTS = "https://raw.githubusercontent.com/facebookresearch/classifier-balancing/f162adef63fdf592d0b8a0f6e52bc481fc08785f/data"
INAT = "https://ml-inat-competition-datasets.s3.amazonaws.com/2018"
PLACES = "http://data.csail.mit.edu/places/places365"
GB = 10**9


@dataclass(frozen=True)
class Download:
    """A file to download, and to unpack where it is an archive."""

    url: str
    digest: str
    """md5:HEX, or git:HEX, git's id of the file's content."""
    folder: str
    """Where it goes, below the folder of data."""
    makes: str
    """The file or folder that is there afterwards, in `folder`."""
    size: int
    """Bytes to download, about."""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]

    @property
    def is_archive(self) -> bool:
        """Whether the file is a tar archive."""
        return self.name.endswith((".tar", ".tar.gz"))

    def on_disk(self, size: int) -> int:
        """Bytes that an archive of `size` bytes takes when it is unpacked, about.

        JPEG files do not compress; annotations do, about ten times.
        """
        return size * 10 if self.makes.endswith(".json") else size


@dataclass(frozen=True)
class Benchmark:
    """What `rescom-timm get NAME` fetches: files, a data set of the Hub, or both."""

    terms: str
    files: tuple[Download, ...] = ()
    hub: str = ""
    """Id of a data set on the Hub, kept in the cache of Hugging Face."""
    hub_splits: tuple[str, ...] = ()
    hub_size: int = 0
    """Bytes to download, about; the cache keeps them, and as many again in the format that is read."""
    train: str = ""
    """The training list, below the folder of data."""
    rows: int = 0
    """Published number of its rows and"""
    classes: int = 0
    """of its classes."""


def _list(benchmark: str, split: str, digest: str, size: int) -> Download:
    name = f"{benchmark}_{split}.txt"
    return Download(f"{LISTS}/{benchmark}/{name}", f"git:{digest}", "lists", name, size)


def _inat(name: str, digest: str, makes: str, size: int) -> Download:
    return Download(f"{INAT}/{name}", f"md5:{digest}", "data/inat2018", makes, size)


def _places(name: str, digest: str, makes: str, size: int) -> Download:
    return Download(f"{PLACES}/{name}", f"md5:{digest}", "data/places365", makes, size)


BENCHMARKS = {
    "inat18": Benchmark(
        "iNaturalist 2018: for research and education, not for profit; each photograph has its own licence "
        "(https://github.com/visipedia/inat_comp/tree/master/2018)",
        (
            _inat("train2018.json.tar.gz", "bfa29d89d629cbf04d826a720c0a68b0", "train2018.json", 26 * 10**6),
            _inat("val2018.json.tar.gz", "f2ed8bfe3e9901cdefceb4e53cd3775d", "val2018.json", 2 * 10**6),
            _inat("train_val2018.tar.gz", "b1c6952ce38f31868cc50ea72d066cc3", "train_val2018", 120 * GB),
        ),
        train="data/inat2018/train2018.json",
        rows=437_513,
        classes=8_142,
    ),
    "places_lt": Benchmark(
        "Places365: for research and education, not for profit (http://places2.csail.mit.edu/download.html)",
        (
            _list("Places_LT", "train", "6392252f8ae867bc8a5e841cc1b29e5b8ef4b636", 2_092_674),
            _list("Places_LT", "val", "b93a2ca58ccb7f3b671c176f395a70bf52c95533", 253_480),
            _list("Places_LT", "test", "e732e58b8aa718a2c1c11933375f5710652c2b93", 1_705_400),
            _places("val_256.tar", "e27b17d8d44f4af9a78502beb927f808", "val_256", GB // 2),
            _places("train_256_places365standard.tar", "53ca1c756c3d1e7809517cc47c5561c5", "data_256", 24 * GB),
        ),
        train="lists/Places_LT_train.txt",
        rows=62_500,
        classes=365,
    ),
    "imagenet_lt": Benchmark(
        "ImageNet: for research and education, not for profit; accept its terms at "
        "https://huggingface.co/datasets/ILSVRC/imagenet-1k, then  hf auth login",
        (
            _list("ImageNet_LT", "train", "a063f095fcd475db4cf8b0658c4b73955535bbf9", 4_600_000),
            _list("ImageNet_LT", "val", "3ed3188b2f44829ce2dec1cc27040d8d40984088", 804_172),
            _list("ImageNet_LT", "test", "76a2fb9749d6cd29e765cc4f8c270f2504131e2f", 2_344_500),
        ),
        hub="ILSVRC/imagenet-1k",
        hub_splits=("train", "validation"),
        hub_size=155 * GB,
        train="lists/ImageNet_LT_train.txt",
        rows=115_846,
        classes=1_000,
    ),
    "cifar10_lt": Benchmark(
        "CIFAR-10 (Krizhevsky 2009): for research",
        hub="uoft-cs/cifar10",
        hub_splits=("train", "test"),
        hub_size=150 * 10**6,
    ),
    "cifar100_lt": Benchmark(
        "CIFAR-100 (Krizhevsky 2009): for research",
        hub="uoft-cs/cifar100",
        hub_splits=("train", "test"),
        hub_size=150 * 10**6,
    ),
}


def data_path(path: str | Path) -> Path:
    """Where a path of a recipe is on this machine.

    ./data/... and ./lists/... are looked up below RESCOM_DATA, if it is set and has them; every other path, and ~, as
    usual.
    """
    found = Path(path).expanduser()
    root = os.environ.get("RESCOM_DATA")
    if root and not found.is_absolute() and found.parts[:1] in (("data",), ("lists",)):
        below = Path(root).expanduser() / found
        if below.exists() or not found.exists():
            return below
    return found


def get_hint(path: str | Path) -> str:
    """`; rescom-timm get NAME ...` where a missing path is data of a shipped recipe, else nothing."""
    parts = Path(path).parts
    for name, benchmark in BENCHMARKS.items():
        for file in benchmark.files:
            wanted = Path(file.folder, file.makes).parts if file.folder == "lists" else Path(file.folder).parts
            if parts[: len(wanted)] == wanted:
                size = sum(one.size for one in benchmark.files) + benchmark.hub_size
                return f": rescom-timm get {name} ({human(size)}), or name another path"
    return ""


def human(size: float) -> str:
    """Bytes for people: 120 GB, 1.7 MB."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size:.0f} bytes"
