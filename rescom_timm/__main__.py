"""The console command:  rescom-timm SUBCOMMAND ...  or  python -m rescom_timm SUBCOMMAND ...

Several processes train together with  accelerate launch -m rescom_timm train RECIPE.

Exit codes: 0 ok, 1 failed, 2 usage error, 3 index check, index overlap or doctor found something, 130 stopped by
Ctrl-C, 143 stopped by SIGTERM (a training has saved its state). An error is one line on stderr: error[CODE]: MESSAGE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from rescom_timm.cli import EXIT_CODES, renamed
from rescom_timm.text import escape_output, escaped_output

SUBCOMMANDS = {
    "train": ("train", "train a recipe, or resume a run"),
    "fit": ("fit", "the best model for your images in a time budget"),
    "recipes": ("recipes", "list the recipes of this package, or print one"),
    "get": ("get", "get the data of a shipped recipe: images, annotations, lists"),
    "pack": ("pack", "write a copy of a data set with smaller images in a few large files"),
    "init": ("init", "write a recipe for your own images"),
    "index": ("index", "make, check, convert, describe or compare index files"),
    "doctor": ("doctor", "find what may be wrong with a data set, image by image"),
    "class-features": ("class_features", "class features from class names, by CLIP's text tower"),
    "evaluate": ("evaluate", "evaluate a checkpoint of a run"),
    "compare": ("compare", "compare runs image by image: paired tests, differences with intervals"),
    "predict": ("predict", "labels for images"),
    "demo": ("demo", "a local page to try a model on images"),
    "plot": ("plot", "plots and an HTML report of runs"),
    "soup": ("soup", "average the weights of runs, or fit the temperature of one"),
    "robustness": ("robustness", "errors of a run on corrupted images"),
    "export": ("export", "write a run's model for timm, ONNX or torch.export"),
    "push": ("push", "push a run to the Hub"),
    "sweep": ("sweep", "train every combination of recipes, settings and seeds"),
}
"""The module of cli/ behind each subcommand, imported when it is called, and what it does."""
RENAMED = {name: f"index {name}" for name in ("make", "check", "convert", "describe", "overlap")} | {"figures": "plot"}
"""Subcommands of 0.2.0 and their present names. They work for one release."""
MOVED = {"benchmark": "tools/benchmark.py PART", "inference": "tools/benchmark.py inference BACKBONE"}
"""Subcommands of 0.2.0, and the files of a clone that do the same."""
MEANT = {
    "onnx": "export RUN --format onnx",
    "finetune": "train RECIPE",
    "run": "train RECIPE",
    "resume": "train RECIPE --resume",
    "val": "evaluate RUN",
    "validate": "evaluate RUN",
    "eval": "evaluate RUN",
    "test": "evaluate RUN",
    "infer": "predict RUN IMAGES",
    "classify": "predict RUN IMAGES",
    "detect": "predict RUN IMAGES",
    "serve": "demo RUN",
    "app": "demo RUN",
    "report": "plot RUN",
    "visualize": "plot RUN",
    "upload": "push RUN --repo OWNER/NAME",
    "publish": "push RUN --repo OWNER/NAME",
    "models": "recipes",
    "list": "recipes",
    "tune": "sweep RECIPE key=a,b,c",
    "grid": "sweep RECIPE key=a,b,c",
    "probe": "train RECIPE +probe from=RUN",
    "download": "get NAME",
    "new": "init FOLDER",
    "create": "init FOLDER",
    "version": "--version",
}
"""Subcommands of other libraries, and ours."""


def usage() -> str:
    """The text of rescom-timm --help."""
    width = max(map(len, SUBCOMMANDS)) + 2
    lines = [f"  {name:<{width}}{about}" for name, (_, about) in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: rescom-timm SUBCOMMAND ...        (rescom-timm SUBCOMMAND --help for its options)",
            "",
            *lines,
            "",
            "example: rescom-timm train digits_lt",
            EXIT_CODES,
            "on several processes: accelerate launch -m rescom_timm train RECIPE",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. argv: its name and arguments (default: those of the command line). Returns the exit code."""
    if argv is None:
        escape_output()  # until the process ends, tracebacks included
    try:
        with escaped_output():
            code = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    name, *arguments = argv or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(_version())
        return 0
    if name in RENAMED:
        renamed(name, RENAMED[name])
        name, *arguments = [*RENAMED[name].split(), *arguments]
    if name in MOVED:
        print(f"error[usage.arguments]: {name} left the package: in a clone, python {MOVED[name]}", file=sys.stderr)
        return 2
    if name not in SUBCOMMANDS:
        near = [MEANT[name.lower()]] if name.lower() in MEANT else get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"; did you mean  rescom-timm {near[0]}?" if near else ""
        print(usage(), file=sys.stderr)
        print(f"error[usage.arguments]: no subcommand {name!r}{hint}", file=sys.stderr)
        return 2
    command = import_module(f"rescom_timm.cli.{SUBCOMMANDS[name][0]}")
    return int(command.main(arguments, f"rescom-timm {name}"))


def _version() -> str:
    try:
        return f"rescom-timm {version('rescom-timm')}"
    except PackageNotFoundError:
        return "rescom-timm, not installed"


if __name__ == "__main__":
    sys.exit(main())
