"""What a run writes beside its checkpoints: recipe.yaml, environment.json, metrics.jsonl, TensorBoard's files.

The trackers of `track.log_with` get the same.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
import torch
from PIL.Image import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rescom_timm.config.recipe import Recipe
from rescom_timm.config.secrets import without_secrets
from rescom_timm.data.progress import bars_shown
from rescom_timm.engine.allocator import thresholds
from rescom_timm.engine.errors import one_line
from rescom_timm.engine.run_folder import lines
from rescom_timm.engine.trackers import Trackers, left_out
from rescom_timm.io import errors_named, write_json, write_text
from rescom_timm.metrics import span

PACKAGES = ("rescom-timm", "torch", "torchvision", "timm", "accelerate", "datasets", "numpy", "pillow")


MININTERVAL = 0.5
"""Seconds between two drawings of a bar."""


class Log:
    """metrics.jsonl, one JSON object a line with epoch, step and named metrics, and the same in TensorBoard."""

    def __init__(
        self, folder: Path, recipe: Recipe, about: Mapping[str, object], step: int = 0, evaluated: bool = True
    ) -> None:
        """Opens the log of a run that has done `step` steps.

        Lines of later steps (of a run that was killed after its last checkpoint) are dropped, for they will come again;
        not evaluated: the evaluation after that step too. about: what else environment.json should hold.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        write_json(folder / "environment.json", {**environment(), **about})
        self.path = folder / "metrics.jsonl"
        kept = [
            line
            for line in lines(self.path)
            if line.get("step", 0) < step or (line.get("step", 0) == step and (evaluated or "lr" in line))
        ]
        write_text(self.path, (json.dumps(line) + "\n" for line in kept))
        purge = step + 1 if step else None
        self.board: SummaryWriter | None = None
        if "tensorboard" in recipe.track.log_with:
            try:
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
            except OSError as error:
                left_out("tensorboard", one_line(error))
        self.trackers = Trackers(folder, recipe)

    def write(self, epoch: int, step: int, figures: dict[str, float]) -> None:
        """epoch: epochs done. step: optimizer steps done."""
        with errors_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, "step": step, **figures}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that follows must not outlive it
        if self.board is not None:
            try:
                for name, value in figures.items():
                    self.board.add_scalar(name, value, step)
            except OSError as error:
                self.board = None
                left_out("tensorboard", one_line(error))
        self.trackers.log(figures, step)

    def finished(self, results: dict[str, dict[str, float]], draw: Callable[[], dict[str, Image]], step: int) -> None:
        """Send the final table to the trackers, and pictures to TensorBoard and those trackers that take some.

        Drawn only for these. What fails is a warning, for the run itself is done.
        """
        self.trackers.table(results, step)
        if self.board is None and not self.trackers.take_pictures():
            return
        try:
            pictures = draw()
            if self.board is not None:
                for name, picture in pictures.items():
                    self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")
        except Exception as error:  # of drawing, whatever it is
            warnings.warn(f"the figures for the trackers could not be drawn: {one_line(error)}", stacklevel=2)
            return
        self.trackers.pictures(pictures, step)

    def close(self) -> None:
        """Close the trackers and TensorBoard."""
        self.trackers.close()
        if self.board is not None:
            try:
                self.board.close()
            except OSError as error:
                warnings.warn(f"the last of {self.board.log_dir} could not be written: {error}", stacklevel=2)


def progress_bar(total: int, done: int, main: bool) -> tqdm[NoReturn]:
    """Of the images of all epochs, on a terminal of the main process."""
    return tqdm(
        total=total, initial=done, unit="img", unit_scale=True, smoothing=0.05, mininterval=MININTERVAL,
        dynamic_ncols=True,
        bar_format="{desc}{percentage:.0f}% of training |{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}",
        disable=not (main and bars_shown()),
    )  # fmt: skip


def show(bar: tqdm[NoReturn], epoch: str, sums: dict[str, float], passes: int) -> None:
    """Put the epoch that is trained, such as 3/30, and its means so far on the bar, which the next update draws."""
    bar.set_description(f"epoch {epoch}", refresh=False)
    if passes:
        parts = (f"{name} {sums[name] / passes:.3f}" for name in ("loss", "top1") if name in sums)
        bar.set_postfix_str(", ".join(parts), refresh=False)


def trained_line(weights: dict[str, int], images: int, steps: int, batch: int) -> str:
    """How much of the net trains, and which images an epoch of so many steps has no batch for."""
    share = 100 * weights["trained"] / weights["all"]
    line = f"{share:.1f}% of {weights['all'] / 1e6:.2f} M weights train"
    if (left := images - steps * batch) > 0:
        line += f"; each epoch leaves out {left:,} of {images:,} images, in turn: they do not fill a batch of {batch:,}"
    return line


def epoch_line(epochs: str, means: dict[str, float], images_per_second: float, trained: float, left: float) -> str:
    """The line of an epoch. epochs: such as 3/30. trained, left: seconds."""
    parts = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    times = f"{timedelta(seconds=round(trained))} trained, {timedelta(seconds=round(left))} left"
    memory = f"{peak_memory() / 2**30:.2f} GiB at most"
    return f"epoch {epochs}: {parts}, {images_per_second:,.0f} images/s, {times}, {memory}"


def duration(seconds: float) -> str:
    """Seconds for people: 42 seconds, 12 minutes, 3.4 hours."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def evaluation_line(
    epoch: int, figures: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Sequence[float]]]
) -> str:
    """The line of an evaluation. figures and their intervals: of each split, in percent."""

    def told_of(split: str, name: str, value: float) -> str:
        ends = intervals.get(split, {}).get(name)
        return f"{name} {value:.2f}" + (f" ({span(ends)})" if ends else "")

    parts = (
        "  ".join([split, *(told_of(split, name, value) for name, value in of.items())])
        for split, of in figures.items()
    )
    return f"after epoch {epoch}: {'; '.join(parts)}"


def peak_memory() -> int:
    """Bytes: the most that this process has held so far, of the GPU where it trains on one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def environment() -> dict[str, object]:
    """Versions, command, machine and the state of the code, without anything private."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": without_secrets(shlex.join(_command())),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "gpus": gpus,
        "allocator": dict(thresholds),
        "git": _git(),
    }


def _version(package: str) -> str | None:
    """None where it is not installed, as of a checkout that runs as it is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _command() -> list[str]:
    """How this process was started, by the variables that launchers set."""
    program, *arguments = sys.argv
    if Path(program).stem == "rescom-timm":
        return ["rescom-timm", *arguments]
    own = ["-m", "rescom_timm"] if Path(program).name == "__main__.py" else [program]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return ["accelerate", "launch", "--num_processes", os.environ.get("WORLD_SIZE", "1"), *own, *arguments]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"], *own, *arguments]
    return ["python", *own, *arguments]


def _git() -> dict[str, str] | None:
    """Commit of the code and whether it was changed since; None where it is no git checkout."""
    here = Path(__file__).parent

    def ask(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": ask("rev-parse", "HEAD").strip(), "changed": ask("status", "--porcelain", "-uno").strip()}
    except (OSError, subprocess.CalledProcessError):
        return None
