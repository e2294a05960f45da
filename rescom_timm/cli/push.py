"""Push a run to the Hub, or complete a push that failed:  rescom-timm push RUN [--repo owner/name] [key=value ...]

What the training left in RUN/hub/ is uploaded; where nothing is left, the run as it stands is. key=value changes the
recipe's hub section, such as hub.strategy=checkpoint or hub.license=apache-2.0. --export FOLDER only writes what would
be pushed, with its model card, and needs no network; --onnx FILE writes the classifier as ONNX, --torch-export FILE
as a program of torch.export, both with class names and preprocessing inside. --space
OWNER/NAME pushes a Space with the demo page too.
The token comes from  hf auth login  or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import answer, new_parser


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm push runs/digits_lt --repo me/digits",
        "rescom-timm push runs/digits_lt --onnx digits.onnx",
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the hub section, such as hub.private=false"
    )
    parser.add_argument("--repo", help="owner/name; the recipe's hub.repo by default")
    parser.add_argument("--space", metavar="OWNER/NAME", help="also a Space with the demo page of the pushed model")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write what would be pushed, and push nothing")
    parser.add_argument(
        "--weights", choices=["raw", "ema"], help="with --export: as trained, or averaged (train.ema.export by default)"
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write the classifier as ONNX, and push nothing")
    parser.add_argument(
        "--torch-export", type=Path, metavar="FILE", help="the same as a program of torch.export (.pt2)"
    )
    arguments = parser.parse_intermixed_args(words)
    return answer(lambda: push(arguments), writes=[arguments.onnx, arguments.torch_export], folders=[arguments.export])


def push(arguments: argparse.Namespace) -> int:
    from rescom_timm.engine.run_folder import run_recipe
    from rescom_timm.hub.push import export_push, push_run
    from rescom_timm.hub.space import push_space
    from rescom_timm.inference.onnx import export_onnx
    from rescom_timm.inference.program import export_program

    if arguments.onnx or arguments.torch_export:
        print("exporting and comparing the logits, which takes up to a minute ...", file=sys.stderr, flush=True)
        if arguments.onnx:
            print(export_onnx(arguments.run, arguments.onnx))
        if arguments.torch_export:
            print(export_program(arguments.run, arguments.torch_export))
        return 0
    overrides = [*arguments.overrides, *([f"hub.repo={arguments.repo}"] if arguments.repo else [])]
    if arguments.export:
        print(export_push(arguments.run, arguments.export, overrides, arguments.weights))
        return 0
    print(f"pushed: {push_run(arguments.run, overrides)}")
    if arguments.space:
        hub = run_recipe(arguments.run, overrides).hub
        print(f"pushed: {push_space(arguments.space, str(hub.repo), hub.private)}")
    return 0
