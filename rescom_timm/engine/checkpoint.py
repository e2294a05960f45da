"""Checkpoints: safetensors and JSON only, hashed, written to a temporary folder and renamed; nothing is unpickled.

A checkpoint is a folder `step-00000123`: net.safetensors (the net alone, plain names), state.safetensors (every other
tensor), state.json (everything that is not a tensor, with the tensors' names in their places), hashes.json.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
import torch
from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rescom_timm.config.recipe import RecipeError
from rescom_timm.engine.errors import CheckpointError, unwritten
from rescom_timm.io import file_lock, read_json, sha256

FILES = ("net.safetensors", "state.safetensors", "state.json")
NAME = re.compile(r"step-\d{1,18}")
"""Of a checkpoint's folder."""
LOCK = ".lock"
"""In a run's folder: who holds it writes there."""


class SavedState(TypedDict, total=False):
    """What a checkpoint holds beside its net."""

    progress: dict[str, Any]
    """Of state.Progress."""
    recipe: dict[str, object]
    index: str
    """Digest of the rows trained on."""
    class_names: list[str]
    processes: int
    method: dict[str, Tensor]
    average: dict[str, Tensor]
    """Of the net's weights; empty without train.ema."""
    sharded: bool
    frozen: str | None
    """Digest of the pretrained weights that do not train and are not saved."""
    teacher: str | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    ranks: list[dict[str, Any]]
    """Of each process: random generators and buffers of its own."""


class RandomState(TypedDict, total=False):
    """The random generators of a process."""

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor
    cuda: Tensor


def pack(tree: object, tensors: dict[str, Tensor], name: str = "") -> object:
    """A tree of dicts, lists, tuples, tensors, arrays and JSON values as JSON alone; its tensors go into `tensors`.

    Raises TypeError, naming the place, for anything else.
    """
    if isinstance(tree, np.ndarray):
        return {"$array": pack(torch.from_numpy(tree.copy()), tensors, name)}
    if isinstance(tree, Tensor):
        while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
            name += "'"
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"$tensor": name}
    if isinstance(tree, tuple):
        return {"$tuple": pack(list(tree), tensors, name)}
    if isinstance(tree, list):
        return [pack(value, tensors, f"{name}.{i}") for i, value in enumerate(tree)]
    if isinstance(tree, dict):
        return {"$dict": [[key, pack(value, tensors, f"{name}.{key}")] for key, value in tree.items()]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__} (at {name.lstrip('.')})")


def unpack(tree: object, tensors: dict[str, Tensor]) -> object:
    """Inverse of pack."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if isinstance(tree, dict):
        ((kind, value),) = tree.items()
        if kind == "$tensor":
            return tensors[value]
        if kind == "$array":
            return cast(Tensor, unpack(value, tensors)).numpy()
        if kind == "$tuple":
            return tuple(cast(list[object], unpack(value, tensors)))
        return {key: unpack(item, tensors) for key, item in value}
    return tree


def save(folder: Path, step: int, net: dict[str, Tensor], state: SavedState) -> Path:
    """Write checkpoint `step` into the folder and return its path. A crash at any moment leaves the others whole.

    Raises CheckpointError where the disk does not take it; what was there before is untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    if final.exists():
        try:
            if load(final)[1].get("progress") == state.get("progress"):
                return final  # same step of the same run: bit-identical
        except CheckpointError:
            shutil.rmtree(final)
    old = folder / f".partial-old-{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        text = json.dumps(pack(state, tensors))
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in net.items()}, partial / FILES[0])
        save_file(tensors, partial / FILES[1])
        (partial / FILES[2]).write_text(text, encoding="utf-8")
        for name in FILES[:2]:  # as the umask says, which safetensors does not ask
            (partial / name).chmod((partial / FILES[2]).stat().st_mode)
        (partial / "hashes.json").write_text(json.dumps({name: sha256(partial / name) for name in FILES}))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if final.exists():  # of the same step, before its evaluation
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not final.exists():
            old.rename(final)
        whole = ", ".join(path.name for path in listed(folder)) or "none"
        raise unwritten(f"checkpoint {final}", error, f" Whole checkpoints there: {whole}.") from error
    return final


def load(path: Path) -> tuple[dict[str, Tensor], SavedState]:
    """(net, state) of a checkpoint folder. Raises CheckpointError, naming the file, where it is damaged."""
    if not path.is_dir():
        raise CheckpointError("checkpoint.missing", f"no checkpoint {path}")
    try:
        hashes = read_json(path / "hashes.json")
        for name in FILES:
            if hashes.get(name) != sha256(path / name):
                raise CheckpointError(
                    "checkpoint.damaged", f"checkpoint {path} is damaged: {name} has changed since it was written"
                )
        state = unpack(read_json(path / FILES[2]), load_file(path / FILES[1]))
        if not isinstance(state, dict):
            raise CheckpointError("checkpoint.damaged", f"checkpoint {path} is damaged: {FILES[2]} holds no dict")
        _check(state)
        return load_file(path / FILES[0]), cast(SavedState, state)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError("checkpoint.damaged", f"checkpoint {path} is damaged: {error}") from error


def _check(state: dict[str, Any]) -> None:
    """Raises ValueError for a state of the wrong types, which hashes cannot show: they may have been forged."""
    for name in ("progress", "recipe", "method"):
        if not isinstance(state.get(name, {}), dict):
            raise ValueError(f"{name} in {FILES[2]} is {type(state[name]).__name__}, not dict")
    progress = state.get("progress", {})
    for name in ("epoch", "step"):
        if type(progress.get(name, 0)) is not int or progress.get(name, 0) < 0:
            raise ValueError(f"{FILES[2]} says {name} {progress[name]!r}")
    best = progress.get("best_checkpoint")
    if best is not None and not (isinstance(best, str) and NAME.fullmatch(best)):
        raise ValueError(f"{FILES[2]} says best_checkpoint {best!r}, which is not the name of a checkpoint")
    names = state.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{FILES[2]} holds class_names that are not a list of text")
    for name in ("method", "average"):
        if not all(isinstance(value, Tensor) for value in (state.get(name) or {}).values()):
            raise ValueError(f"{FILES[2]} holds values other than tensors in {name}")


def class_names(path: Path, state: SavedState) -> list[str] | None:
    """Names (K,) of the classes of a checkpoint's net; None if they are unknown.

    They come from its state or, for an older checkpoint, from its run's classes.json. Raises CheckpointError if that
    file is damaged.
    """
    if state.get("class_names"):
        return list(state["class_names"])
    beside = path.resolve().parent.parent / "classes.json"
    if not beside.is_file():
        return None
    try:
        names = read_json(beside).get("class_names")
    except (OSError, ValueError) as error:
        raise CheckpointError("checkpoint.damaged", f"{beside} is damaged: {error}") from error
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError("checkpoint.damaged", f"{beside} is damaged: its class_names are not a list of text")
    return names


@contextmanager
def consistent(path: Path) -> Iterator[None]:
    """The block reads a checkpoint's state; errors in it become CheckpointError, as the hashes may have been forged."""
    try:
        yield
    except (CheckpointError, RecipeError, torch.OutOfMemoryError):
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise CheckpointError(
            "checkpoint.damaged", f"checkpoint {path} cannot be resumed: its state is incomplete ({reason})"
        ) from error


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def repair(folder: Path) -> None:
    """Undo the first of the two renames of `save` after a crash between them. Needs the run's lock."""
    for old in folder.glob(".partial-old-*"):
        place = folder / old.name.replace(".partial-old", "step")
        with suppress(OSError):
            if not place.exists():
                old.rename(place)


def whole_read(folder: Path, read: Callable[[], T]) -> T:
    """read(), repeated if it fails because a training run changed the folder's checkpoints meanwhile."""
    for _ in range(ATTEMPTS - 1):
        before = _there(folder)
        try:
            return read()
        except (CheckpointError, OSError):
            if _there(folder) == before:
                raise
    return read()


ATTEMPTS = 10
"""Reads of checkpoints that change."""
T = TypeVar("T")


def _there(folder: Path) -> list[tuple[str, int]]:
    """Names and inodes of a folder's checkpoints: a rename changes one or the other."""
    found = []
    for path in listed(folder):
        with suppress(OSError):
            found.append((path.name, path.stat().st_ino))
    return found


def newest(folder: Path) -> tuple[Path, dict[str, Tensor], SavedState] | None:
    """(path, net, state) of the last valid checkpoint; warns about damaged ones; None if there is none.

    Raises CheckpointError if every checkpoint is damaged.
    """

    def read() -> tuple[Path, dict[str, Tensor], SavedState]:
        path = listed(folder)[-1]
        return (path, *load(path))

    if any(folder.glob(".partial-old-*")):
        with suppress(Timeout, OSError), file_lock(folder.parent / LOCK, timeout=0) as held:  # no run trains here
            if held:
                repair(folder)
    if not listed(folder):
        return None
    with suppress(CheckpointError, LookupError):
        return whole_read(folder, read)
    found = listed(folder)
    for path in reversed(found):
        try:
            return (path, *load(path))
        except CheckpointError as error:
            warnings.warn(f"{error}; using the one before it", stacklevel=2)
    if found:
        raise CheckpointError(
            "checkpoint.damaged", f"every checkpoint in {folder} is damaged; start a new run without --resume"
        )
    return None


def prune(written: Path, keep: int, spare: str | None = None) -> None:
    """After writing a checkpoint: keep the last `keep` and the one named `spare`.

    Remove the others, those of later steps (the run resumed from before them: they are damaged) and temporary folders.
    """
    folder = written.parent
    later = [path for path in listed(folder) if path.name > written.name]
    older = [path for path in listed(folder) if path.name <= written.name]
    for path in [*older[:-keep], *later, *folder.glob(".partial-*")]:
        if path.name != spare:
            shutil.rmtree(path, ignore_errors=True)


def random_state() -> RandomState:
    """The state of every random generator of this process: Python, NumPy, torch, and the GPU in use."""
    states: RandomState = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: RandomState) -> None:
    """Restore what random_state returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
