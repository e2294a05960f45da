"""Measure the speed and memory of parts, side by side in one run: contenders alternate, times are medians.

    python tools/benchmark.py head                   # the contrastive part of a step, embeddings given
    python tools/benchmark.py classes                # what 10,000 to 1,000,000 classes cost a step
    python tools/benchmark.py loader                 # from encoded images to batches of two views
    python tools/benchmark.py packed FOLDER          # what `rescom-timm pack` changes: accuracy and reading
    python tools/benchmark.py peers                  # whole pieces of work against other libraries
    python tools/benchmark.py step resnet50          # a whole training step, and inference
    python tools/benchmark.py tuning                 # a step of a ViT with all, few and none of its weights trained
    python tools/benchmark.py methods                # a training step of each method
    python tools/benchmark.py loop RECIPE            # the trainer's own loop over a recipe's data
    python tools/benchmark.py startup RECIPE         # from the start of a process to its first training step
    python tools/benchmark.py inference resnet50     # inference time of a net and of ensembles
    python tools/benchmark.py scale                  # lists of up to a million rows, ten thousand classes
    python tools/benchmark.py soak --minutes 60      # a long training, killed and resumed at random
    python tools/benchmark.py fit FOLDER             # how well `fit` keeps its minutes
    python tools/benchmark.py PART --help            # what a part measures, and its options
    python tools/benchmark.py head --device cuda --json tools/benchmarks/      # a dated record

On a CPU with one thread the clock counts this process's CPU time, so that others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from rescom_timm.cli import answer, new_parser, print_loading
from rescom_timm.errors import InputError

PARTS = {
    "head": "the contrastive part of a step, embeddings given",
    "classes": "what the number of classes costs a step, measured, on paper, and cut over processes",
    "loader": "one core's way from encoded images to a batch of two views",
    "packed": "what `rescom-timm pack` changes",
    "peers": "whole pieces of work against what one would write with other libraries",
    "step": "a whole training step, and inference, against plain ones",
    "tuning": "a training step of one ViT with all, few and none of its weights trained",
    "methods": "what a training step of each method costs, in time and memory",
    "loop": "the trainer's own loop over a recipe's data, for some steps",
    "startup": "the time from the start of a process to the end of its first training step",
    "inference": "inference time of a net against ensembles of 2, 3 and 4 experts",
    "scale": "up to a million rows and ten thousand classes: time and memory of a run's parts, and how they grow",
    "fit": "how well `rescom-timm fit` keeps its minutes",
    "soak": "a long training, killed and resumed at random: memory, handles, processes, disk",
}
"""Files of benchmarks/, each imported when its part is asked for."""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = new_parser(__doc__, prog, "python tools/benchmark.py step resnet8_cifar --classes 10 100 --batch 32")
    commands = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, summary in PARTS.items():
        one = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in arguments[:1]:
            if not {"-h", "--help"} & set(arguments):
                print_loading()
            part = import_module(f"benchmarks.{name}")
            one.description = part.__doc__
            part.arguments(one)
    options = parser.parse_args(arguments)

    def work() -> int:
        import torch

        if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "usage.arguments", "torch finds no GPU: leave out --device, or install a build of torch for your GPU"
            )
        return int(part.run(options))

    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
