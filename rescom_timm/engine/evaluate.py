"""Evaluation of a net on a split; its metrics as files and tables."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rescom_timm.class_names import rows_of
from rescom_timm.config.loading import UNREAD_KEYS, differences, flat
from rescom_timm.config.recipe import Recipe, SpeedConfig
from rescom_timm.data.loaders import eval_loader
from rescom_timm.data.progress import image_bar
from rescom_timm.data.samples import Batch
from rescom_timm.data.sources import Data, numbered_as, test_alone
from rescom_timm.data.sources import load as load_data
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import parse
from rescom_timm.distributed import processes
from rescom_timm.engine import checkpoint, logits
from rescom_timm.engine.build import Weights, base_net, build_method, chosen_weights, speed_up, whole_weights
from rescom_timm.engine.checkpoint import SavedState
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.engine.logits import Keeper
from rescom_timm.engine.own import NOTHING, Own
from rescom_timm.engine.run_folder import CHANGED, run_recipe
from rescom_timm.errors import InputError
from rescom_timm.io import read_json, refuse_links, write_json, write_tensors
from rescom_timm.metrics import DRAWS, LIMITS, Limits, Meter, span
from rescom_timm.models.net import Net, check_weights


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, net: nn.Module, loader: DataLoader[Batch] | Sequence[DataLoader[Batch]],
    counts: np.ndarray, limits: Limits = LIMITS, keeper: Keeper | None = None, own: Own = NOTHING,
) -> Meter:  # fmt: skip
    """Every image of a prepared evaluation loader once, encoder and classifier only.

    loader: or several of the same images in other views, whose logits are averaged. counts: (K,) training images of
    each class, which with the limits (evaluation.group_limits) decide many, medium and few. Every process gets the
    whole Meter. keeper: is given all logits. own: further metrics.
    """
    loaders = [loader] if isinstance(loader, DataLoader) else loader
    plain: Net = accelerator.unwrap_model(net)
    meter = Meter(len(counts), torch.as_tensor(counts), limits=limits)
    collector = own.collector()
    takers = [one for one in (meter, keeper, collector) if one is not None]
    was_training = plain.training
    plain.eval()
    with agreed_statistics(plain), image_bar(len(loaders[0].dataset), "evaluation") as bar:  # type: ignore[arg-type]
        for batches in zip(*loaders, strict=True):
            with accelerator.autocast():
                found = [plain.classify(batch["image"]) for batch in batches]
            mean = found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)
            gathered = accelerator.gather_for_metrics((mean, batches[0]["label"]))
            for one in takers:
                one.update(*gathered)
            bar.update(len(gathered[1]))
    plain.train(was_training)
    own.add_to(meter, collector)
    return meter


def five_crops(policy: str) -> list[str]:
    """The five views policies of LIFT's test-time ensembling (Shi et al. 2024, arXiv 2309.10019).

    The shorter side is resized to 248/224 of R for crops of R, four in the corners and one in the middle. policy:
    views.eval. Raises InputError if it does not end in center_crop(R).
    """
    text = parse(policy).text
    end = re.search(r"(?:^|\| )center_crop\((\d+)\)$", text)
    if end is None:
        raise InputError(
            "recipe.conflict", f"--five-crops needs views.eval to end in center_crop(R), not {text or 'none'!r}"
        )
    size, resized = int(end[1]), re.search(r"resize\(\d+,(\w+)\)", text)
    first = f"resize({size + max(1, round(size * 24 / 224))},{resized[1] if resized else 'bilinear'})"
    crops = [f"corner_crop({size},{corner})" for corner in range(4)]
    return [f"{first} | {crop}" for crop in (*crops, f"center_crop({size})")]


@contextmanager
def agreed_statistics(net: nn.Module) -> Iterator[None]:
    """BatchNorm statistics averaged over all processes, for evaluation and saving; restored afterwards."""
    if processes()[1] == 1:
        yield
        return
    saved = net.state_dict()
    shared = [b for name, b in net.named_buffers() if name in saved and b.is_floating_point()]
    own = [buffer.clone() for buffer in shared]
    for buffer in shared:
        dist.all_reduce(buffer)
        buffer.div_(processes()[1])
    try:
        yield
    finally:
        for buffer, value in zip(shared, own, strict=True):
            buffer.copy_(value)


def write(folder: Path, name: str, meter: Meter, about: Mapping[str, object], keeper: Keeper | None = None) -> None:
    """Write evaluation/<name>.json (what was evaluated, metrics, per class) and .safetensors (predictions).

    keeper: writes logits/<name>.safetensors (`logits`).
    """
    refuse_links(folder, ["evaluation"])
    if keeper is not None:
        keeper.write(logits.place(folder, name))
    folder = folder / "evaluation"
    write_tensors(folder / f"{name}.safetensors", meter.predictions())
    write_json(folder / f"{name}.json", {**about, **meter.record()})


def table(rows: Mapping[str, Mapping[str, float]], beside: Mapping[str, Mapping[str, Mapping[str, str]]] = {}) -> str:
    """Figures in percent, one line an evaluation, ready to print.

    Where the evaluations have long names, each on a line of its own above its metrics, to fit a terminal.
    beside: further lines below an evaluation's, label -> {figure: text}.
    """
    if not rows:
        return "nothing is evaluated"
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    texts = [text for lines in beside.values() for line in lines.values() for text in line.values()]
    widths = {name: max(9, *(2 + len(text) for text in (name, *texts))) for name in names}
    longest, below = max(map(len, rows)), max((2 + len(name) for lines in beside.values() for name in lines), default=0)
    first, above = (max(longest, below) + 2, "") if longest <= 24 else (below + 2, "\n")
    lines = [" " * first + "".join(f"{name:>{widths[name]}}" for name in names)]
    for row, figures in rows.items():
        described = {row if not above else "": {name: f"{value:.2f}" for name, value in figures.items()}}
        lines += [row] if above else []
        for label, line in (described | {f"  {name}": line for name, line in beside.get(row, {}).items()}).items():
            lines.append(f"{label:<{first}}" + "".join(f"{line.get(name, '-'):>{widths[name]}}" for name in names))
    return "\n".join(lines)


def table_of(meters: Mapping[str, Meter], draws: int = DRAWS) -> str:
    """`table` of evaluations with the interval, images and classes of each metric."""
    beside = {}
    for row, meter in meters.items():
        sizes = meter.sizes()
        beside[row] = {
            "95%": {name: span(ends) for name, ends in meter.intervals(draws=draws).items()},
            "images": {name: f"{size['images']:,}" for name, size in sizes.items()},
            "classes": {name: f"{size['classes']:,}" for name, size in sizes.items()},
        }
    return table({row: meter.compute() for row, meter in meters.items()}, beside)


def file_name(split: str, which: str, weights: Weights) -> str:
    """Of an evaluation: <split>-<checkpoint>, with -ema for averaged weights."""
    return f"{split}-{which}" if weights == "raw" else f"{split}-{which}-{weights}"


def about(split: Split, which: str, chosen: str, class_names: list[str], weights: Weights = "raw") -> dict[str, object]:
    """What a printed metric needs beside it: split, checkpoint and how the checkpoint was chosen."""
    return {
        "split": split.name,
        "images": len(split.labels),
        "checkpoint": which if weights == "raw" else f"{which}, averaged weights",
        "chosen": chosen,
        "class_names": class_names,
        "data": digest_of(split),
    }


def title(about: Mapping[str, object]) -> str:
    """The line above the table of an evaluation, from its record."""
    return f"{about['split']}, {about['images']} images, checkpoint {about['checkpoint']}: {about['chosen']}"


def open_checkpoint(run: Path, which: str, select: str) -> tuple[Path, dict[str, Tensor], SavedState, str]:
    """(path, net, state, how it was chosen) of a run's checkpoint.

    which: "last", "best" (by `select` on validation), its name or its folder. Raises CheckpointError if it is missing
    or damaged, InputError if the run has no best one.
    """
    return checkpoint.whole_read(run / "checkpoints", lambda: _open_checkpoint(run, which, select))


def _open_checkpoint(run: Path, which: str, select: str) -> tuple[Path, dict[str, Tensor], SavedState, str]:
    folder = run / "checkpoints"
    named = folder / which if (folder / which).is_dir() else Path(which)
    if which not in ("last", "best") and not named.is_dir():
        there = ", ".join(["last", "best", *(one.name for one in checkpoint.listed(folder))])
        raise checkpoint.CheckpointError("checkpoint.missing", f"no checkpoint {which}; there are: {there}")
    found = checkpoint.newest(folder) if which in ("last", "best") else (named, *checkpoint.load(named))
    if found is None:
        raise checkpoint.CheckpointError("checkpoint.missing", f"no checkpoint in {folder}: the run was never saved")
    with checkpoint.consistent(found[0]):
        progress = found[2]["progress"]
        epoch, best_epoch, best_name = (progress[key] for key in ("epoch", "best_epoch", "best_checkpoint"))
    if which != "best":
        origin = None if epoch else found[2]["recipe"].get("origin")
        return *found, str(origin or f"after epoch {epoch}, not selected")
    if best_name is None:
        raise InputError(
            "checkpoint.missing",
            f"{run} has no best checkpoint: its recipe sets no data.validation",
        )
    best = folder / best_name
    return best, *checkpoint.load(best), f"epoch {best_epoch}, best {select} on validation"


def evaluated_otherwise(
    own: Recipe, recipe: Recipe, read: str, run: str | None = None
) -> tuple[dict[str, object], str, str]:
    """How an evaluation differs from the run's own: (keys and values, the same as text, suffix of the file's name).

    All three are empty if nothing differs; the suffix keeps other evaluations from being replaced. read: digest of what
    is evaluated on (`digest_of`). run: that of the run's own evaluation, if it is known.
    """
    now = flat(recipe.to_dict())
    changed: dict[str, object] = {
        key: now.get(key) for key in differences(own.to_dict(), recipe.to_dict(), UNREAD_KEYS)
    }
    if not changed and run in (None, read):
        return {}, "", ""
    changed = changed or {"data": read}
    described = " ".join(f"{key}={value}" for key, value in changed.items())
    digest = hashlib.sha256(f"{described} {read}".encode()).hexdigest()
    return changed, f"evaluated with {described}", f"{CHANGED}{digest[:8]}"


def digest_of(split: Split) -> str:
    """Digest of a split's labels and of a sample of its images, as they are stored."""
    digest = hashlib.sha256(np.asarray(split.labels, dtype=np.int64).tobytes())
    for position in np.unique(np.linspace(0, len(split.labels) - 1, 16).astype(int)) if len(split.labels) else ():
        first, second = (_stored(split.dataset[int(position)]["image"]) for _ in range(2))
        digest.update(first if first == second else b"random")  # of a data set whose own transform draws
    return digest.hexdigest()[:16]


def _stored(image: Any) -> bytes:
    if not isinstance(image, Mapping):
        return np.asarray(image).tobytes()
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    try:
        return Path(image["path"]).read_bytes()
    except (OSError, ValueError, TypeError):
        return str(image.get("path")).encode()


def _digest_then(run: Path, name: str, split: Split) -> str | None:
    """`digest_of` what an evaluation saw, an older one by its labels; None if there is no such evaluation."""
    path = run / "evaluation" / f"{name}.json"
    if not path.is_file():
        return None
    if (found := read_json(path).get("data")) is not None:
        return str(found)
    try:
        labels = load_file(path.with_suffix(".safetensors"))["labels"]
    except (OSError, LookupError, SafetensorError):
        return None
    return digest_of(split) if np.array_equal(labels, split.labels) else "other labels"


def data_of(run: Path, own: Recipe, recipe: Recipe, class_names: Sequence[str] | None) -> Data:
    """The data of a recipe, with classes numbered as in a run and the counts that the run was trained on.

    Those counts decide which classes are many, medium and few, whatever the run is evaluated on. Where the recipe names
    other data than the run's own, with one split to train and to test on, there is no training split.
    """
    if recipe.data == own.data or recipe.data.train != recipe.data.test:
        data = numbered_as(load_data(recipe.data), class_names, str(run))
        counts = _trained_counts(run, data.class_names)
        return data if counts is None else replace(data, counts=counts)
    counts = _trained_counts(run, class_names)
    if counts is None:
        raise InputError(
            "data.classes",
            f"{run / 'classes.json'} is missing or has other classes: data.train must name another split",
        )
    return test_alone(recipe.data, class_names or [str(k) for k in range(len(counts))], counts)


def _trained_counts(run: Path, class_names: Sequence[str] | None) -> np.ndarray | None:
    """Training images (K,) of a run's classes; None if classes.json is missing, damaged or of other classes."""
    try:
        record = read_json(run / "classes.json")
        counts = np.asarray(record["counts"], dtype=np.int64)
        rows = rows_of(class_names, record.get("class_names"), str(run), str(run / "classes.json"))
    except (OSError, LookupError, TypeError, AttributeError, ValueError):
        return None
    counts = counts if rows is None else counts[rows]
    return counts if counts.shape == (len(class_names or counts),) else None


def evaluate_run(
    run: Path, which: str = "last", split: str = "test", overrides: Sequence[str] = (), crops: bool = False,
    weights: Weights = "raw", own: Own = NOTHING,
) -> tuple[str, str, Meter]:  # fmt: skip
    """Evaluate a checkpoint of a run and write evaluation/<split>-<which>: (its name, its title, its figures).

    which: "last", "best" (on validation), or the name or folder of a checkpoint. split: "test" or "validation".
    overrides: key=value over the run's own recipe; where they change what is evaluated, they stand in the record,
    whose name ends in -changed- and a digest of them and of the data, so that the run's own figures stay; so it does
    where labels or images are no longer those of the run's own evaluation. Classes are matched by name. crops: average
    the logits of `five_crops`; the name then ends in -five-crops. weights: "ema" are the averaged ones of train.ema.
    own: further metrics. Raises RecipeError, CheckpointError or ValueError.
    """
    own_recipe = run_recipe(run)
    recipe = run_recipe(run, overrides) if overrides else own_recipe
    path, tensors, state, chosen = open_checkpoint(run, which, recipe.evaluation.select)
    taken = chosen_weights(weights, tensors, state, path)
    data = data_of(run, own_recipe, recipe, checkpoint.class_names(path, state))
    part = {"test": data.test, "validation": data.validation}[split]
    if part is None:
        rule = getattr(recipe.data, split)
        raise InputError(
            "data.split", f"the recipe of {run} has no {split} split (data.{split}: {rule}): take another --split"
        )
    accelerator = new_accelerator(recipe.train.precision)
    method = build_method(replace(recipe, net=base_net(recipe, state)), data).to(accelerator.device)
    load_net(method.net, whole_weights(method.net, taken, state, path), path)
    speed_up(method.net, SpeedConfig(channels_last=recipe.speed.channels_last))  # rounded as in training
    policies = five_crops(recipe.views.eval) if crops else [recipe.views.eval]
    loaders = []
    for policy in policies:
        views = replace(recipe.views, eval=policy)
        batches = eval_loader(part, views, recipe.evaluation.batch_size, recipe.loader, recipe.speed, len(policies))
        loaders.append(accelerator.prepare(batches))
    keeper = Keeper(len(part.labels), len(data.counts))
    own = replace(own, select=recipe.evaluation.select)
    meter = evaluate(accelerator, method.net, loaders, data.counts, recipe.evaluation.group_limits, keeper, own)
    label = which if which in ("last", "best") else path.name
    record = about(part, label, chosen, data.class_names, weights)
    name = file_name(split, label, weights)
    then = next(filter(None, (_digest_then(run, one, part) for one in (name, file_name(split, "last", "raw")))), None)
    changed, described, suffix = evaluated_otherwise(own_recipe, recipe, digest_of(part), then)
    if changed:
        record |= {"overrides": changed, "chosen": f"{chosen}; {described}"}
        name += suffix
    if crops:
        record |= {"chosen": f"{record['chosen']}; mean of five crops", "views": policies}
        name += "-five-crops"
    write(run, name, meter, record, keeper)
    return name, title(record), meter


def load_net(net: Net, weights: Mapping[str, Tensor], path: Path) -> None:
    """The weights of a checkpoint into a net.

    Raises CheckpointError, naming them, where they are another net's or not numbers.
    """
    try:
        check_weights(weights, net.state_dict(), str(path))
    except ValueError as error:
        message = f"{error}; is it the net that the recipe says?"
        raise checkpoint.CheckpointError("checkpoint.differs", message) from None
    net.load_state_dict(dict(weights))
