"""The images that `fit` is given, as the data section of a recipe whose lists stand in the run's folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from rescom_timm.config.loading import find, load, shipped
from rescom_timm.config.own_splits import OwnImages, parts, place, saved_lists
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.config import MEMORY, VALIDATION, DataConfig, LoaderConfig, ViewsConfig, index_path
from rescom_timm.data.index import Index
from rescom_timm.data.profiles import RULES, parse_call
from rescom_timm.errors import InputError
from rescom_timm.fitting.plan import FitOptions
from rescom_timm.hub_client import hub_id, missing

PHOTOGRAPHS = LoaderConfig(exif=True)
"""Photographs are turned upright by their EXIF orientation."""


def name_of(source: str) -> str:
    """The name of a run on this source, which its folder gets: that of the folder, the file or the data set."""
    stem = Path(os.path.abspath(os.path.expanduser(source))).name
    suffixes = (".yaml", ".yml", ".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
    return stem.rpartition(".")[0] if stem.endswith(suffixes) else stem


def is_recipe(source: str) -> bool:
    """Whether the source is a recipe: a YAML file, or the name of a shipped one that no path here has."""
    path = Path(source).expanduser()
    if os.path.lexists(path):
        return path.is_file() and path.suffix in (".yaml", ".yml")
    return path.suffix == ".yaml" or source in {file.stem for file in shipped()}


def read(options: FitOptions, folder: Path) -> Recipe:
    """The recipe of a source: its data, loader and, of a recipe, mean and deviation; lists are written into `folder`.

    Where a source has no validation images, a tenth of each class's training images becomes them.
    Raises InputError, FileNotFoundError and what reading the data does.
    """
    if is_recipe(options.source):
        recipe = load(find(options.source), options.overrides)
        data = recipe.data
        if data.validation == "none":
            data = replace(data, validation="holdout(0.1)")
        views = ViewsConfig(mean=recipe.views.mean, std=recipe.views.std)
        speed = replace(recipe.speed, capture=False, compile=False)
        return Recipe(data=data, views=views, loader=replace(recipe.loader, sampler="uniform"), speed=speed)
    if options.overrides:
        raise InputError("fit.argument", f"{options.overrides[0]}: keys are of recipes, and {options.source} is none")
    data = _own(options, folder)
    return Recipe(data=data, loader=PHOTOGRAPHS)


def joined(config: DataConfig, folder: Path) -> DataConfig | None:
    """Return the data with the validation images among the training images, perhaps by a list in `folder`.

    None where they come from another split of a data set, which is not trained on.
    """
    name, argument = parse_call(config.validation, VALIDATION) or ("", "")
    if name == "index" and config.index not in ("all", None) and not parse_call(config.index, RULES):
        first, second = Index.load(index_path(config.index)), Index.load(index_path(argument), allow_empty=True)
        both = replace(first, keys=[*first.keys, *second.keys], labels=np.concatenate([first.labels, second.labels]))
        both.save(folder / "all.txt")
        return replace(config, index=place(folder / "all.txt"), validation="none")
    return replace(config, validation="none") if name == "holdout" else None


def _own(options: FitOptions, folder: Path) -> DataConfig:
    images = OwnImages(options.source, **options.images)
    path = Path(options.source).expanduser()
    if path.is_file():
        if images.list:
            raise InputError("fit.argument", f"{path} is a list itself: leave out --list, or name the folder of images")
        images = replace(images, source=place(path.parent), list=place(path))
    elif path.is_dir():
        images = replace(images, source=place(path))
    elif options.source not in ("digits", MEMORY) and hub_id(options.source, alone=True) is None:
        raise missing(options.source)
    return saved_lists(*parts(images), folder)
