"""The recipes of this package:  rescom-timm recipes [NAME]

Lists them, each with what it is; with a NAME, prints that file, to read or to copy and change:
rescom-timm recipes digits_lt > mine.yaml
--table prints the table of recipes/README.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import answer, new_parser


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm recipes digits_lt > mine.yaml",
    )
    parser.add_argument("name", nargs="?", help="print this one")
    parser.add_argument("--table", action="store_true", help="in Markdown, with what each is expected to give")
    options = parser.parse_args(words)
    return answer(lambda: tell(options))


def tell(options: argparse.Namespace) -> int:
    from rescom_timm.config.loading import find, shipped

    if options.table:
        print(table())
        return 0
    if options.name is None:
        width = max(len(path.stem) for path in shipped()) + 2
        for path in shipped():
            print(f"{path.stem:<{width}}{summary(path)}")
        return 0
    print(find(options.name).read_text(encoding="utf-8"), end="")
    return 0


def summary(path: Path) -> str:
    """The first line of a recipe's header."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def table() -> str:
    """Every shipped recipe in Markdown: what it is, its method and backbone, and the first of what it is expected to
    give, by its header."""
    from rescom_timm.config.loading import load, shipped

    lines = ["| recipe | what it is | method | backbone | expected |", "|---|---|---|---|---|"]
    for path in shipped():
        recipe = load(path)
        cells = [
            f"[`{path.stem}`]({path.name})",
            summary(path),
            recipe.method.name,
            recipe.net.backbone,
            expected(path),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def expected(path: Path) -> str:
    """The first sentence of a header's Expected."""
    header = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    start = next(i for i, line in enumerate(header) if line.startswith("Expected "))
    text = header[start].removeprefix("Expected").strip()
    for line in header[start + 1 :]:
        if not line:
            break
        text += f" {line}"
    return re.split(r"\. (?=[A-Z])", text)[0].rstrip(".")
