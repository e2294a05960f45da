"""Export of a trained net: one folder that timm and rescom_timm read.

    config.json, model.safetensors      for timm: the classifier, label names, input size, mean and std
    rescom.json, rescom.safetensors     for rescom_timm also: classes, evaluation policy, projector, queue
    recipe.yaml                         how it was trained
    hashes.json                         sha256 of these files, checked on reading

If timm has no classifier for the net, there is no config.json, and rescom.safetensors holds the whole net.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn

from rescom_timm.config.loading import load_dict
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.decoding import ReadConfig
from rescom_timm.data.samples import ViewsDataset
from rescom_timm.data.sources import Data
from rescom_timm.data.transforms import MAX_SIDE, parse
from rescom_timm.engine import checkpoint, logits
from rescom_timm.engine.build import Weights, base_net, build_net, chosen_weights, refuse_queue, whole_weights
from rescom_timm.engine.evaluate import file_name, load_net
from rescom_timm.engine.run_folder import run_recipe
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.inference.decisions import even_shift, fitted_temperature, kept_sets
from rescom_timm.inference.rules import operating_point, read_matrix
from rescom_timm.io import atomic_folder, read_json, sha256, write_json, write_tensors, write_text
from rescom_timm.methods import create_method
from rescom_timm.models.classifiers import Cosine
from rescom_timm.models.net import Net, same_logits
from rescom_timm.models.tuning import TuningConfig

HASHES, DETAILS, SIDE, PLAIN = "hashes.json", "rescom.json", "rescom.safetensors", "model.safetensors"
WRITTEN = ("config.json", PLAIN, SIDE, DETAILS, "recipe.yaml", HASHES)
"""Files of an export; other files in its folder are kept."""
RANKS_ALIKE = "which ranks classes as trained, but with other probabilities than the cosine classifier's: those give"
KEPT = (
    "architecture", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std",
    "num_classes", "pool_size", "first_conv", "classifier",
)  # fmt: skip
"""Fields of timm's pretrained_cfg that still hold after training."""


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
    about: Mapping[str, object] | None = None,
    plain: bool = True,
    reading: ReadConfig | None = None,
) -> Path:
    """Write the folder that timm.create_model("local-dir:...", pretrained=True) and from_pretrained read.

    input_size: (3, H, W) of the images evaluated. counts: (K,) training images of each class. state: the method's
    tensors besides the net. about: further fields of rescom.json (plain JSON). plain=False leaves out timm's part.
    reading: how images are read before the evaluation policy; None: as in the recipe's loader, or the default.
    Raises InputError: model.classes if class_names does not have K names, net.export for a net whose classifier timm
    does not support (nothing is written then; plain=False exports for from_pretrained only).
    """
    folder = Path(folder)
    reading = reading or (ReadConfig() if recipe is None else recipe.loader.reading)
    classes = net.classifier.out_features
    if len(class_names) != classes:
        message = f"{len(class_names)} class names were given for a net of {classes} classes"
        raise InputError("model.classes", message)
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    head = None
    model = _plain(net, input_size) if plain else None
    if model is not None:
        head = _head(model, net)
        there = ("encoder.", "classifier.") if type(net.classifier) is nn.Linear else ("encoder.",)
        tensors = {name: value for name, value in tensors.items() if not name.startswith(there)}
    method = {f"method.{name}": value for name, value in (state or {}).items()}
    details = {
        "version": 1,
        **_recreate(net),
        "tuning": asdict(net.tuning if model is None else TuningConfig()),  # merged into a plain model
        "classifier": {"kind": net.head.kind, "scale": net.head.scale},
        "ranks_alike": model is not None and isinstance(net.classifier, Cosine),
        "head": head,
        "class_names": list(class_names),
        "counts": None if counts is None else [int(count) for count in counts],
        "input_size": list(input_size),
        "eval_policy": parse(eval_policy).text or "none",
        "reading": reading.record(),
        **(about or {}),
    }
    with atomic_folder(folder, WRITTEN) as new:
        if model is not None:
            _save_plain(model, net, new, class_names, input_size, eval_policy)
        write_tensors(new / SIDE, {**tensors, **method}, {"format": "pt"})
        write_json(new / DETAILS, details)
        if recipe is not None:
            write_text(new / "recipe.yaml", recipe.to_yaml())
        write_json(new / HASHES, {name: sha256(new / name) for name in WRITTEN if (new / name).exists()})
    return folder


def describe(run: Path, data: Data, recipe: Recipe) -> None:
    """Write classes.json into a run's folder: class names, counts and input size, which a checkpoint does not have."""
    policy = parse(recipe.views.eval, recipe.views.mean)
    image = ViewsDataset(data.test or data.train, policy, None, reading=recipe.loader.reading)[0, 0]["image"]
    record = {
        "class_names": list(data.class_names),
        "counts": [int(count) for count in data.counts],
        "input_size": list(image.shape),
    }
    write_json(run / "classes.json", record, indent=None)


def export_run(
    run: str | Path, folder: str | Path, which: str = "best", plain: bool = True, weights: Weights | None = None,
    recall: Mapping[str, float] | None = None, costs: Sequence[Sequence[float]] | None = None,
) -> Path:  # fmt: skip
    """Export a checkpoint of a run's folder: which = "best" (the last if none was selected), "last", or its name.

    weights: the trained ones (raw) or their average (ema); None: by train.ema.export. recall, costs: a rule to keep
    (`rules`), the recall of an operating point by class name or costs (K, K). Raises CheckpointError if it has no
    average, MissingFileError if the run has no checkpoint (checkpoint.missing) or no classes.json (model.missing),
    InputError as export.
    """
    run = Path(run)
    path, tensors, state = _checkpoint(run, which)
    try:
        classes = read_json(run / "classes.json")
    except FileNotFoundError:
        raise MissingFileError(
            "model.missing",
            f"{run} holds no classes.json, so its class names are not known: continue with --resume once to write it",
        ) from None
    check_described(classes, run / "classes.json")
    names, counts, size = (classes[name] for name in ("class_names", "counts", "input_size"))
    if len(names) > (most := sum(value.numel() for value in tensors.values())):
        message = f"{run / 'classes.json'} names {len(names):,} classes, but the checkpoint has only {most:,} weights"
        raise InputError("model.details", message)
    with checkpoint.consistent(path):
        recipe = load_dict(state["recipe"], str(path))
        if weights is None:
            weights = _exported(recipe)
        net = build_net(base_net(recipe, state), recipe.views, len(names))
        refuse_queue(recipe, len(names))
        net = create_method(net, torch.tensor(counts), recipe.method).net.eval()  # a method may replace the classifier
        load_net(net, whole_weights(net, chosen_weights(weights, tensors, state, path), state, path), path)
        progress = {name: state["progress"].get(name) for name in ("epoch", "step", "seconds", "best", "best_epoch")}
        method = state["method"]
    return export(
        net, folder, names, tuple(size), counts=counts,
        eval_policy=recipe.views.eval, recipe=recipe, state=method, plain=plain,
        about={"name": recipe.name, "checkpoint": path.name, "weights": weights, "progress": progress}
        | _decisions(run, which, weights, recipe, torch.tensor(counts), names, recall)
        | ({} if costs is None else {"costs": read_matrix(costs, len(names)).record()}),
    )  # fmt: skip


def kept_validation(run: Path, which: str = "best", weights: Weights | None = None) -> logits.Logits:
    """The kept logits of a checkpoint's validation images; arguments as in export_run.

    Raises InputError: data.split where there are none, run.evaluation if they cannot be read.
    """
    weights = weights or _exported(run_recipe(run))
    names = [file_name("validation", one, weights) for one in (("best", "last") if which == "best" else (which,))]
    for name in names:
        if logits.place(run, name).is_file():
            return logits.read(run, name)
    raise InputError(
        "data.split",
        f"{run} has no kept logits of validation images: train it with data.validation=holdout(0.1), or run "
        f"rescom-timm evaluate {run} --split validation",
    )


def _exported(recipe: Recipe) -> Weights:
    return "ema" if recipe.train.ema is not None and recipe.train.ema.export else "raw"


def _decisions(
    run: Path, which: str, weights: Weights, recipe: Recipe, counts: Tensor, names: Sequence[str],
    recall: Mapping[str, float] | None,
) -> dict[str, Any]:  # fmt: skip
    """Fields of rescom.json from validation images: temperature, prediction sets, operating point. {} without them."""
    try:
        found, labels = kept_validation(run, which, weights).whole()
    except InputError as error:
        if recall or error.code != "data.split":
            raise
        return {}
    even = even_shift(recipe, counts, len(counts))
    temperature = round(fitted_temperature(found + even.float(), labels), 4)
    made: dict[str, Any] = {"temperature": temperature, "sets": kept_sets(found, labels, even, temperature)}
    return made | ({"operating_point": operating_point(found, labels, recall, names).record()} if recall else {})


def check_described(details: Mapping[str, object], place: object, counted: bool = True) -> None:
    """Check class_names (K,), counts (K,) and input_size (3,) of a JSON file; place: its name, for messages.

    counted: counts may not be None. Raises InputError (model.details).
    """
    names, counts, size = (details.get(name) for name in ("class_names", "counts", "input_size"))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError("model.details", f"class_names in {place} must be a list of names")
    if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int and 1 <= n <= MAX_SIDE for n in size):
        message = f"input_size in {place} must be three numbers from 1 to {MAX_SIDE}, not {size!r}"
        raise InputError("model.details", message)
    if counts is None and not counted:
        return
    if not isinstance(counts, list) or len(counts) != len(names) or not all(map(_is_count, counts)):
        message = f"counts in {place} must be a whole number above 0 for each of the {len(names)} classes"
        raise InputError("model.details", message)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**53


def save_model(run: Path) -> str:
    """Export a run's best checkpoint to RUN/model after its training; returns a line to print.

    Raises as export_run if no model can be written.
    """
    try:
        folder = export_run(run, run / "model")
        saved = f'saved: {run}; plain timm model: timm.create_model("local-dir:{folder}", pretrained=True)'
        if read_json(folder / DETAILS)["ranks_alike"]:
            saved += f", {RANKS_ALIKE} rescom_timm.from_pretrained"
        return saved
    except ValueError as error:
        export_run(run, run / "model", plain=False)
        return f'saved: {run}; only rescom_timm.from_pretrained("{run}") can read the model: {error}'


def _checkpoint(run: Path, which: str) -> tuple[Path, dict[str, Tensor], checkpoint.SavedState]:
    if which not in ("best", "last"):
        path = run / "checkpoints" / which
        if not path.is_dir():
            there = ", ".join(found.name for found in checkpoint.listed(run / "checkpoints")) or "none"
            message = f"{run} has no checkpoint {which!r}; it has {there}, and best and last"
            raise MissingFileError("checkpoint.missing", message)
        return path, *checkpoint.load(path)
    folder = run / "checkpoints"

    def read(which: str) -> tuple[Path, dict[str, Tensor], checkpoint.SavedState]:
        newest = checkpoint.newest(folder)
        if newest is None:
            message = f"{run} holds no checkpoint: name a run's folder, or wait for its first checkpoint"
            raise MissingFileError("checkpoint.missing", message)
        best = newest[2].get("progress", {}).get("best_checkpoint")
        if which == "last" or best in (None, newest[0].name):
            return newest
        return folder / best, *checkpoint.load(folder / best)

    try:
        return checkpoint.whole_read(folder, lambda: read(which))
    except checkpoint.CheckpointError as error:
        if which == "last":
            raise
        found = read("last")
        warnings.warn(f"the best checkpoint cannot be read; using the last one: {error}", stacklevel=3)
        return found


def _plain(net: Net, input_size: tuple[int, int, int]) -> nn.Module:
    """net.to_timm(), with its logits compared on images of the evaluation size. Raises InputError (net.export)."""
    model = net.to_timm()
    own = copy.deepcopy(net).cpu().float().eval()
    if not same_logits(model, own, torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))):
        message = f"the plain timm model gives other logits on images of {input_size}; not exported"
        raise InputError("net.export", message)
    return model


def _head(model: nn.Module, net: Net) -> str:
    """The name of the layer of a plain model that holds the net's classifier."""
    own: Any = net.classifier
    weight = (own.as_linear() if hasattr(own, "as_linear") else own).weight.detach().cpu().float()
    cosine = isinstance(own, Cosine)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.flatten(1).shape == weight.shape:
            found = module.weight.flatten(1)
            if cosine and torch.allclose(F.normalize(found, dim=1), F.normalize(weight, dim=1), atol=1e-5):
                return name
            if torch.equal(found, weight):
                return name
    raise InputError("net.export", "no single layer of the plain timm model is the classifier; not exported")


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
        data_config={"input_size": size, "mean": mean, "std": std, **timm_view(eval_policy, size[-1])},
    )
    config = read_json(folder / "config.json")
    # num_classes is also a field of config.json; transformers passes both on, and timm accepts it only once.
    arguments = {key: value for key, value in config.pop("model_args", {}).items() if key != "num_classes"}
    write_json(folder / "config.json", config | ({"model_args": arguments} if arguments else {}), indent=2)
    (folder / PLAIN).chmod((folder / "config.json").stat().st_mode)  # safetensors ignores the umask


def timm_view(policy: str, size: int) -> dict[str, float | str]:
    """The evaluation policy as timm's data config, so that timm's transform prepares images as ours."""
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
    """Arguments of create_model that make the net again."""
    made: dict[str, Any] = {} if net.recreate is None else dict(net.recreate)
    encoder: Any = net.encoder
    name = getattr(encoder, "pretrained_cfg", {}).get("architecture") or made.get("model_name")
    if name is None:
        message = "the encoder is not a timm model: only nets of rescom_timm.create_model can be exported"
        raise InputError("model.export", message)
    options = {**made, **getattr(encoder, "_model_args", {})}  # timm's record includes those of hf-hub: and local-dir:
    for key in ("model_name", "num_classes"):
        options.pop(key, None)
    return {
        "backbone": name,
        "options": options,
        "projector": _projector(net),
        "mean": net.mean.flatten().tolist(),
        "std": net.std.flatten().tolist(),
    }


def _projector(net: Net) -> dict[str, int] | None:
    if not isinstance(net.projector, nn.Sequential):
        return None
    hidden: Any = net.projector[0]
    return {"hidden": hidden.out_features, "dim": net.embedding_width}
