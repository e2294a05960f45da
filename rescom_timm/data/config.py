"""The sections of a recipe on data, apart from what they configure: checked without torchvision, timm or datasets.

Those take seconds to import, and a wrong key is reported before. Not here: the steps of a policy (transforms).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rescom_timm.data.benchmarks import data_path, get_hint
from rescom_timm.data.decoding import ReadConfig
from rescom_timm.data.profiles import RULES, parse_call, parse_rule
from rescom_timm.data.sampling import SamplerName
from rescom_timm.data.shared_memory import TIMEOUT
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.hub_client import hub_id, missing

MEMORY = "memory"
"""The source of a data set that was given in Python."""
VALIDATION = ("holdout", "unused", "split", "index")

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "cifar": (CIFAR_MEAN, CIFAR_STD),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inat": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
"""The (mean, std) that the literature uses, of channels scaled to 0..1."""


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None: found by name (image, label, split), or not used (group)."""

    image: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Training, validation and test data. Raises InputError (data.rule, data.outside, recipe.conflict)."""

    source: str
    """"digits", a Hub id, a folder of parquet, arrow or save_to_disk, or an image root where index lists paths.
    "memory" is the data set that was given in Python."""
    train: str = "train"
    """Name of the split to train on."""
    test: str = "test"
    """Name of the split to test on; without one, "holdout(0.2)": that fraction of each class's training rows; "none":
    nothing is tested."""
    index: str = "all"
    """Training rows: "all", "exponential(100)", "step(100)", an index file, official list or iNaturalist JSON."""
    test_index: str = "all"
    """Test rows, likewise."""
    validation: str = "none"
    """"none"; "holdout(0.1)": that fraction of each class's training rows; "unused(50)": rows per class of the split
    that the index leaves out; "split(NAME)": another split; "index(FILE)": rows of the training split or image root."""
    image_column: str | None = None
    """Of a data set or a list with named columns. None: found by its feature type, or by its name."""
    label_column: str | None = None
    """Likewise."""
    split_column: str | None = None
    """Of a list with named columns: whose values are train, test ... None: split, subset, set or partition, if any."""
    group_column: str | None = None
    """What a hold-out must not divide: patient, camera, burst. None: single images."""
    subset: str | None = None
    """Configuration of a Hub data set that has several."""

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("data.source", "data.source is empty: name a Hub data set, a local folder, or digits")
        other = self.validation[6:-1] if self.validation.startswith("split(") else ""
        for split in (self.train, self.test, other):
            if Path(split).is_absolute() or ".." in re.split(r"[/\\]", split):
                raise InputError(
                    "data.outside", f"split {split!r} leads out of data.source: use a split or a folder in it"
                )
        for rule in (self.index, self.test_index):
            if parse_call(rule, RULES):
                parse_rule(rule)
        if self.test == "none" and self.test_index != "all":
            raise ValueError("test none, and test_index names test rows: say one of them")
        if call := parse_call(self.test, ("holdout",)):
            _check_part(self.test, call[1])
            if self.test_index != "all":
                raise InputError("recipe.conflict", f"test {self.test} excludes test_index: set only one of them")
        if self.validation == "none":
            return
        name, argument = parse_call(self.validation, VALIDATION) or ("", "")
        if not name:
            raise InputError(
                "data.rule", f"validation {self.validation!r} is neither none nor {', '.join(VALIDATION)} (...)"
            )
        if name == "holdout":
            _check_part(self.validation, argument)
        if name == "unused" and not (argument.isdigit() and int(argument) > 0):
            raise InputError(
                "data.rule", f"{self.validation}: needs a whole number of rows per class, such as unused(50)"
            )
        if not argument:
            raise InputError("data.rule", f"{self.validation}: nothing is named between the brackets")

    @property
    def columns(self) -> Columns:
        """Names of the columns of a table."""
        return Columns(self.image_column, self.label_column, self.split_column, self.group_column)


@dataclass(frozen=True)
class ViewsConfig:
    """What is done to images before the net sees them."""

    train: str = "cifar"
    """Policy of every training view: a name of `POLICIES` or a line of steps."""
    contrast: str | None = None
    """Policy of all training views but the first, which alone is then classified (rescom, moco, bcl, proco)."""
    eval: str = "none"
    """Policy of evaluation images; it must bring all of them to one size."""
    mean: tuple[float, float, float] = CIFAR_MEAN
    """Mean of each channel scaled to 0..1, taken off on the device; also cutout's colour. Known: `NORMALISATIONS`."""
    std: tuple[float, float, float] = CIFAR_STD
    """Standard deviation of each channel scaled to 0..1."""

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or not all(0 <= m <= 1 for m in self.mean):
            raise InputError("recipe.value", f"mean must be three numbers from 0 to 1, not {self.mean}")
        if len(self.std) != 3 or not all(0 < s <= 1 for s in self.std):
            raise InputError("recipe.value", f"std must be three numbers above 0 and at most 1, not {self.std}")


@dataclass(frozen=True)
class LoaderConfig:
    """How training samples are drawn and read. These keys change results."""

    sampler: SamplerName = "uniform"
    """uniform: every image once an epoch. The others make as many draws, with replacement, and choose the class first:
    uniformly (class_balanced), by the root of its count (square_root), by its count in the first epoch and uniformly in
    the last (progressive), or by the inverse of its count (reversed). See `class_probabilities`. Methods with two draws
    (bbn, gistnet) set the second sampler themselves."""
    broken: Literal["stop", "skip"] = "stop"
    """An unreadable training image stops the run, or is replaced by another of its class, with a warning. Evaluation
    always stops, because its metrics are those of the whole split."""
    exif: bool = False
    """Rotate images by their EXIF orientation, also when the trained model reads them. For your own photographs; the
    papers' pipelines do not."""
    white_level: int | None = None
    """Level of 16-bit gray images that is white: 4095 for images that hold 12 bits. null: 65535."""
    max_pixels: int | None = None
    """Larger images are refused before they are decoded. null: 178,956,970."""
    device_views: bool = False
    """The workers only decode and do a policy's first steps, such as random_resized_crop; flip, rotate, jitter,
    grayscale, randaugment, autoaugment and cutout follow on the device, in batches. The draws are the same; rotate,
    jitter and randaugment may change some pixels by a level or two. For GPUs that wait for their images."""

    def __post_init__(self) -> None:
        if self.sampler not in get_args(SamplerName):
            raise InputError(
                "recipe.value", f"sampler must be one of {', '.join(get_args(SamplerName))}, not {self.sampler!r}"
            )
        if self.broken not in ("stop", "skip"):
            raise InputError("recipe.value", f"broken must be stop or skip, not {self.broken!r}")
        self.reading  # noqa: B018 (it checks its values)

    @property
    def reading(self) -> ReadConfig:
        """How images are decoded, also by the trained model."""
        return ReadConfig(self.exif, self.white_level, self.max_pixels)


@dataclass(frozen=True)
class LoadingConfig:
    """Keys that change the speed of loading, never what is loaded."""

    workers: int = 4
    """Worker processes of each training process, at most its cores; 0 loads in the training process itself."""
    prefetch: int = 4
    """Batches that each worker prepares ahead."""
    timeout: float = TIMEOUT
    """Seconds to wait for a batch of the workers."""
    pin_memory: bool = True
    """Page-locked batches, which are copied to a GPU asynchronously; ignored without a GPU."""
    batched: bool = True
    """Augment a whole batch at once if its images have one size, at most 128 x 128 pixels, and every step of the policy
    is crop, flip, autoaugment, grayscale or cutout (jitter: 64 x 64, rotate: 24 x 24); else do jitter and randaugment
    in NumPy instead of Pillow. The pixels are the same; see batched_transforms.py and plane_transforms.py."""
    cache: int = 256
    """Megabytes. Training images of one size that fit in are decoded once, at the start, and kept in memory, which
    forked workers share (CIFAR: 150); so are evaluation images that fit into 32 of them. 0: none."""
    resident: bool = False
    """Training images of one size (within `cache`) stay on the device and are augmented there, several batches at once;
    the workers only draw. For small images on a GPU, which is faster than the CPU's workers."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError("recipe.value", f"workers must be 0 or more, not {self.workers}")
        if not 1 <= self.prefetch <= 1000:
            raise InputError("recipe.value", f"prefetch must be from 1 to 1,000 batches, not {self.prefetch}")
        if not self.timeout > 0:
            raise InputError("recipe.value", f"timeout must be above 0 seconds, not {self.timeout}")
        if self.cache < 0:
            raise InputError("recipe.value", f"cache must be 0 or more megabytes, not {self.cache}")


@dataclass(frozen=True)
class MixConfig:
    """Mixing of training images.

    Each pass draws one share from Beta(alpha, alpha), and each process mixes its part of the batch; both views of an
    image have the same partner.
    """

    mixup: float = 0.0
    """alpha of mixup (Zhang et al. 2018, arXiv 1710.09412); 0: off."""
    cutmix: float = 0.0
    """alpha of CutMix (Yun et al. 2019, arXiv 1905.04899); 0: off."""
    probability: float = 1.0
    """That a pass is mixed at all."""
    switch_probability: float = 0.5
    """That a mixed pass is one of CutMix, where both are on."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise InputError("recipe.value", f"{name} must be at least 0, where it is off")
        for name in ("probability", "switch_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError("recipe.value", f"{name} must be in [0, 1]")

    @property
    def on(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0


def index_path(spec: str) -> Path:
    """The path of an index file. Raises MissingFileError."""
    path = data_path(spec)
    if not path.is_file() and (hint := get_hint(spec)):
        raise MissingFileError("data.missing", f"{spec} does not exist{hint}")
    if not path.is_file():
        raise MissingFileError(
            "file.missing", f"no index {spec!r}: use all, a rule such as exponential(100), or a file"
        )
    return path


def refuse_missing(config: DataConfig, lists: bool = True) -> None:
    """Raise MissingFileError if the folder or a list that the section names does not exist. The Hub is not asked.

    lists: of the training, test and validation rows; false: the folder alone.
    """
    named = config.source in ("digits", MEMORY) or hub_id(config.source, alone=True) is not None
    if not named and not data_path(config.source).is_dir():
        raise missing(config.source, hint=get_hint(config.source))
    call = parse_call(config.validation, VALIDATION) if config.validation != "none" else None
    for spec in (config.index, config.test_index, *(call[1:] if call and call[0] == "index" else ())):
        if lists and spec != "all" and not parse_call(spec, RULES):
            index_path(spec)


def _check_part(rule: str, argument: str) -> None:
    try:
        valid = 0 < float(argument) < 1
    except ValueError:
        valid = False
    if not valid:
        raise InputError("data.rule", f"{rule}: needs a fraction between 0 and 1, such as holdout(0.1)")
