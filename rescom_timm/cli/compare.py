"""Compare runs image by image.

    rescom-timm compare RUN RUN [RUN ...] [--split test] [--checkpoint last] [-o comparison] [--json FILE]

RUN is a run's folder, an exported folder, or a table of predictions with true labels (predict --data SOURCE). Others
are compared with the first. Runs whose recipes differ only in the seed are averaged and count as one. All must have
the same images.

Prints the accuracies with 95% intervals, the differences to the first with theirs (a bootstrap over the images of each
class and over the seeds) and McNemar's exact test, corrected by Holm for several comparisons. Writes comparison.png,
.svg and .csv; --json FILE writes all of it as JSON too. The p of each metric is the bootstrap's, without correction.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import answer, new_parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Compare runs; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm compare runs/cross_entropy runs/rescom runs/rescom-2")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, exported folders, tables of predictions")
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--checkpoint", default="last", help="of the runs' evaluations: last, best, or its name")
    parser.add_argument("-o", "--output", default="comparison", metavar="STEM", help="of the files written")
    parser.add_argument("--json", metavar="FILE", help="also write every number as JSON")
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        parser.error("give at least two runs")
    return answer(lambda: compare(options), writes=[f"{options.output}.csv", options.json])


def compare(options: argparse.Namespace) -> int:
    """Print the comparison and write its plot and table."""
    from rescom_timm.analysis import compare as comparison
    from rescom_timm.analysis import style
    from rescom_timm.analysis.run_files import names_of
    from rescom_timm.errors import InputError
    from rescom_timm.io import write_json

    named = zip(options.runs, names_of(map(Path, options.runs)), strict=True)
    answers = [comparison.read(path, name, options.split, options.checkpoint) for path, name in named]
    compared = comparison.measure(answers)
    if len(compared.names) < 2:
        raise InputError("usage.arguments", "the runs are seeds of one recipe: give a run of another recipe too")
    print(comparison.text(compared))
    for path in style.save(comparison.draw(compared), comparison.table(compared), options.output):
        print(path)
    if options.json:
        about = {"split": options.split, "checkpoint": options.checkpoint}
        write_json(Path(options.json), about | comparison.record(compared), indent=1)
        print(options.json)
    return 0
