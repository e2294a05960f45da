"""Write a run's model for other programs.

    rescom-timm export RUN [--format timm|onnx|torch] [-o OUTPUT] [key=value ...]

timm (default): a folder for timm, transformers and rescom_timm.from_pretrained: what push uploads, with its model card.
--recall CLASS=R keeps an operating point, from the run's validation images, and --costs FILE a table of costs (see
rescom-timm predict --help): the rule that predict and demo then use.
key=value changes the recipe's hub section, such as hub.license=apache-2.0.
onnx, torch: the classifier as an ONNX file or a program of torch.export (.pt2), from normalised float32 images
(N, 3, H, W) to logits (N, K), with class names and preprocessing inside. The logits are compared with the net's.
The default OUTPUT is RUN/export, RUN/model.onnx or RUN/model.pt2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import add_rules, answer, check_rules, new_parser

FORMATS = {"timm": "export", "onnx": "model.onnx", "torch": "model.pt2"}
"""Each format and the name of its output in RUN."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Export a run; returns the exit code."""
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm export runs/digits_lt -o digits",
        "rescom-timm export runs/digits_lt --format onnx -o digits.onnx",
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the hub section, for the card"
    )
    parser.add_argument("--format", choices=FORMATS, default="timm")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="a folder (timm) or a file (onnx, torch)")
    parser.add_argument(
        "--weights", choices=["raw", "ema"], help="as trained, or averaged (default: as train.ema.export says)"
    )
    add_rules(parser, "keep in the folder a rule that finds at least this share of a class, which predict uses")
    options = parser.parse_intermixed_args(argv)
    check_rules(parser, options)
    if (options.recall or options.costs) and options.format != "timm":
        parser.error(f"--format {options.format} keeps no rule: leave out --recall and --costs")
    if options.overrides and options.format != "timm":
        parser.error(f"--format {options.format} has no model card: leave out {' '.join(options.overrides)}")

    def work() -> int:
        from rescom_timm.api import Run

        run, output = Run(options.run), options.output or options.run / FORMATS[options.format]
        if options.format != "timm":
            print("exporting and comparing the logits, which takes up to a minute ...", file=sys.stderr, flush=True)
        rule = options.recall, options.costs
        print(run.export(output, options.format, options.weights, options.overrides, *rule))
        return 0

    is_folder = options.format == "timm"
    return answer(work, writes=[] if is_folder else [options.output], folders=[options.output] if is_folder else [])
