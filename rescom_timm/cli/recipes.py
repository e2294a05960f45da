"""The recipes and presets of this package.

    rescom-timm recipes [NAME | +PRESET]

Lists them. With a NAME or +PRESET, prints that file, to read or to copy: rescom-timm recipes digits_lt > mine.yaml.
--show RECIPE [+PRESET ...] [key=value ...] prints the resolved recipe, every key with its value. --table prints the
tables of recipes/README.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import answer, new_parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """List or print recipes; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm recipes digits_lt > mine.yaml")
    parser.add_argument("name", nargs="?", help="print this one")
    parser.add_argument(
        "--show", nargs="+", metavar="RECIPE", help="print the resolved recipe: RECIPE +PRESET key=value"
    )
    parser.add_argument("--table", action="store_true", help="in Markdown, with the expected results")
    options = parser.parse_args(argv)
    return answer(lambda: show(options))


def show(options: argparse.Namespace) -> int:
    """Print what was asked for."""
    from rescom_timm.config.loading import find, load, presets, shipped

    if options.table:
        print(table())
    elif options.show:
        print(load(options.show[0], options.show[1:]).to_yaml())
    elif options.name is None:
        known = {path.stem: path for path in shipped()} | {f"+{name}": path for name, path in presets().items()}
        width = max(map(len, known)) + 2
        for name, path in known.items():
            print(f"{name:<{width}}{summary(path)}")
    else:
        path = presets().get(options.name.removeprefix("+")) or find(options.name)
        print(path.read_text(encoding="utf-8"), end="")
    return 0


def summary(path: Path) -> str:
    """The first line of a recipe's header."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def table() -> str:
    """Markdown tables of the shipped recipes and presets, from their headers."""
    from rescom_timm.config.loading import load, presets, shipped

    rows = [("recipe", "what it is", "method", "backbone", "expected")]
    for path in shipped():
        recipe = load(path)
        rows.append(
            (f"[`{path.stem}`]({path.name})", summary(path), recipe.method.name, recipe.net.backbone, expected(path))
        )
    over = [("preset", "what it is", "source")]
    for name, path in presets().items():
        over.append((f"[`+{name}`](methods/{path.name})", summary(path), expected(path, "Source")))
    return "\n\n".join(markdown(part) for part in (rows, over))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def expected(path: Path, field: str = "Expected") -> str:
    """The first sentence of a field of a header."""
    header = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    start = next(i for i, line in enumerate(header) if line.startswith(f"{field} "))
    text = header[start].removeprefix(field).strip()
    for line in header[start + 1 :]:
        if not line:
            break
        text += f" {line}"
    return re.split(r"\. (?=[A-Z])", text)[0].rstrip(".")
