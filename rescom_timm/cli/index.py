"""Index files: which images are trained on.

rescom-timm make uoft-cs/cifar10 "exponential(100)" -o cifar10_lt_if100.txt
rescom-timm convert train2018.json -o inat18_train.txt
rescom-timm check Places_LT_train.txt --source /data/places365 [--decode]
rescom-timm describe Places_LT_train.txt --png places.png
rescom-timm overlap Places_LT_train.txt Places_LT_val.txt
rescom-timm init my_photos -o my_photos.yaml
"""

import argparse
import os
import sys
from collections.abc import Sequence

from rescom_timm.cli import answer, example, new_parser

VERBS = {
    "make": "Draw a long-tailed index from a data set, a list, or a file of labels (one a line).",
    "convert": "Bring an official list or an iNaturalist JSON into this package's format.",
    "check": "Say everything that is wrong with an index; with --source, also against the images or the data set.",
    "describe": "Counts, groups, imbalance, digest and long tail of an index, a list, or a JSON list of class counts.",
    "overlap": "Say which images stand in both of two indexes.",
    "init": "Write a recipe for one's own images: class folders, a folder with a list, or a local or Hub data set.",
}
"""Functions of parts/index.py, which take seconds to import."""
EXAMPLES = dict((line.split()[1], line) for line in __doc__.splitlines() if line.startswith("rescom-timm "))


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    top = new_parser(__doc__, prog, EXAMPLES["init"])
    verbs = top.add_subparsers(required=True, metavar="SUBCOMMAND")

    def verb(name: str, *positional: tuple[str, str]) -> argparse.ArgumentParser:
        one = verbs.add_parser(
            name, help=VERBS[name], description=VERBS[name], epilog=example(EXAMPLES[name]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        one.set_defaults(verb=name)
        for word, text in positional:
            one.add_argument(word, help=text)
        return one

    def data_options(one: argparse.ArgumentParser) -> None:
        one.add_argument("--split", default="train", help="of the data set (default: train)")
        one.add_argument("--subset", help="configuration of a Hub data set that has several")
        for kind, about in (("image", "image or its path"), ("label", "label"), ("split", "split"), ("group", "group")):
            one.add_argument(f"--{kind}-column", help=f"of a data set or a table: the column of the {about}")

    def list_options(one: argparse.ArgumentParser) -> None:
        one.add_argument("--classes", type=int, help="number of classes (default: the header's, or largest label + 1)")
        one.add_argument("--allow-empty", action="store_true", help="let classes be without images, as in test lists")

    data = ("source", "digits, a Hub id, a folder of parquet or arrow files, or a list")
    file = ("file", "an index, an official list or an iNaturalist JSON")
    one = verb("make", data, ("rule", "exponential(IF), step(IF), or with a seed: exponential(100, seed=1)"))
    one.add_argument("-o", "--output", required=True, type=os.path.expanduser)
    one.add_argument("--labels", metavar="FILE", help="read labels from here, one a line, instead of the data set")
    data_options(one)
    one = verb("convert", file)
    one.add_argument("-o", "--output", required=True, type=os.path.expanduser)
    one.add_argument("--names", metavar="FILE", help="class names, one a line")
    list_options(one)
    one = verb("check", file)
    one.add_argument("--source", help="image root or data set to check against")
    one.add_argument("--decode", action="store_true", help="decode every image of --source")
    one.add_argument("-o", "--output", type=os.path.expanduser, help="write the list without those that cannot be read")
    one.add_argument("--lines", type=int, default=20, help="most problems told (default: 20)")
    data_options(one)
    list_options(one)
    one = verb("describe", ("file", file[1] + ", or a JSON list of class counts"))
    one.add_argument("--png", metavar="FILE", help="draw the long tail")
    one.add_argument("--classes", type=int, help="number of classes (default: the header's, or largest label + 1)")
    one = verb("overlap", file, ("other", "another"))
    one.add_argument("--lines", type=int, default=10, help="most images named (default: 10)")
    one = verb("init", ("source", "a folder of class folders, one with a list, or a local or Hub data set"))
    one.add_argument("-o", "--output", required=True, type=os.path.expanduser, metavar="RECIPE.yaml")
    one.add_argument("--imbalance", type=float, metavar="IF", help="cut the training images to this imbalance")
    one.add_argument("--validation", help="to choose the best checkpoint (the folder val where it is, or holdout(0.1))")
    one.add_argument("--test-split", default="test", help="a data set's; the name of --split parts a fifth of it off")
    one.add_argument("--list", metavar="FILE", help="paths and labels of the images: CSV, JSON lines, Parquet, text")
    one.add_argument("--leave-out", action="store_true", help="leave out images that cannot be read")
    tune = "train few weights over a frozen ViT of ImageNet-21k: best where images are few"
    one.add_argument("--tune", choices=["lora", "adaptformer", "prompt"], help=tune)
    one.add_argument("--force", action="store_true", help="write over files that exist")
    data_options(one)
    return top


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    top = parser(prog)
    options = top.parse_args(arguments)
    if options.verb == "check" and (options.decode or options.output) and not options.source:
        top.error("--decode and --output read the images: say where they are with --source")

    def work() -> int:
        from rescom_timm.cli.parts import index

        code = int(getattr(index, options.verb)(options))
        sys.stdout.flush()
        return code

    return answer(work, writes=[getattr(options, "output", None), getattr(options, "png", None)])
