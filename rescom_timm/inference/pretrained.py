"""Reading exports: a trained net with everything needed to use it or to continue training."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rescom_timm.config.loading import load_dict
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.decoding import ReadConfig
from rescom_timm.data.transforms import parse
from rescom_timm.engine.build import refuse_queue
from rescom_timm.errors import CodedError, InputError, MissingFileError, code_of
from rescom_timm.hub_client import hub_id, missing
from rescom_timm.hub_download import at_revision, download
from rescom_timm.inference.conformal import Kind, PredictionSets
from rescom_timm.inference.decisions import even_shift, read_sets
from rescom_timm.inference.export import DETAILS, HASHES, PLAIN, SIDE, WRITTEN, check_described, export_run
from rescom_timm.inference.rules import Costs, OperatingPoint, Rule, read_matrix, read_point
from rescom_timm.io import read_json, read_yaml, sha256
from rescom_timm.methods import Method, create_method
from rescom_timm.metrics import LIMITS, Limits
from rescom_timm.models.bounds import SLACK, budget
from rescom_timm.models.classifiers import ClassifierConfig, classifier
from rescom_timm.models.net import Net, ProjectorConfig, check_backbone, check_weights, create_model, describe
from rescom_timm.models.tuning import TuningConfig


@dataclass(frozen=True, eq=False)
class Pretrained:
    """The result of from_pretrained: K classes, images of (3, H, W)."""

    net: Net
    """In evaluation mode on the CPU."""
    class_names: list[str]
    """(K,), or empty if they are not known."""
    counts: Tensor | None
    """(K,) int64 training images of each class."""
    input_size: tuple[int, int, int]
    eval_policy: str
    """How evaluation images are prepared, as in views.eval."""
    recipe: Recipe | None
    trained: Method | None
    """The method over this net with its queue; None for new classes or without a recipe."""
    reading: ReadConfig = ReadConfig()
    """How image files are read before that, as in training."""
    temperature: float | None = None
    """T fitted on the run's validation images; None without."""
    sets: Mapping[tuple[Kind, float], PredictionSets] = field(default_factory=dict)
    """By kind and coverage, prediction sets calibrated on the run's validation images; empty without."""
    operating_point: OperatingPoint | None = None
    costs: Costs | None = None
    """The rules that the export keeps, if there are any."""

    @property
    def rule(self) -> Rule | None:
        """The rule that predict and demo use: the operating point, else the costs."""
        return self.operating_point or self.costs

    def prediction_sets(self, coverage: float, kind: Kind = "marginal") -> PredictionSets:
        """Those that the export keeps. Raises InputError (predict.calibration) for another coverage, or without any."""
        if (kind, coverage) not in self.sets:
            there = ", ".join(f"{c:g}" for k, c in self.sets if k == kind)
            message = (
                f"it keeps sets of coverage {there}" if there else "its run had too few validation images, or none"
            )
            raise InputError(
                "predict.calibration", f"this model has no {kind} sets of coverage {coverage:g}: {message}"
            )
        return self.sets[kind, coverage]

    @property
    def limits(self) -> Limits:
        """Of the groups many, medium and few."""
        return LIMITS if self.recipe is None else self.recipe.evaluation.group_limits

    def method(self, counts: Tensor | None = None) -> Method:
        """The recipe's method over this net, to continue training.

        It has its queue, or an empty one for the `counts` (K,) of new classes, which have no class weights. Raises
        InputError: model.missing without a recipe, model.classes for counts that do not fit.
        """
        if self.recipe is None:
            message = "this export has no recipe: build a method with rescom_timm.methods.create_method"
            raise InputError("model.missing", message)
        if counts is None:
            if self.trained is None:
                message = "the classes are new: give counts, the training images of each, (K,)"
                raise InputError("model.classes", message)
            return self.trained
        classes = self.net.classifier.out_features
        if self.trained is not None:
            message = "for other counts read the model with from_pretrained(..., num_classes=...)"
            raise InputError("model.classes", message)
        if len(counts) != classes:
            raise InputError("model.classes", f"there are {len(counts)} counts and the net has {classes} classes")
        return create_method(self.net, counts, self.recipe.method)


def from_pretrained(
    source: str | Path, num_classes: int | None = None, revision: str | None = None
) -> Pretrained:  # fmt: skip
    """A trained net with everything needed to use it or to continue training.

    source: an exported folder, a run's folder (its best checkpoint), or a Hub id such as "me/rescom-r50", optionally
    with "@revision"; "hf://me/rescom-r50" means the Hub even if a folder me exists.
    num_classes: for new classes, with a fresh classifier and an empty queue. revision: of a Hub id: a branch, a tag or
    a commit.
    Raises MissingFileError if the folder or repository does not exist or cannot be reached, and InputError (model.*) if
    it was not made by rescom_timm or its files are damaged or invalid.
    """
    if num_classes is not None and num_classes < 1:
        raise InputError("model.classes", f"num_classes must be at least 1, not {num_classes}")
    if revision is not None:
        source = at_revision(source, revision)
    local = Path(source).expanduser()
    repo = hub_id(source)
    if repo is not None:
        try:
            return _read(_download(repo), num_classes)
        except FileNotFoundError as error:
            raise MissingFileError(code_of(error), f"{error}; and there is no folder {local} here") from error
    if (local / DETAILS).is_file():
        return _read(local, num_classes)
    if (local / "model" / DETAILS).is_file():
        return _with_own_bound(_read(local / "model", num_classes))
    if (local / "checkpoints").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            return _with_own_bound(_read(export_run(local, folder, plain=False), num_classes))
    if local.is_dir():
        raise InputError(
            "model.missing",
            f"{local} is neither a run's folder nor an export of rescom_timm (it holds no {DETAILS}); a plain timm "
            f'folder is read by timm.create_model("local-dir:{local}", pretrained=True)',
        )
    raise missing(str(source), "run folder")


def _with_own_bound(model: Pretrained) -> Pretrained:
    """With the image size limit of a local run's recipe; an export's recipe does not set it."""
    most = None if model.recipe is None else model.recipe.loader.max_pixels
    return replace(model, reading=replace(model.reading, max_pixels=most))


def _reading(details: dict[str, Any], recipe: Recipe | None) -> ReadConfig:
    """How an export's images are read. Exports of 0.2.0 do not have it, and are read as in 0.2.0."""
    if "reading" in details:
        return ReadConfig.of(details["reading"])
    if recipe is not None and recipe.loader.exif:
        warnings.warn(
            "this model was trained with loader.exif=true, but its export does not record it: EXIF orientation is "
            "ignored. Export it again: rescom-timm export RUN",
            stacklevel=5,
        )
    return ReadConfig()


def _download(repo: str) -> Path:
    """The files of a repository, downloaded once more if their hashes differ."""
    names = [DETAILS, HASHES, SIDE, "config.json", PLAIN, "recipe.yaml"]
    folder = download(repo, names, needed=DETAILS)
    if damaged(folder):
        folder = download(repo, names, needed=DETAILS, force=True)
    return folder


def damaged(folder: Path) -> list[str]:
    """The files of an export that do not have their hash of hashes.json, and weights without one.

    Other files that it names are ignored. Raises InputError (model.damaged) if hashes.json cannot be read.
    """
    try:
        hashes = read_json(folder / HASHES)
    except (OSError, ValueError) as error:
        message = f"{folder / HASHES} cannot be read ({error}), so the export cannot be verified: fetch it again"
        raise InputError("model.damaged", message) from None
    own = [name for name in WRITTEN if name in hashes or (name in (SIDE, PLAIN) and (folder / name).exists())]
    return [name for name in own if not (folder / name).is_file() or sha256(folder / name) != hashes.get(name)]


def _read(folder: Path, num_classes: int | None) -> Pretrained:
    wrong = damaged(folder)
    if hard := [name for name in wrong if name.endswith(".safetensors")]:
        raise InputError(
            "model.damaged",
            f"{', '.join(hard)} in {folder} has another sha256 than in {HASHES}: damaged or changed; fetch it again",
        )
    if wrong:  # users may repair a config
        warnings.warn(f"{', '.join(wrong)} in {folder} was changed after the export; it is used as it is", stacklevel=4)
    try:
        details = read_json(folder / DETAILS)
        size = tuple(details["input_size"])
        _check_details(details)
        for name in ("mean", "std"):
            if len(details[name]) != 3 or not all(math.isfinite(value) for value in details[name]):
                message = f"{name} in {DETAILS} must be three finite numbers, not {details[name]}"
                raise InputError("model.details", message)
        temperature = None if details.get("temperature") is None else float(details["temperature"])
        if temperature is not None and not 0 < temperature < math.inf:
            raise InputError("model.details", f"temperature in {DETAILS} must be above 0, not {temperature}")
        most = 4 * _check_size(details, folder)
        tensors = load_file(folder / SIDE)
        state = {name.removeprefix("method."): tensors.pop(name) for name in list(tensors) if name[:7] == "method."}
        tuning = dict(details.get("tuning", {}))
        tuning["layers"] = tuple(tuning.get("layers", ()))
        head = ClassifierConfig(**details.get("classifier", {}))
        projector = None if details["projector"] is None else ProjectorConfig(**details["projector"])
        with budget(most):
            net = create_model(
                details["backbone"], len(details["class_names"]), projector=projector,
                mean=tuple(details["mean"]), std=tuple(details["std"]), tuning=TuningConfig(**tuning), head=head,
                **details["options"],
            )  # fmt: skip
        if details["head"] is not None:
            has_head = any(name.startswith("classifier.") for name in tensors)
            tensors |= _from_plain(net, folder / PLAIN, None if has_head else details["head"])
        policy = details["eval_policy"]
        names, counts = details["class_names"], details["counts"] and torch.tensor(details["counts"])
        recipe = _recipe(folder / "recipe.yaml")
        reading = _reading(details, recipe)
        trained = None
        if num_classes is not None:
            net.classifier = classifier(head, net.classifier.in_features, num_classes)
            names, counts, temperature, details = [], None, None, {}
            known = [name for name, _ in net.named_children() if name != "classifier"]  # not parts that a method adds
            tensors = {name: value for name, value in tensors.items() if name.split(".")[0] in known}
            tensors |= {f"classifier.{name}": value for name, value in net.classifier.state_dict().items()}
        elif recipe is not None and counts is not None:
            with budget(most + refuse_queue(recipe, len(names))):
                trained = create_method(net, counts, recipe.method)
            trained.set_classes(names)
            net = trained.net
            own = {k: v for k, v in trained.state_dict().items() if not k.startswith("net.") and k in state}
            check_weights(state, own, "the method")
            trained.load_state_dict(state, strict=False)
        check_weights(tensors, net.state_dict(), "the model")
        net.load_state_dict(tensors)
        even = even_shift(recipe, counts, net.classifier.out_features) if "sets" in details else None
        sets = {} if even is None else read_sets(details["sets"], even, temperature or 1.0)
        point = read_point(details["operating_point"], names) if "operating_point" in details else None
        costs = read_matrix(details["costs"], len(names)) if "costs" in details else None
    except Exception as error:  # an attacker chooses the content, and timm raises many kinds
        fresh = " with a fresh classifier" if num_classes is not None else ""
        what = f"no {error} in {DETAILS}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        code = error.code if isinstance(error, CodedError) else "model.unreadable"
        raise InputError(code, f"{folder} cannot be read{fresh}: {what}") from error
    return Pretrained(
        net.eval(), names, counts, size, policy, recipe, trained, reading, temperature, sets, point, costs
    )


def _check_details(details: dict[str, Any]) -> None:
    """Raises InputError (model.details) for values in rescom.json that no export has."""
    check_described(details, DETAILS, counted=False)
    if not timm.is_model(str(details["backbone"]).split(".")[0]) or "/" in details["backbone"]:
        check_backbone(details["backbone"])
        message = f"backbone in {DETAILS} must be a name of timm.list_models(), not {details['backbone']!r}"
        raise InputError("model.details", message)
    parse(details["eval_policy"])


def _check_size(details: dict[str, Any], folder: Path) -> int:
    """Bytes of the weight files plus elements of the net's buffers.

    Raises InputError (model.details) if rescom.json describes a net with more weights than that, before it is
    allocated.
    """
    there = sum((folder / name).stat().st_size for name in (SIDE, PLAIN) if (folder / name).is_file())
    encoder = describe(details["backbone"], details["options"], there + SLACK)
    width = int(encoder.head_hidden_size)  # type: ignore[arg-type]
    weights = sum(value.numel() for value in encoder.state_dict().values())
    weights += len(details["class_names"]) * width
    if details["projector"] is not None:
        hidden, dim = (int(details["projector"][name] or width) for name in ("hidden", "dim"))
        weights += hidden * (width + dim)
    if weights > there:
        message = f"{DETAILS} describes a net of {weights:,} weights, but the weight files have {there:,} bytes"
        raise InputError("model.details", message)
    return there + sum(value.numel() for value in encoder.buffers())


def _from_plain(net: Net, path: Path, head: str | None) -> dict[str, Tensor]:
    """Encoder and classifier (the layer `head`, if any) of a plain timm file, with the names of a Net."""
    with safe_open(path, framework="pt") as file:
        tensors = {f"encoder.{name}": file.get_tensor(name) for name in net.encoder.state_dict()}
        for name, own in net.classifier.state_dict().items() if head else ():
            tensors[f"classifier.{name}"] = file.get_tensor(f"{head}.{name}").view_as(own)
    return tensors


def _recipe(path: Path) -> Recipe | None:
    if not path.is_file():
        return None
    try:
        return load_dict(read_yaml(path), path.name)
    except ValueError as error:  # a net can be used without a recipe of another version
        warnings.warn(f"the recipe of this model cannot be read and is left out: {error}", stacklevel=4)
        return None
