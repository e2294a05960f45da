"""Evaluate a run:  python tools/evaluate.py RUN [--checkpoint last|best|FOLDER] [--split test] [key=value ...]

Prints and writes the figures with the split, the checkpoint and how it was chosen, and draws the confusion matrix.
key=value changes the run's recipe, such as data.source=PATH for another place of the data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rescom_timm.data.loaders import last_words
from rescom_timm.figures import confusion, style
from rescom_timm.figures.folder import RunFolder
from rescom_timm.recipe.config import RecipeError
from rescom_timm.training.checkpoint import CheckpointError
from rescom_timm.training.evaluate import evaluate_run, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--checkpoint", default="last", help="last, best, or the folder of a checkpoint")
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    arguments = parser.parse_intermixed_args()
    try:
        name, title, meter = evaluate_run(arguments.run, arguments.checkpoint, arguments.split, arguments.overrides)
    except (RecipeError, CheckpointError, ValueError, OSError) as error:
        print(last_words(error), file=sys.stderr)
        return 1
    print(table({title: meter.compute()}))
    measured = confusion.measure(RunFolder(arguments.run).evaluation(name))
    for path in style.save(confusion.draw(measured), confusion.table(measured), arguments.run / "figures" / name):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
