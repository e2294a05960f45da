"""Labels for images:  rescom-timm predict MODEL IMAGES ... [--top-k 5] [-o labels.csv] [--prior train|uniform|FILE]

MODEL: a run's folder, an exported folder or a Hub id such as me/rescom-r50. IMAGES: files and folders. An image that
cannot be read is named in the CSV's column `error` and stops nothing. --prior: how frequent the classes are where the
images come from: as in training, evenly, or a file of lines name,number in any order, or of one number a class in the
order of the model's classes.

Images of known classes, whose share of right labels is told: --data SOURCE (a folder of class folders, a data set,
digits), with --list labels.csv for a list of the images in a folder; --split, test by default, where it has splits.

--embeddings FILE.safetensors  keeps every image's features and embedding
--nearest 3                    also names the nearest training images of a RUN; --among FILE keeps their embeddings, or
                               names another such file to look in
--coverage 0.9                 also gives the set of classes that holds the right one so often, by the RUN's
                               validation images; --by-group promises it for many, medium and few each
--five-crops                   also tells the label by the mean of five crops
"""

from __future__ import annotations

from collections.abc import Sequence

from rescom_timm.cli import answer, new_parser


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm predict runs/my_photos photos/ -o labels.csv",
        "rescom-timm predict runs/my_photos --data photos --list labels.csv --coverage 0.9",
    )
    parser.add_argument("model", help="a run's folder, an exported folder or a Hub id")
    parser.add_argument("images", nargs="*", help="image files and folders")
    parser.add_argument("--revision", help="of a Hub id: a branch, a tag or a commit")
    parser.add_argument("--data", metavar="SOURCE", help="labelled images: digits, a Hub id, a folder")
    parser.add_argument("--list", metavar="FILE", help="a list of the labelled images in the folder SOURCE")
    parser.add_argument("--split", default="test", help="of the data set; test by default")
    parser.add_argument("--top-k", type=int, default=5, help="classes of each image, 5 by default")
    parser.add_argument("--prior", help="train, uniform, or a file of name,number a line")
    parser.add_argument("--embeddings", metavar="FILE", help="keep features and embeddings, as safetensors")
    parser.add_argument("--nearest", type=int, default=0, metavar="K", help="name the K nearest training images")
    parser.add_argument("--among", metavar="FILE", help="embeddings of the images to look in; made if not there")
    parser.add_argument("--coverage", type=float, metavar="C", help="prediction sets that are right so often: 0.9")
    parser.add_argument("--by-group", action="store_true", help="coverage for many, medium and few each")
    parser.add_argument("--five-crops", action="store_true", help="also the label by the mean of five crops")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", help="cuda if there is one")
    parser.add_argument("-o", "--output", default="predictions.csv", metavar="CSV", help="predictions.csv by default")
    options = parser.parse_args(words)
    if bool(options.images) == bool(options.data):
        parser.error("give images, or --data SOURCE")
    if options.list and not options.data:
        parser.error("--list is a list of the images of --data SOURCE")
    if options.among and not options.nearest:
        parser.error("--among goes with --nearest")
    if options.by_group and options.coverage is None:
        parser.error("--by-group goes with --coverage")

    def work() -> int:
        from rescom_timm.cli.parts.predict import predict

        return predict(options)

    return answer(work, writes=[options.output, options.embeddings, options.among])
