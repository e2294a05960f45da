"""What a recipe holds: one typed section for each part of a run.

Keys in `speed` change how fast a run is, never what it computes; every other key may change results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from huggingface_hub.utils import validate_repo_id

from rescom_timm.config.secrets import without_home, without_secrets
from rescom_timm.data.config import DataConfig, LoaderConfig, LoadingConfig, MixConfig, ViewsConfig
from rescom_timm.errors import InputError
from rescom_timm.hub_client import target
from rescom_timm.methods import MethodConfig, RescomConfig
from rescom_timm.methods import check as check_method
from rescom_timm.methods.bounds import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, SHARE, Bound, check
from rescom_timm.metrics import LIMITS
from rescom_timm.models.net import NetConfig
from rescom_timm.text import check_name

MAX_NAME = 200
"""Bytes of a run's name; file systems take 255, and run, figures and pushes add to it."""
MAX_SEED = 2**32 - 2**20
"""NumPy takes 32 bits, and each process adds its number."""
RADIUS: Bound = (lambda value: 0 <= value <= 1000, "from 0 to 1,000")
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?|[a-z]:.*", re.IGNORECASE)
"""Names that Windows takes for a device or a drive."""


class RecipeError(InputError):
    """A recipe that cannot be run. The message names the key and what to do; secrets are removed from it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, without_secrets(message))


@dataclass(frozen=True)
class SamConfig:
    """Sharpness-aware minimisation (Foret et al. 2021) over any optimizer and method.

    Each step takes two passes over its batch: twice the time, and memory for one more copy of the trained weights. Not
    with FSDP.
    """

    rho: float = 0.1
    """Distance of the weights at which the gradient is taken. VS loss: 0.1 on CIFAR-10-LT, 0.3 on CIFAR-100-LT."""
    rho_late: float | None = None
    """The same in the last fifth of the epochs; null: rho."""
    adaptive: bool = False
    """Distances relative to the size of each weight (ASAM, Kwon et al. 2021), with a rho some ten times larger."""

    def __post_init__(self) -> None:
        check(self, "recipe.value", rho=RADIUS, rho_late=RADIUS)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rates, weight decay and clipping."""

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
    sam: SamConfig | None = None
    """Sharpness-aware minimisation, such as {rho: 0.1}; null: none."""

    def __post_init__(self) -> None:
        check(self, "recipe.value", lr=POSITIVE, weight_decay=NOT_NEGATIVE, momentum=BELOW_ONE, layer_decay=SHARE)
        if self.nesterov and not self.momentum:
            raise InputError("recipe.conflict", "nesterov needs a momentum above 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError("recipe.value", "clip_norm must be above 0, or null for none")
        if self.encoder_lr_scale <= 0:
            raise InputError(
                "recipe.value", "encoder_lr_scale must be above 0; net.trainable: [none] freezes the backbone"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, then steps or a cosine."""

    name: Literal["cosine", "steps", "constant"] = "cosine"
    warmup_epochs: int = 0
    """Epoch t < warmup_epochs has lr * (t + 1) / warmup_epochs."""
    milestones: tuple[int, ...] = ()
    """Epochs (counted from 0) at which `steps` multiplies the learning rate by gamma."""
    gamma: float = 0.1
    final: float = 1e-5
    """Where the cosine ends, as a fraction of lr."""
    by: Literal["epoch", "update"] = "epoch"
    """When it moves: at each epoch, as the papers train, or at each optimizer step (timm's --sched-on-updates), along
    the same curve."""

    def __post_init__(self) -> None:
        check(self, "recipe.value", warmup_epochs=NOT_NEGATIVE, gamma=SHARE, final=PART)
        if (self.name == "steps") != bool(self.milestones):
            raise InputError(
                "recipe.conflict",
                "milestones belong to schedule.name: steps, which needs at least one; "
                "for another schedule say milestones: []",
            )
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            raise InputError("recipe.value", "milestones must rise, from epoch 1 on")


@dataclass(frozen=True)
class EmaConfig:
    """A moving average of weights and BatchNorm statistics (timm's ModelEmaV3), evaluated and saved beside them."""

    decay: float = 0.9999
    """Of the average, once an optimizer step."""
    warmup: bool = True
    """The decay of step t is at most 1 - t^(-2/3), so that a short training has a short average."""
    export: bool = False
    """The exported model has the average instead of the weights."""

    def __post_init__(self) -> None:
        check(self, "recipe.value", decay=BELOW_ONE)


@dataclass(frozen=True)
class TrainConfig:
    """Epochs, batches, precision and averaging of a training."""

    epochs: int = 400
    """0 evaluates and saves the net as it is, for stages that train nothing (tau_norm)."""
    batch_size: int = 128
    """Images of one optimizer step, over all processes and accumulated gradients; each image is seen in its views."""
    accumulate: int = 1
    """Forward and backward passes that share one optimizer step."""
    fit_batch: bool = False
    """Raise accumulate until a pass fits the memory of the devices, which is tried before training; batch and learning
    rate stay. Only for methods whose loss is one of single images. BatchNorm then sees the images of a pass, as do the
    weighted means of ldam and disalign. The run's own recipe holds the number that was found."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the net; the loss is always in float32. With fp16 the host waits for each step, whose scale
    it must know; bf16 has none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is NaN or infinite stops the run, or its batch is left out: weights, BatchNorm statistics and queue
    stay as they were (the host then waits for each step)."""
    ema: EmaConfig | None = None
    """Average of the weights, such as {decay: 0.9999}; null: none."""

    def __post_init__(self) -> None:
        check(self, "recipe.value", epochs=NOT_NEGATIVE, batch_size=AT_LEAST_ONE, accumulate=AT_LEAST_ONE)
        if self.batch_size % self.accumulate:
            raise InputError(
                "recipe.conflict", f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how a run is evaluated, and early stopping."""

    every: int = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: int = 256
    select: str = "top1"
    """Figure by which the best checkpoint is chosen on the validation split, larger is better: any that evaluation
    reports (top1, top5, mean_class, many, medium, few, few_mean_class ...), worst_class, the accuracy of the worst
    class, or a metric of the caller of `rescom_timm.train`."""
    patience: int | None = None
    """Training ends at an evaluation so many epochs or more after the best one on validation; null: never."""
    group_limits: tuple[int, int] = LIMITS
    """Classes with fewer training images than the first are few, with more than the second many, the others medium."""
    hide_test: bool = False
    """Training does not look at the test split (--hide-test): `evaluate` does, once all is chosen."""

    def __post_init__(self) -> None:
        if not 1 <= self.group_limits[0] <= self.group_limits[1]:
            raise InputError(
                "recipe.value", f"group_limits must be two rising numbers from 1 on, not {list(self.group_limits)}"
            )
        check(self, "recipe.value", every=AT_LEAST_ONE, batch_size=AT_LEAST_ONE, patience=AT_LEAST_ONE)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = 1
    """Epochs between checkpoints."""
    keep: int = 2
    """Last checkpoints kept; the best one is kept besides."""

    def __post_init__(self) -> None:
        check(self, "recipe.value", every=AT_LEAST_ONE, keep=AT_LEAST_ONE)


@dataclass(frozen=True)
class SpeedConfig(LoadingConfig):
    """Keys that change the speed of a run, never what it computes (beyond rounding)."""

    compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False
    """torch.compile of the net in training, true or a mode; needs a C++ compiler on the machine."""
    channels_last: bool | None = None
    """Images and convolutions in NHWC. null: where it is faster, for nets with convolutions (beyond the patches of a
    ViT) on a CPU, and on a GPU in mixed precision; the run's own recipe holds true or false. Without effect under
    FSDP."""
    capture: bool = False
    """A whole step, optimizer and all, as one CUDA graph: for small nets on one GPU, where launching the kernels takes
    longer than running them. Together with compile: true it is fastest. Elsewhere the same step runs uncaptured."""
    grad_checkpointing: bool = False
    """Keep the inputs of the backbone's blocks alone, and compute what is within them a second time in the backward
    pass (timm's switch): less memory, a third more time."""


@dataclass(frozen=True)
class HubConfig:
    """Where a run is pushed to. The token comes from `hf auth login` or HF_TOKEN, never from a recipe."""

    repo: str | None = None
    """owner/name on the Hub, also as hf://owner/name; null: nothing is pushed."""
    strategy: Literal["end", "best", "every_save", "checkpoint", "all_checkpoints"] = "end"
    """end: the trained model. best: also each new best one (by the validation split). every_save: also the newest, at
    each checkpoint. checkpoint: the same, with that checkpoint, so that training can go on elsewhere
    (--resume hf://owner/name). all_checkpoints: every checkpoint stays in the repository."""
    private: bool = True
    """Whether a repository that is made by the push is private; one that exists stays as it is."""
    license: str | None = None
    """Licence of the weights for the model card, such as apache-2.0; null: none is named."""
    benchmark: str | None = None
    """owner/dataset#task of a Benchmark data set of the Hub: the test accuracy is reported to its leaderboard too."""
    timeout_minutes: float = 60.0
    """How long the end of a run waits for its last push."""

    def __post_init__(self) -> None:
        if self.repo is not None:
            object.__setattr__(self, "repo", target(self.repo))
            if self.repo.count("/") != 1:
                raise InputError("recipe.value", f"repo must be owner/name, not {self.repo!r}")
            try:
                validate_repo_id(self.repo)
            except ValueError as error:
                raise InputError(
                    "recipe.value", f"repo {self.repo!r} is no name of the Hub: {str(error).splitlines()[0]}"
                ) from None
        if self.benchmark is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+#[\w.-]+", self.benchmark):
            raise InputError("recipe.value", f"benchmark must be owner/dataset#task, not {self.benchmark!r}")
        check(self, "recipe.value", timeout_minutes=POSITIVE)


@dataclass(frozen=True)
class TrackConfig:
    """Trackers that log a run besides metrics.jsonl.

    One that is not installed, has no network or fails is one line, and never stops a training. Accounts and servers are
    set as each tracker documents (wandb login, MLFLOW_TRACKING_URI ...), never in a recipe.
    """

    log_with: tuple[
        Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"], ...
    ] = ("tensorboard",)
    """Accelerate's names of them; tensorboard writes RUN/tensorboard."""
    project: str = "rescom-timm"
    """Project, or experiment, that the run stands in."""
    name: str | None = None
    """What the run is called there; null: its folder's name."""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.log_with)) != len(self.log_with):
            raise InputError("recipe.value", "log_with names a tracker twice")
        if not self.project or self.name == "" or "" in self.tags:
            raise InputError("recipe.value", "project, name and tags must not be empty text")
        if "'" in self.project:
            raise InputError("recipe.value", f"project must be without quotes, not {self.project!r}")


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, one section for each part."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # of every section too

    data: DataConfig
    name: str = ""
    """Names the run folder; the file's own name by default."""
    output: str = "runs"
    """Folder in which the run's folder is made."""
    seed: int = 0
    init_from: str | None = None
    """Run folder, checkpoint folder or net.safetensors whose net the training starts from, or hf://owner/name of a
    pushed run; `from` for short. The optimizer, the epochs and the queue start anew."""
    origin: str | None = None
    """How the weights of a run of 0 epochs were made, shown beside its metrics; set by `fit` and `soup`."""
    views: ViewsConfig = ViewsConfig()
    loader: LoaderConfig = LoaderConfig()
    mix: MixConfig = MixConfig()
    net: NetConfig = NetConfig()
    method: Annotated[MethodConfig, pydantic.Field(discriminator="name")] = RescomConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
    hub: HubConfig = HubConfig()
    speed: SpeedConfig = SpeedConfig()

    def __post_init__(self) -> None:
        if self.name in (".", "..") or not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f\x7f]*", self.name):
            raise InputError(
                "recipe.value", f"name must be the name of one folder, without / and not hidden, not {self.name!r}"
            )
        check_name(self.name, "name")
        if DEVICES.fullmatch(self.name):
            raise InputError(
                "recipe.value",
                f"name must be the name of a folder, and {self.name!r} is a device or a drive on Windows",
            )
        if len(os.fsencode(self.name)) > MAX_NAME:
            raise InputError("recipe.value", f"name is longer than the {MAX_NAME} bytes that a folder's name may have")
        if not self.output or "\0" in self.output:
            raise InputError("recipe.value", f"output must be a folder, not {self.output!r}")
        if not 0 <= self.seed < MAX_SEED:
            raise InputError("recipe.value", f"seed must be from 0 to {MAX_SEED - 1:,}, not {self.seed}")
        for name, epoch in (
            ("schedule.warmup_epochs", self.schedule.warmup_epochs),
            ("the last of schedule.milestones", max(self.schedule.milestones, default=0)),
        ):
            if epoch >= self.train.epochs > 0:
                raise InputError(
                    "recipe.conflict",
                    f"{name} is {epoch}, which train.epochs = {self.train.epochs} never reaches: lower both",
                )
        compiled = bool(self.speed.capture or self.speed.compile)
        contrast = self.views.contrast is not None
        fit_batch = self.train.fit_batch
        check_method(self.method, mix=self.mix.on, fit_batch=fit_batch, compiled=compiled, contrast=contrast)
        parts = self.train.accumulate > 1 or self.train.fit_batch or self.optimizer.sam is not None
        if parts and self.speed.compile in ("reduce-overhead", "max-autotune"):
            raise InputError(
                "recipe.conflict",
                f"speed.compile: {self.speed.compile} captures CUDA graphs, each of which overwrites the gradients of "
                "the one before: with train.accumulate above 1 or optimizer.sam say true or max-autotune-no-cudagraphs",
            )
        if self.net.frozen_precision == "bf16" and self.train.precision != "bf16":
            raise InputError("recipe.conflict", "net.frozen_precision: bf16 needs train.precision: bf16")
        speed, train = self.speed, self.train
        for key, other, both in (
            ("views.contrast", "loader.device_views", contrast and self.loader.device_views),
            ("views.contrast", "speed.resident", contrast and speed.resident),
            ("speed.grad_checkpointing", "speed.capture", speed.grad_checkpointing and speed.capture),
            ("speed.grad_checkpointing", "speed.compile", speed.grad_checkpointing and speed.compile),
            ("speed.capture", "train.accumulate", speed.capture and train.accumulate > 1),
            ("speed.capture", "train.fit_batch", speed.capture and train.fit_batch),
            ("speed.capture", "train.nonfinite: skip", speed.capture and train.nonfinite == "skip"),
            ("speed.capture", "mix", speed.capture and self.mix.on),
            ("speed.capture", "train.ema", speed.capture and train.ema is not None),
            ("speed.capture", "train.precision: fp16", speed.capture and train.precision == "fp16"),
            ("speed.capture", f"speed.compile: {speed.compile}", speed.capture and isinstance(speed.compile, str)
             and speed.compile != "default"),
        ):  # fmt: skip
            if both:
                raise InputError("recipe.conflict", f"{key} does not go together with {other}: turn one of them off")
        for key, asked in (
            ("evaluation.patience", self.evaluation.patience is not None),
            ("hub.strategy: best", self.hub.repo is not None and self.hub.strategy == "best"),
        ):
            if asked and self.data.validation == "none":
                raise InputError("recipe.conflict", f"{key} needs data.validation, where the best epoch is chosen")

    @property
    def folder(self) -> Path:
        """The run's folder; a run of the same name that is there already makes it name-2, name-3 ..."""
        return Path(self.output).expanduser() / (self.name or "run")

    def to_dict(self) -> dict[str, object]:
        """Plain types, ready for JSON or YAML, of which load_dict makes the same recipe. The home folder becomes ~."""
        return json.loads(without_home(json.dumps(dataclasses.asdict(self))))

    def to_yaml(self) -> str:
        """The recipe as YAML text, which load reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)
