"""Labels for images:  rescom-timm predict MODEL IMAGES ... [--top-k 5] [-o labels.csv] [--prior train|uniform|FILE]

MODEL: a run's folder, an exported folder or a Hub id such as me/rescom-r50. IMAGES: files and folders; or a data set's
test split with --data SOURCE [--split test] (its share of right labels is told then). An image that cannot be read is
named in the CSV's column `error` and stops nothing. --prior: how frequent the classes are where the images come from:
as in training, evenly, or a file with one number a class, a line each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rescom_timm.commands import new_parser

if TYPE_CHECKING:
    from rescom_timm.sharing.predict import Prediction, Prior


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm predict runs/digits_lt photos/ --top-k 3 -o labels.csv",
    )
    parser.add_argument("model", help="a run's folder, an exported folder or a Hub id")
    parser.add_argument("images", nargs="*", help="image files and folders")
    parser.add_argument("--data", metavar="SOURCE", help="a data set instead of files: digits, a Hub id, a folder")
    parser.add_argument("--split", default="test", help="of the data set; test by default")
    parser.add_argument("--top-k", type=int, default=5, help="classes of each image, 5 by default")
    parser.add_argument("--prior", help="train, uniform, or a file of one number a class")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", help="cuda if there is one")
    parser.add_argument("-o", "--output", default="predictions.csv", metavar="CSV", help="predictions.csv by default")
    arguments = parser.parse_args(words)
    if bool(arguments.images) == bool(arguments.data):
        parser.error("give images, or --data SOURCE")
    from rescom_timm.data.sources import load
    from rescom_timm.data.splits import DataConfig
    from rescom_timm.sharing.predict import predictions, write_csv

    try:
        other = "test" if arguments.split == "train" else "train"  # so that the split is not its own training images
        data = load(DataConfig(arguments.data, train=other, test=arguments.split)) if arguments.data else None
        images = data.test if data else arguments.images
        found = predictions(
            arguments.model, images, arguments.top_k, read_prior(arguments.prior), arguments.batch_size,
            arguments.workers, arguments.device,
        )  # fmt: skip
        score = Score()
        number, broken = write_csv(score.count(found), arguments.output, arguments.top_k)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{number} images, {broken} unreadable: {arguments.output}{score.told()}")
    return 0


class Score:
    """How many of the images whose class is known were labelled right."""

    def __init__(self) -> None:
        self.right = self.known = 0

    def count(self, found: Iterable[Prediction]) -> Iterator[Prediction]:
        for one in found:
            if one.label and one.labels:
                self.known += 1
                self.right += one.labels[0] == one.label
            yield one

    def told(self) -> str:
        return f"; top-1 {100 * self.right / self.known:.2f} % of {self.known}" if self.known else ""


def read_prior(word: str | None) -> Prior | None:
    """train, uniform, or the numbers in a file. Raises FileNotFoundError or ValueError."""
    if word is None or word == "train" or word == "uniform":
        return word  # type: ignore[return-value]
    try:
        return [float(line) for line in Path(word).read_text(encoding="utf-8").split()]
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {word}: --prior is train, uniform or a file of one number a class") from None
    except ValueError as error:
        raise ValueError(f"{word} is not one number a class: {error}") from None
