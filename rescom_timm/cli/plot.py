"""Plots and an HTML report of one or several runs:

    rescom-timm plot RUN [RUN ...] [--only curves,tsne] [-o FOLDER] [key=value ...]

Writes every plot as PNG, SVG and CSV, and report.html, which opens offline and compares the runs.
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


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm plot runs/digits_lt --only curves,confusion",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; and key=value")
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(NAMES)}, report")
    parser.add_argument("--evaluation", default="", metavar="NAME", help="<split>-<checkpoint>; test-last by default")
    parser.add_argument("--checkpoint", default="last", help="of the net: last, best, or the folder of a checkpoint")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="RUN/figures by default; ./figures for several runs")
    options = parser.parse_intermixed_args(arguments)
    return answer(lambda: draw(options), folders=[options.output])


def draw(options: argparse.Namespace) -> int:
    from rescom_timm.analysis.run_files import open_runs
    from rescom_timm.analysis.writing import write_figures
    from rescom_timm.api import Run

    overrides = [word for word in options.runs if "=" in word and not Path(word).exists()]
    runs = open_runs(Run(word).folder for word in options.runs if word not in overrides)
    if not runs:
        raise ValueError("no run is named: give the folder of at least one")
    names = [name.strip() for name in options.only.split(",")] if options.only else None
    for told in write_figures(runs, names, options.output, options.evaluation, options.checkpoint, overrides):
        print(told, flush=True)
    return 0
