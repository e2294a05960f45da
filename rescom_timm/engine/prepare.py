"""What the loop is handed: loaders, and the net on its devices."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader

from rescom_timm.config.recipe import EmaConfig, Recipe, RecipeError
from rescom_timm.data.broken import unreadable
from rescom_timm.data.loaders import train_loader
from rescom_timm.data.progress import image_bar
from rescom_timm.data.samples import Batch, ViewsDataset
from rescom_timm.data.sizes import check_views
from rescom_timm.data.sources import Data
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import parse
from rescom_timm.engine.build import prefers_channels_last, speed_up
from rescom_timm.engine.features import loader_of
from rescom_timm.engine.launch import prepare_to_shard
from rescom_timm.engine.nonfinite import copy_buffers, put_back
from rescom_timm.engine.own import WORST
from rescom_timm.engine.run_folder import Resume, RunElsewhere, resumed
from rescom_timm.engine.stop_signals import in_own_process_group
from rescom_timm.errors import code_of
from rescom_timm.methods import Method
from rescom_timm.methods.rescom import RescomConfig, auto_negatives
from rescom_timm.metrics import GROUPS, Meter, groups
from rescom_timm.models.net import Net
from rescom_timm.text import counted


def settled(recipe: Recipe, data: Data, resume: Resume) -> Recipe:
    """The recipe with a number where method.negatives is auto: that of the run to resume, else by K and Q.

    Earlier versions had 500 for any K and Q, so their runs keep it.
    """
    method = recipe.method
    if not isinstance(method, RescomConfig) or method.negatives != "auto":
        return recipe
    run = None if isinstance(resume, RunElsewhere) else resumed(recipe, resume)
    if run is not None and isinstance(run.method, RescomConfig):
        negatives = run.method.negatives
    else:
        negatives = auto_negatives(len(data.counts), method.queue.per_class)
    return replace(recipe, method=replace(method, negatives=negatives))


def with_memory_format(recipe: Recipe, net: Net, accelerator: Accelerator, resume: Resume) -> Recipe:
    """The recipe with true or false where speed.channels_last is null: that of the run to resume, else by the net.

    Runs of earlier versions without that key were not in channels_last, and stay so.
    """
    if recipe.speed.channels_last is not None:
        return recipe
    run = None if isinstance(resume, RunElsewhere) or not accelerator.is_main_process else resumed(recipe, resume)
    if run is not None:
        chosen = bool(run.speed.channels_last)
    else:
        chosen = prefers_channels_last(net, accelerator.device, recipe.train.precision)
    chosen = broadcast_object_list([chosen])[0]
    return replace(recipe, speed=replace(recipe.speed, channels_last=chosen))


def training_loader(recipe: Recipe, data: Data, method: Method) -> DataLoader[Batch]:
    """Batches of one forward pass. Raises RecipeError where there are fewer images than the recipe's batch."""
    loader = train_loader(
        data.train, recipe.views, method.views, recipe.train.batch_size // recipe.train.accumulate, recipe.seed,
        recipe.train.epochs, recipe.loader, recipe.speed, method.second_sampler,
    )  # fmt: skip
    if len(loader) < recipe.train.accumulate:
        raise RecipeError(
            "recipe.conflict", f"train.batch_size {recipe.train.batch_size} exceeds the images of {data.train.name}"
        )
    loader.worker_init_fn = in_own_process_group
    return loader


def to_device(accelerator: Accelerator, recipe: Recipe, method: Method) -> None:
    """The method on this process's device, ready to be sharded where FSDP is asked for, and as fast as is asked for."""
    method.to(accelerator.device)
    if accelerator.device.type == "cuda":  # so that each of several runs of one process reports its own peak
        torch.cuda.reset_peak_memory_stats()
    sharded = accelerator.is_fsdp2
    if sharded:
        prepare_to_shard(accelerator, method.net)
    # FSDP takes no weights that are not contiguous.
    speed_up(method.net, replace(recipe.speed, channels_last=recipe.speed.channels_last and not sharded))
    if method.teacher is not None:
        method.teacher.place(accelerator.device, accelerator.autocast)
        speed_up(method.teacher.net, replace(recipe.speed, compile=False))


def average_of(net: Net, config: EmaConfig) -> ModelEmaV3:
    """A moving average of the net on its device, whose frozen weights are the net's own."""
    average = ModelEmaV3(net, config.decay, use_warmup=config.warmup)
    for ours, theirs in zip(net.parameters(), average.module.requires_grad_(False).parameters(), strict=True):
        if not ours.requires_grad:
            theirs.data = ours.data
    return average


@torch.no_grad()
def check_image_size(method: Method, recipe: Recipe, train: Split, accelerator: Accelerator) -> None:
    """Forward one view through the net and the teacher before training.

    Raises RecipeError if they do not take images of its size, as a ViT made for another, or if a training pass has too
    few images for BatchNorm.
    """
    device = accelerator.device
    view = ViewsDataset(train, parse(recipe.views.train), 1, recipe.loader.broken, recipe.loader.reading)[0, 0]["image"]
    height, width = view.shape[-2:]
    images = torch.zeros(1, 3, height, width, device=device)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            method.net.eval().classify(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            "recipe.conflict",
            f"net.backbone: {recipe.net.backbone} takes no images of {height} x {width} pixels, which views.train "
            f"makes: {error}. Set net.options.img_size={height} if it has that option, or change the views",
        ) from error
    if method.teacher is not None:
        try:
            method.teacher(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise RecipeError(
                "recipe.conflict",
                f"method.teacher: it takes no images of {height} x {width} pixels, which views.train makes: {error}",
            ) from error
    check_single_image(method, recipe, images, accelerator)


@torch.no_grad()
def check_single_image(method: Method, recipe: Recipe, image: Tensor, accelerator: Accelerator) -> None:
    """Raises RecipeError if a pass of one image meets BatchNorm over one value per channel, which has no variance.

    image: (1, 3, H, W). Buffers and random generators keep their state.
    """
    train, processes = recipe.train, accelerator.num_processes
    if train.batch_size > train.accumulate * processes:
        return
    rows = 1 if method.second_sampler is None else 2
    batch = {
        "image": image.expand(rows, method.views, *image.shape[1:]),
        "label": torch.zeros(rows, dtype=torch.long, device=image.device),
    }
    before = copy_buffers(method)
    try:
        with torch.random.fork_rng(), accelerator.autocast():
            method.train()(batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise RecipeError(
            "recipe.conflict",
            f"train.batch_size: {train.batch_size} over {processes} processes and train.accumulate={train.accumulate} "
            f"is 1 image per forward pass, and the BatchNorm layers of method {recipe.method.name} need at least 2: "
            "raise train.batch_size or lower train.accumulate",
        ) from error
    finally:
        put_back(method, before)


def check_images(accelerator: Accelerator, recipe: Recipe, train: Split, splits: dict[str, Split]) -> None:
    """Raises RecipeError where an evaluation image cannot be read, by its header: hours before an evaluation would.

    Each process looks at its part. Then `_check_sizes`.
    """
    found: list[str] = []
    for split in splits.values():
        own = np.arange(accelerator.process_index, len(split.rows), accelerator.num_processes)
        part = Split(split.name, split.dataset.select(own), split.labels[own], split.rows[own])
        with image_bar(len(part.rows), f"headers of {split.name}") as bar:
            problems = unreadable(part, False, recipe.loader.reading, bar.update)
            found += [f"{split.name}: {problem}" for _, problem in problems]
    found = gather_object(found)
    if found:
        raise RecipeError(
            "image.unreadable",
            f"{counted(len(found), 'image')} to evaluate on cannot be read: {'; '.join(found[:3])}"
            f"{' ...' if len(found) > 3 else ''}. Repair them or leave them out of the list (rescom-timm index check)",
        )
    _check_sizes(recipe, train, splits, accelerator.is_main_process)


FAR_APART = 1.5
"""Ratio of the sizes of training and evaluation images above which a warning is given."""


def _check_sizes(recipe: Recipe, train: Split, splits: dict[str, Split], main: bool) -> None:
    """Raises RecipeError for images too small for a crop or of several sizes; warns of evaluation at a far size."""
    views, reading = recipe.views, recipe.loader.reading
    try:
        ours = check_views(parse(views.train), train, "views.train", reading)
        others = check_views(parse(views.contrast), train, "views.contrast", reading) if views.contrast else ours
        theirs = [check_views(parse(views.eval), split, "views.eval", reading) for split in splits.values()]
    except ValueError as error:
        raise RecipeError(code_of(error), str(error)) from None
    if ours is not None and others is not None and ours != others:
        raise RecipeError(
            "image.size",
            f"views.contrast: it makes images of {others[0]} x {others[1]} pixels and views.train of {ours[0]} x "
            f"{ours[1]}: let both end in the same size",
        )
    sizes = [size for size in (ours, *theirs) if size is not None]
    sides = [max(size) for size in sizes]
    if main and sides and max(sides) > FAR_APART * min(sides):
        first, other = sizes[sides.index(min(sides))], sizes[sides.index(max(sides))]
        warnings.warn(
            f"the net would see images of {first[0]} x {first[1]} and of {other[0]} x {other[1]} pixels in training "
            f"(views.train: {views.train}) and evaluation (views.eval: {views.eval or 'none'}), which costs accuracy: "
            "let both end in the same size",
            stacklevel=3,
        )


@torch.no_grad()
def class_feature_sums(accelerator: Accelerator, recipe: Recipe, data: Data, net: Net) -> Tensor:
    """Sums (K, F) of the features of each class's training images, as evaluation sees them, in float64.

    The same on any number of processes but for the order of summing.
    """
    sums = torch.zeros(len(data.counts), net.classifier.in_features, dtype=torch.float64)
    was_training = net.training
    net.eval()
    with image_bar(len(data.train.rows), "class means") as bar:
        for images in loader_of(accelerator, recipe, data.train):
            with accelerator.autocast():
                features = net.encoder(net.normalize(images["image"]))
            gathered = accelerator.gather_for_metrics((features.float(), images["label"]))
            sums.index_add_(0, gathered[1].cpu(), gathered[0].double().cpu())
            bar.update(len(gathered[1]))
    net.train(was_training)
    return sums


def check_selection(recipe: Recipe, data: Data, metrics: Collection[str] = ()) -> None:
    """Raises RecipeError where evaluation on validation does not report the figure that chooses the best checkpoint.

    metrics: names of further ones.
    """
    select = recipe.evaluation.select
    if data.validation is not None and select in GROUPS:
        chosen = groups(data.counts, recipe.evaluation.group_limits).get(select, torch.empty(0))
        if not np.isin(data.validation.labels, chosen).any():
            raise RecipeError(
                "recipe.conflict", f"evaluation.select: {data.validation.name} has no image of a class of {select}"
            )
    split = data.validation or data.test or data.train
    meter = Meter(len(data.counts), torch.as_tensor(data.counts), limits=recipe.evaluation.group_limits)
    known = [*meter.names(torch.as_tensor(split.labels)), WORST, *metrics]
    if select not in known:
        raise RecipeError(
            "recipe.value", f"evaluation.select: {split.name} has no figure {select!r}; there are {', '.join(known)}"
        )
