"""The best model for your images in a time budget:

    rescom-timm fit FOLDER|LIST|RECIPE|HUB_ID [--minutes 20] [--backbone NAME,...] [--size N] [-o RUN]

A frozen pretrained net and a head that is balanced over the classes come first; with the rest of the minutes all
weights are trained from there, and averaged with the start. The candidates are compared on validation images, and the
chosen one becomes a run like any other, for predict, demo, report and push. --minutes 1 gives the head alone.

FOLDER holds class folders, or train, val and test with class folders, or images with a list; LIST is such a list. Of a
RECIPE its data, mean and deviation and loader are used, changed by key=value. Ctrl-C leaves the best so far as a run;
the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rescom_timm.cli import answer, new_parser

IMAGES = (
    "list", "split", "test_split", "subset", "validation",
    "image_column", "label_column", "split_column", "group_column",
)  # fmt: skip
"""Options that say how the images are read, as of init."""


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm fit my_photos --minutes 20",
        "rescom-timm fit my_photos --minutes 60 --backbone tf_efficientnet_lite0.in1k,resnet18.a1_in1k --size 160",
    )
    parser.add_argument("source", help="a folder, a list, a recipe, or a data set of the Hub")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over a recipe, such as data.source=PATH")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall clock, without downloads (default: 20)")
    parser.add_argument("--backbone", metavar="NAME,...", help="timm models; the best of several by its head goes on")
    parser.add_argument("--size", type=int, help="side of the images in pixels (default: that of the weights)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one, else cpu")
    parser.add_argument("--weights-file", metavar="FILE", help="the backbone's weights; none: from scratch")
    parser.add_argument("--use-validation", action="store_true", help="fit on the validation images too, at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", metavar="RUN", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--list", metavar="FILE", help="paths and labels of the folder's images")
    parser.add_argument("--split", default="train", help="of a data set (default: train)")
    parser.add_argument("--test-split", default="test", help="of a data set (default: test)")
    parser.add_argument("--subset", help="configuration of a Hub data set that has several")
    parser.add_argument("--validation", help="the folder val where it is, or holdout(0.1)")
    for kind, about in (("image", "image or its path"), ("label", "label"), ("split", "split"), ("group", "group")):
        parser.add_argument(f"--{kind}-column", help=f"of a data set or a table: the column of the {about}")
    arguments = parser.parse_intermixed_args(words)
    if odd := next((word for word in arguments.overrides if "=" not in word), None):
        parser.error(f"one source is fitted at a time, not {arguments.source} and {odd}")
    return answer(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    from rescom_timm.fitting.fit import Interrupted, fit
    from rescom_timm.fitting.plan import FitOptions

    usual = {"split": "train", "test_split": "test"}
    images = {name: value for name in IMAGES if (value := getattr(arguments, name)) not in (None, usual.get(name))}
    options = FitOptions(
        arguments.source, arguments.minutes, tuple(filter(None, (arguments.backbone or "").split(","))),
        arguments.size, arguments.device, arguments.weights_file, arguments.use_validation, arguments.seed,
        tuple(arguments.overrides), images,
    )  # fmt: skip
    try:
        fit(options, arguments.output)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    return 0
