"""A trained run of seconds, of which each line of the table gets a copy, and what is done to its tensors."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load_dict
from tests.engine.child import recipe
from tests.faults.fault import Change


@functools.cache
def _trained() -> Path:
    place = Path(tempfile.mkdtemp(prefix="rescom-faults-"))
    words = {"train__epochs": 2, "checkpoint__keep": 2, "views__eval": "resize(9) | center_crop(8)"}
    return train_recipe(load_dict(recipe(place, track__log_with=[], **words)))


def remove() -> None:
    """The run, when all is done."""
    if _trained.cache_info().currsize:
        shutil.rmtree(_trained().parent)
        _trained.cache_clear()


def a_run(place: Path) -> None:
    """run: the folder of a run of two epochs, trained to the end."""
    shutil.copytree(_trained(), place / "run")


def tensors(name: str, act: object, only: str = "") -> Change:
    """Tensors of a file, the floating-point ones of a name that begins with `only`, become what `act` makes of them."""

    def change(place: Path) -> None:
        held = load_file(place / name)
        for key, value in held.items():
            if key.startswith(only) and value.is_floating_point() and value.ndim:
                held[key] = act(value).contiguous()  # type: ignore[operator]
        save_file(held, place / name)

    return change


def nan(value: torch.Tensor) -> torch.Tensor:
    return torch.full_like(value, float("nan"))


def whole_numbers(value: torch.Tensor) -> torch.Tensor:
    return value.long()


def longer(value: torch.Tensor) -> torch.Tensor:
    return torch.cat([value, value])
