"""Time of inference: a plain net against ensembles of 2, 3 and 4 experts (the paper's Tables 1 and 2):

    rescom-timm inference resnet50 [--batch-size 64] [--device cuda] [--precision float16] [key=value ...]

Any backbone of timm; key=value is passed on to timm.create_model. Writes JSON with machine and versions, CSV and a
picture; prints medians and their ratios, which are taken in one run. On a CPU a small size works in seconds:
rescom-timm inference resnet32_cifar --batch-size 8 --classes 100 --rounds 10
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import answer, new_parser

PRECISIONS = ("float32", "bfloat16", "float16")


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm inference resnet32_cifar --batch-size 8 --classes 100 --rounds 10",
    )
    parser.add_argument("backbone", help="any name of timm.list_models()")
    parser.add_argument("options", nargs="*", metavar="key=value", help="of timm.create_model")
    parser.add_argument("--experts", default="2,3,4", help="sizes of the ensembles; 2,3,4 by default")
    parser.add_argument("--branch", help="first child of the backbone of which every expert has its own copy")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, metavar="PIXELS", help="of the square images; the backbone's by default")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", help="cuda if there is one")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("-o", "--output", default="inference", metavar="FOLDER", help="inference by default")
    arguments = parser.parse_intermixed_args(words)
    try:
        arguments.experts = [int(number) for number in arguments.experts.split(",")]
    except ValueError:
        parser.error(f"--experts is like 2,3,4, not {arguments.experts!r}")
    if wrong := [word for word in arguments.options if "=" not in word]:
        parser.error(f"{wrong[0]!r} is not key=value, such as img_size=384")
    return answer(lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from benchmarks import ensembles
    from rescom_timm.analysis import style
    from rescom_timm.io import parse_yaml, write_json

    bar = tqdm(bar_format="{desc}", leave=False)
    try:
        found = ensembles.measure(
            arguments.backbone,
            arguments.experts,
            batch_size=arguments.batch_size,
            image_size=(arguments.size, arguments.size) if arguments.size else None,
            num_classes=arguments.classes,
            device=arguments.device,
            precision=arguments.precision,
            rounds=arguments.rounds,
            branch=arguments.branch,
            channels_last=arguments.channels_last,
            options={key: parse_yaml(value) for key, _, value in (w.partition("=") for w in arguments.options)},
            note=bar.set_description_str,
        )
    except RuntimeError as error:  # of torch, for a net that does not take such images or does not fit the memory
        raise ValueError(str(error).splitlines()[0]) from error
    finally:
        bar.close()
    for row in (record := found.record())["nets"]:
        speed = f"{row['median_ms']:10.3f} ms{row['images_per_second']:12,.1f} images/s"
        print(f"{row['net']:<28}{speed}   x {row['ratio']:.2f}")
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None))
    name = arguments.backbone.replace("/", "-").replace(":", "-")
    stem = Path(arguments.output) / f"{name}-{found.batch_size}-{found.precision}"
    for path in style.save(ensembles.draw(found), ensembles.table(found), stem):
        print(path)
    write_json(stem.with_name(stem.name + ".json"), record)
    print(stem.with_name(stem.name + ".json"))
    return 0
