"""The images and files that a fit was begun with, so that the next start notices what has changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rescom_timm.config.loading import load_dict
from rescom_timm.data.index_files import first_few
from rescom_timm.data.sources import Data, load
from rescom_timm.data.splits import Split
from rescom_timm.errors import InputError
from rescom_timm.io import read_json

SEEN = ("images.json", "inventory.json")
"""In RUN/fit: the recipe of the images, and their state."""
Inventory = dict[str, list[str]]
"""By name of a file, or of a row: its split, class and state. The state is size and time of change of a file, a digest
of a stored image."""


def inventory(data: Data, files: Sequence[str | None]) -> Inventory:
    """The images of all splits, and the other files that a fit reads. Raises FileNotFoundError for a missing image."""
    found: Inventory = {name: ["", "", _state(name)] for name in files if name and Path(name).is_file()}
    for part, split in {"train": data.train, "validation": data.validation, "test": data.test}.items():
        if split is not None:
            labels = (data.class_names[label] for label in split.labels)
            states = image_states(split)
            found |= {name: [part, label, states[name]] for name, label in zip(states, labels, strict=True)}
    return found


def image_states(split: Split) -> dict[str, str]:
    """The state of each image of a split by its path, or its row; in order."""
    found = {}
    images = split.dataset.select_columns("image")
    for start in range(0, len(split.rows), 1024):
        for row, value in zip(split.rows[start:], images[start : start + 1024]["image"], strict=False):
            if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
                found[str(value["path"])] = _state(value["path"])
            else:
                stored = value["bytes"] if isinstance(value, Mapping) else np.asarray(value).tobytes()
                found[f"{split.name}, row {row}"] = hashlib.sha256(stored).hexdigest()[:16]
    return found


def digest_of(states: Mapping[str, str]) -> str:
    """A digest of images, in order."""
    return hashlib.sha256("\n".join(f"{name} {state}" for name, state in states.items()).encode()).hexdigest()


def changes(before: Inventory, now: Inventory) -> dict[str, list[str]]:
    """Names by what has changed: added, removed, replaced, of another class; if none has, in another split."""
    both = [name for name in before if name in now]
    found = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "replaced": [name for name in both if before[name][2] != now[name][2]],
        "of another class": [name for name in both if before[name][1] != now[name][1]],
    }
    if not any(found.values()):  # images that come and go change how others are drawn
        found["in another split"] = [name for name in both if before[name][0] != now[name][0]]
    return {how: names for how, names in found.items() if names}


def refuse_other_images(fit: Path) -> None:
    """Raises InputError (fit.changed) where a worker's images are not those that the fit in RUN/fit was begun with.

    Of files only the size is compared, as copies on two machines may have other times.
    """

    def sizes(found: Inventory) -> Inventory:
        return {name: [*place, state.partition(" ")[0]] for name, (*place, state) in found.items() if place[0]}

    data = load(load_dict(read_json(fit / SEEN[0]), str(fit)).data)
    if found := changes(sizes(read_json(fit / SEEN[1])), sizes(inventory(data, ()))):
        what = "; ".join(f"{len(names):,} {how}: {first_few(names, 3)}" for how, names in found.items())
        raise InputError("fit.changed", f"the images here are not those of the process that leads the fit: {what}")


def _state(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"
