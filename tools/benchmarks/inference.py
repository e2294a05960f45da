"""`inference`: inference time of a net against ensembles of 2, 3 and 4 experts (the paper's Tables 1 and 2).

    python tools/benchmark.py inference resnet50 [--batch-size 64] [--device cuda] [--precision float16] [key=value ...]

Any backbone of timm; key=value is passed on to timm.create_model. Writes JSON with machine and versions, CSV and a
picture; prints medians and their ratios, which are taken in one run. On a CPU a small size works in seconds:
python tools/benchmark.py inference resnet32_cifar --batch-size 8 --classes 100 --rounds 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rescom_timm.errors import InputError

PRECISIONS = ("float32", "bfloat16", "float16")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", help="any name of timm.list_models()")
    parser.add_argument("options", nargs="*", metavar="key=value", help="of timm.create_model")
    parser.add_argument("--experts", type=numbers, default="2,3,4", help="sizes of the ensembles; 2,3,4 by default")
    parser.add_argument("--branch", help="first child of the backbone of which every expert has its own copy")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, metavar="PIXELS", help="of the square images; the backbone's by default")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", help="cuda if there is one")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("-o", "--output", default="inference", metavar="FOLDER", help="inference by default")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from benchmarks import ensembles
    from rescom_timm.analysis import style
    from rescom_timm.io import parse_yaml, write_json

    if wrong := [word for word in options.options if "=" not in word]:
        raise InputError("usage.arguments", f"{wrong[0]!r} is not key=value, such as img_size=384")
    bar = tqdm(bar_format="{desc}", leave=False)
    try:
        found = ensembles.measure(
            options.backbone,
            options.experts,
            batch_size=options.batch_size,
            image_size=(options.size, options.size) if options.size else None,
            num_classes=options.classes,
            device=options.device,
            precision=options.precision,
            rounds=options.rounds,
            branch=options.branch,
            channels_last=options.channels_last,
            options={key: parse_yaml(value) for key, _, value in (w.partition("=") for w in options.options)},
            note=bar.set_description_str,
        )
    except RuntimeError as error:  # of torch, for a net that does not take such images or does not fit the memory
        raise InputError("usage.arguments", str(error).splitlines()[0]) from error
    finally:
        bar.close()
    for row in (record := found.record())["nets"]:
        speed = f"{row['median_ms']:10.3f} ms{row['images_per_second']:12,.1f} images/s"
        print(f"{row['net']:<28}{speed}   x {row['ratio']:.2f}")
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None))
    name = options.backbone.replace("/", "-").replace(":", "-")
    stem = Path(options.output) / f"{name}-{found.batch_size}-{found.precision}"
    for path in style.save(ensembles.draw(found), ensembles.table(found), stem):
        print(path)
    write_json(stem.with_name(stem.name + ".json"), record)
    print(stem.with_name(stem.name + ".json"))
    return 0
