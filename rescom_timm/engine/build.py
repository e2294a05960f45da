"""From a recipe to the objects of a run: method, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
import timm.optim
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from rescom_timm.class_names import numbers_in, rows_of
from rescom_timm.config.recipe import OptimizerConfig, Recipe, RecipeError, ScheduleConfig, SpeedConfig
from rescom_timm.data.config import ViewsConfig
from rescom_timm.data.sources import Data
from rescom_timm.engine import checkpoint
from rescom_timm.engine.checkpoint import SavedState
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.errors import code_of
from rescom_timm.methods import Method, create_method, method_class
from rescom_timm.methods.distillation import Teacher
from rescom_timm.models.classifiers import ClassifierConfig, read_class_features, start_from_means
from rescom_timm.models.net import PROJECTOR, Net, NetConfig, create_model
from rescom_timm.models.trainable import digest, keep_frozen_in_bfloat16, set_trainable
from rescom_timm.models.tuning import added


def build_net(config: NetConfig, views: ViewsConfig, num_classes: int) -> Net:
    """The net of a recipe. Raises RecipeError where it cannot be made or its pretrained weights cannot be read."""
    if config.weights_file is not None and not Path(config.weights_file).expanduser().is_file():
        raise RecipeError("net.weights", f"net.weights_file: no file {config.weights_file}")
    try:
        net = create_model(
            config.backbone,
            num_classes,
            pretrained=config.pretrained,
            weights_file=config.weights_file,
            projector=config.projector,
            mean=views.mean,
            std=views.std,
            tuning=config.tuning,
            head=config.classifier,
            **config.options,
        )
    except (ValueError, ImportError) as error:
        raise RecipeError(code_of(error), f"net: {error}") from error
    except Exception as error:  # of timm, its downloads and its readers of weights, whatever they raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if not config.pretrained:
            raise RecipeError("net.backbone", f"net: timm cannot make {config.backbone}: {reason[:300]}") from error
        where = config.weights_file or "the Hub (or its cache here)"
        raise RecipeError(
            "net.weights",
            f"net.pretrained: weights of {config.backbone} cannot be read from {where}: {reason[:300]}. Name a file of "
            "them in net.weights_file, or say net.pretrained=false",
        ) from error
    channels = config.options.get("in_chans", net.encoder.pretrained_cfg["input_size"][0])  # type: ignore[index]
    if channels != 3:
        raise RecipeError(
            "net.backbone",
            f"net.options.in_chans: {config.backbone} takes images of {channels} channels, and images are always "
            "read in 3 (RGB), grey ones too: leave in_chans out, or choose a backbone of 3 channels",
        )
    try:
        if config.tuning.name == "full":
            set_trainable(net.encoder, config.trainable)
        elif config.trainable != ("all",):
            set_trainable(net.encoder, config.trainable)
            for parameter in added(net.encoder):
                parameter.requires_grad_(True)
    except ValueError as error:
        raise RecipeError(code_of(error), f"net.trainable: {error}") from error
    net.frozen_statistics = config.frozen_statistics
    if config.frozen_precision == "bf16":
        keep_frozen_in_bfloat16(net.encoder)
    return net


First: TypeAlias = tuple[Path, Sequence[str] | None]
"""A file of the weights that a training starts from, and the names of its classes where they are known."""


def build_method(
    recipe: Recipe, data: Data, start: bool = False, teacher: Teacher | None = None, first: First | None = None
) -> Method:
    """The method of a recipe, untrained or started.

    start: load the weights that the run starts from (`from`) and attach the teacher that it learns from. first: those
    weights, if the recipe names a run on the Hub.

    Raises RecipeError where the method's settings do not fit the data's classes, the weights do not fit the net, or the
    teacher does not fit the data.
    """
    classes = len(data.counts)
    if classes < 2:
        raise RecipeError(
            "data.one_class",
            f"data.index: {data.train.name} has one class ({data.class_names[0]}); training needs at least two: "
            "add images of other classes",
        )
    refuse_queue(recipe, classes)
    kind = method_class(recipe.method)
    net = build_net(recipe.net, recipe.views, classes)
    if not kind.embeds:
        net.drop_projector()
    if start and recipe.init_from is not None:
        source, names = first or (Path(recipe.init_from).expanduser(), None)
        anew = kind.new_classifier or recipe.net.classifier.init != "random"
        load_weights(net, source, data.class_names, names, classifier=not anew, projector=not kind.new_classifier)
    elif start and kind.second_stage and not (kind.fits_head and recipe.net.pretrained):
        raise RecipeError(
            "recipe.missing_key", f"method {recipe.method.name} is a second stage: name the run to start from, from=RUN"
        )
    if start and recipe.net.classifier.file is not None:
        try:
            features = read_class_features(recipe.net.classifier.file, data.class_names, net.classifier.in_features)
        except (ValueError, OSError) as error:
            raise RecipeError(code_of(error), f"net.classifier.file: {error}") from error
        start_from_means(net.classifier, features)
    head = net.classifier
    try:
        method = create_method(net, torch.as_tensor(data.counts), recipe.method)
        method.set_classes(data.class_names)
    except ValueError as error:
        raise RecipeError(code_of(error), f"method: {error}") from error
    if method.net.classifier is not head and recipe.net.classifier != ClassifierConfig():
        raise RecipeError(
            "recipe.conflict",
            f"net.classifier: method {recipe.method.name} has a classifier of its own; leave net.classifier as it is",
        )
    method.contrast_views = recipe.views.contrast is not None
    if start:
        check_teacher(recipe, data, teacher)
        if teacher is not None:
            method.teacher = teacher
    return method


def check_teacher(recipe: Recipe, data: Data, teacher: Teacher | None) -> None:
    """Raises RecipeError where there is no teacher that the method needs, or it knows other classes than the data."""
    name, source = recipe.method.name, recipe.method.teacher
    if teacher is None:
        if method_class(recipe.method).needs_teacher:
            raise RecipeError(
                "recipe.missing_key", f"method {name} learns from a teacher: name its run or export, method.teacher=RUN"
            )
        return
    known = teacher.net.classifier.out_features
    if known != len(data.counts):
        raise RecipeError(
            "data.classes",
            f"method.teacher: {source} has {known} classes and data.index has {len(data.counts)}: "
            "a teacher must have been trained on the same classes",
        )
    try:
        numbers_in(data.class_names, teacher.class_names, data.train.name, str(source), ordered=True)
    except ValueError as error:
        raise RecipeError(
            code_of(error), f"method.teacher: {error}; a teacher must have been trained on the same classes"
        ) from None


def refuse_queue(recipe: Recipe, classes: int) -> int:
    """Numbers of the method's queue of keys. Raises RecipeError as refuse_size does."""
    key, slots = recipe.method.queue_slots(classes) or ("", 0)
    numbers = slots * recipe.net.projector.dim
    refuse_size(f"method.{key}", numbers)
    return numbers


def refuse_size(key: str, numbers: int) -> None:
    """Raises RecipeError where so many float32 numbers are more than half of the machine's memory."""
    memory, needed = psutil.virtual_memory().total, 4 * numbers
    if needed > memory / 2:
        raise RecipeError(
            "train.memory",
            f"{key}: the queue's keys need {needed / 2**30:,.0f} GiB of this machine's {memory / 2**30:,.0f}: lower it",
        )


def load_weights(
    net: Net, source: Path, class_names: Sequence[str] = (), names: Sequence[str] | None = None, *,
    classifier: bool = True, projector: bool = True,
) -> None:  # fmt: skip
    """Start a net from a run's folder (its last checkpoint), a checkpoint's folder or a file net.safetensors.

    class_names: (K,) of the net's classes, by which the rows of the classifier are taken. names: of the classes of a
    file that stands alone. classifier: take that too, which then must be there; a linear classifier instead of a
    cosine one, and the other way round, is left out and reported. projector: take that where the run's method had one.
    Raises RecipeError where there are no weights, or they are of another net or other classes.
    """
    run = source / "checkpoints"
    if run.is_dir():
        newest = checkpoint.newest(run)
        if newest is None:
            raise RecipeError("train.from", f"from: {source} holds no checkpoint; train it first")
        source, weights = newest[0], whole_weights(net, newest[1], newest[2], newest[0])
        names = checkpoint.class_names(newest[0], newest[2])
    elif (source / "rescom.json").is_file():
        raise RecipeError(
            "train.from",
            f"from: {source} is an exported model: name the run's folder, or start from its backbone "
            f"(also for other classes): net.backbone=local-dir:{source} net.pretrained=true",
        )
    elif source.is_dir():
        found = checkpoint.load(source)
        weights, names = whole_weights(net, *found, source), checkpoint.class_names(source, found[1])
    elif source.is_file():
        try:
            weights = load_file(source)
            if source.name == checkpoint.FILES[0] and (source.parent / checkpoint.FILES[2]).is_file():
                names = checkpoint.class_names(source.parent, checkpoint.load(source.parent)[1])
        except (SafetensorError, OSError) as error:
            raise RecipeError("train.from", f"from: {source} is no file of weights in safetensors: {error}") from error
    else:
        raise RecipeError("train.from", f"from: no run, checkpoint or file of weights {source}")
    broken = [k for k, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise RecipeError("train.from", f"from: {source} holds weights that are not finite: {', '.join(broken[:3])}")
    kinds = [{name for name in one if name.startswith(HEAD)} for one in (weights, net.state_dict())]
    if classifier and kinds[0] != kinds[1] and {frozenset(kind) for kind in kinds} == set(LINEAR_OR_COSINE):
        theirs, ours = ("cosine" if kind == LINEAR_OR_COSINE[1] else "linear" for kind in kinds)
        print(f"from: {source} has a {theirs} classifier; the {ours} one starts anew (net.classifier.init)")
        classifier = False
    projector = projector and any(name.startswith(PROJECTOR) for name in weights)
    taken = ("encoder.", *[HEAD] * classifier, *[PROJECTOR] * projector)
    own = {name: value for name, value in net.state_dict().items() if name.startswith(taken)}
    if classifier:
        try:
            rows = rows_of(class_names, names, "data.source", str(source))
        except ValueError as error:
            raise RecipeError(
                code_of(error),
                f"from: {error}, or take the encoder alone: net.backbone=local-dir:RUN/model net.pretrained=true",
            ) from None
        if rows is not None:
            weights = {
                name: value[rows] if name.startswith(HEAD) and len(value) == len(rows) else value
                for name, value in weights.items()
            }
    wrong = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    wrong += [name for name in weights if name not in own and name.startswith(taken[: 1 + classifier])]
    if wrong:
        raise RecipeError(
            "train.from",
            f"from: {source} holds the weights of another net (different: {', '.join(wrong[:3])}): start with the same "
            "net and data.index, from a run whose classifier is one linear layer; for other classes use its export: "
            "net.backbone=local-dir:RUN/model net.pretrained=true",
        )
    net.load_state_dict({name: weights[name] for name in own}, strict=False)


HEAD = "classifier."
LINEAR_OR_COSINE = (frozenset({f"{HEAD}weight", f"{HEAD}bias"}), frozenset({f"{HEAD}weight"}))
"""Names of the weights of the two classifiers that a recipe may choose."""


def base_net(recipe: Recipe, state: SavedState) -> NetConfig:
    """How to make the net that a checkpoint's weights go into.

    With pretrained weights where the checkpoint holds only those that were trained over them.
    """
    return recipe.net if state.get("frozen") else recipe.net.untrained()


def whole_weights(net: Net, weights: Mapping[str, Tensor], state: SavedState, path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights completed by the net's frozen ones.

    Raises CheckpointError where those are not what it was trained over.
    """
    if not state.get("frozen"):
        return dict(weights)
    frozen = {name: value for name, value in net.named_parameters() if name not in weights}
    if digest(frozen) != state["frozen"]:
        raise CheckpointError(
            "checkpoint.differs",
            f"{path} was tuned over other pretrained weights than {net.recreate and net.recreate['model_name']} has "
            "here: put them back (net.weights_file, or timm's cache)",
        )
    return {**{name: value.detach() for name, value in frozen.items()}, **weights}


Weights = Literal["raw", "ema"]
"""Those of a net as it was trained, or their moving average (train.ema)."""


def chosen_weights(
    which: Weights, weights: Mapping[str, Tensor], state: SavedState, path: Path
) -> Mapping[str, Tensor]:
    """A checkpoint's weights, or their average in it. Raises CheckpointError where it has none."""
    if which == "raw":
        return weights
    if not state.get("average"):
        raise CheckpointError(
            "checkpoint.average", f"{path} holds no average of the weights: it was trained without train.ema"
        )
    return state["average"]


def prefers_channels_last(net: Net, device: torch.device, precision: str) -> bool:
    """Whether NHWC is faster: for convolutions on a CPU, and on a GPU in mixed precision, by its tensor cores.

    Convolutions with windows that do not overlap, as the patch embedding of a ViT, and 1 x 1 do not count.
    """
    fast = device.type == "cpu" or (device.type == "cuda" and precision != "no")
    return fast and any(
        isinstance(module, nn.Conv2d) and max(module.kernel_size) > min(module.stride) for module in net.modules()
    )


def speed_up(net: Net, config: SpeedConfig) -> None:
    """Memory format, gradient checkpointing and torch.compile, in place, so that the net's names stay plain.

    A graph break inside the net is an error (fullgraph), found at the first step. Raises RecipeError for a backbone
    that timm cannot checkpoint.
    """
    if config.grad_checkpointing:
        try:
            net.encoder.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, AttributeError) as error:
            raise RecipeError(
                "recipe.conflict", "speed.grad_checkpointing: timm has none for this backbone; turn it off"
            ) from error
    if config.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        net.compile(fullgraph=True, mode=None if config.compile is True else config.compile)


def build_optimizer(config: OptimizerConfig, net: Net) -> torch.optim.Optimizer:
    """An optimizer of timm; SGD is without Nesterov unless asked for (timm's own `sgd` is with it).

    All trained weights form one group, unless the recipe spares norms and biases from decay or scales the learning rate
    of the encoder or of its layers. Raises RecipeError for a name that timm does not know.
    """
    if config.name not in timm.optim.list_optimizers():
        near = ", ".join(get_close_matches(config.name, timm.optim.list_optimizers(), n=3)) or "sgd, adamw, lamb"
        raise RecipeError(
            "recipe.value", f"optimizer.name: timm has no optimizer {config.name!r}; there are {near} and others"
        )
    spared: set[str] = getattr(net.encoder, "no_weight_decay", set)() if not config.decay_norm_and_bias else set()
    kept = {"weight_decay_exclude_1d": not config.decay_norm_and_bias, "no_weight_decay_list": spared}
    heads = nn.ModuleList(module for name, module in net.named_children() if name not in ("encoder", "experts"))
    backbone: list[nn.Module] = [net.encoder, *getattr(net, "experts", [])]
    if config.layer_decay is None:
        groups = [group for part in backbone for group in param_groups_weight_decay(part, config.weight_decay, **kept)]
    elif len(backbone) > 1:
        raise RecipeError(
            "recipe.conflict",
            "optimizer.layer_decay does not support experts, which split the backbone; set it to null",
        )
    else:
        groups = param_groups_layer_decay(net.encoder, config.weight_decay, layer_decay=config.layer_decay, **kept)
    for group in groups:
        group["lr_scale"] = group.get("lr_scale", 1.0) * config.encoder_lr_scale
    groups += param_groups_weight_decay(heads, config.weight_decay, not config.decay_norm_and_bias)
    if not config.decay_norm_and_bias or config.layer_decay is not None or config.encoder_lr_scale != 1:
        parameters: list[Any] = groups
    else:
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    extra = {"nesterov": config.nesterov} if config.name == "sgd" else {}
    return create_optimizer_v2(parameters, config.name, config.lr, config.weight_decay, config.momentum, **extra)


def build_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, lr: float, epochs: int, updates: int = 1
) -> Scheduler:
    """The learning rate schedule, of timm: a pure function of the epoch or of the optimizer steps.

    With config.by `epoch`, call `schedule.step(epoch)` at the start of each epoch; with `update`, call
    `schedule.step_update(steps)` before each step. The other call does nothing. updates: optimizer steps of an epoch.
    Warm-up gives lr * (t + 1) / W in epoch (or step) t < W; the cosine starts from its end, as in the authors'
    training.
    """
    by_epoch = config.by == "epoch"
    each = 1 if by_epoch else updates
    whole = config.warmup_epochs * each
    ramp = max(whole - 1, 0)
    common = {"warmup_t": ramp, "warmup_lr_init": lr / max(whole, 1), "t_in_epochs": by_epoch}
    if config.name == "cosine":
        return CosineLRScheduler(
            optimizer, t_initial=max(epochs * each - ramp, 2), lr_min=config.final * lr, warmup_prefix=True, **common
        )
    # timm applies milestone m at m - 1.
    milestones = [milestone * each + 1 for milestone in config.milestones]
    return MultiStepLRScheduler(optimizer, milestones, config.gamma, warmup_prefix=False, **common)
