"""Reading an export back: a trained net with everything needed to use it or to train on."""

from __future__ import annotations

import math
import tempfile
import warnings
from dataclasses import dataclass, replace
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
from rescom_timm.data.transforms import MAX_SIDE, parse
from rescom_timm.engine.build import refuse_queue
from rescom_timm.hub_client import hub_id, missing
from rescom_timm.hub_download import at_revision, download
from rescom_timm.inference.export import DETAILS, HASHES, PLAIN, SIDE, WRITTEN, check_classes, export_run
from rescom_timm.io import read_json, read_yaml, sha256
from rescom_timm.methods import Method, create_method
from rescom_timm.metrics import LIMITS, Limits
from rescom_timm.models.bounds import SLACK, budget
from rescom_timm.models.classifiers import ClassifierConfig, classifier
from rescom_timm.models.net import Net, ProjectorConfig, check_backbone, check_weights, create_model, describe
from rescom_timm.models.tuning import TuningConfig


@dataclass(frozen=True, eq=False)
class Pretrained:
    """What from_pretrained gives: K classes, images of (3, H, W)."""

    net: Net
    """In evaluation mode on the CPU."""
    class_names: list[str]
    """(K,), or empty where they are not known."""
    counts: Tensor | None
    """(K,) int64 training images of each class."""
    input_size: tuple[int, int, int]
    eval_policy: str
    """How evaluation images were prepared, a line of data.views."""
    recipe: Recipe | None
    trained: Method | None
    """The method over this net with the queue as it was; None where the classes are new or no recipe was kept."""
    reading: ReadConfig = ReadConfig()
    """How image files are read before that, as in training."""

    @property
    def limits(self) -> Limits:
        """Of the groups many, medium and few."""
        return LIMITS if self.recipe is None else self.recipe.evaluation.group_limits

    def method(self, counts: Tensor | None = None) -> Method:
        """The method of the recipe over this net, to train on: with the queue as it was, or, for the `counts` (K,) of
        new classes, with an empty one. Raises ValueError where there is no recipe or the counts do not fit."""
        if self.recipe is None:
            raise ValueError("this export holds no recipe: build a method with rescom_timm.methods.create_method")
        if counts is None:
            if self.trained is None:
                raise ValueError("the classes are new: give counts, the training images of each, (K,)")
            return self.trained
        classes = self.net.classifier.out_features
        if self.trained is not None:
            raise ValueError("for other counts read the model with from_pretrained(..., num_classes=...)")
        if len(counts) != classes:
            raise ValueError(f"counts are of {len(counts)} classes and the net has {classes}: they must be as many")
        return create_method(self.net, counts, self.recipe.method)


def from_pretrained(
    source: str | Path, num_classes: int | None = None, revision: str | None = None
) -> Pretrained:  # fmt: skip
    """A trained net with everything needed to use it or to train on.

    source: an exported folder, a run's folder (its best checkpoint), or a Hub id such as "me/rescom-r50", which may
    end in "@revision"; "hf://me/rescom-r50" is the Hub's where a folder me is here too.
    num_classes: start on other classes, with a fresh classifier and an empty queue. revision: of a Hub id: a branch, a
    tag or a commit.
    Raises FileNotFoundError where there is no such folder or repository or it cannot be reached, and ValueError where
    it was not made by rescom_timm or its files are not what was written.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if revision is not None:
        source = at_revision(source, revision)
    local = Path(source).expanduser()
    repo = hub_id(source)
    if repo is not None:
        try:
            return _read(_download(repo), num_classes)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; and there is no folder {local} here") from error
    if (local / DETAILS).is_file():
        return _read(local, num_classes)
    if (local / "model" / DETAILS).is_file():
        return _with_own_bound(_read(local / "model", num_classes))
    if (local / "checkpoints").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            return _with_own_bound(_read(export_run(local, folder, plain=False), num_classes))
    if local.is_dir():
        raise ValueError(
            f"{local} is neither a run's folder nor one exported by rescom_timm (it holds no {DETAILS}); a plain timm "
            f'folder is read by timm.create_model("local-dir:{local}", pretrained=True)'
        )
    raise missing(str(source), "run folder")


def _with_own_bound(model: Pretrained) -> Pretrained:
    """The recipe of a run on this machine also says how large its images may be; that of a single export does not."""
    most = None if model.recipe is None else model.recipe.loader.max_pixels
    return replace(model, reading=replace(model.reading, max_pixels=most))


def _reading(details: dict[str, Any], recipe: Recipe | None) -> ReadConfig:
    """Of an export. Those of 0.2.0 say nothing, and are read as 0.2.0 read them."""
    if "reading" in details:
        return ReadConfig.of(details["reading"])
    if recipe is not None and recipe.loader.exif:
        warnings.warn(
            "this model was trained with loader.exif=true, but its export does not say so: photographs are read as "
            "they are stored. Export it again: rescom-timm export RUN",
            stacklevel=5,
        )
    return ReadConfig()


def _download(repo: str) -> Path:
    """The files of a repository, downloaded a second time where they are not what was pushed."""
    names = [DETAILS, HASHES, SIDE, "config.json", PLAIN, "recipe.yaml"]
    folder = download(repo, names, needed=DETAILS)
    if damaged(folder):
        folder = download(repo, names, needed=DETAILS, force=True)
    return folder


def damaged(folder: Path) -> list[str]:
    """Of the files that an export has, those that are not what hashes.json says, and weights of which it says nothing;
    no other file that it may name is looked at. Raises ValueError where hashes.json itself cannot be read."""
    try:
        hashes = read_json(folder / HASHES)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / HASHES} cannot be read ({error}), so the files beside it cannot be trusted"
        ) from None
    own = [name for name in WRITTEN if name in hashes or (name in (SIDE, PLAIN) and (folder / name).exists())]
    return [name for name in own if not (folder / name).is_file() or sha256(folder / name) != hashes.get(name)]


def _read(folder: Path, num_classes: int | None) -> Pretrained:
    wrong = damaged(folder)
    if hard := [name for name in wrong if name.endswith(".safetensors")]:
        raise ValueError(
            f"{', '.join(hard)} in {folder} is not what was written (another sha256): the copy or the download is "
            "damaged, or somebody changed it; fetch it again"
        )
    if wrong:  # a repaired config must lock nobody out
        warnings.warn(f"{', '.join(wrong)} in {folder} was changed since it was written; read as it is", stacklevel=4)
    try:
        details = read_json(folder / DETAILS)
        size = tuple(int(side) for side in details["input_size"])
        if len(size) != 3 or not all(1 <= side <= MAX_SIDE for side in size):
            raise ValueError(f"input_size in {DETAILS} must be three numbers from 1 to {MAX_SIDE}, not {size}")
        for name in ("mean", "std"):
            if len(details[name]) != 3 or not all(math.isfinite(value) for value in details[name]):
                raise ValueError(f"{name} in {DETAILS} must be three finite numbers, not {details[name]}")
        _check_details(details)
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
        names, counts = details["class_names"], details["counts"] and torch.tensor(details["counts"])
        recipe = _recipe(folder / "recipe.yaml")
        reading = _reading(details, recipe)
        trained = None
        if num_classes is not None:
            net.classifier = classifier(head, net.classifier.in_features, num_classes)
            names, counts = [], None
            known = [name for name, _ in net.named_children() if name != "classifier"]  # not what a method has added
            tensors = {name: value for name, value in tensors.items() if name.split(".")[0] in known}
            tensors |= {f"classifier.{name}": value for name, value in net.classifier.state_dict().items()}
        elif recipe is not None and counts is not None:
            with budget(most + refuse_queue(recipe, len(names))):
                trained = create_method(net, counts, recipe.method)
            net = trained.net
            own = {k: v for k, v in trained.state_dict().items() if not k.startswith("net.") and k in state}
            check_weights(state, own, "the method")
            trained.load_state_dict(state, strict=False)
        check_weights(tensors, net.state_dict(), "the model")
        net.load_state_dict(tensors)
    except Exception as error:  # whatever a file says whose hash was made to fit, and whatever timm makes of it
        fresh = " with a fresh classifier" if num_classes is not None else ""
        what = f"no {error} in {DETAILS}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"{folder} cannot be read{fresh}: {what}") from error
    return Pretrained(net.eval(), names, counts, size, details["eval_policy"], recipe, trained, reading)


def _check_details(details: dict[str, Any]) -> None:
    """Raises ValueError where rescom.json says what no export says."""
    check_classes(details["class_names"], details["counts"], DETAILS, counted=False)
    if not timm.is_model(str(details["backbone"]).split(".")[0]) or "/" in details["backbone"]:
        check_backbone(details["backbone"])
        raise ValueError(f"backbone in {DETAILS} must be a name of timm.list_models(), not {details['backbone']!r}")
    parse(details["eval_policy"])


def _check_size(details: dict[str, Any], folder: Path) -> int:
    """Bytes of the files of weights, and numbers of the net's buffers. Raises ValueError where rescom.json describes a
    net of more numbers: it would fill the memory before that is seen."""
    there = sum((folder / name).stat().st_size for name in (SIDE, PLAIN) if (folder / name).is_file())
    encoder = describe(details["backbone"], details["options"], there + SLACK)
    width = int(encoder.head_hidden_size)  # type: ignore[arg-type]
    weights = sum(value.numel() for value in encoder.state_dict().values())
    weights += len(details["class_names"]) * width
    if details["projector"] is not None:
        hidden, dim = (int(details["projector"][name] or width) for name in ("hidden", "dim"))
        weights += hidden * (width + dim)
    if weights > there:
        raise ValueError(
            f"{DETAILS} describes a net of {weights:,} numbers, and the files of weights have {there:,} bytes"
        )
    return there + sum(value.numel() for value in encoder.buffers())


def _from_plain(net: Net, path: Path, head: str | None) -> dict[str, Tensor]:
    """Encoder and classifier (the layer `head`, if any) of a plain timm file, under the names of a Net."""
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
    except ValueError as error:  # a net is of use even where its recipe is of another version
        warnings.warn(f"the recipe of this model cannot be read and is left out: {error}", stacklevel=4)
        return None
