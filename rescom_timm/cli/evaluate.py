"""Evaluate a checkpoint of a run.

    rescom-timm evaluate RUN [--checkpoint last|best|FOLDER] [--split test] [key=value ...]

Prints and writes the metrics with the split, the checkpoint and how it was chosen, and draws the confusion matrix.
key=value changes the run's recipe, such as data.source=PATH if the data has moved.

--prior and --temperature print, beside it, what softmax(logits / T + log prior) gives: estimate finds the prior of the
images by EM, fitted is the T of the run's validation images. --abstain prints the risk when only the surest images are
answered, and how many images of each group are then left.

--recall CLASS=R prints what it costs to find at least this share of a class, by a rule from the validation images;
--costs FILE the mean cost under the least expected cost (the file: see rescom-timm predict --help). Both are written to
RUN/evaluation/price/NAME.json too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rescom_timm.cli import add_rules, answer, check_rules, new_parser, temperature


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Evaluate a run; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm evaluate runs/digits_lt --checkpoint best")
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--checkpoint", default="last", help="last, best, or the folder of a checkpoint")
    parser.add_argument("--weights", default="raw", choices=["raw", "ema"], help="as trained, or averaged (train.ema)")
    parser.add_argument("--five-crops", action="store_true", help="also the mean of five crops, beside the single one")
    parser.add_argument("--prior", help="also with a class prior: train, uniform, estimate, or a file of name,number")
    parser.add_argument("--temperature", type=temperature, metavar="T", help="also with it; or fitted")
    parser.add_argument("--abstain", action="store_true", help="also what is right among the surest images, by group")
    add_rules(parser)
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    options = parser.parse_intermixed_args(argv)
    check_rules(parser, options)
    return answer(lambda: evaluate(options))


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate, print the table and draw the confusion matrix."""
    from rescom_timm.analysis import confusion, style
    from rescom_timm.analysis.run_files import RunFolder
    from rescom_timm.api import Run
    from rescom_timm.cli.parts.evaluate import abstention, adjusted, decided
    from rescom_timm.engine.evaluate import evaluate_run, table_of

    run, rows, names = Run(options.run).folder, {}, []
    for crops in (False, True) if options.five_crops else (False,):
        name, title, meter = evaluate_run(
            run, options.checkpoint, options.split, options.overrides, crops, options.weights
        )
        names.append(name)
        rows[title] = meter
    found, last = RunFolder(run).evaluation(names[0]), next(iter(rows.values()))
    if options.prior or options.temperature:
        title, last = adjusted(options, run, names[0], last, list(found.class_names))
        rows[title] = last
    print(table_of(rows))
    if options.abstain:
        print(abstention(last))
    if options.recall or options.costs:
        print(decided(options, run, names[0], last, list(found.class_names)))
    measured = confusion.measure(found)
    for path in style.save(confusion.draw(measured), confusion.table(measured), run / "figures" / names[0]):
        print(path)
    return 0
