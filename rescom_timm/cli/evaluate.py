"""Evaluate a run:  rescom-timm evaluate RUN [--checkpoint last|best|FOLDER] [--split test] [key=value ...]

Prints and writes the figures with the split, the checkpoint and how it was chosen, and draws the confusion matrix.
key=value changes the run's recipe, such as data.source=PATH for another place of the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import answer, new_parser


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm evaluate runs/digits_lt --checkpoint best",
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--checkpoint", default="last", help="last, best, or the folder of a checkpoint")
    parser.add_argument("--weights", default="raw", choices=["raw", "ema"], help="as trained, or averaged (train.ema)")
    parser.add_argument("--five-crops", action="store_true", help="also the mean of five crops, beside the single one")
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    arguments = parser.parse_intermixed_args(words)
    return answer(lambda: evaluate(arguments))


def evaluate(arguments: argparse.Namespace) -> int:
    from rescom_timm.analysis import confusion, style
    from rescom_timm.analysis.run_files import RunFolder
    from rescom_timm.api import Run
    from rescom_timm.engine.evaluate import evaluate_run, table_of

    run = Run(arguments.run).folder
    what = (run, arguments.checkpoint, arguments.split, arguments.overrides)
    name, title, meter = evaluate_run(*what, weights=arguments.weights)
    rows = {title: meter}
    if arguments.five_crops:
        _, title, meter = evaluate_run(*what, crops=True, weights=arguments.weights)
        rows[title] = meter
    print(table_of(rows))
    measured = confusion.measure(RunFolder(run).evaluation(name))
    for path in style.save(confusion.draw(measured), confusion.table(measured), run / "figures" / name):
        print(path)
    return 0
