"""Plots and an HTML report of one or several runs.

    rescom-timm plot RUN [RUN ...] [--only curves,tsne] [-o FOLDER] [key=value ...]

Writes every plot as PNG, SVG and CSV; report.html, which opens offline and compares the runs; and its findings as
report-findings.csv (one row a class) and .json. The report of one run shows images of its worst rare classes.
Plots of the net (views, pairs, queue_pairs, queues, similarity, gradients, tsne) load a checkpoint and its data; for
several runs they are drawn only if --only names them. key=value changes the runs' recipes for them, such as
data.source=PATH. With --only, the report shows the plots named beside it (--only curves,report), or all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import answer, new_parser

NAMES = (
    "curves", "schedule", "robustness", "longtail", "confusion", "reliability", "views", "pairs", "queue_pairs",
    "queues", "similarity", "gradients", "tsne", "mistakes", "rare",
)  # fmt: skip
"""FROM_FILES and FROM_NET of analysis/plots.py, which takes seconds to import."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Draw the plots; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm plot runs/digits_lt --only curves,confusion")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, and key=value")
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(NAMES)}, report (default: all)")
    parser.add_argument("--evaluation", default="", metavar="NAME", help="<split>-<checkpoint> (default: test-last)")
    parser.add_argument("--checkpoint", default="last", help="last, best, or the folder of a checkpoint")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="default: RUN/figures, for several runs ./figures")
    options = parser.parse_intermixed_args(argv)
    return answer(lambda: draw(options), folders=[options.output])


def draw(options: argparse.Namespace) -> int:
    """Draw, and print the paths written and what a run lacks."""
    from rescom_timm.analysis.run_files import open_runs
    from rescom_timm.analysis.writing import write_figures
    from rescom_timm.api import Run
    from rescom_timm.errors import InputError

    overrides = [each for each in options.runs if "=" in each and not Path(each).exists()]
    runs = open_runs(Run(each).folder for each in options.runs if each not in overrides)
    if not runs:
        raise InputError("usage.arguments", "give the folder of at least one run")
    names = [name.strip() for name in options.only.split(",")] if options.only else None
    for line in write_figures(runs, names, options.output, options.evaluation, options.checkpoint, overrides):
        print(line, flush=True)
    return 0
