"""Corrupted images: the kinds and severities of ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261).

Either made here from any split, by the package imagecorruptions-imaug (extra `robustness`), or read from a folder of
prepared images as it is. Made ones come after the evaluation policy, as ImageNet-C's came after resize and crop.

The strengths are ImageNet-C's, which were chosen for 224-pixel images; CIFAR-10-C's own are milder:

    severity 1 to 5          ImageNet-C                  CIFAR-10-C
    gaussian_noise, sigma    .08 .12 .18 .26 .38         .04 .06 .08 .09 .10
    contrast, factor         .4  .3  .2  .1  .05         .75 .5  .4  .3  .15
    brightness, added        .1  .2  .3  .4  .5          .05 .1  .15 .2  .3
    jpeg, quality            25  18  15  10  7           80  65  58  50  40
    pixelate, size           .6  .5  .4  .3  .25         .95 .9  .85 .75 .65

So an error on CIFAR images corrupted here is not an error on CIFAR-10-C: for that, give its folder. Images whose
shorter side is under 32 pixels are enlarged by a whole number, corrupted and brought back (one pixel of each block),
because the package takes no smaller.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from torch.utils.data import DataLoader

from rescom_timm.class_names import as_spelled, numbers_in
from rescom_timm.data.config import LoaderConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.image_folders import class_folders
from rescom_timm.data.loaders import eval_loader
from rescom_timm.data.samples import Batch, ViewsDataset
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import Policy
from rescom_timm.errors import InputError, MissingFileError, MissingPackageError
from rescom_timm.io import regular_size
from rescom_timm.text import counted

COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The fifteen kinds that mCE is the mean over."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Four more, meant for validation."""
KINDS = (*COMMON, *EXTRA)
SEVERITIES = (1, 2, 3, 4, 5)
_LEAST = 32  # pixels that the package takes
_SEEDED = ("impulse_noise", "glass_blur")  # draw from generators of their own


def check_kind(kind: str, known: Sequence[str] = KINDS) -> None:
    """Raise InputError (data.corrupted), naming the nearest, for an unknown corruption."""
    if kind not in known:
        from difflib import get_close_matches

        near = get_close_matches(kind, known, n=1, cutoff=0)
        raise InputError(
            "data.corrupted", f"unknown corruption {kind!r}: did you mean {near[0]}? Known: {', '.join(known)}"
        )


@dataclass(frozen=True)
class Corrupt:
    """A step of a policy: an RGB image to a corrupted one of the same size.

    Draws from numpy's global generator, which loaders seed for each image; `seed` gives other draws. Raises InputError
    (data.corrupted) for an unknown kind or severity.
    """

    kind: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.severity not in SEVERITIES:
            raise InputError("data.corrupted", f"severity must be one of 1, 2, 3, 4, 5, not {self.severity}")
        if self.seed < 0:
            raise InputError("data.corrupted", f"seed must be at least 0, not {self.seed}")

    def __call__(self, image: Pillow.Image) -> Pillow.Image:
        """The corrupted image."""
        words = [self.seed, KINDS.index(self.kind), self.severity, int(np.random.randint(2**31))]
        own = int(np.random.SeedSequence(words).generate_state(1)[0])
        np.random.seed(own)
        factor = max(1, -(-_LEAST // min(image.size)))
        large = image if factor == 1 else image.resize(_times(image.size, factor), Pillow.Resampling.NEAREST)
        options = {"seed": own % 2**31} if self.kind in _SEEDED else {}
        try:
            # zoom_blur prints where sizes are odd; spatter divides by its largest drop.
            with contextlib.redirect_stdout(io.StringIO()), np.errstate(invalid="raise"):
                pixels = _package().corrupt(np.asarray(large), self.severity, self.kind, **options)
        except FloatingPointError:
            return image  # no drop fell on this image
        found = Pillow.fromarray(pixels)
        # One pixel of each block; their mean would remove the noise.
        return found if factor == 1 else found.resize(image.size, Pillow.Resampling.NEAREST)


def corrupted_loader(
    split: Split,
    views: ViewsConfig,
    kind: str,
    severity: int,
    batch_size: int,
    seed: int = 0,
    config: LoaderConfig = LoaderConfig(),
    speed: LoadingConfig = LoadingConfig(),
) -> DataLoader[Batch]:
    """Every image of the split once, in order, corrupted after the evaluation policy.

    The pixels depend only on (seed, kind, severity, place in the split). Raises MissingPackageError without
    imagecorruptions-imaug.
    """
    _package()
    loader = eval_loader(split, views, batch_size, config, speed)
    dataset: ViewsDataset = loader.dataset  # type: ignore[assignment]
    step = Corrupt(kind, severity, seed)
    policy = dataset.policy
    dataset.policy = Policy([*policy.steps, step], f"{policy.text} | {kind}({severity},{seed})".removeprefix(" | "))
    return loader


def origin() -> str:
    """The source of corruptions made here, for a record."""
    from importlib.metadata import version

    _package()
    return f"made by imagecorruptions-imaug {version('imagecorruptions-imaug')}, ImageNet-C's strengths"


def _package() -> Any:
    try:
        import imagecorruptions
    except ImportError as error:
        hint = "pip install 'rescom-timm[robustness]'"
        if ".so" in str(error):
            hint = "OpenCV lacks a system library, such as that of apt-get install libgl1"
        raise MissingPackageError(
            "system.package",
            f"corruptions need imagecorruptions-imaug ({error}): {hint}; or use a folder of corrupted images",
        ) from error
    return imagecorruptions


def _times(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return size[0] * factor, size[1] * factor


# -------------------------------------------------------------------------------------------------- prepared folders


@dataclass(frozen=True)
class Prepared:
    """A folder of corrupted images.

    ImageNet-C (kind/severity/class/image, or one folder deeper, as its archives unpack) or CIFAR-10-C (kind.npy and
    labels.npy). `kinds` are in the benchmark's order.
    """

    folder: Path
    class_names: list[str]
    """The run's, which ImageNet-C's class folders are matched with; else the folders are counted in their order."""
    places: dict[str, Path] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """The corruptions in the folder, in the benchmark's order."""
        return [*(kind for kind in KINDS if kind in self.places)]

    @property
    def name(self) -> str:
        """The folder's name with a digest of its path: two folders of one name have separate results."""
        path = self.folder.resolve()
        return f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"

    def split(self, kind: str, severity: int) -> Split:
        """The images of a corruption and a severity, 1 to 5.

        Raises InputError (data.corrupted) and MissingFileError for a malformed or incomplete folder.
        """
        check_kind(kind, self.kinds)
        place = self.places[kind]
        name = f"{self.folder.name} {kind} {severity}"
        return self._array(place, severity, name) if place.suffix == ".npy" else self._images(place, severity, name)

    def _array(self, place: Path, severity: int, name: str) -> Split:
        pixels, labels = _read_array(place), _read_array(self.folder / "labels.npy")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise InputError(
                "data.corrupted", f"{self.folder}/labels.npy: {labels.dtype} {labels.shape}, not whole numbers (N,)"
            )
        labels = labels.astype(np.int64)
        each = len(pixels) // len(SEVERITIES)
        if pixels.ndim != 4 or pixels.dtype != np.uint8 or each * len(SEVERITIES) != len(pixels):
            raise InputError("data.corrupted", f"{place}: {pixels.dtype} {pixels.shape}, not uint8 (5 N, H, W, 3)")
        if len(labels) not in (each, len(pixels)):
            raise InputError(
                "data.corrupted",
                f"{self.folder}: {counted(len(labels), 'label')} in labels.npy, "
                f"{counted(len(pixels), 'image')} in {place.name}",
            )
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            known = len(self.class_names)
            raise InputError(
                "data.corrupted",
                f"{self.folder}/labels.npy has label {labels.max()}, the run {counted(known, 'class')}",
            )
        rows = np.arange((severity - 1) * each, severity * each)
        return Split(name, _Pixels(pixels, rows), labels[rows % len(labels)], rows)  # type: ignore[arg-type]

    def _images(self, place: Path, severity: int, name: str) -> Split:
        root = place / str(severity)
        if not root.is_dir():
            raise MissingFileError(
                "file.missing", f"{self.folder} has no severity {severity} of {place.name}: no folder {root}"
            )
        index, _ = class_folders(root)
        labels, folders = index.labels, list(index.class_names or [])
        if set(as_spelled(folders, self.class_names)) & set(self.class_names):
            numbers = numbers_in(self.class_names, folders, "the run", str(root), lacking=True)
            labels = labels if numbers is None else np.array(numbers)[labels]
        elif len(folders) != len(self.class_names):
            raise InputError(
                "data.corrupted",
                f"{root}: its {counted(len(folders), 'class folder')} ({folders[0]}, ...) and the run's "
                f"{counted(len(self.class_names), 'class')} do not match",
            )
        features = Features(image=Image(decode=False), label=Value("int64"))
        images = [{"bytes": None, "path": str(root / str(key))} for key in index.keys]
        dataset = Dataset.from_dict({"image": images, "label": labels}, features)
        return Split(name, dataset, labels, np.arange(len(labels)))


def prepared(folder: str | Path, class_names: list[str]) -> Prepared:
    """Open a folder of corrupted images. class_names: the run's K.

    Raises MissingFileError without the folder or labels.npy, InputError (data.corrupted) if it is neither ImageNet-C
    nor CIFAR-10-C.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingFileError("file.missing", f"no folder {folder} of corrupted images")
    places = {path.stem: path for path in folder.glob("*.npy") if path.stem in KINDS}
    if places and not (folder / "labels.npy").is_file():
        raise MissingFileError(
            "file.missing", f"{folder} holds {counted(len(places), 'kind')} of CIFAR-10-C but no labels.npy"
        )
    if not places:
        places = {path.name: path for path in [*folder.glob("*/*"), *folder.glob("*")] if path.name in KINDS}
    if not places:
        raise InputError(
            "data.corrupted",
            f"{folder} is neither ImageNet-C (kind/severity/class/image) nor CIFAR-10-C (kind.npy, labels.npy)",
        )
    return Prepared(folder, class_names, places)


def _read_array(path: Path) -> np.ndarray:
    """An array mapped into memory; its file must be as large as its header says. Raises InputError."""
    regular_size(path)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError("data.corrupted", f"{path} is an archive of arrays, not one array")
    return array


class _Pixels:
    """The methods of datasets.Dataset that loaders use, over an array (S, H, W, 3) on disk."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray) -> None:
        self.pixels = pixels
        self.rows = rows

    def select_columns(self, _: str) -> "_Pixels":
        return self

    def select(self, positions: Sequence[int]) -> "_Pixels":
        return _Pixels(self.pixels, self.rows[np.asarray(positions)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> list[dict[str, np.ndarray]]:
        return [{"image": np.array(self.pixels[self.rows[position]])} for position in positions]


def unprocessed(views: ViewsConfig) -> ViewsConfig:
    """The views of prepared images, which were resized and cropped before they were corrupted: unchanged."""
    return replace(views, eval="none")
