"""Write a recipe for your own images.

    rescom-timm init SOURCE -o RECIPE.yaml

SOURCE: a folder of class folders (or of train, val and test with class folders in each), a folder with a list, or a
local or Hub data set. The lists of the images are written beside the recipe. Net, method and epochs follow from the
number of images, their size, the imbalance and the device; each choice is printed with its reason, and the training
time, by a measured step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from rescom_timm.cli import answer, new_parser
from rescom_timm.cli.index import data_options


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the recipe and its lists; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm init my_photos -o my_photos.yaml")
    parser.add_argument("source", help="a folder of class folders, one with a list, or a local or Hub data set")
    parser.add_argument("-o", "--output", required=True, type=os.path.expanduser, metavar="RECIPE.yaml")
    parser.add_argument("--imbalance", type=float, metavar="IF", help="cut the training images to this imbalance")
    parser.add_argument(
        "--validation", help="to choose the best checkpoint (default: the folder val if it exists, else holdout(0.1))"
    )
    parser.add_argument(
        "--test-split", default="test", help="a data set's; the name of --split takes a fifth of it for testing"
    )
    parser.add_argument("--list", metavar="FILE", help="paths and labels of the images: CSV, JSON lines, Parquet, text")
    parser.add_argument("--leave-out", action="store_true", help="leave out unreadable images")
    parser.add_argument(
        "--tune", choices=["lora", "adaptformer", "prompt"],
        help="train less than 2%% of the weights, over a frozen ViT of ImageNet-21k",
    )  # fmt: skip
    parser.add_argument("--backbone", metavar="NAME", help="a timm model (default: by the images and the device)")
    parser.add_argument("--size", type=int, metavar="N", help="side of the images in pixels (default: by the backbone)")
    parser.add_argument("--method", metavar="NAME", help="a preset or a method (rescom-timm recipes lists them)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="to train on (default: a GPU where there is one)")
    parser.add_argument("--force", action="store_true", help="overwrite files")
    data_options(parser)
    options = parser.parse_args(argv)

    def work() -> int:
        from rescom_timm.cli.parts.init import init

        return init(options)

    return answer(work, writes=[options.output])
