"""Time of inference: one net against ensembles of experts (paper, Tables 1 and 2).

An ensemble of E experts shares the stem of the backbone and has E copies of its last two stages, at full width, and E
classifiers, as `methods.experts` trains them (RIDE's own experts are narrower); of a backbone that cannot be cut, E
whole nets. All are timed in turn, round by round, in one process, so that their ratios share the machine's state.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rescom_timm.analysis import style
from rescom_timm.errors import InputError
from rescom_timm.methods.experts import ExpertsNet
from rescom_timm.models.net import Net, create_model

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inference:
    """Times of the nets.

    names (M,) of the nets, the plain one first; weights (M,) their number of parameters, without the projector;
    seconds (M, R): each round's time of one batch.
    """

    backbone: str
    batch_size: int
    image_size: tuple[int, int]
    num_classes: int
    precision: str
    machine: dict[str, Any]
    names: tuple[str, ...]
    weights: tuple[int, ...]
    seconds: npt.NDArray[np.float64]

    def record(self) -> dict[str, Any]:
        """The results as plain JSON.

        What was timed, where, and of each net the median and the quartiles in ms of a batch, images a
        second, and the ratio of its median to the plain net's.
        """
        return {
            "backbone": self.backbone,
            "batch_size": self.batch_size,
            "image_size": list(self.image_size),
            "num_classes": self.num_classes,
            "precision": self.precision,
            "rounds": self.seconds.shape[1],
            "machine": self.machine,
            "nets": [dict(zip(table(self), row, strict=True)) for row in zip(*table(self).values(), strict=True)],
        }


class Whole(nn.Module):
    """E whole nets; the mean of their logits."""

    def __init__(self, nets: Sequence[Net]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def classify(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K)."""
        return torch.stack([net.classify(images) for net in self.nets]).mean(dim=0)  # type: ignore[operator]


class Shared(nn.Module):
    """An ExpertsNet without what only training needs."""

    def __init__(self, net: ExpertsNet) -> None:
        super().__init__()
        self.net = net

    def classify(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K)."""
        net = self.net
        stem = net.encoder.forward_features(net.normalize(images))  # type: ignore[operator]
        return net.classifier(torch.stack([expert(stem) for expert in net.experts])).mean(dim=0)


def ensemble(
    backbone: str, experts: int, num_classes: int, branch: str | None = None, **options: Any
) -> tuple[str, nn.Module]:
    """(its name, an untrained ensemble).

    branch: first child of the backbone that every expert has for itself, by default the last stage but one. Raises
    ValueError where a named branch is no place to cut the backbone.
    """
    net = create_model(backbone, num_classes, projector=None, **options)
    stages = [info["module"] for info in getattr(net.encoder, "feature_info", []) if "module" in info]
    place = branch or (stages[-2] if len(stages) > 1 else None)
    if place is not None:
        try:
            shared = Shared(ExpertsNet(net, [net.encoder] * experts, place, 30.0))
            return f"{experts} experts from {place}", shared
        except ValueError:
            if branch is not None:
                raise
    others = [create_model(backbone, num_classes, projector=None, **options) for _ in range(1, experts)]
    return f"{experts} whole nets", Whole([net, *others])


def measure(
    backbone: str,
    experts: Sequence[int] = (2, 3, 4),
    *,
    batch_size: int = 64,
    image_size: tuple[int, int] | None = None,
    num_classes: int = 1000,
    device: str | None = None,
    precision: str = "float32",
    rounds: int = 30,
    warm_up: int = 5,
    branch: str | None = None,
    channels_last: bool = False,
    options: dict[str, Any] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Inference:
    """Time untrained nets on random eight-bit images that lie on the device: normalisation, encoder, classifier.

    image_size: (height, width); the backbone's own by default. options: of timm.create_model. Every round times each
    net once, in an order that turns, and waits for the device before and after. Raises ValueError for impossible
    settings.
    """
    if min(batch_size, rounds, num_classes) < 1 or warm_up < 0 or min(experts, default=2) < 2:
        raise InputError(
            "usage.arguments",
            "batch size, rounds and classes must be at least 1, warm-up at least 0, experts at least 2",
        )
    if precision not in PRECISIONS:
        raise InputError("usage.arguments", f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError("usage.arguments", "torch finds no GPU: use --device cpu")
    options = options or {}
    plain = create_model(backbone, num_classes, projector=None, **options)
    cfg: dict[str, Any] = plain.encoder.pretrained_cfg  # type: ignore[assignment]
    height, width = image_size or cfg["input_size"][1:]
    nets: dict[str, nn.Module] = {"plain": plain}
    for number in experts:
        name, net = ensemble(backbone, number, num_classes, branch, **options)
        nets[name] = net
    images = torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, device=place)
    for net in nets.values():
        net.to(place).eval()
        if channels_last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = np.empty((len(nets), rounds))
    number_of = [sum(parameter.numel() for parameter in net.parameters()) for net in nets.values()]
    order = list(enumerate(nets.items()))
    with torch.inference_mode(), torch.autocast(place.type, PRECISIONS[precision], enabled=precision != "float32"):
        for turn in range(-warm_up, rounds):
            for index, (_, net) in order[turn % len(order) :] + order[: turn % len(order)]:
                took = _time(net, images, place)
                if turn >= 0:
                    seconds[index, turn] = took
            note(f"round {turn + 1} of {rounds}" if turn >= 0 else "warming up")
    return Inference(
        backbone, batch_size, (height, width), num_classes, precision, machine(place),
        tuple(nets), tuple(number_of), seconds,
    )  # fmt: skip


def _time(net: nn.Module, images: Tensor, place: torch.device) -> float:
    _wait(place)
    start = time.perf_counter()
    net.classify(images)  # type: ignore[operator]
    _wait(place)
    return time.perf_counter() - start


def _wait(place: torch.device) -> None:
    if place.type != "cpu":
        torch.accelerator.synchronize(place)


def machine(place: torch.device) -> dict[str, Any]:
    """Device, processor, threads and versions."""
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "timm": version("timm"),
        "cuda": torch.version.cuda if place.type == "cuda" else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def table(found: Inference) -> style.Table:
    """One row per net."""
    low, median, high = np.quantile(1000 * found.seconds, [0.25, 0.5, 0.75], axis=1)
    return {
        "net": list(found.names),
        "weights": list(found.weights),
        "median_ms": median.round(4).tolist(),
        "lower_quartile_ms": low.round(4).tolist(),
        "upper_quartile_ms": high.round(4).tolist(),
        "images_per_second": (1000 * found.batch_size / median).round(2).tolist(),
        "ratio": (median / median[0]).round(4).tolist(),
    }


def draw(found: Inference) -> Figure:
    """Median time of a batch of each net, with its quartiles and its ratio to the plain one."""
    rows = table(found)
    low, median, high = (np.asarray(rows[name]) for name in ("lower_quartile_ms", "median_ms", "upper_quartile_ms"))
    figure = style.new_figure(7.2, 1.5 + 0.5 * len(found.names))
    axes = figure.subplots()
    places = np.arange(len(found.names))
    shades = ["#0072B2", *["#94a4a2"] * (len(places) - 1)]
    axes.barh(places, median, xerr=[median - low, high - median], height=0.62, color=shades,
              error_kw={"linewidth": 1, "capsize": 3, "ecolor": style.GREY})  # fmt: skip
    for place, (time_ms, end, ratio, speed) in enumerate(
        zip(median, high, rows["ratio"], rows["images_per_second"], strict=True)
    ):
        axes.annotate(f"{time_ms:,.3g} ms, x {ratio:.2f}, {speed:,.0f} images/s", (end, place), (5, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(places, [f"{name}\n{number / 1e6:.3g} M weights" for name, number in
                             zip(found.names, found.weights, strict=True)])  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * high.max())
    size = "x".join(map(str, found.image_size))
    device = found.machine["device"] if found.machine["device"] != "cpu" else found.machine["processor"]
    where = f"{style.plain(device, 50)}, {found.machine['threads']} thread(s), torch {found.machine['torch']}"
    title = f"{style.plain(found.backbone, 40)}, {found.batch_size} images of {size}, {found.precision}"
    style.tidy(axes, f"{title}\n{where}",
               f"time of a batch (ms), median and quartiles of {found.seconds.shape[1]} rounds", "", "x")  # fmt: skip
    return figure
