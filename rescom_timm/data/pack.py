"""A copy of a data set to train from: images resized once, in a few large files.

For network disks and jobs that start often, where hundreds of thousands of small files take long to list and open.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image
from datasets.arrow_writer import ArrowWriter
from PIL import Image as PillowImage

from rescom_timm.data.decoding import ReadConfig, decode, look
from rescom_timm.data.progress import image_bar
from rescom_timm.data.sources import Data
from rescom_timm.data.splits import Split
from rescom_timm.errors import InputError
from rescom_timm.io import atomic_path, file_lock, read_json, sha256, write_json
from rescom_timm.text import counted

MANIFEST = "pack.json"


@dataclass(frozen=True)
class PackConfig:
    """How images are stored. Raises InputError for values that cannot be."""

    size: int = 256
    """Pixels of the shorter side. Smaller images are stored as they are, byte for byte."""
    quality: int = 95
    """Of the JPEG files of resized images, 1 to 100."""
    format: Literal["arrow", "parquet"] = "arrow"
    """arrow: mapped into memory by `datasets`, as save_to_disk writes it. parquet: for the Hub."""
    per_shard: int = 5000
    """Images of a file."""

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.quality <= 100 or self.per_shard < 1:
            raise InputError("pack.value", f"size and per_shard must be at least 1 and quality 1 to 100, not {self}")
        if self.format not in ("arrow", "parquet"):
            raise InputError("pack.value", f"format must be arrow or parquet, not {self.format!r}")


def pack(
    data: Data,
    folder: str | Path,
    config: PackConfig = PackConfig(),
    reading: ReadConfig = ReadConfig(),
    workers: int = 1,
    say: Callable[[str], object] = print,
) -> dict[str, object]:
    """Write the splits of a data set to a folder that `data.source` reads, with the classes' names.

    reading: how the images are decoded where they are resized. workers: threads that resize. Files that an interrupted
    call has written are kept when their checksums are right; the same data and settings give the same bytes (with the
    same Pillow). Returns what pack.json holds: settings, classes, and of each split its rows and files with sha256.
    Raises BrokenImage for an image that cannot be read, InputError where the folder holds something else.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = {name: split for name, split in parts.items() if split is not None}
    settings = {
        **{"size": config.size, "quality": config.quality, "format": config.format, "per_shard": config.per_shard},
        **{"reading": reading.record(), "classes": data.class_names},
        "rows": {name: _digest(split) for name, split in splits.items()},
    }
    with file_lock(folder / ".lock"):
        manifest = _manifest(folder, settings)
        features = Features(image=Image(), label=ClassLabel(names=data.class_names))
        with ThreadPoolExecutor(workers) as pool:
            for name, split in splits.items():
                files = _write_split(folder, name, split, features, config, reading, pool, manifest)
                bytes_ = sum(file["bytes"] for file in files)
                made = f"{counted(len(files), 'file')}, {bytes_ / 1e6:,.1f} MB"
                say(f"{folder} {name}: {counted(len(split.labels), 'image')} in {made}")
        if config.format == "arrow":
            write_json(folder / "dataset_dict.json", {"splits": list(splits)})
        write_json(folder / MANIFEST, manifest)
    return manifest


def _manifest(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is known of the folder's files, of an earlier call too. Raises InputError where it is of other data."""
    path = folder / MANIFEST
    if path.is_file():
        known = read_json(path)
        if known.get("settings") != json.loads(json.dumps(settings)):
            raise InputError("pack.other", f"{folder} holds a copy of other data or settings: name another folder")
        return known
    if left := [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]:
        raise InputError("pack.other", f"{folder} is not empty ({left[0]}): name a new folder")
    manifest: dict[str, Any] = {"settings": settings, "files": {}}
    write_json(path, manifest)
    return manifest


def _digest(split: Split) -> str:
    """Of a split's rows, labels and paths."""
    digest = hashlib.sha256(split.rows.tobytes() + split.labels.tobytes())
    for path in split.dataset.data.column("image").combine_chunks().field("path").to_pylist():
        digest.update(f"{path and os.path.basename(path)}\n".encode())
    return digest.hexdigest()


def _write_split(
    folder: Path,
    name: str,
    split: Split,
    features: Features,
    config: PackConfig,
    reading: ReadConfig,
    pool: ThreadPoolExecutor,
    manifest: dict[str, Any],
) -> list[dict[str, Any]]:
    total, arrow = len(split.labels), config.format == "arrow"
    count = -(-total // config.per_shard)
    root = folder / name if arrow else folder / "data"
    root.mkdir(exist_ok=True)
    found = []
    with image_bar(total, f"packing {name}") as bar:
        for shard in range(count):
            start, end = shard * config.per_shard, min((shard + 1) * config.per_shard, total)
            numbers = f"{shard:05d}-of-{count:05d}"
            path = root / (f"data-{numbers}.arrow" if arrow else f"{name}-{numbers}.parquet")
            key = str(path.relative_to(folder))
            known = manifest["files"].get(key)
            if not (known and path.is_file() and sha256(path) == known["sha256"]):
                work = lambda i: _stored(split.dataset[i]["image"], i, config, reading)  # noqa: E731
                images = list(pool.map(work, range(start, end)))
                table = {"image": images, "label": split.labels[start:end].tolist()}
                with atomic_path(path) as beside:
                    _write(Dataset.from_dict(table, features=features), beside, arrow)
                known = {"rows": end - start, "bytes": path.stat().st_size, "sha256": sha256(path)}
                manifest["files"][key] = known
                write_json(folder / MANIFEST, manifest)
            found.append({"filename": path.name, **known})
            bar.update(end - start)
    if arrow:
        DatasetInfo(features=features).write_to_directory(str(root))
        fingerprint = hashlib.sha256("".join(file["sha256"] for file in found).encode()).hexdigest()[:16]
        state: dict[str, Any] = {"_data_files": [{"filename": file["filename"]} for file in found]}
        state |= {"_fingerprint": fingerprint, "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
        write_json(root / "state.json", {**state, "_output_all_columns": False, "_split": name})
    return found


def _write(dataset: Dataset, path: Path, arrow: bool) -> None:
    if not arrow:
        pq.write_table(dataset.data.table, path)
        return
    with ArrowWriter(features=dataset.features, path=str(path)) as writer:
        writer.write_table(dataset.data.table)
        writer.finalize()


def _stored(value: Any, row: int, config: PackConfig, reading: ReadConfig) -> dict[str, Any]:
    """The image as it is stored: its own bytes where it is small enough, else a smaller JPEG."""
    path = value.get("path")
    name = None if path is None else os.path.basename(path)
    if min(look(value, row, reading)) <= config.size:
        decode(value, row, reading)  # a damaged image is noticed here, not in training
        return {"bytes": value["bytes"] if value.get("bytes") is not None else Path(path).read_bytes(), "path": name}
    image = decode(value, row, reading)
    scale = config.size / min(image.size)
    width, height = (max(config.size, round(side * scale)) for side in image.size)
    file = io.BytesIO()
    image.resize((width, height), PillowImage.Resampling.BICUBIC).save(file, "JPEG", quality=config.quality)
    return {"bytes": file.getvalue(), "path": None if name is None else f"{Path(name).stem}.jpg"}
