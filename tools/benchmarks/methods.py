"""`methods`: what a training step of each method costs, in time and memory; cross-entropy on one view is 1.

    python tools/benchmark.py methods                                       # presets over digits_lt, 32-pixel images
    python tools/benchmark.py methods cifar10_lt_if100_r32 --batch 128 --device cuda --json tools/benchmarks/

Presets that start from a trained run or need a teacher are left out. The images are random and on the device already:
neither loading nor making the views is counted. The contenders take turns. Memory is what a contender holds at its
peak, from nothing to its second step: weights, momentum, queue, activations.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState

from benchmarks.common import common_arguments, heading, keep, machine, peak, positive
from benchmarks.step import Step, in_turn, over
from rescom_timm.config.loading import load as load_recipe
from rescom_timm.config.loading import presets
from rescom_timm.data.sources import load
from rescom_timm.engine.build import build_method
from rescom_timm.engine.launch import launch
from rescom_timm.engine.trainer import Trainer
from rescom_timm.methods import METHODS

BASE = "cross_entropy"
ALSO = {"rescom": [], "balanced_softmax, one view": ["+balanced_softmax", "method.views=1"],
        "balanced_softmax, one view, sam": ["+balanced_softmax", "method.views=1", "+sam"]}  # fmt: skip


def contender(words: list[str], options: argparse.Namespace) -> Step:
    """A function that does one step, as the trainer does it."""
    torch.manual_seed(0)
    recipe = load_recipe(options.recipe, [*words, f"train.batch_size={options.batch}", "speed.workers=0"])
    AcceleratorState._reset_state(True)
    data = load(recipe.data)
    trainer = Trainer(recipe, launch(recipe), data, build_method(recipe, data))
    trainer.step.start_epoch(0)
    rows = options.batch * (1 + (trainer.method.second_sampler is not None))
    shape = (rows, trainer.method.views, 3, options.size, options.size)
    batch = {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=trainer.accelerator.device),
        "label": torch.randint(len(data.counts), (rows,), device=trainer.accelerator.device),
    }

    def step() -> Any:
        outputs = trainer.step(batch, True)
        trainer.step.finish(True)
        return outputs

    return step


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step (medians) and megabytes, and their ratios to BASE."""
    words = {BASE: [f"+{BASE}", "method.views=1"], **ALSO} | {f"+{name}": [f"+{name}"] for name in presets()}
    steps: dict[str, Step] = {}
    megabytes: dict[str, float] = {}

    def begin(name: str) -> None:
        steps[name] = contender(words[name], options)
        for _ in range(2):
            steps[name]()

    alone = []
    for name, changes in words.items():
        kind = METHODS[load_recipe(options.recipe, changes).method.name][1]
        alone += [] if kind.second_stage or kind.needs_teacher else [name]
    for name in (BASE, *alone):  # the first one meets what libraries allocate once and keep
        steps.pop(name, None)
        megabytes[name] = peak(partial(begin, name), options.device) / 1e6
    milliseconds = in_turn(steps, options)
    return {
        "milliseconds": milliseconds, "over_base": over(milliseconds, BASE),
        "megabytes": megabytes, "memory_over_base": over(megabytes, BASE),
    }  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="digits_lt", help="gives net, classes and presets")
    parser.add_argument("--size", type=positive, default=32, help="pixels of the square images")
    parser.add_argument("--batch", type=positive, default=64, help="images")
    parser.add_argument("--steps", type=positive, default=1, help="of one turn, in a row")
    common_arguments(parser, repetitions=5)


def run(options: argparse.Namespace) -> int:
    keys = ("recipe", "size", "batch", "steps", "repetitions")
    about = {**machine(options.device), **{key: getattr(options, key) for key in keys}}
    print(f"{heading(about)}, {about['date']}\n# {options.recipe}, {options.batch} images of {options.size} x "
          f"{options.size}; medians of {options.repetitions} turns")  # fmt: skip
    row = measure(options)
    print(f"{'':<34}{'ms':>8}{'x base':>8}{'MB':>8}{'x base':>8}")
    for name, taken in row["milliseconds"].items():
        print(f"{name:<34}{taken:>8.1f}{row['over_base'][name]:>8.2f}"
              f"{row['megabytes'][name]:>8.0f}{row['memory_over_base'][name]:>8.2f}")  # fmt: skip
    keep(options, "methods", {**about, **row})
    return 0
