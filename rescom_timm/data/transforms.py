"""Views: from an image to one augmented 8-bit crop. A policy is one line, applied from left to right.

    crop(32,4) | flip | autoaugment(cifar10) | cutout(16)

Steps take and give an RGB PIL image; they are torchvision's and timm's own, over Pillow. `STEPS` lists them, `POLICIES`
names whole lines, and a name may be part of a line ("places | blur"). Arguments may be given by name: crop(32, pad=4).
Evaluation uses a policy without random steps. Random draws come from the global generators of torch, numpy and random,
which samples.py seeds for each sample. This module defines a policy; batched_transforms.py has fast forms of some
steps. Pixels stay 8-bit: mean and standard deviation of `ViewsConfig` are applied on the device.
"""

import difflib
import functools
import inspect
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from rescom_timm.data.config import CIFAR_MEAN, ViewsConfig
from rescom_timm.data.crops import CornerCrop, RisingCrop
from rescom_timm.errors import InputError

Step = Callable[[Image.Image], Image.Image]
Colour = tuple[int, int, int]
Interpolation = Literal["bilinear", "bicubic", "nearest"]

POLICIES: dict[str, str] = {
    "none": "",
    "cifar": "crop(32,4) | flip | autoaugment(cifar10) | cutout(16)",
    "imagenet": "places | grayscale(0.2) | randaugment(n2,m10,mstd0.5)",
    "places": "random_resized_crop(224) | flip | jitter(0.4,0.4,0.4,0)",
    "digits": "crop(8,1) | rotate(10) | jitter(0.4,0.4,0,0)",  # 8 x 8 pixels; a mirrored digit is no digit
    "simclr32": "random_resized_crop(32) | flip | jitter(0.4,0.4,0.4,0.1,0.8) | grayscale(0.2)",
    "simclr224": "random_resized_crop(224) | flip | jitter(0.4,0.4,0.4,0.1,0.8) | grayscale(0.2)",
    "eval224": "resize(256) | center_crop(224)",
}
"""Named policies. "cifar" and "imagenet" are the ResCom paper's for CIFAR-LT and for ImageNet-LT and iNaturalist,
"simclr32" and "simclr224" those of the second and third views of BCL and ProCo."""


# ---------------------------------------------------------------------------------------------------------- policies


class Policy:
    """A parsed policy. `text` is the line with every name and default written out, for a run to record.

    `policy(image)` gives uint8 (3, H, W); `policy.augment(image)` the same as a PIL image. Each call draws anew.
    """

    def __init__(self, steps: list[Step], text: str) -> None:
        self.steps = steps
        self.text = text

    @property
    def moves(self) -> bool:
        """Whether a step changes over a run and needs `set_progress`."""
        return any(isinstance(step, RisingCrop) for step in self.steps)

    def set_progress(self, t: float) -> None:
        """Set the progress of the run, from 0 in its first epoch to 1 in its last; workers see it too."""
        for step in self.steps:
            if isinstance(step, RisingCrop):
                step.progress.fill_(t)

    def augment(self, image: Image.Image) -> Image.Image:
        """The image after all steps."""
        for step in self.steps:
            image = step(image)
        return image

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """One view, uint8 (3, H, W)."""
        return torch.from_numpy(np.array(self.augment(image))).permute(2, 0, 1).contiguous()

    def __repr__(self) -> str:
        return f"Policy({self.text!r})"


def seed_all(seed: int) -> None:
    """Seed the three generators that steps draw from. Not torch.manual_seed, which would re-seed the GPUs too."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def parse(policy: str, mean: tuple[float, float, float] = CIFAR_MEAN) -> Policy:
    """The policy of a line. mean: (0..1, RGB) colour, rounded, of what cutout and randaugment uncover.

    Raises InputError (recipe.views) for an unknown step or name, with the nearest one, and for wrong arguments, with
    the step's signature.
    """
    colour = cast(Colour, tuple(round(255 * m) for m in mean))
    steps, texts = [], []
    for name, tokens in _split(policy):
        try:
            arguments = _bind(name, tokens)
            steps.append(STEPS[name](*arguments, **_colour(name, colour)))
        except (TypeError, ValueError) as error:
            raise InputError("recipe.views", f"{name}({', '.join(tokens)}): {error}; use {usage(name)}") from error
        texts.append(f"{name}({','.join(map(str, arguments))})")
    return Policy(steps, " | ".join(texts))


def check(views: ViewsConfig) -> None:
    """Raise InputError (recipe.views) for a policy that cannot be parsed."""
    for line in (views.train, views.eval, views.contrast or ""):
        parse(line, views.mean)


def usage(name: str) -> str:
    """How a step is written, with its defaults: "crop(size, pad=0)"."""
    shown = (p.replace(annotation=p.empty) for p in _parameters(name))
    return f"{name}({', '.join(str(p) for p in shown)})"


def _split(line: str) -> list[tuple[str, list[str]]]:
    """The (step, argument texts) of a line, with named policies replaced by their own steps."""
    found: list[tuple[str, list[str]]] = []
    parts = [part.strip() for part in line.split("|")]
    for part in parts:
        if part == "" and len(parts) == 1:
            continue
        match = re.fullmatch(r"(\w+)\s*(?:\(([^()]*)\))?", part)
        if match is None:
            raise InputError("recipe.views", f"cannot read {part!r} in {line!r}: write name(arguments) between '|'")
        name, arguments = match.groups()
        if name in POLICIES and arguments is None:
            found += _split(POLICIES[name])
        elif name in STEPS:
            found.append((name, [a.strip() for a in arguments.split(",")] if arguments and arguments.strip() else []))
        else:
            names = [*STEPS, *POLICIES]
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
            raise InputError(
                "recipe.views",
                f"unknown step {name!r} in {line!r}: did you mean {nearest!r}? Steps: {', '.join(sorted(STEPS))}. "
                f"Policies: {', '.join(sorted(POLICIES))}.",
            )
    return found


def _parameters(name: str) -> list[inspect.Parameter]:
    """The parameters that a line may give; `colour` comes from the mean."""
    return [p for p in inspect.signature(STEPS[name]).parameters.values() if p.name != "colour"]


def _colour(name: str, colour: Colour) -> dict[str, Any]:
    return {"colour": colour} if "colour" in inspect.signature(STEPS[name]).parameters else {}


def _bind(name: str, tokens: list[str]) -> list[Any]:
    """The step's arguments in order, with defaults, from texts given by position or by name.

    They are converted to the annotated types.
    """
    if name == "randaugment":
        return _randaugment_settings(tokens)  # timm's own notation
    args: list[str] = []
    kwargs: dict[str, str] = {}
    for token in tokens:
        key, equals, value = (t.strip() for t in token.partition("="))
        if equals and key in kwargs:
            raise TypeError(f"{key} is given twice")
        if equals:
            kwargs[key] = value
        elif kwargs:
            raise TypeError(f"{token!r} must come before the arguments given by name")
        else:
            args.append(token)
    bound = inspect.Signature(_parameters(name)).bind(*args, **kwargs)
    kinds = {key: parameter.annotation for key, parameter in bound.signature.parameters.items()}
    bound.arguments = {key: _read(key, value, kinds[key]) for key, value in bound.arguments.items()}
    bound.apply_defaults()
    return list(bound.args)


def _read(key: str, token: str, kind: Any) -> int | float | str:
    choices = get_args(kind)
    if choices:
        if token not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, not {token!r}")
        return token
    try:
        return cast(int | float | str, kind(token))
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key} must be {wanted}, not {token!r}") from None


# ------------------------------------------------------------------------------------------------------------- steps


MAX_LAYERS = 20
MAX_SIDE = 8192
"""Pixels of the largest side that a step may make; larger values are typing errors and would take gigabytes."""


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not 1 <= size <= MAX_SIDE:
            raise ValueError(f"{name} must be from 1 to {MAX_SIDE:,} pixels, not {size}")


def _level(fill: int) -> None:
    if not 0 <= fill <= 255:
        raise ValueError(f"fill must be a grey level from 0 to 255, not {fill}")


def _probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"a probability lies between 0 and 1, not {p}")


def crop(size: int, pad: int = 0) -> Step:
    """A square of `size` pixels at a random place, after `pad` black pixels on each side."""
    _positive(size=size)
    if not 0 <= pad <= MAX_SIDE:
        raise ValueError(f"pad must be from 0 to {MAX_SIDE:,} pixels, not {pad}")
    return transforms.RandomCrop(size, padding=pad or None)


def random_resized_crop(
    size: int, lo: float = 0.08, hi: float = 1.0, interpolation: Interpolation = "bilinear"
) -> Step:
    """Inception's crop: `lo` to `hi` of the area, aspect ratio 3/4 to 4/3, resized to `size` pixels square."""
    _positive(size=size)
    if not 0 < lo <= hi <= 1:
        raise ValueError(f"the fractions of the area must satisfy 0 < lo <= hi <= 1, not {lo} and {hi}")
    return transforms.RandomResizedCrop(size, scale=(lo, hi), interpolation=InterpolationMode(interpolation))


def rising_crop(size: int, lo: float = 0.08, interpolation: Interpolation = "bicubic") -> Step:
    """LIFT+'s crop (arXiv 2504.13282): a square of `least` to all of the area, resized to `size` pixels.

    `least` rises over the epochs t = 0 .. 1 from `lo` to 1 as lo + (1 - lo)(1 - sqrt(1 - t^2)).
    """
    _positive(size=size)
    if not 0 < lo <= 1:
        raise ValueError(f"the least fraction of the area must satisfy 0 < lo <= 1, not {lo}")
    return RisingCrop(size, lo, InterpolationMode(interpolation))


def flip(p: float = 0.5) -> Step:
    """Horizontal flip with probability `p`."""
    _probability(p)
    return transforms.RandomHorizontalFlip(p)


def rotate(degrees: float) -> Step:
    """Rotation by an angle uniform in [-degrees, degrees]; corners black."""
    if not 0 <= degrees <= 180:
        raise ValueError(f"degrees must lie between 0 and 180, not {degrees}")
    return transforms.RandomRotation(degrees, interpolation=InterpolationMode.BILINEAR)


@functools.lru_cache(maxsize=64)
def magnitudes(num_bins: int, image_size: tuple[int, int]) -> dict[str, tuple[torch.Tensor, bool]]:
    """AutoAugment's operations: (their magnitudes (num_bins,), whether the sign is drawn); image_size is (H, W)."""
    return transforms.AutoAugment._augmentation_space(cast(Any, None), num_bins, image_size)


class AutoAugment(transforms.AutoAugment):
    """AutoAugment of torchvision, with its table of magnitudes made once per image size instead of once per image."""

    def _augmentation_space(self, num_bins: int, image_size: tuple[int, int]) -> dict[str, tuple[torch.Tensor, bool]]:
        return magnitudes(num_bins, tuple(image_size))


def autoaugment(policy: Literal["cifar10", "imagenet", "svhn"], fill: int = 128) -> Step:
    """AutoAugment (arXiv 1805.09501), torchvision's tables.

    Uncovered pixels are gray, near the mean, as in the paper's code and the CIFAR long-tail pipelines (torchvision's
    default is black: fill=0).
    """
    _level(fill)
    return AutoAugment(transforms.AutoAugmentPolicy(policy), fill=cast(Any, fill))  # a number is allowed, see its doc


def trivialaugment(fill: int = 128) -> Step:
    """TrivialAugment, wide (arXiv 2103.10158): one operation, uniform in kind and strength."""
    _level(fill)
    return transforms.TrivialAugmentWide(fill=cast(Any, fill))


def _randaugment_settings(settings: Iterable[str]) -> list[str]:
    """All of timm's settings as texts: the given ones over timm's defaults."""
    found = {"n": "2", "m": "10", "p": "0.5", "mstd": "0", "inc": "0"}
    for setting in settings:
        match = re.fullmatch(r"(n|m|mmax|inc)(\d+)|(p|mstd)(\d*\.?\d+)|(t)(weights|3aw|3a)", setting)
        if match is None:
            raise ValueError(
                f"unknown setting {setting!r}; known: n2 (operations), m10 (magnitude), mstd0.5, mmax10, p0.5, "
                "inc1, tweights, t3a, t3aw"
            )
        key, value = (group for group in match.groups() if group)
        if key == "n" and not 1 <= int(value) <= MAX_LAYERS:
            raise ValueError(f"n must be from 1 to {MAX_LAYERS} operations, not {value}")
        found[key] = f"{float(value):g}" if key in ("p", "mstd") else value  # timm cannot read "mstd.5"
    return [key + value for key, value in found.items()]


def randaugment(*settings: str, colour: Colour = (128, 128, 128)) -> Step:
    """RandAugment of timm (arXiv 1909.13719), in timm's notation: n2,m10,mstd0.5.

    Uncovered pixels have the mean colour. timm applies each drawn operation with probability 0.5 unless p is given.
    """
    text = "-".join(["rand", *_randaugment_settings(settings)])
    step = rand_augment_transform(text, {"img_mean": colour})
    for operation in step.ops:
        if operation.aug_fn is timm_posterize:
            operation.aug_fn = _posterize
    return cast(Step, step)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, for 0 bits too: black before Pillow 13, which refuses it."""
    return timm_posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def jitter(brightness: float, contrast: float, saturation: float, hue: float, p: float = 1.0) -> Step:
    """With probability `p`, colours change by factors uniform in 1 +- value (hue: by up to 0.5), in random order."""
    _probability(p)
    for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        if not 0 <= value <= 100:
            raise ValueError(f"{name} must lie between 0 and 100, not {value}")
    step = transforms.ColorJitter(brightness, contrast, saturation, hue)
    return step if p == 1 else transforms.RandomApply([step], p)


def grayscale(p: float) -> Step:
    """Grayscale with probability `p` (three equal channels)."""
    _probability(p)
    return transforms.RandomGrayscale(p)


@dataclass(frozen=True)
class _Blur:
    p: float
    lo: float
    hi: float

    def __call__(self, image: Image.Image) -> Image.Image:
        applied, at = torch.rand(2).tolist()
        if applied >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(self.lo + at * (self.hi - self.lo)))


def blur(p: float = 0.5, lo: float = 0.1, hi: float = 2.0) -> Step:
    """Gaussian blur with probability `p`, sigma uniform from `lo` to `hi` pixels (SimCLR, MoCo v2)."""
    _probability(p)
    if not 0 <= lo <= hi <= MAX_SIDE:
        raise ValueError(f"sigma must satisfy 0 <= lo <= hi <= {MAX_SIDE:,}, not {lo} and {hi}")
    return _Blur(p, lo, hi)


@dataclass(frozen=True)
class Cutout:
    """The step of `cutout`."""

    size: int
    colour: Colour

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image with the square painted."""
        x, y = (int(torch.randint(side, ())) - self.size // 2 for side in image.size)
        image = image.copy()  # the decoded image is shared by all views of a sample
        right, bottom = min(x + self.size, image.width), min(y + self.size, image.height)
        image.paste(self.colour, (max(x, 0), max(y, 0), right, bottom))
        return image


def cutout(size: int, colour: Colour = (0, 0, 0)) -> Step:
    """Cutout (arXiv 1708.04552): one square of `size` pixels, its centre uniform over the pixels, cut at the border.

    The paper writes 0 after normalisation, which is the mean colour; here the mean is written, rounded to 8 bits.
    """
    _positive(size=size)
    return Cutout(size, colour)


def resize(size: int, interpolation: Interpolation = "bilinear") -> Step:
    """The shorter side becomes `size` pixels; the aspect ratio stays."""
    _positive(size=size)
    return transforms.Resize(size, InterpolationMode(interpolation))


def upscale(size: int, interpolation: Interpolation = "bilinear") -> Step:
    """Exactly `size` x `size` pixels, whatever the aspect ratio."""
    _positive(size=size)
    return transforms.Resize((size, size), InterpolationMode(interpolation))


def center_crop(size: int) -> Step:
    """The middle square of `size` pixels (smaller images are padded black)."""
    _positive(size=size)
    return transforms.CenterCrop(size)


def corner_crop(size: int, corner: int) -> Step:
    """The square of `size` pixels in a corner: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    _positive(size=size)
    if not 0 <= corner <= 3:
        raise ValueError(f"corner must be from 0 to 3, not {corner}")
    return CornerCrop(size, corner)


STEPS: dict[str, Callable[..., Step]] = {
    step.__name__: step
    for step in (
        crop, random_resized_crop, rising_crop, flip, rotate, autoaugment, trivialaugment, randaugment, jitter,
        grayscale, blur, cutout, resize, upscale, center_crop, corner_crop,
    )
}  # fmt: skip
