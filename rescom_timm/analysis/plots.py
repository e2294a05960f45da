"""Every plot by name, for rescom-timm plot and the report."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from rescom_timm.analysis import confusion, curves, longtail, net_plots, reliability, robustness, schedule, style
from rescom_timm.analysis.opened_run import OpenedRun, open_run
from rescom_timm.analysis.run_files import Missing, RunFolder
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.errors import InputError, code_of

ONE_RUN: dict[str, ModuleType] = {"longtail": longtail, "confusion": confusion, "reliability": reliability}
SEVERAL_RUNS: dict[str, ModuleType] = {"curves": curves, "schedule": schedule, "robustness": robustness}
FROM_FILES = (*SEVERAL_RUNS, *ONE_RUN)
"""These read a run's files alone."""
FROM_NET = tuple(net_plots.PLOTS)
"""These need a run's checkpoint and its data."""
NAMES = (*FROM_FILES, *FROM_NET)


@dataclass(frozen=True)
class Drawn:
    """A plot ready to save: its name, the run it shows ("" for all), and the figure or why there is none."""

    name: str
    run: str
    figure: Figure | None = None
    table: style.Table | None = None
    missing: str = ""


def check_names(names: Sequence[str], known: Sequence[str] = NAMES) -> None:
    """Raises InputError, with the nearest name, for an unknown plot."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError("plot.name", f"unknown plot {name!r}{hint}; there are: {', '.join(known)}")


def draw_all(
    runs: Sequence[RunFolder],
    names: Sequence[str] = FROM_FILES,
    evaluation: str = "",
    checkpoint: str = "last",
    overrides: Sequence[str] = (),
) -> Iterator[Drawn]:
    """The plots of these names: one of all runs for SEVERAL_RUNS, one per run for the others.

    evaluation: "<split>-<checkpoint>", by default each run's own choice (run_files.RunFolder.evaluations).
    checkpoint, overrides: of the runs opened for FROM_NET, as in opened_run.open_run. A plot that a run has no data for
    has the reason in `missing`.
    """
    check_names(names)

    @cache
    def opened(run: RunFolder) -> OpenedRun | Missing:
        try:
            return open_run(run.path, checkpoint, overrides, run.name)
        except (ValueError, OSError, CheckpointError) as error:
            return Missing(code_of(error), f"cannot open run {run.name}: {error}")

    for name in names:
        if name in SEVERAL_RUNS:
            yield _drawn(name, "", SEVERAL_RUNS[name], lambda: runs)
            continue
        for run in runs:
            if name in ONE_RUN:
                yield _drawn(name, run.name, ONE_RUN[name], partial(run.evaluation, evaluation))
            else:
                yield _from_net(name, run.name, opened(run))


def _drawn(name: str, run: str, module: ModuleType, source: Callable[[], Any]) -> Drawn:
    try:
        measured = module.measure(source())
    except Missing as error:
        return Drawn(name, run, missing=str(error))
    return Drawn(name, run, module.draw(measured), module.table(measured))


def _from_net(name: str, run: str, opened: OpenedRun | Missing) -> Drawn:
    if isinstance(opened, Missing):
        return Drawn(name, run, missing=str(opened))
    module, measure = net_plots.PLOTS[name]
    try:
        measured = measure(opened)
    except ValueError as error:  # Missing, or images and features without a plot
        return Drawn(name, run, missing=str(error))
    return Drawn(name, run, module.draw(measured), module.table(measured))
