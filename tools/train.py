"""Train a recipe:  accelerate launch tools/train.py RECIPE [key=value ...] [--resume] [--dry-run]"""

from __future__ import annotations

import argparse
import sys

from rescom_timm.runs.checkpoint import CheckpointError
from rescom_timm.runs.recipe import RecipeError, load
from rescom_timm.runs.trainer import NonFiniteLoss, Stopped, train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a YAML file, such as recipes/digits_lt.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.epochs=10 method.beta=0.999")
    parser.add_argument("--resume", action="store_true", help="go on where the run's last checkpoint stands")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, data and one step; write nothing")
    parser.add_argument("--print", action="store_true", help="print the resolved recipe and stop")
    arguments = parser.parse_intermixed_args()
    try:
        recipe = load(arguments.recipe, arguments.overrides)
        if arguments.print:
            print(recipe.to_yaml())
            return 0
        train(recipe, resume=arguments.resume, dry_run=arguments.dry_run)
    except (RecipeError, CheckpointError, NonFiniteLoss, Stopped, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 143 if isinstance(error, Stopped) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
