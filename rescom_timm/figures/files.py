"""The figures that need nothing but run folders, by name: what tools/figures.py and the report can draw."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from rescom_timm.figures import confusion, curves, longtail, reliability, schedule, style
from rescom_timm.figures.folder import Missing, RunFolder

ONE_RUN: dict[str, ModuleType] = {"longtail": longtail, "confusion": confusion, "reliability": reliability}
SEVERAL_RUNS: dict[str, ModuleType] = {"curves": curves, "schedule": schedule}
NAMES = (*SEVERAL_RUNS, *ONE_RUN)


@dataclass(frozen=True)
class Drawn:
    """A figure ready to save: its name, the run it shows ("" for all), and the figure or why there is none."""

    name: str
    run: str
    figure: Figure | None = None
    table: style.Table | None = None
    missing: str = ""


def check_names(names: Sequence[str], known: Sequence[str] = NAMES) -> None:
    """Raises ValueError with the nearest right name for a name that is no figure's."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"No figure is called {name!r}.{hint} There are: {', '.join(known)}.")


def draw_all(runs: Sequence[RunFolder], names: Sequence[str] = NAMES, evaluation: str = "") -> Iterator[Drawn]:
    """The figures of these names: one of all runs for curves and schedule, one per run for the others.

    evaluation: "<split>-<checkpoint>", by default each run's own choice (folder.RunFolder.evaluations). A figure whose
    run lacks what it needs comes with `missing`, in words.
    """
    check_names(names)
    for name in names:
        if name in SEVERAL_RUNS:
            yield _drawn(name, "", SEVERAL_RUNS[name], lambda: runs)
            continue
        for run in runs:
            yield _drawn(name, run.name, ONE_RUN[name], partial(run.evaluation, evaluation))


def _drawn(name: str, run: str, module: ModuleType, source: Callable[[], Any]) -> Drawn:
    try:
        measured = module.measure(source())
    except Missing as error:
        return Drawn(name, run, missing=str(error))
    return Drawn(name, run, module.draw(measured), module.table(measured))
