"""Recipe: one YAML file, checked key by key before anything is loaded.

Order of precedence: defaults < `base` recipes < the file < `key=value` words of the command line. Keys in `speed`
change how fast a run is, never what it computes; every other key may change results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import yaml

from rescom_timm.data.loaders import LoaderConfig
from rescom_timm.data.loaders import SpeedConfig as LoadingConfig
from rescom_timm.data.sources import DataConfig
from rescom_timm.data.views import ViewsConfig
from rescom_timm.files import parse_yaml, read_yaml
from rescom_timm.methods import METHODS, MethodConfig, RescomConfig
from rescom_timm.nets.net import NetConfig
from rescom_timm.runs.hub import HubConfig

MAX_NAME = 200
"""Bytes of a run's name; file systems take 255, and run, figures and pushes add to it."""
MAX_SEED = 2**32 - 2**20
"""NumPy takes 32 bits, and each process adds its number."""
FREE_KEYS = (
    "name", "output", "data.source", "evaluation.every", "evaluation.batch_size", "checkpoint", "speed",
    "train.nonfinite", "hub",
)  # fmt: skip
"""Keys and sections that may change when a run goes on: they do not change what is trained."""
FETCHED_KEYS = ("output", "hub")
"""What of a recipe from the Hub is not followed: where is written and pushed is for the command line to say."""


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says which key and what to do."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "sgd"
    """sgd (without Nesterov unless asked for), or any optimizer of timm: adamw, lamb, ..."""
    lr: float = 0.1
    """Peak learning rate for the global batch."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = True
    """Weight decay on every parameter, one group (the paper); false spares biases and norms, as usual for ViTs."""
    layer_decay: float | None = None
    """Learning rate of each layer of the backbone relative to the layer above it, e.g. 0.75 for a ViT."""
    encoder_lr_scale: float = 1.0
    """Learning rate of the backbone relative to that of classifier and projector, for fine-tuning."""
    clip_norm: float | None = None
    """Largest gradient norm; null: no clipping."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("lr must be above 0")
        if self.weight_decay < 0:
            raise ValueError("weight_decay must be at least 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {self.momentum:g}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError("clip_norm must be above 0, or null for none")
        if self.encoder_lr_scale <= 0:
            raise ValueError("encoder_lr_scale must be above 0; net.trainable: [none] freezes the backbone")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError("layer_decay must be in (0, 1]")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate by epoch: linear warm-up, then steps or a cosine."""

    name: Literal["cosine", "steps", "constant"] = "cosine"
    warmup_epochs: int = 0
    """Epoch t < warmup_epochs has lr * (t + 1) / warmup_epochs."""
    milestones: tuple[int, ...] = ()
    """Epochs (counted from 0) at which `steps` multiplies the learning rate by gamma."""
    gamma: float = 0.1
    final: float = 1e-5
    """Where the cosine ends, as a fraction of lr."""

    def __post_init__(self) -> None:
        if self.warmup_epochs < 0:
            raise ValueError("warmup_epochs must be at least 0")
        if (self.name == "steps") != bool(self.milestones):
            raise ValueError(
                "milestones belong to schedule.name: steps, which needs at least one; "
                "for another schedule say milestones: []"
            )
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            raise ValueError("milestones must rise, from epoch 1 on")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], not {self.gamma:g}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in [0, 1], as a fraction of lr, not {self.final:g}")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 400
    """0 evaluates and saves the net as it is, for stages that train nothing (tau_norm)."""
    batch_size: int = 128
    """Images of one optimizer step, over all processes and accumulated gradients; each image is seen in its views."""
    accumulate: int = 1
    """Forward and backward passes that share one optimizer step."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the net; the loss is always in float32. With fp16 the host waits for each step, whose scale
    it must know; bf16 has none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is NaN or infinite stops the run, or its batch is left out: weights, BatchNorm statistics and queue
    stay as they were (the host then waits for each step)."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: int = 256
    select: Literal["top1", "many", "medium", "few", "mean_class"] = "top1"
    """Figure by which the best checkpoint is chosen on the validation split."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.batch_size < 1:
            raise ValueError("every and batch_size must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1
    """Epochs between checkpoints."""
    keep: int = 2
    """Last checkpoints kept; the best one is kept besides."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("every and keep must be at least 1")


@dataclass(frozen=True)
class SpeedConfig(LoadingConfig):
    """Keys that change the speed of a run, never what it computes (beyond rounding)."""

    compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False
    """torch.compile of the net in training, true or a mode; needs a C++ compiler on the machine."""
    channels_last: bool = False
    """Images and convolutions in NHWC, faster on GPUs with tensor cores; without effect under FSDP."""
    capture: bool = False
    """A whole step, optimizer and all, as one CUDA graph: for small nets on one GPU, where launching the kernels takes
    longer than running them. Together with compile: true it is fastest. Elsewhere the same step runs uncaptured."""


@dataclass(frozen=True)
class Recipe:
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # of every section too

    data: DataConfig
    name: str = ""
    """Names the run folder; the file's own name by default."""
    output: str = "runs"
    """Folder in which the run's folder is made."""
    seed: int = 0
    init_from: str | None = None
    """Run folder, checkpoint folder or net.safetensors whose net the training starts from; `from` for short. The
    optimizer, the epochs and the queue start anew."""
    views: ViewsConfig = ViewsConfig()
    loader: LoaderConfig = LoaderConfig()
    net: NetConfig = NetConfig()
    method: Annotated[MethodConfig, pydantic.Field(discriminator="name")] = RescomConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    hub: HubConfig = HubConfig()
    speed: SpeedConfig = SpeedConfig()

    def __post_init__(self) -> None:
        if self.name in (".", "..") or not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f\x7f]*", self.name):
            raise ValueError(f"name names one folder, without / and no hidden one, not {self.name!r}")
        if len(os.fsencode(self.name)) > MAX_NAME:
            raise ValueError(f"name is longer than the {MAX_NAME} bytes that a folder's name may have")
        if not self.output or "\0" in self.output:
            raise ValueError(f"output must be a folder, not {self.output!r}")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed must be from 0 to {MAX_SEED - 1:,}, not {self.seed}")
        for name, epoch in (
            ("schedule.warmup_epochs", self.schedule.warmup_epochs),
            ("the last of schedule.milestones", max(self.schedule.milestones, default=0)),
        ):
            if epoch >= self.train.epochs > 0:
                raise ValueError(
                    f"{name} is {epoch}, which train.epochs = {self.train.epochs} never reaches: lower both"
                )
        if self.train.accumulate > 1 and self.speed.compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"speed.compile: {self.speed.compile} captures CUDA graphs, each of which overwrites the gradients of "
                "the one before: with train.accumulate above 1 say true or max-autotune-no-cudagraphs"
            )
        if self.speed.capture:
            for key, odd in (
                ("train.accumulate", self.train.accumulate > 1),
                ("train.nonfinite: skip", self.train.nonfinite == "skip"),
                ("train.precision: fp16", self.train.precision == "fp16"),
                (f"speed.compile: {self.speed.compile}", self.speed.compile not in (False, True, "default")),
            ):
                if odd:
                    raise ValueError(f"speed.capture does not go together with {key}: turn one of them off")
        if self.hub.repo is not None and self.hub.strategy == "best" and self.data.validation == "none":
            raise ValueError("hub.strategy: best needs data.validation, where the best checkpoint is chosen")

    @property
    def folder(self) -> Path:
        """The run's folder; a run of the same name that is there already makes it name-2, name-3 ..."""
        return Path(self.output).expanduser() / (self.name or "run")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON or YAML, of which load_dict makes the same recipe. Home is told as ~."""
        return json.loads(without_home(json.dumps(dataclasses.asdict(self))))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)


def without_home(text: str) -> str:
    """The text with paths below the home folder as ~/..., which can be read back and does not tell whose they are."""
    return re.sub(rf"(?<![\w./-]){re.escape(str(Path.home()))}/", "~/", text)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with its `base` recipes, changed by `key=value` words.

    Raises RecipeError for a file that is no recipe, an unknown key (naming the nearest), a wrong type or an
    impossible combination.
    """
    path = Path(path)
    return load_dict({"name": path.stem, **_read(path, ())}, str(path), overrides)


def load_fetched(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run on the Hub, which somebody else may have written: what it says of output and hub is left out
    with a warning, and its name is a plain folder's. Raises RecipeError as load does, and for one with a base."""
    tree = _yaml(Path(path))
    if "base" in tree:
        raise RecipeError(f"{path}: a recipe from the Hub must be whole: base: {tree['base']!r} is not followed")
    said = {key: tree.pop(key) for key in FETCHED_KEYS if key in tree}
    usual = flat(Recipe(data=DataConfig("digits")).to_dict())
    ignored = [f"{key}={value}" for key, value in flat(said).items() if usual.get(key) != value]
    if ignored:
        warnings.warn(
            f"of the fetched recipe is not followed: {' '.join(ignored)} (say it anew where wanted)", stacklevel=2
        )
    return load_dict(tree, str(path), overrides)


def load_dict(tree: dict[str, Any], source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of plain types, changed by `key=value` words. Raises RecipeError as load does."""
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of keys, not {type(tree).__name__}")
    before, said = tree, [word.partition("=")[0].strip() for word in overrides]
    for word in overrides:
        tree = _merge(tree, _override(word))
    if "train.epochs" in said and not any(key.startswith("schedule") for key in said):
        tree = _shortened(tree, before, source)
    if "from" in tree:
        tree = {**tree, "init_from": tree["from"]}
        del tree["from"]
    method = tree.get("method")
    if isinstance(method, dict):
        tree = {**tree, "method": {"name": "rescom", **method}}
    if odd := [f"{key}: {wrong}" for key, value in _numbers(tree) if (wrong := _absurd(value))]:
        raise RecipeError(f"{source}: " + "\n  ".join(odd))
    try:
        return _ADAPTER.validate_json(json.dumps(tree), strict=True)
    except pydantic.ValidationError as error:
        lines = dict.fromkeys(_explain(dict(problem)) for problem in error.errors())
        raise RecipeError(f"{source}: " + "\n  ".join(lines)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: {error}; a recipe holds text, numbers, true, false, null and lists") from None


def _numbers(tree: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a tree with their dotted keys."""
    if isinstance(tree, int | float):
        yield key, tree
    elif isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _numbers(value, f"{key}.{name}" if key else str(name))


def _absurd(number: float) -> str:
    """What is wrong with a number whatever it is for; it stands above any that a setting has."""
    if isinstance(number, float) and not isfinite(number):
        return f"must be a finite number, not {number}"
    largest = MAX_SEED if isinstance(number, int) else 10**6
    return f"must be at most {largest:,} in size, not {number}" if abs(number) > largest else ""


def _shortened(tree: dict[str, Any], before: dict[str, Any], source: str) -> dict[str, Any]:
    """The tree, of which the command line says train.epochs and not the schedule. Where so few epochs never reach what
    the schedule of the tree before has, the first thing that people try, the schedule is shortened as much."""
    try:
        whole, epochs = load_dict(before, source), tree["train"]["epochs"]
    except (RecipeError, KeyError, TypeError):
        return tree  # what is wrong is told of the tree with all its words
    schedule = whole.schedule
    if type(epochs) is not int or not 0 < epochs <= max(schedule.warmup_epochs, *schedule.milestones, 0):
        return tree
    shorter: dict[str, Any] = {"warmup_epochs": schedule.warmup_epochs * epochs // whole.train.epochs}
    if schedule.milestones:
        moved = {round(epoch * epochs / whole.train.epochs) for epoch in schedule.milestones}
        shorter["milestones"] = sorted(epoch for epoch in moved if 0 < epoch < epochs)
        shorter["name"] = "steps" if shorter["milestones"] else "constant"
    told = ", ".join(f"schedule.{key}={value}" for key, value in shorter.items())
    warnings.warn(
        f"train.epochs={epochs} instead of {whole.train.epochs} shortens the schedule as much: {told}", stacklevel=4
    )
    return _merge(tree, {"schedule": shorter})


_ADAPTER = pydantic.TypeAdapter(Recipe)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"{path}: is its own base ({' -> '.join(map(str, (*seen, path)))})")
    tree = _yaml(path)
    base = tree.pop("base", None)
    if not isinstance(base, str | None):
        raise RecipeError(f"{path}: base: the name of one other recipe, not {base!r}")
    return tree if base is None else _merge(_read(path.parent / base, (*seen, path)), tree)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except FileNotFoundError:
        there = {found.name: found for folder in (Path("recipes"), path.parent) for found in folder.glob("*.yaml")}
        near = get_close_matches(f"{path.name.removesuffix('.yaml')}.yaml", there, n=1)
        raise RecipeError(f"no recipe {path}" + (f"; did you mean {there[near[0]]}?" if near else "")) from None
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from None


def _override(word: str) -> dict[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise RecipeError(f"{word!r} is not key=value, such as train.epochs=10")
    try:
        tree: Any = parse_yaml(value)
    except ValueError as error:
        raise RecipeError(f"{word!r}: the value is not YAML: {error}") from None
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return tree


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`. A section that changes its `name` starts anew: another method has other keys."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            renamed = key == "method" and value.get("name", old.get("name")) != old.get("name", "rescom")
            merged[key] = value if renamed else _merge(old, value)
        else:
            merged[key] = value
    return merged


def keys(kind: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, dotted: train.epochs, method.queue.per_class, ..."""
    for name, hint in typing.get_type_hints(kind).items():
        if name.startswith("_"):
            continue
        yield prefix + name
        for inner in get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,):
            if dataclasses.is_dataclass(inner):
                yield from keys(inner, f"{prefix}{name}.")


def _explain(problem: dict[str, Any]) -> str:
    # A tagged union puts its tag into the location: method.rescom.beta.
    where = ".".join(str(part) for i, part in enumerate(problem["loc"]) if not (i == 1 and part in METHODS))
    if problem["type"] == "unexpected_keyword_argument":
        known = sorted(set(keys()))
        named: dict[str, list[str]] = {}  # keys by their last part
        for key in known:
            named.setdefault(key.split(".")[-1], []).append(key)
        last = where.split(".")[-1]
        near = (
            named.get(last)
            or get_close_matches(where, known, n=1, cutoff=0.9)  # as good as certain
            or get_close_matches(where, known, n=3, cutoff=0.6)
            or [key for close in get_close_matches(last, named, n=1) for key in named[close]]
        )
        hint = f"; did you mean {', '.join(near[:3])}?" if near else f"; there are: {', '.join(known)}"
        return f"unknown key {where}{hint}"
    if problem["type"] == "union_tag_invalid":
        given = problem["input"].get("name")
        near = get_close_matches(str(given), list(METHODS), n=1) or list(METHODS)
        return f"{where}.name: unknown method {given!r}; did you mean {', '.join(near)}?"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return f"{where.rpartition('.')[0]}: has too few values: {problem['input']!r}"
    if problem["type"] == "missing":
        return f"{where} is missing: every recipe names it"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict) else f", not {problem['input']!r}"
    return f"{where}: {message}{shown}" if where else message


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys by which two recipes (of Recipe.to_dict) train something else: all that differ but for FREE_KEYS."""
    one, other = flat(old), flat(new)
    free = tuple(f"{key}." for key in FREE_KEYS)
    changed = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [key for key in changed if not f"{key}.".startswith(free)]
