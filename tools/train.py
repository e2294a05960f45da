"""Train a recipe:  accelerate launch tools/train.py RECIPE [key=value ...] [--resume [hf://owner/name]] [--dry-run]

--resume goes on with the last run of the recipe's name, or, where RECIPE is RUN/recipe.yaml, with that run.
--resume hf://owner/name goes on with a run that was pushed with its checkpoint, on another machine perhaps; without a
RECIPE, by the recipe that it was pushed with.
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from pathlib import Path

from rescom_timm.data.loaders import last_words
from rescom_timm.recipe.loading import keys, load, load_fetched
from rescom_timm.sharing.hub import fetch_recipe
from rescom_timm.training.run_folder import run_recipe
from rescom_timm.training.trainer import FAILURES, Stopped, train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="RECIPE | key=value", help="a YAML file, and keys over it")
    parser.add_argument("--resume", action="store_true", help="go on where the run's last checkpoint stands")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, data and one step; write nothing")
    parser.add_argument("--print", action="store_true", help="print the resolved recipe and stop")
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        parser.error(f"unknown option {unknown[0]}{_as_key(unknown[0])}")
    addresses = [word for word in arguments.words if word.startswith("hf://")]
    overrides = [word for word in arguments.words if "=" in word and word not in addresses]
    recipes = [word for word in arguments.words if word not in (*addresses, *overrides)]
    if addresses and not arguments.resume:
        parser.error(f"{addresses[0]} is only read with --resume")
    if not recipes and not addresses:
        parser.error("name a recipe, such as recipes/digits_lt.yaml")
    if len(recipes) > 1 or len(addresses) > 1:
        parser.error(
            f"one run is trained at a time, not {' and '.join((recipes or addresses)[:2])}; keys are key=value"
        )
    address = addresses[0] if addresses else None
    try:
        path, run = Path(recipes[0]) if recipes else fetch_recipe(address), None
        if not recipes:
            recipe = load_fetched(path, overrides)
        elif arguments.resume and (path.parent / "checkpoints").is_dir():
            run, recipe = path.parent, run_recipe(path.parent, overrides)
        else:
            recipe = load(path, overrides)
        if arguments.print:
            print(recipe.to_yaml())
            return 0
        train(recipe, resume=address or run or arguments.resume, dry_run=arguments.dry_run)
    except (*FAILURES, Stopped) as error:
        print(last_words(error), file=sys.stderr)
        return 143 if isinstance(error, Stopped) else 1
    return 0


def _as_key(option: str) -> str:
    """For --epochs 3: how it is written."""
    name, _, value = option.lstrip("-").replace("-", "_").partition("=")
    after = sys.argv[sys.argv.index(option) + 1 :][:1]
    value = value or next((word for word in after if not word.startswith("-")), "VALUE")
    known = {key.rpartition(".")[2]: key for key in sorted(keys(), reverse=True)}
    near = get_close_matches(name, [*known, *known.values()], n=1)
    return f": keys of the recipe are said without dashes, {known.get(near[0], near[0])}={value}" if near else ""


if __name__ == "__main__":
    sys.exit(main())
