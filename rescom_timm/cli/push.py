"""Push a run to the Hub, or complete a push that failed.

    rescom-timm push RUN [--repo owner/name] [key=value ...]

Uploads what the training left in RUN/hub/, or else the run as it is. key=value changes the recipe's hub section, such
as hub.strategy=checkpoint or hub.license=apache-2.0. --space OWNER/NAME also pushes a Space with the demo page.
--recall CLASS=R and --costs FILE keep a rule in the model, as of rescom-timm export.
The token comes from  hf auth login  or HF_TOKEN. To write the model to a folder or file instead: rescom-timm export.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import add_rules, answer, check_rules, export, new_parser, renamed

OLD_OPTIONS = {"export": "timm", "onnx": "onnx", "torch_export": "torch"}
"""Options of 0.2.0 and the formats of export that they are now."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Push a run; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm push runs/digits_lt --repo me/digits")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the hub section, such as hub.private=false"
    )
    parser.add_argument("--repo", help="owner/name (default: the recipe's hub.repo)")
    parser.add_argument("--space", metavar="OWNER/NAME", help="also a Space with the demo page of the pushed model")
    add_rules(parser, "keep a rule that finds at least this share of a class, which predict and demo then use")
    for option in OLD_OPTIONS:
        parser.add_argument(f"--{option.replace('_', '-')}", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weights", choices=["raw", "ema"], help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(argv)
    check_rules(parser, options)
    if all(getattr(options, option) is None for option in OLD_OPTIONS):
        return answer(lambda: push(options))
    code = 0
    for option, kind in OLD_OPTIONS.items():
        if path := getattr(options, option):
            renamed(f"push --{option.replace('_', '-')}", f"export --format {kind}")
            weights = ["--weights", options.weights] if options.weights else []
            overrides = options.overrides if kind == "timm" else []
            code = code or export.main([str(options.run), *overrides, "--format", kind, "-o", str(path), *weights])
    return code


def push(options: argparse.Namespace) -> int:
    """Push the run, and the Space if asked."""
    from rescom_timm.api import Run
    from rescom_timm.engine.run_folder import run_recipe
    from rescom_timm.hub.space import push_space

    run = Run(options.run)
    print(f"pushed: {run.push(options.repo, options.overrides, options.recall, options.costs)}")
    if options.space:
        hub = run_recipe(run.folder, options.overrides).hub
        print(f"pushed: {push_space(options.space, options.repo or str(hub.repo), hub.private)}")
    return 0
