"""Weights as a run like any other, without training."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rescom_timm.analysis.writing import pictures
from rescom_timm.config.recipe import Recipe
from rescom_timm.engine.run_folder import FOLDERS
from rescom_timm.engine.trainer import SPLITS, train
from rescom_timm.hub.publish import Publisher
from rescom_timm.io import write_tensors
from rescom_timm.models.classifiers import ClassifierConfig

FILES = ("metrics.jsonl", "recipe.yaml", "classes.json", "environment.json")
"""What of a run's folder is written by a training, beside FOLDERS."""
HEAD = ("classifier.weight", "classifier.bias")


def write_run(
    recipe: Recipe, weights: Mapping[str, Tensor], factor: float, class_names: Sequence[str], file: Path, run: Path,
    splits: Sequence[str] = SPLITS,
) -> None:  # fmt: skip
    """Write a run that starts from these weights and trains nothing, evaluated on `splits` and exported.

    A folder that is there is replaced.

    factor: of all logits, the inverse of a temperature. file: in which the weights stay. recipe: of 0 epochs, with a
    linear or cosine classifier.
    """
    if recipe.net.classifier.kind == "linear":
        weights = {name: value * factor if name in HEAD else value for name, value in weights.items()}
    else:
        scaled = ClassifierConfig("cosine", scale=min(recipe.net.classifier.scale * factor, 1000.0))
        recipe = replace(recipe, net=replace(recipe.net, classifier=scaled))
    write_tensors(file, weights)
    recipe = replace(recipe, name=run.name, output=str(run.parent), init_from=str(file))
    run.mkdir(parents=True, exist_ok=True)
    for path in (run / name for name in (*FOLDERS, *FILES)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        train(recipe, run, follower=Publisher(pictures), first=(file, class_names), splits=splits)
