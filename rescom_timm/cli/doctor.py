"""Find what may be wrong with a data set, image by image.

    rescom-timm doctor RECIPE|RUN [key=value ...] [-o doctor.html]

Reads every image of the recipe's splits and reports: unreadable images; the same or nearly the same image in two
splits, with two labels or twice; tiny, single-coloured, grey, long and rotated (EXIF) images; 16-bit images with fewer
bits in use; classes too small for a validation split or without test images; class names that look alike. For a RUN it
also reports test and validation images whose labels the net disagrees with (confident learning, over classes of at
least ten such images; the net has memorised its training images). Prints text and writes an HTML page with thumbnails,
and doctor-findings.csv and .json beside it. Exit code 3 if images are unreadable, in two splits or have two labels. For
your own images, first: rescom-timm init.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rescom_timm.cli import answer, new_parser

if TYPE_CHECKING:
    from rescom_timm.data.doctor import Examined, Finding
    from rescom_timm.data.sources import Data


GRAVE = ("broken", "exact_leak", "exact_label")
"""Findings with exit code 3."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Examine a data set; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm doctor my_photos.yaml -o doctor.html")
    parser.add_argument("recipe", help="a recipe, by path or name, or a run's folder")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("-o", "--output", default="doctor.html", metavar="HTML", help="default: doctor.html")
    options = parser.parse_intermixed_args(argv)
    return answer(lambda: look(options), writes=[options.output])


def look(options: argparse.Namespace) -> int:
    """Examine the images, print the findings and write the page."""
    from rescom_timm.analysis.doctor_page import as_text, write
    from rescom_timm.api import Run
    from rescom_timm.config.loading import load as load_recipe
    from rescom_timm.data.doctor import examine, findings
    from rescom_timm.data.progress import image_bar
    from rescom_timm.data.sources import load, numbered_as
    from rescom_timm.engine.run_folder import class_names, run_recipe

    run = Run(options.recipe).folder if Path(options.recipe).is_dir() else None
    recipe = run_recipe(run, options.overrides) if run else load_recipe(options.recipe, options.overrides)
    data = load(recipe.data)
    if run:
        data = numbered_as(data, class_names(run), str(run))
    every = {"train": data.train, "test": data.test, "validation": data.validation}
    splits = {name: split for name, split in every.items() if split is not None}
    total = sum(len(split.rows) for split in splits.values())
    with image_bar(total, "images") as bar:
        images = examine(splits, bar.update, recipe.loader.reading)
    found = findings(images, data.class_names, data.counts)
    if run:
        found += suspects(run, options.overrides, images, data)
    print(as_text(images, found, data.class_names))
    title = f"What may be wrong with {recipe.name or Path(recipe.data.source).name}"
    for path in write(options.output, images, found, data.class_names, title):
        print(path)
    return 3 if any(finding.key in GRAVE for finding in found) else 0


def suspects(run: Path, overrides: Sequence[str], images: Examined, data: Data) -> list[Finding]:
    """Labels of test and validation images that a run's net disagrees with."""
    import numpy as np

    from rescom_timm.analysis.opened_run import open_run
    from rescom_timm.data.doctor import Finding, disputed

    opened = open_run(run, overrides=overrides)
    names = [name for name in ("test", "validation") if name in images.splits]
    seen = [opened.look(images.splits[name]) for name in names]
    labels = np.concatenate([one.labels.numpy() for one in seen])
    shares = np.concatenate([one.logits.softmax(dim=1).numpy() for one in seen])
    positions = np.concatenate([np.flatnonzero(images.split == name) for name in names])
    groups, notes = [], []
    for i, other in disputed(labels, shares):
        groups.append([int(positions[i])])
        notes.append(
            "the net says " + ", ".join(f"{data.class_names[k]} {shares[i, k]:.2f}" for k in (other, int(labels[i])))
        )
    if not groups:
        return []
    advice = "label or net may be wrong: look at them, and do not tune on a test set that you clean so"
    return [Finding("labels", "Labels that the net disagrees with", advice, groups, notes=tuple(notes))]
