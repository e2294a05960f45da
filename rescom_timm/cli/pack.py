"""Write a smaller copy of a data set to train from.

    rescom-timm pack RECIPE|FOLDER -o DIR [--size 256]

Images are resized once (shorter side to --size, bicubic, JPEG of --quality) and stored in a few large files that
`datasets` maps into memory; images that are not larger keep their bytes. For network disks and jobs that start often.
Choose a size above the crops of the views. At the same pixels quality 95 may take more bytes than the original. What a
copy changes in accuracy: RESULTS.md, Packed copies. Of a recipe its training, validation and test rows are copied, and
DIR/recipe.yaml is the recipe for the copy. The same command resumes an interrupted copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rescom_timm.cli import answer, new_parser

if TYPE_CHECKING:
    from rescom_timm.config.recipe import Recipe
    from rescom_timm.data.sources import Data


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the copy; returns the exit code."""
    parser = new_parser(
        __doc__, prog, "rescom-timm pack inat18_r50 -o /fast/inat18_256", "rescom-timm pack photos -o packed --size 320"
    )
    parser.add_argument("source", metavar="RECIPE|FOLDER", help="a recipe by path or name, or a folder of images")
    parser.add_argument("keys", nargs="*", default=[], metavar="key=value", help="changes of the recipe")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a new folder, or one to resume")
    parser.add_argument("--size", type=int, default=256, help="pixels of the shorter side (256)")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG, 1 to 100 (95)")
    parser.add_argument("--format", choices=("arrow", "parquet"), default="arrow", help="parquet: for the Hub")
    parser.add_argument("--workers", type=int, default=1, help="threads that resize (1)")
    options = parser.parse_args(argv)
    return answer(lambda: _work(options), folders=[options.output])


def _work(options: argparse.Namespace) -> int:
    from rescom_timm.data.decoding import ReadConfig
    from rescom_timm.data.pack import PackConfig, pack

    config = PackConfig(options.size, options.quality, options.format)
    if Path(options.source).expanduser().is_dir():
        pack(_folder(options), options.output, config, ReadConfig(exif=True), options.workers)
        print(f"train on it with data.source={options.output}, or  rescom-timm init {options.output}")
        return 0
    from rescom_timm.config.loading import load as load_recipe
    from rescom_timm.data.sources import load

    recipe = load_recipe(options.source, options.keys)
    data = load(recipe.data)
    pack(data, options.output, config, recipe.loader.reading, options.workers)
    path = Path(options.output) / "recipe.yaml"
    path.write_text(_over_the_copy(recipe, options.output, data.validation is not None))
    print(f"rescom-timm train {path}")
    return 0


def _folder(options: argparse.Namespace) -> Data:
    from rescom_timm.config.own_splits import OwnImages, parts, saved_lists
    from rescom_timm.data.sources import load

    indexes, config = parts(OwnImages(options.source))
    with TemporaryDirectory() as place:
        return load(saved_lists(indexes, config, place))


def _over_the_copy(recipe: Recipe, folder: str, validation: bool) -> str:
    import yaml

    tree = recipe.to_dict()
    tree["data"] = {"source": folder, "validation": "split(validation)" if validation else "none"}
    return yaml.safe_dump(tree, sort_keys=False, width=120)
