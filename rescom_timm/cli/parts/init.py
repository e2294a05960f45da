"""What `init` does: a recipe for one's own images and the index files of their splits."""

import argparse
import shlex
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.utils import patch_environment

from rescom_timm.cli.parts.index import broken_images, without
from rescom_timm.config.loading import load_dict, settings_of
from rescom_timm.config.own_data import Wanted, propose, section
from rescom_timm.config.own_splits import OwnImages, parts, place, saved_lists, with_lists
from rescom_timm.config.recipe import Recipe
from rescom_timm.data import index as rows
from rescom_timm.data.sources import Data, load
from rescom_timm.data.splits import Split
from rescom_timm.engine.dry_run import dry_run
from rescom_timm.engine.log import duration
from rescom_timm.errors import InputError, MissingPackageError
from rescom_timm.fitting.training import size_of
from rescom_timm.hub_client import hub_id, missing
from rescom_timm.io import write_text
from rescom_timm.methods import METHODS
from rescom_timm.methods.baselines import CrossEntropyConfig
from rescom_timm.models.classifiers import ClassifierConfig

PIXELS = 16 * 224**2
"""Of the images of a measured step, at most: a CPU takes seconds for it."""
ENOUGH = 5
"""Test images of a class below which one image is more than 20 points of its accuracy."""
MEANS = ClassifierConfig(init="class_means")


def _settings(name: str | None) -> dict[str, Any]:
    """What --method NAME sets. Raises InputError for one that cannot train a net from its start."""
    if name is None:
        return {}
    found: dict[str, Any] = settings_of(name)
    kind = METHODS[found.get("method", {}).get("name", "rescom")][1]
    if (kind.second_stage and not kind.fits_head) or kind.needs_teacher:
        start = "method.teacher=RUN" if kind.needs_teacher else "from=RUN"
        raise InputError(
            "recipe.missing_key",
            f"--method {name} needs a trained run: leave it out, train the recipe, then  rescom-timm train RECIPE "
            f"+{name} {start}",
        )
    return found


def training_time(recipe: Recipe, wanted: Wanted) -> str:
    """How long the recipe takes on this machine, by a few measured steps with random weights, or why not measured.

    Raises as engine.dry_run.dry_run: the recipe cannot be trained.
    """
    if not wanted.is_cpu and not torch.cuda.is_available():
        return "not measured, this machine has no GPU"
    is_probe = recipe.method.name == "probe" and recipe.net.pretrained
    images = min(recipe.train.batch_size, max(2, PIXELS // size_of(recipe) ** 2))
    trial = replace(
        recipe,
        net=replace(recipe.net.untrained(), classifier=MEANS if is_probe else recipe.net.classifier),
        method=CrossEntropyConfig() if is_probe else recipe.method,
        train=replace(recipe.train, batch_size=images),
        evaluation=replace(recipe.evaluation, batch_size=images),
        speed=replace(recipe.speed, workers=0),
    )
    try:
        with patch_environment(ACCELERATE_USE_CPU="1") if wanted.is_cpu else nullcontext():
            found = dry_run(trial, seconds=1.0)
    except MissingPackageError as error:
        return f"not measured, {error}"
    seconds = found.seconds + (found.start_seconds if is_probe else 0)  # of images as they are and flipped
    return f"about {duration(seconds)} on {found.device}, by measured steps of {found.batch} images"


def few_images(data: Data) -> list[str]:
    """A line each on test and validation where classes have too few images there."""
    classes = len(data.counts)

    def below(split: Split | None, enough: int) -> int:
        return 0 if split is None else int((np.bincount(split.labels, minlength=classes) < enough).sum())

    test, validation, share = below(data.test, ENOUGH), below(data.validation, 1), 100 // ENOUGH
    found = []
    if test:
        found.append(
            f"test: {test:,} of {classes:,} classes have fewer than {ENOUGH} images, one of which is over {share} "
            "points of the class's accuracy: compare groups of classes"
        )
    if validation:
        found.append(
            f"validation: {validation:,} of {classes:,} classes have no image: the best epoch is chosen without them"
        )
    return found


def init(options: argparse.Namespace) -> int:
    """Write a recipe for class folders, a folder with a list, or a local or Hub data set, and its lists.

    Raises InputError (file.exists, image.unreadable, and as own_splits.parts does); nothing is written then.
    """
    recipe = Path(options.output)
    lists = {part: recipe.with_name(f"{recipe.stem}_{part}.txt") for part in ("train", "test", "validation")}
    existing = [str(path) for path in (recipe, *lists.values()) if path.exists()]
    if existing and not options.force:
        raise InputError("file.exists", f"{', '.join(existing)} would be overwritten: choose another -o, or --force")
    if options.source != "digits" and hub_id(options.source, alone=True) is None:
        if not Path(options.source).expanduser().exists():
            raise missing(options.source)
        options.source = place(options.source)
    wanted = Wanted(options.device, options.backbone, None, options.size, options.tune, _settings(options.method))
    own = {one.name: getattr(options, one.name) for one in fields(OwnImages)}
    indexes, config = parts(OwnImages(**own))
    with TemporaryDirectory() as folder:  # nothing is written to the output unless everything works
        data = load(saved_lists(indexes, config, folder, f"{recipe.stem}_"))
        splits = {"train": data.train, "test": data.test, "validation": data.validation}
        broken = {part: broken_images(split) for part, split in splits.items() if split is not None}
        if any(broken.values()):
            if not options.leave_out or not indexes:
                reasons = [reason for found in broken.values() for reason in found.values()]
                remedy = "repair or remove them" + (", or give --leave-out" if indexes else "")
                raise InputError(
                    "image.unreadable",
                    f"{len(reasons):,} images cannot be read; {remedy}:\n  " + "\n  ".join(reasons[:50]),
                )
            lost: dict[str, dict[int, str]] = {part: {} for part in indexes}
            for part, found in broken.items():  # validation rows may be some of the training list's
                numbers = {int(splits[part].rows[k]): reason for k, reason in found.items()}  # type: ignore[union-attr]
                lost[part if part in indexes else "train"] |= numbers
            indexes = {part: without(index, lost[part]) for part, index in indexes.items()}
            data = load(saved_lists(indexes, config, folder, f"{recipe.stem}_"))
        proposal = propose(data, saved_lists(indexes, config, folder, f"{recipe.stem}_"), wanted)
        time = training_time(load_dict(proposal.sections), wanted)
        config = with_lists(config, {part: place(lists[part]) for part in indexes})
        text = replace(proposal, sections=proposal.sections | {"data": section(config)}).text(options.source)
    for part, index in indexes.items():
        index.save(lists[part])
        print(f"{lists[part]}: {len(index):,} rows of {index.num_classes:,} classes")
    write_text(recipe, text)
    print(rows.describe(data.counts))
    print("\n".join([*proposal.reasons[1:], f"time: {time}", *few_images(data)]))
    print(f"{recipe}: train with  rescom-timm train {shlex.quote(str(recipe))}")
    print(f"for the best model in 20 minutes, without a recipe:  rescom-timm fit {shlex.quote(options.source)}")
    return 0
