"""`loop`: the trainer's own steps of a recipe, with its loader and then without (one batch again and again).

    python tools/benchmark.py loop recipes/cifar10_lt_if100_r32.yaml speed.compile=reduce-overhead --steps 300

Images a second, the share of time lost to loading, and how long the whole recipe would take.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarking.common import keep, machine
from rescom_timm.data.sources import load
from rescom_timm.runs.build import build_method
from rescom_timm.runs.launch import launch
from rescom_timm.runs.recipe import load as load_recipe
from rescom_timm.runs.trainer import Trainer


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    accelerator = launch(recipe)
    options.device = accelerator.device.type
    data = load(recipe.data)
    trainer = Trainer(recipe, accelerator, data, build_method(recipe, data))
    trainer.method.train()
    batches = itertools.chain.from_iterable(trainer.loader for _ in itertools.count())
    for _ in range(3):  # compiles, starts the workers
        _trainer_step(trainer, batch := next(batches))
    fed = _seconds(lambda: _trainer_step(trainer, next(batches)), options)
    unfed = _seconds(lambda: _trainer_step(trainer, batch), options)
    steps = trainer.steps_per_epoch * recipe.train.epochs
    row = {
        "recipe": Path(options.recipe).stem, "overrides": options.overrides, "steps": options.steps,
        "processes": accelerator.num_processes, "milliseconds": 1e3 * fed, "without_loading": 1e3 * unfed,
        "images_per_second": recipe.train.batch_size / fed, "lost_to_loading": max(0.0, 1 - unfed / fed),
        "steps_of_recipe": steps, "minutes_of_recipe": steps * fed / 60,
    }  # fmt: skip
    about = machine(options.device)
    if accelerator.is_main_process:
        print(f"# {about['device']}, torch {about['torch']}, {about['date']}, load {about['load']}\n"
              f"{row['recipe']}: {row['milliseconds']:.1f} ms a step, {row['images_per_second']:.0f} images a second, "
              f"{100 * row['lost_to_loading']:.1f}% lost to loading; {steps} steps, without evaluation: "
              f"{row['minutes_of_recipe']:.1f} minutes")  # fmt: skip
        keep(options, "loop", {**about, "rows": [row]})
    trainer.close()
    return 0


def _trainer_step(trainer: Trainer, batch: dict[str, Tensor]) -> None:
    trainer._forward_backward(batch, last=True)
    trainer._update(sound=True)


def _seconds(step: Callable[[], object], options: argparse.Namespace) -> float:
    """Mean seconds of a step, the device's work included; the host may run ahead within."""
    synchronize = torch.cuda.synchronize if options.device == "cuda" else int
    synchronize()
    begun = time.perf_counter()
    for _ in range(options.steps):
        step()
    synchronize()
    return (time.perf_counter() - begun) / options.steps
