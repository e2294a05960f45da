"""The console command:  rescom-timm SUBCOMMAND ...  or  python -m rescom_timm SUBCOMMAND ...

Several processes train together with  accelerate launch -m rescom_timm train RECIPE.

Exit codes: 0 ok, 1 failed, 2 usage error, 3 check, overlap or doctor found something, 130 stopped by Ctrl-C, 143
stopped by SIGTERM (a training has saved its state). An error is one line on stderr: error[CODE]: MESSAGE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from rescom_timm.cli import EXIT_CODES
from rescom_timm.text import escape_output, escaped_output

VERBS = {
    "train": ("train", "train a recipe, or resume a run"),
    "fit": ("fit", "the best model for your images in a time budget"),
    "recipes": ("recipes", "list the recipes of this package, or print one"),
    "get": ("get", "get the data of a shipped recipe: images, annotations, lists"),
    "pack": ("pack", "write a copy of a data set with smaller images in a few large files"),
    "init": ("index", "write a recipe for your own images"),
    "make": ("index", "draw a long-tailed index from a data set"),
    "convert": ("index", "bring an official list into this package's format"),
    "check": ("index", "say everything that is wrong with an index or its images"),
    "doctor": ("doctor", "what may be wrong with a data set, image by image"),
    "describe": ("index", "class counts and long tail of an index"),
    "overlap": ("index", "images that stand in two indexes"),
    "class-features": ("class_features", "class features from class names, by CLIP's text tower"),
    "evaluate": ("evaluate", "evaluate a checkpoint of a run"),
    "predict": ("predict", "labels for images"),
    "demo": ("demo", "a page to try a model on images"),
    "figures": ("figures", "pictures and a report of runs"),
    "robustness": ("robustness", "errors of a run on corrupted images"),
    "push": ("push", "push a run to the Hub, or write it as ONNX"),
    "sweep": ("sweep", "train every combination of recipes, settings and seeds"),
}
"""What each subcommand does, and the file of cli/ that does it, which is imported when its subcommand is called."""
MOVED = {"benchmark": "tools/benchmark.py PART", "inference": "tools/benchmark.py inference BACKBONE"}
"""Subcommands of 0.2.0, and the files of a clone that do the same."""


MEANT = {
    "export": "push RUN --onnx FILE.onnx (a trained run holds its plain timm model in RUN/model)",
    "onnx": "push RUN --onnx FILE.onnx",
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
    "plot": "figures RUN",
    "report": "figures RUN",
    "visualize": "figures RUN",
    "upload": "push RUN --repo OWNER/NAME",
    "publish": "push RUN --repo OWNER/NAME",
    "models": "recipes",
    "list": "recipes",
    "tune": "sweep RECIPE key=a,b,c",
    "grid": "sweep RECIPE key=a,b,c",
    "new": "init FOLDER",
    "create": "init FOLDER",
    "version": "--version",
}
"""Subcommands of other libraries, and what to write here."""


def usage() -> str:
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb:<{width}}{about}" for verb, (_, about) in VERBS.items()]
    return "\n".join(
        [
            "usage: rescom-timm SUBCOMMAND ...        (rescom-timm SUBCOMMAND --help says more)",
            "",
            *lines,
            "",
            "example: rescom-timm train digits_lt",
            EXIT_CODES,
            "on several processes: accelerate launch -m rescom_timm train RECIPE",
        ]
    )


def main(words: Sequence[str] | None = None) -> int:
    """words: subcommand and its arguments; those of the command line by default. Returns the exit code."""
    if words is None:
        escape_output()  # to the end of the process, a traceback too
    try:
        with escaped_output():
            code = _run(list(sys.argv[1:] if words is None else words))
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(_version())
        return 0
    if words[0] in MOVED:
        print(
            f"error[usage.arguments]: {words[0]} left the package: in a clone, python {MOVED[words[0]]}",
            file=sys.stderr,
        )
        return 2
    if words[0] not in VERBS:
        near = [MEANT[words[0].lower()]] if words[0].lower() in MEANT else get_close_matches(words[0], VERBS, n=1)
        hint = f"; did you mean  rescom-timm {near[0]}?" if near else ""
        print(usage(), file=sys.stderr)
        print(f"error[usage.arguments]: no subcommand {words[0]!r}{hint}", file=sys.stderr)
        return 2
    file, _ = VERBS[words[0]]
    command = import_module(f"rescom_timm.cli.{file}")
    if file == "index":
        return int(command.main(words, "rescom-timm"))
    return int(command.main(words[1:], f"rescom-timm {words[0]}"))


def _version() -> str:
    try:
        return f"rescom-timm {version('rescom-timm')}"
    except PackageNotFoundError:
        return "rescom-timm, not installed"


if __name__ == "__main__":
    sys.exit(main())
