"""Index files, which list the images to train on.

    rescom-timm index make|check|convert|describe|overlap ...

An index is a text file of rows or image paths with their labels. Official lists and iNaturalist's JSON are read too.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from rescom_timm.cli import answer, example, new_parser

ACTIONS = {
    "make": "Draw a long-tailed index from a data set, a list, or a file of labels (one a line).",
    "check": "List every error in an index; with --source, also in the images or the data set.",
    "convert": "Convert an official list or an iNaturalist JSON to an index.",
    "describe": "Counts, groups, imbalance, digest and long tail of an index, a list, or a JSON list of class counts.",
    "overlap": "List the images that are in both of two indexes.",
}
"""Functions of parts/index.py, which takes seconds to import."""
EXAMPLES = {
    "make": 'make uoft-cs/cifar10 "exponential(100)" -o cifar10_lt_if100.txt',
    "check": "check Places_LT_train.txt --source /data/places365",
    "convert": "convert train2018.json -o inat18_train.txt",
    "describe": "describe Places_LT_train.txt --png places.png",
    "overlap": "overlap Places_LT_train.txt Places_LT_val.txt",
}


def data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a data set or a table is read."""
    parser.add_argument("--split", default="train", help="of the data set (default: train)")
    parser.add_argument("--subset", help="configuration of a Hub data set that has several")
    for kind, about in (("image", "image or its path"), ("label", "label"), ("split", "split"), ("group", "group")):
        parser.add_argument(f"--{kind}-column", help=f"of a data set or a table: the column of the {about}")


def new_index_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of the group, with a parser for each action."""
    top = new_parser(__doc__, prog, *(f"rescom-timm index {line}" for line in EXAMPLES.values()))
    actions = top.add_subparsers(required=True, metavar="|".join(ACTIONS), dest="action")

    def action(name: str, *positional: tuple[str, str]) -> argparse.ArgumentParser:
        one = actions.add_parser(
            name, help=ACTIONS[name], description=ACTIONS[name], epilog=example(f"rescom-timm index {EXAMPLES[name]}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        for argument, text in positional:
            one.add_argument(argument, help=text)
        return one

    def list_options(one: argparse.ArgumentParser) -> None:
        one.add_argument("--classes", type=int, help="number of classes (default: the header's, or largest label + 1)")
        one.add_argument("--allow-empty", action="store_true", help="allow classes without images, as in test lists")

    data = ("source", "digits, a Hub id, a folder of parquet or arrow files, or a list")
    file = ("file", "an index, an official list or an iNaturalist JSON")
    one = action("make", data, ("rule", "exponential(IF), step(IF), or with a seed: exponential(100, seed=1)"))
    one.add_argument("-o", "--output", required=True, type=os.path.expanduser)
    one.add_argument("--labels", metavar="FILE", help="read labels from here, one a line, instead of the data set")
    data_options(one)
    one = action("convert", file)
    one.add_argument("-o", "--output", required=True, type=os.path.expanduser)
    one.add_argument("--names", metavar="FILE", help="class names, one a line")
    list_options(one)
    one = action("check", file)
    one.add_argument("--source", help="image root or data set to check against")
    one.add_argument("--decode", action="store_true", help="decode every image of --source")
    one.add_argument("-o", "--output", type=os.path.expanduser, help="write the list without unreadable images")
    one.add_argument("--lines", type=int, default=20, help="print at most this many errors (default: 20)")
    data_options(one)
    list_options(one)
    one = action("describe", ("file", file[1] + ", or a JSON list of class counts"))
    one.add_argument("--png", metavar="FILE", help="draw the long tail")
    one.add_argument("--classes", type=int, help="number of classes (default: the header's, or largest label + 1)")
    one = action("overlap", file, ("other", "another"))
    one.add_argument("--lines", type=int, default=10, help="print at most this many images (default: 10)")
    return top


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one action; returns the exit code."""
    parser = new_index_parser(prog)
    options = parser.parse_args(argv)
    if options.action == "check" and (options.decode or options.output) and not options.source:
        parser.error("--decode and --output read the images: give their folder or data set with --source")

    def work() -> int:
        from rescom_timm.cli.parts import index

        code = int(getattr(index, options.action)(options))
        sys.stdout.flush()
        return code

    return answer(work, writes=[getattr(options, "output", None), getattr(options, "png", None)])
