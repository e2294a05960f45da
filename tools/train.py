"""Train a recipe:  accelerate launch tools/train.py RECIPE [key=value ...] [--resume [hf://owner/name]] [--dry-run]

--resume goes on with the last run of the recipe's name, or, where RECIPE is RUN/recipe.yaml, with that run.
--resume hf://owner/name goes on with a run that was pushed with its checkpoint, on another machine perhaps; without a
RECIPE, by the recipe that it was pushed with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rescom_timm.data.loaders import last_words
from rescom_timm.runs.hub import fetch_recipe
from rescom_timm.runs.recipe import load
from rescom_timm.runs.trainer import FAILURES, Stopped, train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, such as recipes/digits_lt.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.epochs=10 method.beta=0.999")
    parser.add_argument("--resume", action="store_true", help="go on where the run's last checkpoint stands")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, data and one step; write nothing")
    parser.add_argument("--print", action="store_true", help="print the resolved recipe and stop")
    arguments = parser.parse_intermixed_args()
    words = [arguments.recipe, *arguments.overrides]
    address = next((word for word in words if word.startswith("hf://")), None)
    if address is not None and not arguments.resume:
        parser.error(f"{address} is only read with --resume")
    words = [word for word in words if word != address]
    try:
        path = Path(words.pop(0) if words and "=" not in words[0] else fetch_recipe(address))
        recipe = load(path, words)
        if arguments.print:
            print(recipe.to_yaml())
            return 0
        this = path.parent if arguments.resume and (path.parent / "checkpoints").is_dir() else None
        train(recipe, resume=address or this or arguments.resume, dry_run=arguments.dry_run)
    except (*FAILURES, Stopped) as error:
        print(last_words(error), file=sys.stderr)
        return 143 if isinstance(error, Stopped) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
