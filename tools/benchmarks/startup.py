"""`startup`: the time from the start of a process to the end of its first training step.

    python tools/benchmark.py startup                                  # the recipes of the embedded digits
    python tools/benchmark.py startup recipes/digits_lt.yaml recipes/cifar10_lt_if100_r32.yaml data.source=/data/cifar10

Seconds, in parts: the interpreter, imports (those of tools/train.py), data (recipe, index), build (net, loaders), first
step. Each recipe starts in processes of its own, which take turns; key=value changes all recipes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median_high

import torch

from benchmarks.common import keep, kept, machine, positive
from rescom_timm.config.loading import find, load
from rescom_timm.errors import InputError

PARTS = ("interpreter", "imports", "data", "build", "first step")

CHILD = """
import time
times = [time.monotonic()]
import json, sys
from rescom_timm.config import loading
from rescom_timm.engine import trainer
times.append(time.monotonic())
chosen = loading.load(sys.argv[1], sys.argv[2:])
accelerator, data = trainer.launch(chosen), trainer.load(chosen.data)
times.append(time.monotonic())
run = trainer.Trainer(chosen, accelerator, data, trainer.build_method(chosen, data, start=True))
times.append(time.monotonic())
run.method.train()
run.step.forward_backward(next(iter(run.loader)), last=True)["loss"].item()
run.step.update(finite=True)
times.append(time.monotonic())
print(json.dumps(times))
"""


def start(recipe: Path, overrides: list[str]) -> list[float]:
    """Seconds of each part in one child process. Raises InputError with the last line of stderr of a failed child."""
    begun = time.monotonic()  # the clock of all processes
    child = subprocess.run([sys.executable, "-c", CHILD, str(recipe), *overrides], capture_output=True, text=True)
    if child.returncode:
        raise InputError("system.failed", f"{recipe}: {child.stderr.strip().splitlines()[-1]}")
    times = [begun, *json.loads(child.stdout.splitlines()[-1])]
    return [after - before for before, after in pairwise(times)]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="RECIPE or key=value", help="digits_lt by default")
    parser.add_argument("--repetitions", type=positive, default=3)
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")


def run(options: argparse.Namespace) -> int:
    overrides = [word for word in options.words if "=" in word]
    recipes = [find(word) for word in options.words if "=" not in word] or [find("digits_lt")]
    for recipe in recipes:
        load(recipe, overrides)  # errors come before a process is started
    about = machine(options.device)
    print(f"# {about['device']}, {about['cores']} cores, load {about['load']}, torch {about['torch']}, {about['date']}"
          f"; seconds, medians of {options.repetitions}")  # fmt: skip
    runs: dict[Path, list[list[float]]] = {recipe: [] for recipe in recipes}
    for _ in range(options.repetitions):
        for recipe in recipes:
            runs[recipe].append(start(recipe, overrides))
    print(f"{'':<40}" + "".join(f"{part:>12}" for part in (*PARTS, "in all")))
    rows = []
    for recipe, taken in runs.items():
        columns = [*zip(*taken, strict=True), [sum(parts) for parts in taken]]
        medians = [median_high(column) for column in columns]
        rows.append({"recipe": recipe.stem, "seconds": dict(zip((*PARTS, "in all"), medians, strict=True))})
        print(f"{recipe.stem:<40}" + "".join(f"{value:>12.2f}" for value in medians), flush=True)
    keep(options, "startup", {**about, "overrides": kept(overrides), "rows": rows})
    return 0
