"""Labels for images.

    rescom-timm predict MODEL IMAGES ... [--top-k 5] [-o labels.csv] [--prior train|uniform|estimate|FILE]
    rescom-timm predict MODEL --data SOURCE [--list labels.csv] ...

MODEL: a run's folder, an exported folder or a Hub id such as me/rescom-r50. IMAGES: files and folders. An unreadable
image is reported in the CSV's column `error`. --prior: class frequencies where the images come from: as in training,
uniform, estimated from the images themselves (EM; takes a pass over them, and some hundred images), or a file of lines
name,number in any order, or of one number a class in the order of the model's classes. --temperature: the probabilities
are softmax(logits / T); fitted is the T of the run's validation images.

--data SOURCE: labelled images (a folder of class folders, a data set, digits), for which the accuracy is printed; with
--list labels.csv, the images in a folder that the list names. --split: test by default, if it has splits.

--embeddings FILE.safetensors  write the features and embedding of every image
--nearest 3                    name the nearest training images of a RUN; --among FILE keeps their embeddings, or names
                               another such file to search
--coverage 0.9                 give the set of classes with this probability of the right one, calibrated on the RUN's
                               validation images; --by-group calibrates many, medium and few each; --sets prevalence
                               makes prevalence-adjusted sets, which hold rare classes more often
--recall defect=0.9            decide so that 90% of the class defect are found, from the RUN's validation images; its
                               price is printed and written beside the CSV (NAME-price.json), and the CSV has a column
                               `decision`. An export may keep this rule (export --recall); then it is used
--costs FILE                   decide by the least expected cost: a CSV whose first line names the predicted classes and
                               whose other lines have a true class and its costs, or JSON {true: {predicted: cost}}
--five-crops                   also give the label by the mean of five crops
"""

from __future__ import annotations

from collections.abc import Sequence

from rescom_timm.cli import add_rules, answer, check_rules, new_parser, temperature


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the predictions; returns the exit code."""
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm predict runs/my_photos photos/ -o labels.csv",
        "rescom-timm predict runs/my_photos --data photos --list labels.csv --coverage 0.9",
    )
    parser.add_argument("model", help="a run's folder, an exported folder or a Hub id")
    parser.add_argument("images", nargs="*", default=[], help="image files and folders")
    parser.add_argument("--revision", help="of a Hub id: a branch, a tag or a commit")
    parser.add_argument("--data", metavar="SOURCE", help="labelled images: digits, a Hub id, a folder")
    parser.add_argument("--list", metavar="FILE", help="a list of the labelled images in the folder SOURCE")
    parser.add_argument("--split", default="test", help="of the data set (default: test)")
    parser.add_argument("--top-k", type=int, default=5, help="classes of each image (default: 5)")
    parser.add_argument("--prior", help="train, uniform, estimate, or a file of name,number a line")
    parser.add_argument("--temperature", type=temperature, metavar="T", help="a number, or fitted")
    parser.add_argument("--embeddings", metavar="FILE", help="write features and embeddings, as safetensors")
    parser.add_argument("--nearest", type=int, default=0, metavar="K", help="name the K nearest training images")
    parser.add_argument("--among", metavar="FILE", help="embeddings to search; written if missing")
    parser.add_argument("--coverage", type=float, metavar="C", help="prediction sets of this coverage: 0.9")
    parser.add_argument("--sets", choices=["marginal", "prevalence"], default="marginal", help="kind of these sets")
    parser.add_argument("--by-group", action="store_true", help="coverage for many, medium and few each")
    add_rules(parser)
    parser.add_argument("--five-crops", action="store_true", help="also the label by the mean of five crops")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    parser.add_argument("--device", help="default: cuda if available")
    parser.add_argument("-o", "--output", default="predictions.csv", metavar="CSV", help="default: predictions.csv")
    options = parser.parse_args(argv)
    if bool(options.images) == bool(options.data):
        parser.error("give images, or --data SOURCE")
    if options.list and not options.data:
        parser.error("--list needs --data SOURCE")
    if options.among and not options.nearest:
        parser.error("--among needs --nearest")
    if (options.by_group or options.sets != "marginal") and options.coverage is None:
        parser.error("--by-group and --sets need --coverage")
    check_rules(parser, options)

    def work() -> int:
        from rescom_timm.cli.parts.predict import predict

        return predict(options)

    return answer(work, writes=[options.output, options.embeddings, options.among])
