"""The recipes of this package:  rescom-timm recipes [NAME]

Lists them, each with what it is; with a NAME, prints that file, to read or to copy and change:
rescom-timm recipes digits_lt > mine.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.recipe.config import RecipeError
from rescom_timm.recipe.loading import find, shipped


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="print this one")
    options = parser.parse_args(words)
    if options.name is None:
        width = max(len(path.stem) for path in shipped()) + 2
        for path in shipped():
            print(f"{path.stem:<{width}}{summary(path)}")
        return 0
    try:
        text = find(options.name).read_text(encoding="utf-8")
    except RecipeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(text, end="")
    return 0


def summary(path: Path) -> str:
    """The first line of a recipe's header."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
