"""Train a recipe:  rescom-timm train RECIPE [+PRESET ...] [key=value ...] [--resume [hf://owner/name]] [--dry-run]

RECIPE is a YAML file, or the name of one that comes with the package (rescom-timm recipes). A PRESET is a method or
another group of settings to put over it: rescom-timm train digits_lt +ldam. On several processes or
GPUs:  accelerate launch -m rescom_timm train RECIPE ...  or, in a clone,  accelerate launch tools/train.py RECIPE ...

--resume goes on with the last run of the recipe's name, or, where RECIPE is RUN/recipe.yaml, with that run.
--resume hf://owner/name goes on with a run that was pushed with its checkpoint, on another machine perhaps; without a
RECIPE, by the recipe that it was pushed with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path

from rescom_timm.cli import answer, new_parser


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm train digits_lt train.epochs=10",
        "rescom-timm train digits_lt --resume",
    )
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE | +PRESET | key=value", help="a YAML file, and keys over it"
    )
    parser.add_argument("--resume", action="store_true", help="go on where the run's last checkpoint stands")
    parser.add_argument("--hide-test", action="store_true", help="evaluate on validation alone (evaluation.hide_test)")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, data and one step; write nothing")
    parser.add_argument("--quiet", action="store_true", help="tell warnings, errors and the last figures only")
    parser.add_argument("--print", action="store_true", help="print the resolved recipe and stop")
    arguments, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        parser.error(f"unknown option {unknown[0]}{_as_key(unknown[0], words)}")
    addresses = [word for word in arguments.words if word.startswith("hf://")]
    overrides = [word for word in arguments.words if ("=" in word or word[0] == "+") and word not in addresses]
    recipes = [word for word in arguments.words if word not in (*addresses, *overrides)]
    overrides += ["evaluation.hide_test=true"] if arguments.hide_test else []
    if addresses and not arguments.resume:
        parser.error(f"{addresses[0]} is only read with --resume")
    if not recipes and not addresses:
        parser.error("name a recipe, such as digits_lt; all of them: rescom-timm recipes")
    if len(recipes) > 1 or len(addresses) > 1:
        parser.error(_one_run((recipes or addresses)[:2]))
    return answer(lambda: run(arguments, recipes, overrides, addresses), trains=True)


def run(arguments: argparse.Namespace, recipes: list[str], overrides: list[str], addresses: list[str]) -> int:
    from accelerate import PartialState

    from rescom_timm.api import train_recipe
    from rescom_timm.config.loading import load, load_fetched
    from rescom_timm.data.progress import quiet
    from rescom_timm.engine.errors import Stopped
    from rescom_timm.engine.run_folder import run_recipe
    from rescom_timm.engine.trainer import Resume
    from rescom_timm.hub_download import PushedRun

    resume: Resume = arguments.resume
    if addresses:
        resume = PushedRun(addresses[0])
    if isinstance(resume, PushedRun) and not recipes:
        recipe = load_fetched(resume.recipe(), overrides)
    elif resume is True and is_recipe_of_run(Path(recipes[0])):
        resume = Path(recipes[0]).parent
        recipe = run_recipe(resume, overrides)
    else:
        recipe = load(recipes[0], overrides)
    if arguments.print:
        print(recipe.to_yaml())
        return 0
    with quiet() if arguments.quiet and not arguments.dry_run else nullcontext():
        try:
            folder = train_recipe(recipe, resume, arguments.dry_run)
        except Stopped as error:
            print(error, file=sys.stderr)
            return 143
    if arguments.quiet and not arguments.dry_run and PartialState().is_main_process:
        print(last_figures(folder))
    return 0


def last_figures(folder: Path) -> str:
    """The run's folder and its test figures at the last epoch, in percent; those on validation where it has none."""
    from rescom_timm.io import read_json

    paths = (folder / "evaluation" / f"{split}-last.json" for split in ("test", "validation"))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return f"{folder}: not evaluated"
    numbers = read_json(path)["numbers"]
    split = "" if path.stem == "test-last" else "validation  "
    return f"{folder}: {split}{', '.join(f'{name} {value:.2f}' for name, value in numbers.items())}"


def is_recipe_of_run(path: Path) -> bool:
    """Whether a recipe stands in a run's folder, also of a run that was never saved; not in one from the Hub."""
    beside = path.parent
    began = (beside / "environment.json").is_file() and not (beside / "rescom.json").is_file()
    return path.is_file() and (began or (beside / "checkpoints").is_dir())


def _one_run(given: Sequence[str]) -> str:
    """What is wrong with two recipes, of which one may be a preset without its plus sign, or a key without a value."""
    from rescom_timm.config.explain import keys
    from rescom_timm.config.loading import presets

    if preset := next((word for word in given if word in presets()), None):
        return f"{preset} is a preset: write +{preset}"
    if key := next((word for word in given if word in set(keys())), None):
        return f"{key} needs a value: write {key}=VALUE"
    return f"one run is trained at a time, not {' and '.join(given)}; keys are key=value"


def _as_key(option: str, words: Sequence[str]) -> str:
    """For --epochs 3: how it is written."""
    from rescom_timm.config.explain import keys, meant, suggestion
    from rescom_timm.io import parse_yaml

    name, _, text = option.lstrip("-").replace("-", "_").partition("=")
    after = list(words)[list(words).index(option) + 1 :][:1]
    text = text or next((word for word in after if not word.startswith("-")), "VALUE")
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    known = {key.rpartition(".")[2]: key for key in sorted(keys(), reverse=True)}
    if advice := meant(name, value):
        return f": keys of the recipe are written without dashes; {advice}"
    if near := get_close_matches(name, [*known, *known.values()], n=1):
        return f": keys of the recipe are written without dashes, {suggestion(known.get(near[0], near[0]), value)}"
    return ""
