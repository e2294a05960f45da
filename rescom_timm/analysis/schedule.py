"""The learning rate as it was."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from matplotlib.figure import Figure

from rescom_timm.analysis import curves, style
from rescom_timm.analysis.curves import Curve
from rescom_timm.analysis.run_files import Missing, RunFolder

table = curves.table
_NAMES = ("lr", "learning_rate")


def measure(runs: Sequence[RunFolder]) -> list[Curve]:
    """The logged learning rate of each run ("lr" or "learning_rate", also "train/lr").

    Raises Missing if none is logged.
    """
    names: set[str] = set()
    for run in runs:
        with suppress(Missing):
            names |= {name for row in run.rows() for name in row if curves.last_part(name) in _NAMES}
    if not names:
        raise Missing("plot.log", f"no learning rate is logged in {', '.join(run.name for run in runs)}")
    return curves.measure(runs, sorted(names))


def draw(rates: Sequence[Curve]) -> Figure:
    """Learning rate against epoch (or step), linear above and logarithmic below."""
    runs = [curve.run for curve in rates]
    figure = style.new_figure(7.0, 5.0)
    panels = figure.subplots(2, 1, sharex=True)
    for panel, scale in zip(panels, ("linear", "log"), strict=True):
        for index, curve in enumerate(rates):
            panel.plot(curve.x, np.where((scale == "log") & (curve.y <= 0), np.nan, curve.y), style.line(index),
                       color=style.color(index), linewidth=1.4)  # fmt: skip
        panel.set_yscale(scale)
        style.tidy(panel, "", "", f"learning rate\n({scale} scale)", "y")
    axis = " / ".join(dict.fromkeys(curve.axis for curve in rates))
    panels[-1].set_xlabel(axis, fontsize=9)
    curves.run_legend(figure, runs)
    return figure
