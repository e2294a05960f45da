"""`startup`: the time from the start of a process to the end of its first training step.

    python tools/benchmark.py startup recipes/digits_lt.yaml recipes/cifar10_lt_if100_r32.yaml

Seconds, in parts: imports, data, build (method, loaders), first step.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarking.common import keep, machine

STARTUP = """
import sys, time
begun = [time.perf_counter()]
from rescom_timm.runs import recipe, trainer
begun.append(time.perf_counter())
chosen = recipe.load(sys.argv[1], sys.argv[2:])
accelerator, data = trainer.launch(chosen), trainer.load(chosen.data)
begun.append(time.perf_counter())
run = trainer.Trainer(chosen, accelerator, data, trainer.build_method(chosen, data))
begun.append(time.perf_counter())
run.method.train()
run._forward_backward(next(iter(run.loader)), last=True)["loss"].item()
run._update(sound=True)
begun.append(time.perf_counter())
print(*(after - before for before, after in zip(begun, begun[1:])))
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="RECIPE or key=value")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    parser.set_defaults(device="cpu")


def run(options: argparse.Namespace) -> int:
    """Each recipe in processes of their own, medians."""
    recipes = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    about = machine("cpu")
    print(f"# {about['device']}, {about['cores']} cores, load {about['load']}, torch {about['torch']}, {about['date']}"
          f"; seconds, medians of {options.repetitions}")  # fmt: skip
    parts = ("imports", "data", "build", "first step")
    print(f"{'':<32}" + "".join(f"{part:>12}" for part in (*parts, "process")))
    rows = []
    for recipe in recipes:
        runs = []
        for _ in range(options.repetitions):
            begun = time.perf_counter()
            child = subprocess.run([sys.executable, "-c", STARTUP, recipe, *overrides], capture_output=True, text=True)
            if child.returncode:
                print(f"{recipe}: {child.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                return 1
            told = [float(word) for word in child.stdout.split()[-len(parts) :]]
            runs.append([*told, time.perf_counter() - begun])
        medians = [sorted(column)[len(column) // 2] for column in zip(*runs, strict=True)]
        rows.append({"recipe": recipe, **dict(zip((*parts, "process"), medians, strict=True))})
        print(f"{Path(recipe).stem:<32}" + "".join(f"{value:>12.2f}" for value in medians), flush=True)
    keep(options, "startup", {**about, "rows": rows})
    return 0
