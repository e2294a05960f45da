"""Measure the speed and memory of parts, side by side in one run: contenders take turns, figures are medians.

    rescom-timm benchmark head                   # the contrastive part of a step, embeddings given
    rescom-timm benchmark loader                 # from encoded images to batches of two views
    rescom-timm benchmark step resnet50          # a whole training step, and inference
    rescom-timm benchmark loop RECIPE            # the trainer's own loop over a recipe's data
    rescom-timm benchmark startup RECIPE         # from the start of a process to its first training step
    rescom-timm benchmark PART --help            # what a part measures, and its options
    rescom-timm benchmark head --device cuda --json tools/benchmarks/      # a dated record

On a CPU with one thread the clock counts this process's CPU time, so that others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from rescom_timm.benchmarks import head, loader, loop, startup, step

PARTS = {"head": head, "loader": loader, "step": step, "loop": loop, "startup": startup}


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, part in PARTS.items():
        about = part.__doc__ or ""
        summary = about.split("\n")[0].partition(": ")[2]
        part.arguments(commands.add_parser(name, help=summary, description=about, formatter_class=style))
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here: leave out --device, or install a build of torch for your GPU")
        return PARTS[options.part].run(options)
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
