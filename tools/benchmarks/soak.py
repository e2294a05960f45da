"""`soak`: a long training, killed and resumed at random: memory, handles, processes, disk.

    python tools/benchmark.py soak --minutes 60                # the embedded digits, a life of about eight minutes
    python tools/benchmark.py soak --minutes 10 --life 60 --folder soak -o tools/benchmarks/

A small net trains with a loader's worker, an evaluation every tenth epoch, a checkpoint after each and TensorBoard, and
is ended by SIGKILL, SIGTERM or SIGINT again and again. Each life is watched: resident memory of the process and of it
with its children, open files, processes, and the sizes of the run's folder; all samples stand in FOLDER/samples.jsonl.
Slopes are least squares within each life after its warm-up, over all lives together. Ends with status 1 where memory or
open files grow, processes are left over, or an epoch is missing or logged twice. Not for Windows, which has no such
signals.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common import bytes_in, heading, keep, machine
from rescom_timm.engine.run_folder import lines
from rescom_timm.errors import InputError

RECIPE = [
    "digits_lt", "name=soak", "net.backbone=resnet8_cifar", "train.epochs=1000000", "schedule.name=constant",
    "schedule.warmup_epochs=0", "data.validation=holdout(0.2)", "evaluation.every=10", "checkpoint.every=1",
]  # fmt: skip
WARM_UP = 20
"""Epochs of a life before its memory counts: allocators and caches fill."""
MOST_GROWTH = 30.0
"""MiB that a life may grow by after its warm-up."""


@dataclass
class Sample:
    """What is seen of a living run."""

    seconds: float
    """Since the soak began."""
    epoch: int
    """Epochs done."""
    memory: float
    """Resident MiB of the process itself."""
    tree: float
    """Resident MiB of it and its children; pages that they share count for each."""
    files: int
    """Open in the process itself."""
    processes: int
    folder: float
    """MiB of the run's folder."""
    checkpoints: float
    tensorboard: float


@dataclass
class Life:
    """One launch of the run, from its start or resumption to its end."""

    samples: list[Sample] = field(default_factory=list)
    ended_by: str = "itself"
    code: int = 0
    left_over: int = 0

    def warm(self) -> list[Sample]:
        """Samples after the warm-up."""
        return [one for one in self.samples if one.epoch >= self.samples[0].epoch + WARM_UP]

    def usual(self) -> list[Sample]:
        """Those of them with as many processes as most: workers of an evaluation come and go."""
        warm = self.warm()
        number = max((one.processes for one in warm), key=[one.processes for one in warm].count, default=0)
        return [one for one in warm if one.processes == number]

    def growth(self) -> float | None:
        """Growth of the process's memory in MiB after the warm-up; None for a short life.

        From the medians of the first and the last fifth of the samples.
        """
        memory = [one.memory for one in self.warm()]
        fifth = len(memory) // 5
        return float(np.median(memory[-fifth:]) - np.median(memory[:fifth])) if fifth else None


def slope(lives: list[Life], value: str, by: str) -> float | None:
    """Least-squares growth of samples' `value` per unit of `by` after the warm-up.

    Each life has its own level. None for too few samples.
    """
    above = below = 0.0
    for life in lives:
        samples = life.usual() if value == "tree" else life.warm()
        x, y = (np.array([getattr(one, name) for one in samples], dtype=float) for name in (by, value))
        if len(x):
            above += float(((x - x.mean()) * (y - y.mean())).sum())
            below += float(((x - x.mean()) ** 2).sum())
    return above / below if below else None


def live(folder: Path, words: list[str], seconds: float, kind: signal.Signals, every: float, began: float) -> Life:
    """Start or resume the run, watch it, and send it the signal after so many seconds of training."""
    life = Life()
    before, trained_since = epochs_done(folder), 0.0
    with (folder / "output.txt").open("ab") as text:
        process = subprocess.Popen(
            [sys.executable, "-m", "rescom_timm", "train", *RECIPE, f"output={folder}", *words, "--resume"],
            stdout=text, stderr=text, start_new_session=True, env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        )  # fmt: skip
    try:
        while process.poll() is None and not (trained_since and time.monotonic() - trained_since > seconds):
            time.sleep(every)
            epoch = epochs_done(folder)
            if epoch > before:
                trained_since = trained_since or time.monotonic()
                try:
                    life.samples.append(look(psutil.Process(process.pid), folder, time.monotonic() - began, epoch))
                except psutil.Error:
                    break  # it ended meanwhile
                with (folder / "samples.jsonl").open("a") as kept:
                    kept.write(json.dumps(asdict(life.samples[-1])) + "\n")
        if process.poll() is None:
            life.ended_by = kind.name
            os.killpg(process.pid, kind)
        life.code = process.wait(timeout=300)
    except BaseException:  # such as Ctrl-C: the run has a session of its own
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    for _ in range(20):  # a loader's workers look for their parent every five seconds
        life.left_over = len(session(process.pid))
        if not life.left_over:
            break
        time.sleep(1)
    return life


def look(process: psutil.Process, folder: Path, seconds: float, epoch: int) -> Sample:
    memory, run = process.memory_info().rss / 2**20, folder / "soak"
    children = 0.0
    alive = 1
    for child in process.children(recursive=True):
        try:
            children += child.memory_info().rss / 2**20
            alive += 1
        except psutil.Error:
            continue  # a worker at its end
    sizes = [size(run), size(run / "checkpoints"), size(run / "tensorboard")]
    return Sample(round(seconds, 1), epoch, memory, memory + children, process.num_fds(), alive, *sizes)


def size(folder: Path) -> float:
    """MiB of its files."""
    return bytes_in(folder) / 2**20


def session(leader: int) -> list[int]:
    """Living processes of the session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (OSError, psutil.Error):
            continue
    return found


def epochs_done(folder: Path) -> int:
    """Number of epochs in metrics.jsonl."""
    path = folder / "soak" / "metrics.jsonl"
    return path.read_text().count('"train/loss"') if path.exists() else 0


def wrongs(lives: list[Life], epochs: list[float], checkpoints: list[str]) -> list[str]:
    """Problems of a soak. epochs: as in metrics.jsonl. checkpoints: names in their folder."""
    growths = [growth for life in lives if (growth := life.growth()) is not None]
    files = [[one.files for one in life.samples] for life in lives]
    found = {
        "no epoch was trained": not epochs,
        "an epoch is missing or logged twice": epochs != list(range(1, len(epochs) + 1)),
        "a run ended by itself": any(life.ended_by == "itself" for life in lives),
        "processes were left over": any(life.left_over for life in lives),
        f"memory grew by more than {MOST_GROWTH:.0f} MiB in a life": any(growth > MOST_GROWTH for growth in growths),
        "open files grew": any(max(seen[-5:]) > max(seen[:20]) + 5 for seen in files if len(seen) > 25),
        "files of a checkpoint were left over": any(name.startswith(".") for name in checkpoints)
        and lives[-1].ended_by != "SIGKILL",
    }
    return [problem for problem, bad in found.items() if bad]


def summary(lives: list[Life]) -> list[dict[str, Any]]:
    """A row of each life: epochs, what ended it, and of what is watched the first warm and the last value."""
    rows = []
    for life in lives:
        warm = life.warm()
        row: dict[str, Any] = {"ended_by": life.ended_by, "code": life.code, "left_over": life.left_over}
        if life.samples:
            row["epochs"] = [life.samples[0].epoch, life.samples[-1].epoch]
            row["files"] = [min(one.files for one in life.samples), max(one.files for one in life.samples)]
            row["processes"] = max(one.processes for one in life.samples)
        if warm:
            names = ("memory", "tree", "folder", "checkpoints", "tensorboard")
            row |= {name: [round(getattr(one, name), 3) for one in (warm[0], warm[-1])] for name in names}
            row["growth"] = life.growth()
        rows.append(row)
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe that is trained")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--life", type=float, default=480, metavar="SECONDS", help="mean training time between kills")
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS", help="between two looks")
    parser.add_argument("--workers", type=int, default=1, help="of the loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where all is kept; by default a temporary one")
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    parser.set_defaults(device="cpu")


def run(options: argparse.Namespace) -> int:
    if os.name == "nt":
        raise InputError("usage.arguments", "soak needs POSIX signals, which Windows does not have")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = (options.folder or Path(temporary)).resolve()
        if (folder / "soak").exists():
            raise InputError("file.exists", f"{folder} already holds a soak: name another --folder")
        folder.mkdir(parents=True, exist_ok=True)
        return soak(options, folder)


def soak(options: argparse.Namespace, folder: Path) -> int:
    about = machine("cpu")
    print(f"{heading(about)}, {about['date']}; {options.minutes:g} minutes, lives of about {options.life:g} s")
    dice, began = random.Random(options.seed), time.monotonic()
    words = [f"speed.workers={options.workers}", *options.overrides]
    lives: list[Life] = []
    while (left := began + 60 * options.minutes - time.monotonic()) > 0:
        wanted = dice.uniform(0.3, 1.7) * options.life
        kind = dice.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        life = live(folder, words, min(wanted, max(left, 5)), kind, options.every, began)
        lives.append(life)
        first, last = (life.samples[0], life.samples[-1]) if life.samples else (None, None)
        seen = "not seen training"
        if last is not None:
            seen = (
                f"{last.memory:.0f} MiB, {last.tree:.0f} with children, {last.files} files, {last.processes} processes"
                f", TensorBoard {last.tensorboard:.2f} MiB"
            )
        print(f"life {len(lives)}: epoch {first.epoch if first else '-'} to {epochs_done(folder)}, ended by "
              f"{life.ended_by} with {life.code}; {seen}; left over: {life.left_over}", flush=True)  # fmt: skip
        if life.ended_by == "itself":
            print((folder / "output.txt").read_text()[-3000:])
            break
    return report(options, folder, lives, about)


def report(options: argparse.Namespace, folder: Path, lives: list[Life], about: dict[str, Any]) -> int:
    logged = lines(folder / "soak" / "metrics.jsonl")
    epochs = [line["epoch"] for line in logged if "train/loss" in line]
    saved = folder / "soak" / "checkpoints"
    checkpoints = sorted(path.name for path in saved.iterdir()) if saved.is_dir() else []
    slopes = {
        "memory, MiB an hour": (slope(lives, "memory", "seconds"), 3600),
        "memory with children, MiB an hour": (slope(lives, "tree", "seconds"), 3600),
        "open files an hour": (slope(lives, "files", "seconds"), 3600),
        "checkpoints, KiB an epoch": (slope(lives, "checkpoints", "epoch"), 1024),
        "TensorBoard, KiB an epoch": (slope(lives, "tensorboard", "epoch"), 1024),
        "folder, KiB an epoch": (slope(lives, "folder", "epoch"), 1024),
    }
    growing = {name: None if one is None else round(one * unit, 4) for name, (one, unit) in slopes.items()}
    found = wrongs(lives, epochs, checkpoints)
    ways = {kind: sum(life.ended_by == kind for life in lives) for kind in sorted({life.ended_by for life in lives})}
    evaluations = sum("test/top1" in line for line in logged)
    print(f"{len(lives)} lives, ended by {ways}; {len(epochs)} epochs, {evaluations} evaluations; checkpoints: "
          f"{', '.join(checkpoints)}\nslopes after {WARM_UP} epochs of each life:")  # fmt: skip
    for name, value in growing.items():
        print(f"  {name:<36}" + ("too few samples" if value is None else f"{value:+.3f}"))
    print("wrong: " + "; ".join(found) if found else "all is well")
    record = {
        **about, "minutes": options.minutes, "life": options.life, "workers": options.workers, "epochs": len(epochs),
        "slopes": growing, "wrong": found, "lives": summary(lives),
    }  # fmt: skip
    keep(options, "soak", record)
    return 1 if found else 0
