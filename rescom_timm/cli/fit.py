"""The best model for your images in a time budget.

    rescom-timm fit FOLDER|LIST|RECIPE|HUB_ID [--minutes 20] [--backbone NAME,...] [--size N] [-o RUN]

First a class-balanced head is fitted on a frozen pretrained net. With the rest of the minutes all weights are trained
from there, and averaged with the start. The candidates are compared on validation images, and the best one becomes a
normal run, for predict, demo, plot and push. If the minutes do not hold one epoch, the head is the model; if they do
not hold all images, it is fitted on a sample in which rare classes are whole.

FOLDER: class folders, or train, val and test with class folders, or images with a list; LIST is such a list. Of a
RECIPE the data, mean, std and loader are used, changed by key=value. After Ctrl-C the best so far is the run, and the
same command resumes; with --join it helps a fit that is running, from here or from another machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rescom_timm.cli import answer, new_parser
from rescom_timm.cli.index import data_options

IMAGES = (
    "list", "split", "test_split", "subset", "validation",
    "image_column", "label_column", "split_column", "group_column",
)  # fmt: skip
"""Options that say how the images are read, as of init."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Fit a model; returns the exit code."""
    began = time.monotonic()  # the minutes hold the imports too
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm fit my_photos --minutes 20",
        "rescom-timm fit my_photos --minutes 60 --backbone tf_efficientnet_lite0.in1k,resnet18.a1_in1k --size 160",
    )
    parser.add_argument("source", help="a folder, a list, a recipe, or a data set of the Hub")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="over a recipe, such as data.source=PATH"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="wall clock, without downloads (default: 20)")
    parser.add_argument("--backbone", metavar="NAME,...", help="timm models; the best of several by its head goes on")
    parser.add_argument("--size", type=int, help="side of the images in pixels (default: that of the weights)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one, else cpu")
    parser.add_argument("--weights-file", metavar="FILE", help="the backbone's weights; none: from scratch")
    about = "class features from class names (rescom-timm class-features), for a CLIP or SigLIP backbone"
    parser.add_argument("--class-features", metavar="FILE", help=about)
    parser.add_argument("--use-validation", action="store_true", help="fit on the validation images too, at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", metavar="RUN", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--join", action="store_true", help="help the process that fits there, if one does")
    parser.add_argument("--list", metavar="FILE", help="paths and labels of the folder's images")
    parser.add_argument("--test-split", default="test", help="of a data set (default: test)")
    parser.add_argument("--validation", help="default: the folder val if it exists, else holdout(0.1)")
    data_options(parser)
    arguments = parser.parse_intermixed_args(argv)
    if odd := next((each for each in arguments.overrides if "=" not in each), None):
        parser.error(f"give one source, not {arguments.source} and {odd}")
    return answer(lambda: run(arguments, began))


def run(arguments: argparse.Namespace, began: float) -> int:
    """Fit with these arguments. began: when the command was started, on time.monotonic()."""
    from rescom_timm.fitting.fit import fit
    from rescom_timm.fitting.plan import FitOptions
    from rescom_timm.fitting.steps import Interrupted

    usual = {"split": "train", "test_split": "test"}
    images = {name: value for name in IMAGES if (value := getattr(arguments, name)) not in (None, usual.get(name))}
    options = FitOptions(
        arguments.source, arguments.minutes, tuple(filter(None, (arguments.backbone or "").split(","))),
        arguments.size, arguments.device, arguments.weights_file, arguments.class_features, arguments.use_validation,
        arguments.seed, tuple(arguments.overrides), images,
    )  # fmt: skip
    try:
        fit(options, arguments.output, used=time.monotonic() - began, join=arguments.join)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    return 0
