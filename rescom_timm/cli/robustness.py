"""Robustness of a run to image corruptions.

    rescom-timm robustness RUN [--baseline RUN|alexnet] [--prepared FOLDER] [--limit N] [key=value ...]

Top-1 error for the fifteen kinds of ImageNet-C at five severities, their mean, and relative to a baseline mCE and
relative mCE; as JSON, CSV and severity curves in RUN/robustness. Images are corrupted here (pip install
'rescom-timm[robustness]'; with ImageNet-C's strengths, which are harsher than CIFAR-10-C's), or read from a prepared
ImageNet-C or CIFAR-10-C. Kinds that are measured already are kept, so a stopped measurement resumes. key=value changes
the run's recipe, such as data.source=PATH. Several processes share the work:
accelerate launch -m rescom_timm robustness RUN
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rescom_timm.cli import answer, new_parser

if TYPE_CHECKING:
    from rescom_timm.analysis.opened_run import OpenedRun
    from rescom_timm.analysis.robustness import Robustness


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Measure and print the errors; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm robustness runs/digits_lt --kinds gaussian_noise,fog")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--baseline", metavar="RUN", help="another run's folder, or alexnet (of ImageNet-C)")
    parser.add_argument("--prepared", metavar="FOLDER", help="ImageNet-C or CIFAR-10-C")
    parser.add_argument("--kinds", default="common", help="common (15), all (19), or names joined by commas")
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--checkpoint", default="last", help="last, best, or the folder of a checkpoint")
    parser.add_argument("--limit", type=int, metavar="N", help="images, the same for every kind (by --seed)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args(argv)
    return answer(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Measure the run, and the baseline if it is a run; print and write the results."""
    from rescom_timm.analysis import robustness, style
    from rescom_timm.analysis.opened_run import open_run
    from rescom_timm.analysis.robustness import Robustness
    from rescom_timm.analysis.run_files import open_runs
    from rescom_timm.api import Run
    from rescom_timm.errors import InputError

    if options.limit is not None and options.limit < 1:
        raise InputError("usage.arguments", f"--limit must be at least 1, not {options.limit}")
    with_run = options.baseline not in (None, "alexnet")
    folders = open_runs(Run(run).folder for run in [options.run, *([options.baseline] if with_run else [])])
    opened = open_run(options.run, options.checkpoint, options.overrides, folders[0].name)
    if options.baseline == "alexnet" and len(opened.data.counts) != 1000:
        raise InputError(
            "usage.arguments",
            f"--baseline alexnet is for the 1,000 classes of ImageNet, and the run has {len(opened.data.counts)}: "
            "give the folder of a run",
        )
    everything, found, path = measured(opened, options.run, options)
    baseline: Robustness | str | None = options.baseline
    if with_run:
        other = open_run(Path(options.baseline), options.checkpoint, options.overrides, folders[1].name)
        _, baseline, _ = measured(other, Path(options.baseline), options)
    figures = robustness.summary(found, baseline)
    if not opened.accelerator.is_main_process:
        return 0
    robustness.write(path, everything, figures)
    results = [found, baseline] if isinstance(baseline, Robustness) else [found]
    print(f"{found.setting.split}, {found.setting.images} images, checkpoint {found.checkpoint}: {found.chosen}; "
          f"{found.setting.source}; top-1 error in percent")  # fmt: skip
    for kind, errors in found.errors.items():
        print(f"{kind:<20}" + "".join(f"{error:8.2f}" for error in errors))
    for name, value in figures.items():
        if not isinstance(value, dict):
            print(f"{name:<20}" + (f"{value:8.2f}" if isinstance(value, float) else f"  {value}"))
    for written in [path, *style.save(robustness.draw(results), robustness.table(results), path.with_suffix(""))]:
        print(written)
    return 0


def measured(opened: OpenedRun, folder: Path, options: argparse.Namespace) -> tuple[Robustness, Robustness, Path]:
    """A run's errors: for every kind measured so far, for the kinds asked for, and the file that has them."""
    from rescom_timm.analysis import robustness
    from rescom_timm.data.corruptions import COMMON, KINDS, prepared

    source = prepared(options.prepared, opened.data.class_names) if options.prepared else None
    named = {"common": COMMON, "all": KINDS}.get(options.kinds) or options.kinds.split(",")
    kinds = [kind for kind in named if source is None or kind in source.kinds or options.kinds not in ("common", "all")]
    path = robustness.path_of(folder, options.split, opened.checkpoint, source)

    def keep(found: Robustness) -> None:
        if opened.accelerator.is_main_process:
            robustness.write(path, found, {})
            print(f"{opened.name}: {len(found.errors)} kinds measured, {len(kinds)} asked for", file=sys.stderr)

    known = robustness.read(path, opened.name)
    split = opened.split(options.split)
    found = robustness.corrupted(opened, split, kinds, source, options.limit, options.seed, known, keep)
    return found, robustness.of_kinds(found, kinds), path
