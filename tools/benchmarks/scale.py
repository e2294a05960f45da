"""`scale`: up to a million rows and ten thousand classes: time and memory of a run's parts, and how they grow.

    python tools/benchmark.py scale                          # 10,000 to 1,000,000 rows, 1,000 and 10,000 classes
    python tools/benchmark.py scale --rows 100000 --classes 1000 10000 -o tools/benchmarks/
    python tools/benchmark.py scale method.name=balanced_softmax    # any key of the recipe that is trained

The images are hard links to a few files of 32 x 32 pixels, the classes made up, from Zipf's law with at least one
image each; a small net takes some steps. Each size runs in a process of its own, on one thread and without workers.
Seconds are of CPU time; megabytes are what a part held at its peak above the process after its imports. Growth between
two sizes is the exponent: 1 is linear, 0 does not grow.

data          recipe and list to the rows of both splits, missing files and overlaps looked for
build         net, queue, loaders; the headers of all test images are read
first step    order of the epoch, first batch, forward, backward, optimizer
step          one of the steps after it, the mean
evaluation    --tests images, all metrics, the logits kept
written       the evaluation's files, a checkpoint
report        the pictures from a run's files, their CSV and the HTML page
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.common import bytes_in, heading, keep, machine, positive
from rescom_timm.data.index import Index
from rescom_timm.errors import InputError

PARTS = ("data", "build", "first step", "step", "evaluation", "written", "report")
LINKS = 60_000
"""To one file; ext4 takes 65,000."""
IN_A_FOLDER = 1000


def made_up_counts(rows: int, classes: int) -> np.ndarray:
    """Images (K,) of each class: one, and what Zipf's law gives it of the rest."""
    share = 1 / np.arange(1, classes + 1)
    return 1 + np.random.default_rng(0).multinomial(rows - classes, share / share.sum())


def image_names(number: int, top: str) -> list[str]:
    return [f"{top}/{i // IN_A_FOLDER:04d}/{i % IN_A_FOLDER:03d}.png" for i in range(number)]


def link_images(root: Path, names: list[str]) -> None:
    """Files of these names, hard links to a few images of noise."""
    noise = np.random.default_rng(0)
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in names):
        (root / folder).mkdir(parents=True)
    for start in range(0, len(names), LINKS):
        first = root / names[start]
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(first)
        for name in names[start + 1 : start + LINKS]:
            os.link(first, root / name)


def recipe_of(folder: Path, rows: int, classes: int, tests: int) -> dict[str, Any]:
    """Writes the two lists of a size; returns the recipe over them, as plain values."""
    names = [f"made-up class {k}" for k in range(classes)]
    counts = made_up_counts(rows, classes)
    lists = {
        "train": Index(image_names(rows, "train"), np.repeat(np.arange(classes), counts), classes, {}, names),
        "test": Index(image_names(tests, "test"), np.arange(tests) % classes, classes, {}, names),
    }
    for name, index in lists.items():
        index.save(folder / f"{name}.txt")
    return {
        "name": "run",
        "output": str(folder),
        "data": {
            "source": str(folder.parent / "images"),
            "index": str(folder / "train.txt"),
            "test_index": str(folder / "test.txt"),
        },
        "views": {"train": "cifar", "eval": "none", "mean": [0.5] * 3, "std": [0.25] * 3},
        "net": {"backbone": "resnet8_cifar"},
        "method": {"name": "rescom", "negatives": min(500, 4 * (classes - 1))},
        "train": {"batch_size": max(1, min(64, rows // 20)), "epochs": 1},
        "schedule": {"warmup_epochs": 0},
        "speed": {"workers": 0, "cache": 0},
    }


# --------------------------------------------------------------------------------------------- in the process of a size


class Parts:
    """Seconds and megabytes of named parts of this process."""

    def __init__(self) -> None:
        self.base = psutil.Process().memory_info().rss
        self.seconds: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self.megabytes: dict[str, float] = {}

    @contextmanager
    def measured(self, name: str, times: int = 1) -> Iterator[None]:
        """The block is `name`, done so many times."""
        forget_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = (time.process_time() - cpu) / times
        self.wall[name] = (time.perf_counter() - wall) / times
        self.megabytes[name] = (peak_resident() - self.base) / 1e6


def forget_peak() -> None:
    """Reset the process's peak memory on Linux; elsewhere the peak is that of all parts so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Bytes: the most that this process held since `forget_peak`."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    from rescom_timm.engine.log import peak_memory

    return peak_memory()


def child(folder: str, steps: int, overrides: list[str]) -> None:
    """Measure the recipe in `folder` and print the results as the last line."""
    from rescom_timm.analysis.plots import FROM_FILES
    from rescom_timm.analysis.run_files import RunFolder
    from rescom_timm.analysis.writing import write_figures
    from rescom_timm.config.loading import load
    from rescom_timm.engine import trainer
    from rescom_timm.engine.build import build_method
    from rescom_timm.engine.evaluate import evaluate, write
    from rescom_timm.engine.logits import Keeper

    torch.set_num_threads(1)
    parts = Parts()
    with parts.measured("data"):
        recipe = load(Path(folder) / "recipe.json", overrides)
        data = trainer.load(recipe.data)
    with parts.measured("build"):
        run = trainer.Trainer(recipe, trainer.launch(recipe), data, build_method(recipe, data, start=True))
    if len(run.loader) <= steps:
        raise InputError(
            "usage.arguments",
            f"{steps} + 1 steps are measured, and an epoch has {len(run.loader)}: lower --steps or train.batch_size",
        )
    assert data.test is not None
    run.open(False)
    with parts.measured("first step"):
        run.start_epoch()
        batches = iter(run.completed(run.loader))
        run.step.whole(next(batches))["loss"].item()
    with parts.measured("step", steps):
        for _ in range(steps):
            loss = run.step.whole(next(batches))["loss"].item()
    run.progress.step = 1 + steps
    with parts.measured("evaluation"):
        keeper = Keeper(len(data.test.labels), len(data.counts))
        meter = evaluate(run.accelerator, run.net, run.eval_loaders["test"], data.counts, keeper=keeper)
        metrics = meter.compute()
    with parts.measured("written"):
        record = trainer.about(data.test, "last", "not selected", data.class_names)
        write(run.folder, "test-last", meter, record, keeper)
        run._write({f"test/{name}": value for name, value in metrics.items()})
        run.save()
    run.close()
    with parts.measured("report"):
        drawn = [str(line) for line in write_figures([RunFolder(run.folder)], [*FROM_FILES, "report"])]
    sizes = {
        "list": Path(recipe.data.index).stat().st_size,
        "evaluation": bytes_in(run.folder / "evaluation"),
        "checkpoint": bytes_in(run.folder / "checkpoints"),
        "figures": bytes_in(run.folder / "figures"),
        "report": (run.folder / "figures" / "report.html").stat().st_size,
    }
    if not math.isfinite(loss):
        raise InputError("system.failed", f"the loss is {loss}")
    print(json.dumps({
        "rows": len(data.train.labels), "classes": len(data.counts), "tests": len(data.test.labels),
        "base": parts.base / 1e6, "seconds": parts.seconds, "wall": parts.wall, "megabytes": parts.megabytes,
        "files": {name: bytes_ / 1e6 for name, bytes_ in sizes.items()},
        "not_drawn": [line for line in drawn if line.startswith("no ")],
    }))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the table


def measure(folder: Path, rows: int, classes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One size in a process of its own. Raises ValueError with the last line of one that fails."""
    folder.mkdir()
    recipe = recipe_of(folder, rows, classes, options.tests)
    (folder / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML
    code = "import json, sys; from benchmarks.scale import child; child(*json.loads(sys.argv[1]))"
    words = json.dumps([str(folder), options.steps, options.overrides])
    tools = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": tools, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise InputError(
            "system.failed", f"{rows} rows, {classes} classes: {(done.stderr.strip() or 'killed').splitlines()[-1]}"
        )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def growth(rows: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Growth of each part.

    Exponents of its seconds and megabytes between neighbouring sizes that differ in `by` ("rows" or
    "classes") alone.
    """
    other = "classes" if by == "rows" else "rows"
    found = []
    for level in dict.fromkeys(row[other] for row in rows):
        line = sorted((row for row in rows if row[other] == level), key=lambda row: row[by])
        for one, next_ in pairwise(line):
            ratio = math.log(next_[by] / one[by])
            exponents = {
                kind: {part: exponent(one[kind][part], next_[kind][part], ratio) for part in one[kind]}
                for kind in ("seconds", "megabytes")
            }
            found.append({"by": by, "from": one[by], "to": next_[by], other: level, **exponents})
    return found


def exponent(one: float, other: float, ratio: float) -> float | None:
    """None where there is nothing to compare."""
    return math.log(other / one) / ratio if one > 0 and other > 0 else None


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe that is trained")
    parser.add_argument("--rows", nargs="+", type=positive, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--classes", nargs="+", type=positive, default=[1000, 10_000], help="each with all rows")
    parser.add_argument("--tests", type=positive, default=10_000, help="test images")
    parser.add_argument("--steps", type=positive, default=10, help="after the first")
    parser.add_argument("--folder", type=Path, help="where images and lists are made; by default a temporary one")
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    parser.set_defaults(device="cpu")


def run(options: argparse.Namespace) -> int:
    sizes = [(rows, classes) for classes in sorted(options.classes) for rows in sorted(options.rows) if rows >= classes]
    if not sizes or min(options.classes) < 2:
        raise InputError(
            "usage.arguments", "each class needs an image, and there are at least two: fewer --classes, or more --rows"
        )
    about = machine("cpu")
    print(
        f"{heading(about)}, timm {about['timm']}, {about['date']}\n# seconds of CPU time / megabytes at the peak "
        f"above the imports; {options.tests:,} test images"
    )
    print(f"{'rows':>9} {'classes':>7} " + " ".join(f"{part:>15}" for part in PARTS), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary).resolve()
        link_images(folder / "images", image_names(max(options.rows), "train"))
        link_images(folder / "images", image_names(options.tests, "test"))
        table: list[dict[str, Any]] = []
        for rows, classes in sizes:
            table.append(measure(folder / f"{rows}x{classes}", rows, classes, options))
            print_row(f"{rows:>9} {classes:>7}", {part: cell(table[-1], part) for part in PARTS})
    grown = [*growth(table, "rows"), *growth(table, "classes")]
    for line in grown:
        other = "classes" if line["by"] == "rows" else "rows"
        print(f"growth from {line['from']:,} to {line['to']:,} {line['by']}, {line[other]:,} {other}:")
        both = {part: [two_digits(line[kind][part]) for kind in ("seconds", "megabytes")] for part in PARTS}
        print_row(" " * 17, {part: " / ".join(exponents) for part, exponents in both.items()})
    for row in table:
        print(f"files of {row['rows']:,} rows, {row['classes']:,} classes, MB: "
              + ", ".join(f"{name} {value:.1f}" for name, value in row["files"].items()))  # fmt: skip
    keep(options, "scale", {**about, "steps": options.steps, "rows": table, "growth": grown})
    return 0


def print_row(start: str, cells: dict[str, str]) -> None:
    print(start + " " + " ".join(f"{cells[part]:>15}" for part in PARTS), flush=True)


def cell(row: dict[str, Any], part: str) -> str:
    seconds, megabytes = row["seconds"][part], row["megabytes"][part]
    return f"{seconds:.3g} / {megabytes:.0f}" if seconds < 100 else f"{seconds:.0f} / {megabytes:.0f}"


def two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
