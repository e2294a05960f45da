"""Export of a trained net, and reading it back: one folder that serves two readers.

    config.json, model.safetensors      plain timm: the classifier, label names, input size, mean and std
    rescom.json, rescom.safetensors     rescom_timm besides: classes, evaluation policy, projector, queue
    recipe.yaml                         how it was trained
    hashes.json                         sha256 of these files, checked when they are read

A folder of a net that timm has no classifier for holds no config.json, and rescom.safetensors is then the whole net.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn

from rescom_timm.data.loaders import ViewsDataset
from rescom_timm.data.sources import Data
from rescom_timm.data.views import MAX_SIDE, ViewsConfig, parse
from rescom_timm.files import aside_folder, read_json, read_yaml, write_json, write_tensors, write_text
from rescom_timm.methods import Method, create_method
from rescom_timm.nets.net import Net, ProjectorConfig, check_weights, create_model
from rescom_timm.runs import checkpoint
from rescom_timm.runs.build import build_net
from rescom_timm.runs.hub import as_repo, download, sha256
from rescom_timm.runs.recipe import Recipe, load_dict

HASHES, DETAILS, SIDE, PLAIN = "hashes.json", "rescom.json", "rescom.safetensors", "model.safetensors"
WRITTEN = ("config.json", PLAIN, SIDE, DETAILS, "recipe.yaml", HASHES)
"""What an export's folder holds; other files in it are their owner's."""
KEPT = (
    "architecture", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std",
    "num_classes", "pool_size", "first_conv", "classifier",
)  # fmt: skip
"""What of timm's description of the source weights is still true of the trained ones."""


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


# ------------------------------------------------------------------------------------------------------------- writing


def export(
    net: Net,
    folder: str | Path,
    class_names: Sequence[str],
    input_size: tuple[int, int, int],
    *,
    counts: Sequence[int] | Tensor | None = None,
    eval_policy: str = "none",
    recipe: Recipe | None = None,
    state: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
    plain: bool = True,
) -> Path:
    """Write the folder that timm.create_model("local-dir:...", pretrained=True) and from_pretrained read.

    input_size: (3, H, W) of the images evaluated. counts: (K,) training images of each class. state: the method's
    tensors besides the net. about: what else rescom.json should tell (plain JSON). plain=False leaves out timm's part.
    Raises ValueError where class_names are not as many as the classes, and for a net whose classifier timm has no
    place for (nothing is written then: export with plain=False, for from_pretrained alone).
    """
    folder = Path(folder)
    classes = net.classifier.out_features
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names were given for a net of {classes} classes")
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    head = None
    model = _plain(net, input_size) if plain else None
    if model is not None:
        head = _head(model, net)
        own = ("projector.",) if type(net.classifier) is nn.Linear else ("projector.", "classifier.")
        tensors = {name: value for name, value in tensors.items() if name.startswith(own)}
    method = {f"method.{name}": value for name, value in (state or {}).items()}
    details = {
        "version": 1,
        **_recreate(net),
        "head": head,
        "class_names": list(class_names),
        "counts": None if counts is None else [int(count) for count in counts],
        "input_size": list(input_size),
        "eval_policy": parse(eval_policy).text or "none",
        **(about or {}),
    }
    with aside_folder(folder, WRITTEN) as new:
        if model is not None:
            _save_plain(model, net, new, class_names, input_size, eval_policy)
        write_tensors(new / SIDE, {**tensors, **method}, {"format": "pt"})
        write_json(new / DETAILS, details)
        if recipe is not None:
            write_text(new / "recipe.yaml", recipe.to_yaml())
        write_json(new / HASHES, {name: sha256(new / name) for name in WRITTEN if (new / name).exists()})
    return folder


def describe(run: Path, data: Data, views: ViewsConfig) -> None:
    """Write classes.json into a run's folder: what a checkpoint alone does not tell about the classifier."""
    image = ViewsDataset(data.test, parse(views.eval, views.mean), None)[0, 0]["image"]
    record = {
        "class_names": list(data.class_names),
        "counts": [int(count) for count in data.counts],
        "input_size": list(image.shape),
    }
    write_json(run / "classes.json", record, indent=None)


def export_run(run: str | Path, folder: str | Path, which: str = "best", plain: bool = True) -> Path:
    """Export a checkpoint of a run's folder: which = "best" (the last where none was selected), "last", or its name.

    Raises FileNotFoundError where the run holds no checkpoint or no classes.json, ValueError as export does.
    """
    run = Path(run)
    path, tensors, state = _checkpoint(run, which)
    try:
        classes = json.loads((run / "classes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{run} holds no classes.json, so its class names are not known: go on with --resume once to write it"
        ) from None
    recipe = load_dict(state["recipe"], str(path))
    net = build_net(recipe.net.untrained(), recipe.views, len(classes["class_names"]))
    net = create_method(net, torch.tensor(classes["counts"]), recipe.method).net.eval()  # its classifier may be its own
    net.load_state_dict(tensors)
    progress = {name: state["progress"].get(name) for name in ("epoch", "step", "seconds", "best", "best_epoch")}
    return export(
        net, folder, classes["class_names"], tuple(classes["input_size"]), counts=classes["counts"],
        eval_policy=recipe.views.eval, recipe=recipe, state=state["method"], plain=plain,
        about={"name": recipe.name, "checkpoint": path.name, "progress": progress},
    )  # fmt: skip


def save_model(run: Path) -> str:
    """Export a run's best checkpoint to RUN/model, at the end of its training; returns what to tell about it. Raises
    what export_run does where no model could be written."""
    try:
        folder = export_run(run, run / "model")
        return f'saved: {run}; plain timm model: timm.create_model("local-dir:{folder}", pretrained=True)'
    except ValueError as error:
        export_run(run, run / "model", plain=False)
        return f'saved: {run}; only rescom_timm.from_pretrained("{run}") can read the model: {error}'


def _checkpoint(run: Path, which: str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    if which not in ("best", "last"):
        path = run / "checkpoints" / which
        if not path.is_dir():
            there = ", ".join(found.name for found in checkpoint.listed(run / "checkpoints")) or "none"
            raise FileNotFoundError(f"{run} holds no checkpoint {which!r}; there: {there}, and best and last")
        return path, *checkpoint.load(path)
    newest = checkpoint.newest(run / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"{run} holds no checkpoint: is it a run's folder, and has it come to its first save?")
    best = newest[2]["progress"].get("best_checkpoint")
    if which == "best" and best not in (None, newest[0].name):
        try:
            return run / "checkpoints" / best, *checkpoint.load(run / "checkpoints" / best)
        except checkpoint.CheckpointError as error:
            warnings.warn(f"the best checkpoint cannot be read, the last is taken: {error}", stacklevel=3)
    return newest


def _plain(net: Net, input_size: tuple[int, int, int]) -> nn.Module:
    """net.to_timm(), its logits compared once more on images of the size that is really used."""
    model = net.to_timm()
    own = copy.deepcopy(net).cpu().float().eval()
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.allclose(model(images), own.classify(images), rtol=1e-3, atol=1e-4):
            raise ValueError(f"the plain timm model gives other logits on images of {input_size}; not exported")
    return model


def _head(model: nn.Module, net: Net) -> str:
    """The name of the layer of a plain model that holds the net's classifier."""
    own: Any = net.classifier
    weight = (own.as_linear() if hasattr(own, "as_linear") else own).weight.detach().cpu().float()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and torch.equal(module.weight.flatten(1), weight):
            return name
    raise ValueError("the plain timm model holds the classifier in no single layer; not exported")


def _save_plain(
    model: Any, net: Net, folder: Path, class_names: Sequence[str], size: tuple[int, int, int], eval_policy: str
) -> None:
    source = model.pretrained_cfg
    model.pretrained_cfg = {name: source[name] for name in KEPT if name in source}
    mean, std = (tuple(buffer.flatten().tolist()) for buffer in (net.mean, net.std))
    save_for_hf(
        model,
        str(folder),
        safe_serialization=True,
        model_config={"label_names": list(class_names)},
        data_config={"input_size": size, "mean": mean, "std": std, **_timm_view(eval_policy, size[-1])},
    )
    (folder / PLAIN).chmod((folder / "config.json").stat().st_mode)  # safetensors does not ask the umask


def _timm_view(policy: str, size: int) -> dict[str, Any]:
    """The evaluation policy in timm's words, so that timm's own transform prepares images as ours."""
    text = parse(policy).text
    if match := re.fullmatch(rf"resize\((\d+),(\w+)\) \| center_crop\({size}\)", text):
        resized, interpolation = int(match[1]), match[2]
        crop = size / resized
        while math.floor(size / crop) < resized:  # timm rounds size / crop_pct down
            crop = math.nextafter(crop, 0)
        return {"crop_pct": crop, "interpolation": interpolation, "crop_mode": "center"}
    if match := re.fullmatch(rf"upscale\({size},(\w+)\)", text):
        return {"crop_pct": 1.0, "interpolation": match[1], "crop_mode": "squash"}
    return {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "center"}


def _recreate(net: Net) -> dict[str, Any]:
    """What create_model needs to make the net again."""
    made: dict[str, Any] = {} if net.recreate is None else dict(net.recreate)
    encoder: Any = net.encoder
    name = getattr(encoder, "pretrained_cfg", {}).get("architecture") or made.get("model_name")
    if name is None:
        raise ValueError("the encoder is no timm model: only nets of rescom_timm.create_model can be exported")
    options = {**made, **getattr(encoder, "_model_args", {})}  # timm's record includes those of hf-hub: and local-dir:
    for key in ("model_name", "num_classes"):
        options.pop(key, None)
    hidden, dim = net.projector[0], net.projector[-1]
    return {
        "backbone": name,
        "options": options,
        "projector": {"hidden": hidden.out_features, "dim": dim.out_features},
        "mean": net.mean.flatten().tolist(),
        "std": net.std.flatten().tolist(),
    }


# ------------------------------------------------------------------------------------------------------------- reading


def from_pretrained(source: str | Path, num_classes: int | None = None) -> Pretrained:
    """A trained net with everything needed to use it or to train on.

    source: an exported folder, a run's folder (its best checkpoint), or a Hub id such as "me/rescom-r50", which may
    end in "@revision". num_classes: start on other classes, with a fresh classifier and an empty queue.
    Raises FileNotFoundError where there is no such folder or repository or it cannot be reached, and ValueError where
    it was not made by rescom_timm or its files are not what was written.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    local = Path(source).expanduser()
    repo = as_repo(source)
    if repo is not None and (not local.is_dir() or str(source) != str(local)):
        try:
            return _read(_download(repo), num_classes)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; and there is no folder {local} here") from error
    if (local / DETAILS).is_file():
        return _read(local, num_classes)
    if (local / "model" / DETAILS).is_file():
        return _read(local / "model", num_classes)
    if (local / "checkpoints").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            return _read(export_run(local, folder, plain=False), num_classes)
    if local.is_dir():
        raise ValueError(
            f"{local} is neither a run's folder nor one exported by rescom_timm (it holds no {DETAILS}); a plain timm "
            f'folder is read by timm.create_model("local-dir:{local}", pretrained=True)'
        )
    raise FileNotFoundError(f"no folder {local}: give a folder or a Hub id such as me/rescom-r50")


def _download(repo: str) -> Path:
    """The files of a repository, downloaded a second time where they are not what was pushed."""
    names = [DETAILS, HASHES, SIDE, "config.json", PLAIN, "recipe.yaml"]
    folder = download(repo, names, needed=DETAILS)
    if damaged(folder):
        folder = download(repo, names, needed=DETAILS, force=True)
    return folder


def damaged(folder: Path) -> list[str]:
    """The files that are not what hashes.json says. Raises ValueError where that file itself cannot be read."""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        return [
            name for name, value in hashes.items() if not (folder / name).exists() or sha256(folder / name) != value
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder / HASHES} cannot be read ({error}), so the files beside it cannot be trusted"
        ) from None


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
        tensors = load_file(folder / SIDE)
        state = {name.removeprefix("method."): tensors.pop(name) for name in list(tensors) if name[:7] == "method."}
        net = create_model(
            details["backbone"], len(details["class_names"]), projector=ProjectorConfig(**details["projector"]),
            mean=tuple(details["mean"]), std=tuple(details["std"]), **details["options"],
        )  # fmt: skip
        if details["head"] is not None:
            tensors = {**_from_plain(net, folder / PLAIN, details["head"]), **tensors}
        names, counts = details["class_names"], details["counts"] and torch.tensor(details["counts"])
        recipe = _recipe(folder / "recipe.yaml")
        trained = None
        if num_classes is not None:
            net.classifier = nn.Linear(net.classifier.in_features, num_classes)
            names, counts = [], None
            tensors = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
            tensors |= {f"classifier.{name}": value for name, value in net.classifier.state_dict().items()}
        elif recipe is not None and counts is not None:
            trained = create_method(net, counts, recipe.method)
            net = trained.net
            own = {k: v for k, v in trained.state_dict().items() if not k.startswith("net.") and k in state}
            check_weights(state, own, "the method")
            trained.load_state_dict(state, strict=False)
        check_weights(tensors, net.state_dict(), "the model")
        net.load_state_dict(tensors)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        fresh = " with a fresh classifier" if num_classes is not None else ""
        what = f"no {error} in {DETAILS}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder} cannot be read{fresh}: {what}") from error
    return Pretrained(net.eval(), names, counts, size, details["eval_policy"], recipe, trained)


def _from_plain(net: Net, path: Path, head: str) -> dict[str, Tensor]:
    """Encoder and classifier of a plain timm file, under the names of a Net."""
    with safe_open(path, framework="pt") as file:
        tensors = {f"encoder.{name}": file.get_tensor(name) for name in net.encoder.state_dict()}
        for name, own in net.classifier.state_dict().items():
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


# ---------------------------------------------------------------------------------------------------------------- ONNX


class _Classifier(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.encoder, self.classifier = net.encoder, net.classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(images))


def export_onnx(source: Pretrained | str | Path, path: str | Path) -> Path:
    """Write a classifier as ONNX: `images` float32 (N, 3, H, W), already normalised, to `logits` (N, K), any N.

    Class names, mean, std and the evaluation policy are in the file's metadata. The logits are compared with
    onnxruntime's. Raises ImportError without the extra (pip install rescom-timm[onnx]), and ValueError where the net
    cannot be exported or the logits differ (no file is left then).
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ImportError("ONNX export needs more packages: pip install 'rescom-timm[onnx]'") from error
    model = source if isinstance(source, Pretrained) else from_pretrained(source)
    path = Path(path)
    net = _Classifier(copy.deepcopy(model.net)).cpu().float().eval()
    images = torch.randn(3, *model.input_size, generator=torch.Generator().manual_seed(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns about itself
            torch.onnx.export(
                net, (images,), path, dynamo=True, input_names=["images"], output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, external_data=False, verbose=False,
            )  # fmt: skip
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"this net cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
    written = onnx.load(path)
    record = {
        "class_names": json.dumps(model.class_names),
        "mean": json.dumps(model.net.mean.flatten().tolist()),
        "std": json.dumps(model.net.std.flatten().tolist()),
        "eval_policy": model.eval_policy,
    }
    onnx.helper.set_model_props(written, record)
    onnx.save(written, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        with torch.no_grad():
            own = net(batch)
        (theirs,) = session.run(None, {"images": batch.numpy()})
        if not torch.allclose(torch.from_numpy(theirs), own, rtol=1e-3, atol=1e-4):
            path.unlink()
            raise ValueError("the ONNX model gives other logits than the net; not exported")
    return path
