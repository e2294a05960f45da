"""Runs from Python: train, then evaluate, predict, draw and push.

import rescom_timm

run = rescom_timm.train("digits_lt", overrides=["train.epochs=30"])
run.evaluate()                      # {"top1": ..., "many": ..., "few": ..., ...}, percent
run.predict(["photo.jpg"])          # a Prediction of each image
model = run.model()                 # a plain timm model
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import timm
from accelerate import PartialState
from torch import nn

from rescom_timm.analysis.run_files import RunFolder
from rescom_timm.analysis.writing import pictures, write_figures
from rescom_timm.config.loading import flat, load, load_dict, overridden
from rescom_timm.config.own_data import Wanted, propose
from rescom_timm.config.own_splits import OwnImages
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.config import MEMORY
from rescom_timm.data.in_memory import InMemory, in_memory
from rescom_timm.data.sources import Data
from rescom_timm.data.sources import load as load_data
from rescom_timm.data.splits import Split
from rescom_timm.engine.build import Weights
from rescom_timm.engine.dry_run import dry_run as timed
from rescom_timm.engine.evaluate import data_of, evaluate_run
from rescom_timm.engine.own import NOTHING, Metric, Own
from rescom_timm.engine.run_folder import Line, Resume, check_run, class_names, lines, run_recipe
from rescom_timm.engine.trainer import train as train_only
from rescom_timm.errors import InputError
from rescom_timm.fitting.fit import fit as fit_images
from rescom_timm.fitting.plan import FitOptions
from rescom_timm.fitting.steps import Interrupted
from rescom_timm.hub.publish import Publisher
from rescom_timm.hub.push import export_push, kept_rule, push_run
from rescom_timm.inference.conformal import PredictionSets
from rescom_timm.inference.export import export_run, kept_validation
from rescom_timm.inference.images import ImageSource
from rescom_timm.inference.neighbours import Embeddings
from rescom_timm.inference.onnx import export_onnx
from rescom_timm.inference.predict import Prediction, Prior, calibrate, embed, predict
from rescom_timm.inference.pretrained import Pretrained, from_pretrained
from rescom_timm.inference.program import export_program
from rescom_timm.inference.rules import OperatingPoint, operating_point
from rescom_timm.inference.teacher import first_weights, read_teacher

Format = Literal["timm", "onnx", "torch"]


def train_recipe(
    recipe: Recipe, resume: Resume = False, dry_run: bool = False, follower: Publisher | None = None,
    own: Own = NOTHING,
) -> Path:  # fmt: skip
    """Train, evaluate, save, export and push as the recipe says; returns the run's folder.

    dry_run: instead print what that takes on this machine (engine.dry_run). Other arguments and errors are those of
    engine.trainer.train.
    """
    with first_weights(recipe) as first:
        if not dry_run:
            follower = follower or Publisher(pictures)
            return train_only(recipe, resume, follower, read_teacher(recipe), first, own=own)
        estimate = timed(recipe, resume, read_teacher(recipe), first)
    if PartialState().is_main_process:
        print("\n".join(estimate.lines()))
    return recipe.folder


def train(
    recipe: str | Path | Mapping[str, object] | Recipe | None = None,
    dataset: InMemory | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    metrics: Mapping[str, Metric] = {},
    callbacks: Sequence[object] = (),
    **sections: object,
) -> Run:
    """Train a recipe and return its run.

    recipe: a file, the name of a recipe in this package ("digits_lt"), a Recipe, or nested plain values. None: with a
    dataset, what `rescom-timm init` writes for such images on this machine (for photographs a net with ImageNet
    weights, which are downloaded unless sections name another backbone; a split validation or val selects the best
    checkpoint), else the defaults.
    dataset: replaces the recipe's data.source. A datasets.DatasetDict with the splits train and test (or those that the
    recipe names), or one Dataset, of which a fifth of each class is kept for testing. A torch Dataset of (image, label)
    can replace a Dataset, a dict of them a DatasetDict.
    sections: sections of the recipe over it, such as train={"epochs": 30} or net={"backbone": "resnet18"}.
    overrides: as on the command line, "train.epochs=30".
    resume: continue the last run of the recipe's name, if there is one.
    metrics: further metrics of every evaluation by name, functions of labels (N,) and probabilities (N, K), NumPy
    arrays; evaluation.select may name one of which larger is better. callbacks: objects with on_epoch_end(epoch,
    metrics) or on_evaluate(epoch, figures), called in the main process.

    Raises RecipeError for an invalid recipe, InputError and MissingFileError for the data, and as engine.trainer.train.
    """
    overrides = [*_as_overrides(sections), *overrides]
    if dataset is not None:
        overrides = [f"data.source={MEMORY}", *_single_split(dataset, overrides), *overrides]
    if isinstance(recipe, Recipe):
        recipe = recipe.to_dict()
    with in_memory(dataset):
        if recipe is None and dataset is not None:
            resolved = _proposed(dataset, overrides)
        elif recipe is None or isinstance(recipe, Mapping):
            resolved = load_dict(dict(recipe or {}), "recipe", overrides)
        else:
            resolved = load(recipe, overrides, to_train=True)
        return Run(train_recipe(resolved, resume, own=Own(metrics, callbacks)), dataset, metrics)


def fit(
    source: str | Path | InMemory,
    minutes: float = 20.0,
    *,
    backbone: str | Sequence[str] = (),
    size: int | None = None,
    device: str | None = None,
    weights_file: str | Path | None = None,
    class_features: str | Path | None = None,
    use_validation: bool = False,
    seed: int = 0,
    output: str | Path | None = None,
    join: bool = False,
    overrides: Sequence[str] = (),
    **images: object,
) -> Run:
    """Train the best model for these images in a time budget, as `rescom-timm fit` does; returns its run.

    source: a folder, a list, a recipe or a Hub id, or a data set as for `train`. minutes: wall clock, without
    downloads. backbone: timm names, of which the one with the best head is trained (default: by device and minutes).
    size: side of the input in pixels. weights_file: of the backbone; "none" trains from scratch. class_features: file
    of class names' features, for a CLIP or SigLIP backbone. use_validation: fit on the validation images too, at the
    end. output: the run's folder (default: runs/NAME). join: help the process that fits there, if one does. overrides:
    key=value over a recipe. images: as the options of the command.

    After Ctrl-C the run is the best so far, and the same call resumes. Raises InputError (fit.minutes, fit.weights
    ...), KeyboardInterrupt before there is a head, and as reading the data does.
    """
    if unknown := set(images) - {each.name for each in fields(OwnImages)}:
        raise TypeError(f"fit() got an unexpected keyword argument {min(unknown)!r}")
    memory = not isinstance(source, str | Path)
    if memory:
        single = dict(each.removeprefix("data.").split("=") for each in _single_split(source, []))
        images = {"split": single.get("train", "train"), "test_split": single.get("train", "test"), **images}
    names, file = (
        (backbone,) if isinstance(backbone, str) else tuple(backbone),
        None if weights_file is None else str(weights_file),
    )
    options = FitOptions(
        MEMORY if memory else str(source), float(minutes), names, size, device, file,
        None if class_features is None else str(class_features), use_validation, seed, tuple(overrides), images,
    )  # fmt: skip
    dataset = source if memory else None
    try:
        folder = fit_images(options, output, dataset, join=join)
    except Interrupted as error:
        if error.folder is None:
            raise KeyboardInterrupt from error
        print(error)
        folder = error.folder
    return Run(folder, dataset)


def _proposed(dataset: InMemory, overrides: Sequence[str]) -> Recipe:
    """The recipe that `rescom-timm init` proposes for a data set in memory, with these overrides.

    A backbone that they name starts from scratch unless they set net.pretrained, and keys of method without its name
    are ResCom's, as in any recipe.
    """
    keys = {override.partition("=")[0].strip() for override in overrides}
    config = load_dict({}, "recipe", [each for each in overrides if each.startswith(("data.", "data="))]).data
    names = list(dataset) if isinstance(dataset, Mapping) else [config.train]
    if "test" not in names and config.train in names and not {"data", "data.test"} & keys:
        print("the data set has no split 'test': a fifth of each class is kept for testing (data.test=holdout(0.2))")
        config = replace(config, test="holdout(0.2)")
    spare = [name for name in names if name not in (config.train, config.test, *SPLIT.findall(config.validation))]
    if not {"data", "data.validation"} & keys and (found := {"validation", "val"}.intersection(spare)):
        config = replace(config, validation=f"split({max(found, key=len)})")
        spare.remove(max(found, key=len))
    if spare:
        print(f"left out: the splits {', '.join(spare)} of the data set (data.train, data.test, data.validation)")
    given = overridden({}, overrides)
    net, method = (value if isinstance(value := given.get(key), dict) else {} for key in ("net", "method"))
    wanted = Wanted(
        backbone=backbone if isinstance(backbone := net.get("backbone"), str) else None,
        pretrained=bool(net.get("pretrained")) if "backbone" in net else None,
        method={"method": {"name": method.get("name", "rescom")}} if method else {},
    )
    proposal = propose(load_data(config), config, wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "train.epochs=.* shortens the schedule")  # not the user's choice
        recipe = load_dict(proposal.sections, "recipe", overrides)
    print("\n  ".join(["no recipe given: using what rescom-timm init proposes", *proposal.reasons]))
    print("your own settings are over these; all keys are in the run's recipe.yaml")
    return recipe


SPLIT = re.compile(r"split\((.*)\)")


def _as_overrides(sections: Mapping[str, object]) -> list[str]:
    """Nested values as key=value; a section's name first, because it resets the section."""
    values = sorted(flat(dict(sections)).items(), key=lambda pair: not pair[0].endswith(".name"))
    return [f"{key}={json.dumps(value, default=_plain)}" for key, value in values]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)  # NumPy scalars; paths


def _single_split(dataset: InMemory, overrides: Sequence[str]) -> list[str]:
    """Default overrides for a data set of one split."""
    names = list(dataset) if isinstance(dataset, Mapping) else ["train"]
    if len(names) != 1 or any(override.startswith("data.test=") for override in overrides):
        return []
    print("the data set has one split: a fifth of each class is kept for testing (data.test=holdout(0.2))")
    return [f"data.train={names[0]}", "data.test=holdout(0.2)"]


class Run:
    """A trained run: its folder, and what can be done with it.

    folder: of the run. dataset: for a run trained on a data set in memory, that data set; or another one to evaluate
    on, with the same classes in any order, of which a single split has the test images. metrics: as of `train`, for
    evaluate.
    Raises an error with code run.missing for a path that is no run's folder.
    """

    def __init__(self, folder: str | Path, dataset: InMemory | None = None, metrics: Mapping[str, Metric] = {}) -> None:
        self.folder, self.own = check_run(folder), Own(metrics)
        self.dataset = dataset

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return run_recipe(self.folder)

    @property
    def metrics(self) -> list[Line]:
        """The lines of metrics.jsonl, oldest first: epoch, step and named metrics."""
        return lines(self.folder / "metrics.jsonl")

    def evaluate(
        self, checkpoint: str = "last", split: str = "test", overrides: Sequence[str] = (), five_crops: bool = False,
        weights: Weights = "raw", dataset: InMemory | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Metrics in percent by name (top1, many, medium, few ...), also written into the run's folder.

        checkpoint: last, best, or a checkpoint's name. split: test or validation. overrides: as on the command line.
        five_crops: average the logits of five crops. weights: raw, or ema for those of train.ema. dataset: to evaluate
        on, as for Run. Evaluations on other data than the run's have file names of their own.
        """
        overrides = [*self._data_overrides(dataset), *overrides]
        with in_memory(dataset if dataset is not None else self.dataset):
            return evaluate_run(self.folder, checkpoint, split, overrides, five_crops, weights, self.own)[2].compute()

    def _data_overrides(self, dataset: InMemory | None = None) -> list[str]:
        """Overrides that replace the run's own data by the data set in memory, if there is one."""
        own = self.recipe.data
        if dataset is None and (self.dataset is None or own.source == MEMORY):
            return []
        given = dataset if dataset is not None else self.dataset
        names = [str(name) for name in given] if isinstance(given, Mapping) else ["train"]
        test = next((name for name in (own.test, "test") if name in names), names[-1])
        train = next((name for name in (own.train, "train") if name in names), test)
        known = (*SPLIT.findall(own.validation), "validation", "valid", "val")
        validation = next((f"split({name})" for name in known if name in names and name not in (train, test)), "none")
        return [
            f"data.source={MEMORY}", f"data.train={train}", f"data.test={test}",
            f"data.validation={validation}", "data.index=all", "data.test_index=all",
            *(f"data.{key}=null" for key in ("image_column", "label_column", "split_column", "group_column", "subset")),
        ]  # fmt: skip

    def predict(
        self, images: ImageSource, top_k: int = 5, prior: Prior | None = None, **options: object
    ) -> list[Prediction]:
        """The most probable classes of images; arguments as rescom_timm.predict's."""
        return predict(self.pretrained(), images, top_k=top_k, prior=prior, **options)  # type: ignore[arg-type]

    def embeddings(self, split: str = "train", **options: object) -> Embeddings:
        """Features and embeddings of the train, test or validation images, for predict(..., among=, nearest=).

        options: those of embed. Raises InputError (data.split) for a split that the run does not have.
        """
        found, names = self._split(split)
        return embed(self.pretrained(), found, class_names=names, **options)  # type: ignore[arg-type]

    def prediction_sets(self, coverage: float, by_group: bool = False, **options: object) -> PredictionSets:
        """Sets of classes that have the right one with probability `coverage`, for predict(..., sets=).

        Calibrated on the validation images. options: those of calibrate. Raises InputError (data.split) without
        validation images, or as calibrate with too few.
        """
        found, names = self._split("validation")
        return calibrate(self.pretrained(), found, coverage, by_group=by_group, class_names=names, **options)  # type: ignore[arg-type]

    def operating_point(self, recall: Mapping[str, float]) -> OperatingPoint:
        """The rule that finds at least a share of named classes, such as {"defect": 0.9}, for predict(..., rule=).

        Found on the validation images. Raises InputError (data.split, predict.classes, predict.value,
        predict.calibration).
        """
        return operating_point(*kept_validation(self.folder).whole(), recall, class_names(self.folder) or [])

    def data(self, overrides: Sequence[str] = ()) -> Data:
        """The run's splits, with classes numbered as in training and the counts that it was trained on.

        overrides: as on the command line, such as "data.source=PATH". Raises as data.sources.load does.
        """
        with in_memory(self.dataset):
            own, overrides = self.recipe, [*self._data_overrides(), *overrides]
            recipe = run_recipe(self.folder, overrides) if overrides else own
            return data_of(self.folder, own, recipe, class_names(self.folder))

    def _split(self, name: str) -> tuple[Split, list[str]]:
        data = self.data()
        found = {"train": data.train, "test": data.test, "validation": data.validation}.get(name)
        if found is None:
            raise InputError(
                "data.split", f"{self.folder} has no {name} images: train with data.validation=holdout(0.1)"
            )
        return found, data.class_names

    def model(self) -> nn.Module:
        """The exported model as a plain timm model, in evaluation mode.

        Raises InputError (run.export) for a net that timm has no model for; `pretrained` reads it.
        """
        folder = self.folder / "model"
        if not (folder / "config.json").is_file():
            raise InputError(
                "run.export", f"{self.folder} has no plain timm model (timm has no such net): use pretrained()"
            )
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return model.eval()

    def pretrained(self) -> Pretrained:
        """The exported net with class names, counts and recipe; see rescom_timm.from_pretrained."""
        return from_pretrained(self.folder)

    def figures(self, *names: str, checkpoint: str = "last") -> list[Path]:
        """Draw plots ("curves", "confusion", "tsne" ...; without a name all, and the report) into RUN/figures.

        Returns the files written. A plot that the run has no data for is reported in a warning.
        """
        written = []
        with in_memory(self.dataset):
            runs, overrides = [RunFolder(self.folder)], self._data_overrides()
            for found in write_figures(runs, names or None, checkpoint=checkpoint, overrides=overrides):
                if isinstance(found, Path):
                    written.append(found)
                else:
                    warnings.warn(found, stacklevel=2)
        return written

    def export(
        self, path: str | Path, format: Format = "timm", weights: Weights | None = None, overrides: Sequence[str] = (),
        recall: Mapping[str, float] | None = None, costs: str | Path | None = None,
    ) -> Path:  # fmt: skip
        """Write the best checkpoint's model for other programs; returns the path.

        format: timm writes a folder for timm, transformers and from_pretrained, with a model card; onnx and torch a
        file of the classifier (normalised images (N, 3, H, W) to logits (N, K)), whose logits are compared with the
        net's. weights: raw or ema (default: as train.ema.export says). overrides: of the hub section, for the card.
        recall, costs: an operating point by class name, or a file of costs, that the folder keeps and predict and demo
        use (timm only).
        Raises CheckpointError for weights that the run lacks, MissingPackageError without the extra onnx, InputError
        for a net that the format cannot store.
        """
        path = Path(path)
        if format == "timm":
            return export_push(self.folder, path, overrides, weights, kept_rule(self.folder, recall, costs))
        write = {"onnx": export_onnx, "torch": export_program}[format]
        if weights is None:
            return write(self.pretrained(), path)
        with TemporaryDirectory() as folder:
            return write(export_run(self.folder, folder, plain=False, weights=weights), path)

    def push(
        self, repo: str | None = None, overrides: Sequence[str] = (), recall: Mapping[str, float] | None = None,
        costs: str | Path | None = None,
    ) -> str:  # fmt: skip
        """Push the run to the Hub; returns the commit's address.

        repo: owner/name (default: the recipe's hub.repo). overrides: of the hub section, such as "hub.private=false".
        recall, costs: as of export. Raises HubError, and InputError as export does.
        """
        overrides = [*overrides, *([f"hub.repo={repo}"] if repo else [])]
        return push_run(self.folder, overrides, kept_rule(self.folder, recall, costs))
