"""Train a recipe.

    rescom-timm train RECIPE [+PRESET ...] [key=value ...] [--resume [hf://owner/name]] [--dry-run]

RECIPE is a YAML file or the name of one in this package (rescom-timm recipes). A PRESET is a method or another group
of settings over it: rescom-timm train digits_lt +ldam. On several processes or GPUs:
accelerate launch -m rescom_timm train RECIPE ...  or, in a clone,  accelerate launch tools/train.py RECIPE ...

--dry-run builds everything, times a few steps and evaluation batches, and prints the time and memory that the whole
recipe takes on this machine, and an estimate for other numbers of processes.

--resume continues the last run of the recipe's name, or, if RECIPE is RUN/recipe.yaml, that run.
--resume hf://owner/name continues a run that was pushed with its checkpoint; without a RECIPE, with the recipe that it
was pushed with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from rescom_timm.cli import answer, new_parser

if TYPE_CHECKING:
    from rescom_timm.engine.run_folder import Resume


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train or resume; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm train digits_lt train.epochs=10",
        "rescom-timm train digits_lt --resume",
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        default=[],
        metavar="RECIPE | +PRESET | key=value",
        help="a recipe, and presets and keys over it",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    parser.add_argument("--hide-test", action="store_true", help="evaluate on validation only (evaluation.hide_test)")
    parser.add_argument("--dry-run", action="store_true", help="check recipe and data, time a few steps; write nothing")
    parser.add_argument("--quiet", action="store_true", help="print only warnings, errors and the last metrics")
    parser.add_argument("--print", action="store_true", help="print the resolved recipe and stop")
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f"unknown option {unknown[0]}{_as_key(unknown[0], argv)}")
    given = options.arguments
    addresses = [each for each in given if each.startswith("hf://")]
    overrides = [each for each in given if ("=" in each or each[0] == "+") and each not in addresses]
    recipes = [each for each in given if each not in (*addresses, *overrides)]
    overrides += ["evaluation.hide_test=true"] if options.hide_test else []
    if addresses and not options.resume:
        parser.error(f"{addresses[0]} needs --resume")
    if not recipes and not addresses:
        parser.error("give a recipe, such as digits_lt; for the list: rescom-timm recipes")
    if len(recipes) > 1 or len(addresses) > 1:
        parser.error(_one_run((recipes or addresses)[:2]))
    return answer(lambda: run(options, recipes, overrides, addresses), trains=True)


def run(options: argparse.Namespace, recipes: list[str], overrides: list[str], addresses: list[str]) -> int:
    """Find the recipe and the run to resume, and train.

    An invalid recipe and missing data are reported before trainer, timm, torchvision and datasets are imported.
    """
    from rescom_timm.config.loading import load, load_fetched

    resume: Resume = options.resume
    if addresses:
        from rescom_timm.hub_download import PushedRun

        resume = pushed = PushedRun(addresses[0])
    if not recipes:
        recipe = load_fetched(pushed.recipe(), overrides)
    elif resume is True and is_recipe_of_run(Path(recipes[0])):
        from rescom_timm.engine.run_folder import run_recipe

        resume = Path(recipes[0]).parent
        recipe = run_recipe(resume, overrides)
    else:
        recipe = load(recipes[0], overrides, to_train=not options.print)
    if options.print:
        print(recipe.to_yaml())
        return 0
    from accelerate import PartialState

    from rescom_timm.api import train_recipe
    from rescom_timm.data.progress import quiet
    from rescom_timm.engine.errors import Stopped

    with quiet() if options.quiet and not options.dry_run else nullcontext():
        try:
            folder = train_recipe(recipe, resume, options.dry_run)
        except Stopped as error:
            print(error, file=sys.stderr)
            return 143
    if options.quiet and not options.dry_run and PartialState().is_main_process:
        print(last_metrics(folder))
    return 0


def last_metrics(folder: Path) -> str:
    """The run's folder and its metrics at the last epoch, in percent: test, or else validation."""
    from rescom_timm.io import read_json

    paths = (folder / "evaluation" / f"{split}-last.json" for split in ("test", "validation"))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return f"{folder}: not evaluated"
    numbers = read_json(path)["numbers"]
    split = "" if path.stem == "test-last" else "validation  "
    return f"{folder}: {split}{', '.join(f'{name} {value:.2f}' for name, value in numbers.items())}"


def is_recipe_of_run(path: Path) -> bool:
    """Whether a recipe is in a run's folder, also of a run without checkpoints; false in a download from the Hub."""
    folder = path.parent
    started = (folder / "environment.json").is_file() and not (folder / "rescom.json").is_file()
    return path.is_file() and (started or (folder / "checkpoints").is_dir())


def _one_run(given: Sequence[str]) -> str:
    """The error for two recipes, one of which may be a preset without its plus sign or a key without a value."""
    from rescom_timm.config.explain import keys
    from rescom_timm.config.loading import presets

    if preset := next((each for each in given if each in presets()), None):
        return f"{preset} is a preset: write +{preset}"
    if key := next((each for each in given if each in keys()), None):
        return f"{key} needs a value: write {key}=VALUE"
    return f"give one recipe, not {' and '.join(given)}; write keys as key=value"


def _as_key(option: str, argv: Sequence[str]) -> str:
    """For an unknown option such as --epochs 3: the key of the recipe that it may mean."""
    from rescom_timm.config.explain import keys, meant, suggestion
    from rescom_timm.io import parse_yaml

    name, _, text = option.lstrip("-").replace("-", "_").partition("=")
    after = list(argv)[list(argv).index(option) + 1 :][:1]
    text = text or next((each for each in after if not each.startswith("-")), "VALUE")
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    known = {key.rpartition(".")[2]: key for key in sorted(keys(), reverse=True)}
    if advice := meant(name, value):
        return f": write keys of the recipe without dashes; {advice}"
    if near := get_close_matches(name, [*known, *known.values()], n=1):
        return f": write keys of the recipe without dashes, {suggestion(known.get(near[0], near[0]), value)}"
    return ""
