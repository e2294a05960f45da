"""`loop`: the trainer's own loop over a recipe's data, for some steps: what loading costs, and how long it all takes.

    python tools/benchmark.py loop recipes/cifar10_lt_if100_r32.yaml data.source=/data/cifar10 --steps 300 --evaluate
    accelerate launch tools/benchmark.py loop recipes/imagenet_lt_r50.yaml -o tools/benchmarks/        # as one trains

The loop runs with the recipe's loader, then as long with one batch again and again. What the first takes longer is lost
to loading (aim: below 5% of a ResNet-50 step). `waiting` is the share of the time in which the host waited for a batch;
on a GPU, which may have steps in hand meanwhile, that is more than is lost. The recipe's length is the steps of all its
epochs, plus its evaluations with --evaluate, which times one; checkpoints are left out. Nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import heading, keep, kept, machine, positive
from rescom_timm.config.loading import load as load_recipe
from rescom_timm.data.sources import load
from rescom_timm.engine.build import build_method
from rescom_timm.engine.launch import launch
from rescom_timm.engine.trainer import Trainer


class Watched:
    """A trainer's loader that gives `left` batches, over any number of epochs, and measures the waiting for them.

    With again=True it loads no more and gives the last batch instead of all others.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.iterator: Iterator[dict[str, Tensor]] | None = None
        self.batch: dict[str, Tensor] = {}
        self.again = False
        self.left = 0
        self.waiting = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        given = 0
        while self.left:
            begun = time.perf_counter()
            if self.iterator is None:
                self.iterator = itertools.repeat(self.batch, len(self.loader)) if self.again else iter(self.loader)
            batch = next(self.iterator, None)
            self.waiting += time.perf_counter() - begun
            if batch is None:
                self.iterator = None
                if given:
                    return  # the loop closes its epoch and comes back
                continue
            self.batch = batch
            self.left, given = self.left - 1, given + 1
            yield batch


def seconds_of(trainer: Trainer, watched: Watched, steps: int) -> tuple[float, float]:
    """(all, waiting) of a step, the mean of so many, what the device does for them included."""
    watched.left, watched.waiting = steps * trainer.recipe.train.accumulate, 0.0
    begun, before = now(), trainer.progress.step
    while watched.left:
        trainer._epoch(tqdm(disable=True))
    done = trainer.progress.step - before
    return (now() - begun) / done, watched.waiting / done


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--warm-up", type=positive, default=5, metavar="STEPS", help="before: compiling, workers")
    parser.add_argument("--evaluate", action="store_true", help="time an evaluation too")
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    accelerator = launch(recipe)
    options.device = accelerator.device.type
    data = load(recipe.data)
    trainer = Trainer(recipe, accelerator, data, build_method(recipe, data))
    trainer.loader = watched = Watched(trainer.loader)
    seconds_of(trainer, watched, options.warm_up)
    fed, waiting = seconds_of(trainer, watched, options.steps)
    watched.again, watched.iterator = True, None
    unfed, _ = seconds_of(trainer, watched, options.steps)
    evaluations = -(-recipe.train.epochs // recipe.evaluation.every) if options.evaluate else 0
    begun = now()
    if options.evaluate:
        trainer._evaluate(tqdm(disable=True))
    evaluation = now() - begun
    steps = trainer.steps_per_epoch * recipe.train.epochs
    row = {
        "recipe": Path(options.recipe).stem, "overrides": kept(options.overrides), "steps": options.steps,
        "processes": accelerator.num_processes, "milliseconds": 1e3 * fed, "without_loading": 1e3 * unfed,
        "images_per_second": recipe.train.batch_size / fed, "lost_to_loading": max(0.0, 1 - unfed / fed),
        "waiting": waiting / fed,
        "steps_of_recipe": steps, "evaluations_of_recipe": evaluations,
        "seconds_of_evaluation": evaluation if options.evaluate else None,
        "minutes_of_recipe": (steps * fed + evaluations * evaluation) / 60,
    }  # fmt: skip
    if accelerator.is_main_process:
        about = machine(options.device)
        print(f"{heading(about)}, {about['date']}; {row['recipe']}, {row['processes']} process(es)\n"
              f"{row['milliseconds']:.1f} ms a step of {recipe.train.batch_size} images, mean of {options.steps}: "
              f"{row['images_per_second']:.0f} images a second\n"
              f"loading: {100 * row['lost_to_loading']:.1f}% of the time lost, {100 * row['waiting']:.1f}% waiting\n"
              f"{recipe.train.epochs} epochs of {trainer.steps_per_epoch} steps, {evaluations} evaluations of "
              f"{evaluation:.1f} s: {row['minutes_of_recipe']:.1f} minutes")  # fmt: skip
        keep(options, f"loop-{row['recipe']}", {**about, "rows": [row]})
    trainer.close()
    return 0
